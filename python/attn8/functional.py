# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of arrays, and the merge of its partial results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn8 import _core, cuda, ragged, rotation
from attn8.arrays import Array, empty, finish, shape_of, to_write, torch_of, without_grad
from attn8.quantization import QuantizedTensor
from attn8.runtime import isa_for, threads_for
from attn8.scores import check_head_modes, score_changes

Operand = Any
"""An :data:`attn8.arrays.Array` or a :class:`attn8.QuantizedTensor`."""


def operand(x: Operand, name: str, layout: str) -> Any:
    """Return an operand as the extension module takes it."""
    if not isinstance(x, QuantizedTensor):
        return without_grad(x, name)
    if x.layout != layout:
        raise ValueError(f"{name}.layout: got {x.layout!r}, want layout={layout!r}")
    return x.fields()


def operand_shape(x: Operand, name: str) -> tuple[int, ...]:
    """Return the shape of an operand of rank 4."""
    return shape_of(x.codes if isinstance(x, QuantizedTensor) else x, name, 4)


def sizes_of(q: Operand, k: Operand, layout: str) -> tuple[int, int, int, int]:
    """Return batch, nheads_q, seqlen_q and seqlen_k."""
    heads, tokens = (2, 1) if layout == "bshd" else (1, 2)
    shape = operand_shape(q, "q")
    return shape[0], shape[heads], shape[tokens], operand_shape(k, "k")[tokens]


def _rotated(
    q: Operand, k: Operand, v: Operand, modes: Sequence[str], wanted: bool, threads: int | None
) -> tuple[Operand, Operand, Operand, bool]:
    """Return the operands as rotation has them, and whether the output is to be rotated back."""
    if not isinstance(wanted, bool):
        raise TypeError(f"rotate: got {type(wanted).__name__}, want a bool")
    if not wanted:
        return q, k, v, False
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, QuantizedTensor):
            raise TypeError(f"{name}: got a QuantizedTensor with rotate=True, want floats")
    q, k, v = without_grad(q, "q"), without_grad(k, "k"), without_grad(v, "v")
    q, k = (rotation.rotate(x, threads=threads) for x in (q, k))
    if all(x in ("half", "exact") for x in modes):  # V is no INT8 there, and has nothing to gain
        return q, k, v, False
    return q, k, rotation.rotate(v, threads=threads), True


