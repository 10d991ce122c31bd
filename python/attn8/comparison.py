# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m attn8 compare``: attention on torch tensors, timed beside torch's own."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attn8 import _core
from attn8.errors import UnavailableError, UnsupportedError
from attn8.functional import attention
from attn8.runtime import info, set_num_threads

Call = Callable[[], torch.Tensor]

MODES = ("accurate", "paper", "half", "exact")
DTYPES = ("float32", "float16", "bfloat16")
# Seconds of one sample. Reading the clock costs nothing beside it; a GPU at its power limit needs
# longer to settle at the clock that one kernel leaves it.
SECONDS = {"cpu": 0.01, "cuda": 0.2}


class Shape(NamedTuple):
    """Sizes of one problem, as ``attn8 bench --shape`` takes them."""

    batch: int
    nheads_q: int
    nheads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int

    def pairs(self, causal: bool) -> int:
        """Return how many keys all rows of one head see together; causal from the top left."""
        if not causal:
            return self.seqlen_q * self.seqlen_k
        full = max(self.seqlen_q - self.seqlen_k, 0)
        steps = self.seqlen_q - full
        return full * self.seqlen_k + steps * (steps + 1) // 2


DEFAULT_SHAPES = {
    "cpu": [Shape(1, 8, 8, 1024, 1024, 64), Shape(1, 8, 2, 1, 8192, 128)],
    "cuda": [
        Shape(1, 16, 16, 4096, 4096, 128),
        Shape(1, 16, 16, 16384, 16384, 128),
        Shape(1, 32, 8, 8192, 8192, 64),
    ],
}


def _shape(text: str) -> Shape:
    wanted = "want six numbers from 1 on: B,Hq,Hkv,Sq,Sk,D"
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, {wanted}") from None
    if len(found) != 6 or min(found) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, {wanted}")
    if found[1] % found[2] != 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, want Hkv to divide Hq")
    return Shape(*found)


def _device(text: str) -> torch.device:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise argparse.ArgumentTypeError(f"got {text!r}, want cpu, cuda or cuda:N")
    return torch.device(kind, int(index or 0) if kind == "cuda" else None)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    found = argparse.ArgumentParser(
        prog="python -m attn8 compare",
        description="Time attn8.attention beside torch's scaled_dot_product_attention, in turns on "
        "the same tensors (N(0, 1), heads before tokens), quantization counted.",
    )
    add = found.add_argument
    add("--device", type=_device, help="cpu, cuda or cuda:N; default: cuda where attn8 has it")
    add("--shape", type=_shape, action="append", metavar="B,Hq,Hkv,Sq,Sk,D", help="repeatable")
    add("--mode", choices=MODES, action="append", help="repeatable; default: accurate")
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, float16 on a GPU")
    add("--causal", action="store_true", help="from the top left, as torch has it")
    add("--threads", type=int, help="of torch and of attn8 on the CPU")
    add("--repeats", type=int, default=9, help="samples of each; their median is shown")
    add("--rows", type=int, default=16, help="query rows per head for the error against float64")
    add("--json", action="store_true", help="print the results as JSON, not as a table")
    return found


