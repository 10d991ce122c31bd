# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8.distributed on CUDA tensors, against one process.

NCCL refuses two processes on one device: with gloo, which passes through the host, several share
it; NCCL itself runs with one process, and with as many as there are devices.
"""

import pytest

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
torch = pytest.importorskip("torch", reason="torch is not installed")
import distributed_worker  # noqa: E402

devices = torch.cuda.device_count() if attn8.info()["cuda"]["built"] else 0
gpu = pytest.mark.skipif(
    devices == 0, reason="no CUDA device that torch sees, or attn8 built without CUDA"
)


@gpu
@pytest.mark.parametrize("world", [2, 4])
def test_gloo_through_the_host(world, tmp_path):
    assert len(distributed_worker.run(world, "gloo", "cuda", tmp_path)) == world


@gpu
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_nccl_of_one_process(backend, tmp_path):
    assert len(distributed_worker.run(1, backend, "cuda", tmp_path)) == 1


@pytest.mark.skipif(devices < 2, reason="fewer than two CUDA devices, or attn8 without CUDA")
def test_nccl_of_several_devices(tmp_path):
    world = 4 if devices >= 4 else 2
    assert len(distributed_worker.run(world, "nccl", "cuda", tmp_path)) == world


@gpu
def test_nccl_has_nothing_for_the_cpu(tmp_path):
    import torch.distributed as dist
    from attn8.distributed import ring_attention

    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        x = torch.zeros(1, 4, 2, 8)
        with pytest.raises(attn8.UnsupportedError, match="group: got backends cuda:nccl for"):
            ring_attention(x, x, x)
    finally:
        dist.destroy_process_group()
