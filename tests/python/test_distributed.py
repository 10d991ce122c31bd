# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8.distributed with 2 and 4 processes (gloo) against one process."""

import os
import subprocess
import sys

import pytest

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
from attn8 import distributed  # noqa: E402

# Runs in every process; each checks its own part and prints the largest distance it saw.
WORKER = """
import os, sys
import torch
import torch.distributed as dist
import attn8
from attn8.distributed import *

torch.set_num_threads(1)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=world)
generator = torch.Generator().manual_seed(0)
S = 512
q = torch.randn(2, S, 8, 32, generator=generator)
k = torch.randn(2, S, 4, 32, generator=generator) + 3
v = torch.randn(2, S, 4, 32, generator=generator)

def distance(a, b):
    return float((a - b).norm() / b.norm())

worst = 0.0
for causal in (False, True):
    whole, whole_lse = attn8.attention(q, k, v, causal=causal, return_lse=True)
    exact, _ = attn8.attention(q, k, v, causal=causal, mode="exact", return_lse=True)
    own = distance(whole, exact)
    for scheme in (ring_attention, all_gather_attention):
        for balance in ("contiguous", "zigzag"):
            mine = positions(S, rank, world, balance)
            out, lse = scheme(q[:, mine], k[:, mine], v[:, mine], causal=causal, balance=balance,
                              return_lse=True)
            error = distance(out, exact[:, mine])
            assert error < 1.5 * distance(whole[:, mine], exact[:, mine]) + 1e-3, (scheme, error)
            assert (lse - whole_lse[:, :, mine]).abs().max() < 0.05
            worst = max(worst, error / own)
    mine = positions(S, rank, world)
    out = ulysses_attention(q[:, mine], k[:, mine], v[:, mine], causal=causal)
    assert distance(out, whole[:, mine]) < 2e-3, distance(out, whole[:, mine])
    half = q[:, mine].to(torch.bfloat16)
    assert ulysses_attention(half, k[:, mine], v[:, mine]).dtype == torch.bfloat16
    assert ring_attention(half, k[:, mine], v[:, mine]).dtype == torch.bfloat16

# Decode: uneven parts, the last process holds no key.
bounds = [S * i // max(world - 1, 1) for i in range(world)] + [S]
keys = slice(bounds[rank], bounds[rank + 1])
one = q[:, -1:]
out, lse = split_kv_attention(one, k[:, keys], v[:, keys], return_lse=True)
whole, whole_lse = attn8.attention(one, k, v, return_lse=True)
assert distance(out, attn8.attention(one, k, v, mode="exact")) < 0.03
assert (lse - whole_lse).abs().max() < 0.05
gathered = [torch.empty_like(out) for _ in range(world)]
dist.all_gather(gathered, out)
assert all(torch.equal(x, out) for x in gathered)

# Half of the processes, in a group of their own.
group = dist.new_group(list(range(world // 2)))
if rank < world // 2:
    mine = positions(S, rank, world // 2)
    out = ring_attention(q[:, mine], k[:, mine], v[:, mine], group=group)
    assert distance(out, attn8.attention(q, k, v)[:, mine]) < 0.05

# Bad input raises before anything is sent.
for call, error in (
    (lambda: ring_attention(q[:, :3], k[:, :3], v[:, :3], balance="zigzag"), ValueError),
    (lambda: ring_attention(q[:, :4], k[:, :2], v[:, :2], causal=True), ValueError),
    (lambda: ring_attention(q, k, v[:, :2]), ValueError),
    (lambda: ring_attention(q, k, v, balance="snake"), ValueError),
    (lambda: ring_attention(q.numpy(), k, v), TypeError),
    (lambda: ulysses_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1]), attn8.UnsupportedError),
):
    try:
        call()
    except error as raised:
        assert ": got " in str(raised)
    else:
        raise AssertionError("did not raise")
dist.barrier()
dist.destroy_process_group()
print(f"{worst:.3f}")
"""


@pytest.mark.parametrize("world", [2, 4])
def test_processes_against_one(world, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / "meeting"],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=300)
            assert worker.returncode == 0, output[-3000:]
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.parametrize("balance", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_token_is_held_once(balance, world):
    held = torch.cat([distributed.positions(48, rank, world, balance) for rank in range(world)])
    assert sorted(held.tolist()) == list(range(48))


def test_zigzag_gives_every_process_the_same_causal_work():
    work = [int((distributed.positions(64, rank, 4, "zigzag") + 1).sum()) for rank in range(4)]
    assert len(set(work)) == 1


def test_what_crosses_the_network_is_what_is_said():
    x = torch.randn(2, 64, 4, 32)
    part = distributed._Part(attn8.quantize(x, smooth=True), attn8.quantize(x))
    packed = part.pack()
    said = distributed.bytes_sent("ring", 128, 8, 4, 32, 2, batch=2)
    assert packed.nbytes == said["int8"]
    assert said["float32"] == 2 * x.nbytes
    assert said["bfloat16"] == x.nbytes
    again = part.unpack(packed)
    for a, b in ((again.k, part.k), (again.v, part.v)):
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scale, b.scale)
    moved = distributed.bytes_sent("ulysses", 128, 8, 4, 32, 2)
    assert moved["int8"] < moved["float32"]


def test_bad_arguments():
    with pytest.raises(ValueError, match="seqlen: got 10, want a multiple of 4"):
        distributed.positions(10, 0, 2, "zigzag")
    with pytest.raises(ValueError, match="scheme: got 'tree', want 'ring'"):
        distributed.bytes_sent("tree", 8, 1, 1, 8, 2)
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(RuntimeError, match="group: got no process group"):
        distributed.ring_attention(x, x, x)
