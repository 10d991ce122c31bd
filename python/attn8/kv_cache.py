# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache in INT8, and attention over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attn8 import _core
from attn8._core import KVSequence
from attn8.arrays import Array, empty, finish, shape_of, to_write, without_grad
from attn8.runtime import isa_for, threads_for
from attn8.scores import check_head_modes, score_changes

__all__ = ["KVCache", "KVCacheUsage", "KVSequence"]


@dataclass(frozen=True)
class KVCacheUsage:
    """What a cache holds at one moment.

    Attributes
    ----------
    sequences : int
        Sequences that were created or forked and not freed.
    pages_used, pages_free : int
        A page that several sequences share counts once.
    bytes_used : int
        ``pages_used * bytes_per_page``.
    bytes_per_page : int
        Codes, scales and what attention wants to know of a page.
    """

    sequences: int
    pages_used: int
    pages_free: int
    bytes_used: int
    bytes_per_page: int


class KVCache:
    """K and V of many sequences in INT8 pages (docs/kv-cache.md), on the CPU.

    A token is quantized once, when it is appended; attention reads the pages as they are, for
    prefill and decode alike. Forked sequences share pages until one of them writes. Any function
    may be called from any thread at any time. A call that fails changes nothing.

    Parameters
    ----------
    nheads_k : int
        Heads of K and V.
    head_dim : int
        Of q and k, 1 to 256.
    max_pages : int
        Room for ``max_pages * page_size`` tokens: memory is reserved at once and touched when it
        is first used.
    page_size : int
        Tokens per page, and ``kv_block`` of attention over them: a multiple of 64 up to 512; 0
        for the default of :func:`attn8.info`.
    smooth_k : bool
        Subtract from K of a sequence the mean over its first append: make that the prompt.
    head_dim_v : int
        Of v and out, 1 to 256; 0: head_dim.
    rotate : bool
        Store K and V as :func:`attn8.rotate` has them, rotate q before it meets K, and the output
        back: finer codes, as with ``attention(rotate=True)``.

    Examples
    --------
    >>> import attn8, numpy as np
    >>> cache = attn8.KVCache(nheads_k=2, head_dim=64, max_pages=8)
    >>> a = cache.create()
    >>> cache.append(a, np.ones((5, 2, 64), np.float32), np.ones((5, 2, 64), np.float32))
    >>> cache.attend([a], np.ones((1, 4, 64), np.float32)).shape
    (1, 4, 64)
    """

    def __init__(
        self,
        *,
        nheads_k: int,
        head_dim: int,
        max_pages: int,
        page_size: int = 0,
        smooth_k: bool = True,
        head_dim_v: int = 0,
        rotate: bool = False,
    ) -> None:
        if not isinstance(rotate, bool):
            raise TypeError(f"rotate: got {type(rotate).__name__}, want a bool")
        if page_size == 0 and not isinstance(page_size, bool):
            page_size = _core.default_kv_block
        self._cache = _core.make_kv_cache(
            nheads_k, head_dim, head_dim_v, page_size, max_pages, smooth_k
        )
        self._head_dim_v = head_dim_v or head_dim
        self._page_size = page_size
        self._rotate = rotate

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self._page_size

    def create(self) -> KVSequence:
        """Return a new sequence without tokens."""
        return self._cache.create()

    def append(
        self,
        sequence: KVSequence | Iterable[KVSequence],
        k: Array,
        v: Array,
        cu_seqlens: Array | None = None,
        *,
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        """Append tokens to a sequence, or to each of several in one call.

        Parameters
        ----------
        sequence : KVSequence or iterable of KVSequence
            Of this cache; of several each once at most, and all are appended to or none.
        k, v : Array
            ``[tokens, nheads_k, head_dim]``, v with its head_dim_v, float32, float16 or bfloat16,
            any strides; read in place. A token with a NaN or an Inf makes the rows that see it NaN.
            The tokens of one sequence lie together.
        cu_seqlens : Array, optional
            int32 ``[sequences + 1]``, with several sequences: the tokens of sequence i are those
            from element i up to, without, element i + 1. None: the same number for each, one in a
            step of decode.
        threads, isa
            As for :func:`attn8.attention`.

        Raises
        ------
        MemoryError
            Fewer pages are free than it takes.
        """
        k, v = without_grad(k, "k"), without_grad(v, "v")
        if cu_seqlens is not None and not isinstance(sequence, Iterable):
            raise ValueError(
                f"cu_seqlens: got {type(cu_seqlens).__name__} with one sequence, want None"
            )
        to: Any = list(sequence) if isinstance(sequence, Iterable) else sequence
        self._cache.append(
            to, k, v, cu_seqlens, self._rotate, threads_for(k, threads), isa_for(isa)
        )

    def fork(self, sequence: KVSequence, length: int | None = None) -> KVSequence:
        """Return a new sequence with the first ``length`` tokens of another; None: with all.

        Shares their pages, and takes one of its own only where ``length`` ends inside a page that
        holds more tokens.
        """
        tokens = self._cache.length(sequence) if length is None else length
        return self._cache.fork(sequence, tokens)

    def truncate(self, sequence: KVSequence, length: int) -> None:
        """Drop the tokens of a sequence from ``length`` on."""
        self._cache.truncate(sequence, length)

    def free(self, sequence: KVSequence) -> None:
        """End a sequence and give back the pages that are its alone."""
        self._cache.free(sequence)

    def length(self, sequence: KVSequence) -> int:
        """Return the tokens of a sequence."""
        return self._cache.length(sequence)

    def usage(self) -> KVCacheUsage:
        """Return what the cache holds."""
        return KVCacheUsage(*self._cache.usage())

    def attend(
        self,
        sequences: Iterable[KVSequence],
        q: Array,
        cu_seqlens_q: Array | None = None,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
        align: str = "bottom_right",
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        attn_mask: Array | None = None,
        mode: str = "accurate",
        head_modes: Sequence[str] | None = None,
        return_lse: bool = False,
        out: Array | None = None,
        threads: int | None = None,
        isa: str | None = None,
    ) -> Any:
        """Compute attention of a batch of sequences, each with its own numbers of queries and keys.

        Parameters
        ----------
        sequences : iterable of KVSequence
            May repeat one.
        q : Array
            ``[total_q, nheads_q, head_dim]``, float32, float16 or bfloat16, any strides; nheads_k
            divides nheads_q. The queries of one sequence lie together.
        cu_seqlens_q : Array, optional
            int32 ``[sequences + 1]``: the queries of sequence i are the rows of q from element i
            up to, without, element i + 1. None: the same number for each, one in a step of decode.
        softmax_scale, causal, align, window_size, softcap, alibi_slopes, sinks, threads, isa
            As for :func:`attn8.attention`, per sequence: seqlen_k is its length. alibi_slopes are
            ``[nheads_q]``.
        attn_mask : Array, optional
            Broadcasts to ``[nheads_q, total_q, keys]``, bool or added as for
            :func:`attn8.attention`: a row for each row of q, keys counted from the start of the
            sequence that it belongs to, at least as many as the longest one has.
        mode : {"accurate", "half", "exact"}
            accurate computes on the pages as they are; half and exact on the floats that they
            stand for, unpacked by every call: P (and q) are not rounded to INT8, K and V have been.
        head_modes : sequence of str, optional
            Mode of each kv head, in place of ``mode``.
        return_lse : bool
            Return ``(out, lse)``.
        out : Array, optional
            Where to write, shaped as the result, sharing no memory with it.

        Returns
        -------
        out : Array
            As q, with v's head_dim. A row that sees no key is 0. Results depend neither on the
            threads nor on what else is in the batch.
        lse : Array
            Only with ``return_lse``: float32 ``[nheads_q, total_q]``, natural logarithm.
        """
        shape = shape_of(q, "q", 3)
        if not isinstance(return_lse, bool):
            raise TypeError(f"return_lse: got {type(return_lse).__name__}, want a bool")
        check_head_modes(head_modes, mode)
        keys = tuple(getattr(attn_mask, "shape", None) or (0,))[-1]
        changes = score_changes(
            (1, shape[1], shape[0], keys), softcap, attn_mask, alibi_slopes, sinks
        )
        q = without_grad(q, "q")
        written = empty(q, (*shape[:2], self._head_dim_v)) if out is None else to_write(out, "out")
        lse = empty(q, (shape[1], shape[0]), "float32") if return_lse else None
        names: Any = list(sequences) if isinstance(sequences, Iterable) else sequences
        self._cache.attend(
            names, q, cu_seqlens_q, written, lse, softmax_scale, causal, align,
            window_size, mode, head_modes, changes, self._rotate, threads_for(q, threads),
            isa_for(isa),
        )  # fmt: skip
        result = finish(q, written) if out is None else out
        return (result, finish(q, lse, keep_dtype=True)) if return_lse else result
