# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Rotation of q, k and v, which results do not see and their quantization gains from."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from attn8 import _core
from attn8.arrays import Array, empty, finish, torch_of, without_grad
from attn8.runtime import threads_for


@functools.cache
def _hadamard(dim: int, device: Any) -> Any:
    """Return the orthogonal matrix ``[block, block]``, block the largest power of 2 in ``dim``."""
    import torch

    block = dim & -dim
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return torch.from_numpy(matrix / np.float32(np.sqrt(block))).to(device)


def _multiply(x: Any) -> Any:
    """Return the product on the device of a torch tensor, float32."""
    dim = x.shape[-1]
    wide = x.float().reshape(*x.shape[:-1], -1, dim & -dim)
    return (wide @ _hadamard(dim, x.device)).reshape(x.shape)


def _rows(x: Array) -> Array:
    """Return a view of rank 4, as the extension module takes it."""
    if len(x.shape) > 4:
        return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    while len(x.shape) < 4:
        x = x[None]
    return x


def rotate(x: Array, *, threads: int | None = None) -> Array:
    """Multiply the last dimension by a Hadamard matrix, for finer INT8 codes.

    An orthogonal matrix on q and k leaves every ``q.k`` what it is, and one on v, which is its own
    inverse, can be taken back from the output. Channels that are larger than the rest, by which
    one scale per token would coarsen all others, are spread over all channels ("incoherent
    processing" in FlashAttention-3, arXiv:2407.08608; QuaRot, arXiv:2404.00456).

    Parameters
    ----------
    x : Array
        ``[..., head_dim]``, float32, float16 or bfloat16, head_dim 1 to 256. Where it is no power
        of 2, blocks of the largest power of 2 that divides it are rotated, each by itself. Sums of
        up to head_dim values overflow where those are beyond 1e36.
    threads : int, optional
        See :func:`attn8.get_num_threads`. Never changes the result.

    Returns
    -------
    Array
        float32 in the framework of ``x``.
    """
    shape = getattr(x, "shape", None)
    if not isinstance(shape, tuple):
        raise TypeError(f"x: got {type(x).__name__}, want an array (NumPy, torch, JAX, ...)")
    if len(shape) == 0 or not 1 <= shape[-1] <= 256:
        raise ValueError(
            f"x: got shape {tuple(shape)}, want [..., head_dim] with a head_dim of 1 to 256"
        )
    x = without_grad(x, "x")
    torch = torch_of(x)
    if torch is not None and torch.compiler.is_compiling():
        from attn8 import torch_ops

        return torch_ops.rotate(x)
    if torch is not None and x.device.type != "cpu":
        return _multiply(x)
    out = empty(x, tuple(shape), "float32")
    _core.rotate(_rows(x), _rows(out), threads_for(x, threads))
    return finish(x, out, keep_dtype=True)


def rotate_back(computed: Array, q: Array, out: Array | None, threads: int | None) -> Array:
    """Return the output of attention over a rotated v as the caller wants it.

    Parameters
    ----------
    computed : Array
        What attention wrote, float32, of :func:`attn8.arrays.empty`. Overwritten.
    q : Array
        Gives framework and type of the result.
    out : Array, optional
        Where to write it instead.
    threads : int, optional
        As for :func:`rotate`.
    """
    torch = torch_of(computed)
    if torch is not None and computed.device.type != "cpu":
        turned = _multiply(computed)
        return turned.to(q.dtype) if out is None else out.copy_(turned)
    written = empty(q, tuple(computed.shape)) if out is None else out
    if out is None and written.dtype == computed.dtype:
        written = computed
    _core.rotate(_rows(computed), _rows(written), threads_for(q, threads))
    return finish(q, written) if out is None else out
