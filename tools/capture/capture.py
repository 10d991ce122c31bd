#!/usr/bin/env python3
# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Captures Q, K and V of every attention layer of a real model, as attention sees them.

The tensors are taken where the model hands them to its attention function: after the projections
and after rotary embedding. Nothing is downloaded: models are local directories, GGUF files, or
weights inside installed Python packages.

Example
-------
``python tools/capture/capture.py --model smollm2 --out smollm2.safetensors --check``
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import numpy as np
import tensor_file
import text as text_source
from command_line import InputError, MissingError, Parser, exit_status, positive
from models import ModelFiles
from tensor_file import FloatArray

RowNumbers = np.ndarray[Any, np.dtype[np.int_]]

# Query rows per layer that --check recomputes.
CHECK_ROWS = 256

# Largest error that --check accepts, relative to the largest output of the layer: inputs with unit
# roundoff u move a score s by up to 2 |s| u and an output by about as much of its size, and the
# scores that decide an output are below 16 or so. u is 2^-24, 2^-11 and 2^-8; float32 leaves room
# for the sums of the model's own attention.
CHECK_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Layer:
    """What one attention layer saw; arrays in order [batch, seq, head, dim]."""

    q: FloatArray
    k: FloatArray
    v: FloatArray
    out: FloatArray
    """[batch, CHECK_ROWS or fewer, head, dim]: the model's own output at `check_rows`."""
    softmax_scale: float
    causal: bool


@dataclass
class Capture:
    """All recorded layers of one forward pass."""

    layers: dict[int, Layer] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, FloatArray]:
        """Return the arrays under their names in a file: ``layer.NN.q|k|v``."""
        return {
            f"layer.{index:02d}.{part}": getattr(layer, part)
            for index, layer in self.layers.items()
            for part in "qkv"
        }

    def all_metadata(self) -> dict[str, str]:
        """Return the metadata of the file and of each layer."""
        result = dict(self.metadata)
        for index, layer in self.layers.items():
            prefix = f"layer.{index:02d}"
            result[f"{prefix}.causal"] = "true" if layer.causal else "false"
            result[f"{prefix}.softmax_scale"] = repr(layer.softmax_scale)
            result[f"{prefix}.source"] = f"{self.metadata['model']}, layer {index}"
        return result


def parse_layers(text: str) -> set[int] | None:
    """Parse ``all`` (None) or a list such as ``0,5,10-12``."""
    if text == "all":
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"layers: got {text!r}, want all or a list such as 0,5,10-12")
        chosen.update(range(int(first), int(last or first) + 1))
    return chosen


def check_rows(seqlen: int) -> RowNumbers:
    """Return at most `CHECK_ROWS` row numbers spread evenly over a sequence, both ends included."""
    rows: RowNumbers = np.unique(np.linspace(0, seqlen - 1, min(seqlen, CHECK_ROWS)).astype(int))
    return rows


def attention_rows(
    q: FloatArray, k: FloatArray, v: FloatArray, rows: RowNumbers, scale: float, causal: bool
) -> FloatArray:
    """Compute rows of softmax attention in float64.

    Parameters
    ----------
    q : array ``(b, s, h, d)``
    k, v : array ``(b, s, h_kv, d)``
        ``h_kv`` divides ``h``.
    rows : array of int
        Query rows to compute.
    scale : float
        Factor of the scores.
    causal : bool
        Whether row i sees only keys 0..i.

    Returns
    -------
    array ``(b, len(rows), h, d)``, float64
    """
    group = q.shape[2] // k.shape[2]
    out = np.empty((q.shape[0], len(rows), *q.shape[2:]))
    hidden = np.arange(k.shape[1])[None, :] > rows[:, None]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            kv = h // group
            scores = q[b, rows, h].astype(np.float64) @ k[b, :, kv].astype(np.float64).T * scale
            if causal:
                scores[hidden] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            out[b, :, h] = p @ v[b, :, kv].astype(np.float64)
    return out


def layer_error(layer: Layer) -> float:
    """Return the largest error of attention recomputed from the stored tensors of a layer.

    Relative to the largest output of the model's own attention there.
    """
    rows = check_rows(layer.q.shape[1])
    out = attention_rows(layer.q, layer.k, layer.v, rows, layer.softmax_scale, layer.causal)
    return float(np.abs(out - layer.out).max() / np.abs(layer.out).max())


