"""The jobs behind the commands. `prune`: source -> graph -> space -> training -> artifacts, top to bottom."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import os
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import torch
from rich.console import Console
from torch import fx, nn
from torch.utils.data import DataLoader

from . import artifacts, bench, computed, data, distributed, exports, hub, lookup, ranges, schema, stopping
from .budget import KINDS, Budget
from .config import Config, latency_share, of_result, resumed, write
from .cost import count_macs
from .device import check_compiler, pick_device
from .errors import MORE_MEMORY, UserError, is_out_of_memory
from .files import CannotWrite, cannot_write, check_name, locked, writing
from .graph import capture, to_device
from .handout import write_handout
from .latency import installed
from .methods import FROM_TRAINED, METHODS
from .methods.oneshot import OneShot
from .methods.several import Several
from .network_json import accept, foreign
from .plan import Plan, Space
from .program import Program
from .quantize import CALIBRATION_IMAGES, quantize
from .report import page
from .report.curves import Curves, check_log, start_log
from .report.facts import describe
from .report.tables import quantity
from .report.progress import TrainingDisplay, Watchers
from .source import Source, fit_head, is_run, load_source, short_name
from .teacher import NO_ONE, START, knows, load_teacher, start
from .train import checkpoint, loop
from .train.evaluate import top1
from .train.loop import first_images, fit, seed_everything, try_step
from .train.recipe import check, default_lr

#: Settings that depend on the data, where the user gave none: the digits are few and small.
EPOCHS = {"digits": 20}
IMG_SIZE = {"digits": 32}
DEFAULT_EPOCHS = 100
#: What `--latency` measured, in the folder of a run.
LATENCY = "latency.json"


def prune(config: Config, console: Console, *, resume: bool = False, dry_run: bool = False, trust: bool = True) -> list[dict[str, Any]]:
    """Compresses a model and writes the result; see `docs/commands.md` for what a run writes.

    Args:
        trust: whether the `args.yaml` of a run that goes on may name code that `config` does not, and the model may call operators that are on no list.

    Returns:
        For each budget what the closing table shows: {folder, facts, top1, bytes, differences, checked, failed}; nothing for a dry run, or
        where another process of the job writes.

    Raises:
        UserError: whatever the user can mend.
    """
    started = distributed.recall("folder")
    resume = resume or started is not None
    if resume:
        folder = Path(started) if started else old_folder(config)
        config = resumed(config, folder, trust)
    check_settings(config)
    device = pick_device(config.device)
    if config.sync_bn and distributed.WORLD > 1 and device.type == "cpu":
        raise UserError("--sync-bn needs GPUs: torch has no such batch norm for CPUs; leave it away")
    with ExitStack() as stack:
        if distributed.RANK == 0 and resume and not dry_run:
            stack.enter_context(locked(folder))
        distributed.join(device)
        if not resume and distributed.RANK == 0:
            new_folder(config)  # raises, before anything is loaded
        last = folder / "checkpoints" / "last" if resume else None
        state = checkpoint.load(last) if resume and last.exists() else None
        job = prepare(config, device, console, folder if resume else None, resuming=state is not None, trust=trust)
        if dry_run:
            if config.epochs:
                try_step(job.method, job.train, config, len(job.classes), job.teacher)
            console.print(f"dry run: the budget can be met, a step works, nothing was written. To train:\n  {config.command()}", soft_wrap=True)
            return []
        if not resume:  # another run may have taken the name since
            folder = Path(distributed.from_first(str(made_folder(config)) if distributed.RANK == 0 else ""))
        if distributed.RANK == 0 and not resume:
            begin(config, folder)
            stack.enter_context(locked(folder))
            if job.latency:
                with writing(folder) as aside:
                    (aside / LATENCY).write_text(json.dumps(asdict(job.latency)))
            distributed.remember("folder", str(folder))
        config.output = str(folder)
        with saying_how_to_go_on(config, folder):
            row = train(config, job, folder, state, console)
            distributed.leave()
            if distributed.RANK > 0:
                return []
            val = data.make_loader(job.splits.val, train=False, **job.loading)
            if config.teacher == START:  # it knows these classes
                with data.naming_images(val), console.status("measuring the network that the run started from"):
                    row = {**row, **dict.fromkeys([f"top1_start{ending}" for ending in job.method.parts], top1(job.teacher, val, job.device))}
            return [finish(config, budget, folder_of(folder, ending), ending, job, row, val, console)
                    for budget, ending in zip(job.budgets, job.method.parts)]


def begin(config: Config, folder: Path) -> None:
    """Writes the settings into a new run's folder, which goes again where that fails."""
    try:
        write(config, folder)
    except BaseException:
        folder.rmdir()
        raise


