# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Attention by its definition, in NumPy and float64: what the tests of the package compare with."""

import numpy as np


def visible(seqlen_q, seqlen_k, causal=False, align="bottom_right", window_size=(-1, -1)):
    """Which key (column) each query (row) sees."""
    offset = seqlen_k - seqlen_q if align == "bottom_right" else 0
    position = np.arange(seqlen_q)[:, None] + offset
    key = np.arange(seqlen_k)[None, :]
    seen = np.ones((seqlen_q, seqlen_k), bool)
    left, right = window_size
    if causal:
        seen &= key <= position
    if left >= 0:
        seen &= key >= position - left
    if right >= 0:
        seen &= key <= position + right
    return seen


def dense_attention(q, k, v, softmax_scale=None, seen=None, softcap=0, bias=None, sinks=None):
    """Attention of ``[batch, seq, heads, dim]`` arrays; returns out and lse [batch, heads, seq].

    ``seen`` and ``bias`` broadcast to ``[batch, heads, seqlen_q, seqlen_k]``; ``sinks`` is
    ``[heads]``.
    """
    q, k, v = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = scale * np.einsum("bhid,bhjd->bhij", q, k)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = np.where(seen, scores, -np.inf)
    highest = scores.max(-1, initial=-1e300, keepdims=True)
    sink = -np.inf if sinks is None else np.asarray(sinks, np.float64)[:, None, None]
    highest = np.maximum(highest, sink)
    weights = np.exp(scores - highest)
    total = weights.sum(-1, keepdims=True) + np.exp(sink - highest)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.where(total > 0, np.einsum("bhij,bhjd->bhid", weights, v) / total, 0.0)
        lse = np.where(total > 0, highest + np.log(total), -np.inf)[..., 0]
    return out.transpose(0, 2, 1, 3), lse


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def operands(batch=2, seqlen_q=33, seqlen_k=70, nheads_q=4, nheads_k=2, head_dim=64, seed=0):
    return (
        normal(batch, seqlen_q, nheads_q, head_dim, seed=seed),
        normal(batch, seqlen_k, nheads_k, head_dim, seed=seed + 1),
        normal(batch, seqlen_k, nheads_k, head_dim, seed=seed + 2),
    )


def distance(out, reference):
    """Relative L2 distance."""
    out, reference = np.asarray(out, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(out - reference) / np.linalg.norm(reference)