def attention(
    q: Operand,
    k: Operand,
    v: Operand,
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
    rotate: bool = False,
    check_finite: bool = False,
    fp8_format: str = "e4m3",
    return_lse: bool = False,
    out: Array | None = None,
    threads: int | None = None,
    isa: str | None = None,
    softcap: float = 0.0,
    attn_mask: Array | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    seqlens_k: Array | None = None,
    leftpad_k: Array | None = None,
    q_offset: int = 0,
    k_offset: int = 0,
    head_modes: Sequence[str] | None = None,
) -> Any:
    """Compute ``softmax(softmax_scale * q k^T) v`` with INT8 arithmetic.

    Torch tensors on a CUDA device are computed there, on torch's current stream (docs/python.md).

    Parameters
    ----------
    q : Array or QuantizedTensor
        ``[batch, seqlen_q, nheads_q, head_dim]``, float32, float16 or bfloat16, any strides; read
        in place. head_dim is 1 to 256.
    k, v : Array or QuantizedTensor
        ``[batch, seqlen_k, nheads_k, head_dim]``; nheads_k divides nheads_q. v may have a head_dim
        of its own, 1 to 256, which the output has then.
    layout : {"bshd", "bhsd"}
        "bhsd": every rank-4 array has heads before the sequence, as torch's SDPA has.
    mode : {"accurate", "paper", "half", "exact", "fp8"}
        The arithmetic, see docs/numerics.md.
    softmax_scale : float, optional
        Factor of the scores; None is ``1/sqrt(head_dim)``.
    causal : bool
        Query i sees keys up to its own position ::

            seqlen_q = 2, seqlen_k = 4    bottom_right    top_left
                                            1 1 1 0       1 0 0 0
                                            1 1 1 1       1 1 0 0
    align : {"bottom_right", "top_left"}
        Diagonal of ``causal`` and ``window_size``: flash-attn's or torch SDPA's.
    window_size : tuple of int
        Keys seen to the left and to the right of the query's position; -1 is unlimited.
    kv_block : int
        Keys per block of the softmax, a multiple of 64 up to 512, 0 for the default. Part of the
        result's definition: it decides how P is rounded.
    v_granularity : {"token", "tensor", "channel", "block", "block_channel"}
        Scales of a V that arrives as floats (mode accurate only).
    smooth_k : bool
        Subtract the mean of K before quantizing it (modes accurate and half).
    rotate : bool
        Pass q, k and, where it becomes INT8, v through :func:`attn8.rotate` first, and the output
        back: the error on language models falls to about 60 % (docs/eval.md), for a few percent of
        the time. Floats only.
    check_finite : bool
        Raise ValueError when an operand holds a NaN or an Inf.
    fp8_format : {"e4m3", "e5m2"}
        e4m3 with a scale per (batch, head), or e5m2 without one (mode fp8 only).
    return_lse : bool
        Return ``(out, lse)``.
    out : Array, optional
        Where to write, float32, float16 or bfloat16, shaped as q (with v's head_dim), sharing no
        memory with an operand. Without it a new array of q's framework and type (float32 for INT8
        codes).
    threads : int, optional
        See :func:`attn8.get_num_threads`. Never changes the result.
    isa : str, optional
        Insist on one instruction set of :func:`attn8.info`; ``ATTN8_ISA`` does so for all calls on
        the CPU.
    softcap : float
        Scores s become ``softcap * tanh(s / softcap)``; 0: they stay.
    attn_mask : Array, optional
        Broadcasts to ``[batch, nheads_q, seqlen_q, seqlen_k]``, that order in both layouts. bool:
        True is seen, as in torch. float32, float16 or bfloat16: added to the scores; -2^100 and
        below hides the key.
    alibi_slopes : Array, optional
        float32 ``[nheads_q]`` or ``[batch, nheads_q]``: ``-slope * |distance|`` is added, the
        distance that of ``align``.
    sinks : Array, optional
        float32 ``[nheads_q]``: the score of a key without a value that every query sees.
    seqlens_k : Array, optional
        int32 ``[batch]``: keys from there on do not exist; stands for seqlen_k in ``align``.
    leftpad_k : Array, optional
        int32 ``[batch]``, at most seqlens_k: keys before it count for nothing.
    q_offset, k_offset : int
        Where a longer sequence's queries and keys start of which these are a part; with "top_left"
        the mask is that of the whole one.
    head_modes : sequence of str, optional
        Mode of each of the nheads_k kv heads, which its query heads share, in place of ``mode``
        (docs/precision.md). On the CPU only.

    Returns
    -------
    out : Array
        As q, with v's head_dim. A row that sees no key is 0.
    lse : Array
        Only with ``return_lse``: float32 ``[batch, nheads_q, seqlen_q]`` in both layouts, the
        natural logarithm of the softmax denominator; of a row that sees no key -inf, or its sink.

    Raises
    ------
    TypeError, ValueError
        The text names the argument, what it got and what it wants.
    UnsupportedError, UnavailableError
        Nothing computes this; or this machine cannot.

    Examples
    --------
    >>> import attn8, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1, 8, 2, 64), np.float32) for _ in "qkv")
    >>> attn8.attention(q, k, v, causal=True).shape
    (1, 8, 2, 64)
    """
    first = q.codes if isinstance(q, QuantizedTensor) else q
    shape = shape_of(first, "q", 4)
    sizes = sizes_of(q, k, layout)
    dim_v = operand_shape(v, "v")[3]
    changes = score_changes(
        sizes, softcap, attn_mask, alibi_slopes, sinks, seqlens_k, leftpad_k, q_offset, k_offset
    )
    check_head_modes(head_modes, mode)
    q, k, v, turned = _rotated(q, k, v, head_modes or (mode,), rotate, threads)
    torch = torch_of(first)
    if torch is not None and torch.compiler.is_compiling():
        from attn8 import torch_ops

        return torch_ops.traced_attention(
            q, k, v, layout, mode, softmax_scale, causal, align, window_size, kv_block,
            v_granularity, smooth_k, check_finite, fp8_format, return_lse, out, threads, isa,
            first.dtype, changes, turned, head_modes,
        )  # fmt: skip
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse: got {type(return_lse).__name__}, want a bool")
    target = cuda.target_of(first)
    operands = operand(q, "q", layout), operand(k, "k", layout), operand(v, "v", layout)
    float_type = "float32" if isinstance(q, QuantizedTensor) else None
    out_shape = (*shape[:3], dim_v)
    if turned:
        if out is not None and shape_of(to_write(out, "out"), "out", 4) != out_shape:
            raise ValueError(f"out: got shape {tuple(out.shape)}, want {out_shape}")
        written = empty(first, out_shape, "float32")
    else:
        written = empty(first, out_shape, float_type) if out is None else to_write(out, "out")
    lse = None
    if return_lse:
        lse = empty(first, sizes[:3], "float32")
    if target is None:
        _core.attention(
            *operands, written, lse, layout, mode, softmax_scale, causal, align, window_size,
            kv_block, v_granularity, smooth_k, check_finite, fp8_format,
            threads_for(first, threads), isa_for(isa), changes, head_modes,
        )  # fmt: skip
    else:
        cuda.check_call(first, (k, v, written if out is None else out), changes, isa)
        _core.cuda_attention(
            *operands, written, lse, layout, mode, softmax_scale, causal, align, window_size,
            kv_block, v_granularity, smooth_k, check_finite, fp8_format, target.device,
            target.stream, target.allocate, changes, head_modes,
        )  # fmt: skip
    if turned:
        result = rotation.rotate_back(written, first, out, threads)
    else:
        result = finish(first, written, keep_dtype=float_type is not None) if out is None else out
    return (result, finish(first, lse, keep_dtype=True)) if return_lse else result


