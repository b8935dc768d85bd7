"""TensorBoard curves, and two tables of a line an epoch: `widths.csv`, the width of each group, and `gates.csv`, how the gates are distributed."""

from __future__ import annotations

import csv
import importlib.util
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from ..config import Config
from ..errors import UserError, why
from ..files import read_text, writing, written
from ..schema import LIMITS, shown
from ..shown import in_spreadsheet

LOGS = ("wandb",)
WIDTHS, GATES = "widths.csv", "gates.csv"
#: Equal parts of 0 to 1 in which `gates.csv` counts.
BINS = 20


class Curves:
    """A watcher that writes TensorBoard's files into `tensorboard/` of the run. Use as a context manager around the training.

    Args:
        folder: of the run.
        part: of a method, see `s2h_cli.methods`.
        steps: an epoch.
        done, position: epochs of earlier sessions, and steps of the one after; what was written of later ones goes.
        ending: of the columns that are this part's.
    """

    def __init__(self, folder: Path, part: Any, steps: int, done: int = 0, position: int = 0, ending: str = ""):
        self.folder, self.part, self.steps, self.next, self.ending = folder, part, steps, done * steps + position + 1, ending
        sizes = {WIDTHS: len(part.plan.space.groups), GATES: BINS}
        self.widths, self.gates = (read_table(folder / name, columns)[1][:done] for name, columns in sizes.items())

    def __enter__(self) -> "Curves":
        with written(self.folder):
            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.next)
        return self

    def __exit__(self, *_: Any) -> None:
        with written(self.folder):
            self.writer.close()

    def step(self, epoch: int, step: int, facts: dict[str, float]) -> None:
        with written(self.folder):
            for name, value in facts.items():
                kind = "train" if name == "images_per_second" or "ratio" in name else "loss"
                self.writer.add_scalar(f"{kind}/{name}", value, epoch * self.steps + step)

    def epoch(self, row: dict[str, Any], seconds: float) -> None:
        with written(self.folder):
            at = row["epoch"] * self.steps
            for name, value in row.items():
                if name.startswith("top1_") and name.endswith(self.ending):
                    self.writer.add_scalar(f"top1/{name.removeprefix('top1_').removesuffix(self.ending)}", value, at)
            if "top1_soft" + self.ending in row:
                self.writer.add_scalar("top1/soft minus hard", row["top1_soft" + self.ending] - row["top1_hard" + self.ending], at)
            self.writer.add_scalar("train/lr", row["lr"], at)
            self.writer.add_scalar("train/seconds an epoch", seconds, at)
            groups = self.part.plan.space.groups
            shares = self.part.expected_widths() / np.array([group.size for group in groups])
            self.widths.append(shares.tolist())
            gates = self.part.gates_now().detach().float().cpu()
            self.gates.append(torch.histc(gates, BINS, 0, 1).tolist())
            self.writer.add_histogram("gates", gates, at)
            # One row a group, in the order of the network, one column an epoch; white is whole.
            image = torch.tensor(self.widths, dtype=torch.float32).T[None]
            self.writer.add_image("width of each group over the epochs", image.repeat_interleave(8, 1).repeat_interleave(8, 2), at)
            self.writer.flush()
        with writing(self.folder) as aside:
            write_table(aside / WIDTHS, [group.name for group in groups], self.widths)
            write_table(aside / GATES, [f"{i / BINS:.2f} to {(i + 1) / BINS:.2f}" for i in range(BINS)], self.gates)


def write_table(path: Path, columns: list[str], rows: list[list[float]]) -> None:
    """One row an epoch, from 1."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["epoch", *map(in_spreadsheet, columns)])
        table.writerows([i, *(f"{value:.4g}" for value in row)] for i, row in enumerate(rows, 1))


def read_table(path: Path, columns: int | None = None) -> tuple[list[str], list[list[float]]]:
    """Columns and rows of `write_table`; nothing where there is no such file.

    Args:
        columns: how many there must be, beside the epoch.

    Raises:
        UserError: it is no such table.
    """
    if not path.exists():
        return [], []
    names, rows = read_csv(path)
    if not all(math.isfinite(value) for row in rows for value in row):
        raise _no_table(path, "it holds values that are not finite")
    if columns not in (None, len(names) - 1):
        raise _no_table(path, f"it has {len(names) - 1} columns beside the epoch, not {columns}")
    return names[1:], [row[1:] for row in rows]


def read_csv(path: Path) -> tuple[list[str], list[list[float]]]:
    """Columns and rows of a table of numbers; what is empty is NaN.

    Raises:
        UserError: it is no such table.
    """
    try:
        columns, *rows = csv.reader(read_text(path, LIMITS[".csv"]).splitlines())
        if any(len(row) != len(columns) for row in rows):
            raise ValueError("its rows have different lengths")
        return columns, [[float(value or "nan") for value in row] for row in rows]
    except (ValueError, csv.Error) as error:
        raise _no_table(path, why(error)) from error


def _no_table(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: it is no table of numbers ({shown(reason)}); a program may have changed it: delete it, and what it shows is left out")


def check_log(name: str | None) -> None:
    """Raises UserError for a `--log` that is unknown or whose package is missing."""
    if name is not None and name not in LOGS:
        raise UserError(f"no --log {name}; choose from {', '.join(LOGS)}")
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(f"--log {name} needs its package; install it with: pip install {name}")


def start_log(config: Config, folder: Path) -> None:
    """Sends what TensorBoard gets to where `--log` says, too."""
    if config.log == "wandb":
        import wandb

        try:
            wandb.init(project="s2h", name=folder.name, dir=str(folder), config=asdict(config), sync_tensorboard=True)
        except Exception as error:  # no login, no network: its own errors
            raise UserError(f"--log wandb does not start ({why(error)}); log in with: wandb login, or set WANDB_MODE=offline") from error
