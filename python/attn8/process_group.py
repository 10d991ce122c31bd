# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""What moves between the processes of torch.distributed, wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from attn8.errors import UnsupportedError

BOUNCED = ("gloo",)
"""Backends that move memory of the host only, whatever some of their collectives take."""


class Processes:
    """A process group, and how tensors of one device get from process to process.

    A backend that works on the device (NCCL) is given the tensors themselves: it sends on a stream
    of its own, which waits for the work that makes them, and no call waits for the device. Where
    the group has none for CUDA but gloo, they go through pinned memory of the host, and calls wait
    for the device to have made them.

    Parameters
    ----------
    group : ProcessGroup or None
        None: all processes.
    device : torch.device
        Where the tensors lie.

    Attributes
    ----------
    rank, size : int
        This process, and how many there are.

    Raises
    ------
    RuntimeError
        torch.distributed is not initialized.
    UnsupportedError
        No backend of the group moves tensors of that device.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        if not dist.is_initialized():
            raise RuntimeError("group: got no process group, want torch.distributed initialized")
        self._group, self._device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        config = str(dist.get_backend_config(group))
        backends = dict(each.split(":", 1) for each in config.split(","))
        backend = backends.get(device.type)
        self._bounced = device.type != "cpu" and (backend is None or backend in BOUNCED)
        if (backends.get("cpu") if self._bounced else backend) is None:
            raise UnsupportedError(
                f"group: got backends {config} for tensors on {device}, want one for them: "
                "nccl for CUDA tensors, gloo for the CPU's, or for both"
            )

    def _leaving(self, x: torch.Tensor) -> torch.Tensor:
        """Return x where the backend reads it."""
        x = x.contiguous()
        if not self._bounced:
            return x
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return host.copy_(x)

    def _landing(self, like: torch.Tensor) -> torch.Tensor:
        """Return memory where the backend writes what another process sends of that shape."""
        return torch.empty(like.shape, dtype=like.dtype, device=like.device,
                           pin_memory=self._bounced)  # fmt: skip

    def _arrived(self, x: torch.Tensor) -> torch.Tensor:
        """Return x where the caller works."""
        return x.to(self._device, non_blocking=True) if self._bounced else x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes."""
        moved = self._leaving(x)
        if moved is x:
            moved = x.clone()
        dist.all_reduce(moved, group=self._group)
        return self._arrived(moved)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return what each process passed, all of one shape, in the order of their ranks."""
        moved = self._leaving(x)
        found = [self._landing(moved) for _ in range(self.size)]
        dist.all_gather(found, moved, group=self._group)
        return [self._arrived(each) for each in found]

    def exchange(self, x: torch.Tensor) -> torch.Tensor:
        """Return, row by row, what each process had in the row of this one's rank."""
        moved = self._leaving(x)
        found = self._landing(moved)
        dist.all_to_all_single(found, moved, group=self._group)
        return self._arrived(found)

    def ring(self, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield rank and tensor of each process, this one first, against the order of ranks.

        While the caller works on one, the next travels.
        """

        def peer(step: int) -> int:
            other = (self.rank + step) % self.size
            return other if self._group is None else int(dist.get_global_rank(self._group, other))

        moved = self._leaving(x) if self.size > 1 else x
        for step in range(self.size - 1):
            found = self._landing(moved)
            moves = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, moved, peer(1), self._group),
                    dist.P2POp(dist.irecv, found, peer(-1), self._group),
                ]
            )
            yield (self.rank - step) % self.size, x
            for move in moves:
                move.wait()
            moved, x = found, self._arrived(found)
        yield (self.rank + 1) % self.size, x
