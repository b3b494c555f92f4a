"""Several processes, one run: torchrun starts them, each with a GPU or cores of its own.

All of them train (torch's DistributedDataParallel) and compute features; rank 0 alone clusters, and
what it found is told the others. A batch is the one that a single process would take, dealt out
row by row, so that a run has the same steps whatever the number of ranks. Gloo on processors, NCCL
between GPUs, on which nobody has run it yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from csc_gpu.checkpoint import Record, from_bytes, to_bytes

Forward = Callable[[torch.Tensor], torch.Tensor]
PATIENCE = timedelta(days=1)
"""How long ranks wait for each other: the first clusters and checks alone. Torch's own half hour
would end the run; a rank that has died is noticed at once."""


class Ranks:
    """One process of `world`; alone it does nothing that a plain program would not."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def is_first(self) -> bool:
        """Whether this process clusters, writes and speaks."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Which of some rows, or batches, are this process's: every world-th."""
        return slice(self.rank, None, self.world)

    def parallel(self, model: torch.nn.Module) -> Forward:
        """The forward pass of a model whose gradients are averaged over all ranks.

        On GPUs the model's batch norms see the batch of all ranks; with gloo they see the share.
        """
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        if device.type == "cuda":
            synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm
            model = synced(model)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(model)

    def add_up(self, tensor: torch.Tensor) -> None:
        """The sum over all ranks, in place of what each of them holds."""
        if self.world > 1:
            distributed.all_reduce(tensor)

    def from_first(self, told: Callable[[], Record]) -> Record:
        """What rank 0 has to tell; the others do not even ask themselves."""
        if self.world == 1:
            return told()
        content = to_bytes(told()) if self.is_first else b""
        length = torch.tensor([len(content)])
        distributed.broadcast(length, 0)
        buffer = torch.frombuffer(bytearray(content or bytes(int(length))), dtype=torch.uint8)
        distributed.broadcast(buffer, 0)
        return from_bytes(buffer.numpy().tobytes())

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            distributed.barrier()


ALONE = Ranks()


def joined() -> Ranks:
    """The ranks that torchrun has started, as its environment says; alone without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ALONE
    if not distributed.is_initialized():
        kind = "cpu:gloo,cuda:nccl" if _has_gpus() else "gloo"
        distributed.init_process_group(kind, timeout=PATIENCE)
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def local_rank() -> int:
    """Which of the GPUs of its machine is this process's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """How many processes share this machine, its memory among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _has_gpus() -> bool:
    return torch.cuda.is_available() and distributed.is_nccl_available()
