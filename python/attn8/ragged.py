# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Packed sequences on a CUDA device.

With cu_seqlens there the host knows no length: sequences go into the pages of a cache that lasts
for the call, or where that lacks something become rectangles that :func:`attn8.attention` takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from attn8 import _core, cuda
from attn8.arrays import Array, torch_of

Attention = Callable[..., tuple[Array, Array]]
"""(q, k, v, alibi_slopes, seqlens_k) of rank 4 to (out, lse)."""

_PAGE = 256
"""Tokens of a page: the smallest, so that sequences end in little that is empty."""


class PagedOptions(NamedTuple):
    """What attention from pages is asked for; names as of :func:`attn8.attention`."""

    softmax_scale: float | None
    causal: bool
    align: str
    window_size: tuple[int, int]
    softcap: float
    sinks: Array | None
    alibi_slopes: Array | None
    smooth_k: bool


def attend(
    q: Array,
    k: Array,
    v: Array,
    starts: tuple[Array, Array],
    longest: tuple[int | None, int | None],
    align: str,
    slopes: Array | None,
    compute: Attention,
    paged: PagedOptions | None,
) -> tuple[Array, Array]:
    """Return out ``[total_q, nheads_q, head_dim_v]`` and LSE ``[nheads_q, total_q]``.

    Parameters
    ----------
    q, k, v : torch.Tensor
        Packed, on one CUDA device.
    starts : tuple of Array
        cu_seqlens_q and cu_seqlens_k, both on the host (one call per sequence) or both on the
        device (one call for all, nothing read by the host).
    longest : tuple of int or None
        The most queries and keys of a sequence; None: all there are.
    align : str
        As for :func:`attn8.attention`.
    slopes : torch.Tensor, optional
        ``[batch or 1, nheads_q]``.
    compute : callable
        What computes each, or rectangles of all.
    paged : PagedOptions, optional
        Set where pages can stand for rectangles.
    """
    on_host = [_check_starts(x, n, q) for x, n in zip(starts, "qk", strict=True)]
    if len(starts[0]) != len(starts[1]):
        raise ValueError(
            f"cu_seqlens_k: got {len(starts[1])} numbers, want {len(starts[0])}, as cu_seqlens_q"
        )
    if on_host[0] != on_host[1]:
        raise ValueError(
            "cu_seqlens_k: got another device than cu_seqlens_q, want both on that of q, or both "
            "on the CPU"
        )
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v: got {v.shape[0]} tokens, want {k.shape[0]}, as k")
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch_of(q).float32)
    if on_host[0]:
        _one_by_one(q, k, v, starts, slopes, compute, out, lse)
    elif q.shape[0] > 0:
        rows, keys = (
            total if most is None else max(0, min(total, most))
            for most, total in zip(longest, (len(q), len(k)), strict=True)
        )
        if paged is not None and min(len(starts[0]) - 1, rows, keys) > 0:
            _in_pages(q, k, v, starts, (rows, keys), paged, out, lse)
        else:
            _at_once(q, k, v, starts, (rows, keys), align, slopes, compute, out, lse)
    return out, lse


