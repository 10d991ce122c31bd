# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8 itself, through ctypes over library.cpp."""

import ctypes
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from libraries import UnavailableError, Variants
from problem import Floats, Problem

LIBRARY = "attn8"
DTYPES = {"float32": 0, "bfloat16": 2}  # attn8::DType
MODES = {"accurate": 0, "half": 2, "exact": 3}  # attn8::Mode


class Shape(ctypes.Structure):
    """Attn8PeersShape of library.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "nheads_q", "nheads_k", "seqlen_q", "seqlen_k", "head_dim")
        ),
        *((name, ctypes.c_int32) for name in ("dtype", "mode", "causal", "threads")),
    )


def load() -> ctypes.CDLL:
    """Open the library with the signatures used here."""
    default = Path(__file__).resolve().parents[3] / "build/release/attn8_peers.so"
    path = Path(os.environ.get("ATTN8_PEERS_LIBRARY", default))
    if not path.exists():
        raise UnavailableError(f"{path}: got no file, want the target attn8_peers built")
    library = ctypes.CDLL(str(path))
    library.attn8_peers_make.restype = ctypes.c_void_p
    library.attn8_peers_kernel.restype = ctypes.c_char_p
    for name in ("run", "kernel", "free"):
        getattr(library, f"attn8_peers_{name}").argtypes = [ctypes.c_void_p]
    double_pointer = ctypes.POINTER(ctypes.c_double)
    library.attn8_peers_run.argtypes = [ctypes.c_void_p, double_pointer, double_pointer]
    return library


def to_bfloat16(x: Floats) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class PlannedAttention:
    """A plan over fixed tensors. Tells apart the time of quantizing and of attention."""

    def __init__(self, problem: Problem, mode: str, dtype: str) -> None:
        self.native = load()
        case = problem.case
        self.tensors = [
            to_bfloat16(x) if dtype == "bfloat16" else x for x in (problem.q, problem.k, problem.v)
        ]
        self.result = np.empty_like(problem.q)
        shape = Shape(
            case.batch,
            case.nheads_q,
            case.nheads_k,
            case.seqlen_q,
            case.seqlen_k,
            case.head_dim,
            DTYPES[dtype],
            MODES[mode],
            case.causal,
            problem.threads,
        )
        error = ctypes.create_string_buffer(512)
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (*self.tensors, self.result)]
        self.handle = self.native.attn8_peers_make(
            ctypes.byref(shape), *pointers, error, ctypes.c_size_t(len(error))
        )
        if not self.handle:
            raise UnavailableError(error.value.decode())
        self.quantize_ms = ctypes.c_double()
        self.attention_ms = ctypes.c_double()  # what attn8_peers_run wants a place for

    def run(self) -> float:
        if self.native.attn8_peers_run(
            self.handle, ctypes.byref(self.quantize_ms), ctypes.byref(self.attention_ms)
        ):
            raise RuntimeError("attn8_peers_run failed")
        return self.quantize_ms.value

    def out(self) -> Floats:
        return self.result


def variants(problem: Problem) -> Variants:
    """Return the ways to run the problem, by name."""
    return {
        "accurate": lambda: PlannedAttention(problem, "accurate", "float32"),
        "accurate, bfloat16 in": lambda: PlannedAttention(problem, "accurate", "bfloat16"),
        "half": lambda: PlannedAttention(problem, "half", "float32"),
        "exact float32": lambda: PlannedAttention(problem, "exact", "float32"),
        "exact bfloat16": lambda: PlannedAttention(problem, "exact", "bfloat16"),
    }
