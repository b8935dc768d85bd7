"""The report: one HTML page on one run or on several, that needs no network and no other file."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from .. import CONVENTION, artifacts, bench, computed
from ..config import Config, of_result
from ..errors import UserError, why
from ..files import writing
from ..shown import in_html as _safe
from . import figures
from .curves import GATES, WIDTHS, read_csv, read_table
from .tables import quantity

FILE = "report.html"


@dataclass(frozen=True)
class Run:
    """What is known of a run, read off its folder. Empty or None where a file is not there, as after `--epochs 0`."""

    folder: Path
    plan: dict[str, Any]
    rows: list[dict[str, float]]  #: of `summary.csv`, one an epoch
    widths: tuple[list[str], list[list[float]]]
    gates: tuple[list[str], list[list[float]]]
    latency: dict[str, Any] | None
    config: Config | None

    @property
    def top1(self) -> float | None:
        """Of the result, in percent."""
        return self.plan.get("results", {}).get("top1", {}).get("exported")

    @property
    def limited(self) -> tuple[str, int] | None:
        """The format and the batch that `--latency` is meant in."""
        return (self.config.latency_format, self.config.latency_batch) if self.config else None


def read_run(folder: Path) -> Run:
    """Reads a run folder, or that of one of several budgets.

    Raises:
        UserError: it holds no finished run.
    """
    plan = computed.checked(folder).plan
    plan["budget"] = plan["budget"] or {}
    try:
        return _read(folder, plan)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise UserError(f"{folder}: one of its files is damaged ({why(error)}); delete bench.json, or a .csv file that a program has changed") from error


def _read(folder: Path, plan: dict[str, Any]) -> Run:
    home, config = of_result(folder)
    ending = "" if home == folder or "flops" not in plan["budget"] else f"_{plan['budget']['flops']:g}"
    return Run(folder, plan, read_summary(home / "summary.csv", ending), read_table(folder / WIDTHS), read_table(folder / GATES), bench.read(folder), config)


def read_summary(path: Path, ending: str) -> list[dict[str, float]]:
    """The rows of `summary.csv`; of columns that parts of a run have each, those of this ending, without it."""
    if not path.exists():
        return []
    columns, rows = read_csv(path)
    found = [{name.removesuffix(ending): value for name, value in zip(columns, row) if (name.endswith(ending) or name in ("epoch", "lr")) and math.isfinite(value)}
             for row in rows]
    if any("epoch" not in row for row in found):
        raise ValueError(f"{path.name} has rows without an epoch")
    return found


def write_report(*folders: Path, file: Path | None = None) -> Path:
    """Writes the report on a run into its folder, or that on several to a file.

    Raises:
        UserError: a folder holds no finished run, or the file cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    file = file or folders[0]
    if file.is_dir():
        file /= FILE
    body, charts = comparison(runs) if len(runs) > 1 else single(runs[0])
    title = " and ".join(run.plan["model"] for run in runs[:2]) + (" and more" if len(runs) > 2 else "")
    page = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    places = {"TITLE": _safe(f"{title} · s2h"), "PLOTLY": get_plotlyjs(), "FIGURES": json.dumps(_without_nan(charts)).replace("<", "\\u003c"), "BODY": body}
    page = re.sub("@(TITLE|PLOTLY|FIGURES|BODY)@", lambda place: places[place[1]], page)  # in one go: nothing that is filled in is taken for a place
    with writing(file.parent) as aside:
        (aside / file.name).write_text(page, encoding="utf-8", errors="replace")
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Body and charts


def single(run: Run) -> tuple[str, dict[str, figures.Figure]]:
    plan, charts = run.plan, {}
    parts = [_headline(run)]

    def chart(name: str, title: str, text: str, figure: figures.Figure) -> None:
        charts[name] = figure
        parts.append(f'<h2>{title}</h2><p>{text}</p><div id="{name}"></div>')

    if run.rows and run.rows[0]["epoch"] > 0:
        chart("training", "Training", "Accuracy of the soft and of the hard network on the validation images, what lies between them, and the share of the MACs that the "
              "hard network has, after each epoch. Where the soft network ends the hard one trains on alone.", figures.training(run.rows, plan["budget"].get("flops")))
    chart("channels", "Channels that each layer keeps", "In front of those it had. Layers of a group stay or go together: a residual stream. They have one colour, of eight that come again; hover or tap for the group.",
          figures.channels(plan["layers"], plan["groups"]))
    chart("costs", "Cost of each layer", "MACs after, in front of those before.", figures.costs(plan["layers"]))
    if run.widths[1]:
        chart("widths", "Width of each group over time", "The share of its channels that a group keeps, after each epoch.", figures.widths(*run.widths))
    if run.gates[1]:
        chart("gates", "Masks over time", "Where the gates of all channels lie between 0, gone, and 1, kept, after each epoch.", figures.gates(*run.gates))
    parts += [_latencies(run), _frozen(plan), _files(run), _origin(run)]
    return "\n".join(parts), charts


def comparison(runs: list[Run]) -> tuple[str, dict[str, figures.Figure]]:
    measured = [{"name": str(run.folder), "macs": run.plan["macs"]["pruned"], "top1": run.top1} for run in runs if run.top1 is not None]
    rows = [[str(run.folder), _percent(run.top1), quantity(run.plan["macs"]["pruned"]), _times(run), quantity(run.plan["params"]["pruned"]),
             f"{run.plan['macs']['ratio']:.4f}", run.plan["model"]] for run in sorted(runs, key=lambda run: run.plan["macs"]["pruned"])]
    body = [f"<h1>{len(runs)} runs</h1>", "<h2>Accuracy against cost</h2><p>Top-1 of the results on the validation images, and what one image costs them.</p>",
            '<div id="accuracies"></div>', _table(["run", ">top-1, %", ">MACs", ">latency, ms", ">parameters", ">ratio", "model"], rows), f"<p>{_safe(CONVENTION)}.</p>"]
    return "\n".join(body), {"accuracies": figures.accuracies(measured)}


