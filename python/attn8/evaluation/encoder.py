# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Embeddings of a text encoder on attn8 beside those on torch's SDPA."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from attn8.evaluation.language import Progress, implementation


def passages(text: str, count: int) -> list[str]:
    """Cut a text into passages from a sentence to a page long, ``count`` of them."""
    sentences = re.split(r"(?<=[.?!])\s+", text)
    lengths = (1, 2, 4, 8, 20)  # sentences per passage, in turns: short and long in one batch
    found: list[str] = []
    at = 0
    while len(found) < count and at < len(sentences):
        length = lengths[len(found) % len(lengths)]
        found.append(" ".join(sentences[at : at + length]))
        at += length
    if len(found) < count:
        raise ValueError(f"text: got {len(found)} passages, want {count}")
    return found


def embeddings(
    model: Any, tokenizer: Any, texts: Sequence[str], mode: str, batch: int
) -> torch.Tensor:
    """Return the normalized mean of the hidden states of each text, ``[texts, width]``."""
    model.set_attn_implementation(implementation(mode))
    found = []
    for first in range(0, len(texts), batch):
        inputs = tokenizer(
            list(texts[first : first + batch]),
            padding=True,
            truncation=True,
            max_length=model.config.max_position_embeddings,
            return_tensors="pt",
        )
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state
        weights = inputs["attention_mask"][..., None].float()
        found.append((hidden * weights).sum(1) / weights.sum(1))
    return torch.nn.functional.normalize(torch.cat(found))


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    return scores.argsort(-1).argsort(-1).double()


def encoder_study(
    model: Any, tokenizer: Any, text: str, count: int, modes: Sequence[str], progress: Progress
) -> list[dict[str, Any]]:
    """Compare embeddings and the rankings they give.

    Returns
    -------
    list of dict
        Per mode: mean and least ``cosine`` with the float embeddings; ``top1`` and ``top10``, how
        much of the nearest neighbours of each passage among the others is the same; ``spearman``,
        mean rank correlation of all similarities.
    """
    texts = passages(text, count)
    reference = embeddings(model, tokenizer, texts, "float", 8)
    itself = torch.eye(count, dtype=torch.bool)

    def similarities(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.T).masked_fill(itself, -2)

    wanted = similarities(reference)
    rows = []
    for mode in progress(modes, "embeddings"):
        found = embeddings(model, tokenizer, texts, mode, 8)
        cosine = (found * reference).sum(-1).clamp(max=1)
        scores = similarities(found)
        near, wanted_near = scores.topk(10).indices, wanted.topk(10).indices
        shared = (near[:, :, None] == wanted_near[:, None, :]).any(-1).double().mean()
        a, b = _ranks(scores), _ranks(wanted)
        spearman = torch.stack(
            [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
        )
        rows.append(
            {
                "mode": mode,
                "passages": count,
                "cosine_mean": float(cosine.mean()),
                "cosine_least": float(cosine.min()),
                "top1": float((near[:, 0] == wanted_near[:, 0]).double().mean()),
                "top10": float(shared),
                "spearman": float(spearman.mean()),
            }
        )
    return rows
