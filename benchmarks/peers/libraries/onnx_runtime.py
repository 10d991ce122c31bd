# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's fused attention operators, each as a model of one node."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from libraries import UnavailableError, Variants
from problem import Case, Floats, Problem

LIBRARY = "ONNX Runtime"
DOMAIN = "com.microsoft"
Array = NDArray[Any]


def fold_heads(x: Floats) -> Floats:
    """Return [batch, heads, seqlen, head_dim] as [batch, seqlen, heads * head_dim]."""
    batch, heads, seqlen, head_dim = x.shape
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(batch, seqlen, heads * head_dim)


class OneNode:
    """A session of one node with every input and output bound to memory of its own."""

    def __init__(
        self,
        node: onnx.NodeProto,
        feeds: dict[str, Array],
        case: Case,
        threads: int,
        cache: dict[str, str] | None = None,
    ) -> None:
        """`cache` maps an output to the input whose memory it shares."""
        self.case = case
        out = np.empty((case.batch, case.seqlen_q, case.nheads_q * case.head_dim), np.float32)
        arrays = {"out": out, **{name: feeds[past] for name, past in (cache or {}).items()}}

        def declare(name: str, x: Array) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape
            )

        graph = helper.make_graph(
            [node],
            "attention",
            [declare(name, x) for name, x in feeds.items()],
            [declare(name, arrays[name]) for name in node.output],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise UnavailableError(str(error).splitlines()[0][:200]) from error
        self.values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(x)
            for name, x in {**feeds, "out": out}.items()
        }
        self.binding = self.session.io_binding()
        for name in feeds:
            self.binding.bind_ortvalue_input(name, self.values[name])
        for name in node.output:
            memory = (cache or {}).get(name, name)
            self.binding.bind_ortvalue_output(name, self.values[memory])

    def run(self) -> float:
        self.session.run_with_iobinding(self.binding)
        return 0.0

    def out(self) -> Floats:
        case = self.case
        result: Floats = self.values["out"].numpy()
        shape = (case.batch, case.seqlen_q, case.nheads_q, case.head_dim)
        return result.reshape(shape).transpose(0, 2, 1, 3)


def multi_head_attention(problem: Problem) -> OneNode:
    """Flash attention in float32; not causal, no grouped heads."""
    names = ["q", "k", "v"]
    node = helper.make_node(
        "MultiHeadAttention", names, ["out"], domain=DOMAIN, num_heads=problem.case.nheads_q
    )
    tensors = (problem.q, problem.k, problem.v)
    feeds = {name: fold_heads(x) for name, x in zip(names, tensors, strict=True)}
    return OneNode(node, feeds, problem.case, problem.threads)


def grouped_query_attention(problem: Problem, *, quantized: bool) -> OneNode:
    """GroupQueryAttention with its cache as float32, or INT8 with a scale per channel.

    The cache is shared between past and present, as its users do. The tokens of this call are the
    queries' own; those before them lie in the cache.
    """
    case = problem.case
    past = case.seqlen_k - case.seqlen_q
    feeds: dict[str, Array] = {
        "q": fold_heads(problem.q),
        "k": fold_heads(problem.k[:, :, past:]),
        "v": fold_heads(problem.v[:, :, past:]),
    }
    attributes: dict[str, int | str] = {}
    scales: dict[str, Array] = {}
    for name, x in (("k", problem.k), ("v", problem.v)):
        if quantized:
            scale = np.abs(x).max(axis=(0, 2), keepdims=True) / np.float32(127)
            cached = np.rint(x / scale).astype(np.int8)
            scales[f"{name}_scale"] = scale
            attributes[f"{name}_quant_type"] = "PER_CHANNEL"
            attributes["kv_cache_bit_width"] = 8
        else:
            cached = x.copy()
        feeds[f"past_{name}"] = cached
    feeds["seqlens_k"] = np.full(case.batch, case.seqlen_k - 1, np.int32)
    feeds["total_sequence_length"] = np.array(case.seqlen_k, np.int32)
    feeds.update(scales)
    unused = ["cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink"]
    inputs = [*(name for name in feeds if name not in scales), *([""] * len(unused)), *scales]
    node = helper.make_node(
        "GroupQueryAttention",
        inputs if quantized else inputs[:7],
        ["out", "present_k", "present_v"],
        domain=DOMAIN,
        num_heads=case.nheads_q,
        kv_num_heads=case.nheads_k,
        causal=int(case.causal or case.decode),
        **attributes,
    )
    cache = {"present_k": "past_k", "present_v": "past_v"}
    return OneNode(node, feeds, case, problem.threads, cache)


def variants(problem: Problem) -> Variants:
    """Return the ways to run the problem, by name."""
    case = problem.case
    plain = not (case.causal or case.decode or case.nheads_q != case.nheads_k)
    return {
        "float32": lambda: (
            multi_head_attention(problem)
            if plain
            else grouped_query_attention(problem, quantized=False)
        ),
        "int8 KV": lambda: grouped_query_attention(problem, quantized=True),
    }
