# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Times attn8 and other libraries on the same tensors in turns, with the error of each.

    benchmarks/peers/setup.sh
    build/peers_venv/bin/python benchmarks/peers/peers.py --out docs/results/peers_cpu.json

Every library's run is preceded by one of attn8's accurate mode; the ratio is the median over the
rounds of the two times, so that a change of clock or a neighbour's load hits both.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from libraries import MODULES
from problem import CASES, Case, exact_rows, make_problem, relative_l2

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = ("torch", "torchao", "onnxruntime", "openvino", "llama-cpp-python")
OURS = ("attn8", "accurate")
PAUSE_S = 0.02  # longer than the threads of any of these libraries spin before they sleep
Record = dict[str, Any]


class Worker:
    """A process of worker.py."""

    def __init__(self, module: str, folder: Path, threads: int) -> None:
        self.module = module
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), module, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        first = self.answer()
        self.peer: str = first.get("library", module)
        self.variants: list[str] = first.get("variants", [])
        self.missing: dict[str, str] = first.get("missing", {})

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):  # some libraries print of their own accord
                result: dict[str, Any] = json.loads(line)
                return result
        status = self.process.wait()
        return {"missing": {"": f"its process ended with status {status}"}}

    def time(self, variant: str) -> dict[str, float]:
        """Milliseconds of one run and of its quantizing and packing; empty after a crash."""
        assert self.process.stdin is not None
        time.sleep(PAUSE_S)
        try:
            self.process.stdin.write(variant + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {}
        answer = self.answer()
        return answer if "ms" in answer else {}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(case: Case, threads: int, rounds: int) -> tuple[list[Record], list[Record]]:
    """Return records of every variant that ran, and of those that could not."""
    problem = make_problem(case)
    exact = exact_rows(problem)
    records: list[Record] = []
    missing: list[Record] = []
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tensor in ("q", "k", "v"):
            np.save(folder / f"{tensor}.npy", getattr(problem, tensor))
        (folder / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
        try:
            for module in MODULES:
                worker = Worker(module, folder, threads)
                workers.append(worker)
                missing += [
                    {
                        "case": case.name,
                        "threads": threads,
                        "library": worker.peer,
                        "variant": variant,
                        "why": why,
                    }
                    for variant, why in worker.missing.items()
                ]
                for i, variant in enumerate(worker.variants):
                    rows = np.load(folder / f"out_{module}_{i}.npy")
                    records.append(
                        {
                            "case": case.name,
                            "shape": [
                                getattr(case, field.name) for field in dataclasses.fields(case)[1:7]
                            ],
                            "causal": case.causal,
                            "threads": threads,
                            "library": worker.peer,
                            "variant": variant,
                            "rel_l2": relative_l2(rows, exact),
                        }
                    )
            take_turns(case, workers, records, rounds)
        finally:
            for worker in workers:
                worker.close()
    return records, missing


def take_turns(case: Case, workers: list[Worker], records: list[Record], rounds: int) -> None:
    """Add the times to `records`, which are in the order of the workers' variants."""
    by_library = {worker.peer: worker for worker in workers}
    ours = by_library[OURS[0]]
    times: list[list[float]] = [[] for _ in records]
    prepare: list[list[float]] = [[] for _ in records]
    ratios: list[list[float]] = [[] for _ in records]
    for _ in range(rounds):
        for i, record in enumerate(records):
            before = ours.time(OURS[1])
            run = by_library[record["library"]].time(record["variant"])
            if not before or not run:
                continue
            times[i].append(run["ms"])
            prepare[i].append(run["prepare_ms"])
            ratios[i].append(run["ms"] / before["ms"])
    for i, record in enumerate(records):
        if not times[i]:
            raise RuntimeError(f"{record['library']}, {record['variant']}: ended while being timed")
        median = statistics.median(times[i])
        record["rounds"] = len(times[i])
        record["median_ms"] = median
        record["min_ms"] = min(times[i])
        record["prepare_ms"] = statistics.median(prepare[i])
        record["gops"] = case.operations / median / 1e6
        record["ratio"] = statistics.median(ratios[i])


def version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine(threads: list[int]) -> dict[str, Any]:
    """Machine and ceilings as attn8 bench sees them."""
    command = [
        str(ROOT / "build/release/attn8"),
        "bench",
        "--shape",
        "1,1,1,64,64,64",
        "--no-check",
    ]
    command += ["--repeats", "1", "--json", "--threads", ",".join(map(str, threads))]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {key: report[key] for key in ("version", "machine", "ceilings")}


def markdown(result: dict[str, Any], threads: int) -> str:
    """Libraries down, cases across: median ms (ratio to attn8 accurate; error in percent)."""
    records = [r for r in result["records"] if r["threads"] == threads]
    cases = list(dict.fromkeys(r["case"] for r in records))
    cells = {(r["library"], r["variant"], r["case"]): r for r in records}
    lines = [f"| {threads} thread{'s' * (threads > 1)} | {' | '.join(cases)} |"]
    lines.append("|---|" + "--:|" * len(cases))
    for library, variant in dict.fromkeys(key[:2] for key in cells):
        row = [f"{library}, {variant}"]
        for case in cases:
            record = cells.get((library, variant, case))
            row.append(
                f"{record['median_ms']:.3g} ({record['ratio']:.2f}; {100 * record['rel_l2']:.2g})"
                if record
                else "-"
            )
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--rounds", type=int, default=7, help="ratios to take the median of")
    parser.add_argument("--threads", default="1,2", help="thread counts between commas")
    parser.add_argument(
        "--case", action="append", choices=[case.name for case in CASES], help="default: all"
    )
    parser.add_argument(
        "--update", action="store_true", help="keep what --out holds of other cases"
    )
    parser.add_argument("--table", type=Path, help="print the tables of such a JSON and stop")
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables and write the JSON."""
    options = arguments()
    if options.table:
        result = json.loads(options.table.read_text())
        for threads in sorted({record["threads"] for record in result["records"]}):
            print(markdown(result, threads), "\n")
        return
    threads = [int(text) for text in options.threads.split(",")]
    cases = [case for case in CASES if not options.case or case.name in options.case]
    measured = {(case.name, count) for case in cases for count in threads}
    result = {
        **describe_machine(threads),
        "packages": {name: version(name) for name in PACKAGES},
        "records": [],
        "missing": [],
    }
    if options.update and options.out.exists():
        earlier = json.loads(options.out.read_text())
        for key in ("records", "missing"):
            result[key] = [r for r in earlier[key] if (r["case"], r["threads"]) not in measured]
        others = [one for one in earlier["ceilings"] if one["threads"] not in threads]
        result["ceilings"] = sorted(others + result["ceilings"], key=lambda one: one["threads"])
    for case in cases:
        for count in threads:
            print(f"{case.name}, {count} threads", file=sys.stderr)
            records, missing = measure(case, count, options.rounds)
            result["records"] += records
            result["missing"] += missing
    order = {case.name: i for i, case in enumerate(CASES)}
    result["records"].sort(key=lambda record: (order[record["case"]], record["threads"]))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for count in sorted({record["threads"] for record in result["records"]}):
        print(markdown(result, count), "\n")
    for one in result["missing"]:
        print(f"left out, {one['case']}, {one['library']} {one['variant']}: {one['why']}")


if __name__ == "__main__":
    main()
