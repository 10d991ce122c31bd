#!/usr/bin/env python3
# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Times other attention kernels beside attn8, and compares all with exact attention.

    python3 benchmarks/gpu/peers.py build/gpu/libattn8_gpu.so --fa3 libfa3.so \
        --sage <SageAttention> --paper <INT-FlashAttention> --json result.json

Each peer is found by the path given, and left out by name without one. How to obtain them:
docs/performance-cuda.md. A kernel whose output is not attention is not timed.
"""

import argparse
import ctypes
import json
import math
import sys
import time
import types
from pathlib import Path

import bench
import torch
from attn8_gpu import Attention, Library
from torch.nn.attention import SDPBackend, sdpa_kernel

LARGEST_ERROR = 0.2  # relative L2; beyond it a kernel computes something else
CHECKED_QUERIES = 256  # of every head of the first and of the last sequence


class Contender:
    """What is timed: attend() on what pack() made, if it makes anything."""

    def __init__(self, name, attend, pack=None, own_pack=True):
        self.name, self.attend = name, attend
        self.pack, self.own_pack = pack, own_pack

    def run(self):
        if self.pack:
            self.pack()
        return self.attend()


class TorchAttention:
    """torch's scaled_dot_product_attention on the same float16 tensors."""

    def contenders(self, q, k, v, causal):
        for name, backend in (
            ("torch_flash", SDPBackend.FLASH_ATTENTION),
            ("torch_cudnn", SDPBackend.CUDNN_ATTENTION),
        ):

            def attend(backend=backend):
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=causal
                    )

            yield Contender(name, attend)


class FlashAttention3:
    """FlashAttention-3 through fa3.cu: [batch, seqlen, heads, head_dim], e4m3 by (batch, head)."""

    def __init__(self, path):
        # Its tensor maps come from the driver, which torch has loaded for itself alone.
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
        self.forward = ctypes.CDLL(path).fa3_forward

    def contenders(self, q, k, v, causal):
        yield self.contender("fa3_fp16", q, k, v, causal, None)
        yield self.contender("fa3_fp8", q, k, v, causal, torch.float8_e4m3fn)

    def contender(self, name, q, k, v, causal, fp8):
        batch, heads, seqlen, head_dim = q.shape
        operands = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        out = torch.full_like(operands[0], math.nan, dtype=torch.bfloat16 if fp8 else None)
        lse = torch.empty(batch, heads, seqlen, device=q.device)
        descale = torch.ones(3, batch, heads, device=q.device)
        semaphore = torch.zeros(1, dtype=torch.int32, device=q.device)
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        packed = list(operands)

        def pack():
            for i, x in enumerate(operands):
                largest = torch.finfo(fp8).max
                descale[i] = x.float().abs().amax((1, 3)).clamp(min=1e-12) / largest
                packed[i] = (x / descale[i][:, None, :, None]).to(fp8)

        def attend():
            self.forward(
                *(ctypes.c_void_p(x.data_ptr()) for x in (*packed, out, lse, descale, semaphore)),
                *(batch, seqlen, heads, head_dim, int(fp8 is not None), int(causal)),
                *(multiprocessors, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)),
            )
            return out.transpose(1, 2)

        return Contender(name, attend, pack if fp8 else None, own_pack=False)


class SageAttention:
    """SageAttention 2's kernel for Hopper (V in e4m3) and version 1's in Triton (V in float16)."""

    def __init__(self, path):
        sys.path.insert(0, path)
        from sageattention import core

        self.core = core

    def contenders(self, q, k, v, causal):
        core, scale, packed = self.core, q.shape[-1] ** -0.5, {}
        out = torch.full_like(q, math.nan)
        options = {"tensor_layout": "HND"}

        def pack_hopper():
            mean = k.mean(dim=2, keepdim=True)
            packed["qk"] = core.per_thread_int8_triton(
                q, k, mean, BLKQ=64, WARPQ=16, BLKK=128, WARPK=128, **options
            )
            packed["v"] = core.per_channel_fp8(v, smooth_v=False, **options)

        def attend_hopper():
            (q8, q_scale, k8, k_scale), (v8, v_scale, _) = packed["qk"], packed["v"]
            core.sm90_compile.qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf(
                *(q8, k8, v8, out, q_scale, k_scale, v_scale, 1, int(causal), 3, scale, 0)
            )
            return out

        def pack_triton():
            mean = k.mean(dim=2, keepdim=True)
            packed["triton"] = core.per_block_int8_triton(q, k, km=mean, sm_scale=scale, **options)

        def attend_triton():
            q8, q_scale, k8, k_scale = packed["triton"]
            forward = core.attn_true if causal else core.attn_false
            return forward(q8, k8, v, q_scale, k_scale, output_dtype=q.dtype, **options)[0]

        if core.SM90_ENABLED:
            yield Contender("sage2_hopper", attend_hopper, pack_hopper)
        yield Contender("sage_triton", attend_triton, pack_triton)


