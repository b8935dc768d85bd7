"""Tables for the terminal, 80 columns wide."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

from rich.console import Console, Group
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from .. import CONVENTION
from ..bench import rows_with_shares, shares, times
from ..shown import printable
from ..zoo import Known, passes

#: The least width of a table.
COLUMNS = 80
BAR = 10
#: Spread of a time, as a share of it, beyond which it is said to be unreliable.
RELIABLE = 0.2


def quantity(n: float) -> str:
    """1234567 -> "1.23M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.{2 if n < 10 * size else 1}f}{unit}"
    return f"{n:.0f}"


def bar(share: float) -> Text:
    """A bar of the retained share."""
    filled = round(share * BAR)
    return Text("█" * filled, style="green") + Text("·" * (BAR - filled), style="dim")


def inspection(facts: dict[str, Any]) -> Group:
    """What `s2h inspect` shows: summary, layers, groups, frozen channels."""
    pruned = facts["budget"] is not None
    parts: list[Any] = [_summary(facts, pruned), _layers(facts, pruned), _groups(facts, pruned)]
    parts.append(_frozen(facts) if facts["frozen"] else Text("Nothing is frozen."))
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    """A table with these columns: '>' aligns one to the right, '*' lets one wrap where the table is too wide."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column.lstrip(">*"), justify="right" if ">" in column else "left", no_wrap="*" not in column, overflow="fold")
    return table


def _summary(facts: dict[str, Any], pruned: bool) -> Text:
    macs, params = facts["macs"], facts["params"]
    size = "x".join(map(str, facts["input_size"]))
    lines = [f"{facts['model']}  input {size}"]
    if pruned:
        lines += [f"MACs    {quantity(macs['full'])} → {quantity(macs['pruned'])}   {_ratio(facts, 'flops')}",
                  f"params  {quantity(params['full'])} → {quantity(params['pruned'])}   {_ratio(facts, 'params')}"]
    else:
        lines += [f"MACs    {quantity(macs['full'])}   smallest reachable ratio {macs['min_ratio']:.4f}",
                  f"params  {quantity(params['full'])}"]
    if facts.get("dropped"):
        lines.append(f"without {', '.join(facts['dropped'])}")
    lines.append(f"({CONVENTION})")
    return Text("\n".join([*lines, *(f"note: {note}" for note in facts.get("notes", [])), ""]))


def _layers(facts: dict[str, Any], pruned: bool) -> Table:
    small = [x for x in facts["layers"] if "norm" in x["kind"] or "pool" in x["kind"]]
    layers = [x for x in facts["layers"] if x not in small]
    rest = {key: [sum(x[key][i] for x in small) for i in (0, 1)] for key in ("macs", "params")}
    if not pruned:
        table = _table("Layers", "*layer", "kind", ">in", ">out", ">MACs", ">params")
        for x in layers:
            table.add_row(x["name"], _kind(x["kind"]), str(x["in"][1]), str(x["out"][1]), quantity(x["macs"][1]),
                          quantity(x["params"][1]))
        table.add_row(f"{len(small)} norms, poolings", "", "", "", quantity(rest["macs"][1]), quantity(rest["params"][1]))
        return table
    table = _table("Layers, by MACs saved", "*layer", ">in", ">out", "kept", ">MACs", ">params")
    for x in sorted(layers, key=lambda x: x["macs"][0] - x["macs"][1]):
        table.add_row(x["name"], _of(x["in"]), _of(x["out"]), bar(x["out"][0] / x["out"][1]), _change(x["macs"]), _change(x["params"]))
    table.add_row(f"{len(small)} norms, poolings", "", "", "", _change(rest["macs"]), _change(rest["params"]))
    return table


def _groups(facts: dict[str, Any], pruned: bool) -> Table:
    table = _table("\nGroups: channels that stay or go together", "*group", ">kept" if pruned else ">size", "*layers it ties")
    for g in facts["groups"]:
        table.add_row(g["name"], _of([g["kept"], g["size"]]) if pruned else str(g["size"]), _names(g["layers"]))
    return table


def _frozen(facts: dict[str, Any]) -> Table:
    table = _table("\nFrozen: left whole", "*reason", ">channels", "*layers")
    for f in facts["frozen"]:
        table.add_row(f["reason"], str(f["channels"]), _names(f["layers"]))
    return table


def models(found: list[Known], versions: dict[str, str]) -> Table:
    """What `s2h models` shows."""
    table = _table("Models", "*model", ">params", ">MACs", ">groups", ">frozen", ">least", "*")
    for model in found:
        row = model.row
        if row is None:
            table.add_row(model.name, "", "", "", "", "", "not measured")
        elif "macs" not in row:
            table.add_row(model.name, "", "", "", "", "", row.get("refused") or row["died"])
        else:
            trouble = f"fails: {', '.join(row['failed'])}" if row["failed"] else ""
            table.add_row(model.name, quantity(row["parameters"]), quantity(row["macs"]), str(row["groups"]), f"{row['frozen']:.1%}",
                          f"{row['min_ratio']:.3f}", trouble)
    measured = [model for model in found if model.row]
    good = sum(passes(model.row) for model in measured)
    table.caption = (f"{len(measured)} of {len(found)} measured, on torch {versions['torch']} and timm {versions['timm']}: {good} pass every check.\n"
                     "frozen: share of MACs that no choice of widths lowers; least: smallest reachable ratio.\n"
                     "s2h inspect MODEL tells the same of any model, measured or not.")
    table.caption_justify = "left"
    return table


def latencies(found: dict[str, Any]) -> Group:
    """What `s2h bench` shows: a line for each format, batch and network, then where the time went and why it fell by less than the MACs."""
    table = _table(f"On {found['place']}", "format", ">batch", "*network", ">ms", ">spread", ">images/s", ">share")
    for row, share in rows_with_shares(found):
        if "failed" in row:
            table.add_row(row["format"], str(row["batch"]), row["network"], "", "", "", "failed")
            continue
        timing = row["timing"]
        table.add_row(row["format"], str(row["batch"]), row["network"], f"{timing['median'] * 1e3:.3g}",
                      f"±{(timing['high'] - timing['low']) / 2 / timing['median']:.1%}", f"{row['batch'] / timing['median']:.0f}",
                      "" if share is None else f"{share:.2f}")
    table.caption = "ms: median of a batch; spread: half the distance of the quartiles\nshare: of the whole network's time, median by median"
    if any((timing["high"] - timing["low"]) / 2 > RELIABLE * timing["median"] for row in found["rows"] if (timing := row.get("timing"))):
        table.caption += "\nThe spread is large: others use this machine; run it again when it is quiet."
    table.caption_justify = "left"
    parts: list[Any] = [table]
    for pair in found["pairs"]:
        time = shares(pair, found["rows"]).values()
        if not time:
            continue
        span = f"{min(time):.2f}" if max(time) - min(time) < 0.005 else f"{min(time):.2f} to {max(time):.2f}"
        parts.append(Text(f"\n{pair['after']}: {pair['macs']:.2f} of the MACs, {span} of the time of {pair['before']}"))
        kinds = _table(f"Where a batch of {max(row['batch'] for row in found['rows'])} spends it, in eager mode", "", ">ms before", ">ms after", ">share")
        for kind, (before, after) in pair["kinds"].items():
            kinds.add_row(kind, f"{before * 1e3:.3g}", f"{after * 1e3:.3g}", f"{after / before:.2f}" if before else "")
        parts += [kinds, *(Text(reason) for reason in pair["reasons"])]
    return Group(*parts)


def exported(folder: Path, found: dict[str, dict[str, Any]]) -> Table:
    """What `s2h export` shows: a line for each file that it wrote, after one for the network itself where accuracy was measured."""
    table = _table(f"Files in {folder}", "*file", ">MB", ">difference", ">top-1, %")
    for name, facts in found.items():
        table.add_row(name, f"{facts['bytes'] / 1e6:.2f}", f"{facts['difference']:.1e}" if "difference" in facts else "", _percent(facts.get("top1")))
    table.caption = "difference: the largest from the network's logits, relative to the largest of them"
    table.caption_justify = "left"
    return table


def closing(result: dict[str, Any]) -> Table:
    """The table a run ends with. `result` is the one that `run.prune` returns."""
    facts = result["facts"]
    macs, params = facts["macs"], facts["params"]
    table = _table(f"Result, {result['folder']}", "", ">before", ">after", "*")
    checked = next(name for name, found in result["files"].items() if "top1" in found)
    rows = {"ema": ("hard, averaged", "exported where it is better"), "exported": ("exported", checked)}
    start = result["top1"].get("start")
    for kind, accuracy in result["top1"].items():
        name, remark = rows.get(kind, (f"{kind} network", ""))
        if kind != "start":
            table.add_row(f"top-1 %, {name}", (_percent(start) or "–") if kind == "hard" else "", _percent(accuracy), remark)
    table.add_row("MACs", quantity(macs["full"]), quantity(macs["pruned"]), _ratio(facts, "flops"))
    table.add_row("parameters", quantity(params["full"]), quantity(params["pruned"]), _ratio(facts, "params"))
    table.add_row("model.safetensors", f"{result['bytes_before'] / 1e6:.2f} MB", f"{result['bytes_after'] / 1e6:.2f} MB", "")
    pair = result["latency"]["pairs"][0]
    for (format, batch), (before, after) in times(pair, result["latency"]["rows"]).items():
        target = facts["budget"].get("latency")
        asked = f"ratio {after / before:.4f}, target {target:.4g}" if target else f"{after / before:.2f} of the time (s2h bench)"
        table.add_row(f"latency, batch {batch}, {format}", f"{before * 1e3:.3g} ms", f"{after * 1e3:.3g} ms", asked)
    for name, found in result["files"].items():
        table.add_row(name, "", f"{found['difference']:.1e}", "largest difference, relative")
    table.caption = f"({CONVENTION})"
    table.caption_justify = "left"
    return table


def _ratio(facts: dict[str, Any], kind: str) -> str:
    """`ratio 0.3496, target 0.35`; without a target where the budget has none."""
    target = facts["budget"].get(kind)
    return f"ratio {facts['macs' if kind == 'flops' else kind]['ratio']:.4f}" + (f", target {target:g}" if target is not None else "")


def _names(layers: list[str]) -> str:
    return ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _of(pair: list[int]) -> str:
    return f"{pair[0]}/{pair[1]}"


def _change(pair: list[int]) -> str:
    return f"{quantity(pair[1])}→{quantity(pair[0])}"


def _kind(kind: str) -> str:
    return "attention" if kind == "scaled_dot_product_attention" else kind


class PlainConsole(Console):
    """A console that shows what texts hold and does nothing that they say: what acts on a terminal in them is written as `\\x1b`."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text, keep="\n"), segment.style)


def console(**options: Any) -> Console:
    """A console that has `COLUMNS` columns when the output is no terminal."""
    console = PlainConsole(highlight=False, markup=False, emoji=False, **options)
    if not console.is_terminal:
        console.width = COLUMNS
    return console


def show(table: Any) -> None:
    """Prints a table, in a narrower terminal too as wide as it is: the terminal breaks its lines, but no number is cut."""
    wide = console()
    wide.width = max(wide.width, COLUMNS)
    if wide.is_terminal:
        wide.print(table)
        return
    with wide.capture() as shown:
        wide.print(table)
    print("\n".join(line.rstrip() for line in shown.get().splitlines()))
