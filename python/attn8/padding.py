# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Sequences of a batch that each have a contiguous range of keys of their own: padding."""

from __future__ import annotations

KeyRange = tuple[int, int]
"""First key, and the key after the last, that a sequence may see."""


def query_range(keys: KeyRange, seqlen_q: int, seqlen_k: int, masked: bool) -> tuple[int, int]:
    """Return the queries of a sequence that keep the diagonal where the keys are cut.

    A query sees by its position: cutting the queries where the keys are cut leaves the bottom-right
    diagonal where it is.

    Parameters
    ----------
    keys : KeyRange
        The keys that are not padding.
    seqlen_q, seqlen_k : int
        Padded lengths; the last query stands at the last key.
    masked : bool
        Whether there is a diagonal; without one all queries stay.
    """
    if not masked:
        return 0, seqlen_q
    offset = seqlen_k - seqlen_q  # position of the first query among the keys
    first = min(max(keys[0] - offset, 0), seqlen_q)
    return first, max(min(keys[1] - offset, seqlen_q), first)
