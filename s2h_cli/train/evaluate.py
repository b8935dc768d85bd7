"""Accuracy, and the batch-norm statistics that it stands on."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Callable, Iterable, Iterator

import torch
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from .. import distributed
from ..errors import UserError

Batch = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def enough_images() -> Iterator[None]:
    """Says it as a UserError if batch norm has one value a channel to take statistics of."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError("batch norm cannot train on 1 image a step at this size; raise --batch-size or --img-size") from error


def restate(network: nn.Module, batches: list[torch.Tensor], device: torch.device | str) -> None:
    """Re-estimates the batch-norm statistics of a network (fvcore's precise BN) from batches of images (N, C, H, W): means over the batches,
    and over the processes of a job.

    Dropout and stochastic depth are off, as they are in evaluation. Leaves the network in eval mode.
    """
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    if norms := get_bn_modules(network):
        with enough_images():
            update_bn_stats(network, (images.to(device) for images in batches), num_iters=len(batches))
        for norm in norms:
            distributed.mean(norm.running_mean)
            distributed.mean(norm.running_var)
    network.eval()


@torch.no_grad()
def top1(network: Callable[[torch.Tensor], torch.Tensor], loader: Iterable[Batch], device: torch.device | str) -> float:
    """Share of images in percent, of those of all processes, whose largest logit is their class. `network` must be in eval mode."""
    right, seen = torch.zeros((), dtype=torch.float64, device=device), 0
    for images, targets in loader:
        right += (network(images.to(device, non_blocking=True)).argmax(1) == targets.to(device, non_blocking=True)).sum()
        seen += len(targets)
    right, seen = distributed.total(torch.stack([right, torch.full_like(right, seen)])).tolist()
    return 100.0 * right / seen
