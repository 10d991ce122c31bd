# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Attention where each sequence of a batch has its own contiguous range of keys: padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attn8.arrays import Array, empty, shape_of
from attn8.functional import Operand, attention
from attn8.quantization import QuantizedTensor

KeyRange = tuple[int, int]
"""First key, and the key after the last, that a sequence may see."""


def query_range(keys: KeyRange, seqlen_q: int, seqlen_k: int, masked: bool) -> tuple[int, int]:
    """Return the queries of a sequence that keep the diagonal where the keys are cut.

    A query sees by its position: cutting the queries where the keys are cut leaves the bottom-right
    diagonal where it is.

    Parameters
    ----------
    keys : KeyRange
        The keys that are not padding.
    seqlen_q, seqlen_k : int
        Padded lengths; the last query stands at the last key.
    masked : bool
        Whether there is a diagonal; without one all queries stay.
    """
    if not masked:
        return 0, seqlen_q
    offset = seqlen_k - seqlen_q  # position of the first query among the keys
    first = min(max(keys[0] - offset, 0), seqlen_q)
    return first, max(min(keys[1] - offset, seqlen_q), first)


def _slice(x: Array, batch: int, first: int, last: int, layout: str) -> Array:
    return x[batch : batch + 1, first:last] if layout == "bshd" else x[
        batch : batch + 1, :, first:last
    ]  # fmt: skip


def _part(x: Operand, batch: int, first: int, last: int, layout: str) -> Operand:
    if not isinstance(x, QuantizedTensor):
        return _slice(x, batch, first, last, layout)
    if x.granularity != "token":
        raise ValueError(f"granularity: got {x.granularity!r}, want 'token' for padded sequences")
    return replace(
        x,
        codes=_slice(x.codes, batch, first, last, layout),
        scale=_slice(x.scale, batch, first, last, layout),
        mean=None if x.mean is None else x.mean[batch : batch + 1],
    )


def attend_ranges(
    q: Array,
    k: Operand,
    v: Operand,
    ranges: Sequence[KeyRange],
    *,
    layout: str,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **options: Any,
) -> Array:
    """Compute attention of a padded batch.

    Parameters
    ----------
    q, k, v, layout, causal, window_size
        As for :func:`attn8.attention`; diagonals are those of the padded lengths, bottom-right.
    ranges : sequence of KeyRange
        One per sequence.
    **options
        Further options of :func:`attn8.attention`, without ``out`` and ``return_lse``.

    Returns
    -------
    Array
        As q. With a causal mask or a window, queries at padded positions are 0.
    """
    axis = 1 if layout == "bshd" else 2
    seqlen_q = shape_of(q, "q", 4)[axis]
    seqlen_k = (k.shape if isinstance(k, QuantizedTensor) else shape_of(k, "k", 4))[axis]
    options = {"layout": layout, "causal": causal, "window_size": window_size, **options}
    if all(given == (0, seqlen_k) for given in ranges):
        return attention(q, k, v, **options)
    out = empty(q, tuple(q.shape))
    masked = causal or tuple(window_size) != (-1, -1)
    for i, (first, last) in enumerate(ranges):
        q_first, q_last = query_range((first, last), seqlen_q, seqlen_k, masked)
        _slice(out, i, 0, q_first, layout)[...] = 0
        _slice(out, i, q_last, seqlen_q, layout)[...] = 0
        if q_first < q_last:
            attention(
                _slice(q, i, q_first, q_last, layout),
                _part(k, i, first, last, layout),
                _part(v, i, first, last, layout),
                out=_slice(out, i, q_first, q_last, layout),
                **options,
            )
    return out
