# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of one sequence over several processes, on torch.distributed; K and V move in INT8.

Every process holds a part of the sequence, ``[batch, tokens, heads, head_dim]``, which part
:func:`positions` says, on the CPU or on a CUDA device of its own, and computes where it lies.
K and V are quantized there, with the mean of K over the whole sequence taken out, and cross the
network as codes and scales: ``head_dim + 4`` bytes per token and head, where bfloat16 takes
``2 head_dim`` and float32 ``4 head_dim``. Partial results are merged by their LSE in float32. A
collective call: every process of the group calls with parts of the same shape and the same options.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attn8.arrays import without_grad
from attn8.errors import UnsupportedError
from attn8.functional import attention, merge_states, operand_shape
from attn8.process_group import Processes
from attn8.quantization import QuantizedTensor, quantize

__all__ = [
    "all_gather_attention",
    "bytes_sent",
    "positions",
    "ring_attention",
    "split_kv_attention",
    "ulysses_attention",
]

BALANCES = ("contiguous", "zigzag")


def positions(seqlen: int, rank: int, world_size: int, balance: str = "contiguous") -> torch.Tensor:
    """Return the tokens that a process holds, in the order it holds them.

    Parameters
    ----------
    seqlen : int
        Tokens of the sequence; a multiple of ``world_size`` (twice that for "zigzag").
    rank, world_size : int
        The process, and how many there are.
    balance : {"contiguous", "zigzag"}
        One piece each; or pieces r and 2 * world_size - 1 - r of twice as many, which gives every
        process the same work under a causal mask.

    Examples
    --------
    >>> from attn8.distributed import positions
    >>> positions(8, 0, 2, "zigzag").tolist(), positions(8, 1, 2, "zigzag").tolist()
    ([0, 1, 6, 7], [2, 3, 4, 5])
    """
    pieces = _pieces(rank, world_size, balance)
    count = world_size * len(pieces)
    if seqlen % count != 0:
        raise ValueError(f"seqlen: got {seqlen}, want a multiple of {count}")
    length = seqlen // count
    return torch.cat([torch.arange(p * length, (p + 1) * length) for p in pieces])


def _pieces(rank: int, world_size: int, balance: str) -> tuple[int, ...]:
    if balance == "contiguous":
        return (rank,)
    if balance == "zigzag":
        return rank, 2 * world_size - 1 - rank
    raise ValueError(f"balance: got {balance!r}, want 'contiguous' or 'zigzag'")


def bytes_sent(
    scheme: str, seqlen: int, nheads_q: int, nheads_k: int, head_dim: int, world_size: int,
    batch: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Return the bytes that one process sends per attention call, in INT8 and beside it.

    Parameters
    ----------
    scheme : {"ring", "all_gather", "ulysses"}
        Ring and all-gather pass every part of K and V on ``world_size - 1`` times. Ulysses sends
        all but its own share of its part of Q, K and V, and of the output, which goes in the type
        of q: bfloat16 beside INT8 here.

    Returns
    -------
    dict
        ``int8``, ``bfloat16``, ``float32``. The mean of K, a few KB, is left out.
    """
    tokens = batch * seqlen // world_size
    others = world_size - 1
    if scheme in ("ring", "all_gather"):
        vectors = others * tokens * 2 * nheads_k
        sizes = {"int8": head_dim + 4, "bfloat16": 2 * head_dim, "float32": 4 * head_dim}
        return {name: vectors * size for name, size in sizes.items()}
    if scheme == "ulysses":
        moved = tokens * others // world_size
        vectors, outs = moved * (nheads_q + 2 * nheads_k), moved * nheads_q
        return {
            "int8": vectors * (head_dim + 4) + outs * 2 * head_dim,
            "bfloat16": (vectors + outs) * 2 * head_dim,
            "float32": (vectors + outs) * 4 * head_dim,
        }
    raise ValueError(f"scheme: got {scheme!r}, want 'ring', 'all_gather' or 'ulysses'")


@dataclass(frozen=True)
class _Part:
    """K and V of one process, quantized per token; K of all less the same mean."""

    k: QuantizedTensor
    v: QuantizedTensor

    def tokens(self, first: int, last: int) -> _Part:
        def cut(x: QuantizedTensor) -> QuantizedTensor:
            return QuantizedTensor(x.codes[:, first:last], x.scale[:, first:last], mean=x.mean)

        return _Part(cut(self.k), cut(self.v))

    def _pieces_of(self, data: torch.Tensor) -> list[torch.Tensor]:
        """Return scales and codes of a part of this shape as they lie in ``data``."""
        found, at = [], 0
        for like in (self.k.scale, self.v.scale, self.k.codes, self.v.codes):
            found.append(data[at : at + like.nbytes].view(like.dtype).view(like.shape))
            at += _padded(like.nbytes)
        return found

    def pack(self) -> torch.Tensor:
        """Return scales and codes as bytes: what crosses the network."""
        parts = (self.k.scale, self.v.scale, self.k.codes, self.v.codes)
        size = sum(_padded(x.nbytes) for x in parts)
        data = torch.empty(size, dtype=torch.uint8, device=self.k.codes.device)
        for piece, x in zip(self._pieces_of(data), parts, strict=True):
            piece.copy_(x)
        return data

    def unpack(self, data: torch.Tensor) -> _Part:
        """Read the bytes of a part of the same shape and mean."""
        k_scale, v_scale, k_codes, v_codes = self._pieces_of(data)
        return _Part(
            QuantizedTensor(k_codes, k_scale, mean=self.k.mean), QuantizedTensor(v_codes, v_scale)
        )


def _padded(size: int) -> int:
    """Return ``size`` up to the next multiple of the 16 bytes that kernels load at a time."""
    return (size + 15) // 16 * 16


def _checked(q: Any, k: Any, v: Any) -> tuple[torch.Tensor, ...]:
    """Return the operands without their gradients; raises before anything is sent."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, want a torch.Tensor")
        if x.ndim != 4:
            raise ValueError(f"{name}: got {x.ndim} dimensions, want 4")
        if x.device != q.device:
            raise ValueError(f"{name}: got a tensor on {x.device}, want one on {q.device}, as q")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: got shape {tuple(v.shape)}, want {tuple(k.shape[:3])} first, as k")
    return without_grad(q, "q"), without_grad(k, "k"), without_grad(v, "v")


