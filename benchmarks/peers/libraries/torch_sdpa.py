# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""torch.nn.functional.scaled_dot_product_attention."""

import torch

from libraries import Variants
from problem import Floats, Problem

LIBRARY = "PyTorch SDPA"


class Sdpa:
    """Tensors converted to `dtype`; torch chooses its kernel."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        torch.set_num_threads(problem.threads)
        self.causal = problem.case.causal
        self.grouped = problem.case.nheads_q != problem.case.nheads_k
        self.q, self.k, self.v = (
            torch.from_numpy(x).to(dtype) for x in (problem.q, problem.k, problem.v)
        )

    def run(self) -> float:
        with torch.inference_mode():
            self.result = torch.nn.functional.scaled_dot_product_attention(
                self.q, self.k, self.v, is_causal=self.causal, enable_gqa=self.grouped
            )
        return 0.0

    def out(self) -> Floats:
        result: Floats = self.result.float().numpy()
        return result


def variants(problem: Problem) -> Variants:
    """Return the ways to run the problem, by name."""
    return {
        "float32": lambda: Sdpa(problem, torch.float32),
        "bfloat16": lambda: Sdpa(problem, torch.bfloat16),
        "float16": lambda: Sdpa(problem, torch.float16),
    }
