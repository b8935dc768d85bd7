"""Training steps for `gpu.py`: whether they are right, what they take, and where they make the processor wait."""

from __future__ import annotations

import copy
import statistics
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch
from s2h_cli.config import Recipe
from s2h_cli.graph import capture, to_device
from s2h_cli.methods.s2h import Settings
from s2h_cli.plan import Space
from s2h_cli.source import load_source
from s2h_cli.train.loop import Training
from s2h_cli.train.recipe import AMP_DTYPES, default_lr, make_criterion, make_optimizer
from step import prepared
from torch import fx

FLOPS = 0.35
CLASSES = 1000
EPOCHS = 4  # of the schedule that steps are taken from
#: Steps before anything is measured, and steps whose waits or kernels are counted.
WARM_UP, COUNTED = 3, 3
#: Kernels that are named, those that take most time.
NAMED = 6
KINDS = ("plain", "moving", "alone")
#: By name, what a recipe then says.
PRECISIONS = {
    "fp32": {},
    "bf16, channels_last": {"amp": True, "channels_last": True},
    "fp16": {"amp": True, "amp_dtype": "float16"},
    "compile": {"compile": True},
}
#: What torch warns of where the processor waits for the GPU.
WAITS = "called a synchronizing CUDA operation"

Row = dict[str, Any]


class Setting(NamedTuple):
    """All that steps of one case share; the images and targets are on the device."""

    network: fx.GraphModule
    space: Space
    images: torch.Tensor
    targets: torch.Tensor


class Stepper(NamedTuple):
    """A training step, and the losses and gradients after one."""

    step: Callable[[], None]
    losses: Callable[[], dict[str, float]]
    gradients: Callable[[], list[torch.Tensor]]


def setting(model: str, px: int, batch: int, device: torch.device) -> Setting:
    """Of a model, images of so many pixels a side, and so many images a step."""
    source = load_source(model, num_classes=CLASSES, pretrained=False, img_size=px)
    network = to_device(capture(source.module, source.input_size).network, device)
    images = torch.randn(batch, *source.input_size, device=device)
    return Setting(network, Space(network), images, torch.randint(0, CLASSES, (batch,), device=device))


def stepper(kind: str, setting: Setting, options: Row) -> Stepper:
    """A step of a kind, on a copy of the network: "plain" is torch alone, the others are s2h's; with the
    optimizer's update in all.

    Args:
        options: of the recipe, see `PRECISIONS`.
    """
    recipe = Recipe(epochs=EPOCHS, batch_size=len(setting.images), lr=default_lr(len(setting.images)), **options)
    network = copy.deepcopy(setting.network).train()
    if recipe.channels_last:
        network = network.to(memory_format=torch.channels_last)
        setting = setting._replace(images=setting.images.to(memory_format=torch.channels_last))
    return (_plain if kind == "plain" else _ours)(kind, setting._replace(network=network), recipe)


def _plain(kind: str, setting: Setting, recipe: Recipe) -> Stepper:
    network, device = setting.network, setting.images.device.type
    optimizer, criterion = make_optimizer(network, recipe), make_criterion(recipe)
    scaler = torch.amp.GradScaler(device, enabled=recipe.amp and recipe.amp_dtype == "float16")
    run = torch.compile(network) if recipe.compile else network
    found: dict[str, torch.Tensor] = {}

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, AMP_DTYPES[recipe.amp_dtype], enabled=recipe.amp):
            loss = criterion(run(setting.images), setting.targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found["task"] = loss.detach()

    return Stepper(step, lambda: {name: float(loss) for name, loss in found.items()}, lambda: _gradients([optimizer]))


def _ours(kind: str, setting: Setting, recipe: Recipe) -> Stepper:
    progress = {"moving": 0.0, "alone": Settings.freeze}[kind]
    method = prepared(setting.network, setting.space, FLOPS, progress, compile=recipe.compile)
    training = Training(method, recipe, batches=10**6, classes=CLASSES)
    training.rows = [{}] * round(progress * EPOCHS)  # so many epochs are over

    def step() -> None:
        if kind == "moving":
            method.hard.plan.keep[:] = True  # as where channels change their order: the hard network is cut anew
        training.step(setting.images, setting.targets, training.position + 1)

    return Stepper(step, training.losses, lambda: _gradients(training.optimizers()))


def _gradients(optimizers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    return [
        p.grad
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Facts of a step


def right(run: Stepper) -> Row:
    """Whether losses and gradients are finite after some steps.

    Raises:
        ArithmeticError: they are not, or there are none.
    """
    for _ in range(WARM_UP):
        run.step()
    losses, gradients = run.losses(), run.gradients()
    odd = sum(not bool(gradient.isfinite().all()) for gradient in gradients)
    if odd or not gradients or not all(map(abs, losses.values())):
        raise ArithmeticError(f"losses {losses}, {odd} of {len(gradients)} gradients are not finite")
    return {"finite": True, "losses": losses}


def waits(run: Stepper) -> Row:
    """How often a step makes the processor wait for the GPU, by the line of s2h that asks for it."""
    run.step()
    with counting_waits() as found:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(COUNTED):
                run.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {
        "waits_a_step": sum(found.values()) / COUNTED,
        "by_line": {line: count / COUNTED for line, count in found.most_common()},
    }


@contextmanager
def counting_waits() -> Iterator[Counter[str]]:
    """Counts torch's warnings of waits by the innermost line of s2h that is running, or the innermost of all
    where none is.
    """
    found: Counter[str] = Counter()

    def count(message: Warning | str, *_: Any) -> None:
        if WAITS in str(message):
            frames = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith("warnings.py")]
            at = next((frame for frame in reversed(frames) if "s2h_cli" in Path(frame.filename).parts), frames[-1])
            found[f"{'/'.join(Path(at.filename).parts[-2:])}:{at.lineno} {at.line}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        yield found


def times(run: Stepper, count: int) -> Row:
    """Milliseconds of `count` steps one after the other, from one end to the next on the GPU (on a CPU by its
    clock), and peak memory in GB.
    """
    for _ in range(WARM_UP):
        run.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        for mark in marks:
            mark.record()
            if mark is not marks[-1]:
                run.step()
        torch.cuda.synchronize()
        spent = [one.elapsed_time(other) for one, other in pairwise(marks)]
    else:
        marks = [time.perf_counter()]
        for _ in range(count):
            run.step()
            marks.append(time.perf_counter())
        spent = [1e3 * (other - one) for one, other in pairwise(marks)]
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    return {"ms": statistics.median(spent), "least_ms": min(spent), "most_ms": max(spent), "peak_gb": peak}


def kernels(run: Stepper, ms: float) -> Row:
    """What the GPU does in a step of so many milliseconds: the share of time that it is busy, its kernels, and
    those that take most of the time.

    The profiler slows the processor down, not the kernels: so their time is taken as a share of a step without it.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(COUNTED):
            run.step()
        torch.cuda.synchronize()
    events = [
        event
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    spent: Counter[str] = Counter()
    for event in events:
        spent[event.name[:80]] += event.time_range.elapsed_us() / 1e3 / COUNTED
    return {
        "busy": _covered([(event.time_range.start, event.time_range.end) for event in events]) / 1e3 / COUNTED / ms,
        "kernels": len(events) / COUNTED,
        "ms_of": dict(spent.most_common(NAMED)),
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of a union of spans: kernels of several streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
