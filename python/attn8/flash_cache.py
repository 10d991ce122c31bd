# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""flash-attn's ``flash_attn_with_kvcache``: decode from a cache that the caller owns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn8 import _core, cuda, flash_cache_cuda
from attn8.arrays import Array, empty, shape_of, to_write, without_grad
from attn8.errors import UnsupportedError
from attn8.functional import Operand, attention
from attn8.quantization import QuantizedTensor
from attn8.runtime import threads_for
from attn8.scores import score_changes

Numbers = NDArray[np.int64]


def _numbers(x: Any, name: str, shape: tuple[int, ...], limit: int) -> Numbers:
    """Return whole numbers in [0, limit], of a NumPy array or a torch tensor."""
    if not hasattr(x, "shape"):
        raise TypeError(f"{name}: got {type(x).__name__}, want an int32 array")
    found = np.asarray(x)
    if found.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {found.dtype}, want int32")
    if len(shape) != found.ndim or any(
        w not in (-1, g) for g, w in zip(found.shape, shape, strict=True)
    ):
        raise ValueError(f"{name}: got shape {found.shape}, want {shape}".replace("-1", "any"))
    if found.size and not 0 <= int(found.min()) <= int(found.max()) <= limit:
        raise ValueError(f"{name}: got {found.min()} to {found.max()}, want 0 to {limit}")
    return found.astype(np.int64)


