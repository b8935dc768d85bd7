"""Many processes on one job: torchrun starts them, torch.distributed joins them. In a process alone nothing here does anything."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError, why

#: Set by torchrun: this process among all, their number, its number on this machine, and how often the job was started again.
RANK, WORLD, LOCAL_RANK, RESTARTS = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("TORCHELASTIC_RESTART_COUNT", 0)))
#: How long a process waits for the others: while the first one measures latency alone, of some 20 networks that may have to be compiled. (When a
#: process dies torchrun ends the others at once.)
WAIT = timedelta(hours=1)


@cache
def store() -> dist.Store | None:
    """What torchrun keeps for all processes of a job, also while it starts them again; None without it."""
    return next(dist.rendezvous("env://"))[0] if "TORCHELASTIC_RUN_ID" in os.environ else None


def remember(name: str, value: str) -> None:
    """Keeps a fact of the job for processes that torchrun starts in place of those that died."""
    if store():
        store().set(f"s2h/{name}", value)


def recall(name: str) -> str | None:
    """What processes of this job that died had remembered."""
    return store().get(f"s2h/{name}").decode() if RESTARTS and store().check([f"s2h/{name}"]) else None


def join(device: torch.device) -> None:
    """Meets the other processes of the job.

    Raises:
        UserError: they cannot meet.
    """
    if WORLD > 1 and not dist.is_initialized():
        if store() is None:
            raise UserError(f"WORLD_SIZE is {WORLD} and torchrun did not start this process; start the job with torchrun, or unset WORLD_SIZE")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Under a prefix, since the store keeps the addresses of processes that died.
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=RANK, world_size=WORLD, timeout=WAIT,
                                    store=dist.PrefixStore(f"s2h/{RESTARTS}", store()))
            dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects when it is first used
        except (dist.DistError, RuntimeError) as error:
            raise UserError(f"the processes of the job cannot meet ({why(error)}); each GPU takes one process, and the machines must reach each other") from error


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_another(error: Exception) -> bool:
    """Whether an error is only that another process of the job has ended."""
    return WORLD > 1 and (isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error))


def from_first(value: Any) -> Any:
    """The first process's value, plain data, for all."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def same(tensor: torch.Tensor) -> torch.Tensor:
    """The first process's tensor, in place, for all."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over the processes, in place."""
    return total(tensor).div_(WORLD)


def parallel(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over the processes as they come; batch-norm statistics stay each process's own."""
    return DistributedDataParallel(module, broadcast_buffers=False) if dist.is_initialized() else module