def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    mode: str = "accurate",
    softmax_scale: float | None = None,
    causal: bool = False,
    align: str = "bottom_right",
    window_size: tuple[int, int] = (-1, -1),
    kv_block: int = 0,
    v_granularity: str = "token",
    smooth_k: bool = True,
    rotate: bool = False,
    check_finite: bool = False,
    fp8_format: str = "e4m3",
    return_lse: bool = False,
    threads: int | None = None,
    isa: str | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    head_modes: Sequence[str] | None = None,
) -> Any:
    """Compute attention of sequences that lie one after the other, without padding.

    Parameters
    ----------
    q : Array
        ``[total_q, nheads_q, head_dim]``.
    k, v : Array
        ``[total_k, nheads_k, head_dim]``.
    cu_seqlens_q, cu_seqlens_k : Array
        int32 ``[batch + 1]``: sequence i is the rows from element i up to, without, element
        i + 1; the first is 0, the last the number of rows.
    mode, softmax_scale, causal, align, window_size, kv_block, v_granularity, smooth_k, \
rotate, check_finite, fp8_format, return_lse, threads, isa, \
softcap, alibi_slopes, sinks, head_modes
        As for :func:`attention`.
    max_seqlen_q, max_seqlen_k : int, optional
        The longest sequence. Read only where ``cu_seqlens_q`` lies on a CUDA device: there a
        sequence that is longer gets NaN (None: all rows fit). Modes other than ``accurate`` with
        V scales per token pad all sequences to it.

    Returns
    -------
    out : Array
        As q, with v's head_dim.
    lse : Array
        Only with ``return_lse``: float32 ``[nheads_q, total_q]``.
    """
    shape = shape_of(q, "q", 3)
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse: got {type(return_lse).__name__}, want a bool")
    first = q
    v_shape = shape_of(v, "v", 3)
    sequences = shape_of(cu_seqlens_q, "cu_seqlens_q", 1)[0] - 1
    changes = score_changes(
        (sequences, shape[1], 0, 0), softcap, alibi_slopes=alibi_slopes, sinks=sinks
    )
    check_head_modes(head_modes, mode)
    q, k, v, turned = _rotated(q, k, v, head_modes or (mode,), rotate, threads)
    operands = without_grad(q, "q"), without_grad(k, "k"), without_grad(v, "v")
    if cuda.target_of(first) is not None:
        cuda.check_call(first, (k, v, first), changes, isa)

        def compute(q: Array, k: Array, v: Array, slopes: Array, seqlens_k: Array) -> Any:
            return attention(
                q, k, v, mode=mode, softmax_scale=softmax_scale, causal=causal, align=align,
                window_size=window_size, kv_block=kv_block, v_granularity=v_granularity,
                smooth_k=smooth_k, check_finite=check_finite, fp8_format=fp8_format,
                return_lse=True, softcap=softcap, alibi_slopes=slopes, sinks=sinks,
                seqlens_k=seqlens_k, head_modes=head_modes,
            )  # fmt: skip

        slopes = None if changes is None else changes[2]
        paged = None
        if (mode, v_granularity, kv_block, check_finite) == ("accurate", "token", 0, False) and (
            head_modes is None and v_shape[2] == shape[2] and k.dtype == v.dtype
        ):
            paged = ragged.PagedOptions(
                softmax_scale, causal, align, window_size, softcap, sinks, slopes, smooth_k
            )
        out, lse = ragged.attend(
            *operands, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), align, slopes,
            compute, paged,
        )  # fmt: skip
        out = rotation.rotate_back(out, first, None, threads) if turned else out.to(first.dtype)
        return (out, lse) if return_lse else out
    written = empty(first, (*shape[:2], v_shape[2]), "float32" if turned else None)
    lse = empty(q, (shape[1], shape[0]), "float32") if return_lse else None
    _core.attention_varlen(
        *operands, written, lse, cu_seqlens_q, cu_seqlens_k, mode, softmax_scale, causal, align,
        window_size, kv_block, v_granularity, smooth_k, check_finite, fp8_format,
        threads_for(q, threads), isa_for(isa), changes, head_modes,
    )  # fmt: skip
    if turned:
        result = rotation.rotate_back(written, first, None, threads)
    else:
        result = finish(first, written)
    return (result, finish(q, lse, keep_dtype=True)) if return_lse else result


