# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""A KV cache for Transformers that keeps K and V in INT8 pages and attends to them in place."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from attn8.arrays import without_grad
from attn8.errors import UnsupportedError
from attn8.kv_cache import KVCache
from attn8.padding import KeyRange, query_range

Window = tuple[int, int]


class _Row:
    """One sequence of the batch in one layer: the tokens that are not padding."""

    def __init__(self, pages: KVCache, sequence: Any = None, first: int = 0) -> None:
        self.pages = pages
        self.sequence = pages.create() if sequence is None else sequence
        self.first = first  # position of its first token among those of the batch

    def __del__(self) -> None:
        if hasattr(self, "sequence"):
            self.pages.free(self.sequence)

    def fork(self) -> _Row:
        """Return the same tokens for another to append to; pages are shared until one does."""
        return _Row(self.pages, self.pages.fork(self.sequence), self.first)

    def __deepcopy__(self, _memo: Any) -> _Row:
        return self.fork()

    @property
    def length(self) -> int:
        return self.pages.length(self.sequence)

    def missing(self, index: int, seen: KeyRange, start: int) -> int:
        """Return how many tokens it takes, the last ones, to hold what the mask shows.

        Parameters
        ----------
        index : int
            Row of the batch, for errors.
        seen : KeyRange
            All tokens of the sequence, those of earlier calls included.
        start : int
            Position of the first token that can be had.
        """
        first, last = seen
        held = self.length
        if held == 0:
            self.first = first
        new = max(last - max(first, start), 0)
        if held + new != last - first or (last > first and first != self.first):
            end = self.first + held
            raise UnsupportedError(
                f"attention_mask: got tokens {first} to {last} of row {index} with a cache that "
                f"holds {self.first} to {end}, want a mask that goes on where the last one ended"
            )
        return new


class _Pages:
    """The pages of the layers of one cache; layers whose heads have the same shape share them."""

    def __init__(self, max_bytes: int | None, page_size: int, rotate: bool) -> None:
        if max_bytes is None:
            max_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        self.max_bytes = max_bytes
        self.page_size = page_size
        self.rotate = rotate
        self.pools: dict[tuple[int, int, int], KVCache] = {}

    def __deepcopy__(self, _memo: Any) -> _Pages:
        return self  # copies of a cache share pages

    def of(self, nheads_k: int, head_dim: int, head_dim_v: int) -> KVCache:
        found = self.pools.get((nheads_k, head_dim, head_dim_v))
        if found is None:
            make = functools.partial(
                KVCache, nheads_k=nheads_k, head_dim=head_dim, page_size=self.page_size,
                head_dim_v=head_dim_v, rotate=self.rotate,
            )  # fmt: skip
            count = self.max_bytes // make(max_pages=1).usage().bytes_per_page
            found = self.pools[nheads_k, head_dim, head_dim_v] = make(max_pages=max(count, 1))
        return found