class _Cache:
    """K or V of all sequences: floats or codes with scales, contiguous or in pages."""

    def __init__(self, cache: Operand, name: str, table: Any) -> None:
        self.cache = cache
        self.name = name
        self.table = table  # [batch, blocks]; None: a sequence is a row of the cache
        if isinstance(cache, QuantizedTensor):
            if cache.granularity != "token" or cache.layout != "bshd":
                raise UnsupportedError(
                    f"{name}: got granularity {cache.granularity!r} and layout {cache.layout!r}, "
                    "want 'token' and 'bshd'"
                )
            if table is not None and cache.mean is not None:
                raise UnsupportedError(f"{name}: got a mean with block_table, want None")
            self.shape = shape_of(cache.codes, name, 4)
        else:
            self.shape = shape_of(cache, name, 4)
        if table is not None and self.shape[1] == 0:
            raise ValueError(f"{name}: got a page_size of 0 with block_table, want at least 1")

    def _pieces(self, row: int, sequence: int, first: int, last: int) -> Iterator[Any]:
        """Yield (index of row or page, first, last, offset) that hold tokens [first, last)."""
        if self.table is None:
            yield row, first, last, 0
            return
        page = self.shape[1]
        at = first
        while at < last:
            end = min(last, (at // page + 1) * page)
            start = at // page * page
            yield int(self.table[sequence, at // page]), at - start, end - start, at - first
            at = end

    def write(self, new: Array, row: int, sequence: int, first: int, threads: int) -> None:
        """Store ``new`` ``[tokens, nheads_k, head_dim]`` from token ``first`` on."""
        for index, start, end, offset in self._pieces(row, sequence, first, first + new.shape[0]):
            part = new[offset : offset + end - start]
            at = (slice(index, index + 1), slice(start, end))
            if isinstance(self.cache, QuantizedTensor):
                mean = None if self.cache.mean is None else self.cache.mean[at[0]]
                _core.quantize(
                    part[None], self.cache.codes[at], self.cache.scale[at], mean,
                    "none" if mean is None else "given", "bshd", "token", 0, threads,
                )  # fmt: skip
            else:
                self.cache[at] = part[None]

    def read(self, row: int, sequence: int, first: int, last: int) -> Operand:
        """Return tokens [first, last) of a sequence, a batch of one."""
        if isinstance(self.cache, QuantizedTensor):
            codes = self._gather(self.cache.codes, row, sequence, first, last)
            scale = self._gather(self.cache.scale, row, sequence, first, last)
            mean = None if self.cache.mean is None else self.cache.mean[row : row + 1]
            return replace(self.cache, codes=codes, scale=scale, mean=mean)
        return self._gather(self.cache, row, sequence, first, last)

    def _gather(self, x: Array, row: int, sequence: int, first: int, last: int) -> Array:
        if self.table is None:
            return x[row : row + 1, first:last]
        page = self.shape[1]
        pages = self.table[sequence, first // page : -(-last // page)]
        return x[pages].reshape(1, -1, *x.shape[2:])[:, first % page :][:, : last - first]


def _check_arguments(
    q: Array, k: Any, v: Any, k_cache: _Cache, v_cache: _Cache
) -> tuple[tuple[int, ...], int]:
    """Return q's shape and the number of new tokens."""
    shape = shape_of(q, "q", 4)
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"v_cache: got shape {v_cache.shape}, want {k_cache.shape}, as k_cache")
    if k is None:
        return shape, 0
    new = shape_of(k, "k", 4)
    for name, found, cache in (("k", new, k_cache), ("v", shape_of(v, "v", 4), v_cache)):
        wanted = (shape[0], new[1], *cache.shape[2:])
        if found != wanted:
            raise ValueError(f"{name}: got shape {found}, want {wanted}")
    return shape, new[1]


def _row_of(slopes: Array | None, i: int) -> Array | None:
    return slopes if slopes is None or slopes.shape[0] == 1 else slopes[i : i + 1]


def flash_attn_with_kvcache(
    q: Array,
    k_cache: Operand,
    v_cache: Operand,
    k: Array | None = None,
    v: Array | None = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    mode: str = "accurate",
    threads: int | None = None,
    sinks: Any = None,
) -> Any:
    """Append to a cache in place and attend to it, with flash-attn's signature.

    :class:`attn8.KVCache` does the same faster: here K and V are read from the caller's memory as
    they are, floats are quantized again at every call, and pages are gathered. CUDA tensors are
    computed on their device, by one call for the whole batch that the host does not wait for;
    caches are floats there (:class:`attn8.CudaKVCache` keeps INT8).

    Parameters
    ----------
    q : Array
        ``[batch, seqlen_q, nheads_q, head_dim]``.
    k_cache, v_cache : Array or QuantizedTensor
        ``[batch_cache, seqlen_cache, nheads_k, head_dim]``, or with ``block_table`` ``[pages,
        page_size, nheads_k, head_dim]``; NumPy or torch. A QuantizedTensor (granularity token) is
        a cache in INT8: new tokens are quantized into it, K less the ``mean`` it has.
    k, v : Array, optional
        ``[batch, seqlen_new, nheads_k, head_dim]``, written to the caches from ``cache_seqlens``
        on before attention; needs ``cache_seqlens``.
    cache_seqlens : int or Array, optional
        Tokens in the cache before this call, int32 ``[batch]``. None: all of ``seqlen_cache``.
    cache_batch_idx : Array, optional
        int32 ``[batch]``: the row of the caches of each sequence; not with ``block_table``.
    cache_leftpad : Array, optional
        int32 ``[batch]``: tokens before it are padding.
    block_table : Array, optional
        int32 ``[batch, blocks]``: the pages of each sequence, in order.
    causal, window_size
        Aligned to the bottom-right corner: the last query sees the last key.
    rotary_cos, rotary_sin
        Only None; anything else raises UnsupportedError. Rotate q and k before the call.
    softcap, alibi_slopes, sinks
        As for :func:`attn8.attention`.
    rotary_interleaved, num_splits
        Any value: nothing depends on them.
    return_softmax_lse : bool
        Return ``(out, softmax_lse)``, LSE float32 ``[batch, nheads_q, seqlen_q]``; -inf for a row
        without keys, +inf in flash-attn.
    softmax_scale, mode, threads
        As for :func:`attn8.attention`.

    Returns
    -------
    Array
        As q.
    """
    for name, value in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if value is not None:
            raise UnsupportedError(f"{name}: got {type(value).__name__}, want None: rotate before")
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        raise TypeError(f"num_splits: got {type(num_splits).__name__}, want an int")
    for name, flag in (
        ("return_softmax_lse", return_softmax_lse), ("rotary_interleaved", rotary_interleaved),
    ):  # fmt: skip
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {type(flag).__name__}, want a bool")
    if (k is None) != (v is None):
        given, missing = ("k", "v") if v is None else ("v", "k")
        raise ValueError(f"{missing}: got None, want an array, as {given}")
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: got an array with block_table, want one of the two")
    if cuda.target_of(q) is not None:
        result = flash_cache_cuda.attend(
            q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, mode=mode,
            softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        )  # fmt: skip
        return result if return_softmax_lse else result[0]
    first_cache = k_cache.codes if isinstance(k_cache, QuantizedTensor) else k_cache
    pages = shape_of(first_cache, "k_cache", 4)[0]
    batch = shape_of(q, "q", 4)[0]
    table = None
    if block_table is not None:
        table = _numbers(block_table, "block_table", (batch, -1), pages - 1)
    keys, values = _Cache(k_cache, "k_cache", table), _Cache(v_cache, "v_cache", table)
    shape, new = _check_arguments(q, k, v, keys, values)
    room = keys.shape[1] if table is None else keys.shape[1] * table.shape[1]
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens: got None with k, want where to write")
        held = np.full(batch, room)
    elif isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        held = _numbers(np.full(batch, cache_seqlens), "cache_seqlens", (batch,), room - new)
    else:
        held = _numbers(cache_seqlens, "cache_seqlens", (batch,), room - new)
    rows = np.arange(batch)
    if cache_batch_idx is not None:
        rows = _numbers(cache_batch_idx, "cache_batch_idx", (batch,), pages - 1)
    elif table is None and pages != batch:
        raise ValueError(f"k_cache: got {pages} rows, want {batch}, as q, or cache_batch_idx")
    starts = np.zeros(batch, np.int64)
    if cache_leftpad is not None:
        starts = np.minimum(_numbers(cache_leftpad, "cache_leftpad", (batch,), room), held + new)
    count = threads_for(q, threads)
    q = without_grad(q, "q")
    if k is not None and v is not None:
        k, v = without_grad(k, "k"), without_grad(v, "v")
        for cache, name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
            to_write(getattr(cache, "codes", cache), name)
        for i in range(batch):
            keys.write(k[i], int(rows[i]), i, int(held[i]), count)
            values.write(v[i], int(rows[i]), i, int(held[i]), count)
    slopes = None
    if alibi_slopes is not None:  # checked as a whole: a row of it would pass as [nheads_q]
        changes = score_changes((batch, shape[2], 0, 0), alibi_slopes=alibi_slopes)
        slopes = None if changes is None else changes[2]
    out = empty(q, (*shape[:3], values.shape[3]))
    lse = empty(q, (batch, shape[2], shape[1]), "float32")
    for i in range(batch):
        part = int(rows[i]), i, int(starts[i]), int(held[i]) + new
        _, lse[i : i + 1] = attention(
            q[i : i + 1], keys.read(*part), values.read(*part), softmax_scale=softmax_scale,
            causal=causal, window_size=window_size, mode=mode, return_lse=True,
            out=out[i : i + 1], threads=count, softcap=softcap, alibi_slopes=_row_of(slopes, i),
            sinks=sinks,
        )  # fmt: skip
    return (out, lse) if return_softmax_lse else out
