# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8.distributed with 2 and 4 processes (gloo) against one process."""

import pytest

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
import distributed_worker  # noqa: E402
from attn8 import distributed  # noqa: E402


@pytest.mark.parametrize("world", [2, 4])
def test_processes_against_one(world, tmp_path):
    assert len(distributed_worker.run(world, "gloo", "cpu", tmp_path)) == world


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


def test_group_without_a_backend_for_the_tensors(tmp_path, monkeypatch):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_backend_config", lambda _: "cuda:nccl")
        x = torch.zeros(1, 4, 2, 8)
        with pytest.raises(attn8.UnsupportedError, match=r"group: got backends cuda:nccl for tens"):
            distributed.ring_attention(x, x, x)
    finally:
        dist.destroy_process_group()
