#!/usr/bin/env python3
# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Makes data/real_sample.safetensors: a few heads of two real models, under 1 MB.

A prefix of a causal capture is itself a true capture, and its last queries see every key of the
prefix. So each causal entry keeps the first keys of one kv head and the last queries of the whole
group of query heads that read it.

Example
-------
``python tools/capture/sample.py --out data/real_sample.safetensors``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import capture
import models
import tensor_file
import text as text_source
from capture import Capture
from command_line import InputError, Parser, exit_status
from tensor_file import FloatArray

# Upper bound of the file: it lives in the repository.
MAX_BYTES = 1_000_000

# The last queries that every entry keeps.
SEQLEN_Q = 64


@dataclass(frozen=True)
class Choice:
    """One entry of the sample: a kv head and the query heads that read it."""

    model: str
    layer: int
    kv_head: int
    seqlen_k: int
    why: str

    @property
    def prefix(self) -> str:
        """Name of the entry in the file."""
        return f"{self.model}.layer.{self.layer:02d}.kv{self.kv_head}"


# Chosen by what describe.py shows of the full captures; docs/real-tensors.md has the table. One
# causal entry spans two blocks of 512 keys.
CHOICES = [
    Choice("smollm2", 0, 0, 1024, "diffuse attention, no sink"),
    Choice("smollm2", 2, 0, 384, "largest K channel mean over its deviation, no sink"),
    Choice("smollm2", 10, 1, 384, "largest K peak over rms, most mass on many low-norm keys"),
    Choice("smollm2", 18, 2, 384, "strongest low-norm sink, largest scores"),
    Choice("smollm2", 20, 1, 384, "typical low-norm sink"),
    Choice("minilm", 0, 2, 512, "attention to one position, large scores"),
    Choice("minilm", 4, 5, 512, "low-norm sink on [CLS]"),
    Choice("minilm", 5, 2, 512, "diffuse attention, weak sink"),
]


def select(choice: Choice, captured: Capture) -> tuple[dict[str, FloatArray], dict[str, str]]:
    """Cut one entry out of a capture.

    Returns
    -------
    tensors : dict
        ``prefix.q`` ``(1, SEQLEN_Q, group, d)``, ``prefix.k`` and ``prefix.v``
        ``(1, seqlen_k, 1, d)``.
    metadata : dict
        Keys ``prefix.causal``, ``prefix.causal_align``, ``prefix.softmax_scale``,
        ``prefix.source``, ``prefix.why``.
    """
    layer = captured.layers[choice.layer]
    group = layer.q.shape[2] // layer.k.shape[2]
    heads = slice(choice.kv_head * group, (choice.kv_head + 1) * group)
    kv, end = slice(choice.kv_head, choice.kv_head + 1), choice.seqlen_k
    if not layer.causal and end != layer.k.shape[1]:
        raise InputError(
            f"{choice.prefix}: got {end} keys of an encoder, want all {layer.k.shape[1]}"
        )
    prefix, model = choice.prefix, captured.metadata["model"]
    tensors = {
        f"{prefix}.q": layer.q[:1, end - SEQLEN_Q : end, heads],
        f"{prefix}.k": layer.k[:1, :end, kv],
        f"{prefix}.v": layer.v[:1, :end, kv],
    }
    source = (
        f"{model}, layer {choice.layer}, kv head {choice.kv_head}, query heads {heads.start} to "
        f"{heads.stop - 1}, tokens 0 to {end - 1}, queries of the last {SEQLEN_Q}"
    )
    metadata = {
        f"{prefix}.causal": "true" if layer.causal else "false",
        f"{prefix}.causal_align": "bottom_right",
        f"{prefix}.softmax_scale": repr(layer.softmax_scale),
        f"{prefix}.source": source,
        f"{prefix}.why": choice.why,
    }
    return tensors, metadata


def make_sample(out: Path) -> int:
    """Capture, select, write; return the bytes written."""
    tensor_file.check_writable(out)
    text = text_source.load("kjv")
    tensors: dict[str, FloatArray] = {}
    metadata = {
        "title": "Q, K and V of real models after rotary embedding, a sample",
        "text": capture.TEXT_TITLES["kjv"],
        "layout": "bshd",
        "command": "python tools/capture/sample.py --out data/real_sample.safetensors",
    }
    for name in dict.fromkeys(choice.model for choice in CHOICES):
        chosen = [choice for choice in CHOICES if choice.model == name]
        # float64: the rounding to float16 then hardly depends on the order of sums, which differs
        # between instruction sets and numbers of threads.
        captured = capture.run(
            models.find_model(name, None),
            text,
            capture.TEXT_TITLES["kjv"],
            tokens=max(choice.seqlen_k for choice in chosen),
            batch=1,
            chosen={choice.layer for choice in chosen},
            dtype="float16",
            compute="float64",
            threads=1,
        )
        for key in ("model", "source", "licence", "rope", "token_ids_sha256", "versions"):
            metadata[f"{name}.{key}"] = captured.metadata[key]
        for choice in chosen:
            entry, described = select(choice, captured)
            tensors |= entry
            metadata |= described
    size = sum(x.size * 2 for x in tensors.values())
    if size >= MAX_BYTES:
        raise InputError(f"sample: got {size} bytes of tensors, want under {MAX_BYTES}")
    return tensor_file.write(out, tensors, metadata, "float16")


def command(argv: Sequence[str]) -> int:
    """Do what the command line says; return the exit status."""
    parser = Parser(prog="sample.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    arguments = parser.parse_args(argv)
    size = make_sample(arguments.out)
    print(f"{arguments.out}: {len(CHOICES)} entries, {size} bytes")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 2 bad input, 3 a package is missing."""
    return exit_status(command, argv)


if __name__ == "__main__":
    sys.exit(main())
