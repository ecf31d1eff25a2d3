"""Several processes, one result: torch.distributed without a library around it.

`torchrun` starts the processes, gloo or nccl moves the numbers. Lightning Fabric or Accelerate would bring their own
ways to seed, to move and to save, which a run that resumes to the same bits has to decide itself; and
DistributedDataParallel wraps a module, while learned exponents live beside it and come and go with the schedule. What
is left is one sum over one vector of gradients per step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from pow2quant.errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together. rank: 0 to size - 1; rank 0 writes files and speaks."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch (N, …): every size-th sample."""
        return batch[self.rank :: self.size]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces gradients by their sums over all processes. Every process must have the same ones."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not gradients:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor of statistics."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def average(self, values: Tensor) -> None:
        """Replaces a tensor of statistics by its mean over all processes."""
        if self.size > 1:
            distributed.all_reduce(values)
            values /= self.size

    def take_from_leader(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors by those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.data, 0)

    def check_equal(self, tensors: Iterable[Tensor]) -> None:
        """Raises AssertionError when the tensors are not the same, to the bit, in all processes."""
        if self.size == 1:
            return
        own = torch.cat([t.detach().float().flatten() for t in tensors])
        leader = own.clone()
        distributed.broadcast(leader, 0)
        differing = self.summed((own != leader).sum())
        if int(differing):
            raise AssertionError(f"{int(differing)} parameters or exponents differ between the processes")


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """This process among those that `torchrun` started, or alone. device: cpu (gloo) or cuda (nccl, a GPU for each).

    Raises ConfigError where the variables that torchrun sets are not there or make no sense.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    if given == "1":
        yield Processes()
        return
    if device.startswith("cuda") and (":" in device or not torch.cuda.is_available()):
        raise ConfigError(f"device: {device!r} cannot be used by torchrun's processes; legal: cpu, or cuda with GPUs")
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except (ValueError, LookupError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {given!r}, so torchrun's other processes are expected, but cannot be joined: {error}; "
            "start with torchrun, or unset WORLD_SIZE"
        ) from None
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