def _headline(run: Run) -> str:
    plan, results = run.plan, run.plan.get("results", {})
    macs, params, top1 = plan["macs"], plan["params"], results.get("top1", {})
    size = "x".join(map(str, plan["input_size"]))

    def asked(kind: str) -> str:
        return f", asked for {plan['budget'][kind]:g}" if kind in plan["budget"] else ""

    before = f"from {top1['start']:.2f} % before" if "start" in top1 else f"{len(plan['data']['classes'])} classes"
    cards = [("top-1", _percent(run.top1) + " %" if run.top1 is not None else "not measured", before),
             ("MACs", quantity(macs["pruned"]), f"{macs['ratio']:.4f} of {quantity(macs['full'])}{asked('flops')}"),
             ("parameters", quantity(params["pruned"]), f"{params['ratio']:.4f} of {quantity(params['full'])}{asked('params')}")]
    pair = _pair(run)
    if pair:
        timed, place = pair
        limited = (timed["format"], timed["batch"]) == run.limited
        cards.append((f"latency, batch {timed['batch']}", f"{timed['after'] * 1e3:.3g} ms", f"{timed['after'] / timed['before']:.2f} of {timed['before'] * 1e3:.3g} ms, "
                      f"{timed['format']}, {place}{asked('latency') if limited else ''}"))
    weights = run.folder / artifacts.WEIGHTS
    cards.append(("weights on disk", _bytes(weights.stat().st_size), f"from {_bytes(results['bytes_before'])}" if "bytes_before" in results else ""))
    shown = "".join(f'<div class="card"><div class="what">{_safe(what)}</div><div class="value">{_safe(value)}</div><div class="from">{_safe(source)}</div></div>'
                    for what, value, source in cards)
    dropped = f"<p>Without {_safe(', '.join(plan['dropped']))}.</p>" if plan["dropped"] else ""
    return f'<h1>{_safe(plan["model"])}</h1><p>{_safe(run.folder)} · input {_safe(size)}</p>{dropped}<div class="cards">{shown}</div><p>{_safe(CONVENTION)}.</p>'


def _pair(run: Run) -> tuple[dict[str, Any], str] | None:
    """Seconds of a batch before and after, and where: in the format and batch of the run's `--latency`, else the first in which both were timed."""
    if run.latency is None:
        return None
    found = bench.times(run.latency["pairs"][0], run.latency["rows"])
    if not found:
        return None
    format, batch = run.limited if run.limited in found else next(iter(found))
    before, after = found[format, batch]
    return {"format": format, "batch": batch, "before": before, "after": after}, run.latency["place"]


def _times(run: Run) -> str:
    pair = _pair(run)
    return f"{pair[0]['after'] * 1e3:.3g} of {pair[0]['before'] * 1e3:.3g}, {pair[0]['format']}, batch {pair[0]['batch']}" if pair else ""


def _latencies(run: Run) -> str:
    if run.latency is None:
        return ""
    rows = []
    for row, share in bench.rows_with_shares(run.latency):
        if "failed" in row:
            rows.append([row["format"], row["batch"], row["network"], "", f"failed: {row['failed']}"])
            continue
        timing = row["timing"]
        rows.append([row["format"], row["batch"], row["network"], f"{timing['median'] * 1e3:.3g} ({timing['low'] * 1e3:.3g} to {timing['high'] * 1e3:.3g})",
                     "" if share is None else f"{share:.2f}"])
    reasons = "".join(f"<p>{_safe(reason)}</p>" for reason in run.latency["pairs"][0]["reasons"])
    return (f"<h2>Latency</h2><p>On {_safe(run.latency['place'])}. Measure more, on any machine: s2h bench {_safe(run.folder)}</p>"
            + _table(["format", ">batch", "network", ">ms, median (quartiles)", ">share"], rows) + reasons)


def _frozen(plan: dict[str, Any]) -> str:
    rows = [[entry["reason"], entry["channels"], ", ".join(entry["layers"])] for entry in plan["frozen"]]
    return "<h2>Frozen layers</h2>" + (_table(["reason", ">channels", "layers"], rows) if rows else "<p>None.</p>")


def _files(run: Run) -> str:
    rows = []
    for name, found in run.plan.get("results", {}).get("files", {}).items():
        path = run.folder / name
        rows.append([name, _bytes(path.stat().st_size) if path.exists() else "gone", f"{found['difference']:.1e}", _percent(found.get("top1"))])
    return ("<h2>Files</h2><p>Each was loaded back; the largest difference from the trained network's logits, relative to the largest of them.</p>"
            + _table(["file", ">size", ">difference", ">top-1, %"], rows))


def _origin(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.plan["versions"].items() if version)
    command = f"<pre>{_safe(run.config.command())}</pre>" if run.config else ""
    return f"<h2>How it was made</h2>{command}<p>{_safe(versions)}</p>"


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    """An HTML table; '>' before a column's name aligns it to the right."""
    kinds = [' class="n"' if column.startswith(">") else "" for column in columns]
    head = "".join(f"<th{kind}>{_safe(column.lstrip('>'))}</th>" for kind, column in zip(kinds, columns))
    body = "".join("<tr>" + "".join(f"<td{kind}>{_safe(cell)}</td>" for kind, cell in zip(kinds, row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _without_nan(value: Any) -> Any:
    """Data of charts as JSON can hold them: what is no finite number is left out of the chart."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