def _in_pages(
    q: Array, k: Array, v: Array, starts: tuple[Array, Array], longest: tuple[int, int],
    options: PagedOptions, out: Array, lse: Array,
) -> None:  # fmt: skip
    torch = torch_of(q)
    rows, keys = longest
    batch = len(starts[0]) - 1
    q_starts, k_starts = starts
    lengths = k_starts.diff()
    # A sequence begins in a page of its own: those before it have filled no more than these.
    first = k_starts[:-1] // _PAGE + torch.arange(batch, device=q.device, dtype=torch.int32)
    pages = torch.arange(-(-keys // _PAGE), device=q.device, dtype=torch.int32)
    num_pages = len(k) // _PAGE + batch
    table = (first[:, None] + pages).clamp(max=num_pages - 1).int()
    target = cuda.target_of(q)
    assert target is not None
    _core.cuda_attention_in_pages(
        q, k, v, out, lse, table, torch.zeros_like(lengths), lengths, q_starts, k_starts, rows,
        keys, options.softmax_scale, options.causal, options.align, options.window_size,
        options.softcap, options.sinks, options.alibi_slopes, options.smooth_k, num_pages, *target,
    )  # fmt: skip
    _, lost = _sequence_of(q, k, (q_starts, k_starts), longest)
    out.masked_fill_(lost[:, None, None], float("nan"))
    lse.masked_fill_(lost, float("nan"))


def _sequence_of(
    q: Array, k: Array, starts: tuple[Array, Array], longest: tuple[int, int]
) -> tuple[Array, Array]:
    """Return the sequence of each row of q, and whether its numbers point outside."""
    torch = torch_of(q)
    q_starts, k_starts = starts
    rows, keys = longest
    seqlens_q, seqlens_k = q_starts.diff(), k_starts.diff()
    token = torch.arange(len(q), device=q.device, dtype=q_starts.dtype)
    of = torch.searchsorted(q_starts[1:].contiguous(), token, right=True)
    of = of.clamp(max=len(q_starts) - 2)
    wrong = (seqlens_q < 0) | (seqlens_q > rows) | (seqlens_k < 0) | (seqlens_k > keys)
    wrong |= (k_starts[:-1] < 0) | (k_starts[1:] > len(k))
    return of, wrong[of] | (token < q_starts[of]) | (token >= q_starts[of + 1])


def _check_starts(x: Array, name: str, q: Array) -> bool:
    """Check type and place of cu_seqlens; return whether they lie on the host."""
    kind = str(getattr(x, "dtype", "")).removeprefix("torch.")
    if kind != "int32":
        raise TypeError(f"cu_seqlens_{name}: got {type(x).__name__} of dtype {kind}, want int32")
    if len(x) == 0:
        raise ValueError(f"cu_seqlens_{name}: got no element, want batch + 1 of them")
    if torch_of(x) is None or x.device.type == "cpu":
        return True
    if x.device != q.device:
        raise ValueError(
            f"cu_seqlens_{name}: got a tensor on {x.device}, want one on {q.device}, where q is"
        )
    return False


def _one_by_one(
    q: Array, k: Array, v: Array, starts: tuple[Array, Array], slopes: Array | None,
    compute: Attention, out: Array, lse: Array,
) -> None:  # fmt: skip
    at = [np.asarray(x).astype(np.int64) for x in starts]
    for name, found, total in zip("qk", at, (len(q), len(k)), strict=True):
        if found[0] != 0 or found[-1] != total or (np.diff(found) < 0).any():
            raise ValueError(
                f"cu_seqlens_{name}: got {found[0]} to {found[-1]}, want numbers that do not fall "
                f"from 0 to {total}, the number of tokens"
            )
    of_q, of_k = ([slice(a, b) for a, b in itertools.pairwise(x)] for x in at)
    for i, (rows, keys) in enumerate(zip(of_q, of_k, strict=True)):
        if rows.start == rows.stop:
            continue
        row = slopes if slopes is None or len(slopes) == 1 else slopes[i : i + 1]
        part, part_lse = compute(q[rows][None], k[keys][None], v[keys][None], row, None)
        out[rows] = part[0]
        lse[:, rows] = part_lse[0]


def _at_once(
    q: Array, k: Array, v: Array, starts: tuple[Array, Array], longest: tuple[int, int],
    align: str, slopes: Array | None, compute: Attention, out: Array, lse: Array,
) -> None:  # fmt: skip
    torch = torch_of(q)
    total_q = len(q)
    rows, keys = longest
    q_starts, k_starts = (x.long() for x in starts)
    seqlens_q, seqlens_k = q_starts.diff(), k_starts.diff()
    batch = len(seqlens_q)
    if batch == 0 or rows == 0:
        out.fill_(float("nan"))  # tokens of no sequence
        lse.fill_(float("nan"))
        return
    # The corner that masks are measured from is that of every sequence.
    row_zero = q_starts[1:] - rows if align == "bottom_right" else q_starts[:-1]

    def spread(x: Array, first: Array, count: int) -> Array:
        """Return rows ``[first, first + count)`` of each sequence; those of others fill up."""
        index = first[:, None] + torch.arange(count, device=x.device)
        return x[index.clamp(0, max(0, len(x) - 1))]

    padded, padded_lse = compute(
        spread(q, row_zero, rows),
        spread(k, k_starts[:-1], keys),
        spread(v, k_starts[:-1], keys),
        slopes,
        seqlens_k.clamp(0, keys).int(),
    )
    of, lost = _sequence_of(q, k, (q_starts, k_starts), longest)
    row = torch.arange(total_q, device=q.device) - row_zero[of]
    at = of, row.clamp(0, rows - 1)
    out.copy_(padded[at].masked_fill(lost[:, None, None], float("nan")))
    lse.copy_(padded_lse.transpose(1, 2)[at].masked_fill(lost[:, None], float("nan")).t())
