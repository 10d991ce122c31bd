#!/usr/bin/env python3
# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Describes captured Q, K and V: what makes them easy or hard to quantize, layer by layer.

Needs NumPy only.

Example
-------
``python tools/capture/describe.py smollm2.safetensors``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tensor_file
from command_line import Parser, exit_status, positive
from tensor_file import FloatArray


@dataclass(frozen=True)
class Facts:
    """Measures of one kv head and the query heads that read it, over the batch.

    A causal entry lines up at the bottom right: its last query sees all keys.
    """

    name: str
    """Prefix of the entry."""
    kv_head: int
    k_mean_energy: float
    """Part of the energy of K that lies in its mean over tokens: |mean|^2 / mean of |k_j|^2."""
    k_mean_over_std: float
    """Largest over channels of |mean| / std over tokens: how far smoothing shrinks that channel."""
    k_peak_over_rms: float
    """Median over tokens of max |k_j| / rms of k_j: what outlier channels cost a token scale."""
    v_norm_min: float
    """Smallest |v_j| / median |v|."""
    v_norm_max: float
    """Largest |v_j| / median |v|."""
    v_channel_spread: float
    """Largest over channels of max |v| / the median of the channels."""
    first_v_norm: float
    """|v_0| / median |v|."""
    first_k_norm: float
    """|k_0| / median |k|."""
    first_mass: float
    """Mean over queries of the probability of key 0."""
    first_mass_max: float
    """The same for the query head where it is largest."""
    low_v_mass: float
    """Mean probability of all keys together whose |v| is below half the median."""
    low_v_keys: float
    """Part of the keys that are such."""
    top_key: int
    """Key with the largest mean probability (the sink, where there is one)."""
    top_mass: float
    """Its mean probability."""
    top_v_norm: float
    """|v| of that key / median |v|."""
    logit_max: float
    """Largest |score| in nats, softmax_scale included."""
    logit_gap: float
    """Mean over queries of (largest score - mean score) in nats, over visible keys."""
    effective_keys: float
    """Mean over queries of exp(entropy): how many keys a query really reads."""


