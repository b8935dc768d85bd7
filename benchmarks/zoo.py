"""Every architecture of torchvision and of timm, through capture, surgery, training and every export.

    python benchmarks/zoo.py [--models GLOB] [--jobs N] [--missing] [--no-exports]
    python benchmarks/zoo.py --output FILE      # in an environment of another torch
    python benchmarks/zoo.py --also FILE        # and then: its totals go into docs/zoo.md

The models stand in `zoo_models.txt`, beside this file: all of torchvision's classifiers, and of each model file of timm the
smallest and the one of median size; `--pick` chooses them anew, for a new release of timm. Each model runs in a process of its
own, under a limit of time and of memory, with random weights, and random
kept sets at half the MACs. Rows go into `s2h_cli/zoo.json` (what `s2h models` shows) as they come, and `docs/zoo.md` is written
from it, so that a part of the zoo can be run again. Torch-Pruning, if it is installed, runs on the same models.

The largest models (above 300 M parameters) need some 20 GB, one at a time, and an allocator that gives memory back:
MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import functools
import importlib.metadata
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import numpy as np
import timm
import torch
from timm.models._registry import _model_to_module

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import helpers  # noqa: E402
import zoo_page  # noqa: E402

from s2h_cli import artifacts, exports  # noqa: E402
from s2h_cli.cost import count_macs  # noqa: E402
from s2h_cli.errors import UserError  # noqa: E402
from s2h_cli.graph import capture  # noqa: E402
from s2h_cli.budget import Budget  # noqa: E402
from s2h_cli.masks import fit_budget  # noqa: E402
from s2h_cli.plan import Plan, Space  # noqa: E402
from s2h_cli.program import Program  # noqa: E402
from s2h_cli.rebuild import rebuild, skeleton  # noqa: E402
from s2h_cli.source import TORCHVISION, load_source, torchvision_names  # noqa: E402

MODELS = Path(__file__).with_name("zoo_models.txt")
DATA = ROOT / "s2h_cli" / "zoo.json"
PAGE = ROOT / "docs" / "zoo.md"
LIMIT_S, LIMIT_TP_S, LIMIT_BYTES = 1500, 30, 20 << 30
RATIO = 0.5
TOLERANCE = 1e-4
LARGE_MACS = 5e9  # a model above it is checked at half its resolution
CLASSES = 10


# ---------------------------------------------------------------------------------------------------------------------
# One model


def examine(spec: str, img_size: int | None = None, formats: bool = True) -> dict[str, Any]:
    """Runs every column of the table for one model.

    Returns:
        The model's row. `failed` maps a column to what went wrong, `skipped` to why it does not apply; `refused` is the error that
        a user would see.
    """
    row: dict[str, Any] = {"failed": {}, "skipped": {}}
    try:
        small, batches = compare(row, spec, img_size)
    except UserError as error:
        return {**row, "refused": str(error)}
    # The network that was cut is out of memory by now: exporters need it.
    if not formats:
        row["skipped"] |= dict.fromkeys(exports.EXPORTS, "not run")
    else:
        program = Program(small)
        with torch.no_grad():
            expected = [(x, small(x), max(TOLERANCE, 10 * rounding(small, x))) for x in (helpers.images(small, batch) for batch in batches)]
        for name in exports.EXPORTS:
            attempt(row, name, lambda: export(program, name, expected))
    return row


def compare(row: dict[str, Any], spec: str, img_size: int | None) -> tuple[torch.fx.GraphModule, list[int]]:
    """Fills in the facts of a model and every column but those of the formats.

    Returns:
        The small network, and the sizes of batch that it takes.

    Raises:
        UserError: the model cannot be built, captured or pruned.
    """
    source = load_source(spec, num_classes=CLASSES, pretrained=False, img_size=img_size)
    row["parameters"] = helpers.parameter_count(source.module)
    row["input"] = list(source.input_size)
    start = time.perf_counter()
    captured = capture(source.module, source.input_size)
    row["capture_s"] = time.perf_counter() - start
    row["notes"] = captured.notes
    start = time.perf_counter()
    space = Space(captured.network)
    row["label_s"] = time.perf_counter() - start
    row.update(groups=len(space.groups), channels=space.size, macs=space.full_macs, min_ratio=space.min_ratio,
               unknown={op: len(nodes) for op, nodes in space.unknown.items()})
    macs, least = space.macs.by_row(space.full), space.macs.by_row(space.least)
    row["frozen"] = float(macs[macs == least].sum() / macs.sum())
    row["why"] = [[f.reason, f.channels] for f in sorted(space.frozen, key=lambda f: -f.channels)[:3]]
    if space.full_macs > LARGE_MACS and img_size is None:
        size = source.input_size[1]
        for half in (size // 64 * 32, size // 28 * 14):  # multiples of most networks' strides, and of patches of 14
            try:
                smaller = load_source(spec, num_classes=CLASSES, pretrained=False, img_size=half)
                found = capture(smaller.module, smaller.input_size)
            except UserError:  # it does not take that size
                continue
            source, captured, space = smaller, found, Space(found.network)
            row["checked_at"] = half
            break
    network = captured.network
    helpers.randomise(network)
    helpers.settle(network)
    plan = random_plan(space)
    row["ratio"] = plan.ratio
    small = rebuild(network, plan)
    x = helpers.images(network, captured.static_batch or 3)
    with torch.no_grad():
        y = small(x)
        tolerance = max(TOLERANCE, 10 * rounding(small, x))
    if tolerance > TOLERANCE:
        row["tolerance"] = tolerance

    def same_graph() -> None:
        close(network(x).detach(), source.module.eval()(x).detach(), tolerance)  # each drops its graph, which can be gigabytes

    def hard() -> None:
        identical(helpers.hard_output(network, skeleton(network), plan, x).detach(), small(x).detach())

    def reloaded() -> None:
        with tempfile.TemporaryDirectory() as folder:
            artifacts.save(folder, small, {})
            identical(artifacts.load(folder)(x), y)

    def zeroed() -> str | None:
        exact = helpers.exact_groups(network, space)
        if not any(exact):
            return "no exact group"
        close_error(helpers.error_of_cutting(network, helpers.random_plan(space, 3, share=0.5, only=exact)), tolerance)

    def masked_norms() -> None:
        close_error(helpers.error_of_cutting(network, plan, masked=True), tolerance)

    def macs_agree() -> None:
        for net, widths in ((small, plan.widths), (source.module, space.full)):
            planned, counted = helpers.planned_macs(space, widths), helpers.fvcore_macs(net, source.input_size)
            apart = {kind: (planned.get(kind), counted.get(kind)) for kind in {*planned, *counted} if planned.get(kind) != counted.get(kind)}
            assert not apart, f"(plan, fvcore): {apart}"

    def parameters_agree() -> None:
        assert space.parameters.total(plan.widths) == helpers.parameter_count(small)

    def trains() -> None:
        net = copy.deepcopy(small).train()
        net(x).square().mean().backward()
        bad = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not bad, f"no finite gradient: {', '.join(bad[:3])}"

    def batches() -> str | None:
        if captured.static_batch:
            return f"batch {captured.static_batch} only"
        close(small(x[:1]), y[:1], tolerance)

    columns: dict[str, Callable[[], str | None]] = {
        "graph": same_graph, "hard": hard, "reloaded": reloaded, "zeroed": zeroed, "masked norms": masked_norms,
        "MACs": macs_agree, "parameters": parameters_agree, "gradients": trains, "batches": batches}
    # With gradients on where a network meets its original or its slices: torch.matmul rounds by whether its operands require any,
    # and torch.nn.MultiheadAttention takes, without, a path of its own that fvcore cannot count.
    for name, check in columns.items():
        with torch.set_grad_enabled(name in ("graph", "hard", "MACs", "gradients")):
            attempt(row, name, check)
    helpers.settle(small)
    return small, [captured.static_batch] if captured.static_batch else [1, 5]


def random_plan(space: Space, seed: int = 0) -> Plan:
    """Random widths at half the MACs, or the nearest above that can be reached, and random channels of each group."""
    random = np.random.default_rng(seed)
    value = [np.sort(random.random(len(group.candidates)))[::-1] for group in space.groups]
    widths = fit_budget(space, value, Budget(flops=max(RATIO, space.min_ratio)))
    return Plan.from_widths(space, widths, random.random(space.size))


def attempt(row: dict[str, Any], name: str, check: Callable[[], str | None]) -> None:
    try:
        skipped = check()
        if skipped:
            row["skipped"][name] = skipped
    except Exception as error:
        row["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def rounding(network: torch.fx.GraphModule, x: torch.Tensor) -> float:
    """How far float32 takes a network from its float64 logits, relative: random weights can make a network chaotic. 0 where it
    does not run in float64."""
    try:
        exact = copy.deepcopy(network).double()(x.double())
    except RuntimeError:
        return 0.0
    return helpers.relative_error(network(x).double(), exact)


def export(program: Program, name: str, expected: list[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
    """Writes one format, loads it back and compares: `expected` holds images, logits and tolerance."""
    with tempfile.TemporaryDirectory() as folder:
        run = exports.run_artifact(exports.export(program, folder, name), trust=True)
    for x, y, tolerance in expected:
        close(run(x), y, tolerance)


def identical(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a, b), f"differs by {helpers.relative_error(a, b):.1e}"


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    close_error(helpers.relative_error(a, b), tolerance)


def close_error(error: float, tolerance: float) -> None:
    assert error <= tolerance, f"relative error {error:.1e}"


def torch_pruning(spec: str, img_size: int | None = None) -> dict[str, Any]:
    """What Torch-Pruning makes of the same model, used as its README shows: half of the channels, the head left whole."""
    import torch_pruning as tp

    source = load_source(spec, num_classes=CLASSES, pretrained=False, img_size=img_size)
    model, x = source.module, torch.randn(1, *source.input_size)
    before = sum(count_macs(model, source.input_size).values())
    head = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == CLASSES]
    start_s = time.perf_counter()
    pruner = tp.pruner.BasePruner(model, x, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5, ignored_layers=head)
    pruner.step()
    seconds = time.perf_counter() - start_s
    shape = tuple(model(x).shape)
    assert shape == (1, CLASSES), f"the output has shape {shape}"
    return {"works": True, "ratio": sum(count_macs(model, source.input_size).values()) / before, "seconds": seconds}


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class Task(NamedTuple):
    """One function of one model, in a process of its own."""

    model: str
    function: Callable[[str], dict[str, Any]]
    limit_s: float


def start(task: Task) -> tuple[multiprocessing.Process, Connection]:
    """Forks, which saves importing everything once more; the parent has one thread only, so that it may."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        try:
            sender.send(task.function(task.model))
        except BaseException as error:
            sender.send({"died": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})

    process = fork.Process(target=child)
    process.start()
    sender.close()
    return process, receiver


