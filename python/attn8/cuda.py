# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Calls on CUDA tensors of torch: on torch's current stream, in torch's memory.

Nothing here waits for the device, and workspace comes from torch's allocator, so that calls can be
captured into a CUDA graph, once each of their shapes has run before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from attn8 import _core
from attn8.arrays import Array, torch_of
from attn8.errors import UnavailableError, UnsupportedError
from attn8.scores import Changes

_DLPACK_CUDA = 2
CHANGED_ARRAYS = ("attn_mask", "alibi_slopes", "sinks", "seqlens_k", "leftpad_k")


class Target(NamedTuple):
    """Where a call runs, as the extension module takes it.

    Attributes
    ----------
    device : int
        Index of the device.
    stream : int
        Address of torch's current stream there; 0 is the default stream.
    allocate : callable
        Memory of a number of bytes on that device.
    """

    device: int
    stream: int
    allocate: Callable[[int], Array]


def is_on_device(x: Array) -> bool:
    """Return whether ``x`` is a torch tensor on a CUDA device."""
    return torch_of(x) is not None and x.device.type == "cuda"


@functools.cache
def _built() -> bool:
    return _core.cuda_support()[0]


def target_of(x: Array, name: str = "q") -> Target | None:
    """Return where a call whose first operand is ``x`` runs; None is the CPU.

    Raises
    ------
    UnavailableError
        ``x`` lies on a CUDA device, and this package was built without CUDA.
    TypeError
        ``x`` is a CUDA array of another framework than torch.
    """
    torch = torch_of(x)
    if torch is None:
        place = getattr(x, "__dlpack_device__", None)
        if place is None or place()[0] != _DLPACK_CUDA:
            return None
        raise TypeError(
            f"{name}: got {type(x).__name__} on a CUDA device, want a torch tensor there: "
            "torch.from_dlpack shares its memory"
        )
    if not is_on_device(x):
        return None
    if not _built():
        raise UnavailableError(
            f"{name}: got a tensor on {x.device}, want one on the CPU: this attn8 was built "
            "without CUDA (pip install . -C cmake.define.ATTN8_CUDA=ON, with nvcc 13)"
        )
    device = x.device

    def allocate(count: int) -> Array:
        return torch.empty(count, dtype=torch.int8, device=device)

    return Target(device.index, int(torch.cuda.current_stream(device).cuda_stream), allocate)


def check_place(
    first: Array, operands: Iterable[tuple[str, Any]], name_of_first: str = "q"
) -> None:
    """Raise ValueError unless all ``operands``, arrays or None, lie on the device of ``first``."""
    for name, x in operands:
        if x is None:
            continue
        if torch_of(x) is None:
            got = type(x).__name__
        elif x.device != first.device:
            got = f"a tensor on {x.device}"
        else:
            continue
        raise ValueError(
            f"{name}: got {got}, want a tensor on {first.device}, where {name_of_first} is"
        )


def check_call(
    first: Array, others: tuple[Any, Any, Any], changes: Changes | None, isa: str | None
) -> None:
    """Check what attention on the device of ``first`` is given.

    Parameters
    ----------
    first : Array
        q, or its codes.
    others : tuple
        k, v and out.
    changes, isa
        As the extension module takes them.
    """
    if isa is not None:
        raise UnsupportedError(f"isa: got {isa!r} with CUDA tensors, want None")
    parts = [(n, getattr(x, "codes", x)) for n, x in zip(("k", "v", "out"), others, strict=True)]
    if changes is not None:
        parts += zip(CHANGED_ARRAYS, changes[1:6], strict=True)
    check_place(first, parts)
