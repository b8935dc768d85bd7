"""Shows a run while it trains: a live display on a terminal, one line an epoch elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..budget import KINDS


class Watchers:
    """Several watchers as one."""

    def __init__(self, watchers: list[Any]):
        self.watchers = watchers

    def step(self, epoch: int, step: int, facts: dict[str, float]) -> None:
        for watcher in self.watchers:
            watcher.step(epoch, step, facts)

    def epoch(self, row: dict[str, Any], seconds: float) -> None:
        for watcher in self.watchers:
            watcher.epoch(row, seconds)


class TrainingDisplay:
    """The loop's watcher. Use as a context manager around the training."""

    def __init__(self, console: Console, epochs: int, steps: int, done: int = 0):
        self.console = console
        self.epochs, self.steps = epochs, steps
        self.accuracy = "soft – hard –"
        self.live = None
        if console.is_terminal:
            self.live = Progress(TextColumn("{task.description}"), BarColumn(bar_width=12), TextColumn("{task.fields[facts]}"),
                                 TimeRemainingColumn(), console=console)
            self.task = self.live.add_task(f"epoch {done + 1}/{epochs}", total=epochs * steps, completed=done * steps, facts="")

    def __enter__(self) -> "TrainingDisplay":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def step(self, epoch: int, step: int, facts: dict[str, float]) -> None:
        if self.live:
            losses = " ".join(f"{name} {value:.2f}" for name, value in facts.items() if name != "images_per_second" and "ratio" not in name)
            self.live.update(
                self.task, completed=epoch * self.steps + step,
                description=f"epoch {epoch + 1}/{self.epochs}\nstep {step}/{self.steps}",
                facts=f"loss {losses}\n{self.accuracy}  ratio {_ratios(facts, 3)}  "
                      f"{facts['images_per_second']:.0f} img/s")

    def epoch(self, row: dict[str, Any], seconds: float) -> None:
        self.accuracy = top1 = _accuracies(row)
        losses = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in row.items() if name.startswith("loss_"))
        self.console.print(f"epoch {row['epoch']}/{self.epochs}  loss {losses}  {top1}  ratio {_ratios(row, 4)}  {seconds:.1f} s",
                           soft_wrap=True)


def _accuracies(row: dict[str, Any]) -> str:
    """`soft 97.21% hard 93.04%`, or for several budgets `soft 97.21,97.21% hard 84.12,93.04%`."""
    of_kind: dict[str, list[str]] = {}
    for name, value in row.items():
        if name.startswith("top1_"):
            of_kind.setdefault(name.split("_")[1], []).append(f"{value:.2f}")
    return " ".join(f"{kind} {','.join(values)}%" for kind, values in of_kind.items())


def _ratios(facts: dict[str, Any], digits: int) -> str:
    """`0.3496`, or for several budgets `0.1499,0.3496`; of other costs behind it, as `0.3712 params 0.2998`."""
    of_kind: dict[str, list[str]] = {}
    for name, value in facts.items():
        if name.startswith("ratio"):
            kind = next((kind for kind in KINDS if f"_{kind}" in name), "")
            of_kind.setdefault(kind, []).append(f"{value:.{digits}f}")
    return " ".join(f"{kind} {','.join(values)}".strip() for kind, values in of_kind.items())
