# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's ggml_flash_attn_ext on its CPU backend, from the libraries of llama-cpp-python."""

import ctypes
import importlib.util
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from libraries import UnavailableError, Variants
from problem import Floats, Problem

LIBRARY = "llama.cpp (ggml)"
TYPES = {"float32": 0, "float16": 1, "q8_0": 8, "bfloat16": 30}  # enum ggml_type


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def load() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Open libggml-base and libggml-cpu with the signatures used here."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise UnavailableError("llama-cpp-python is not installed")
    folder = Path(package.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    base.ggml_init.argtypes = [InitParams]
    base.ggml_new_tensor_4d.argtypes = [pointer, ctypes.c_int, *[whole] * 4]
    base.ggml_get_data.argtypes = [pointer]
    base.ggml_nbytes.argtypes = [pointer]
    base.ggml_nbytes.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *[whole] * 3, pointer]
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_flash_attn_ext.argtypes = [*[pointer] * 5, *[ctypes.c_float] * 3]
    base.ggml_new_graph.argtypes = [pointer]
    base.ggml_build_forward_expand.argtypes = [pointer, pointer]
    base.ggml_backend_graph_compute.argtypes = [pointer, pointer]
    cpu.ggml_backend_cpu_set_n_threads.argtypes = [pointer, ctypes.c_int]
    for function in (
        base.ggml_init,
        base.ggml_new_tensor_4d,
        base.ggml_get_data,
        base.ggml_flash_attn_ext,
        base.ggml_new_graph,
        cpu.ggml_backend_cpu_init,
    ):
        function.restype = pointer
    return base, cpu


class FlashAttention:
    """A graph of the one node; K and V kept in `kv_type`, Q in float32."""

    def __init__(self, problem: Problem, kv_type: str) -> None:
        self.base, cpu = load()
        case = problem.case
        self.shape = (case.batch, case.seqlen_q, case.nheads_q, case.head_dim)
        # Room for every operand as float32, the mask, the result and the graph.
        room = 2 * (problem.q.nbytes + problem.k.nbytes + problem.v.nbytes)
        room += 2 * case.seqlen_q * case.seqlen_k + (64 << 20)
        self.context = self.base.ggml_init(InitParams(room, None, False))
        q = self.tensor(problem.q, "float32")
        k = self.tensor(problem.k, kv_type)
        v = self.tensor(problem.v, kv_type)
        mask = None
        if case.causal:
            hidden = np.triu(
                np.full((1, 1, case.seqlen_q, case.seqlen_k), -np.inf, np.float32),
                1 + case.seqlen_k - case.seqlen_q,
            )
            mask = self.tensor(hidden, "float16")
        scale = 1 / math.sqrt(case.head_dim)
        self.result = self.base.ggml_flash_attn_ext(self.context, q, k, v, mask, scale, 0.0, 0.0)
        self.graph = self.base.ggml_new_graph(self.context)
        self.base.ggml_build_forward_expand(self.graph, self.result)
        self.backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self.backend, problem.threads)

    def tensor(self, x: Floats, kind: str) -> int:
        """Make a tensor of the context that holds `x`; ggml lists extents backwards."""
        tensor: int = self.base.ggml_new_tensor_4d(self.context, TYPES[kind], *x.shape[::-1])
        data = self.base.ggml_get_data(tensor)
        rows, width = x.size // x.shape[-1], x.shape[-1]
        if kind == "float32":
            ctypes.memmove(data, x.ctypes.data, x.nbytes)
        else:
            self.base.ggml_quantize_chunk(TYPES[kind], x.ctypes.data, data, 0, rows, width, None)
        return tensor

    def run(self) -> float:
        if self.base.ggml_backend_graph_compute(self.backend, self.graph):
            raise RuntimeError("ggml_backend_graph_compute failed")
        return 0.0

    def out(self) -> Floats:
        size = self.base.ggml_nbytes(self.result)
        data = (ctypes.c_byte * size).from_address(self.base.ggml_get_data(self.result))
        out: NDArray[np.float32] = np.frombuffer(data, np.float32).reshape(self.shape)
        return out.transpose(0, 2, 1, 3)


def variants(problem: Problem) -> Variants:
    """Return the ways to run the problem, by name."""
    return {
        "float16 KV": lambda: FlashAttention(problem, "float16"),
        "q8_0 KV": lambda: FlashAttention(problem, "q8_0"),
    }
