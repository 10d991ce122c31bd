# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""ctypes over library.cpp: the CUDA backend on torch tensors [batch, heads, seqlen, head_dim]."""

import ctypes

import torch

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MODES = {"accurate": 0, "paper": 1, "half": 2}
GRANULARITIES = {"token": 0, "tensor": 1, "channel": 2}
KERNELS = {"best": 0, "sm80": 1, "sm90": 2}


class Problem(ctypes.Structure):
    """Attn8GpuProblem of library.cpp."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "batch",
            "seqlen_q",
            "seqlen_k",
            "nheads_q",
            "nheads_k",
            "head_dim",
            "dtype",
            "out_dtype",
            "mode",
            "v_granularity",
            "causal",
            "top_left",
            "window_left",
            "window_right",
            "smooth_k",
            "kernels",
        )
    ] + [("softcap", ctypes.c_float)]


class Library:
    """The shared library that CMake builds here."""

    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        self.lib.attn8_gpu_plan.restype = ctypes.c_void_p
        self.lib.attn8_gpu_workspace_bytes.restype = ctypes.c_uint64
        for name in ("free", "workspace_bytes", "kv_block", "cache_free"):
            getattr(self.lib, f"attn8_gpu_{name}").argtypes = [ctypes.c_void_p]
        self.lib.attn8_gpu_cache.restype = ctypes.c_void_p
        self.lib.attn8_gpu_cache_workspace.restype = ctypes.c_uint64


class Attention:
    """A plan over fixed tensors; pack() quantizes, attend() computes, both on torch's stream."""

    def __init__(
        self,
        library,
        q,
        k,
        v,
        *,
        mode="accurate",
        v_granularity="token",
        causal=False,
        top_left=False,
        window=(-1, -1),
        smooth_k=True,
        softcap=0.0,
        kernels="best",
        lse=False,
        out_dtype=None,
    ):
        self.lib = library.lib
        self.tensors = (q, k, v)
        batch, nheads_q, seqlen_q, head_dim = q.shape
        nheads_k, seqlen_k = k.shape[1:3]
        out_dtype = out_dtype or q.dtype
        self.out = torch.full(q.shape, float("nan"), dtype=out_dtype, device=q.device)
        self.lse = torch.full(q.shape[:3], float("nan"), device=q.device) if lse else None
        problem = Problem(
            batch,
            seqlen_q,
            seqlen_k,
            nheads_q,
            nheads_k,
            head_dim,
            DTYPES[q.dtype],
            DTYPES[out_dtype],
            MODES[mode],
            GRANULARITIES[v_granularity],
            causal,
            top_left,
            window[0],
            window[1],
            smooth_k,
            KERNELS[kernels],
            softcap,
        )
        error = ctypes.create_string_buffer(512)
        pointers = [
            ctypes.c_void_p(t.data_ptr()) if t is not None else None
            for t in (q, k, v, self.out, self.lse)
        ]
        self.handle = self.lib.attn8_gpu_plan(ctypes.byref(problem), *pointers, error, 512)
        if not self.handle:
            raise RuntimeError(error.value.decode())
        self.workspace = torch.empty(
            self.lib.attn8_gpu_workspace_bytes(self.handle), dtype=torch.uint8, device=q.device
        )
        self.kv_block = self.lib.attn8_gpu_kv_block(self.handle)
        name = ctypes.create_string_buffer(128)
        self.lib.attn8_gpu_kernel(ctypes.c_void_p(self.handle), name, 128)
        self.kernel = name.value.decode()

    def __del__(self):
        """Free the plan."""
        if getattr(self, "handle", None):
            self.lib.attn8_gpu_free(self.handle)

    def _call(self, function):
        error = ctypes.create_string_buffer(512)
        stream = torch.cuda.current_stream().cuda_stream
        code = function(
            ctypes.c_void_p(self.handle),
            ctypes.c_void_p(self.workspace.data_ptr()),
            ctypes.c_void_p(stream),
            error,
            512,
        )
        if code != 0:
            raise RuntimeError(error.value.decode())

    def pack(self):
        self._call(self.lib.attn8_gpu_pack)

    def attend(self):
        self._call(self.lib.attn8_gpu_attend)

    def run(self):
        self.pack()
        self.attend()
        return self.out


class Pages(ctypes.Structure):
    """Attn8GpuPages of library.cpp."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("batch", "max_pages", "seqlen", "nheads", "head_dim", "dtype", "causal")
    ] + [("block_table", ctypes.c_void_p), ("cache_seqlens", ctypes.c_void_p)]


class Cache:
    """A paged INT8 cache; tokens are dense [batch, seqlen, heads, head_dim], tables on the GPU."""

    def __init__(self, library, nheads_k, head_dim, num_pages):
        self.lib = library.lib
        error = ctypes.create_string_buffer(512)
        self.handle = self.lib.attn8_gpu_cache(nheads_k, head_dim, num_pages, error, 512)
        if not self.handle:
            raise RuntimeError(error.value.decode())

    def __del__(self):
        """Free the pages."""
        if getattr(self, "handle", None):
            self.lib.attn8_gpu_cache_free(self.handle)

    def _call(self, function, tokens, table, seqlens, pointers, causal):
        batch, seqlen, nheads, head_dim = tokens.shape
        pages = Pages(
            batch,
            table.shape[1],
            seqlen,
            nheads,
            head_dim,
            DTYPES[tokens.dtype],
            causal,
            table.data_ptr(),
            seqlens.data_ptr(),
        )
        bytes_needed = self.lib.attn8_gpu_cache_workspace(
            ctypes.c_void_p(self.handle), ctypes.byref(pages)
        )
        if getattr(self, "workspace", None) is None or self.workspace.numel() < bytes_needed:
            self.workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=tokens.device)
        error = ctypes.create_string_buffer(512)
        code = function(
            ctypes.c_void_p(self.handle),
            ctypes.byref(pages),
            *[ctypes.c_void_p(pointer) for pointer in pointers],
            ctypes.c_void_p(self.workspace.data_ptr()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            error,
            512,
        )
        if code != 0:
            raise RuntimeError(error.value.decode())

    def append(self, k, v, table, seqlens):
        """Append behind `seqlens`."""
        pointers = (k.data_ptr(), v.data_ptr())
        self._call(self.lib.attn8_gpu_cache_append, k, table, seqlens, pointers, False)

    def attend(self, q, out, table, seqlens, causal=True):
        """Attention over the first `seqlens` tokens."""
        pointers = (q.data_ptr(), out.data_ptr())
        self._call(self.lib.attn8_gpu_cache_attend, q, table, seqlens, pointers, causal)