def facts_of_head(
    name: str,
    kv_head: int,
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    scale: float,
    causal: bool,
    rows: int,
) -> Facts:
    """Measure one kv head.

    Parameters
    ----------
    name, kv_head
        What the result is called.
    q : array ``(b, s_q, group, d)``
    k, v : array ``(b, s_k, d)``
    scale : float
        Factor of the scores.
    causal : bool
        Whether query i sees keys up to i + s_k - s_q only.
    rows : int
        At most this many queries are looked at, spread evenly over those that see more than half of
        the keys (so that early causal rows, which see few keys, do not count as sinks).

    Returns
    -------
    Facts
        Means over the batch; largest and smallest over the batch where the name says so.
    """
    keys, values = k.astype(np.float64), v.astype(np.float64)
    mean, std = keys.mean(axis=1), keys.std(axis=1)
    rms = np.sqrt((keys**2).mean(axis=2))
    k_norm, v_norm = np.linalg.norm(keys, axis=2), np.linalg.norm(values, axis=2)
    # A head of zeros has no direction; its ratios are 0 rather than NaN.
    tiny = np.finfo(np.float64).tiny
    v_ratio = v_norm / np.maximum(np.median(v_norm, axis=1, keepdims=True), tiny)
    k_ratio = k_norm / np.maximum(np.median(k_norm, axis=1, keepdims=True), tiny)

    channel_max = np.abs(values).max(axis=1)

    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    first_row = max(0, seqlen_k // 2 - (seqlen_k - seqlen_q)) if causal else 0
    first_row = min(first_row, seqlen_q - 1)
    chosen = np.unique(
        np.linspace(first_row, seqlen_q - 1, min(rows, seqlen_q - first_row)).astype(int)
    )
    hidden = np.arange(seqlen_k)[None, :] > chosen[:, None] + (seqlen_k - seqlen_q)
    mass = np.zeros((q.shape[0], q.shape[2], seqlen_k))
    logit_max, gaps, entropies = 0.0, [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, chosen, h].astype(np.float64) @ keys[b].T * scale
            visible = np.ma.array(scores, mask=hidden if causal else np.zeros_like(hidden))
            logit_max = max(logit_max, float(abs(visible).max()))
            peak = visible.max(axis=1).filled(0.0)
            gaps.append(float(np.mean(peak - visible.mean(axis=1).filled(0.0))))
            p = np.exp(visible - peak[:, None]).filled(0.0)
            p /= p.sum(axis=1, keepdims=True)
            log_p = np.log(np.where(p > 0, p, 1.0))
            entropies.append(float(np.exp(-(p * log_p).sum(axis=1)).mean()))
            mass[b, h] = p.mean(axis=0)
    head_mass = mass.mean(axis=(0, 1))
    top = int(head_mass.argmax())
    return Facts(
        name=name,
        kv_head=kv_head,
        k_mean_energy=float(
            ((mean**2).sum(axis=1) / np.maximum((k_norm**2).mean(axis=1), tiny)).mean()
        ),
        k_mean_over_std=float((np.abs(mean) / np.maximum(std, tiny)).max(axis=1).mean()),
        k_peak_over_rms=float(np.median(np.abs(keys).max(axis=2) / np.maximum(rms, tiny))),
        v_norm_min=float(v_ratio.min()),
        v_norm_max=float(v_ratio.max()),
        v_channel_spread=float(
            (channel_max.max(axis=1) / np.maximum(np.median(channel_max, axis=1), tiny)).mean()
        ),
        first_v_norm=float(v_ratio[:, 0].mean()),
        first_k_norm=float(k_ratio[:, 0].mean()),
        first_mass=float(mass[:, :, 0].mean()),
        first_mass_max=float(mass[:, :, 0].mean(axis=0).max()),
        low_v_mass=float((mass.mean(axis=1) * (v_ratio < 0.5)).sum(axis=1).mean()),
        low_v_keys=float((v_ratio < 0.5).mean()),
        top_key=top,
        top_mass=float(head_mass[top]),
        top_v_norm=float(v_ratio[:, top].mean()),
        logit_max=logit_max,
        logit_gap=float(np.mean(gaps)),
        effective_keys=float(np.mean(entropies)),
    )


def describe(path: Path, rows: int) -> list[Facts]:
    """Measure every kv head of every entry of a file."""
    tensors, metadata = tensor_file.read(path)
    result = []
    for prefix in tensor_file.triples(tensors, metadata):
        q, k, v = (tensors[f"{prefix}.{part}"] for part in "qkv")
        group = q.shape[2] // k.shape[2]
        for kv in range(k.shape[2]):
            result.append(
                facts_of_head(
                    prefix,
                    kv,
                    q[:, :, kv * group : (kv + 1) * group],
                    k[:, :, kv],
                    v[:, :, kv],
                    float(metadata[f"{prefix}.softmax_scale"]),
                    metadata[f"{prefix}.causal"] == "true",
                    rows,
                )
            )
    return result


def per_layer(facts: Sequence[Facts]) -> list[Facts]:
    """Join the kv heads of each entry: means, but extremes where a measure is an extreme.

    The sink (``top_*``) is that of the head that gives it most.
    """
    lowest, highest = (
        {"v_norm_min"},
        {"v_norm_max", "k_mean_over_std", "logit_max", "first_mass_max"},
    )
    result = []
    for name in dict.fromkeys(one.name for one in facts):
        heads = [one for one in facts if one.name == name]
        sink = max(heads, key=lambda one: one.top_mass)
        joined = {}
        for key, value in asdict(sink).items():
            values = [getattr(one, key) for one in heads]
            if key in lowest:
                joined[key] = min(values)
            elif key in highest:
                joined[key] = max(values)
            elif key in ("name", "kv_head") or key.startswith("top_"):
                joined[key] = value
            else:
                joined[key] = float(np.mean(values))
        result.append(Facts(**joined))
    return result


# Heading, field, format; the order of the printed table.
COLUMNS = [
    ("entry", "name", "s"),
    ("kv head", "kv_head", "d"),
    ("K mean energy", "k_mean_energy", ".2f"),
    ("K mean/std", "k_mean_over_std", ".1f"),
    ("K peak/rms", "k_peak_over_rms", ".1f"),
    ("V norm min", "v_norm_min", ".3f"),
    ("V norm max", "v_norm_max", ".1f"),
    ("V channels", "v_channel_spread", ".1f"),
    ("P key 0", "first_mass", ".2f"),
    ("P low V", "low_v_mass", ".2f"),
    ("low V keys", "low_v_keys", ".3f"),
    ("top key", "top_key", "d"),
    ("P top", "top_mass", ".2f"),
    ("V norm top", "top_v_norm", ".3f"),
    ("max logit", "logit_max", ".0f"),
    ("logit gap", "logit_gap", ".1f"),
    ("keys read", "effective_keys", ".0f"),
]


def table(facts: Sequence[Facts], with_head: bool) -> str:
    """Return a Markdown table, one line per element of ``facts``."""
    columns = [column for column in COLUMNS if with_head or column[1] != "kv_head"]
    cells = [[heading for heading, _, _ in columns]]
    cells += [[format(getattr(one, key), form) for _, key, form in columns] for one in facts]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def command(argv: Sequence[str]) -> int:
    """Do what the command line says; return the exit status."""
    parser = Parser(prog="describe.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", type=Path, help="safetensors file made by capture.py or sample.py")
    parser.add_argument("--heads", action="store_true", help="one line per kv head, not per entry")
    parser.add_argument("--rows", type=positive, default=256, help="queries per head; default 256")
    parser.add_argument("--json", action="store_true", help="one JSON object, every measure")
    arguments = parser.parse_args(argv)
    facts = describe(arguments.file, arguments.rows)
    shown = facts if arguments.heads else per_layer(facts)
    if arguments.json:
        print(json.dumps({"file": arguments.file.name, "entries": [asdict(one) for one in shown]}))
    else:
        print(table(shown, arguments.heads))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 2 bad input."""
    return exit_status(command, argv)


if __name__ == "__main__":
    sys.exit(main())