class PaperKernels:
    """The Triton kernels published with arXiv:2409.16997, quantized as its benchmark does."""

    def __init__(self, path, all_tiles):
        if not all_tiles:
            sys.modules["configs"] = self.usual_tiles()
        sys.modules.setdefault("pytest", types.ModuleType("pytest"))  # imported there, not used
        sys.path.insert(0, path)
        from flash_atten_fp import attention
        from flash_atten_full_int8 import attention_full_int8
        from flash_atten_int8 import attention_int8

        self.full, self.half, self.float16 = attention_full_int8, attention_int8, attention

    @staticmethod
    def usual_tiles():
        """In place of the 66 tiles that its configs.py tries: what is common on Hopper.

        A causal tile must not have more keys than queries, which theirs does not see to.
        """
        import triton

        configs = types.ModuleType("configs")
        configs.is_hip = lambda: False
        configs.keep = lambda _: True
        configs.configs = [
            triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_stages=stages, num_warps=warps)
            for m, n, warps in ((64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8))
            for stages in (3, 4)
        ] + [
            triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_stages=3, num_warps=8),
        ]
        return configs

    def contenders(self, q, k, v, causal):
        packed, scale = {}, q.shape[-1] ** -0.5

        def quantize(x, dims):
            scales = x.abs().amax(dims, keepdim=True) / 127
            return torch.round(x / scales).to(torch.int8), scales.squeeze(dims)

        def pack_half():
            packed["q"], packed["k"] = quantize(q, (-1,)), quantize(k, (-1,))

        def pack_full():
            pack_half()
            packed["v"] = quantize(v, (-2, -1))

        def attend_full():
            (q8, q_scale), (k8, k_scale), (v8, v_scale) = (packed[x] for x in "qkv")
            return self.full(q8, k8, v8, q_scale, k_scale, v_scale, causal, scale)

        def attend_half():
            (q8, q_scale), (k8, k_scale) = packed["q"], packed["k"]
            return self.half(q8, k8, v, q_scale, k_scale, causal, scale)

        def attend_float16():
            return self.float16(q, k, v, causal, scale)

        yield Contender("paper_triton_fp16", attend_float16)
        yield Contender("paper_triton_full", attend_full, pack_full)
        yield Contender("paper_triton_half", attend_half, pack_half)


class Attn8:
    """This library: both V granularities of `accurate`, and `paper`."""

    def __init__(self, path):
        self.library = Library(path)

    def contenders(self, q, k, v, causal):
        for mode, granularity in (
            ("accurate", "token"),
            ("accurate", "channel"),
            ("paper", "tensor"),
        ):
            attention = Attention(
                self.library, q, k, v, mode=mode, v_granularity=granularity, causal=causal
            )

            def attend(attention=attention):
                attention.attend()
                return attention.out

            yield Contender(f"attn8_{mode}_{granularity}", attend, attention.pack)