@contextmanager
def saying_how_to_go_on(config: Config, folder: Path) -> Iterator[None]:
    """Where a run is stopped, or cannot write, says what is kept and the command that goes on."""
    command = config.command("--resume")
    try:
        yield
    except CannotWrite as error:
        raise UserError(f"{error.problem}; {error.advice}, then go on with: {command}") from error
    except BaseException as error:
        kept = "the last checkpoint is kept" if (folder / "checkpoints" / "last").exists() else "no epoch was finished"
        # A signal may also break off a worker, or another process of the job, whose error is then the first to be seen.
        if isinstance(error, KeyboardInterrupt) or stopping.asked():
            raise UserError(f"stopped; {kept}, go on with: {command}") from None
        if is_out_of_memory(error) and not isinstance(error, UserError):
            raise UserError(f"{MORE_MEMORY}; {kept}, go on with: {command}") from error
        raise


class Job(NamedTuple):
    """All that a training needs, made from the settings. `loading` are the arguments of `data.make_loader` that every loader shares."""

    method: Any
    budgets: list[Budget]
    latency: lookup.Table | None
    teacher: nn.Module | None
    splits: data.Splits
    loading: dict[str, Any]
    preprocessing: dict[str, Any]
    train: DataLoader
    device: torch.device

    @property
    def classes(self) -> list[str]:
        return self.splits.class_names


def check_settings(config: Config) -> None:
    """Raises UserError for a setting that cannot be meant, before anything is loaded."""
    ranges.check(vars(config))
    if config.method not in METHODS:
        raise UserError(f"no --method {config.method}; choose from {', '.join(METHODS)}")
    if config.epochs == 0 and config.method != "s2h":
        raise UserError(f"--epochs 0 trains nothing: it cuts once, by importance; leave --method {config.method} away, or train for some epochs")
    if config.latency_format not in (here := installed()):
        raise UserError(f"no --latency-format {config.latency_format} here; choose from {', '.join(here)}")
    if config.method == "stp" and config.latency:
        raise UserError("--method stp explores more networks than can be timed: it takes no --latency; choose another method")
    if config.method == "dense" and (config.latency or config.budgets != [Budget(flops=1.0)]):
        raise UserError(f"--method dense cuts nothing; leave {asked(config)} away")
    if config.method != "s2h" and len(config.budgets) > 1:
        raise UserError(f"--flops {config.shares['flops']} names several budgets, which --method s2h alone trains in one run; give one")
    for kind, share in (item for budget in config.budgets for item in budget.shares.items()):
        if not 0 < share < 1 and config.method != "dense":
            raise UserError(f"--{kind} {share:g} is no share of the {KINDS[kind]}; give a number between 0 and 1, such as 0.35")
    check(config)
    check_log(config.log)
    if config.batch_size % distributed.WORLD:
        raise UserError(f"--batch-size {config.batch_size} cannot be shared by {distributed.WORLD} processes; give a multiple of their number")


