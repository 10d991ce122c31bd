# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The extension module: every argument is positional and checked there; see bindings.cpp."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    /,
) -> None: ...
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
    /,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]: ...
def error_report(
    out: NDArray[np.float64], reference: NDArray[np.float64], /
) -> tuple[float, float, float, float, float]: ...
