"""The job behind `s2h bench`: networks timed against each other, and why time did not fall where MACs did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import torch
from torch import fx, nn

from . import computed, exports, fresh, hub, latency, lookup, schema
from .config import runs_code
from .device import pick_device
from .errors import UserError
from .files import writing
from .graph import capture
from .source import is_run, load_source

FILE = "bench.json"
#: Kinds of operators (`latency.KINDS`) that memory bounds, not arithmetic: they have few MACs for each byte that they move.
MEMORY_BOUND = ("depthwise convolutions", "norms", "the rest, element by element")
#: How much larger than the share of the MACs the share of the time may be before it is explained.
SLACK = 0.05
#: The share of the excess that such operators must have to be named as a reason.
NOTABLE = 0.25
#: Channels that the kernels of CPUs and GPUs like to work on at once.
LIKED = 16


def bench(items: list[str], *, formats: list[str], batches: list[int], img_size: int | None, device: str, threads: int | None, seconds: float,
          told: Callable[[str], None], trust: bool = False) -> dict[str, Any]:
    """Times run folders (and what they were cut from), models and exported files against each other (see `latency.compare`). What is found
    of a run is kept in its folder.

    Returns:
        {place, rows, pairs, not_kept, notes}, as plain data: not_kept are lines on folders that cannot be written to, notes on what was not timed; each pair is
        {before, after, macs, kinds, reasons}: names of networks, the share of the MACs, the seconds that a batch of the largest size that was timed spends in each kind of operator (`latency.by_kind`) before and after, and sentences.

    Raises:
        UserError: an item cannot be loaded, or there is no such format.
    """
    unknown = [name for name in formats if name not in latency.FORMATS]
    if unknown:
        raise UserError(f"no --format {unknown[0]}; choose from {', '.join(latency.FORMATS)}")
    if lacks := [name for name in formats if name not in latency.installed()]:
        raise UserError(f"--format {lacks[0]} needs a package that is not installed: pip install {lacks[0]}")
    where, threads = pick_device(device), threads or torch.get_num_threads()
    subjects, pairs, notes = {}, [], []
    for item in items:
        found, said = subjects_of(item, img_size, trust)
        notes += said
        subjects |= {subject.name: subject for subject in found}
        if len(found) == 2:
            before, after = (computed.macs(subject.network) for subject in found)
            pairs.append({"before": found[0].name, "after": found[1].name, "macs": after / before})
    rows = latency.compare(list(subjects.values()), formats, batches, where, threads, seconds, told)
    if not rows:
        raise UserError(f"{', '.join(items)}: nothing of it can be timed in {', '.join(formats)}; choose the --format of the file, or give a run")
    pairs = [pair for pair in pairs if times(pair, rows)]  # of the others the rows say why
    for pair in pairs:
        batch = max(batch for _, batch in times(pair, rows))
        both = [subjects[pair[which]] for which in ("before", "after")]
        before, after = (latency.by_kind(subject.network, batch, where, threads) for subject in both)
        pair["kinds"] = {kind: [before.get(kind, 0.0), after.get(kind, 0.0)] for kind in latency.KINDS if kind in before | after}
        pair["reasons"] = reasons(pair, rows, both[1].network)
    found = {"place": latency.describe(where, threads), "rows": rows, "pairs": pairs, "not_kept": [], "notes": notes}
    for pair in pairs:
        own = [row for row in rows if row["network"] in (pair["before"], pair["after"])]
        try:
            keep(hub.local(pair["after"]), {"place": found["place"], "rows": own, "pairs": [pair]})
        except UserError as error:  # what was measured is shown all the same
            found["not_kept"].append(str(error))
    return found


def pair(name: str, whole: fx.GraphModule, small_name: str, small: fx.GraphModule, macs: float, where: lookup.Where,
         limited: bool) -> dict[str, Any]:
    """A network and what it was cut to: data as `bench` returns them, without kinds and reasons.

    Args:
        limited: by `--latency`; so they are timed as when the widths were chosen, in a fresh process and for as long, and not for an instant.
    """
    before, after = f"{name}, {whole.meta['input_size'][-1]} px", small_name
    subjects = lookup.subjects_of({before: whole, after: small})
    rows = fresh.call(where.rows, subjects, lookup.READING) if limited else where.rows(subjects, 0.0)
    return {"place": latency.describe(where.device, torch.get_num_threads()), "rows": rows,
            "pairs": [{"before": before, "after": after, "macs": macs, "kinds": {}, "reasons": []}]}


def keep(folder: Path, found: dict[str, Any]) -> None:
    """Writes figures into a run folder, where `read` and the report find them."""
    with writing(folder) as aside:
        (aside / FILE).write_text(json.dumps(found, indent=1))


def read(folder: Path) -> dict[str, Any] | None:
    """The figures that `keep` wrote last, if any."""
    path = folder / FILE
    if not path.exists():
        return None
    found = schema.check(schema.Bench, schema.read_json(path), str(path))
    for i, row in enumerate(found["rows"]):
        if "timing" not in row and "failed" not in row:
            schema.refuse(str(path), ("rows", i), "neither a time nor why there is none")
    return found


def subjects_of(item: str, img_size: int | None, trust: bool = False) -> tuple[list[latency.Subject], list[str]]:
    """What `s2h bench` times of an item: of a run folder what it was cut from, and the result. And notes on what of it is not timed."""
    if is_run(item):
        folder = hub.local(item)
        plan, network, _ = computed.checked(folder, trust)
        size = plan["input_size"]
        small = latency.Subject(item, size, network)
        if runs_code("model", plan["model"]) and not trust:
            return [small], [f"{item} is timed alone: it was cut from '{plan['model']}', code that its plan.json names; --trust builds that too, if you know who made it"]
        whole = whole_network(plan)
        said, so = plan["macs"]["full"], computed.macs(whole)
        notes = [f"{item}: its plan.json says that {plan['model']} has {said:,} MACs; it has {so:,}"] if said != so else []
        return [latency.Subject(f"{plan['model']}, {size[-1]} px", size, whole), small], notes
    format = exports.format_of(item)
    if format is None:
        source = load_source(item, pretrained=False, img_size=img_size)
        return [latency.Subject(item, source.input_size, capture(source.module, source.input_size).network)], []
    run, metadata = exports.load_artifact(item, trust), exports.read_metadata(item)
    if "input_size" not in metadata:
        raise UserError(f"'{item}' does not tell its input size: s2h did not write it; give a run or its files")
    found = {"network": run} if format == "pt2" else {"files": {format: Path(item)}}
    return [latency.Subject(item, metadata["input_size"], batch=metadata.get("batch"), **found)], []


def whole_network(plan: dict[str, Any]) -> fx.GraphModule:
    """What a run was cut from, with random weights.

    Raises:
        UserError: its model cannot be built any more.
    """
    _, high, wide = plan["input_size"]  # one that is not square is the model's own
    source = load_source(plan["model"], num_classes=len(plan["data"]["classes"]), pretrained=False, img_size=high if high == wide else None)
    return capture(source.module, source.input_size).network


def times(pair: dict[str, Any], rows: list[dict[str, Any]]) -> dict[tuple[str, int], tuple[float, float]]:
    """Seconds before and after, by format and batch, where both were timed: the median of each (see `latency.compare`)."""
    found = {(row["format"], row["batch"], row["network"]): row["timing"]["median"] for row in rows if "timing" in row}
    return {(format, batch): (found[format, batch, pair["before"]], after) for (format, batch, name), after in found.items()
            if name == pair["after"] and (format, batch, pair["before"]) in found}


def shares(pair: dict[str, Any], rows: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Time after / time before, by format and batch."""
    return {where: after / before for where, (before, after) in times(pair, rows).items()}


