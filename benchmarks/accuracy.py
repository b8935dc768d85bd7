"""Accuracy of every method at the same budget: from a trained network (scenario A) and from random weights (B), at equal epochs and
at equal cost.

    python benchmarks/accuracy.py fashion FOLDER                       # runs what is missing of a table, then prints it
    python benchmarks/accuracy.py fashion FOLDER --scenario A --rows s2h uniform --seeds 0 1

FOLDER holds the data set as an image folder with `train/` and `val/`; of each class the first images count, as many as the table says.
A cell is one training run. Its row goes into `benchmarks/accuracy/TABLE.csv` as soon as it ends, and a cell that is there is not run again.

In scenario A all start from one dense network, whose cost is not counted, and which teaches all of them (as it does by default in
`s2h prune`), but for the rows that say "not taught". In scenario B there is no such network.

Cost is in units: one forward and backward of the whole network over the training images once, by PyTorch's counter of operations
(`torch.utils.flop_counter`) on every tenth step (EPSD's scoring, on its first eight steps, is not in it); seconds are the processor's.
`soft` is the accuracy of the soft network, or of STP's whole one, and `gap`, `js` and `l2` what lies between it and the hard one at that
time: for S2H just before the widths freeze, for others the end of the run. The rows of Torch-Pruning need `pip install torch-pruning`.

Rows of one seed see the same augmented images in the same order. These, and what the teacher says of them, are kept in memory (2 to 4 GB) for
the rows that follow. So loading is not in the seconds; the teacher's passes are, with the time that they took.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Iterator

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from s2h_cli.budget import Budget
from s2h_cli.config import Recipe
from s2h_cli.data import ImageSet, Splits, make_loader, open_splits
from s2h_cli.graph import capture
from s2h_cli.methods import FROM_TRAINED, METHODS
from s2h_cli.methods.s2h import TRAINED, Settings
from s2h_cli.plan import Space
from s2h_cli.source import Source, load_source
from s2h_cli.teacher import start
from s2h_cli.train.loop import evaluate, first_images, fit, seed_everything

RESULTS = Path(__file__).parent / "accuracy"
METER_EVERY = 10


@dataclass(frozen=True)
class Row:
    """One line of a table: a method and how it trains. `cost`: the row at whose cost this one runs, for as many epochs as that buys."""

    method: str = "s2h"
    settings: dict[str, Any] = field(default_factory=dict)  #: S2H's, where they are not the defaults
    taught: bool = True  #: the dense network teaches beside the targets (scenario A)
    cost: str | None = None


@dataclass(frozen=True)
class Table:
    model: str
    img_size: int
    train: int  #: images of each class
    val: int
    epochs: int
    dense_epochs: int
    flops: tuple[float, ...] = (0.15, 0.35)
    lr: float = 4e-3


HALF_RESNET10 = f"{Path(__file__).with_name('half_resnet10.py')}:half_resnet10"
TABLES = {
    "fashion": Table(HALF_RESNET10, 32, 600, 600, epochs=16, dense_epochs=20),
    "cifar10": Table(HALF_RESNET10, 32, 600, 600, epochs=16, dense_epochs=20),
    "tin100": Table(HALF_RESNET10, 32, 100, 50, epochs=16, dense_epochs=20),
    "digits": Table("resnet10t", 32, 1000, 1000, epochs=10, dense_epochs=20),
}

CONTROLS = ("uniform", "random", "magnitude", "epsd", "torch-pruning", "torch-pruning, global")
ROWS = {
    "s2h": Row(),
    "stp": Row("stp"),
    "dmp": Row("dmp"),
    **{name: Row(name) for name in CONTROLS},
    **{f"{name} = cost": Row(name, cost="s2h") for name in CONTROLS},
    **{f"{name}, not taught": Row(name, taught=False) for name in ("s2h", "stp", "dmp", *CONTROLS)},
}
#: What training on gives the whole network, and what each part of S2H gives: run when they are named.
WHOLE = {"dense": Row("dense")}
ABLATIONS = {
    "s2h, u without L": Row(settings={"hears": ("hard", "mask")}),
    "s2h, u without m_hat": Row(settings={"hears": ("task", "mask")}),
    "s2h, u without step 2": Row(settings={"hears": ("task", "hard")}),
    "s2h, u by R alone": Row(settings={"hears": ()}),
    "s2h, hard network not trained": Row(settings={"teaches": False}),
    "dmp, cut halfway": Row(settings={"hears": ("task",), "teaches": False, "ramp": 0.4, "freeze": 0.5, "floor": 0.0}),
    "s2h, masks to the end": Row(settings={"freeze": 1.0}),
    "s2h, no floor": Row(settings={"floor": 0.0}),
    "s2h, frozen at a third, no floor": Row(settings={"ramp": 0.2, "freeze": 1 / 3, "floor": 0.0}),
    **{f"s2h, frozen at a thirtieth{cost}": Row(settings={"ramp": 0.02, "freeze": 1 / 30, "mask_speed": 300.0}, cost="s2h" if cost else None)
       for cost in ("", " = cost")},
}

#: What S2H was before, from random weights: without a floor, its gates fading into the mask from 0.25 to 0.4 of the schedule (commit ac01bef, whose
#: names of rows the commands have).
FADING = "s2h, fading"

ALL_ROWS = ROWS | WHOLE | ABLATIONS

COLUMNS = ("scenario", "row", "flops", "seed", "epochs", "hard", "soft", "gap", "js", "l2", "ratio", "units", "seconds", "widths", "torch", "timm", "command")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("data")
    parser.add_argument("--scenario", choices=("A", "B"), nargs="+", default=["A", "B"])
    parser.add_argument("--rows", nargs="*", choices=ALL_ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--flops", type=float, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    table, path = TABLES[args.table], RESULTS / f"{args.table}.csv"
    splits = first_of_each_class(open_splits(args.data), table)
    for seed in args.seeds:  # outermost, since its images are kept
        for scenario in args.scenario:
            for flops in args.flops or table.flops:
                for name in args.rows:
                    if (scenario == "A" or ALL_ROWS[name].taught) and find(path, scenario, name, flops, seed) is None:
                        found = run_cell(table, splits, path, scenario, name, flops, seed)
                        append(path, {"scenario": scenario, "row": name, "flops": flops, "seed": seed, **found,
                                      "torch": torch.__version__, "timm": timm.__version__,
                                      "command": f"python benchmarks/accuracy.py {args.table} FOLDER --scenario {scenario} --flops {flops:g} --seeds {seed} --rows '{name}'"})
    print(verdict(path) + "\n\n" + summary(path, [*ROWS, *WHOLE]))
    print("\nAblations:\n\n" + summary(path, list(ABLATIONS)))
    print("\nBefore:\n\n" + summary(path, [row["row"] for row in read(path) if row["row"].startswith(FADING)], FADING))


def run_cell(table: Table, splits: Splits, path: Path, scenario: str, name: str, flops: float, seed: int) -> dict[str, Any]:
    """Trains one cell; what `COLUMNS` says of it."""
    row = ALL_ROWS[name]
    source, network = fresh(table, splits, seed)
    teacher = None
    if scenario == "A":
        network.load_state_dict(dense_weights(table, splits, path.with_name(f"{path.stem}-dense.pt")))
        teacher = start(network) if row.taught else None
    whole = copy.deepcopy(network)
    if row.method in OUTSIDE:
        full = Space(network).full_macs
        network = OUTSIDE[row.method](source, network, flops)
        method = METHODS["dense"](network, Space(network), Budget(flops=1.0))
        ratio = method.space.full_macs / full
    else:
        make = (FROM_TRAINED if teacher else METHODS)[row.method]
        if row.settings:
            make = partial(make, settings=replace(TRAINED if teacher else Settings(), **row.settings))
        method, ratio = make(network, Space(network), Budget(flops=flops)), None
    epochs = table.epochs
    if row.cost:
        paid, alone = find(path, scenario, row.cost, flops, seed), find(path, scenario, name.removesuffix(" = cost"), flops, seed)
        if paid is None or alone is None:
            sys.exit(f"'{name}' needs the rows '{row.cost}' and '{name.removesuffix(' = cost')}' first")
        epochs = math.ceil(float(paid["units"]) / (float(alone["units"]) / int(alone["epochs"])))
    freeze = getattr(getattr(method, "settings", None), "freeze", 1.0)
    watcher = Watcher(method, whole, source, len(splits.train) // 64, epochs, freeze)
    started = CLOCK()
    found = train(method, table, splits, source, epochs, seed, watcher, teacher)
    return {"epochs": epochs, "hard": found["top1_hard"], **watcher.apart, "ratio": ratio or method.plan.ratio, "units": watcher.units(),
            "seconds": round(CLOCK() - started), "widths": " ".join(map(str, method.plan.widths))}


def fresh(table: Table, splits: Splits, seed: int) -> tuple[Source, Any]:
    seed_everything(seed, 0)
    source = load_source(table.model, num_classes=len(splits.class_names), pretrained=False, img_size=table.img_size)
    return source, capture(source.module, source.input_size).network


def train(method: Any, table: Table, splits: Splits, source: Source, epochs: int, seed: int, watcher: "Watcher",
          teacher: nn.Module | None = None) -> dict[str, Any]:
    """The last epoch's row of `fit`."""
    loading = dict(input_size=source.input_size, mean=source.mean, std=source.std, interpolation=source.interpolation,
                   crop_pct=source.crop_pct, batch_size=64, workers=0, flip=splits.flip, seed=seed)
    if seed not in LOADERS:
        LOADERS.clear()
        LOADERS[seed] = Kept(make_loader(splits.train, train=True, **loading)), list(make_loader(splits.val, train=False, **loading))
    batches, val = LOADERS[seed]
    watcher.val.extend(val)
    watcher.images = first_images(batches, 64)
    return fit(method, batches, watcher.val, Recipe(epochs=epochs, lr=table.lr, seed=seed), watcher,
               classes=len(splits.class_names), teacher=teacher and Remembering(teacher, batches, watcher))[-1]


