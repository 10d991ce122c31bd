# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Quantization by torch's own operations, for tensors on a device; the rules of docs/numerics.md.

Codes and scales are those of the library's quantizer, bit for bit, from the same mean. A mean that
is computed here adds the tokens in torch's order and may differ in its last bit.
"""

from __future__ import annotations

from typing import Any

from attn8.arrays import Array

_LEAST_SCALE = 2.0**-126  # the smallest normal float32
_LOW_BITS = ~7  # what is left of a scale's mantissa: its low three bits are cleared


def _largest(x: Any, granularity: str, block: int, axis: int) -> Any:
    """Return the largest magnitude of each group, in the shape of its scale; a NaN stays one."""
    import torch

    x = x.abs()
    if "block" in granularity:
        tokens = x.shape[axis]
        blocks = -(-tokens // block)
        padding = [0, 0] * (3 - axis) + [0, blocks * block - tokens]
        x = torch.nn.functional.pad(x, padding).unflatten(axis, (blocks, block)).amax(axis + 1)
    elif granularity != "token":
        if x.shape[axis] == 0:
            return x.sum(axis, keepdim=True)[..., : None if granularity == "channel" else 1]
        x = x.amax(axis, keepdim=True)
    return x if "channel" in granularity else x.amax(3, keepdim=True)


def quantize(
    x: Any, granularity: str, block: int, smooth: bool, mean: Any, axis: int
) -> tuple[Array, Array, Array]:
    """Return codes, scale, and the mean that was taken out (None without one).

    Parameters
    ----------
    x : Tensor
        float32, float16 or bfloat16, of rank 4.
    granularity, block
        As for :func:`attn8.quantize`, checked.
    smooth : bool
        Take the mean over the tokens out.
    mean : Tensor, optional
        Take this one out.
    axis : int
        Dimension of the tokens.
    """
    import torch

    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x.dtype: got {x.dtype}, want float32, float16 or bfloat16")
    if smooth:
        mean = x.mean(axis, keepdim=True, dtype=torch.float64).float()
        mean = torch.where(mean.isfinite(), mean, 0.0)
    elif mean is not None:
        wanted = tuple(1 if i == axis else n for i, n in enumerate(x.shape))
        if not isinstance(mean, torch.Tensor) or mean.device != x.device:
            place = getattr(mean, "device", None)
            got = f"a {type(mean).__name__}" if place is None else f"a tensor on {place}"
            raise ValueError(f"mean: got {got}, want a tensor on {x.device}, as x")
        if tuple(mean.shape) != wanted:
            raise ValueError(f"mean: got shape {tuple(mean.shape)}, want {wanted}")
        if mean.dtype != torch.float32:
            raise TypeError(f"mean.dtype: got {mean.dtype}, want float32")
    x = x.float() if mean is None else x.float() - mean
    largest = _largest(x, granularity, block, axis)
    scale = (largest / 127).view(torch.int32).bitwise_and_(_LOW_BITS).view(torch.float32)
    scale = torch.where(scale < _LEAST_SCALE, 1.0, scale)
    scale = torch.where(largest.isfinite(), scale, float("nan"))
    codes = (x / _per_token(scale, granularity, block, x.shape[axis], axis)).round_()
    return codes.nan_to_num_(nan=0.0).to(torch.int8), scale, mean


def dequantize(codes: Any, scale: Any, granularity: str, block: int, mean: Any, axis: int) -> Array:
    """Return ``codes * scale (+ mean)`` as float32; arguments as :func:`quantize` returns them."""
    x = codes.float() * _per_token(scale, granularity, block, codes.shape[axis], axis)
    return x if mean is None else x + mean


def _per_token(scale: Any, granularity: str, block: int, tokens: int, axis: int) -> Any:
    """Return scales that broadcast to the codes."""
    if "block" not in granularity:
        return scale
    return scale.repeat_interleave(block, axis).narrow(axis, 0, tokens)