def run_all(tasks: list[Task], jobs: int) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Results as they come; {"died": why} where a process did not come back."""
    waiting, running = tasks[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop()
            process, receiver = start(task)
            running[receiver] = task, process, time.monotonic() + task.limit_s
        wait(running, timeout=1)
        for receiver, (task, process, deadline) in list(running.items()):
            late = time.monotonic() > deadline
            if not receiver.poll() and not late:
                continue
            try:
                result = receiver.recv() if receiver.poll() else {"died": f"more than {task.limit_s:.0f} s"}
            except EOFError:
                result = {"died": "killed, as for want of memory"}
            process.kill()
            process.join()
            del running[receiver]
            yield task, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", metavar="GLOB", default="*", help="Those of zoo_models.txt that match; the rows of the others stay.")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="Processes at a time; each uses one core.")
    parser.add_argument("--missing", action="store_true", help="Leave out what the data has already.")
    parser.add_argument("--no-exports", action="store_true", help="Leave out the columns of the formats, which take most of the time.")
    parser.add_argument("--also", metavar="FILE", type=Path, help="Take the totals of another release's --output into the page, and stop.")
    parser.add_argument("--pick", action="store_true", help="Choose the models anew from the installed timm and torchvision, and stop.")
    parser.add_argument("--output", type=Path, default=DATA, help="The data; the page is written for the default only.")
    args = parser.parse_args()
    if args.pick:
        MODELS.write_text("\n".join(pick()) + "\n")
        return
    data = json.loads(args.output.read_text()) if args.output.exists() else {"models": {}}
    if args.also:
        other = json.loads(args.also.read_text())
        data["also"] = {**data.get("also", {}), other["versions"]["torch"]: zoo_page.brief(other)}
        write(data, DATA)
        PAGE.write_text(zoo_page.page(data))
        return
    names = [name for name in MODELS.read_text().split() if fnmatch.fnmatchcase(name, args.models)]
    rows = data["models"] if args.missing else {}
    ours = functools.partial(examine, formats=not args.no_exports)
    tasks = [Task(name, ours, LIMIT_S) for name in names if not {"macs", "refused"} & rows.get(name, {}).keys()]
    if importlib.util.find_spec("torch_pruning"):
        tasks += [Task(name, torch_pruning, LIMIT_TP_S) for name in names if "torch_pruning" not in rows.get(name, {})]
    for done, (task, result) in enumerate(run_all(tasks, args.jobs), 1):
        row = data["models"].setdefault(task.model, {})
        if task.function is torch_pruning:
            row["torch_pruning"] = {"works": False, "error": result["died"]} if "died" in result else result
        else:
            data["models"][task.model] = {**result, **{k: row[k] for k in ("torch_pruning",) if k in row}}
        data["versions"] = versions()
        write(data, args.output)
        print(f"{done}/{len(tasks)} {task.model}: {summary(task, result)}", flush=True)
    if args.output == DATA:
        PAGE.write_text(zoo_page.page(data))


def summary(task: Task, result: dict[str, Any]) -> str:
    if "died" in result or "refused" in result:
        return result.get("died") or result["refused"]
    if task.function is torch_pruning:
        return "Torch-Pruning works"
    return "; ".join(f"{name}: {found}" for name, found in result["failed"].items()) or "ok"


def write(data: dict[str, Any], path: Path) -> None:
    """One line a model, figures of four digits."""
    rounded = json.loads(json.dumps(data), parse_float=lambda text: float(f"{float(text):.4g}"))
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rounded["models"].items())]
    also = f'"also": {json.dumps(rounded["also"])},\n' if "also" in rounded else ""
    path.write_text(f'{{\n"versions": {json.dumps(rounded["versions"])},\n{also}"models": {{\n' + ",\n".join(lines) + "\n}\n}\n")


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "onnx", "onnxruntime", "onnxscript")}
    if importlib.util.find_spec("torch_pruning"):
        found["torch-pruning"] = importlib.metadata.version("torch-pruning")
    return {**found, "python": platform.python_version(), "machine": f"{platform.machine()}, one core a model, no GPU"}


def pick() -> list[str]:
    """Of each model file of timm the smallest classifier and the one of median size, among those below 30 M parameters, else
    100 M, where that leaves two; and torchvision's classifiers. timm's `test_` models, made to be tiny, are left out."""
    sizes: dict[str, dict[str, int]] = defaultdict(dict)
    for name in timm.list_models(exclude_filters=["test_*"]):
        with torch.device("meta"):
            model = timm.create_model(name)
        if not name.endswith("_enc"):  # encoders of tokens, which give no logits
            sizes[_model_to_module[name]][name] = helpers.parameter_count(model)
    names = []
    for file in sorted(sizes):
        by_size = sorted(sizes[file], key=lambda name: (sizes[file][name], name))
        usual = next(part for limit in (30e6, 100e6, math.inf)
                     if len(part := [name for name in by_size if sizes[file][name] < limit]) > 1 or part == by_size)
        names += dict.fromkeys([by_size[0], usual[len(usual) // 2]])
    return names + [TORCHVISION + name for name in torchvision_names()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    main()
