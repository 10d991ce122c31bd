# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Results in the framework of the operands: NumPy, torch, or any that speaks DLPack."""

from __future__ import annotations

import math
import sys
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""An array of any framework that shares its memory through DLPack or the buffer protocol."""


_ALIGNMENT = 64  # of memory that JAX takes over by DLPack; it copies any other


def torch_of(x: Array) -> Any:
    """Return the module torch when ``x`` is one of its tensors, else None; imports nothing."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(x, torch.Tensor) else None


def shape_of(x: Array, name: str, rank: int) -> tuple[int, ...]:
    """Return the shape of an operand of the given rank."""
    shape = getattr(x, "shape", None)
    if not isinstance(shape, tuple):
        raise TypeError(f"{name}: got {type(x).__name__}, want an array (NumPy, torch, JAX, ...)")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: got a MaskedArray, want an array: its mask would be dropped")
    if len(shape) != rank:
        raise ValueError(f"{name}: got {len(shape)} dimensions, want {rank}")
    return tuple(shape)


def without_grad(x: Array, name: str) -> Array:
    """Return a torch tensor without its gradient, where torch records none; others as they are."""
    torch = torch_of(x)
    if torch is None or not x.requires_grad:
        return x
    if torch.is_grad_enabled():
        raise ValueError(
            f"{name}: got a tensor that requires grad, want one that does not: attn8 has no "
            "backward pass (torch.no_grad(), detach())"
        )
    return x.detach()


def to_write(x: Array, name: str) -> Array:
    """Return an array that a call writes to, a torch tensor without its gradient.

    Raises
    ------
    TypeError
        The framework says that its arrays never change, but its DLPack lets one write.
    """
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(x, jax.Array):
        raise TypeError(f"{name}: got a JAX array, which never changes, want one of NumPy or torch")
    return without_grad(x, name)


def empty(like: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
    """Allocate an array to write to, in the framework of ``like`` where that can be written.

    Parameters
    ----------
    like : Array
        Gives framework, device and, without ``dtype``, the element type.
    shape : tuple of int
        Shape of the new array, in C order.
    dtype : str, optional
        "float32", "float16" or "int8".
    """
    torch = torch_of(like)
    if torch is not None:
        kind = like.dtype if dtype is None else getattr(torch, dtype)
        return torch.empty(shape, dtype=kind, device=like.device)
    if dtype is None:
        dtype = str(getattr(like, "dtype", ""))
        if dtype not in ("float32", "float16"):
            dtype = "float32"  # NumPy has no bfloat16: finish() converts
    if isinstance(like, np.ndarray):
        return np.empty(shape, np.dtype(dtype))
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(kind).reshape(shape)


def finish(like: Array, written: Array, keep_dtype: bool = False) -> Array:
    """Hand ``written`` of :func:`empty` over to the framework of ``like``.

    Frameworks with immutable arrays (JAX) get theirs from the NumPy buffer, by DLPack.
    """
    if isinstance(like, np.ndarray) or torch_of(like) is not None:
        return written
    namespace = getattr(like, "__array_namespace__", None)
    if namespace is None:
        return written
    result = namespace().from_dlpack(written)
    return result if keep_dtype or result.dtype == like.dtype else result.astype(like.dtype)