def prepare(config: Config, device: torch.device, console: Console, folder: Path | None, resuming: bool, trust: bool) -> Job:
    """Model and data to method and loaders. What `config` leaves to model and data is filled in. `folder`: of a run that goes on; `trust`: as of `prune`."""
    if config.compile:
        check_compiler(device)
    splits = data.open_splits(config.data, val_fraction=config.val_fraction, skip_bad_images=config.skip_bad_images)
    classes = splits.class_names
    config.img_size = config.img_size or IMG_SIZE.get(config.data)
    seed_everything(config.seed, 0)
    if is_run(config.model) and not config.pretrained:
        raise UserError(f"--no-pretrained: '{config.model}' is a run, and has the weights that it ended with; give its model to start from random ones")
    source = load_source(config.model, num_classes=len(classes), pretrained=config.pretrained,
                         weights=Path(config.weights) if config.weights else None, img_size=config.img_size,
                         fetch=not resuming or config.teacher == START, drop=config.drop, drop_path=config.drop_path)
    fit_head(source, classes)
    if config.epochs is None:
        config.epochs = EPOCHS.get(config.data, DEFAULT_EPOCHS)
    if config.lr is None:
        config.lr = default_lr(config.batch_size)
    captured = capture(source.module, source.input_size)
    if captured.static_batch:
        raise UserError(f"{config.model} cannot be trained: {captured.notes[0]}; rewrite what fixes the batch in its forward")
    if unknown := foreign(captured.network):
        if not trust:
            raise UserError(f"{config.model} calls {', '.join(unknown)}: s2h loads no result with such an operator, since it does not know what it does; write that part "
                            "of the model with others, or add --trust: results are then loaded with --trust or s2h_cli.load(FOLDER, trust=True) alone")
        accept(unknown)
    network = to_device(captured.network, device)
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if config.divisor == "auto":
        config.divisor = pick_divisor(config, network, device, console)
    space = Space(network, tuple(config.exclude), config.divisor, config.prune_head_dim)
    budgets, table = limit(config, space, network, device, folder, console)
    for budget in budgets:
        budget.check(space)
    computed.check_kept(network, space, config.model)
    preprocessing = dict(input_size=source.input_size, mean=source.mean, std=source.std, interpolation=source.interpolation,
                         crop_pct=data.kept_crop(source.input_size, source.crop_pct))
    loading = dict(**preprocessing, batch_size=config.batch_size, workers=config.workers, flip=splits.flip, recipe=config, seed=config.seed)
    loader = data.make_loader(splits.train, train=True, **loading, rank=distributed.RANK, world=distributed.WORLD)
    teacher = pick_teacher(config, source, network, loader, classes, device, resuming)
    shared = data.shared_images(splits) if distributed.RANK == 0 else []
    for note in [*source.notes, *splits.notes, *shared, *captured.notes]:
        console.print(f"note: {note}", soft_wrap=True)
    processes = f", {distributed.WORLD} processes" if distributed.WORLD > 1 else ""
    sizes = data.class_sizes(splits.train)
    of = f" of {sizes[0]} to {sizes[1]} training images" if sizes else ""
    console.print(f"{source.name} on {config.data}: {len(splits.train)} training and {len(splits.val)} validation images, "
                  f"{len(classes)} classes{of}, input {'x'.join(map(str, source.input_size))}, {device}{processes}", soft_wrap=True)
    limits = [f"{share} of {quantity(space.full_costs[kind])} {KINDS[kind]}, smallest reachable {space.share(kind, space.least):.4f}"
              for kind, share in config.shares.items() if kind != "latency" and config.method != "dense"]
    console.print("; ".join([f"{len(space.groups)} groups, {space.size} prunable channels and heads", *(f"target {limit}" for limit in limits)]), soft_wrap=True)

    methods = FROM_TRAINED if config.teacher == START else METHODS
    kind = partial(methods[config.method], compile=config.compile, sync_bn=config.sync_bn) if config.epochs else OneShot
    method = kind(network, space, budgets[0]) if len(budgets) == 1 else Several(kind, network, space, budgets)
    return Job(method, budgets, table, teacher, splits, loading, preprocessing, loader, device)


