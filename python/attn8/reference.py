# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Slow oracles in float64, and the error of a result against them.

They share no code with the kernels: see include/attn8/reference.hpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn8 import _core
from attn8.arrays import Array
from attn8.functional import operand, sizes_of
from attn8.scores import score_changes

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Emulation:
    """What a kernel must reproduce.

    Attributes
    ----------
    out : ndarray
        float64, shaped as q.
    lse : ndarray
        float64 ``[batch, nheads_q, seqlen_q]``.
    bound : ndarray
        float64, shaped as q: how far a kernel with float32 softmax may be from ``out``.
    """

    out: Doubles
    lse: Doubles
    bound: Doubles


@dataclass(frozen=True)
class ErrorReport:
    """Error of a result; all over every element.

    Attributes
    ----------
    rel_l2 : float
        ``||out - reference|| / ||reference||``, the headline.
    mean_rel : float
        ``mean|out - reference| / mean|reference|``.
    max_abs : float
        ``max|out - reference|``.
    cosine : float
        Cosine of the angle between the two.
    mre : float
        ``mean(|out - reference| / (|reference| + 1e-5))``.
    """

    rel_l2: float
    mean_rel: float
    max_abs: float
    cosine: float
    mre: float


def _rows(rows: Any) -> Any:
    return None if rows is None else np.ascontiguousarray(rows, np.int32)


def _in_layout(out: Doubles, layout: str) -> Doubles:
    return out if layout == "bshd" else out.transpose(0, 2, 1, 3)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    layout: str = "bshd",
    softmax_scale: float | None = None,
    causal: bool = False,
    align: str = "bottom_right",
    window_size: tuple[int, int] = (-1, -1),
    rows: Any = None,
    **scores: Any,
) -> tuple[Doubles, Doubles]:
    """Compute exact attention in float64 with plain loops.

    Parameters
    ----------
    q, k, v, layout, softmax_scale, causal, align, window_size
        As for :func:`attn8.attention`; floats only.
    rows : sequence of int, optional
        Query positions to compute; the others are left 0.
    **scores
        What changes scores, from softcap to k_offset, as for :func:`attn8.attention`.

    Returns
    -------
    out, lse : ndarray
        float64, shaped as q (with v's head_dim), and ``[batch, nheads_q, seqlen_q]``.
    """
    operands = operand(q, "q", layout), operand(k, "k", layout), operand(v, "v", layout)
    changes = score_changes(sizes_of(q, k, layout), **scores)
    out, lse, _ = _core.reference_attention(
        *operands, layout, _rows(rows), True, "exact", softmax_scale, causal, align, window_size,
        0, "token", True, "e4m3", changes,
    )  # fmt: skip
    return _in_layout(out, layout), lse.transpose(0, 2, 1)


def emulation(
    q: Any,
    k: Any,
    v: Any,
    *,
    layout: str = "bshd",
    mode: str = "accurate",
    softmax_scale: float | None = None,
    causal: bool = False,
    align: str = "bottom_right",
    window_size: tuple[int, int] = (-1, -1),
    kv_block: int = 0,
    v_granularity: str = "token",
    smooth_k: bool = True,
    fp8_format: str = "e4m3",
    rows: Any = None,
    **scores: Any,
) -> Emulation:
    """Compute a mode's arithmetic in float64, but for its codes and the rounding of P.

    Parameters
    ----------
    q, k, v, layout, mode, softmax_scale, causal, align, window_size, kv_block, v_granularity, \
smooth_k, fp8_format
        As for :func:`attn8.attention`; mode is accurate, paper, half or fp8.
    rows : sequence of int, optional
        Query positions to compute; the others are left 0.
    **scores
        What changes scores, from softcap to k_offset, as for :func:`attn8.attention`.
    """
    operands = operand(q, "q", layout), operand(k, "k", layout), operand(v, "v", layout)
    changes = score_changes(sizes_of(q, k, layout), **scores)
    out, lse, bound = _core.reference_attention(
        *operands, layout, _rows(rows), False, mode, softmax_scale, causal, align, window_size,
        kv_block, v_granularity, smooth_k, fp8_format, changes,
    )  # fmt: skip
    assert bound is not None
    return Emulation(_in_layout(out, layout), lse.transpose(0, 2, 1), _in_layout(bound, layout))


def _doubles(x: Array) -> Doubles:
    if hasattr(x, "detach"):  # torch: NumPy reads no bfloat16
        x = x.detach().double().cpu()
    return np.ascontiguousarray(np.asarray(x), np.float64)


def error_report(out: Array, reference: Array) -> ErrorReport:
    """Return the error of ``out`` against ``reference``, two arrays of one shape."""
    a, b = _doubles(out), _doubles(reference)
    if a.shape != b.shape:
        raise ValueError(f"reference: got shape {b.shape}, want {a.shape}, as out")
    return ErrorReport(*_core.error_report(a.ravel(), b.ravel()))
