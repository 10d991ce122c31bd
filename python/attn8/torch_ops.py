# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8 inside PyTorch: operators that torch.compile and torch.export understand, SDPA's routing.

Importing this module registers ``torch.ops.attn8.attention``, ``attention_quantized`` and
``rotate``; :func:`attn8.attention` calls them by itself while torch traces. Nothing of torch is
patched.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from attn8 import functional, rotation
from attn8.errors import UnavailableError, UnsupportedError
from attn8.interfaces import scaled_dot_product_attention
from attn8.quantization import QuantizedTensor
from attn8.scores import Changes

_DEVICES = ("cpu", "cuda")


def _lse_shape(q: torch.Tensor, layout: str) -> tuple[int, int, int]:
    first, second = (q.shape[2], q.shape[1]) if layout == "bshd" else (q.shape[1], q.shape[2])
    return q.shape[0], first, second


@torch.library.custom_op("attn8::attention", mutates_args=(), device_types=_DEVICES)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str = "bshd",
    mode: str = "accurate",
    softmax_scale: float | None = None,
    causal: bool = False,
    align: str = "bottom_right",
    window_left: int = -1,
    window_right: int = -1,
    kv_block: int = 0,
    v_granularity: str = "token",
    smooth_k: bool = True,
    check_finite: bool = False,
    fp8_format: str = "e4m3",
    threads: int | None = None,
    isa: str | None = None,
    softcap: float = 0.0,
    attn_mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    q_offset: int = 0,
    k_offset: int = 0,
    head_modes: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of :func:`attn8.attention`, for float tensors.

    ``head_modes`` are joined by commas: an operator takes no list of str.
    """
    out, lse = functional.attention(
        q.detach(), k.detach(), v.detach(), layout=layout, mode=mode, softmax_scale=softmax_scale,
        causal=causal, align=align, window_size=(window_left, window_right), kv_block=kv_block,
        v_granularity=v_granularity, smooth_k=smooth_k, check_finite=check_finite,
        fp8_format=fp8_format, return_lse=True, threads=threads, isa=isa, softcap=softcap,
        attn_mask=attn_mask, alibi_slopes=alibi_slopes, sinks=sinks, seqlens_k=seqlens_k,
        leftpad_k=leftpad_k, q_offset=q_offset, k_offset=k_offset,
        head_modes=None if head_modes is None else head_modes.split(","),
    )  # fmt: skip
    return out, lse


@attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,  # noqa: ARG001
    v: torch.Tensor,
    layout: str = "bshd",
    *_args: Any,
    **_options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.empty(_lse_shape(q, layout), dtype=torch.float32, device=q.device)
    shape = (*q.shape[:3], v.shape[3])
    return torch.empty(shape, dtype=q.dtype, device=q.device), lse


@torch.library.custom_op("attn8::attention_quantized", mutates_args=(), device_types=_DEVICES)
def attention_quantized(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scale: torch.Tensor,
    k_mean: torch.Tensor | None,
    v_codes: torch.Tensor,
    v_scale: torch.Tensor,
    layout: str = "bshd",
    softmax_scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of mode accurate for K and V in INT8 with a scale per token."""
    out, lse = functional.attention(
        q.detach(),
        QuantizedTensor(k_codes, k_scale, mean=k_mean, layout=layout),
        QuantizedTensor(v_codes, v_scale, layout=layout),
        layout=layout, softmax_scale=softmax_scale, causal=causal,
        window_size=(window_left, window_right), return_lse=True, threads=threads,
    )  # fmt: skip
    return out, lse