def _check_device(device: torch.device) -> None:
    if device.type == "cpu":
        return
    built, reason, devices = _core.cuda_support()
    if not built:
        raise UnavailableError(f"--device: got {device} with an attn8 built without CUDA, want cpu")
    if not devices:
        raise UnavailableError(f"--device: got {device} ({reason}), want cpu")
    count = torch.cuda.device_count()
    if device.index >= count:
        raise UnavailableError(f"--device: got {device}, want one of the {count} that torch sees")


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, causal: bool
) -> torch.Tensor:
    """Return the output of some rows ``[batch, nheads_q, len(rows), head_dim]`` in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q[:, :, rows].double() @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if causal:
        hidden = torch.arange(k.shape[2], device=rows.device) > rows[:, None]
        scores.masked_fill_(hidden, float("-inf"))
    return scores.softmax(3) @ v


def _sample(call: Call, calls: int, device: torch.device) -> float:
    """Return the seconds of one call out of ``calls`` that follow each other."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def _timed(
    contenders: dict[str, Call], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of every sample, all contenders taking turns."""
    calls = {}
    for name, call in contenders.items():
        _sample(call, 1, device)  # the first call of a kind is not like the others
        calls[name] = max(1, math.ceil(SECONDS[device.type] / _sample(call, 1, device)))
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            found[name].append(_sample(call, calls[name], device))
    return found


@contextlib.contextmanager
def _backend(backend: SDPBackend | None) -> Iterator[None]:
    if backend is None:
        yield
    else:
        with sdpa_kernel(backend):
            yield


def _torch_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, backend: SDPBackend | None
) -> Call:
    def call() -> torch.Tensor:
        with _backend(backend):
            out: torch.Tensor = scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out

    return call


def _attn8_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mode: str) -> Call:
    def call() -> torch.Tensor:
        out: torch.Tensor = attention(
            q, k, v, layout="bhsd", mode=mode, causal=causal, align="top_left"
        )
        return out

    return call


def compare(
    shape: Shape, device: torch.device, dtype: torch.dtype, modes: list[str], causal: bool,
    repeats: int, rows: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time torch's attention and attn8's modes on one problem.

    Returns
    -------
    list of dict
        Per contender, torch's own choice of kernel first: ``name``; ``ms``, the median;
        ``speedup``, the median over the turns of torch's time by this one's; ``tops``, tera
        operations per second over the pairs that are seen; ``error``, relative L2 of some rows
        against float64. ``refused`` instead, where a kernel does not take the problem.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, tokens: int) -> torch.Tensor:
        size = (shape.batch, heads, tokens, shape.head_dim)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    q = normal(shape.nheads_q, shape.seqlen_q)
    k, v = (normal(shape.nheads_k, shape.seqlen_k) for _ in range(2))
    calls = {"torch": _torch_call(q, k, v, causal, None)}
    if device.type == "cuda":
        calls["torch cuDNN"] = _torch_call(q, k, v, causal, SDPBackend.CUDNN_ATTENTION)
    calls.update({mode: _attn8_call(q, k, v, causal, mode) for mode in modes})
    some = torch.linspace(0, shape.seqlen_q - 1, min(rows, shape.seqlen_q), device=device).long()
    wanted = _reference(q, k, v, some, causal)
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Call] = {}
    for name, call in calls.items():
        found[name] = {"name": name}
        try:
            error = (call()[:, :, some].double() - wanted).norm() / wanted.norm()
        except (RuntimeError, UnsupportedError) as refusal:
            if name == "torch":
                raise
            found[name]["refused"] = str(refusal).partition("\n")[0]
            continue
        found[name]["error"] = float(error)
        runs[name] = call
    operations = 4 * shape.batch * shape.nheads_q * shape.head_dim * shape.pairs(causal)
    times = _timed(runs, repeats, device)
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(times["torch"], seconds, strict=True)]
        median = statistics.median(seconds)
        found[name].update(
            ms=1e3 * median, speedup=statistics.median(ratios), tops=operations / median / 1e12
        )
    return list(found.values())


def _table(results: dict[str, Any]) -> str:
    lines = [f"{results['on']}, torch {results['torch']}, {results['dtype']}, medians"]
    for problem in results["problems"]:
        causal = " causal" if results["causal"] else ""
        lines += ["", f"{','.join(map(str, problem['shape']))}{causal}"]
        lines.append(f"{'':12}{'ms':>10}{'TOPS':>10}{'times torch':>13}{'error %':>10}")
        for row in problem["rows"]:
            if "refused" in row:
                lines.append(f"{row['name']:12}{row['refused']}")
                continue
            lines.append(
                f"{row['name']:12}{row['ms']:10.3f}{row['tops']:10.3g}{row['speedup']:13.2f}"
                f"{100 * row['error']:10.3f}"
            )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Compare as the options say; return everything found."""
    for name in ("repeats", "rows", "threads"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name}: got {given}, want at least 1")
    device = options.device
    if device is None:
        usable = torch.cuda.is_available() and bool(_core.cuda_support()[2])
        device = torch.device("cuda", 0) if usable else torch.device("cpu")
    _check_device(device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        set_num_threads(options.threads)
    on_cpu = device.type == "cpu"
    dtype = options.dtype or ("float32" if on_cpu else "float16")
    place = f"CPU, {info()['isa']}, {torch.get_num_threads()} threads"
    results: dict[str, Any] = {
        "on": place if on_cpu else torch.cuda.get_device_name(device),
        "attn8": info()["version"],
        "torch": torch.__version__,
        "dtype": dtype,
        "causal": options.causal,
        "problems": [],
    }
    for shape in options.shape or DEFAULT_SHAPES[device.type]:
        rows = compare(
            shape, device, getattr(torch, dtype), options.mode or ["accurate"], options.causal,
            options.repeats, options.rows,
        )  # fmt: skip
        results["problems"].append({"shape": list(shape), "rows": rows})
    return results


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 2 for bad input, 3 where something is missing."""
    options = parser().parse_args(arguments)
    try:
        with torch.inference_mode():
            results = run(options)
    except UnavailableError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 3
    except (ValueError, UnsupportedError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results) if options.json else _table(results))
    return 0
