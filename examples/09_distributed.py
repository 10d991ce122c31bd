# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""One causal sequence over four processes: K and V travel around the ring in INT8.

Starts its own processes on this machine; on a cluster start one per node with torchrun instead.
"""

import tempfile

import attn8
import torch
import torch.distributed as dist
from attn8.distributed import bytes_sent, positions, ring_attention

WORLD = 4
BATCH, SEQLEN, NHEADS_Q, NHEADS_K, HEAD_DIM = 1, 1024, 8, 2, 64


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Q, K and V of the whole sequence, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, SEQLEN, NHEADS_Q, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, BATCH, SEQLEN, NHEADS_K, HEAD_DIM, generator=generator).unbind()
    return q, k, v


def work(rank: int, meeting: str) -> None:
    """Attend to this process's part of the sequence, and compare with one process."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    q, k, v = tensors()
    mine = positions(SEQLEN, rank, WORLD, "zigzag")  # the same work for everyone
    out = ring_attention(q[:, mine], k[:, mine], v[:, mine], causal=True, balance="zigzag")
    wanted = attn8.attention(q, k, v, causal=True)[:, mine]
    error = float((out - wanted).norm() / wanted.norm())
    assert error < 0.02
    if rank == 0:
        sent = bytes_sent("ring", SEQLEN, NHEADS_Q, NHEADS_K, HEAD_DIM, WORLD, BATCH)
        print(f"against one process: {100 * error:.2f} %")
        print("bytes sent by each process:", sent)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"{folder}/meeting",), nprocs=WORLD)
