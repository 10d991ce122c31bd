# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""One module per library. Each has LIBRARY, its name, and variants(), its ways to run a problem."""

from collections.abc import Callable, Mapping
from typing import Protocol

from problem import Floats


class UnavailableError(Exception):
    """The library cannot run this variant here; the message says why."""


class Attention(Protocol):
    """A problem in the form the library wants, made outside the timed part."""

    def run(self) -> float:
        """Compute once; return the milliseconds that quantizing and packing K and V took of it.

        A decode step does not count them: whoever keeps a cache keeps it in the form it reads.
        """

    def out(self) -> Floats:
        """Return the last result, [batch, nheads_q, seqlen_q, head_dim]."""


Variants = Mapping[str, Callable[[], Attention]]

MODULES = (
    "attn8_library",
    "torch_sdpa",
    "onnx_runtime",
    "openvino_sdpa",
    "ggml_flash",
    "torchao_sdpa",
)
