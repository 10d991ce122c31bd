# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""One library in a process of its own, so that no library's thread pool meets another's.

worker.py MODULE FOLDER THREADS reads q.npy, k.npy, v.npy and case.json from FOLDER, prepares every
variant, saves its output rows, and then times one variant for each line of standard input. Each
answer is a line of JSON on standard output.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from libraries import Attention, UnavailableError
from problem import Case, Problem, sampled_rows

SHORT_MS = 30  # a shorter run is repeated, after one that wakes threads and fills caches
ENOUGH_MS = 60


def answer(**fields: Any) -> None:
    """Write one line of JSON."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def timed_run(attention: Attention, decode: bool) -> tuple[float, float]:
    """Milliseconds that count, and those that quantizing and packing took."""
    begin = time.perf_counter()
    prepare_ms = attention.run()
    spent_ms = (time.perf_counter() - begin) * 1e3
    return spent_ms - prepare_ms if decode else spent_ms, prepare_ms


def main() -> None:
    """Prepare every variant, then time those that are asked for."""
    module_name, folder_name, threads = sys.argv[1:]
    folder = Path(folder_name)
    case = Case(**json.loads((folder / "case.json").read_text()))
    q, k, v = (np.load(folder / f"{name}.npy") for name in ("q", "k", "v"))
    problem = Problem(case, q, k, v, int(threads))
    try:
        module = importlib.import_module(f"libraries.{module_name}")
    except (ImportError, OSError) as error:
        answer(library=module_name, missing={"": f"{type(error).__name__}: {error}"}, variants=[])
        return

    prepared: dict[str, Attention] = {}
    missing: dict[str, str] = {}
    for name, build in module.variants(problem).items():
        try:
            attention = build()
            attention.run()
            rows = attention.out()[:, :, sampled_rows(case)]
            np.save(folder / f"out_{module_name}_{len(prepared)}.npy", rows)
            prepared[name] = attention
        except UnavailableError as error:
            missing[name] = str(error)
    answer(library=module.LIBRARY, missing=missing, variants=list(prepared))

    for line in sys.stdin:
        attention = prepared[line.strip()]
        runs = [timed_run(attention, case.decode)]
        if runs[0][0] < SHORT_MS:
            runs = []
            while sum(ms for ms, _ in runs) < ENOUGH_MS and len(runs) < 50:
                runs.append(timed_run(attention, case.decode))
        answer(
            ms=float(np.median([ms for ms, _ in runs])),
            prepare_ms=float(np.median([ms for _, ms in runs])),
        )


if __name__ == "__main__":
    main()
