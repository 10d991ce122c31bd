# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The results of ``python -m attn8 eval`` as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _percent(x: float, digits: int = 2) -> str:
    return f"{100 * x:.{digits}f}"


def _signed(x: float, error: float) -> str:
    return f"{100 * x:+.2f} ± {100 * error:.2f}"


def perplexity(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of perplexities."""
    head = (
        "length, mode",
        "tokens",
        "perplexity",
        "change %",
        "same top token %",
        "KL",
        "hidden-state error %",
    )
    return _table(
        head,
        [
            (
                f"{r['length']}, {r['mode']}",
                str(r["tokens"]),
                f"{r['perplexity']:.3f}",
                _signed(r["perplexity_change"], r["perplexity_change_error"]),
                _percent(r["top1_agreement"]),
                f"{r['kl']:.2e}",
                _percent(r["hidden_rel_l2"]),
            )
            for r in rows
        ],
    )


def layers(study: dict[str, Any]) -> list[str]:
    """Return the tables of the study of layers."""
    lines = []
    for mode, found in study["modes"].items():
        after = found["after_layer"]
        lines += [f"{mode}, {study['tokens']} tokens", ""]
        lines += _table(
            ("layers replaced", "first: hidden err %", "KL", "last: hidden err %", "KL"),
            [
                (
                    str(first["layers"]),
                    _percent(first["hidden_rel_l2"]),
                    f"{first['kl']:.2e}",
                    _percent(last["hidden_rel_l2"]),
                    f"{last['kl']:.2e}",
                )
                for first, last in zip(found["first"], found["last"], strict=True)
            ],
        )
        worst = sorted(found["alone"], key=lambda x: -x["kl"])[:5]
        total = sum(x["kl"] for x in found["alone"])
        lines += [
            "KL of one layer replaced alone, largest: "
            + ", ".join(f"layer {x['layer']} {x['kl']:.2e}" for x in worst)
            + f"; sum over all layers {total:.2e}.",
            "",
            "Hidden-state error % after layer, all replaced: "
            + ", ".join(f"{i} {_percent(x)}" for i, x in enumerate(after, 1) if i % 5 == 0)
            + ".",
            "",
        ]
    return lines


def generation(found: dict[str, Any]) -> list[str]:
    """Return the table of generations."""
    names = ("accurate", "accurate, INT8 cache")
    return _table(
        ("prompt", "tokens", *(f"same as float: {name}" for name in names)),
        [
            (run["prompt"], str(run["tokens"]), *(str(run[name]["same_until"]) for name in names))
            for run in found["runs"]
        ],
    )


def timing(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of times."""
    body = []
    for row in rows:
        for part in ("prefill", "decode"):
            ms = [sorted(times) for times in row[part]["ms"].values()]
            body.append(
                (
                    f"{part}, {row['length']} tokens",
                    *(f"{times[len(times) // 2]:.0f} ms" for times in ms),
                    f"{row[part]['speedup']:.2f}",
                )
            )
        held = row["cache_bytes"].values()
        body.append((f"cache, {row['length']} tokens", *(f"{n / 2**20:.0f} MiB" for n in held), ""))
    head = ("whole model", "torch SDPA, float cache", "accurate, INT8 cache", "times as fast")
    return _table(head, body)


def embeddings(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of embeddings."""
    return _table(
        (
            "mode",
            "cosine, mean",
            "least",
            "nearest the same %",
            "ten nearest %",
            "rank correlation",
        ),
        [
            (
                r["mode"],
                f"{r['cosine_mean']:.6f}",
                f"{r['cosine_least']:.6f}",
                _percent(r["top1"], 1),
                _percent(r["top10"], 1),
                f"{r['spearman']:.5f}",
            )
            for r in rows
        ],
    )


def tables(results: dict[str, Any]) -> str:
    """Return every part there is, under its heading."""
    parts = (
        ("perplexity", perplexity),
        ("layers", layers),
        ("generation", generation),
        ("time", timing),
        ("embeddings", embeddings),
    )
    lines: list[str] = []
    for name, make in parts:
        if name in results:
            lines += [f"## {name.capitalize()}", "", *make(results[name])]
    return "\n".join(lines)