def pick_divisor(config: Config, network: fx.GraphModule, device: torch.device, console: Console) -> int:
    """The channel multiple that pays on this device, at the tightest budget of MACs, or half of them."""
    spaces = {divisor: Space(network, tuple(config.exclude), divisor, config.prune_head_dim) for divisor in lookup.DIVISORS}
    asked = min((budget.flops or 0.5 for budget in config.budgets), default=0.5)
    budget = Budget(flops=max(asked, *(space.min_ratio for space in spaces.values())))
    where = lookup.Where(config.latency_format, config.latency_batch, device)
    with console.status("measuring which channel multiple pays"):
        divisor, found = lookup.best_divisor(to_device(copy.deepcopy(network), "cpu"), spaces, budget, where)
    times = ", ".join(f"{divisor}: {time:.2f}" for divisor, time in found.items())
    console.print(f"divisor {divisor}: time for the MACs in {where.format} at batch {where.batch}, of the whole network's, {times}", soft_wrap=True)
    return divisor


def limit(config: Config, space: Space, network: fx.GraphModule, device: torch.device, folder: Path | None,
          console: Console) -> tuple[list[Budget], lookup.Table | None]:
    """The budgets; with `--latency` after it was measured, or read from the folder of a run that goes on, and what was measured.

    Raises:
        UserError: the latency cannot be had.
    """
    if config.latency is None:
        return config.budgets, None
    where = lookup.Where(config.latency_format, config.latency_batch, device)
    with console.status(f"measuring latency in {where.format}, batch {where.batch}"):
        known = read_table(folder / LATENCY, network) if folder and (folder / LATENCY).exists() else None
        table = lookup.add_latency(to_device(copy.deepcopy(network), "cpu"), space, where, known)
    share, least = latency_share(config.latency, table.whole), table.least / table.whole
    if not least <= share < 1:
        raise UserError(f"--latency {config.latency} cannot be reached: the whole network takes {table.whole * 1e3:.3g} ms, the smallest {table.least * 1e3:.3g} ms, a share of {least:.3f}; "
                        "ask for something between, or lower --divisor")
    console.print(f"latency of {where.batch} image{'s' * (where.batch > 1)} in {where.format}: {table.whole * 1e3:.3g} ms; target {share:.3g} of it, smallest {least:.3g}; "
                  f"the model by layer is {table.error:.0%} off on average", soft_wrap=True)
    return [replace(budget, latency=share) for budget in config.budgets], table


def read_table(path: Path, network: fx.GraphModule) -> lookup.Table:
    """What an earlier session measured of the latency of this network.

    Raises:
        UserError: it cannot be read, or is of another network.
    """
    table = lookup.Table(**schema.check(schema.Latency, schema.read_json(path), str(path)))
    nodes = {node.name for node in network.graph.nodes}
    if len(table.nodes) != len(table.nanoseconds) or not nodes.issuperset(table.nodes):
        raise UserError(f"{path}: it was measured of another network; delete it, and the latency is measured anew")
    return table


def pick_teacher(config: Config, source: Source, network: nn.Module, loader: DataLoader, classes: list[str], device: torch.device,
                 resuming: bool) -> nn.Module | None:
    """The network of `--teacher`. Where a new run asks for none it is the start, if that is trained and knows the classes; `config` and the
    source's notes say so then."""
    learns = config.epochs and config.method != "dense"
    if config.teacher is None and source.may_know and learns and not resuming:
        own = start(network)
        with data.naming_images(loader):
            known = knows(own, loader, config.batch_size, len(classes), device)
        if known is None:
            return None
        config.teacher = START
        source.notes.append(f"it starts from a network that is right on {known:.0f} % of the first training images, and learns from it too; "
                            f"--teacher {NO_ONE}: it does not")
        return own
    if config.teacher in (None, NO_ONE):
        return None
    if config.teacher != START:
        return load_teacher(config.teacher, source, classes, device)
    if not source.may_know:
        raise UserError(f"--teacher {START}: the network that this run starts from has no trained weights for these classes; give it --weights, or "
                        f"--teacher {NO_ONE}")
    return start(network)


