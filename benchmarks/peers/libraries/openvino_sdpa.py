# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's ScaledDotProductAttention-13 on its CPU plugin."""

import numpy as np
import openvino
from openvino import opset13

from libraries import UnavailableError, Variants
from problem import Floats, Problem

LIBRARY = "OpenVINO SDPA"


class CompiledModel:
    """A model of that one node; `precision` is the plugin's hint, f32 or bf16."""

    def __init__(self, problem: Problem, precision: str) -> None:
        if problem.case.decode:
            raise UnavailableError("it decodes through stateful models, not one node")
        group = problem.case.nheads_q // problem.case.nheads_k
        # The node broadcasts no grouped heads: they are repeated beforehand.
        operands = [problem.q, *(np.repeat(x, group, axis=1) for x in (problem.k, problem.v))]
        parameters = [opset13.parameter(x.shape, np.float32) for x in operands]
        node = opset13.scaled_dot_product_attention(*parameters, causal=problem.case.causal)
        model = openvino.Model([node], parameters, "attention")
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": problem.threads,
            "NUM_STREAMS": 1,
        }
        self.request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        for i, x in enumerate(operands):
            self.request.set_input_tensor(i, openvino.Tensor(x, shared_memory=True))
        self.operands = operands

    def run(self) -> float:
        self.request.infer()
        return 0.0

    def out(self) -> Floats:
        return np.array(self.request.get_output_tensor(0).data, np.float32)


def variants(problem: Problem) -> Variants:
    """Return the ways to run the problem, by name."""
    return {
        "float32": lambda: CompiledModel(problem, "f32"),
        "bfloat16": lambda: CompiledModel(problem, "bf16"),
    }
