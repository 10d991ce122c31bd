#!/usr/bin/env python3
# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Checks and times the CUDA backend on a GPU, beside torch's attention on the same tensors.

    cmake -S benchmarks/gpu -B build/gpu && cmake --build build/gpu -j
    build/gpu/attn8_gpu_probe
    python3 benchmarks/gpu/bench.py build/gpu/libattn8_gpu.so --json result.json

Needs torch. Times are medians of CUDA-event timings, see measure(); clock and power are read beside
them.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from attn8_gpu import Attention, Cache, Library
from torch.nn.attention import SDPBackend, sdpa_kernel

import reference

TOTAL_TOKENS = 16384  # batch * seqlen, so that every length does comparable work
HEADS = {64: 32, 128: 16, 256: 8}  # head_dim * heads = 2048, as the FlashAttention papers have it


def smi(fields):
    """Ask nvidia-smi about the first GPU; question marks where it does not run."""
    try:
        text = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return [x.strip() for x in text.splitlines()[0].split(",")]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ["?"] * len(fields.split(","))


def machine():
    """Device, driver and library versions."""
    name, driver, clock_max, power = smi("name,driver_version,clocks.max.sm,power.limit")
    return {
        "device": name,
        "driver": driver,
        "max_sm_clock_mhz": clock_max,
        "power_limit_w": power,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
    }


def inputs(batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim, dtype=torch.float16, kind="iid"):
    """Random q, k and v, reproducible through torch.manual_seed."""
    q = torch.randn(batch, heads_q, seqlen_q, head_dim, device="cuda")
    k = torch.randn(batch, heads_k, seqlen_k, head_dim, device="cuda")
    v = torch.randn(batch, heads_k, seqlen_k, head_dim, device="cuda")
    if kind == "uneven":  # V tokens of very different size, K with a common part
        v = v * torch.exp2(torch.randn(batch, heads_k, seqlen_k, 1, device="cuda") * 2)
        k = k + 3 * torch.randn(batch, heads_k, 1, head_dim, device="cuda")
        v[:, :, 5 % seqlen_k] = 0
    if kind == "huge":  # scores that 2^score cannot hold in float32
        q = q * 100
    return [x.to(dtype) for x in (q, k, v)]


# ---- Correctness --------------------------------------------------------------------------------

CASES = [
    # batch, heads_q, heads_k, seqlen_q, seqlen_k, causal, top_left, window
    (2, 8, 2, 1, 3000, True, False, (-1, -1)),
    (1, 8, 1, 5, 700, True, False, (300, -1)),
    (1, 1, 1, 1, 1, False, False, (-1, -1)),
    (2, 2, 2, 128, 256, False, False, (-1, -1)),
    (1, 4, 2, 33, 501, True, False, (-1, -1)),
    (2, 8, 2, 257, 127, True, True, (-1, -1)),
    (1, 2, 1, 300, 200, True, False, (-1, -1)),
    (1, 2, 2, 700, 1025, False, False, (100, 37)),
    (1, 3, 1, 1000, 1000, True, False, (255, -1)),
]


