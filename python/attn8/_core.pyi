# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The extension module: every argument is positional and checked there; see bindings.cpp."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn8.scores import Changes

default_kv_block: int

def version() -> str: ...
def best_isa() -> str: ...
def isas() -> list[tuple[str, bool, str]]: ...
def address(array: Any, /) -> int: ...
def attention(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    layout: str,
    mode: str,
    softmax_scale: float | None,
    causal: bool,
    align: str,
    window_size: tuple[int, int],
    kv_block: int,
    v_granularity: str,
    smooth_k: bool,
    check_finite: bool,
    fp8_format: str,
    threads: int,
    isa: str | None,
    changes: Changes | None,
    head_modes: Sequence[str] | None,
    /,
) -> None: ...
def cuda_attention(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    layout: str,
    mode: str,
    softmax_scale: float | None,
    causal: bool,
    align: str,
    window_size: tuple[int, int],
    kv_block: int,
    v_granularity: str,
    smooth_k: bool,
    check_finite: bool,
    fp8_format: str,
    device: int,
    stream: int,
    allocate: Callable[[int], Any],
    changes: Changes | None,
    head_modes: Sequence[str] | None,
    /,
) -> None: ...
def cuda_support() -> tuple[bool, str, list[tuple[str, str, str, str]]]: ...
def attention_seconds(q: Any, k: Any, v: Any, out: Any, repeats: int, /) -> float: ...
def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    mode: str,
    softmax_scale: float | None,
    causal: bool,
    align: str,
    window_size: tuple[int, int],
    kv_block: int,
    v_granularity: str,
    smooth_k: bool,
    check_finite: bool,
    fp8_format: str,
    threads: int,
    isa: str | None,
    changes: Changes | None,
    head_modes: Sequence[str] | None,
    /,
) -> None: ...
def quantize(
    x: Any,
    codes: Any,
    scale: Any,
    mean: Any,
    mean_use: str,
    layout: str,
    granularity: str,
    block: int,
    threads: int,
    /,
) -> None: ...
def dequantize(x: Any, out: Any, layout: str, threads: int, /) -> None: ...
def reference_attention(
    q: Any,
    k: Any,
    v: Any,
    layout: str,
    rows: Any,
    exact: bool,
    mode: str,
    softmax_scale: float | None,
    causal: bool,
    align: str,
    window_size: tuple[int, int],
    kv_block: int,
    v_granularity: str,
    smooth_k: bool,
    fp8_format: str,
    changes: Changes | None,
    /,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]: ...
def merge_states(
    outs: list[Any],
    lses: list[Any],
    out: Any,
    lse: Any,
    layout: str,
    threads: int,
    target: tuple[int, int, Callable[[int], Any]] | None,
    /,
) -> None: ...
def rotate(x: Any, out: Any, threads: int, /) -> None: ...
def error_report(
    out: NDArray[np.float64], reference: NDArray[np.float64], /
) -> tuple[float, float, float, float, float]: ...

class KVSequence:
    """Names a sequence of one KVCache. Never reused, so that a freed one stays an error."""

class KvCache:
    def create(self) -> KVSequence: ...
    def append(
        self,
        sequence: KVSequence | list[KVSequence],
        k: Any,
        v: Any,
        cu_seqlens: Any,
        rotate: bool,
        threads: int,
        isa: str | None,
        /,
    ) -> None: ...
    def fork(self, parent: KVSequence, length: int, /) -> KVSequence: ...
    def truncate(self, sequence: KVSequence, length: int, /) -> None: ...
    def free(self, sequence: KVSequence, /) -> None: ...
    def length(self, sequence: KVSequence, /) -> int: ...
    def usage(self) -> tuple[int, int, int, int, int]: ...
    def attend(
        self,
        sequences: list[KVSequence],
        q: Any,
        cu_seqlens_q: Any,
        out: Any,
        lse: Any,
        softmax_scale: float | None,
        causal: bool,
        align: str,
        window_size: tuple[int, int],
        mode: str,
        head_modes: Sequence[str] | None,
        changes: Changes | None,
        rotate: bool,
        threads: int,
        isa: str | None,
        /,
    ) -> None: ...

def make_kv_cache(
    nheads_k: int,
    head_dim: int,
    head_dim_v: int,
    page_size: int,
    max_pages: int,
    smooth_k: bool,
    /,
) -> KvCache: ...

class CudaKvCache:
    def append(
        self,
        k: Any,
        v: Any,
        block_table: Any,
        cache_seqlens: Any,
        cu_seqlens: Any,
        max_seqlen: int,
        device: int,
        stream: int,
        allocate: Callable[[int], Any],
        /,
    ) -> None: ...
    def attend(
        self,
        q: Any,
        out: Any,
        lse: Any,
        block_table: Any,
        cache_seqlens: Any,
        cu_seqlens: Any,
        max_seqlen: int,
        softmax_scale: float | None,
        causal: bool,
        align: str,
        window_size: tuple[int, int],
        softcap: float,
        sinks: Any,
        alibi_slopes: Any,
        attn_mask: Any,
        device: int,
        stream: int,
        allocate: Callable[[int], Any],
        /,
    ) -> None: ...
    def bytes_per_page(self) -> int: ...

def cuda_attention_in_pages(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    block_table: Any,
    starts: Any,
    lengths: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    align: str,
    window_size: tuple[int, int],
    softcap: float,
    sinks: Any,
    alibi_slopes: Any,
    smooth_k: bool,
    num_pages: int,
    device: int,
    stream: int,
    allocate: Callable[[int], Any],
    /,
) -> None: ...
def make_cuda_kv_cache(
    nheads_k: int, head_dim: int, page_size: int, num_pages: int, smooth_k: bool, device: int, /
) -> CudaKvCache: ...