def dense_weights(table: Table, splits: Splits, path: Path) -> dict[str, torch.Tensor]:
    """Of the network that scenario A starts from; trained once and kept."""
    if not path.exists():
        source, network = fresh(table, splits, 0)
        method = METHODS["dense"](network, Space(network), Budget(flops=1.0))
        watcher = Watcher(method, copy.deepcopy(network), source, len(splits.train) // 64, table.dense_epochs)
        row = train(method, table, splits, source, table.dense_epochs, 0, watcher)
        print(f"dense network: {row['top1_hard']:.2f}", flush=True)
        path.parent.mkdir(exist_ok=True)
        torch.save(method.result().state_dict(), path)  # with the statistics that it was evaluated with
    return torch.load(path, weights_only=True)


class Clock:
    """Seconds of the processor, but for what does not count."""

    def __init__(self):
        self.outside = 0.0

    def __call__(self) -> float:
        return time.process_time() - self.outside


CLOCK = Clock()


class Kept:
    """A training loader whose first epochs are loaded once, and the logits of the teacher on them. Loading does not count."""

    EPOCHS = 24

    def __init__(self, loader: Any):
        self.loader, self.epochs, self.logits, self.epoch, self.position = loader, {}, {}, 0, 0

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        assert skip == 0
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches = self.epochs.get(self.epoch)
        if batches is None:
            self.loader.set_epoch(self.epoch)
            started = time.process_time()
            batches = list(self.loader)
            CLOCK.outside += time.process_time() - started
            if self.epoch < self.EPOCHS:
                self.epochs[self.epoch] = batches
        for self.position, batch in enumerate(batches, 1):
            yield batch


class Remembering(nn.Module):
    """The teacher, which is asked once for each batch that is kept; again where its operations are counted."""

    def __init__(self, teacher: nn.Module, batches: Kept, watcher: "Watcher"):
        super().__init__()
        self.teacher, self.batches, self.watcher = teacher, batches, watcher

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        known, key = self.batches.logits, (self.batches.epoch, self.batches.position)
        if key in known and not self.watcher.counting:
            logits, seconds = known[key]
            CLOCK.outside -= seconds
            return logits
        started = time.process_time()
        logits = self.teacher(images)
        known[key] = logits, time.process_time() - started
        return logits


#: Of the seed that runs: the training images, and the validation batches.
LOADERS: dict[int, tuple[Kept, list]] = {}


class Batches(list):
    """The validation batches; only the first of them, as long as no one reads the accuracy."""

    whole = False

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return super().__iter__() if self.whole else iter(self[:1])


class Watcher:
    """The loop's watcher: counts the operations of one step in every few, and compares soft and hard network.

    Args:
        network: the whole one, which a unit of cost is a forward and backward of.
        steps: of an epoch.
        freeze: share of the schedule after which S2H has one network.
    """

    def __init__(self, method: Any, network: nn.Module, source: Source, steps: int, epochs: int, freeze: float = 1.0):
        with FlopCounterMode(display=False) as self.counter:
            network.train()(torch.randn(64, *source.input_size)).square().mean().backward()
        self.unit, self.steps, self.counted, self.counting = self.counter.get_total_flops(), steps, [], False
        self.method, self.epochs, self.apart, self.val = method, epochs, {}, Batches()
        self.last_apart = math.ceil(freeze * steps * epochs)  # the step after which the networks are compared
        self.images: list[torch.Tensor] = []  # on which batch-norm statistics are re-estimated

    def step(self, epoch: int, step: int, facts: dict[str, float]) -> None:
        if self.counting:
            self.counter.__exit__(None, None, None)
            self.counted.append(self.counter.get_total_flops())
        if epoch * self.steps + step == self.last_apart < self.epochs * self.steps:
            self.compare()
        self.counting = step % METER_EVERY == METER_EVERY - 1 and step < self.steps
        if self.counting:  # the next step
            self.counter = FlopCounterMode(display=False).__enter__()
        self.val.whole = epoch + 1 == self.epochs

    def epoch(self, row: dict[str, Any], seconds: float) -> None:
        if row["epoch"] == self.epochs:
            self.compare()

    def compare(self) -> None:
        """The soft network, or the whole one, with the hard one. It leaves no trace: statistics are re-estimated before they are used."""
        networks, started = self.method.networks(), time.process_time()
        if len(networks) == 2:
            kind, = networks.keys() - {"hard"}
            self.val.whole = True
            found = evaluate(networks, self.images, self.val, self.images[0].device)
            js, l2 = gap(networks[kind], networks["hard"], self.val)
            self.apart = {"soft": found[f"top1_{kind}"], "gap": found[f"top1_{kind}"] - found["top1_hard"], "js": js, "l2": l2}
            for network in networks.values():
                network.train()
        CLOCK.outside += time.process_time() - started

    def units(self) -> float:
        return statistics.mean(self.counted) / self.unit * self.epochs


@torch.no_grad()
def gap(soft: nn.Module, hard: nn.Module, loader: Any) -> tuple[float, float]:
    """Between the two networks' outputs, means over the images: Jensen-Shannon divergence of the probabilities in nats, and the
    Euclidean distance of the logits."""
    js, l2 = [], []
    for images, _ in loader:
        s, h = soft(images), hard(images)
        p, q = s.softmax(1), h.softmax(1)
        middle = ((p + q) / 2).log()
        js.append(((p * (p.log() - middle)).sum(1) + (q * (q.log() - middle)).sum(1)) / 2)
        l2.append((s - h).norm(dim=1))
    return torch.cat(js).mean().item(), torch.cat(l2).mean().item()


def first_of_each_class(splits: Splits, table: Table) -> Splits:
    """The first images of each class, as many as the table says."""

    def first(images: ImageSet, count: int) -> ImageSet:
        seen: dict[int, int] = defaultdict(int)
        kept = []
        for i in range(len(images)):
            target = images.source[i][1]
            seen[target] += 1
            if seen[target] <= count:
                kept.append(images.source[i])
        return ImageSet(kept, images.origin, images.skip_bad)

    return replace(splits, train=first(splits.train, table.train), val=first(splits.val, table.val))


def torch_pruned(source: Source, network: Any, flops: float, everywhere: bool) -> Any:
    """Cut by Torch-Pruning (its L2 norm over the layers of a group), in small steps until the budget is met. `everywhere`: channels
    compete across the whole network, not each layer's among themselves."""
    import torch_pruning

    model, image = source.module.eval(), torch.zeros(1, *source.input_size)
    model.load_state_dict(network.state_dict())
    full = torch_pruning.utils.count_ops_and_params(model, image)[0]
    pruner = torch_pruning.pruner.BasePruner(
        model, image, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), iterative_steps=400, pruning_ratio=1.0,
        max_pruning_ratio=0.95, global_pruning=everywhere, ignored_layers=[model.get_classifier()])
    while torch_pruning.utils.count_ops_and_params(model, image)[0] > flops * full:
        pruner.step()
    return capture(model, source.input_size).network