def check(library):
    """Every kernel against the float64 emulation of docs/numerics.md."""
    failures, worst, count = [], 0.0, 0
    for kernels in ("sm90", "sm80"):
        for mode, granularity in (
            ("accurate", "token"),
            ("accurate", "channel"),
            ("accurate", "tensor"),
            ("paper", "tensor"),
        ):
            for head_dim in (64, 96, 128, 256):
                for number, case in enumerate(CASES):
                    b, hq, hk, sq, sk, causal, top_left, window = case
                    torch.manual_seed(1000 * head_dim + number)
                    dtype = (torch.float16, torch.bfloat16, torch.float32)[number % 3]
                    q, k, v = inputs(
                        b,
                        hq,
                        hk,
                        sq,
                        sk,
                        head_dim,
                        dtype,
                        ("iid", "uneven", "huge")[(number + head_dim) % 3],
                    )
                    label = f"{kernels} {mode} {granularity} d{head_dim} case {number}"
                    try:
                        attention = Attention(
                            library,
                            q,
                            k,
                            v,
                            mode=mode,
                            kernels=kernels,
                            v_granularity=granularity,
                            causal=causal,
                            top_left=top_left,
                            window=window,
                            lse=True,
                            out_dtype=torch.float32,
                        )
                        attention.run()
                        torch.cuda.synchronize()
                    except RuntimeError as error:
                        failures.append(f"{label}: {error}")
                        continue
                    mask = reference.visible(sq, sk, causal, top_left, window, "cuda")
                    want, lse, bound = reference.emulate(
                        q,
                        k,
                        v,
                        mask,
                        mode=mode,
                        v_granularity=granularity,
                        smooth_k=True,
                        kv_block=attention.kv_block,
                    )
                    got = attention.out.double()
                    excess = ((got - want).abs() - bound - 1e-6 * want.abs()).max().item()
                    seen = torch.isfinite(lse)
                    lse_error = (attention.lse - lse)[seen].abs().max().item() if seen.any() else 0
                    same_rows = torch.equal(torch.isfinite(attention.lse), seen)
                    exact, _ = reference.exact(q, k, v, mask)
                    rel = ((got - want).norm() / want.norm().clamp(min=1e-30)).item()
                    quality = ((got - exact).norm() / exact.norm().clamp(min=1e-30)).item()
                    worst = max(worst, rel)
                    count += 1
                    if (
                        not excess <= 1e-6 * want.abs().max().item()
                        or not lse_error < 1e-3 + 1e-6 * lse[seen].abs().max().item()
                        or not same_rows
                    ):
                        failures.append(
                            f"{label}: beyond the bound by {excess:.3g}, rel_l2 against "
                            f"emulation {rel:.3g}, against exact {quality:.3g}, lse "
                            f"{lse_error:.3g}, empty rows agree {same_rows}"
                        )
    print(
        f"check: {count} cases, {len(failures)} failures, worst rel_l2 against the emulation "
        f"{worst:.2e}"
    )
    for line in failures[:20]:
        print("  " + line)
    return {"cases": count, "failures": failures, "worst_rel_l2_to_emulation": worst}


DECODE_CASES = [
    (2, 8, 2, 1, 3000, True, False, (-1, -1)),
    (1, 8, 1, 2, 700, True, False, (300, -1)),
    (1, 1, 1, 1, 1, False, False, (-1, -1)),
    (2, 2, 2, 16, 256, False, False, (-1, -1)),
    (1, 4, 2, 3, 501, True, False, (-1, -1)),
    (2, 8, 2, 4, 127, True, True, (-1, -1)),
    (1, 2, 1, 8, 5, True, False, (-1, -1)),
    (3, 8, 8, 1, 1025, False, False, (100, 37)),
    (1, 32, 8, 1, 4096, True, False, (-1, -1)),
]


