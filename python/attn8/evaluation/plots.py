# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The results of ``python -m attn8 eval`` as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

# The same picture from the same numbers, byte for byte.
_METADATA = {"Date": None}
mpl.rcParams["svg.hashsalt"] = "attn8"
mpl.rcParams["svg.fonttype"] = "none"


def _save(figure: Any, folder: Path, name: str) -> None:
    figure.tight_layout()
    figure.savefig(folder / f"{name}.svg", metadata=_METADATA)
    plt.close(figure)


def _perplexity(rows: list[dict[str, Any]], folder: Path) -> None:
    modes = [mode for mode in dict.fromkeys(r["mode"] for r in rows) if mode != "float"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for mode in modes:
        found = [r for r in rows if r["mode"] == mode]
        lengths = [r["length"] for r in found]
        axes[0].errorbar(
            lengths,
            [100 * r["perplexity_change"] for r in found],
            yerr=[100 * r["perplexity_change_error"] for r in found],
            marker="o",
            capsize=3,
            label=mode,
        )
        axes[1].plot(lengths, [r["kl"] for r in found], marker="o", label=mode)
    axes[0].set_ylabel("change of perplexity, %")
    axes[0].set_yscale("symlog", linthresh=0.2)
    axes[1].set_ylabel("KL from float attention")
    axes[1].set_yscale("log")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, folder, "eval_perplexity")


def _layers(study: dict[str, Any], folder: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.5))
    for mode, found in study["modes"].items():
        after = found["after_layer"]
        axes[0].plot(range(1, len(after) + 1), [100 * x for x in after], marker=".", label=mode)
        for which, style in (("first", "-"), ("last", "--")):
            axes[1].plot(
                [x["layers"] for x in found[which]],
                [x["kl"] for x in found[which]],
                style,
                marker="o",
                label=f"{mode}, {which}",
            )
        axes[2].plot(
            [x["layer"] for x in found["alone"]],
            [x["kl"] for x in found["alone"]],
            marker=".",
            label=mode,
        )
    axes[0].set(xlabel="layer", ylabel="error of hidden states, %", yscale="log")
    axes[1].set(xlabel="layers replaced", ylabel="KL", yscale="log")
    axes[2].set(xlabel="the one layer replaced", ylabel="KL", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, folder, "eval_layers")


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw perplexities and layers into ``folder``, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    if "perplexity" in results:
        _perplexity(results["perplexity"], folder)
    if "layers" in results:
        _layers(results["layers"], folder)
