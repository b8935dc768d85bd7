"""The training loop: epochs, optimizer, schedule, evaluation, checkpoints. It knows nothing of a method."""

from __future__ import annotations

import difflib
import math
import random
import time
from dataclasses import dataclass
from typing import Any, Callable, Protocol

import numpy as np
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import DataLoader

from ..errors import UserError, why
from .evaluate import restate, top1

#: The schedules of timm that move step by step.
SCHEDULES = ("cosine", "tanh", "poly", "step", "multistep")
#: Images over which batch-norm statistics are re-estimated before an evaluation.
RESTATE_IMAGES = 1024


@dataclass(frozen=True)
class Recipe:
    """How to train. `lr` is the peak rate; the schedule runs over `epochs` with one epoch of warm-up in twenty."""

    epochs: int
    lr: float
    opt: str = "adamw"
    sched: str = "cosine"
    weight_decay: float = 0.05
    seed: int = 0
    amp: bool = False


class Watcher(Protocol):
    """What the loop tells while it runs."""

    def step(self, epoch: int, step: int, facts: dict[str, float]) -> None: ...
    def epoch(self, row: dict[str, Any]) -> None: ...


def fit(method: Any, train: DataLoader, val: DataLoader, recipe: Recipe, watcher: Watcher, *, state: dict | None = None,
        save: Callable[[dict], None] = lambda state: None) -> list[dict[str, Any]]:
    """Trains a method to the end of its schedule.

    Args:
        method: see `s2h_cli.methods`.
        train, val: loaders of images (N, C, H, W) and targets (N,).
        state: a state that an earlier call gave to `save`, to go on from.
        save: is given the whole state after every epoch: tensors and plain data.

    Returns:
        One row for each epoch: what `summary.csv` holds.

    Raises:
        UserError: the loss is no longer finite.
    """
    device = next(method.network.parameters()).device
    steps = len(train)
    optimizer = create_optimizer_v2(method.network, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
    scheduler, _ = create_scheduler_v2(optimizer, sched=recipe.sched, num_epochs=recipe.epochs, step_on_epochs=False,
                                       warmup_epochs=recipe.epochs // 20, warmup_lr=recipe.lr * 0.01, min_lr=recipe.lr * 0.01,
                                       updates_per_epoch=steps)
    rows: list[dict[str, Any]] = []
    if state is not None:
        try:
            method.load_state_dict(state["method"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"the checkpoint does not fit this model ({why(error)}); start a new run") from error
        rows = state["rows"]
    for epoch in range(len(rows), recipe.epochs):
        seed_everything(recipe.seed, epoch)
        started, images_seen = time.perf_counter(), 0
        sums: dict[str, float] = {}
        recent = []  # this epoch's first batches, for batch-norm statistics
        for network in method.networks().values():
            network.train()
        for step, (images, targets) in enumerate(train):
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            update = epoch * steps + step
            method.start_step(update / (recipe.epochs * steps))
            optimizer.zero_grad()
            facts = forward_backward(method, images, targets, recipe.amp)
            if not math.isfinite(sum(facts.values())):
                raise UserError(f"the loss became {sum(facts.values())} at epoch {epoch + 1}, step {step + 1} of {steps}; "
                                f"lower --lr ({recipe.lr:g}); the last checkpoint is as the epoch before left it")
            optimizer.step()
            method.finish_step()
            scheduler.step_update(update + 1)
            for name, value in facts.items():
                sums[name] = sums.get(name, 0.0) + value
            images_seen += len(targets)
            if len(recent) * len(targets) < RESTATE_IMAGES:
                recent.append(images)
            watcher.step(epoch, step, {**facts, "ratio": method.plan.ratio, "images_per_second":
                                       images_seen / (time.perf_counter() - started)})
        if epoch + 1 == recipe.epochs:
            method.start_step(1.0)  # however short the schedule, it ends with what its end asks for
        row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "ratio": method.plan.ratio}
        row |= {f"loss_{name}": value / (step + 1) for name, value in sums.items()}
        row |= evaluate(method, recent, val, device)
        row["seconds"] = time.perf_counter() - started
        rows.append(row)
        save({"method": method.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows})
        watcher.epoch(row)
    return rows


def check_names(opt: str, sched: str) -> None:
    """Raises UserError for an optimizer or a schedule that timm does not have, or that does not work here."""
    if opt.lower() not in list_optimizers():
        near = difflib.get_close_matches(opt.lower(), list_optimizers(), 3) or ["adamw", "sgd", "lamb"]
        raise UserError(f"no optimizer {opt!r}; timm has {', '.join(near)} and others")
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    try:
        create_optimizer_v2([weight], opt=opt, lr=0.1).step()
    except Exception as error:  # packages that are missing, second derivatives, a GPU: each says so in its own way
        raise UserError(f"--opt {opt} does not work here ({why(error)}); take another, such as adamw") from error
    if sched not in SCHEDULES:
        raise UserError(f"no schedule {sched!r}; choose from {', '.join(SCHEDULES)}")


def forward_backward(method: Any, images: torch.Tensor, targets: torch.Tensor, amp: bool) -> dict[str, float]:
    """Accumulates the gradients of one batch, and returns the terms of the loss.

    Raises:
        UserError: the memory does not suffice, or the batch is too small for batch norm.
    """
    try:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            terms = method.terms(images, targets, nn.CrossEntropyLoss())
        method.backward(terms)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory at {len(images)} images a step; lower --batch-size or --img-size, or pass --amp") from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(f"batch norm cannot train on {len(images)} image a step at this size; raise --batch-size or --img-size") from error
    return {name: term.item() for name, term in terms.items()}


def try_step(method: Any, loader: DataLoader, device: torch.device, amp: bool) -> None:
    """Runs one batch forward and backward, and changes no weight."""
    images, targets = next(iter(loader))
    method.start_step(0.0)
    for network in method.networks().values():
        network.train()
    forward_backward(method, images.to(device), targets.to(device), amp)


def evaluate(method: Any, batches: list[torch.Tensor], val: DataLoader, device: torch.device) -> dict[str, float]:
    """Top-1 in percent of each of a method's networks, after its batch-norm statistics were re-estimated on `batches`."""
    accuracy = {}
    for name, network in method.networks().items():
        restate(network, batches)
        accuracy[f"top1_{name}"] = top1(network, val, device)
    return accuracy


def first_batches(loader: DataLoader, device: torch.device) -> list[torch.Tensor]:
    """Images (N, C, H, W) of the first batches: enough to re-estimate batch-norm statistics on."""
    batches = []
    for images, _ in loader:
        batches.append(images.to(device))
        if len(batches) * len(images) >= RESTATE_IMAGES:
            break
    return batches


def seed_everything(seed: int, epoch: int) -> None:
    """Makes an epoch a function of (seed, epoch): so a resumed run goes on as if it had never stopped."""
    value = (seed * 1_000_003 + epoch) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