def check_decode(library):
    """Hold the kernels for few queries to the float64 emulation of docs/numerics.md."""
    failures, worst, count = [], 0.0, 0
    for granularity in ("token", "channel", "tensor"):
        for head_dim in (64, 90, 128):
            for number, case in enumerate(DECODE_CASES):
                b, hq, hk, sq, sk, causal, top_left, window = case
                torch.manual_seed(1000 * head_dim + number)
                dtype = (torch.float16, torch.bfloat16, torch.float32)[number % 3]
                kind = ("iid", "uneven", "huge")[(number + head_dim) % 3]
                q, k, v = inputs(b, hq, hk, sq, sk, head_dim, dtype, kind)
                options = {"causal": causal, "top_left": top_left, "window": window}
                attention = Attention(
                    library,
                    q,
                    k,
                    v,
                    v_granularity=granularity,
                    lse=True,
                    out_dtype=torch.float32,
                    **options,
                )
                attention.run()
                mask = reference.visible(sq, sk, causal, top_left, window, "cuda")
                want, lse, bound = reference.emulate(
                    q,
                    k,
                    v,
                    mask,
                    mode="accurate",
                    v_granularity=granularity,
                    smooth_k=True,
                    kv_block=attention.kv_block,
                )
                got = attention.out.double()
                excess = ((got - want).abs() - bound - 1e-6 * want.abs()).max().item()
                seen = torch.isfinite(lse)
                lse_error = (attention.lse - lse)[seen].abs().max().item() if seen.any() else 0
                rel = ((got - want).norm() / want.norm().clamp(min=1e-30)).item()
                worst = max(worst, rel)
                count += 1
                if (
                    "decode" not in attention.kernel
                    or not excess <= 1e-6 * want.abs().max().item()
                    or not lse_error < 1e-3 + 1e-6 * lse[seen].abs().max().item()
                    or not torch.equal(torch.isfinite(attention.lse), seen)
                ):
                    failures.append(
                        f"{attention.kernel} {granularity} d{head_dim} case {number}: beyond the "
                        f"bound by {excess:.3g}, rel_l2 {rel:.3g}, lse {lse_error:.3g}"
                    )
    print(f"check: decode, {count} cases, {len(failures)} failures, worst rel_l2 {worst:.2e}")
    for line in failures[:20]:
        print("  " + line)
    return {"cases": count, "failures": failures, "worst_rel_l2_to_emulation": worst}


def check_half(library):
    """Mode half against exact attention: INT8 scores err by 1 % on these data, not by more."""
    failures, worst = [], 0.0
    for head_dim in (64, 90, 128, 250):
        for number, case in enumerate(CASES):
            b, hq, hk, sq, sk, causal, top_left, window = case
            torch.manual_seed(number)
            q, k, v = inputs(b, hq, hk, sq, sk, head_dim, torch.bfloat16)
            options = {"causal": causal, "top_left": top_left, "window": window}
            attention = Attention(library, q, k, v, mode="half", out_dtype=torch.float32, **options)
            attention.run()
            mask = reference.visible(sq, sk, causal, top_left, window, "cuda")
            exact, _ = reference.exact(q, k, v, mask)
            rel = ((attention.out - exact).norm() / exact.norm()).item()
            worst = max(worst, rel)
            if not rel < 0.012:
                failures.append(f"half d{head_dim} case {number}: rel_l2 against exact {rel:.3g}")
    print(f"check: half, {len(failures)} failures, worst rel_l2 against exact {worst:.4f}")
    for line in failures:
        print("  " + line)
    return {"failures": failures, "worst_rel_l2_to_exact": worst}


def check_repeats(library, repeats=200):
    """Compare the bits of a call, of its repeats and of its replay from a CUDA graph."""
    torch.manual_seed(0)
    q, k, v = inputs(1, 16, 4, 700, 3000, 128)
    attention = Attention(library, q, k, v, softcap=20.0, causal=True)
    attention.run()
    torch.cuda.synchronize()
    first = attention.out.clone()
    same = True
    for _ in range(repeats):
        attention.run()
        same = same and torch.equal(first, attention.out)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        attention.run()
    attention.out.fill_(float("nan"))
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    replay = torch.equal(first, attention.out)
    print(f"check: {repeats} repeats equal {same}, replay of a CUDA graph equal {replay}")
    failures = [] if same and replay else ["repeats or a replay gave other bits"]
    return {"repeats": repeats, "failures": failures}


# ---- Timing -------------------------------------------------------------------------------------


class ClockReader:
    """SM clock and power, polled while work runs; empty where NVML is missing."""

    def __init__(self):
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # no NVML is no reason not to measure
            self.nvml = None

    def __enter__(self):
        """Start polling."""
        self.clocks, self.watts, self.stop = [], [], False
        self.thread = threading.Thread(target=self.poll)
        self.thread.start()
        return self

    def poll(self):
        while self.nvml is not None and not self.stop:
            self.clocks.append(
                self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM)
            )
            self.watts.append(self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000)
            time.sleep(0.01)

    def __exit__(self, *_):
        """Stop polling."""
        self.stop = True
        self.thread.join()


