# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""``flash_attn_with_kvcache`` on CUDA tensors: one call for the batch, nothing read by the host."""

from __future__ import annotations

from typing import Any

from attn8 import cuda
from attn8.arrays import Array, shape_of, torch_of
from attn8.errors import UnsupportedError
from attn8.functional import attention
from attn8.quantization import QuantizedTensor


def attend(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None,
    v: Array | None,
    cache_seqlens: Any,
    cache_batch_idx: Array | None,
    cache_leftpad: Array | None,
    block_table: Array | None,
    **options: Any,
) -> tuple[Array, Array]:
    """Return (out, lse); the arguments are those of :func:`attn8.flash_attn_with_kvcache`.

    What tables and lengths hold is not checked before the call. A sequence whose keys they place
    outside the cache gets NaN; new tokens that would lie there stop the device, as any index out
    of range does in torch.
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if isinstance(cache, QuantizedTensor):
            raise UnsupportedError(
                f"{name}: got a QuantizedTensor on a CUDA device, want floats, or "
                "attn8.CudaKVCache, which keeps INT8"
            )
    lengths = cache_seqlens if not isinstance(cache_seqlens, int) else None
    cuda.check_place(
        q,
        [
            ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v),
            ("cache_seqlens", lengths), ("cache_batch_idx", cache_batch_idx),
            ("cache_leftpad", cache_leftpad), ("block_table", block_table),
        ],
    )  # fmt: skip
    torch = torch_of(q)
    batch = len(q)
    for name, x, rank in (
        ("cache_seqlens", lengths, 1), ("cache_batch_idx", cache_batch_idx, 1),
        ("cache_leftpad", cache_leftpad, 1), ("block_table", block_table, 2),
    ):  # fmt: skip
        if x is None:
            continue
        if x.dtype != torch.int32:
            raise TypeError(f"{name}: got dtype {x.dtype}, want int32")
        if shape_of(x, name, rank)[0] != batch:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, want {batch} first, as q")
    shape = shape_of(k_cache, "k_cache", 4)
    if shape_of(v_cache, "v_cache", 4)[:3] != shape[:3]:
        raise ValueError(f"v_cache: got shape {tuple(v_cache.shape)}, want {shape}, as k_cache")
    room = shape[1] if block_table is None else shape[1] * block_table.shape[1]
    new = 0 if k is None else shape_of(k, "k", 4)[1]
    if cache_seqlens is None and k is not None:
        raise ValueError("cache_seqlens: got None with k, want where to write")
    if lengths is not None:
        held = lengths.long()
    else:
        held = torch.full((batch,), room if cache_seqlens is None else cache_seqlens).to(q.device)
    end = held + new
    wrong = (held < 0) | (end > room)
    if block_table is not None:
        pages = block_table.long()
        used = torch.arange(pages.shape[1], device=q.device) * shape[1] < end[:, None]
        wrong |= (used & ((pages < 0) | (pages >= shape[0]))).any(1)
    else:
        rows = torch.arange(batch, device=q.device)
        if cache_batch_idx is not None:
            rows = cache_batch_idx.long()
            wrong |= (rows < 0) | (rows >= shape[0])
        elif shape[0] != batch:
            raise ValueError(
                f"k_cache: got {shape[0]} rows, want {batch}, as q, or cache_batch_idx"
            )

    if k is not None and v is not None:
        at = held[:, None] + torch.arange(new, device=q.device)
        at = torch.where(at < 0, room, at)  # a negative index would count from the end
        if block_table is not None:
            where = pages.gather(1, at // shape[1]), at % shape[1]
        else:
            where = rows[:, None].expand_as(at), at
        k_cache[where] = k.to(k_cache.dtype)
        v_cache[where] = v.to(v_cache.dtype)

    def whole(cache: Array) -> Array:
        if block_table is not None:
            return cache[pages.clamp(0, shape[0] - 1)].flatten(1, 2)
        return cache if cache_batch_idx is None else cache[rows.clamp(0, shape[0] - 1)]

    out, lse = attention(
        q, whole(k_cache), whole(v_cache), seqlens_k=end.clamp(0, room).int(),
        leftpad_k=cache_leftpad, return_lse=True, **options,
    )  # fmt: skip
    out.masked_fill_(wrong[:, None, None, None], float("nan"))
    lse.masked_fill_(wrong[:, None, None], float("nan"))
    return out, lse