def _quantized(
    k: torch.Tensor, v: torch.Tensor, processes: Processes, threads: int | None
) -> _Part:
    """Quantize with the mean of K over all processes: every part then has the same."""
    mean = processes.sum(k.sum(1, keepdim=True, dtype=torch.float64))
    mean /= max(k.shape[1] * processes.size, 1)
    return _Part(quantize(k, mean=mean.float(), threads=threads), quantize(v, threads=threads))


class _Merger:
    """Attends piece by piece of the queries and of the keys, and merges by LSE."""

    def __init__(
        self,
        q: torch.Tensor,
        rank: int,
        world_size: int,
        causal: bool,
        balance: str,
        options: dict[str, Any],
    ) -> None:
        self.q, self.causal, self.options = q, causal, options
        self.world_size, self.balance = world_size, balance
        self.pieces = _pieces(rank, world_size, balance)
        self.queries = q.chunk(len(self.pieces), 1) if q.shape[1] else (q,) * len(self.pieces)
        if q.shape[1] % len(self.pieces) != 0:
            raise ValueError(f"q: got {q.shape[1]} tokens, want an even number for {balance}")
        self.states: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(self.pieces)

    def add(self, part: _Part, owner: int) -> None:
        """Attend to the part of K and V that process ``owner`` holds."""
        owned = _pieces(owner, self.world_size, self.balance)
        length = part.k.shape[1] // len(owned)
        for i, (query, mine) in enumerate(zip(self.queries, self.pieces, strict=True)):
            for j, theirs in enumerate(owned):
                if self.causal and theirs > mine:
                    continue
                keys = part.tokens(j * length, (j + 1) * length)
                shape = (*query.shape[:3], keys.v.shape[3])
                out = torch.empty(shape, dtype=torch.float32, device=query.device)
                state = attention(
                    query, keys.k, keys.v, causal=self.causal and theirs == mine, out=out,
                    return_lse=True, **self.options,
                )  # fmt: skip
                held = self.states[i]
                self.states[i] = (
                    state if held is None else merge_states(*zip(held, state, strict=True))
                )

    def result(self, return_lse: bool) -> Any:
        states = [state for state in self.states if state is not None]
        out = torch.cat([state[0] for state in states], 1).to(self.q.dtype)
        lse = torch.cat([state[1] for state in states], 2)
        return (out, lse) if return_lse else out


