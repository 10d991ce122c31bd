# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The field's own signatures: flash-attn's and torch SDPA's, with attn8's options keyword-only.

An argument that cannot be honoured raises; none is ignored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attn8 import cuda
from attn8.arrays import Array, shape_of
from attn8.errors import UnsupportedError
from attn8.functional import attention, attention_varlen


def _refuse(name: str, got: Any, want: str) -> None:
    raise UnsupportedError(f"{name}: got {got}, want {want}")


def _check_flash(dropout_p: float, return_attn_probs: bool) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: got {type(dropout_p).__name__}, want a float")
    if dropout_p != 0:
        _refuse("dropout_p", dropout_p, "0.0: attn8 has none")
    if not isinstance(return_attn_probs, bool):
        raise TypeError(f"return_attn_probs: got {type(return_attn_probs).__name__}, want a bool")


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    mode: str = "accurate",
    threads: int | None = None,
) -> Any:
    """Compute attention with flash-attn's signature.

    Parameters
    ----------
    q : Array
        ``[batch, seqlen_q, nheads_q, head_dim]``.
    k, v : Array
        ``[batch, seqlen_k, nheads_k, head_dim]``.
    causal, window_size
        Aligned to the bottom-right corner where lengths differ, as flash-attn 2.1 and later.
    softcap, alibi_slopes
        As for :func:`attn8.attention`.
    dropout_p
        Only 0; anything else raises UnsupportedError.
    deterministic : bool
        Either value: results are always deterministic.
    return_attn_probs : bool
        Return ``(out, softmax_lse, None)``: flash-attn's third value means something only with
        dropout. LSE of a row without keys is -inf here, +inf in flash-attn.
    softmax_scale, mode, threads
        As for :func:`attn8.attention`.
    """
    _check_flash(dropout_p, return_attn_probs)
    _check_bool("deterministic", deterministic)
    result = attention(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, mode=mode,
        return_lse=return_attn_probs, threads=threads, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    return (*result, None) if return_attn_probs else result


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
    *,
    mode: str = "accurate",
    threads: int | None = None,
) -> Any:
    """Compute attention of packed sequences with flash-attn's signature.

    Parameters
    ----------
    q : Array
        ``[total_q, nheads_q, head_dim]``.
    k, v : Array
        ``[total_k, nheads_k, head_dim]``.
    cu_seqlens_q, cu_seqlens_k : Array
        int32 ``[batch + 1]``, where each sequence starts.
    max_seqlen_q, max_seqlen_k : int
        At least the longest sequence; checked, otherwise not needed. With cu_seqlens on a CUDA
        device they are what sequences are padded to, and a longer one gets NaN.
    block_table
        Only None; anything else raises UnsupportedError.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, \
return_attn_probs, mode, threads
        As for :func:`flash_attn_func`; softmax_lse is ``[nheads_q, total_q]``.
    """
    _check_flash(dropout_p, return_attn_probs)
    _check_bool("deterministic", deterministic)
    if block_table is not None:
        _refuse("block_table", type(block_table).__name__, "None: K and V are not paged here")
    for name, starts, longest in (
        ("max_seqlen_q", cu_seqlens_q, max_seqlen_q),
        ("max_seqlen_k", cu_seqlens_k, max_seqlen_k),
    ):
        shape_of(starts, name.replace("max", "cu").replace("seqlen", "seqlens"), 1)
        if isinstance(longest, bool) or not isinstance(longest, (int, np.integer)):
            raise TypeError(f"{name}: got {type(longest).__name__}, want an int")
        if cuda.is_on_device(starts):
            continue  # attention_varlen answers a longer sequence with NaN
        lengths = np.diff(np.asarray(starts))
        if lengths.size and longest < lengths.max():
            raise ValueError(f"{name}: got {longest}, want at least {lengths.max()}")
    result = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, mode=mode, return_lse=return_attn_probs, threads=threads,
        softcap=softcap, alibi_slopes=alibi_slopes, max_seqlen_q=int(max_seqlen_q),
        max_seqlen_k=int(max_seqlen_k),
    )  # fmt: skip
    return (*result, None) if return_attn_probs else result


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, want a bool")


def _check_mask(mask: Any) -> None:
    if not isinstance(getattr(mask, "shape", None), tuple):
        raise TypeError(f"attn_mask: got {type(mask).__name__}, want an array or None")
    kind = str(mask.dtype).removeprefix("torch.")
    if kind not in ("bool", "float16", "bfloat16", "float32"):
        raise TypeError(f"attn_mask: got dtype {kind}, want bool, float32, float16 or bfloat16")


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    mode: str = "accurate",
    threads: int | None = None,
) -> Array:
    """Compute attention with the signature of ``torch.nn.functional``'s function of that name.

    Parameters
    ----------
    query : Array
        ``[batch, nheads_q, seqlen_q, head_dim]``, or without the batch.
    key, value : Array
        ``[batch, nheads_k, seqlen_k, head_dim]``, or without the batch.
    attn_mask : Array, optional
        Broadcasts to ``[batch, nheads_q, seqlen_q, seqlen_k]``; bool (True: seen), or float32,
        float16 or bfloat16, added to the scores. Numbers below -2^100, torch's lowest float among
        them, hide a key, also from a query that sees no other.
    dropout_p : float
        Only 0.
    is_causal : bool
        Aligned to the TOP-LEFT corner where lengths differ, as torch's.
    scale : float, optional
        None: ``1/sqrt(head_dim)``.
    enable_gqa : bool
        Must be True where nheads_k differs from nheads_q.
    mode, threads
        As for :func:`attn8.attention`.

    Returns
    -------
    Array
        As query, with value's head_dim. A query that sees no key gets 0.
    """
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: got {type(dropout_p).__name__}, want a float")
    if dropout_p != 0:
        _refuse("dropout_p", dropout_p, "0.0: attn8 has no dropout")
    _check_bool("is_causal", is_causal)
    _check_bool("enable_gqa", enable_gqa)
    shape = getattr(query, "shape", None)
    rank = len(shape) if isinstance(shape, tuple) else 4
    if rank not in (3, 4):
        raise ValueError(f"query: got {rank} dimensions, want 3 or 4")
    shapes = [
        shape_of(x, name, rank) for x, name in ((query, "query"), (key, "key"), (value, "value"))
    ]
    if shapes[0][-3] != shapes[1][-3] and not enable_gqa:
        raise ValueError(
            f"key: got {shapes[1][-3]} heads with enable_gqa=False, want {shapes[0][-3]}, as query"
        )
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask: got a mask with is_causal=True, want one of the two")
        _check_mask(attn_mask)
    if rank == 3:
        query, key, value = query[None], key[None], value[None]
    options: dict[str, Any] = {
        "layout": "bhsd", "softmax_scale": scale, "mode": mode, "threads": threads,
    }  # fmt: skip
    out = attention(
        query, key, value, causal=is_causal, align="top_left", attn_mask=attn_mask, **options
    )
    return out[0] if rank == 3 else out
