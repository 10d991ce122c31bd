# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""torchao's INT8 attention, torch.ops.torchao.qscaled_dot_product."""

import torch
import torchao.ops  # noqa: F401  registers the operator

from libraries import UnavailableError, Variants
from problem import Floats, Problem

LIBRARY = "torchao"


def check_kernel() -> None:
    """Raise UnavailableError where the installed package has no kernel for the CPU."""
    x = torch.zeros((1, 1, 1, 64), dtype=torch.uint8)
    try:
        torch.ops.torchao.qscaled_dot_product(x, x, x)
    except NotImplementedError as error:
        reason = "the installed package holds no CPU kernel of qscaled_dot_product"
        raise UnavailableError(reason) from error


class QuantizedSdpa:
    """u8 tensors with one scale and zero point each, calibrated on the tensors themselves."""

    def __init__(self, problem: Problem) -> None:
        check_kernel()
        if problem.case.causal or problem.case.nheads_q != problem.case.nheads_k:
            raise UnavailableError("the operator takes neither is_causal nor grouped heads")
        torch.set_num_threads(problem.threads)
        self.scales: dict[str, float] = {}
        self.operands = []
        for name, x in (("q", problem.q), ("k", problem.k), ("v", problem.v)):
            scale = float(abs(x).max()) / 127
            self.scales[f"{name}_scale"] = scale
            self.operands.append(
                (torch.from_numpy(x) / scale).round().add(128).clamp(0, 255).to(torch.uint8)
            )
        self.out_scale = self.scales["v_scale"]

    def run(self) -> float:
        self.result = torch.ops.torchao.qscaled_dot_product(
            *self.operands,
            None,
            0.0,
            False,
            q_zp=128,
            k_zp=128,
            v_zp=128,
            a_scale=1 / 255,
            a_zp=0,
            o_scale=self.out_scale,
            o_zp=128,
            **self.scales,
        )
        return 0.0

    def out(self) -> Floats:
        result: Floats = ((self.result.float() - 128) * self.out_scale).numpy()
        return result


def variants(problem: Problem) -> Variants:
    """Return the ways to run the problem, by name."""
    return {"int8": lambda: QuantizedSdpa(problem)}