def train(config: Config, job: Job, folder: Path, state: dict | None, console: Console) -> dict[str, Any]:
    """Trains, or goes on from a state; returns the last epoch's row of `summary.csv`."""
    val = data.make_loader(job.splits.val, train=False, **job.loading, rank=distributed.RANK, world=distributed.WORLD)
    leads = distributed.RANK == 0  # of several processes the first alone writes

    def save(state: dict) -> None:
        if leads:
            if not (folder / "args.yaml").exists():  # somebody removed the folder
                write(config, folder)
            write_summary(folder / "summary.csv", state["rows"])
            checkpoint.save(folder / "checkpoints" / "last", state)

    if config.epochs:
        with data.naming_images(job.train, val), watching(config, folder, job.method, len(job.train), state, console) as watcher:
            rows = fit(job.method, job.train, val, config, watcher, classes=len(job.classes), teacher=job.teacher, state=state, save=save,
                       save_every=config.checkpoint_every)
    else:
        rows = [{"epoch": 0, **loop.ratios(job.method), **loop.evaluate(loop.networks(job.method), first_images(job.train, config.batch_size), val, job.device)}]
        if leads:
            write_summary(folder / "summary.csv", rows)
    bad = []
    for split in (job.splits.train, job.splits.val):
        split.bad.copy_(distributed.total(split.bad.int().to(job.device)).cpu() > 0)  # each process met those of its share
        bad += data.bad_images(split)
    if bad:
        console.print(f"note: {len(bad)} unreadable images were left out, the first is '{bad[0]}'", soft_wrap=True)
    return rows[-1]


@contextmanager
def watching(config: Config, folder: Path, method: Any, steps: int, state: dict | None, console: Console) -> Iterator[Watchers]:
    """Who watches a training: the terminal, TensorBoard, and what `--log` names; in the first process of several alone."""
    if distributed.RANK:
        yield Watchers([])
        return
    start_log(config, folder)
    done, position = (len(state["rows"]), state["position"]) if state else (0, 0)
    with ExitStack() as stack:
        display = stack.enter_context(TrainingDisplay(console, config.epochs, steps, done))
        curves = [stack.enter_context(Curves(folder_of(folder, ending), part, steps, done, position, ending)) for ending, part in method.parts.items()]
        yield Watchers([display, *curves])


def folder_of(folder: Path, ending: str) -> Path:
    """Where the result of a part of a method goes: the run's folder, or one in it for each of several budgets."""
    return folder / f"f{ending[1:]}" if ending else folder


def asked(config: Config) -> str:
    """The budgets as options."""
    return " ".join(f"--{kind} {share}" for kind, share in config.shares.items())