def rows_with_shares(found: dict[str, Any]) -> list[tuple[dict[str, Any], float | None]]:
    """The rows of what `bench` returns, each with its share of the time of what it was cut from, where both were timed."""
    of = {(pair["after"], *where): share for pair in found["pairs"] for where, share in shares(pair, found["rows"]).items()}
    return [(row, of.get((row["network"], row["format"], row["batch"]))) for row in found["rows"]]


def reasons(pair: dict[str, Any], rows: list[dict[str, Any]], small: fx.GraphModule) -> list[str]:
    """Why the time fell by less than the MACs, where it did; nothing where it did not."""
    time = shares(pair, rows)
    if not time or max(time.values()) <= pair["macs"] + SLACK:
        return []
    out = []
    few, many = min(batch for _, batch in time), max(batch for _, batch in time)
    overhead = [format for format, batch in time if batch == few < many and time[format, few] > time[format, many] + SLACK]
    if overhead:
        calls = sum(node.op in ("call_module", "call_function", "call_method") for node in small.graph.nodes)
        out.append(f"At batch {few} the fixed cost of each of its {calls} operators counts, and cutting channels removes none of them: "
                   f"{', '.join(f'{time[f, few]:.2f} of the time at batch {few}, {time[f, many]:.2f} at {many} ({f})' for f in overhead)}.")
    over = {kind: after - pair["macs"] * before for kind, (before, after) in pair["kinds"].items() if after > pair["macs"] * before}
    bound = {kind: over[kind] / sum(over.values()) for kind in MEMORY_BOUND if kind in over}
    if sum(bound.values()) > NOTABLE:
        out.append(f"{sum(bound.values()):.0%} of what it spends beyond {pair['macs']:.2f} of the time before goes to operators that memory bounds, not "
                   f"arithmetic, with next to no MACs: {', '.join(f'{kind} {share:.0%}' for kind, share in bound.items())}.")
    widths = [layer.out_channels if isinstance(layer, nn.modules.conv._ConvNd) else layer.out_features
              for layer in small.modules() if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear))]
    odd = sum(width % LIKED > 0 for width in widths)
    if odd > len(widths) / 2:
        out.append(f"{odd} of {len(widths)} layers have a width that is no multiple of {LIKED}, which kernels like: --divisor {LIKED} may be faster at "
                   "the same MACs.")
    return out or ["It is none of what is looked for here: fixed costs, operators that memory bounds, odd widths."]
