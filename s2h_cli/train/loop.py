"""The training loop: epochs, updates, evaluation, checkpoints. It knows nothing of a method."""

from __future__ import annotations

import copy
import math
import random
import time
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, Callable, Iterator, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.utils.data import DataLoader

from .. import distributed
from ..config import Recipe
from ..errors import UserError, is_out_of_memory, why
from .evaluate import Batch, enough_images, restate, top1
from .recipe import AMP_DTYPES, make_criterion, make_ema, make_mixup, make_optimizer, make_scheduler

#: Images over which batch-norm statistics are re-estimated before an evaluation.
RESTATE_IMAGES = 1024
#: Steps on a GPU between two looks at the losses: each makes the processor wait.
LOOK_EVERY = 10


class Watcher(Protocol):
    """What the loop tells while it runs."""

    def step(self, epoch: int, step: int, facts: dict[str, float]) -> None: ...
    def epoch(self, row: dict[str, Any], seconds: float) -> None: ...


class Training:
    """All that changes while a method trains, and one step of it.

    Args:
        method: see `s2h_cli.methods`.
        batches: steps an epoch.
        classes: of the task.
        teacher: gives logits (N, classes) of images (N, C, H, W); the task's loss then has its distillation loss beside it.
    """

    def __init__(self, method: Any, recipe: Recipe, batches: int, classes: int, teacher: nn.Module | None = None):
        self.method, self.recipe, self.teacher, self.batches = method, recipe, teacher, batches
        self.device = next(method.network.parameters()).device
        self.updates = math.ceil(batches / recipe.grad_accum_steps)  # of the weights, an epoch
        self.optimizer = make_optimizer(method.network, recipe)
        self.scheduler = make_scheduler(self.optimizer, recipe, self.updates)
        self.mixup, self.criterion = make_mixup(recipe, classes), make_criterion(recipe)
        self.ema = make_ema(method.network, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp and recipe.amp_dtype == "float16")
        self.run = distributed.parallel(_Pass(method.network))
        self.rows: list[dict[str, Any]] = []  # one an epoch that has ended
        self.sums: dict[str, torch.Tensor] = {}  # of each term of the loss, in the epoch that runs
        self.counts: dict[str, int] = {}  # batches that had the term
        self.position = 0  # batches of it that are done
        self.pending: int | None = None  # the update whose gradients are being added up

    def step(self, images: torch.Tensor, targets: torch.Tensor, position: int) -> None:
        """One batch, the `position`-th of the epoch, from 1: forward, backward, and an update of the weights where one is due."""
        epoch, accumulate = len(self.rows), self.recipe.grad_accum_steps
        update = epoch * self.updates + (position - 1) // accumulate
        if self.pending != update:
            self.finish()  # where no image of its last batches could be read
        seed_everything(self.recipe.seed, epoch * self.batches + position, distributed.RANK)
        if self.pending is None:
            self.pending = update
            if self.method.start_step(update / (self.recipe.epochs * self.updates)):
                self.optimizer.state.clear()
                for group in self.optimizer.param_groups:
                    group.pop("step", None)  # where timm's lamb and adan count
            for optimizer in self.optimizers():
                optimizer.zero_grad()
        last = position % accumulate == 0 or position == self.batches
        for name, term in self.forward_backward(images, targets, last).items():
            self.sums[name] = self.sums.get(name, 0.0) + term.double()
            self.counts[name] = self.counts.get(name, 0) + 1
        if last:
            self.finish()
        self.position = position

    @property
    def lr(self) -> float:
        """The learning rate, of the last layer where it decays from one to the one below."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)

    def finish(self) -> None:
        """Changes the weights by the gradients that were added up, if there are any."""
        if self.pending is not None:
            self.update(self.pending)
            self.pending = None

    def forward_backward(self, images: torch.Tensor, targets: torch.Tensor, last: bool = True) -> dict[str, torch.Tensor]:
        """Accumulates the gradients of one batch, pass by pass, and returns the terms of the loss.

        Raises:
            UserError: the memory does not suffice, or the batch is too small for batch norm.
        """
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        targets = targets.to(self.device, non_blocking=True)
        try:
            if self.mixup:
                images, targets = self.mixup(images, targets)
            criterion, terms = self.taught(images), {}
            for run in (passes := self.method.passes):
                with nullcontext() if last and run == passes[-1] or isinstance(self.run, _Pass) else self.run.no_sync():
                    with self.autocast(), enough_images():
                        found = self.run(run, images, targets, criterion)
                    self.method.backward({name: self.scaler.scale(term / self.recipe.grad_accum_steps) for name, term in found.items()})
                terms |= {name: term.detach() for name, term in found.items()}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            half = max(1, self.recipe.batch_size // 2)
            raise UserError(f"out of memory at --batch-size {self.recipe.batch_size}; try --batch-size {half} --grad-accum-steps "
                            f"{2 * self.recipe.grad_accum_steps}" + ("" if self.recipe.amp else ", or --amp")) from error
        return terms

    def taught(self, images: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The task's loss of these images: with a teacher, half of it is KL(teacher || network)."""
        if self.teacher is None:
            return self.criterion
        with torch.no_grad(), self.autocast():
            wanted = self.teacher(images).float().log_softmax(1)
        return lambda logits, targets: 0.5 * self.criterion(logits, targets) + 0.5 * F.kl_div(
            logits.log_softmax(1), wanted, reduction="batchmean", log_target=True)

    def update(self, update: int) -> None:
        """Changes the weights by the gradients that were gathered."""
        for optimizer in self.method.optimizers():  # its parameters are few, and not among those that are averaged on the way
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    distributed.mean(parameter.grad)
        if self.recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.method.network.parameters(), self.recipe.clip_grad)
        for optimizer in self.optimizers():
            self.scaler.step(optimizer)
        self.scaler.update()
        self.scheduler.step_update(update + 1)
        if self.ema:
            self.ema.update(self.method.network, step=update + 1)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer, *self.method.optimizers()]

    def losses(self) -> dict[str, float]:
        """Means of the terms of the loss over the batches of the epoch so far that had them, of all processes.

        Raises:
            UserError: one is not finite.
        """
        found = {name: value / self.counts[name] for name, value in self.sums.items()}
        means = dict(zip(found, distributed.mean(torch.stack(list(found.values()))).tolist())) if found else {}
        if not math.isfinite(sum(means.values())):
            raise UserError(f"the loss became {sum(means.values())} at epoch {len(self.rows) + 1}, by step {self.position} of {self.batches}; "
                            f"lower --lr ({self.recipe.lr:g}); the last checkpoint is from before")
        return means

    def evaluate(self, batches: list[torch.Tensor], val: DataLoader) -> dict[str, float]:
        """Top-1 in percent of each of the method's networks, and of the hard one with averaged weights ("ema")."""
        found = {}
        if self.ema:
            with self.averaged():
                found = evaluate(self.hard_networks("ema"), batches, val, self.device)
        return {**evaluate(networks(self.method), batches, val, self.device), **found}

    def hard_networks(self, kind: str) -> dict[str, nn.Module]:
        return {kind + ending: part.networks()["hard"] for ending, part in self.method.parts.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network with averaged weights, for a while."""
        network, own = self.method.network, {name: tensor.clone() for name, tensor in self.method.network.state_dict().items()}
        network.load_state_dict(self.ema.module.state_dict())
        yield
        network.load_state_dict(own)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, AMP_DTYPES[self.recipe.amp_dtype], enabled=self.recipe.amp)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.recipe.channels_last else torch.preserve_format

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data, from which `load_state_dict` goes on bit for bit."""
        return {"network": self.method.network.state_dict(), "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None, "rows": self.rows,
                "sums": {name: distributed.mean(value.clone()) for name, value in self.sums.items()},
                "counts": self.counts, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state of `state_dict`, that `schema.Checkpoint` describes.

        Raises:
            UserError: it is of another model, or damaged.
        """
        try:
            self.method.network.load_state_dict(state["network"])
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            self.rows, self.counts, self.position = state["rows"], state["counts"], state["position"]
            self.sums = {name: state["sums"][name].to(self.device).double().reshape(()) for name in self.counts}
            for optimizer in self.optimizers():
                try_out(optimizer)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:  # what reads a damaged state raises
            raise UserError(f"the checkpoint does not fit this model ({why(error)}); start a new run") from error


@torch.no_grad()
def try_out(optimizer: torch.optim.Optimizer) -> None:
    """Takes a step and takes it back. `load_state_dict` accepts a state that has other shapes than the weights; a step does not."""
    state = copy.deepcopy(optimizer.state_dict())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)
        parameter.grad = None
    optimizer.load_state_dict(state)


class _Pass(nn.Module):
    """A forward pass of a method, as a module of the weights that it trains: what data parallelism wraps."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, run: Callable[..., dict[str, torch.Tensor]], *batch: Any) -> dict[str, torch.Tensor]:
        return run(*batch)


def fit(method: Any, train: DataLoader, val: DataLoader, recipe: Recipe, watcher: Watcher, *, classes: int, teacher: nn.Module | None = None,
        state: dict | None = None, save: Callable[[dict], None] = lambda state: None, save_every: int | None = None) -> list[dict[str, Any]]:
    """Trains a method to the end of its schedule.

    Everything random in a step follows from the seed, the step's number and the process: a run that goes on from a state is
    the run that never stopped.

    Args:
        method: see `s2h_cli.methods`. It ends with averaged weights, where these are asked for and the hard network is better with them.
        train, val: loaders from `s2h_cli.data.make_loader`.
        classes, teacher: see `Training`.
        state: a state that an earlier call gave to `save`, to go on from.
        save: is given the whole state after every epoch: tensors and plain data.
        save_every: steps between two more calls of `save`, inside an epoch.

    Returns:
        One row for each epoch: what `summary.csv` holds.

    Raises:
        UserError: the loss is no longer finite, the memory does not suffice, an image cannot be read, or the state is of another model.
    """
    training = Training(method, recipe, len(train), classes, teacher)
    if state is not None:
        training.load_state_dict(state)
    batches = first_images(train, recipe.batch_size)
    for epoch in range(len(training.rows), recipe.epochs):
        started, before = time.perf_counter(), training.position
        for network in networks(method).values():
            network.train()
        train.set_epoch(epoch, skip=training.position)
        for images, targets in train:
            training.step(images, targets, train.position)
            step = training.position
            saves = save_every and step % save_every == 0 and step % recipe.grad_accum_steps == 0
            # As long as widths follow masks the processor waits for these anyway, and masks that are not finite have no width.
            if saves or step % LOOK_EVERY == 0 or training.device.type == "cpu" or method.optimizers():
                speed = (step - before) * recipe.batch_size / (time.perf_counter() - started)
                watcher.step(epoch, step, {**training.losses(), **ratios(method), "images_per_second": speed})
            if saves:
                save(training.state_dict())
        training.finish()
        if epoch + 1 == recipe.epochs:
            method.start_step(1.0)  # however short the schedule, it ends with what its end asks for
        row = {"epoch": epoch + 1, "lr": training.lr, **ratios(method)}
        row |= {f"loss_{name}": value for name, value in training.losses().items()}
        row |= training.evaluate(batches, val)
        training.rows.append(row)
        training.sums, training.counts, training.position = {}, {}, 0
        watcher.epoch(row, time.perf_counter() - started)
        save(training.state_dict())
    last = training.rows[-1]
    if training.ema and sum(last["top1_ema" + ending] - last["top1_hard" + ending] for ending in method.parts) > 0:
        method.network.load_state_dict(training.ema.module.state_dict())
        for network in training.hard_networks("ema").values():
            restate(network, batches, training.device)
    return training.rows


def networks(method: Any) -> dict[str, nn.Module]:
    """Those of all parts of a method, by the ending of their columns."""
    return {kind + ending: network for ending, part in method.parts.items() for kind, network in part.networks().items()}


def ratios(method: Any) -> dict[str, float]:
    """Costs of each hard network as shares of the whole: its MACs ("ratio"), and what else the budget limits ("ratio_params")."""
    return {("ratio" if kind == "flops" else f"ratio_{kind}") + ending: part.plan.space.share(kind, part.plan.widths)
            for ending, part in method.parts.items() for kind in {"flops": None, **part.budget.shares}}


def evaluate(networks: dict[str, nn.Module], batches: list[torch.Tensor], val: DataLoader, device: torch.device) -> dict[str, float]:
    """Top-1 in percent of each network, after its batch-norm statistics were re-estimated on `batches` of images (N, C, H, W)."""
    accuracy = {}
    for name, network in networks.items():
        restate(network, batches, device)
        accuracy[f"top1_{name}"] = top1(network, val, device)
    return accuracy


def first_images(loader: DataLoader, batch_size: int) -> list[torch.Tensor]:
    """Images (N, C, H, W) of the first batches of the training, some 1,024 of each process's share: enough to re-estimate batch-norm statistics on."""
    return [images for images, _ in first_batches(loader, RESTATE_IMAGES * distributed.WORLD // batch_size)]


def first_batches(loader: DataLoader, count: int) -> Iterator[Batch]:
    """The first batches of the training, one at least; as many in every process."""
    loader.set_epoch(0)
    return islice(loader, max(1, count))


def try_step(method: Any, loader: DataLoader, recipe: Recipe, classes: int, teacher: nn.Module | None = None) -> None:
    """Runs one batch forward and backward, and changes no weight."""
    training = Training(method, recipe, len(loader), classes, teacher)
    images, targets = next(first_batches(loader, 1))
    method.start_step(0.0)
    for network in networks(method).values():
        network.train()
    training.forward_backward(images, targets)


def seed_everything(*numbers: int) -> None:
    """Makes all that is random from here on a function of these numbers."""
    value = int(np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
