# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors in INT8: codes, scales, and the mean that was taken out of K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attn8 import _core, device_quantization
from attn8.arrays import Array, empty, finish, shape_of, torch_of, without_grad
from attn8.runtime import threads_for


@dataclass(frozen=True)
class QuantizedTensor:
    """``x ~ codes * scale (+ mean)``, an operand of :func:`attn8.attention`.

    Shapes are for layout "bshd"; in "bhsd" the second and third dimension change places.

    Attributes
    ----------
    codes : Array
        int8 ``[batch, seq, heads, dim]``, in [-127, 127].
    scale : Array
        float32; with granularity token ``[batch, seq, heads, 1]``, tensor ``[batch, 1, heads,
        1]``, channel ``[batch, 1, heads, dim]``, block ``[batch, blocks, heads, 1]``,
        block_channel ``[batch, blocks, heads, dim]``. ``scale`` multiplies codes: it is what
        FlashAttention-3 calls descale.
    granularity : str
        Which elements share a scale.
    block : int
        Tokens per block of the two block granularities.
    mean : Array, optional
        K only: float32 ``[batch, 1, heads, dim]``, subtracted before quantizing. Attention adds
        ``softmax_scale * q.mean`` to the LSE; its output does not change.
    layout : str
        "bshd" or "bhsd".
    """

    codes: Array
    scale: Array
    granularity: str = "token"
    block: int = 0
    mean: Array | None = None
    layout: str = "bshd"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the codes."""
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and mean."""
        parts = [self.codes, self.scale] + ([] if self.mean is None else [self.mean])
        return sum(int(part.nbytes) for part in parts)

    def fields(self) -> tuple[Any, ...]:
        """Return what the extension module takes for an operand."""
        return (self.codes, self.scale, self.granularity, self.block, self.mean)


def _sequence_axis(layout: str) -> int:
    if layout not in ("bshd", "bhsd"):
        raise ValueError(f"layout: got {layout!r}, want 'bshd' or 'bhsd'")
    return 1 if layout == "bshd" else 2


def _scale_shape(
    shape: tuple[int, ...], granularity: str, block: int, layout: str
) -> tuple[int, ...]:
    axis = _sequence_axis(layout)
    groups = {"token": shape[axis], "tensor": 1, "channel": 1}.get(granularity)
    if groups is None:
        if granularity not in ("block", "block_channel"):
            raise ValueError(
                f"granularity: got {granularity!r}, want token, tensor, channel, block or "
                "block_channel"
            )
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"block: got {type(block).__name__}, want an int")
        if block < 1:
            raise ValueError(f"block: got {block}, want at least 1 for granularity {granularity}")
        groups = -(-shape[axis] // block)
    scale = list(shape)
    scale[axis] = groups
    if granularity in ("token", "tensor", "block"):
        scale[3] = 1
    return tuple(scale)


def quantize(
    x: Array,
    granularity: str = "token",
    *,
    block: int = 0,
    smooth: bool = False,
    mean: Array | None = None,
    layout: str = "bshd",
    threads: int | None = None,
) -> QuantizedTensor:
    """Quantize to INT8, symmetric, rounding half to even (docs/numerics.md).

    Torch tensors on a device are quantized there, by torch's operations: the same codes and scales.

    Parameters
    ----------
    x : Array
        float32, float16 or bfloat16 ``[batch, seq, heads, dim]`` (or as ``layout`` says), any
        strides.
    granularity : {"token", "tensor", "channel", "block", "block_channel"}
        Which elements share a scale.
    block : int
        Tokens per block; needed by the two block granularities.
    smooth : bool
        Subtract the mean over tokens first and return it: for K, whose mean softmax does not see.
    mean : Array, optional
        Subtract this mean instead, float32 ``[batch, 1, heads, dim]``.
    layout : {"bshd", "bhsd"}
        Order of the dimensions of every array of this call.
    threads : int, optional
        See :func:`attn8.get_num_threads`.

    Returns
    -------
    QuantizedTensor
        In the framework of ``x``.

    Examples
    --------
    >>> import attn8, numpy as np
    >>> k = attn8.quantize(np.ones((1, 4, 2, 8), np.float32))
    >>> int(k.codes.max()), k.scale.shape
    (127, (1, 4, 2, 1))
    """
    shape = shape_of(x, "x", 4)
    x = without_grad(x, "x")
    if not isinstance(smooth, bool):
        raise TypeError(f"smooth: got {type(smooth).__name__}, want a bool")
    if smooth and mean is not None:
        raise ValueError("mean: got an array with smooth=True, want one of the two")
    scale_shape = _scale_shape(shape, granularity, block, layout)
    if torch_of(x) is not None and x.device.type != "cpu":
        axis = _sequence_axis(layout)
        parts = device_quantization.quantize(x, granularity, block, smooth, mean, axis)
        return QuantizedTensor(*parts[:2], granularity, block, parts[2], layout)
    codes = empty(x, shape, "int8")
    scale = empty(x, scale_shape, "float32")
    written_mean = mean
    if smooth:
        mean_shape = list(shape)
        mean_shape[_sequence_axis(layout)] = 1
        written_mean = empty(x, tuple(mean_shape), "float32")
    use = "compute" if smooth else "none" if mean is None else "given"
    count = threads_for(x, threads)
    _core.quantize(x, codes, scale, written_mean, use, layout, granularity, block, count)
    return QuantizedTensor(
        finish(x, codes, keep_dtype=True),
        finish(x, scale, keep_dtype=True),
        granularity,
        block,
        finish(x, written_mean, keep_dtype=True) if smooth else mean,
        layout,
    )


def dequantize(
    x: QuantizedTensor, *, out: Array | None = None, threads: int | None = None
) -> Array:
    """Return ``codes * scale (+ mean)`` as float32, or write it to ``out`` in the type of that.

    Parameters
    ----------
    x : QuantizedTensor
        What :func:`quantize` returned.
    out : Array, optional
        float32, float16 or bfloat16, of the shape of ``x.codes``.
    threads : int, optional
        See :func:`attn8.get_num_threads`.
    """
    if not isinstance(x, QuantizedTensor):
        raise TypeError(f"x: got {type(x).__name__}, want a QuantizedTensor")
    shape = shape_of(x.codes, "x.codes", 4)
    if torch_of(x.codes) is not None and x.codes.device.type != "cpu":
        _scale_shape(shape, x.granularity, x.block, x.layout)
        axis = _sequence_axis(x.layout)
        found = device_quantization.dequantize(
            x.codes, x.scale, x.granularity, x.block, x.mean, axis
        )
        return found if out is None else out.copy_(found)
    written = empty(x.codes, shape, "float32") if out is None else out
    _core.dequantize(x.fields(), written, x.layout, threads_for(x.codes, threads))
    return finish(x.codes, written, keep_dtype=True) if out is None else out