OUTSIDE = {"torch-pruning": partial(torch_pruned, everywhere=False), "torch-pruning, global": partial(torch_pruned, everywhere=True)}


# ---------------------------------------------------------------------------------------------------------------------
# The rows on disk


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def find(path: Path, scenario: str, name: str, flops: float, seed: int) -> dict[str, str] | None:
    wanted = (scenario, name, f"{flops:g}", str(seed))
    return next((r for r in read(path) if (r["scenario"], r["row"], r["flops"], r["seed"]) == wanted), None)


def append(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.4g}" if isinstance(value, float) and name not in ("hard", "soft", "gap") else
                         f"{value:.2f}" if isinstance(value, float) else value for name, value in found.items()})
    print({name: found.get(name) for name in COLUMNS[:12]}, flush=True)


def verdict(path: Path) -> str:
    """A Markdown table of `ROWS` on disk: how far S2H at the same seeds is above each, in bold where that is more than two standard errors of the mean."""
    cells: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in read(path):
        cells[row["scenario"], row["flops"]][row["row"]].append(row)
    columns = sorted(column for column in cells if cells[column]["s2h"])
    lines = ["| S2H is above | " + " | ".join(f"{scenario} {flops}" for scenario, flops in columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for name in ROWS:
        found = [above(cells[column][name], cells[column]["s2h"]) for column in columns]
        if name != "s2h" and any(found):
            lines.append(f"| {name} | " + " | ".join(bold(values) for values in found) + " |")
    return "\n".join(lines)


def above(rows: list[dict[str, str]], ours: list[dict[str, str]]) -> list[float]:
    """How far the hard network of `ours` is above that of `rows`, by seed."""
    hard = {row["seed"]: float(row["hard"]) for row in ours}
    return [hard[row["seed"]] - float(row["hard"]) for row in rows if row["seed"] in hard]


def bold(values: list[float]) -> str:
    text = with_error(values) if values else ""
    sure = len(values) > 2 and abs(statistics.mean(values)) > 2 * standard_error(values)
    return f"**{text}**" if sure else text


def summary(path: Path, names: list[str], against: str = "s2h") -> str:
    """A Markdown table of the rows of these names on disk: means over the seeds; of the hard network's accuracy, and of how far S2H (the row `against`)
    at the same seeds is above it, with the standard error of the mean."""
    cells: dict[tuple, list[dict[str, str]]] = defaultdict(list)
    for row in read(path):
        cells[row["scenario"], row["flops"], row["row"]].append(row)
    lines = ["| scenario | flops | row | seeds | epochs | hard, % | S2H is above it by | soft, % | soft - hard | JS | L2 | cost, units | seconds |", "|" + "---|" * 13]
    for (scenario, flops, name), rows in sorted(cells.items(), key=lambda cell: (cell[0][:2], -mean(cell[1], "hard"))):
        if name not in names:
            continue
        ahead = above(rows, cells[scenario, flops, against]) if name != against else []
        shown = [f"{mean(rows, c):.{d}f}" if any(row[c] for row in rows) else "" for c, d in (("soft", 2), ("gap", 2), ("js", 4), ("l2", 2), ("units", 1), ("seconds", 0))]
        lines.append(f"| {scenario} | {flops} | {name} | {len(rows)} | {rows[0]['epochs']} | {with_error([float(row['hard']) for row in rows])} | "
                     f"{with_error(ahead) if ahead else ''} | {' | '.join(shown)} |")
    return "\n".join(lines)


def with_error(values: list[float]) -> str:
    error = f" ± {standard_error(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def mean(rows: list[dict[str, str]], column: str) -> float:
    return statistics.mean(float(row[column]) for row in rows if row[column])


if __name__ == "__main__":
    main()
