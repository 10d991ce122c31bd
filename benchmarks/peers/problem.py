# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The cases, their tensors, and attention in float64 to judge every library by."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One shape. A decode step finds the cache in the form each library keeps."""

    name: str
    batch: int
    nheads_q: int
    nheads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool = False

    @property
    def decode(self) -> bool:
        return self.seqlen_q == 1

    @property
    def visible_pairs(self) -> int:
        """Pairs of a query and a key it sees, of one head; the diagonal ends at the last key."""
        if not self.causal:
            return self.seqlen_q * self.seqlen_k
        shift = self.seqlen_k - self.seqlen_q
        return sum(min(self.seqlen_k, i + shift + 1) for i in range(self.seqlen_q))

    @property
    def operations(self) -> int:
        return 4 * self.batch * self.nheads_q * self.head_dim * self.visible_pairs


CASES = (
    Case("prefill d128", 1, 2, 2, 4096, 4096, 128),
    Case("prefill d128 causal", 1, 2, 2, 4096, 4096, 128, causal=True),
    Case("prefill d64", 1, 2, 2, 4096, 4096, 64),
    Case("prefill d64 causal", 1, 2, 2, 4096, 4096, 64, causal=True),
    Case("decode 64k d128", 1, 8, 8, 1, 65536, 128),
    Case("decode 16k d128 32/8", 1, 32, 8, 1, 16384, 128),
)


@dataclass(frozen=True)
class Problem:
    """Dense float32 tensors [batch, heads, seqlen, head_dim] of a case."""

    case: Case
    q: Floats
    k: Floats
    v: Floats
    threads: int = 1


def make_problem(case: Case) -> Problem:
    """Independent N(0, 1) elements; the same for every library and every run."""
    random = np.random.default_rng(seed=1)

    def normal(heads: int, seqlen: int) -> Floats:
        return random.standard_normal((case.batch, heads, seqlen, case.head_dim), np.float32)

    return Problem(
        case,
        normal(case.nheads_q, case.seqlen_q),
        normal(case.nheads_k, case.seqlen_k),
        normal(case.nheads_k, case.seqlen_k),
    )


def sampled_rows(case: Case) -> list[int]:
    """Query rows whose error is measured, the first and the last among them."""
    count = min(16, case.seqlen_q)
    return [round(i * (case.seqlen_q - 1) / max(1, count - 1)) for i in range(count)]


def exact_rows(problem: Problem) -> Doubles:
    """softmax(Q K^T / sqrt(head_dim)) V of the sampled rows, [batch, nheads_q, rows, head_dim]."""
    case = problem.case
    rows = np.array(sampled_rows(case))
    result = np.empty((case.batch, case.nheads_q, len(rows), case.head_dim))
    last_key = rows + case.seqlen_k - case.seqlen_q
    for batch in range(case.batch):
        for head in range(case.nheads_q):
            kv_head = head // (case.nheads_q // case.nheads_k)
            q = problem.q[batch, head, rows].astype(np.float64)
            score = q @ problem.k[batch, kv_head].T.astype(np.float64) / np.sqrt(case.head_dim)
            if case.causal:
                score[np.arange(case.seqlen_k) > last_key[:, None]] = -np.inf
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            weight /= weight.sum(axis=1, keepdims=True)
            result[batch, head] = weight @ problem.v[batch, kv_head].astype(np.float64)
    return result


def relative_l2(out: Floats, exact: Doubles) -> float:
    """||out - exact|| / ||exact||."""
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
