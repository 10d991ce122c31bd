# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""How calls run: threads, instruction set, and what this machine offers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

from attn8 import _core
from attn8.arrays import Array, torch_of

_threads: int | None = None


def _from_environment() -> int | None:
    text = os.environ.get("ATTN8_THREADS")
    if text is None or text == "":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"ATTN8_THREADS: got {text!r}, want a number from 1 on")
    return int(text)


def get_num_threads() -> int:
    """Return the threads of calls that do not say ``threads``.

    What :func:`set_num_threads` set; else the environment variable ``ATTN8_THREADS``; else the
    CPUs this process may run on. Calls on torch tensors follow ``torch.get_num_threads()``
    unless one of the first two is set. Results never depend on it.
    """
    threads = _threads if _threads is not None else _from_environment()
    return threads if threads is not None else len(os.sched_getaffinity(0))


def set_num_threads(threads: int | None) -> None:
    """Set what :func:`get_num_threads` returns; None goes back to the default."""
    global _threads
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise TypeError(f"threads: got {type(threads).__name__}, want an int or None")
    if threads is not None and not 1 <= threads <= 4096:
        raise ValueError(f"threads: got {threads}, want 1 to 4096")
    _threads = threads


def threads_for(x: Array, threads: int | None) -> int:
    """Return the threads of a call whose first operand is ``x``."""
    if threads is not None:
        return threads
    if _threads is not None:
        return _threads
    torch = torch_of(x)
    if torch is not None and "ATTN8_THREADS" not in os.environ:
        return int(torch.get_num_threads())
    return get_num_threads()


def isa_for(isa: str | None) -> str | None:
    """Return the instruction set a call insists on: its own, or that of ``ATTN8_ISA``."""
    return isa if isa is not None else os.environ.get("ATTN8_ISA") or None


def _after_fork() -> None:
    # A child of fork() has no OpenMP threads left, and libgomp waits for them forever.
    global _threads
    _threads = 1


os.register_at_fork(after_in_child=_after_fork)


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    built, reason, devices = _core.cuda_support()
    return {
        "built": built,
        "reason": reason,
        "devices": [
            {"name": name, "capability": capability, "kernels": kernels, "reason": why_not}
            for name, capability, kernels, why_not in devices
        ],
    }


def info() -> dict[str, Any]:
    """Return what this installation is and what it found on this machine.

    Returns
    -------
    dict
        ``version``; ``isa``, the instruction set that calls use; ``isas``, all of them with why
        one is not used; ``cuda``, whether its kernels are built, and the devices; ``threads``;
        ``kv_block``, the default; ``python``, ``platform``; and the
        versions of ``numpy``, ``torch`` and ``transformers``, None where missing.

    Examples
    --------
    >>> import attn8
    >>> attn8.info()["kv_block"] % 64
    0
    """
    return {
        "version": _core.version(),
        "isa": _core.best_isa(),
        "isas": [
            {"name": name, "available": available, "reason": reason}
            for name, available, reason in _core.isas()
        ],
        "cuda": _cuda(),
        "threads": get_num_threads(),
        "kv_block": _core.default_kv_block,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "numpy": _version_of("numpy"),
        "torch": _version_of("torch"),
        "transformers": _version_of("transformers"),
    }