def merge_states(
    outs: Sequence[Array],
    lses: Sequence[Array],
    *,
    layout: str = "bshd",
    threads: int | None = None,
) -> tuple[Array, Array]:
    """Merge attention over parts of the keys into attention over all of them.

    Parameters
    ----------
    outs : sequence of Array
        Output of each part, ``[batch, seqlen_q, nheads_q, head_dim]``, float32, float16 or
        bfloat16; their types may differ.
    lses : sequence of Array
        Their LSE, float32 ``[batch, nheads_q, seqlen_q]``, natural logarithm.
    layout : {"bshd", "bhsd"}
        Of ``outs``.
    threads : int, optional
        See :func:`attn8.get_num_threads`. Never changes the result.

    Returns
    -------
    out, lse : Array
        In framework and type of ``outs[0]``, and float32. Weights are computed in float64, sums
        in float32. A part that sees no key of a row (LSE -inf) counts for nothing there, whatever
        its ``out`` holds; a row that one part alone sees is that part's, bit for bit; one that no
        part sees is 0 with LSE -inf.
    """
    outs = [without_grad(part, f"outs[{i}]") for i, part in enumerate(outs)]
    if not outs:
        raise ValueError("outs: got none, want at least one")
    first = outs[0]
    shape = shape_of(first, "outs[0]", 4)
    heads, tokens = (shape[1], shape[2]) if layout == "bhsd" else (shape[2], shape[1])
    rows = (shape[0], heads, tokens)
    lses = list(lses)
    for name, arrays, wanted in (("outs", outs, shape), ("lses", lses, rows)):
        for i, part in enumerate(arrays):
            found = shape_of(part, f"{name}[{i}]", len(wanted))
            if found != wanted:
                raise ValueError(f"{name}[{i}]: got shape {found}, want {wanted}")
    target = cuda.target_of(first, "outs[0]")
    if target is not None:
        parts = [(f"outs[{i}]", part) for i, part in enumerate(outs)]
        parts += [(f"lses[{i}]", part) for i, part in enumerate(lses)]
        cuda.check_place(first, parts, "outs[0]")
    out, lse = empty(first, shape), empty(first, rows, "float32")
    _core.merge_states(outs, lses, out, lse, layout, threads_for(first, threads), target)
    return finish(first, out), finish(first, lse, keep_dtype=True)