class _Int8Layer(DynamicLayer):  # type: ignore[misc]
    """K and V of one layer.

    ``update`` cannot know which tokens are padding, and padding has no place in the pages: it
    keeps the new tokens as they are until attention, which comes next and is told, has them
    appended. What it returns are stand-ins without memory that lead attention here.
    """

    is_sliding = False

    def __init__(self, pages: _Pages) -> None:
        super().__init__()
        self.shared_pages = pages
        self._clear()

    def _clear(self) -> None:
        self.tokens = 0  # of the longest row, padding and waiting ones included
        self.rows: list[_Row] = []
        self.waiting: tuple[torch.Tensor, torch.Tensor] | None = None
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized = False

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        batch, heads, _, dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.device.type != "cpu":
            raise UnsupportedError(f"key_states: got device {self.device}, want cpu")
        if value_states is not None and value_states.shape[:3] != key_states.shape[:3]:
            raise ValueError(
                f"value_states: got shape {tuple(value_states.shape)}, want "
                f"{tuple(key_states.shape[:3])} first, as key_states"
            )
        dim_v = dim if value_states is None else value_states.shape[3]
        pages = self.shared_pages.of(heads, dim, dim_v)
        self.rows = [_Row(pages) for _ in range(batch)]
        self.head_shape = heads, dim, dim_v
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: Any,
        **_options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens ``[batch, nheads_k, tokens, head_dim]``; return stand-ins for all."""
        key_states = without_grad(key_states, "key_states")
        value_states = without_grad(value_states, "value_states")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append(None)
        self.waiting = key_states, value_states
        self.tokens += key_states.shape[2]
        self._expose()
        return self.keys, self.values

    def _append(self, ranges: Sequence[KeyRange] | None) -> None:
        """Append the waiting tokens; ``ranges`` says which are not padding, None: all."""
        start = self.tokens - (0 if self.waiting is None else self.waiting[0].shape[2])
        if ranges is None:
            if self.waiting is None:
                return
            ranges = [(row.first, self.tokens) for row in self.rows]
        missing = [row.missing(i, ranges[i], start) for i, row in enumerate(self.rows)]
        if self.waiting is None:
            return
        growing = [i for i, new in enumerate(missing) if new > 0]
        if growing:
            ends = {i: ranges[i][1] - start for i in growing}
            new = {i: slice(ends[i] - missing[i], ends[i]) for i in growing}
            k, v = (
                torch.cat([x[i, :, new[i]].transpose(0, 1) for i in growing]) for x in self.waiting
            )
            starts = torch.tensor([0, *(missing[i] for i in growing)], dtype=torch.int32)
            self.rows[0].pages.append(
                [self.rows[i].sequence for i in growing], k, v, starts.cumsum(0, dtype=torch.int32)
            )
        self.waiting = None

    def _expose(self) -> None:
        """Make keys and values stand-ins that know this layer."""
        heads, *dims = self.head_shape
        self.keys, self.values = (
            torch.zeros(1, dtype=torch.int8).expand(len(self.rows), heads, self.tokens, dim)
            for dim in dims
        )
        self.keys.attn8_layer = self.values.attn8_layer = self

    def attend(
        self,
        query: torch.Tensor,
        ranges: Sequence[KeyRange] | None,
        *,
        causal: bool,
        window_size: Window,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Append what waits, and compute attention.

        Parameters
        ----------
        query : Tensor
            ``[batch, nheads_q, seqlen_q, head_dim]``.
        ranges : sequence of KeyRange, optional
            Tokens of each row that are not padding; None: all.
        attn_mask : Tensor, optional
            ``[batch, nheads_q or 1, seqlen_q or 1, tokens]``; not with ``ranges``.
        causal, window_size, **options
            As for :meth:`attn8.KVCache.attend`.

        Returns
        -------
        Tensor
            ``[batch, seqlen_q, nheads_q, head_dim_v]``; 0 at padded positions of causal models.
        """
        batch, heads, seqlen_q, dim = query.shape
        whole = [(0, self.tokens)] * batch
        seen = whole if ranges is None else ranges
        self._append(seen)
        pages = self.rows[0].pages
        names = [row.sequence for row in self.rows]
        mask: dict[str, Any] = {"causal": causal, "window_size": window_size}
        q = query.transpose(1, 2)
        if list(seen) == whole:
            packed = q.reshape(batch * seqlen_q, heads, dim)
            if attn_mask is not None:
                seen_by = attn_mask.expand(batch, -1, seqlen_q, -1).transpose(0, 1)
                mask["attn_mask"] = seen_by.reshape(len(seen_by), batch * seqlen_q, -1)
            out: torch.Tensor = pages.attend(names, packed, **mask, **options)
            return out.view(batch, seqlen_q, heads, -1)
        masked = causal or window_size != (-1, -1)
        spans = [query_range(keys, seqlen_q, self.tokens, masked) for keys in seen]
        starts = torch.tensor([0, *(last - first for first, last in spans)], dtype=torch.int32)
        packed = torch.cat([q[i, first:last] for i, (first, last) in enumerate(spans)])
        found = pages.attend(names, packed, starts.cumsum(0, dtype=torch.int32), **mask, **options)
        out = torch.zeros((*q.shape[:3], found.shape[2]), dtype=q.dtype)
        at = 0
        for i, (first, last) in enumerate(spans):
            out[i, first:last] = found[at : at + last - first]
            at += last - first
        return out

    def get_seq_length(self, *_args: Any) -> int:
        return self.tokens

    def reset(self) -> None:
        self._clear()

    def crop(self, max_length: int) -> None:
        """Keep the first ``max_length`` tokens, or drop ``-max_length`` from the end."""
        keep = max(max_length if max_length > 0 else self.tokens + max_length, 0)
        if self.is_initialized and keep < self.tokens:
            self._append(None)
            for row in self.rows:
                row.pages.truncate(row.sequence, min(max(keep - row.first, 0), row.length))
            self.tokens = keep
            self._expose()

    def _select(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._append(None)
            self.rows = [self.rows[i].fork() for i in indices.tolist()]
            self._expose()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(len(self.rows))[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.rows)).repeat_interleave(repeats))


class Int8Cache(Cache):  # type: ignore[misc]
    """``past_key_values`` that keeps K and V in INT8, for models that run on attn8.

    Each layer and sequence is a sequence of a :class:`attn8.KVCache`: a token is quantized once,
    when it arrives, takes about a quarter of its size in float32, and attention reads it where it
    lies. Padding is not stored, beams and copies (``copy.deepcopy``) share pages until they part.
    Layers with a sliding window keep all tokens. Only attention registered by
    :func:`attn8.transformers.register` in mode accurate can read it: any other implementation is
    handed int8 stand-ins and fails on their type.

    Parameters
    ----------
    max_bytes : int, optional
        Room for K and V. None: half of the machine's memory. It is reserved as address space, and
        becomes memory page by page as tokens arrive.
    page_size : int
        Tokens per page, as for :class:`attn8.KVCache`. A sequence takes whole pages, and the
        weights of a page's tokens are rounded together: fewer are finer, and cost time.
    rotate : bool
        As for :class:`attn8.KVCache`.
    """

    def __init__(
        self,
        *_args: Any,
        max_bytes: int | None = None,
        page_size: int = 128,
        rotate: bool = True,
        **_options: Any,
    ) -> None:
        if not isinstance(rotate, bool):
            raise TypeError(f"rotate: got {type(rotate).__name__}, want a bool")
        self.pages = _Pages(max_bytes, page_size, rotate)
        super().__init__(layer_class_to_replicate=functools.partial(_Int8Layer, self.pages))

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use, those of copies of this cache included."""
        return sum(pool.usage().bytes_used for pool in self.pages.pools.values())


def layer_of(key: torch.Tensor, value: torch.Tensor) -> Any:
    """Return the layer of an Int8Cache that K and V stand for; None where they are floats."""
    if key.dtype != torch.int8:
        return None
    if not isinstance(getattr(key, "attn8_layer", None), _Int8Layer):
        raise ValueError("key: got int8 codes that belong to no Int8Cache, want floats")
    layer: Any = key.attn8_layer
    if not hasattr(value, "attn8_layer") or value.attn8_layer is not layer:
        raise ValueError("value: got other than what came with key, want that of the same layer")
    if key.shape[2] != layer.tokens:
        raise ValueError(f"key: got {key.shape[2]} tokens, want the {layer.tokens} of its cache")
    return layer
