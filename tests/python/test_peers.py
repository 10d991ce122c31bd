# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/peers: its float64 oracle, its counting, and attn8 as one of its libraries."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import peers
from problem import CASES, Case, exact_rows, make_problem, relative_l2, sampled_rows

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    Case("plain", 1, 2, 2, 20, 33, 16),
    Case("causal", 2, 4, 2, 24, 24, 16, causal=True),
    Case("chunk", 1, 2, 1, 5, 40, 16, causal=True),
    Case("decode", 1, 4, 2, 1, 50, 16),
)


def sees(case: Case, i: int, j: int) -> bool:
    return not case.causal or j <= i + case.seqlen_k - case.seqlen_q


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_exact_rows_follow_the_definition(case: Case) -> None:
    problem = make_problem(case)
    exact = exact_rows(problem)
    group = case.nheads_q // case.nheads_k
    for batch in range(case.batch):
        for head in range(case.nheads_q):
            k, v = problem.k[batch, head // group], problem.v[batch, head // group]
            for row, i in enumerate(sampled_rows(case)):
                total, weights = np.zeros(case.head_dim), 0.0
                for j in range(case.seqlen_k):
                    if sees(case, i, j):
                        dot = math.fsum(
                            float(a) * float(b)
                            for a, b in zip(problem.q[batch, head, i], k[j], strict=True)
                        )
                        weight = math.exp(dot / math.sqrt(case.head_dim))
                        total += weight * v[j].astype(np.float64)
                        weights += weight
                np.testing.assert_allclose(exact[batch, head, row], total / weights, rtol=1e-10)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_operations_count_visible_pairs(case: Case) -> None:
    pairs = sum(sees(case, i, j) for i in range(case.seqlen_q) for j in range(case.seqlen_k))
    assert case.operations == 4 * case.batch * case.nheads_q * case.head_dim * pairs


def test_cases_are_named_once_and_sample_both_ends() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        rows = sampled_rows(case)
        assert rows[0] == 0
        assert rows[-1] == case.seqlen_q - 1
        assert len(set(rows)) == len(rows)


def test_tables_hold_every_record() -> None:
    record = {"library": "other", "variant": "a", "threads": 1, "case": "x"}
    record |= {"median_ms": 12.34, "ratio": 3.456, "rel_l2": 0.0123}
    table = peers.markdown({"records": [record, record | {"variant": "b", "case": "y"}]}, 1)
    assert "| other, a | 12.3 (3.46; 1.2) | - |" in table
    assert "| other, b | - | 12.3 (3.46; 1.2) |" in table


def test_attn8_as_a_worker(tmp_path: Path) -> None:
    library = ROOT / "build/release/attn8_peers.so"
    if "ATTN8_CLI" in os.environ:
        library = Path(os.environ["ATTN8_CLI"]).parent / "attn8_peers.so"
    if not library.exists():
        pytest.skip("attn8_peers is not built")
    case = Case("small", 1, 4, 2, 70, 90, 32, causal=True)
    problem = make_problem(case)
    for name in ("q", "k", "v"):
        np.save(tmp_path / f"{name}.npy", getattr(problem, name))
    (tmp_path / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
    worker = ROOT / "benchmarks/peers/worker.py"
    done = subprocess.run(
        [sys.executable, str(worker), "attn8_library", str(tmp_path), "1"],
        input="accurate\n",
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"ATTN8_PEERS_LIBRARY": str(library.resolve())},
    )
    first, timed = (json.loads(line) for line in done.stdout.splitlines())
    assert first["missing"] == {}
    assert timed["ms"] > timed["prepare_ms"] > 0
    exact = exact_rows(problem)
    error = {
        variant: relative_l2(np.load(tmp_path / f"out_attn8_library_{i}.npy"), exact)
        for i, variant in enumerate(first["variants"])
    }
    assert error["exact float32"] < 1e-5
    assert 1e-4 < error["accurate"] < 0.03
    assert 1e-4 < error["accurate, bfloat16 in"] < 0.03
