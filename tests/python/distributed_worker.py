# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""One process of attn8.distributed against the whole on one process.

python distributed_worker.py MEETING BACKEND DEVICE, with RANK and WORLD_SIZE in the environment.
It checks its own part, and prints the largest ratio of an error to that of one process.
"""

import os
import subprocess
import sys

import attn8
import pytest
import torch
import torch.distributed as dist
from attn8.distributed import (
    all_gather_attention,
    positions,
    ring_attention,
    split_kv_attention,
    ulysses_attention,
)

SEQLEN = 512


def distance(a, b):
    return float((a.cpu().double() - b.cpu().double()).norm() / b.cpu().double().norm())


def tensors(device, dtype=torch.float32, dim_v=32):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, SEQLEN, 8, 32, generator=generator)
    k = torch.randn(2, SEQLEN, 4, 32, generator=generator) + 3
    v = torch.randn(2, SEQLEN, 4, dim_v, generator=generator)
    return tuple(x.to(device, dtype) for x in (q, k, v))


def check_schemes(q, k, v, rank, world):
    worst = 0.0
    for causal in (False, True):
        whole, whole_lse = attn8.attention(q, k, v, causal=causal, return_lse=True)
        exact = attn8.attention(*(x.cpu().float() for x in (q, k, v)), causal=causal, mode="exact")
        own = distance(whole, exact)
        for scheme in (ring_attention, all_gather_attention):
            for balance in ("contiguous", "zigzag"):
                mine = positions(SEQLEN, rank, world, balance)
                out, lse = scheme(
                    q[:, mine], k[:, mine], v[:, mine], causal=causal, balance=balance,
                    return_lse=True,
                )  # fmt: skip
                assert out.device == q.device
                assert out.dtype == q.dtype
                error = distance(out, exact[:, mine])
                bound = 1.5 * distance(whole[:, mine], exact[:, mine]) + 1e-3
                assert error < bound, (scheme, balance, causal, error, bound)
                assert (lse - whole_lse[:, :, mine]).abs().max() < 0.05
                worst = max(worst, error / own)
        mine = positions(SEQLEN, rank, world)
        out = ulysses_attention(q[:, mine], k[:, mine], v[:, mine], causal=causal)
        assert out.dtype == q.dtype
        assert distance(out, whole[:, mine]) < (2e-3 if q.dtype == torch.float32 else 8e-3)
    return worst


def check_decode(q, k, v, rank, world):
    """Uneven parts; the last process holds no key."""
    bounds = [SEQLEN * i // max(world - 1, 1) for i in range(world)] + [SEQLEN]
    keys = slice(bounds[rank], bounds[rank + 1])
    one = q[:, -1:]
    out, lse = split_kv_attention(one, k[:, keys], v[:, keys], return_lse=True)
    _, whole_lse = attn8.attention(one, k, v, return_lse=True)
    exact = attn8.attention(*(x.cpu().float() for x in (one, k, v)), mode="exact")
    assert distance(out, exact) < 0.03
    assert (lse - whole_lse).abs().max() < 0.05
    gathered = [torch.empty_like(out, device="cpu") for _ in range(world)]
    if dist.get_backend() == "gloo":
        dist.all_gather(gathered, out.cpu())
        assert all(torch.equal(x, out.cpu()) for x in gathered)


def check_group(q, k, v, rank, world):
    """Half of the processes, in a group of their own."""
    group = dist.new_group(list(range(world // 2)))
    if rank < world // 2:
        mine = positions(SEQLEN, rank, world // 2)
        out = ring_attention(q[:, mine], k[:, mine], v[:, mine], group=group)
        assert distance(out, attn8.attention(q, k, v)[:, mine]) < 0.05


def check_empty(q, k, v):
    """No tokens at all."""
    for scheme in (ring_attention, all_gather_attention, ulysses_attention):
        assert scheme(q[:, :0], k[:, :0], v[:, :0]).shape == (*q.shape[:1], 0, *q.shape[2:])


def check_refusals(q, k, v):
    """Bad input raises before anything is sent."""
    needs_grad = k.clone().requires_grad_()
    for call, error, start in (
        (lambda: ring_attention(q[:, :3], k[:, :3], v[:, :3], balance="zigzag"), ValueError, "q"),
        (lambda: ring_attention(q[:, :4], k[:, :2], v[:, :2], causal=True), ValueError, "k"),
        (lambda: ring_attention(q, k, v[:, :2]), ValueError, "v"),
        (lambda: ring_attention(q, k, v, balance="snake"), ValueError, "balance"),
        (lambda: ring_attention(q.cpu().numpy(), k, v), TypeError, "q"),
        (lambda: ring_attention(q, needs_grad, v), ValueError, "k"),
        (lambda: ring_attention(q, k, v.to("meta")), ValueError, "v"),
        (lambda: split_kv_attention(q.cpu().numpy(), k, v), TypeError, "q"),
    ):
        with pytest.raises(error, match=f"^{start}: got "):
            call()


def main(meeting, backend, device):
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
    given = tensors(device)
    worst = check_schemes(*given, rank, world)
    for dtype in (torch.float16, torch.bfloat16):
        check_schemes(*tensors(device, dtype), rank, world)
    check_schemes(*tensors(device, dim_v=48), rank, world)
    check_decode(*given, rank, world)
    if world > 1:
        check_group(*given, rank, world)
        q, k, v = (x[:, :, :1] for x in given)
        with pytest.raises(attn8.UnsupportedError, match=r"^q: got 1 heads, want a multiple"):
            ulysses_attention(q, k, v)
    check_empty(*given)
    check_refusals(*given)
    dist.destroy_process_group()
    print(f"{worst:.3f}")


def run(world, backend, device, folder):
    """Start the processes and wait for them; returns what each printed."""
    environment = {**os.environ, "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, folder / "meeting", backend, device],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    printed = []
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=300)
            assert worker.returncode == 0, output[-3000:]
            printed.append(output)
    finally:
        for worker in workers:
            worker.kill()
    return printed


if __name__ == "__main__":
    main(*sys.argv[1:])