def finish(config: Config, budget: Budget, folder: Path, ending: str, job: Job, row: dict[str, Any], val: DataLoader, console: Console) -> dict[str, Any]:
    """Writes, verifies and measures every artifact of a trained part of a method: that of this ending of its columns in the last row."""
    part, input_size = job.method.parts[ending], job.preprocessing["input_size"]
    small = to_device(part.result(), "cpu").eval()
    facts = describe(part.plan, config.model, input_size, budget)
    counted = sum(count_macs(small, input_size).values())
    if counted != facts["macs"]["pruned"]:
        raise RuntimeError(f"the plan says {facts['macs']}, fvcore counts {counted}: please report this")
    if not budget.met(part.plan.space, part.plan.widths):
        raise UserError(f"the network is larger than the run's budget, at {facts['macs']['ratio']:.4f} of the MACs: its checkpoint may be damaged; start a new run")
    plan = {**facts, "kept_indices": part.plan.by_group(), "data": {**job.preprocessing, "classes": job.classes, "split": {"val_fraction": config.val_fraction}}}
    with console.status("writing and checking artifacts"):
        artifacts.save(folder, small, plan)
        with writing(folder) as aside:
            files, failed = exports.export_all(Program(small), aside, exports.EXPORTS, plan["data"])
            differences, wrong = compared(small, {artifacts.WEIGHTS: folder, **files}, input_size)
            failed += wrong
        if artifacts.WEIGHTS not in differences:
            raise UserError("; ".join(failed))
        # Accuracy is measured on the format that shares least code with us, of those that were written.
        checked = next(name for name in ("model.onnx", "model.ts", "model.pt2", artifacts.WEIGHTS) if name in differences)
        exported = accuracy_of(folder if checked == artifacts.WEIGHTS else folder / checked, val, trust=True)
        measured = {name.removeprefix("top1_").removesuffix(ending): value for name, value in row.items()
                   if name.startswith("top1_") and name.endswith(ending)}
        found = {name: {"difference": difference} for name, difference in differences.items()}
        found[checked]["top1"] = exported
        results = {"top1": {**measured, "exported": exported}, "files": found,
                   "bytes_before": sum(t.numel() * t.element_size() for t in part.network.state_dict().values())}
        artifacts.record(folder, results)
        timed = bench.pair(config.model, part.network, str(folder), small, facts["macs"]["ratio"],
                           lookup.Where(config.latency_format, config.latency_batch, job.device), limited=job.latency is not None)
        failed += [f"the time of {row['network']} cannot be measured ({row['failed']})" for row in timed["rows"] if "failed" in row]
        for share in bench.shares(timed["pairs"][0], timed["rows"]).values():
            if job.latency and share > budget.latency * (1 + lookup.OVER):
                console.print(f"note: it takes {share:.3f} of the whole network's time, more than the {budget.latency:.3g} that --latency allows; ask for less, on a "
                              "machine that does nothing else", soft_wrap=True)
        bench.keep(folder, timed)
        try:
            present(folder)
        except UserError as error:  # the artifacts are there all the same
            failed.append(f"report and model card cannot be written ({error})")
    return {"folder": folder, "facts": facts, "failed": failed, "latency": timed, **results, "bytes_after": (folder / "model.safetensors").stat().st_size}


def present(folder: Path) -> None:
    """Writes what people read of a result, by what is in its folder: the report; scripts and model card, where its run's settings are there."""
    page.write_report(folder)
    _, config = of_result(folder)
    if config is not None:
        write_handout(folder, config)


# ---------------------------------------------------------------------------------------------------------------------
# The other commands


def inspect(model: str, *, img_size: int | None = None, divisor: int = 8, exclude: tuple[str, ...] = (),
            prune_head_dim: bool = False) -> dict[str, Any]:
    """Facts (see `report.facts.describe`) of a run folder, or of a model that nothing was cut from; no weights are loaded.

    Raises:
        UserError: the model cannot be built, captured or pruned, or the folder holds no result.
    """
    if is_run(model):
        return computed.checked(hub.local(model)).plan
    source = load_source(model, pretrained=False, img_size=img_size)
    captured = capture(source.module, source.input_size)
    space = Space(captured.network, exclude, divisor, prune_head_dim)
    return {**describe(Plan.whole(space), model, source.input_size), "notes": [*source.notes, *captured.notes]}