def tensors(kind, batch, heads, seqlen, head_dim):
    """float16 q, k and v: N(0, 1), or that with outliers."""
    q, k, v = (torch.randn(batch, heads, seqlen, head_dim, device="cuda") for _ in range(3))
    if kind == "channels":  # every 32nd channel of Q and K, as keys of language models have them
        for x in (q, k):
            x[..., ::32] += 8 * torch.randn(batch, heads, 1, head_dim // 32, device="cuda").sign()
    if kind == "entries":  # arXiv:2407.08608, section 4.3: N(0, 100) added to 0.1 % of the entries
        q, k, v = (x + 10 * torch.randn_like(x) * (torch.rand_like(x) < 1e-3) for x in (q, k, v))
    return [x.half() for x in (q, k, v)]


def relative_l2(out, q, k, v, causal):
    """Distance from float64 attention, on CHECKED_QUERIES queries of each head checked."""
    queries = torch.linspace(0, q.shape[2] - 1, CHECKED_QUERIES, device=q.device).long()
    keys = torch.arange(k.shape[2], device=q.device)
    difference = norm = 0.0
    for batch in {0, q.shape[0] - 1}:
        scores = q[batch, :, queries].double() @ k[batch].double().transpose(-1, -2)
        scores /= math.sqrt(q.shape[-1])
        if causal:
            scores.masked_fill_(keys > queries[:, None], -math.inf)
        want = torch.softmax(scores, -1) @ v[batch].double()
        difference += (out[batch, :, queries].double() - want).square().sum().item()
        norm += want.square().sum().item()
    return math.sqrt(difference / norm)


def errors(peers, kind, seqlen, head_dim):
    """One row of the table of errors."""
    torch.manual_seed(seqlen + head_dim)
    q, k, v = tensors(kind, 1, bench.HEADS[head_dim], seqlen, head_dim)
    row = {"data": kind, "head_dim": head_dim, "seqlen": seqlen, "relative_l2": {}}
    for peer in peers:
        for contender in peer.contenders(q, k, v, False):
            try:
                error = relative_l2(contender.run(), q, k, v, False)
                row["relative_l2"][contender.name] = error if math.isfinite(error) else str(error)
            except RuntimeError as reason:
                row["relative_l2"][contender.name] = str(reason).splitlines()[0]
    return row


def times(peers, batch, heads, seqlen, head_dim, causal, clock):
    """One row of the table of times; peers in turns on one set of tensors."""
    torch.manual_seed(seqlen)
    q, k, v = tensors("normal", batch, heads, seqlen, head_dim)
    tera = 4.0e-12 * batch * heads * head_dim * seqlen * seqlen * (0.5 if causal else 1.0)
    row = {"head_dim": head_dim, "seqlen": seqlen, "batch": batch, "heads": heads}
    row.update(causal=causal, tera_operations=tera)
    for peer in peers:
        for contender in peer.contenders(q, k, v, causal):
            try:
                error = relative_l2(contender.run(), q, k, v, causal)
                result = {"relative_l2": error if math.isfinite(error) else str(error)}
                if error < LARGEST_ERROR:
                    result.update(bench.measure(contender.attend, clock, 100.0))
                    result["tops"] = tera / result["ms"] * 1e3
                    if contender.pack and contender.own_pack:
                        whole = bench.measure(contender.run, clock, 100.0)
                        result["with_quantization"] = whole
                        result["tops_with_quantization"] = tera / whole["ms"] * 1e3
            except RuntimeError as reason:
                result = {"error": str(reason).splitlines()[0]}
            row[contender.name] = result
    return row


def saved(row, baseline, name, key="ms"):
    """Percent of the baseline's time that a kernel saves; None where either has none."""
    times_of = row.get(name, {})
    times_of = times_of if key == "ms" else times_of.get(key, {})
    if "ms" not in times_of or "ms" not in row.get(baseline, {}):
        return None
    return 100 * (1 - times_of["ms"] / row[baseline]["ms"])


def describe(row):
    """One line for a row of times: tera-operations/s without / with quantization."""
    text = f"d{row['head_dim']:<3} {row['seqlen']:>6} {'causal' if row['causal'] else 'full  '}"
    for name, value in row.items():
        if isinstance(value, dict) and name != "percent_saved":
            whole = value.get("tops_with_quantization")
            text += f"  {name} {value.get('tops', math.nan):.0f}"
            text += f"/{whole:.0f}" if whole else ""
    return text


def main():
    """Compare, time, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared_object", help="libattn8_gpu.so")
    parser.add_argument("--fa3", help="shared object of fa3.cu and FlashAttention-3's kernels")
    parser.add_argument("--sage", help="folder with the built package sageattention")
    parser.add_argument("--paper", help="checkout of INT-FlashAttention")
    parser.add_argument("--all-tiles", action="store_true", help="every tile of the paper's code")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384")
    parser.add_argument("--head-dims", default="64,128", help="'' for the paper's shapes alone")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    started = time.time()
    result = {"machine": bench.machine(), "left_out": {}}
    result["command"] = " ".join(Path(x).name for x in sys.argv)
    peers = [TorchAttention()]
    for name, path, kind in (
        ("fa3", arguments.fa3, FlashAttention3),
        ("sage", arguments.sage, SageAttention),
        ("paper", arguments.paper, lambda path: PaperKernels(path, arguments.all_tiles)),
    ):
        try:
            if not path:
                raise ImportError(f"no --{name} given")
            peers.append(kind(path))
        except (ImportError, OSError) as reason:
            result["left_out"][name] = str(reason)
            print(f"left out: {name}: {reason}")
    peers.append(Attn8(arguments.shared_object))

    def save():
        result["seconds"] = time.time() - started
        if arguments.json:
            text = json.dumps(result, indent=1) + "\n"
            Path(arguments.json).write_text(text, encoding="utf-8")

    lengths = [int(x) for x in arguments.lengths.split(",")]
    head_dims = [int(x) for x in arguments.head_dims.split(",") if x]
    result["errors"], result["times"], result["paper_times"] = [], [], []
    for head_dim in head_dims:
        for kind in ("normal", "channels", "entries"):
            result["errors"].append(errors(peers, kind, 4096, head_dim))
            print(result["errors"][-1], flush=True)
            save()
    clock = bench.ClockReader()
    for head_dim in head_dims[::-1]:
        for causal in (False, True):
            for seqlen in lengths:
                batch = max(1, bench.TOTAL_TOKENS // seqlen)
                heads = bench.HEADS[head_dim]
                row = times(peers, batch, heads, seqlen, head_dim, causal, clock)
                result["times"].append(row)
                print(describe(row), flush=True)
                save()
    for seqlen in lengths:  # batch, heads and head_dim of the paper's benchmark
        row = times(peers, 4, 32, seqlen, 64, False, clock)
        row["percent_saved"] = {
            f"{name} to {baseline}": [
                saved(row, baseline, name),
                saved(row, baseline, name, "with_quantization"),
            ]
            for baseline in ("paper_triton_fp16", "torch_flash", "torch_cudnn", "fa3_fp16")
            for name in row
            if name.startswith(("attn8", "paper")) and name != baseline
        }
        result["paper_times"].append(row)
        print(describe(row), flush=True)
        save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