def _context_parallel(
    scheme: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: Any,
    causal: bool,
    balance: str,
    softmax_scale: float | None,
    return_lse: bool,
    threads: int | None,
) -> Any:
    q, k, v = _checked(q, k, v)
    processes = Processes(group, q.device)
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"k: got {k.shape[1]} tokens, want {q.shape[1]}, as q, when causal")
    options = {"softmax_scale": softmax_scale, "threads": threads}
    merger = _Merger(q, processes.rank, processes.size, causal, balance, options)
    if k.shape[1] % len(merger.pieces) != 0:
        raise ValueError(f"k: got {k.shape[1]} tokens, want an even number for {balance}")
    part = _quantized(k, v, processes, threads)
    data = part.pack()
    parts: Iterator[tuple[int, torch.Tensor]] = (
        processes.ring(data) if scheme == "ring" else enumerate(processes.gather(data))
    )
    for owner, each in parts:
        merger.add(part.unpack(each), owner)
    return merger.result(return_lse)


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Any = None,
    causal: bool = False,
    balance: str = "contiguous",
    softmax_scale: float | None = None,
    return_lse: bool = False,
    threads: int | None = None,
) -> Any:
    """Attend to the whole sequence while K and V travel around the ring of processes.

    Parameters
    ----------
    q, k, v : Tensor
        This process's tokens, ``[batch, tokens, heads, head_dim]``, float32, float16 or bfloat16,
        on the CPU or on one CUDA device; v may have a head_dim of its own.
    group : ProcessGroup, optional
        None: all processes.
    causal : bool
        By the positions in the whole sequence.
    balance : {"contiguous", "zigzag"}
        Which tokens the processes hold, see :func:`positions`; matters when causal.
    softmax_scale, return_lse, threads
        As for :func:`attn8.attention`.

    Returns
    -------
    out, lse
        Of this process's queries, as :func:`attn8.attention` returns them.

    Notes
    -----
    Each process holds two parts of K and V at a time.
    """
    return _context_parallel(
        "ring", q, k, v, group, causal, balance, softmax_scale, return_lse, threads
    )


def all_gather_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Any = None,
    causal: bool = False,
    balance: str = "contiguous",
    softmax_scale: float | None = None,
    return_lse: bool = False,
    threads: int | None = None,
) -> Any:
    """Gather K and V of all processes in INT8, then attend; arguments as :func:`ring_attention`.

    One collective instead of a chain of messages; every process holds all of K and V for a while.
    """
    return _context_parallel(
        "all_gather", q, k, v, group, causal, balance, softmax_scale, return_lse, threads
    )


def split_kv_attention(
    q: torch.Tensor,
    k: Any,
    v: Any,
    *,
    group: Any = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    threads: int | None = None,
) -> Any:
    """Attend with the same queries in all processes to keys that are spread over them: decode.

    Parameters
    ----------
    q : Tensor
        The same in every process, ``[batch, seqlen_q, nheads_q, head_dim]``.
    k, v : Tensor or QuantizedTensor
        The keys this process holds, any number of them, none included; all are visible.
    group, softmax_scale, return_lse, threads
        As for :func:`ring_attention`.

    Returns
    -------
    out, lse
        The same bits in every process. Only outputs and LSE cross the network.
    """
    if not isinstance(q, torch.Tensor):
        raise TypeError(f"q: got {type(q).__name__}, want a torch.Tensor")
    processes = Processes(group, q.device)
    shape = (*operand_shape(q, "q")[:3], operand_shape(v, "v")[3])
    written = torch.empty(shape, dtype=torch.float32, device=q.device)
    out, lse = attention(
        q, k, v, softmax_scale=softmax_scale, out=written, return_lse=True, threads=threads
    )
    merged, merged_lse = merge_states(processes.gather(out), processes.gather(lse))
    merged = merged.to(q.dtype)
    return (merged, merged_lse) if return_lse else merged


def _exchange(x: torch.Tensor, processes: Processes, split: int, joined: int) -> torch.Tensor:
    """All-to-all: cut dimension ``split`` over the processes, join ``joined`` in their order."""
    found = processes.exchange(torch.stack(x.chunk(processes.size, split)))
    return torch.cat(list(found), joined)


def ulysses_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Any = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Exchange tokens for heads, attend to whole sequences of some heads, and exchange back.

    The scheme of DeepSpeed-Ulysses (arXiv:2309.14509), with Q, K and V in INT8 on their way.

    Parameters
    ----------
    q, k, v : Tensor
        This process's tokens as :func:`ring_attention` takes them, contiguous parts in rank order.
        The number of processes divides both numbers of heads.
    group, causal, softmax_scale, threads
        As for :func:`ring_attention`.

    Returns
    -------
    Tensor
        As q. For one length of Q and K, the bits of :func:`attn8.attention` of the whole, as far
        as the mean of K rounds the same.
    """
    q, k, v = _checked(q, k, v)
    processes = Processes(group, q.device)
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] % processes.size != 0:
            raise UnsupportedError(
                f"{name}: got {x.shape[2]} heads, want a multiple of the {processes.size} processes"
            )
    part = _quantized(k, v, processes, threads)
    whole = []
    for x in (quantize(q, threads=threads), part.k, part.v):
        codes, scale = (_exchange(y, processes, 2, 1) for y in (x.codes, x.scale))
        mean = None if x.mean is None else x.mean.chunk(processes.size, 2)[processes.rank]
        whole.append(QuantizedTensor(codes, scale, mean=mean))
    out = attention(*whole, causal=causal, softmax_scale=softmax_scale, threads=threads)
    return _exchange(out.to(q.dtype), processes, 1, 2)
