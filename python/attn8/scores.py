# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""What changes scores, hides keys or sets modes, checked for the extension module."""

from __future__ import annotations

from collections.abc import Sequence

from attn8.arrays import Array, shape_of, without_grad

Changes = tuple[float, Array, Array, Array, Array, Array, int, int]
"""softcap, attn_mask, alibi_slopes, sinks, seqlens_k, leftpad_k, q_offset, k_offset."""


def rank_4(mask: Array, sizes: tuple[int, int, int, int]) -> Array:
    """Return a mask with all four dimensions, after a check that it broadcasts to ``sizes``."""
    shape = getattr(mask, "shape", None)
    if not isinstance(shape, tuple):
        raise TypeError(f"attn_mask: got {type(mask).__name__}, want an array or None")
    shape = tuple(shape)
    fits = len(shape) <= 4 and all(
        got in (1, want) for got, want in zip(reversed(shape), reversed(sizes), strict=False)
    )
    if not fits:
        raise ValueError(f"attn_mask: got shape {shape}, want one that broadcasts to {sizes}")
    mask = without_grad(mask, "attn_mask")
    while len(mask.shape) < 4:
        mask = mask[None]
    return mask


def score_changes(
    sizes: tuple[int, int, int, int],
    softcap: float = 0.0,
    attn_mask: Array | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    seqlens_k: Array | None = None,
    leftpad_k: Array | None = None,
    q_offset: int = 0,
    k_offset: int = 0,
) -> Changes | None:
    """Return what the extension module takes, None where nothing changes.

    Parameters
    ----------
    sizes : tuple of int
        batch, nheads_q, seqlen_q, seqlen_k.
    softcap, attn_mask, alibi_slopes, sinks, seqlens_k, leftpad_k, q_offset, k_offset
        As for :func:`attn8.attention`.
    """
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap: got {type(softcap).__name__}, want a float")
    arrays = (attn_mask, alibi_slopes, sinks, seqlens_k, leftpad_k)
    plain = all(x is None for x in arrays) and softcap == 0
    # Not `q_offset == 0`: what is no int is for the extension module to refuse.
    if plain and type(q_offset) is type(k_offset) is int and q_offset == k_offset == 0:
        return None
    if attn_mask is not None:
        attn_mask = rank_4(attn_mask, sizes)
    if alibi_slopes is not None:
        alibi_slopes = without_grad(alibi_slopes, "alibi_slopes")
        if len(getattr(alibi_slopes, "shape", ())) == 1:
            alibi_slopes = alibi_slopes[None]
        shape = shape_of(alibi_slopes, "alibi_slopes", 2)
        if shape[0] not in (1, sizes[0]) or shape[1] != sizes[1]:
            raise ValueError(
                f"alibi_slopes: got shape {shape}, want ({sizes[1]},) or {sizes[:2]}: "
                "[nheads_q] or [batch, nheads_q]"
            )
    if sinks is not None:
        sinks = without_grad(sinks, "sinks")
    for name, x, wanted in (
        ("sinks", sinks, sizes[1]),
        ("seqlens_k", seqlens_k, sizes[0]),
        ("leftpad_k", leftpad_k, sizes[0]),
    ):
        if x is not None and shape_of(x, name, 1) != (wanted,):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, want ({wanted},)")
    return softcap, attn_mask, alibi_slopes, sinks, seqlens_k, leftpad_k, q_offset, k_offset


def check_head_modes(head_modes: Sequence[str] | None, mode: str) -> None:
    """Raise unless ``head_modes`` is None, or a list that stands alone for ``mode``."""
    if head_modes is None:
        return
    if not isinstance(head_modes, (list, tuple)):
        raise TypeError(
            f"head_modes: got {type(head_modes).__name__}, want a list of modes, one for each kv "
            "head"
        )
    if mode != "accurate":
        raise ValueError(f"mode: got {mode!r} with head_modes, want one of the two")
