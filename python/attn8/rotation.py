# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Rotation of q and k, which scores do not see and their quantization gains from."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn8.arrays import Array, torch_of, without_grad


@functools.cache
def _hadamard(dim: int) -> NDArray[np.float32]:
    """Return the orthogonal matrix ``[block, block]``, block the largest power of 2 in ``dim``."""
    block = dim & -dim
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(block))


@functools.cache
def _as_tensor(dim: int, device: Any) -> Any:
    import torch

    return torch.from_numpy(_hadamard(dim)).to(device)


def rotate(x: Array) -> Array:
    """Multiply the last dimension by a Hadamard matrix, to quantize q and k more finely.

    An orthogonal matrix on both leaves every ``q.k`` what it is. Channels that are larger than the
    rest, by which one scale per token would coarsen all others, are spread over all channels
    ("incoherent processing" in FlashAttention-3, arXiv:2407.08608; QuaRot, arXiv:2404.00456).

    Parameters
    ----------
    x : Array
        ``[..., head_dim]``, float32, float16 or bfloat16. Where head_dim is no power of 2, blocks
        of the largest power of 2 that divides it are rotated, each by itself.

    Returns
    -------
    Array
        float32 in the framework of ``x``.
    """
    shape = getattr(x, "shape", None)
    if not isinstance(shape, tuple):
        raise TypeError(f"x: got {type(x).__name__}, want an array (NumPy, torch, JAX, ...)")
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(shape)}, want [..., head_dim]")
    dim = int(shape[-1])
    block = dim & -dim
    x = without_grad(x, "x")
    torch = torch_of(x)
    if torch is not None:
        if torch.compiler.is_compiling():
            from attn8 import torch_ops

            return torch_ops.rotate(x)
        matrix = _as_tensor(dim, x.device)
        wide = x.to(torch.float32)
    else:
        matrix = _hadamard(dim)
        wide = x.astype(np.float32)
    if block == dim:
        return wide @ matrix
    return (wide.reshape(*shape[:-1], dim // block, block) @ matrix).reshape(shape)
