# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""A causal language model on attn8 beside itself on torch's SDPA, same weights, same text."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from attn8.errors import UnsupportedError
from attn8.transformers import Int8Cache, attention_function, register

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps what is iterated over, with a label: a progress bar, or nothing."""

_ROWS = 256  # of logits at a time: 256 rows of 49152 floats are 50 MB


def _options(mode: str) -> dict[str, Any]:
    name, _, plain = mode.partition("-")  # "accurate-plain": as attention() has it by default
    if plain or name not in ("accurate", "half"):
        return {"mode": name, "rotate": False, "kv_block": 0}
    return {"mode": name}


def implementation(mode: str) -> str:
    """Register a mode with transformers and return its name there; "float" is torch's SDPA."""
    if mode == "float":
        return "sdpa"
    name = f"attn8-{mode}"
    register(name, **_options(mode))
    return name


def hidden_states(model: Any, ids: torch.Tensor, mode: str) -> torch.Tensor:
    """Return the last hidden states ``[tokens, width]`` of one sequence."""
    model.set_attn_implementation(implementation(mode))
    with torch.inference_mode():
        out: torch.Tensor = model.model(ids, use_cache=False).last_hidden_state[0]
    return out


class Comparison:
    """Sums over tokens of what separates a model from its reference."""

    def __init__(self) -> None:
        self.nll = 0.0
        self.difference = 0.0
        self.difference_squared = 0.0
        self.same = 0
        self.divergence = 0.0
        self.tokens = 0
        self.error = 0.0
        self.norm = 0.0

    def add(self, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        """Add rows of log-probabilities ``[rows, vocabulary]``."""
        rows = torch.arange(len(targets))
        nll = -logits[rows, targets].double()
        difference = nll + reference[rows, targets].double()
        self.nll += float(nll.sum())
        self.difference += float(difference.sum())
        self.difference_squared += float((difference**2).sum())
        self.same += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        self.divergence += float((reference.exp() * (reference - logits)).sum(-1).double().sum())
        self.tokens += len(targets)

    def summary(self) -> dict[str, float]:
        """Return the means."""
        n = self.tokens
        mean = self.difference / n
        variance = max(self.difference_squared / n - mean**2, 0.0)
        return {
            "tokens": n,
            "perplexity": math.exp(self.nll / n),
            "perplexity_change": math.expm1(mean),
            # Standard error of the change, from the spread of the differences per token.
            "perplexity_change_error": math.sqrt(variance / n),
            "top1_agreement": self.same / n,
            "kl": self.divergence / n,
            "hidden_rel_l2": math.sqrt(self.error / self.norm),
        }


def compare(
    model: Any, ids: torch.Tensor, hidden: dict[str, torch.Tensor], sums: dict[str, Comparison]
) -> None:
    """Add one sequence: ``hidden`` by mode, "float" the reference; ``sums`` by mode."""
    reference = hidden["float"]
    targets = ids[0, 1:]
    for mode, states in hidden.items():
        sums[mode].error += float((states - reference).double().square().sum())
        sums[mode].norm += float(reference.double().square().sum())
    with torch.inference_mode():
        for first in range(0, len(targets), _ROWS):
            rows = slice(first, min(first + _ROWS, len(targets)))
            wanted = model.lm_head(reference[rows]).log_softmax(-1)
            for mode, states in hidden.items():
                logits = wanted if mode == "float" else model.lm_head(states[rows]).log_softmax(-1)
                sums[mode].add(logits, wanted, targets[rows])


def perplexities(
    model: Any,
    ids: torch.Tensor,
    lengths: Sequence[int],
    tokens: int,
    modes: Sequence[str],
    fp8_tokens: int,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Measure each mode at each length, over the first ``tokens`` tokens of the text.

    Yields a row per mode as soon as a length is done.

    Parameters
    ----------
    ids : Tensor
        The text, ``[1, at least max(tokens, longest length)]``.
    lengths : sequence of int
        Tokens per sequence; a shorter length reads more sequences.
    fp8_tokens : int
        Tokens that mode fp8 reads, which is emulated in software; none where a length is longer.
    """
    for length in lengths:
        used = [m for m in modes if m != "fp8" or length <= fp8_tokens]
        sums = {mode: Comparison() for mode in ["float", *used]}
        count = max(tokens // length, 1)
        for i in progress(range(count), f"perplexity at {length} tokens"):
            piece = ids[:, i * length : (i + 1) * length]
            within = (i + 1) * length <= fp8_tokens
            now = [mode for mode in sums if mode != "fp8" or within]
            hidden = {mode: hidden_states(model, piece, mode) for mode in now}
            compare(model, piece, hidden, sums)
        for mode, total in sums.items():
            yield {"length": length, "mode": mode, **total.summary()}


# Which layers.

_replaced: frozenset[int] = frozenset()
_replacement: Callable[..., Any] = sdpa_attention_forward


def _some_layers(module: Any, *args: Any, **options: Any) -> Any:
    chosen = _replacement if module.layer_idx in _replaced else sdpa_attention_forward
    return chosen(module, *args, **options)


def _no_mask(*_args: Any, attention_mask: torch.Tensor | None = None, **_options: Any) -> None:
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedError("attention_mask: got padding, want none")


def _with_layers(
    model: Any, ids: torch.Tensor, mode: str, layers: Iterable[int]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return last hidden states, and those after every layer, with only ``layers`` on attn8."""
    global _replaced, _replacement
    AttentionInterface.register("attn8-some-layers", _some_layers)
    AttentionMaskInterface.register("attn8-some-layers", _no_mask)
    _replaced, _replacement = frozenset(layers), attention_function(**_options(mode))
    model.set_attn_implementation("attn8-some-layers")
    with torch.inference_mode():
        out = model.model(ids, use_cache=False, output_hidden_states=True)
    return out.last_hidden_state[0], [x[0] for x in out.hidden_states]


def layer_study(
    model: Any, ids: torch.Tensor, modes: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Measure how errors add up over layers.

    Returns
    -------
    dict
        Per mode: ``after_layer``, relative error of the hidden states after each layer with all
        layers replaced; ``first`` and ``last``, the effect of replacing only the first or last n;
        ``alone``, that of replacing one layer.
    """
    reference, states = _with_layers(model, ids, "exact", ())
    layers = model.config.num_hidden_layers
    counts = sorted({n for n in (1, 2, 4, 8, 16, 24, layers // 2, layers) if n <= layers})

    def effect(mode: str, chosen: Iterable[int]) -> dict[str, float]:
        hidden = {"float": reference, mode: _with_layers(model, ids, mode, chosen)[0]}
        sums = {name: Comparison() for name in hidden}
        compare(model, ids, hidden, sums)
        summary = sums[mode].summary()
        return {key: summary[key] for key in ("kl", "hidden_rel_l2", "perplexity_change")}

    found: dict[str, Any] = {"tokens": ids.shape[1], "modes": {}}
    for mode in modes:
        _, after = _with_layers(model, ids, mode, range(layers))
        found["modes"][mode] = {
            "after_layer": [
                float((a - b).norm() / b.norm()) for a, b in zip(after[1:], states[1:], strict=True)
            ],
            "first": [
                {"layers": n, **effect(mode, range(n))}
                for n in progress(counts, f"{mode}: first layers")
            ],
            "last": [
                {"layers": n, **effect(mode, range(layers - n, layers))}
                for n in progress(counts, f"{mode}: last layers")
            ],
            "alone": [
                {"layer": n, **effect(mode, (n,))}
                for n in progress(range(layers), f"{mode}: one layer")
            ],
        }
    return found


# Generation.

PROMPTS = (
    "The capital of France is",
    "In the beginning",
    "A computer program is a list of",
    "Once upon a time there was a king who",
    "The three states of matter are",
    "To bake bread you need flour,",
)


def generations(model: Any, tokenizer: Any, new_tokens: int, progress: Progress) -> dict[str, Any]:
    """Generate greedily with the float cache and with the INT8 cache.

    Returns
    -------
    dict
        ``runs``: per prompt the texts, and after how many tokens they part.
    """
    runs = []
    for prompt in progress(PROMPTS, "generation"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        outs = {}
        for name, mode, make in (
            ("float", "float", DynamicCache),
            ("accurate", "accurate", DynamicCache),
            ("accurate, INT8 cache", "accurate", Int8Cache),
        ):
            model.set_attn_implementation(implementation(mode))
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=make(),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            outs[name] = out[0, ids.shape[1] :]
        wanted = outs["float"]
        run: dict[str, Any] = {"prompt": prompt, "tokens": new_tokens}
        for name, out in outs.items():
            differs = (out != wanted).nonzero()
            run[name] = {
                "text": tokenizer.decode(out),
                "same_until": int(differs[0]) if len(differs) else new_tokens,
            }
        runs.append(run)
    return {"runs": runs}


# Time.


def timings(
    model: Any, ids: torch.Tensor, lengths: Sequence[int], repeats: int, progress: Progress
) -> list[dict[str, Any]]:
    """Time the whole model: prefill, then decode from a full cache, in turns with torch's SDPA.

    Returns
    -------
    list of dict
        Per length: milliseconds of every run by implementation, and the median of the ratios of
        neighbouring runs, which other work on the machine disturbs least; bytes of the caches.
    """
    configurations = {
        "float": ("float", DynamicCache),
        "accurate, INT8 cache": ("accurate", Int8Cache),
    }
    steps = 8

    def held(cache: Any) -> int:
        if isinstance(cache, Int8Cache):
            return cache.nbytes
        return sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)

    rows = []
    for length in lengths:
        prefill: dict[str, list[float]] = {name: [] for name in configurations}
        decode: dict[str, list[float]] = {name: [] for name in configurations}
        cache_bytes: dict[str, int] = {}
        for _ in progress(range(repeats), f"time at {length} tokens"):
            for name, (mode, make) in configurations.items():
                model.set_attn_implementation(implementation(mode))
                cache = make()
                with torch.inference_mode():
                    start = time.perf_counter()
                    model(ids[:, :length], past_key_values=cache, logits_to_keep=1)
                    prefill[name].append(1e3 * (time.perf_counter() - start))
                    model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
                    start = time.perf_counter()
                    for _ in range(steps):
                        model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
                    decode[name].append(1e3 * (time.perf_counter() - start) / steps)
                cache_bytes[name] = held(cache)
        row: dict[str, Any] = {"length": length, "threads": torch.get_num_threads()}
        row["cache_bytes"] = cache_bytes
        for label, found in (("prefill", prefill), ("decode", decode)):
            theirs, ours = found.values()
            ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
            row[label] = {"ms": found, "speedup": statistics.median(ratios), "ratios": ratios}
        rows.append(row)
    return rows