def import_heavy() -> tuple[Any, Any]:
    """Import torch and transformers, set to stay offline and quiet."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import torch
        import transformers
    except ImportError as error:
        how = "pip install -r tools/capture/requirements.txt"
        raise MissingError(f"{error.name}: got no such package, want it: {how}") from None
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return torch, transformers


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def token_ids(tokenizer: Any, text: str, tokens: int, batch: int) -> list[list[int]]:
    """Cut a text into ``batch`` consecutive sequences of exactly ``tokens`` tokens.

    Each holds the special tokens that the tokenizer adds ([CLS] ... [SEP] for BERT).
    """
    added = tokenizer.num_special_tokens_to_add()
    if not tokenizer.is_fast:
        raise InputError("model: got a tokenizer without tokenizer.json, want one with it")
    if tokens <= added:
        raise InputError(f"tokens: got {tokens}, want more than the {added} that the model adds")
    encoded = tokenizer(text, truncation=True, max_length=tokens, return_overflowing_tokens=True)
    chunks = [list(ids) for ids in encoded["input_ids"] if len(ids) == tokens]
    if len(chunks) < batch:
        raise InputError(
            f"text: got {len(chunks)} sequences of {tokens} tokens, want {batch} (--batch)"
        )
    return chunks[:batch]


def rope_text(config: Any) -> str:
    """Describe the rotary embedding that was applied before the capture."""
    parameters = getattr(config, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    if theta is None:
        return "none"
    return f"applied, type {parameters.get('rope_type', 'default')}, theta {theta:g}"


def recorder(
    torch: Any, calls: list[int], capture: Capture, chosen: set[int] | None, dtype: str
) -> Any:
    """Return an attention function for transformers that records its inputs and output."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def record(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, None]:
        index = len(calls)
        calls.append(index)
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scale, is_causal=is_causal, **kwargs
        )
        if chosen is not None and index not in chosen:
            return out, None
        for name in ("softcap", "s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                raise InputError(
                    f"model: got {name} in layer {index}, want plain softmax attention"
                )
        causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
        seqlen = query.shape[2]
        if attention_mask is not None:
            visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            causal = not bool(visible.all())
            full = torch.ones(seqlen, seqlen, dtype=torch.bool)
            if causal and not bool((visible == full.tril()).all()):
                raise InputError(
                    f"model: got a mask in layer {index} at {seqlen} tokens that is neither full "
                    "nor causal, want fewer tokens than its window"
                )
        q, k, v = (
            tensor_file.as_stored(x.transpose(1, 2).contiguous().numpy(), dtype)
            for x in (query, key, value)
        )
        rows = out[:, torch.from_numpy(check_rows(seqlen))].double().numpy()
        capture.layers[index] = Layer(q, k, v, rows, scale, causal)
        return out, None

    return record


def run(
    model: ModelFiles,
    text: str,
    text_name: str,
    tokens: int,
    batch: int,
    chosen: set[int] | None,
    dtype: str,
    compute: str,
    threads: int,
) -> Capture:
    """Run a model over a text and record its attention layers.

    Parameters
    ----------
    model : ModelFiles
        The model, see `models.find_model`.
    text, text_name : str
        The text and what the metadata calls it.
    tokens, batch : int
        Length and number of the sequences; consecutive pieces of the text, never padded.
    chosen : set of int or None
        Layers to keep; None keeps all.
    dtype : {"float16", "bfloat16", "float32"}
        Type the tensors are rounded to.
    compute : {"float32", "float64"}
        Type the model computes in.
    threads : int
        Threads of torch; 0 leaves the choice to torch.

    Returns
    -------
    Capture
        Layers by number, in the order in which the model ran them, and metadata.
    """
    torch, transformers = import_heavy()
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if threads > 0:
        torch.set_num_threads(threads)
    capture = Capture()
    calls: list[int] = []
    name = "attn8_capture"
    transformers.AttentionInterface.register(name, recorder(torch, calls, capture, chosen, dtype))
    AttentionMaskInterface.register(name, sdpa_mask)
    gguf = {} if model.gguf_file is None else {"gguf_file": model.gguf_file}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model.directory, local_files_only=True, **gguf
        )
        network = transformers.AutoModel.from_pretrained(
            model.directory,
            local_files_only=True,
            attn_implementation=name,
            dtype=getattr(torch, compute),
            **gguf,
        )
    except Exception as error:  # whatever transformers makes of a damaged or foreign file
        raise InputError(
            f"model: got {model.source} ({one_line(error)}), want one that transformers can load"
        ) from None
    config = network.config
    limit = getattr(config, "max_position_embeddings", tokens)
    if tokens > limit:
        raise InputError(f"tokens: got {tokens}, want at most the model's {limit}")
    layer_count = config.num_hidden_layers
    if chosen is not None and (beyond := chosen - set(range(layer_count))):
        raise InputError(f"layers: got {max(beyond)}, want 0 to {layer_count - 1}")
    if config.is_encoder_decoder:
        raise InputError(f"model: got the encoder-decoder {model.title}, want one stack of layers")
    ids = token_ids(tokenizer, text, tokens, batch)
    network.eval()
    with torch.inference_mode():
        arguments = {"use_cache": False} if hasattr(config, "use_cache") else {}
        try:
            network(input_ids=torch.tensor(ids), **arguments)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise InputError(
                f"model: got {model.source} that fails on {tokens} tokens ({one_line(error)}), "
                "want a model of text that runs on token numbers alone"
            ) from None
    if len(calls) != layer_count:
        raise InputError(
            f"model: got {len(calls)} calls of attention for {layer_count} layers, want a model "
            "that calls transformers' AttentionInterface once per layer"
        )
    first = next(iter(capture.layers.values()))
    causal = {layer.causal for layer in capture.layers.values()}
    digest = hashlib.sha256(np.array(ids, dtype="<i8").tobytes()).hexdigest()
    # Without the build ("+cpu"), which does not change what a CPU computes.
    torch_version = str(torch.__version__).partition("+")[0]
    capture.metadata = {
        "model": model.title,
        "source": model.source,
        "licence": f"weights: {model.licence}",
        "text": text_name,
        "token_ids_sha256": digest,
        "tokens": str(tokens),
        "batch": str(batch),
        "layers": str(layer_count),
        "nheads_q": str(first.q.shape[2]),
        "nheads_k": str(first.k.shape[2]),
        "head_dim": str(first.q.shape[3]),
        "softmax_scale": repr(first.softmax_scale),
        "causal": "mixed" if len(causal) > 1 else str(first.causal).lower(),
        "rope": rope_text(config),
        "layout": "bshd",
        "compute_dtype": compute,
        "versions": f"torch {torch_version}, transformers {transformers.__version__}",
    }
    return capture


