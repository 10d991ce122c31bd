# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache in INT8 on a CUDA device."""

from __future__ import annotations

from typing import Any

from attn8 import _core, cuda
from attn8.arrays import Array, empty, shape_of, torch_of, without_grad


class CudaKVCache:
    """K and V in INT8 pages on a CUDA device, with flash-attn's block tables, mode accurate.

    The cache owns the pages and knows nothing of sequences: which page holds what is the caller's
    ``block_table``, how many tokens there are its ``cache_seqlens``. Calls only enqueue on torch's
    current stream, with workspace from torch's allocator. With tables on the device nothing is
    read by the host, and calls can be captured into a CUDA graph; a sequence whose lengths or
    pages point outside then gets NaN, and nothing is appended to it. Tables on the host are
    checked there and raise.

    Parameters
    ----------
    nheads_k : int
        Heads of K and V.
    head_dim : int
        1 to 256.
    num_pages : int
        Their memory is taken from the device at once, not from torch's allocator.
    page_size : int
        Tokens per page, a power of two from 256 to 65536.
    smooth_k : bool
        Subtract from K of a sequence the mean over its first append: make that the prompt.
    device : int
        Index of the device.

    Examples
    --------
    >>> cache = attn8.CudaKVCache(nheads_k=8, head_dim=128, num_pages=64)  # doctest: +SKIP
    >>> cache.append(k, v, block_table, cache_seqlens)  # doctest: +SKIP
    >>> cache_seqlens += k.shape[1]  # doctest: +SKIP
    >>> out = cache.attend(q, block_table, cache_seqlens, causal=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        nheads_k: int,
        head_dim: int,
        num_pages: int,
        page_size: int = 256,
        smooth_k: bool = True,
        device: int = 0,
    ) -> None:
        self._cache = _core.make_cuda_kv_cache(
            nheads_k, head_dim, page_size, num_pages, smooth_k, device
        )
        self._device = device

    @property
    def bytes_per_page(self) -> int:
        """Device memory of one page."""
        return self._cache.bytes_per_page()

    def append(
        self,
        k: Array,
        v: Array,
        block_table: Array,
        cache_seqlens: Array,
        *,
        cu_seqlens: Array | None = None,
        max_seqlen: int = 0,
    ) -> None:
        """Append tokens behind ``cache_seqlens``, which the caller raises afterwards.

        Parameters
        ----------
        k, v : torch.Tensor
            ``[batch, seqlen, nheads_k, head_dim]``, or with ``cu_seqlens`` ``[total, nheads_k,
            head_dim]``; float32, float16 or bfloat16.
        block_table : Array
            int32 ``[batch, max_pages]``. Entries past a sequence's last page are not read.
        cache_seqlens : Array
            int32 ``[batch]``: tokens of each sequence before this call.
        cu_seqlens : Array, optional
            int32 ``[batch + 1]``: where the tokens of each sequence start.
        max_seqlen : int
            With ``cu_seqlens``: the most of these tokens that a sequence has; 0: all of them.
        """
        target = self._target(k, "k")
        cuda.check_place(k, [("v", v)], "k")
        self._cache.append(
            without_grad(k, "k"), without_grad(v, "v"), block_table, cache_seqlens, cu_seqlens,
            max_seqlen, *target,
        )  # fmt: skip

    def attend(
        self,
        q: Array,
        block_table: Array,
        cache_seqlens: Array,
        *,
        cu_seqlens: Array | None = None,
        max_seqlen: int = 0,
        softmax_scale: float | None = None,
        causal: bool = False,
        align: str = "bottom_right",
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        sinks: Array | None = None,
        alibi_slopes: Array | None = None,
        attn_mask: Array | None = None,
        return_lse: bool = False,
        out: Array | None = None,
    ) -> Any:
        """Compute attention over the first ``cache_seqlens`` tokens of each sequence.

        Parameters
        ----------
        q : torch.Tensor
            ``[batch, seqlen, nheads_q, head_dim]``, or with ``cu_seqlens`` ``[total, nheads_q,
            head_dim]``; nheads_k divides nheads_q.
        block_table, cache_seqlens, cu_seqlens, max_seqlen
            As for :meth:`append`; cache_seqlens counts what was appended.
        softmax_scale, causal, align, window_size, softcap, sinks, alibi_slopes
            As for :func:`attn8.attention`, per sequence.
        attn_mask : torch.Tensor, optional
            Broadcasts to ``[batch, nheads_q, seqlen, keys]``, with ``cu_seqlens`` to ``[1,
            nheads_q, total, keys]``; bool (True: seen), or a float type, added to the scores. Keys
            count from the start of a row's sequence; one that has more of them gets NaN, or raises
            with tables on the host.
        return_lse : bool
            Return ``(out, lse)``.
        out : torch.Tensor, optional
            Where to write, shaped as q, sharing no memory with it.

        Returns
        -------
        out : torch.Tensor
            As q. A row that sees no key is 0.
        lse : torch.Tensor
            Only with ``return_lse``: float32 ``[batch, nheads_q, seqlen]``, with ``cu_seqlens``
            ``[nheads_q, total]``.
        """
        target = self._target(q, "q")
        cuda.check_place(
            q,
            [("sinks", sinks), ("alibi_slopes", alibi_slopes), ("attn_mask", attn_mask),
             ("out", out)],
        )  # fmt: skip
        if attn_mask is not None:
            attn_mask = _added(attn_mask)
        if alibi_slopes is not None and len(alibi_slopes.shape) == 1:
            alibi_slopes = alibi_slopes[None]
        if not isinstance(return_lse, bool):
            raise TypeError(f"return_lse: got {type(return_lse).__name__}, want a bool")
        q = without_grad(q, "q")
        shape = shape_of(q, "q", 4 if cu_seqlens is None else 3)
        written = empty(q, shape) if out is None else without_grad(out, "out")
        lse = None
        if return_lse:
            lse = empty(q, (*shape[:-3], shape[-2], shape[-3]), "float32")
        self._cache.attend(
            q, written, lse, block_table, cache_seqlens, cu_seqlens, max_seqlen, softmax_scale,
            causal, align, window_size, softcap, sinks, alibi_slopes, attn_mask, *target,
        )  # fmt: skip
        return (written, lse) if return_lse else written

    def _target(self, x: Array, name: str) -> cuda.Target:
        target = cuda.target_of(x, name)
        if target is None or target.device != self._device:
            got = getattr(x, "device", type(x).__name__)
            raise ValueError(f"{name}: got {got}, want a torch tensor on cuda:{self._device}")
        return target


def _added(attn_mask: Array) -> Array:
    """Return what a mask of torch adds to scores, in float32."""
    torch = torch_of(attn_mask)
    if attn_mask.dtype == torch.bool:
        return torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill_(~attn_mask, -torch.inf)
    if not attn_mask.dtype.is_floating_point:
        raise TypeError(f"attn_mask: got {attn_mask.dtype}, want bool or a float type")
    return without_grad(attn_mask, "attn_mask").float()