def measure(call, clock, milliseconds=200.0):
    """Every contender alike: a warm-up call, 100 ms of rest, then calls for `milliseconds`.

    ms is the median over all of them; cool_ms the median of the first fifth, before a power limit
    lowers the clock.
    """
    call()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    repeats = int(min(2000, max(5, milliseconds / max(begin.elapsed_time(end), 1e-3))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    time.sleep(0.1)
    with clock:
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in events]
    result = {
        "ms": statistics.median(times),
        "min_ms": min(times),
        "repeats": repeats,
        "cool_ms": statistics.median(times[: max(3, repeats // 5)]),
    }
    if clock.clocks:
        result["sm_clock_mhz"] = statistics.median(clock.clocks)
        result["watts"] = max(clock.watts)
    return result


def peers(q, k, v, causal):
    """Names and calls of torch's attention on the same tensors."""
    for name, backend in (
        ("torch_flash", SDPBackend.FLASH_ATTENTION),
        ("torch_cudnn", SDPBackend.CUDNN_ATTENTION),
    ):

        def call(backend=backend):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        yield name, call


def time_shape(library, head_dim, seqlen, causal, kernels, configurations, clock):
    """Time one shape: a row of the result."""
    heads = HEADS[head_dim]
    batch = max(1, TOTAL_TOKENS // seqlen)
    if seqlen > TOTAL_TOKENS:
        heads = max(1, heads * TOTAL_TOKENS // seqlen)
    torch.manual_seed(seqlen)
    q, k, v = inputs(batch, heads, heads, seqlen, seqlen, head_dim)
    tera = 4.0e-12 * batch * heads * head_dim * seqlen * seqlen * (0.5 if causal else 1.0)
    row = {
        "head_dim": head_dim,
        "seqlen": seqlen,
        "batch": batch,
        "heads": heads,
        "causal": causal,
        "tera_operations": tera,
    }
    for name, call in peers(q, k, v, causal):
        try:
            row[name] = measure(call, clock)
            row[name]["tops"] = tera / row[name]["ms"] * 1e3
        except RuntimeError as error:
            row[name] = {"error": str(error).splitlines()[0]}
    for mode, granularity in configurations:
        attention = Attention(
            library, q, k, v, mode=mode, v_granularity=granularity, causal=causal, kernels=kernels
        )
        attention.run()
        attend = measure(attention.attend, clock)
        total = measure(attention.run, clock)
        row[f"attn8_{mode}_{granularity}"] = {
            "kernel": attention.kernel,
            "attend": attend,
            "with_quantization": total,
            "quantization": measure(attention.pack, clock, 50.0),
            "tops": tera / attend["ms"] * 1e3,
            "tops_with_quantization": tera / total["ms"] * 1e3,
        }
    rivals = [row[p] for p in ("torch_flash", "torch_cudnn") if "ms" in row[p]]
    for key, value in row.items():
        if key.startswith("attn8_") and rivals:
            best, cool = (min(r[m] for r in rivals) for m in ("ms", "cool_ms"))
            value["speedup"] = best / value["attend"]["ms"]
            value["speedup_with_quantization"] = best / value["with_quantization"]["ms"]
            value["speedup_cool"] = cool / value["attend"]["cool_ms"]
            value["speedup_cool_with_quantization"] = cool / value["with_quantization"]["cool_ms"]
    return row


def time_decode(library, head_dim, seqlen, batch, kernels):
    """Time one query per sequence, 32 heads over 8 kv heads; K and V are packed beforehand."""
    torch.manual_seed(seqlen)
    q, k, v = inputs(batch, 32, 8, 1, seqlen, head_dim)
    row = {"head_dim": head_dim, "seqlen_k": seqlen, "batch": batch}
    for name, backend in (
        ("torch_flash", SDPBackend.FLASH_ATTENTION),
        ("torch_cudnn", SDPBackend.CUDNN_ATTENTION),
    ):

        def call(backend=backend):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        try:
            row[name] = graph_ms(call)
        except RuntimeError as error:
            row[name] = {"error": str(error).splitlines()[0]}
    attention = Attention(library, q, k, v, kernels=kernels)
    attention.run()
    row["attn8"] = graph_ms(attention.attend)
    # Codes and a scale each of K and V: what has to be read.
    row["attn8"]["terabytes_per_s"] = (
        batch * 8 * seqlen * (2 * head_dim + 8) / row["attn8"]["ms"] * 1e-9
    )
    return row


def time_options(library, head_dim, kernels, clock):
    """Time what is done beside plain `accurate`, at 16k tokens, not causal."""
    torch.manual_seed(head_dim)
    q, k, v = inputs(1, HEADS[head_dim], HEADS[head_dim], TOTAL_TOKENS, TOTAL_TOKENS, head_dim)
    tera = 4.0e-12 * HEADS[head_dim] * head_dim * TOTAL_TOKENS**2
    row = {"head_dim": head_dim, "seqlen": TOTAL_TOKENS, "tera_operations": tera}
    for name, options in (
        ("accurate", {}),
        ("accurate_softcap", {"softcap": 30.0}),
        ("accurate_sm80", {"kernels": "sm80"}),
        ("half", {"mode": "half"}),
        ("half_softcap", {"mode": "half", "softcap": 30.0}),
    ):
        attention = Attention(library, q, k, v, **{"kernels": kernels, **options})
        attention.run()
        row[name] = measure(attention.attend, clock, 100.0)
        row[name].update(kernel=attention.kernel, tops=tera / row[name]["ms"] * 1e3)
    return row


def print_options(row):
    """One line of the table of options."""
    text = f"options d{row['head_dim']:<3}"
    for name, value in row.items():
        if isinstance(value, dict):
            text += f"  {name} {value['tops']:4.0f}"
    print(text, flush=True)


def time_pages(library, head_dim, seqlen, batch, kernels):
    """Time decode from shuffled pages beside decode from contiguous keys, and appends."""
    torch.manual_seed(seqlen)
    q, k, v = inputs(batch, 32, 8, 1, seqlen, head_dim)
    contiguous = Attention(library, q, k, v, kernels=kernels)
    contiguous.run()
    row = {"head_dim": head_dim, "seqlen_k": seqlen, "batch": batch}
    row["contiguous"] = graph_ms(contiguous.attend)
    per_sequence = seqlen // 256 + 1
    cache = Cache(library, 8, head_dim, batch * per_sequence)
    table = torch.randperm(batch * per_sequence, device="cuda", dtype=torch.int32)
    table = table.reshape(batch, per_sequence)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    empty = torch.zeros(batch, dtype=torch.int32, device="cuda")
    full = empty + seqlen
    out = torch.full_like(q, float("nan"))
    row["append_all"] = graph_ms(lambda: cache.append(k, v, table, empty), calls=3, replays=5)
    one = [x[:, :1].contiguous() for x in (k, v)]
    row["append_one"] = graph_ms(lambda: cache.append(*one, table, full))
    row["pages"] = graph_ms(lambda: cache.attend(q, out, table, full))
    want = contiguous.out.transpose(1, 2)
    row["rel_l2_to_contiguous"] = ((out - want).norm() / want.norm()).item()
    return row


def print_pages(row):
    """One line of the table of pages."""
    print(
        f"pages d{row['head_dim']:<3} {row['seqlen_k']:>6} b{row['batch']:<3}"
        f"  contiguous {row['contiguous']['ms'] * 1e3:7.1f} us"
        f"  pages {row['pages']['ms'] * 1e3:7.1f} us"
        f"  append one {row['append_one']['ms'] * 1e3:6.1f} us"
        f"  all {row['append_all']['ms'] * 1e3:8.1f} us"
        f"  rel_l2 between {row['rel_l2_to_contiguous']:.1e}",
        flush=True,
    )


def graph_ms(call, calls=20, replays=30):
    """Median time of a call over replays of a CUDA graph of many: without launch gaps."""
    # Another stream than the one that made the operands.
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / calls)
    return {"ms": statistics.median(times), "min_ms": min(times)}


def print_decode(row):
    """One line of the decode table."""
    text = f"decode d{row['head_dim']:<3} {row['seqlen_k']:>6} b{row['batch']:<3}"
    for name in ("torch_flash", "torch_cudnn", "attn8"):
        text += f"  {name} {row[name].get('ms', float('nan')) * 1e3:7.1f} us"
    print(f"{text}  {row['attn8']['terabytes_per_s']:.2f} TB/s", flush=True)


def print_row(row):
    """One line of the table."""
    text = (
        f"d{row['head_dim']:<3} {row['seqlen']:>6} b{row['batch']:<2} h{row['heads']:<2} "
        f"{'causal' if row['causal'] else 'full  '}"
    )
    for peer in ("torch_flash", "torch_cudnn"):
        text += f"  {peer[6:]} {row[peer].get('tops', float('nan')):4.0f}"
    for key, value in row.items():
        if key.startswith("attn8_"):
            text += (
                f"  {key[6:]} {value['tops']:4.0f}/{value['tops_with_quantization']:4.0f} "
                f"({value.get('speedup', 0):.2f}x/{value.get('speedup_with_quantization', 0):.2f}x"
                f" cool {value.get('speedup_cool', 0):.2f}x)"
            )
    print(text, flush=True)


def main():
    """Check, time, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared_object")
    parser.add_argument("--json")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--skip-time", action="store_true")
    parser.add_argument("--skip-decode", action="store_true")
    parser.add_argument("--skip-options", action="store_true")
    parser.add_argument("--kernels", default="best", choices=("best", "sm80", "sm90"))
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768,65536,131072")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--quick", action="store_true", help="non-causal token-folded only")
    arguments = parser.parse_args()
    started = time.time()
    library = Library(arguments.shared_object)
    result = {"machine": machine(), "command": " ".join(Path(x).name for x in sys.argv)}
    print(result["machine"])
    if not arguments.skip_check:
        result["check"] = check(library)
        result["check_decode"] = check_decode(library)
        result["check_half"] = check_half(library)
        result["check_repeats"] = check_repeats(library)
    clock = ClockReader()
    configurations = [("accurate", "token"), ("accurate", "channel"), ("paper", "tensor")]
    if arguments.quick:
        configurations = configurations[:2]
    if not arguments.skip_time:
        result["timings"] = []
        print(
            "Tera-operations/s (4 seqlen^2 head_dim per head, half when causal); attn8: without / "
            "with quantization, and the speed-up over the faster of torch's two"
        )
        for head_dim in (int(x) for x in arguments.head_dims.split(",")):
            for seqlen in (int(x) for x in arguments.lengths.split(",")):
                for causal in (False,) if arguments.quick else (False, True):
                    row = time_shape(
                        library, head_dim, seqlen, causal, arguments.kernels, configurations, clock
                    )
                    result["timings"].append(row)
                    print_row(row)
    if not arguments.skip_decode:
        result["decode"] = []
        for head_dim in (int(x) for x in arguments.head_dims.split(",")):
            for seqlen, batch in ((4096, 1), (16384, 1), (131072, 1), (4096, 32), (16384, 32)):
                row = time_decode(library, head_dim, seqlen, batch, arguments.kernels)
                result["decode"].append(row)
                print_decode(row)
    if not arguments.skip_options:
        result["options"], result["pages"] = [], []
        for head_dim in (int(x) for x in arguments.head_dims.split(",")):
            result["options"].append(time_options(library, head_dim, arguments.kernels, clock))
            print_options(result["options"][-1])
            for seqlen, batch in ((4096, 1), (131072, 1), (4096, 32), (16384, 32)):
                result["pages"].append(
                    time_pages(library, head_dim, seqlen, batch, arguments.kernels)
                )
                print_pages(result["pages"][-1])
    result["seconds"] = time.time() - started
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    checks = ("check", "check_decode", "check_half", "check_repeats")
    return 1 if any(result.get(name, {}).get("failures") for name in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