TEXT_TITLES = {"kjv": "King James Bible (public domain), Debian package bible-kjv"}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `InputError` where it is wrong."""
    parser = Parser(prog="capture.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|PATH",
        help=f"{', '.join(models.PACKAGED)}, a model directory or a .gguf file",
    )
    parser.add_argument(
        "--text",
        default="kjv",
        metavar="kjv|FILE",
        help="kjv (program bible) or a UTF-8 file; default kjv",
    )
    parser.add_argument(
        "--tokens", type=positive, default=2048, help="tokens per sequence; default 2048"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=1,
        help="sequences, consecutive pieces of the text; default 1",
    )
    parser.add_argument("--layers", default="all", help="all or a list such as 0,5,10-12")
    parser.add_argument(
        "--dtype",
        choices=list(tensor_file.STORAGE),
        default="float16",
        help="type of the stored tensors; default float16",
    )
    parser.add_argument(
        "--compute",
        choices=["float32", "float64"],
        default="float32",
        help="type the model computes in; default float32",
    )
    parser.add_argument("--threads", type=positive, default=None, help="threads of torch")
    parser.add_argument("--licence", help="licence of the weights, for the metadata")
    parser.add_argument(
        "--check",
        action="store_true",
        help="recompute attention in float64 from the stored tensors and compare "
        "with the model's own",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    return parser.parse_args(argv)


def capture_file(argv: Sequence[str]) -> int:
    """Do what the command line says; return the exit status."""
    arguments = parse_arguments(argv)
    chosen = parse_layers(arguments.layers)
    tensor_file.check_writable(arguments.out)
    model = models.find_model(arguments.model, arguments.licence)
    text = text_source.load(arguments.text)
    text_name = TEXT_TITLES.get(arguments.text, Path(arguments.text).name)
    capture = run(
        model,
        text,
        text_name,
        arguments.tokens,
        arguments.batch,
        chosen,
        arguments.dtype,
        arguments.compute,
        arguments.threads or 0,
    )
    capture.metadata["command"] = shlex.join(["python", "tools/capture/capture.py", *argv])
    if arguments.check:
        worst = 0.0
        for index, layer in capture.layers.items():
            error = layer_error(layer)
            worst = max(worst, error)
            print(f"layer {index:2d}  largest error / largest output {error:.2e}")
        if not worst <= (limit := CHECK_TOLERANCE[arguments.dtype]):
            print(f"check: got an error of {worst:.2e}, want at most {limit:g}", file=sys.stderr)
            return 1
    size = tensor_file.write(
        arguments.out, capture.tensors(), capture.all_metadata(), arguments.dtype
    )
    print(f"{arguments.out}: {len(capture.layers)} layers, {size} bytes")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 the check failed, 2 bad input, 3 a package is missing."""
    return exit_status(capture_file, argv)


if __name__ == "__main__":
    sys.exit(main())