@attention_quantized.register_fake
def _(
    q: torch.Tensor,
    k_codes: torch.Tensor,  # noqa: ARG001
    k_scale: torch.Tensor,  # noqa: ARG001
    k_mean: torch.Tensor | None,  # noqa: ARG001
    v_codes: torch.Tensor,
    v_scale: torch.Tensor,  # noqa: ARG001
    layout: str = "bshd",
    *_args: Any,
    **_options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.empty(_lse_shape(q, layout), dtype=torch.float32, device=q.device)
    shape = (*q.shape[:3], v_codes.shape[3])
    return torch.empty(shape, dtype=q.dtype, device=q.device), lse


@torch.library.custom_op("attn8::rotate", mutates_args=(), device_types=_DEVICES)
def rotate(x: torch.Tensor) -> torch.Tensor:
    """Return :func:`attn8.rotate` of a tensor."""
    out: torch.Tensor = rotation.rotate(x.detach())
    return out


@rotate.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


_UNCHANGED: Changes = (0.0, None, None, None, None, None, 0, 0)


def traced_attention(
    q: Any,
    k: Any,
    v: Any,
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
    return_lse: bool,
    out: Any,
    threads: int | None,
    isa: str | None,
    out_dtype: torch.dtype,
    changes: Changes | None,
    turned: bool,
    head_modes: Sequence[str] | None,
) -> Any:
    """Stand in for :func:`attn8.attention` while torch traces."""
    if out is not None:
        raise UnsupportedError("out: got a tensor under torch.compile, want None")
    if isinstance(q, QuantizedTensor):
        raise UnsupportedError("q: got a QuantizedTensor under torch.compile, want a tensor")
    quantized = isinstance(k, QuantizedTensor), isinstance(v, QuantizedTensor)
    if not any(quantized):
        result = attention(
            q, k, v, layout, mode, softmax_scale, causal, align, window_size[0], window_size[1],
            kv_block, v_granularity, smooth_k, check_finite, fp8_format, threads, isa,
            *(changes or _UNCHANGED), None if head_modes is None else ",".join(head_modes),
        )  # fmt: skip
    else:
        plain = (mode, align, kv_block, check_finite, isa, changes, head_modes) == (
            "accurate", "bottom_right", 0, False, None, None, None,
        )  # fmt: skip
        if not all(quantized) or not plain:
            raise UnsupportedError(
                "k, v: got a QuantizedTensor under torch.compile, want both quantized and mode, "
                "align, kv_block, check_finite, isa, head_modes and what changes scores at their "
                "defaults"
            )
        for name, x in (("k", k), ("v", v)):
            if x.granularity != "token" or x.layout != layout:
                raise UnsupportedError(
                    f"{name}: got granularity {x.granularity} and layout {x.layout} under "
                    f"torch.compile, want token and {layout}"
                )
        result = attention_quantized(
            q, k.codes, k.scale, k.mean, v.codes, v.scale, layout, softmax_scale, causal,
            window_size[0], window_size[1], threads,
        )  # fmt: skip
    # A rotated q is wider than what the caller gave.
    written = (rotate(result[0]) if turned else result[0]).to(out_dtype)
    return (written, result[1]) if return_lse else written


_SDPA_SIGNATURE = inspect.signature(scaled_dot_product_attention)


class _Route(TorchFunctionMode):  # type: ignore[misc]
    """Answers calls of SDPA by attn8 where that can, by torch elsewhere."""

    def __init__(self, mode: str, fallback: bool) -> None:
        super().__init__()
        self.mode = mode
        self.fallback = fallback
        self.routed = 0
        self.left = 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        try:
            bound = _SDPA_SIGNATURE.bind(*args, **kwargs).arguments
            out = scaled_dot_product_attention(**bound, mode=self.mode)
        except (TypeError, ValueError, UnsupportedError, UnavailableError):
            if not self.fallback:
                raise
            self.left += 1
            return function(*args, **kwargs)
        self.routed += 1
        return out


@contextlib.contextmanager
def route_sdpa(mode: str = "accurate", *, fallback: bool = True) -> Iterator[_Route]:
    """Route ``torch.nn.functional.scaled_dot_product_attention`` to attn8 inside a ``with``.

    Only calls of this thread inside the block are seen; torch is not patched.

    Parameters
    ----------
    mode : str
        Mode of :func:`attn8.attention`.
    fallback : bool
        Leave to torch what attn8 refuses: dropout, gradients, other
        devices and types. False: raise.

    Yields
    ------
    object
        Counts in ``routed`` and ``left`` who answered.

    Examples
    --------
    >>> import torch, attn8.torch_ops
    >>> q = torch.randn(1, 2, 16, 64)
    >>> with attn8.torch_ops.route_sdpa() as calls:
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> calls.routed
    1
    """
    with _Route(mode, fallback) as route:
        yield route
