# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The command line of ``python -m attn8 eval``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PARTS = ("perplexity", "layers", "generation", "time", "embeddings")


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, want numbers with commas") from None
    if not found or min(found) < 2:
        raise argparse.ArgumentTypeError(f"got {text!r}, want numbers from 2 on")
    return found


def _choices(*known: str) -> Any:
    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"got {name!r}, want some of {','.join(known)}")
        return found

    return parse


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    modes = _choices("exact", "half", "accurate", "paper", "fp8", "half-plain", "accurate-plain")
    found = argparse.ArgumentParser(
        prog="python -m attn8 eval",
        description="Evaluate INT8 attention on whole models, beside torch's SDPA on the same "
        "weights and text.",
    )
    add = found.add_argument
    add("--parts", type=_choices(*PARTS), default=list(PARTS), help=",".join(PARTS))
    add("--model", default="smollm2", help="causal model: smollm2, a directory or a GGUF file")
    add("--encoder", default="minilm", help="encoder: minilm, or a directory")
    add("--text", default="kjv", help="kjv (Debian's bible-kjv) or a UTF-8 file")
    add("--modes", type=modes, default="exact,half,accurate,accurate-plain,paper,fp8",
        help="exact, half, accurate, paper, fp8; half-plain, accurate-plain: not rotated",
    )  # fmt: skip
    add("--lengths", type=_numbers, default=[512, 1024, 2048, 4096, 8192], metavar="N,N,...")
    add("--tokens", type=int, default=8192, help="tokens read at every length")
    add("--fp8-tokens", type=int, default=1024, help="tokens that mode fp8 reads (emulated: slow)")
    add("--layer-tokens", type=int, default=1024, help="tokens of the study of layers")
    add("--layer-modes", type=modes, default=["accurate", "paper"])
    add("--new-tokens", type=int, default=48, help="tokens generated per prompt")
    add("--time-lengths", type=_numbers, default=[512, 4096, 8192], metavar="N,N,...")
    add("--repeats", type=int, default=3, help="timed runs of each")
    add("--passages", type=int, default=120, help="texts to embed")
    add("--threads", type=int, help="of torch and of attn8; default: torch's own")
    add("--results", type=Path, help="JSON file to add the results to, part by part")
    add("--json", action="store_true", help="print the results as JSON, not as tables")
    add("--plots", type=Path, metavar="FOLDER", help="draw the results into this folder")
    add("--show", type=Path, metavar="FILE", help="run nothing: show the results of this file")
    return found


def _progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(list(items), desc=label, leave=False, disable=None)
    return bar  # disable=None: shown on a terminal only


def _machine(threads: int) -> dict[str, Any]:
    import torch
    import transformers

    from attn8.runtime import info

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else "unknown",
        "threads": threads,
        "isa": info()["isa"],
        "kv_block": info()["kv_block"],
        "attn8": info()["version"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _store(path: Path | None, results: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".partial")
    fresh.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen parts and return their results."""
    # Before torch and transformers are imported: nothing here asks a hub for anything.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    from attn8.evaluation import encoder, language, sources

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    if options.results is not None and options.results.exists():
        results = json.loads(options.results.read_text(encoding="utf-8"))
    results["machine"] = _machine(torch.get_num_threads())
    results["text"] = options.text if options.text == "kjv" else Path(options.text).name
    text = sources.load_text(options.text)
    parts = set(options.parts)
    if parts - {"embeddings"}:
        source = sources.find_model(options.model)
        results["model"] = source.title
        tokenizer = source.load(transformers.AutoTokenizer)
        model = source.load(transformers.AutoModelForCausalLM).eval()
        needed = max(options.tokens, *options.lengths, *options.time_lengths, options.layer_tokens)
        ids = sources.token_ids(tokenizer, text, needed)
        if "perplexity" in parts:
            results["perplexity"] = []
            for row in language.perplexities(
                model, ids, options.lengths, options.tokens, options.modes, options.fp8_tokens,
                _progress,
            ):  # fmt: skip
                results["perplexity"].append(row)
                _store(options.results, results)
        if "layers" in parts:
            results["layers"] = language.layer_study(
                model, ids[:, : options.layer_tokens], options.layer_modes, _progress
            )
            _store(options.results, results)
        if "generation" in parts:
            results["generation"] = language.generations(
                model, tokenizer, options.new_tokens, _progress
            )
            _store(options.results, results)
        if "time" in parts:
            results["time"] = language.timings(
                model, ids, options.time_lengths, options.repeats, _progress
            )
            _store(options.results, results)
    if "embeddings" in parts:
        source = sources.find_model(options.encoder)
        results["encoder"] = source.title
        results["embeddings"] = encoder.encoder_study(
            source.load(transformers.AutoModel).eval(), source.load(transformers.AutoTokenizer),
            text, options.passages, options.modes, _progress,
        )  # fmt: skip
        _store(options.results, results)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 2 for bad input, 3 where something is missing."""
    options = parser().parse_args(arguments)
    from attn8.errors import UnavailableError, UnsupportedError

    try:
        for name in ("tokens", "layer_tokens", "new_tokens", "repeats", "passages"):
            least = 16 if name == "passages" else 2 if name.endswith("tokens") else 1
            if getattr(options, name) < least:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: got {getattr(options, name)}, want at least {least}")
        if options.threads is not None and options.threads < 1:
            raise ValueError(f"--threads: got {options.threads}, want at least 1")
        if options.show is not None:
            try:
                results = json.loads(options.show.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"--show: got {options.show} ({error}), want results") from None
        else:
            results = run(options)
        if options.plots is not None:
            from attn8.evaluation.plots import draw

            draw(results, options.plots)
    except ImportError as error:
        print(f"eval: got no {error.name}, want it: pip install {error.name}", file=sys.stderr)
        return 3
    except UnavailableError as error:
        print(f"eval: {error}", file=sys.stderr)
        return 3
    except (ValueError, UnsupportedError) as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(results))
    else:
        from attn8.evaluation.tables import tables

        print(tables(results), end="")
    return 0