def export(folder: Path, format: str, *, opset: int | None = None, batch: int | None = None, half: bool = False, int8: bool = False,
           spec: str | None = None, skip_bad_images: bool = False, workers: int = 4) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Writes the network of a run in one format, or in `all`, loads each file back and compares; `plan.json` keeps what was found.

    Args:
        opset, batch, half: see `Program`.
        int8: quantize to int8, calibrated on training images of `spec`; ONNX alone.
        spec: DATA, on whose validation images each file's accuracy is measured.

    Returns:
        {file name: {difference: the largest, relative to the largest logit, top1: in percent, with `spec`, bytes}}, with `spec` first the network's own
        top-1 and bytes, without a difference; and a line on each format
        whose exporter failed or whose file was wrong; what was there before stays.

    Raises:
        UserError: there is no such run, format or data, or it cannot be quantized.
    """
    if int8 and (spec is None or format not in ("onnx", "all") or half):
        raise UserError("--int8 needs --data DATA, images to calibrate on, and --format onnx, without --fp16")
    formats = ["onnx"] if int8 else list(exports.EXPORTS) if format == "all" else [format]
    plan, small, _ = computed.checked(folder)
    splits = loading = None
    if spec is not None:
        splits, loading = checked_data(spec, plan["data"], str(folder), skip_bad_images=skip_bad_images)
        loading |= dict(train=False, batch_size=batch or 64, workers=workers, flip=False)
    metadata = {**plan["data"], **({"batch": batch} if batch else {})}
    kinds = ["fp16"] * half + [f"b{batch}"] * bool(batch)  # what is no drop-in for the others has a name of its own
    tolerance = exports.HALF_TOLERANCE if half else exports.TOLERANCE
    with writing(folder) as aside:  # what turns out wrong takes the place of nothing
        files, failed = exports.export_all(Program(small, batch=batch, half=half, opset=opset), aside, formats, metadata, "-".join(kinds))
        if int8 and files:
            (source,) = files.values()
            file = aside / exports.file_of("onnx", "-".join(["int8", *kinds]))
            quantize(source, file, data.make_loader(data.some(splits.train, CALIBRATION_IMAGES), **loading), metadata, fixed=bool(batch))
            source.unlink()
            files, tolerance = {file.name: file}, sys.float_info.max  # its accuracy says what it is worth
        differences, wrong = compared(small, files, plan["input_size"], batch=batch, tolerance=tolerance)
    found = {name: {"difference": difference} for name, difference in differences.items()}
    artifacts.record(folder, {"files": found})  # whether or not their accuracy can be measured
    if spec is not None:
        for name, facts in found.items():
            facts["top1"] = accuracy_of(folder / name, data.make_loader(splits.val, **loading), trust=True)
        artifacts.record(folder, {"files": found})
        found = {artifacts.WEIGHTS: {"top1": accuracy_of(folder, data.make_loader(splits.val, **loading))}, **found}  # what the others are to be seen beside
    present(folder)
    return {name: {**facts, "bytes": (folder / name).stat().st_size} for name, facts in found.items()}, [*failed, *wrong]


def timed(items: list[str], **options: Any) -> dict[str, Any]:
    """`bench.bench`, whose figures the reports of the runs show."""
    with ExitStack() as stack:
        for home in {home_of(Path(item)) for item in items if is_run(item) and not item.startswith(hub.HUB)}:
            stack.enter_context(locked(home))
        found = bench.bench(items, **options)
        for folder in {hub.local(pair["after"]) for pair in found["pairs"]}:
            try:
                present(folder)
            except UserError as error:  # what was measured is shown all the same
                found["not_kept"].append(str(error))
    return found


def home_of(folder: Path) -> Path:
    """The folder of the run that a result is of: the one above for one of several budgets."""
    return folder.parent if (folder.parent / "args.yaml").exists() and not (folder / "args.yaml").exists() else folder


def compared(small: fx.GraphModule, files: dict[str, Path], input_size: tuple[int, int, int], **options: Any) -> tuple[dict[str, float], list[str]]:
    """The differences of `exports.check`, and a line on each file that is wrong, which goes. `files`: not yet in their place."""
    found, wrong = exports.check(small, files, input_size, **options)
    for name in wrong:
        if files[name].is_file():
            files[name].unlink()
    return found, [f"{name}: {text}" for name, text in wrong.items()]


def evaluate(item: str, spec: str, *, batch_size: int, workers: int, trust: bool = False, **split: Any) -> tuple[float, int]:
    """Top-1 accuracy in percent of a run folder or an exported file on the validation images of DATA, and their number. `split`: see `checked_data`.

    Raises:
        UserError: the artifact or the data cannot be read, or their classes differ.
    """
    artifact = hub.local(item)
    if artifact.is_dir():
        metadata = artifacts.read_plan(artifact, "data")["data"]
    else:
        exports.check_trust(artifact, trust)
        metadata = exports.read_metadata(artifact)
    if "classes" not in metadata:
        raise UserError(f"'{artifact}' does not tell its classes and preprocessing: s2h did not write it; give a run or its files")
    splits, loading = checked_data(spec, metadata, str(artifact), **split)
    val = data.make_loader(splits.val, train=False, batch_size=batch_size, workers=workers, flip=False, **loading)
    return accuracy_of(artifact, val, trust), len(splits.val)


def checked_data(spec: str, metadata: dict[str, Any], name: str, **options: Any) -> tuple[data.Splits, dict[str, Any]]:
    """DATA that an artifact can be run on, and how its images are prepared. Where `options` of `data.open_splits` are None, those of the run
    count: else the images that it validates on would be those that the run trained on.

    Raises:
        UserError: it cannot be read, or has other classes than the artifact's metadata.
    """
    loading = dict(metadata)
    classes = loading.pop("classes")
    loading.pop("batch", None)
    splits = data.open_splits(spec, **loading.pop("split", {}) | {name: value for name, value in options.items() if value is not None})
    if splits.class_names != classes:
        raise UserError(f"'{spec}' has other classes ({', '.join(splits.class_names[:5])}, ...) than '{name}' "
                        f"({', '.join(classes[:5])}, ...); give data of the same classes")
    return splits, loading


def accuracy_of(artifact: Path, val: DataLoader, trust: bool = False) -> float:
    """Top-1 in percent of a run folder or an exported file; one of a fixed batch gets the last images again where it lacks some."""
    run = exports.run_artifact(artifact, trust)
    batch = None if artifact.is_dir() else exports.read_metadata(artifact).get("batch")

    def padded(images: torch.Tensor) -> torch.Tensor:
        parts = [torch.cat([part, part[-1:].expand(batch - len(part), *part.shape[1:])]) for part in images.split(batch)]
        return torch.cat([run(part) for part in parts])[:len(images)]

    with data.naming_images(val):
        return top1(padded if batch else run, val, "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Small decisions


def new_folder(config: Config) -> Path:
    """A new run's folder: `-o`, or the next free `runs/NAME-fSHARE`.

    Raises:
        UserError: it exists, or cannot be made.
    """
    if not config.output:
        check_name(default_folder(config, 1))
        return next(p for i in itertools.count(1) if not os.path.lexists(p := default_folder(config, i)))
    folder = Path(config.output)
    check_name(folder)
    if os.path.lexists(folder):
        raise UserError(f"'{folder}' exists and is kept; add --resume to go on with it, or choose another folder with -o")
    return folder


def made_folder(config: Config) -> Path:
    """Makes `new_folder`, so that no other run takes it.

    Raises:
        UserError: it cannot be made, or `-o` exists by now.
    """
    while True:
        folder = new_folder(config)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise cannot_write(folder, error) from error


def old_folder(config: Config) -> Path:
    """The folder of an earlier run like this one, to go on with: `-o`, or the newest `runs/NAME-fSHARE`.

    Raises:
        UserError: there is none.
    """
    if config.output:
        check_name(Path(config.output))
    named = [Path(config.output)] if config.output else (default_folder(config, i) for i in range(9999, 0, -1))
    found = next((path for path in named if path.exists()), None)
    if found is None:
        what = f"folder '{config.output}'" if config.output else f"run '{default_folder(config, 1)}'"
        raise UserError(f"nothing to resume: no {what}; leave --resume away or name the run's folder with -o")
    return found


def default_folder(config: Config, number: int) -> Path:
    shares = "-".join(kind[0] + share.replace(",", "-") for kind, share in config.shares.items())
    stem = f"{short_name(config.model)}-{shares}"
    return Path("runs") / (stem if number == 1 else f"{stem}-{number}")


def write_summary(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes one row an epoch as CSV; terms that a phase of the training does not have stay empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with writing(path.parent) as aside, open(aside / path.name, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)

