"""`docs/zoo.md` from the data of `benchmarks/zoo.py`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from timm.models._registry import _model_to_module

from s2h_cli.source import TORCHVISION
from s2h_cli.zoo import passes

Rows = dict[str, dict[str, Any]]
#: What every model that can be captured goes through; the page explains them.
COLUMNS = {
    "graph": "the captured graph gives the model's own logits (1e-4 relative)",
    "hard": "the hard network of training is the rebuilt one, bit for bit",
    "reloaded": "so is the network that is loaded from `model.safetensors` and `plan.json`",
    "zeroed": "cutting groups that no normalisation takes statistics over equals zeroing the weights that read them (1e-4)",
    "masked norms": "cutting all groups equals zeroing with normalisations that see the kept channels only (1e-4)",
    "MACs": "the plan's MACs are fvcore's, operator by operator, for the whole and for the pruned network",
    "parameters": "the plan's parameter count is the pruned network's",
    "gradients": "a step in train mode gives every remaining parameter a finite gradient",
    "batches": "an image gives the same logits alone and among three (1e-4)",
    "torchscript": "TorchScript, loaded back, agrees at batch sizes 1 and 5 (1e-4)",
    "onnx": "so does ONNX in onnxruntime",
    "pt2": "so does the `.pt2` of `torch.export`",
}


def page(data: dict[str, Any]) -> str:
    rows: Rows = data["models"]
    v = data["versions"]
    parts = [
        "# The zoo",
        "Written by `python benchmarks/zoo.py`: do not edit. Every image classifier of torchvision, and of each model file of timm "
        "the smallest and a mid-sized one, with random weights and half of the MACs cut away at random.",
        f"torch {v['torch']}, torchvision {v['torchvision']}, timm {v['timm']}, onnx {v['onnx']}, onnxruntime {v['onnxruntime']}, "
        f"onnxscript {v['onnxscript']}, Python {v['python']}; {v['machine']}.",
        totals(rows), others(data.get("also", {})), "## What is checked", "\n".join(f"- **{name}**: {text}." for name, text in COLUMNS.items()),
        "A tolerance of 1e-4 becomes ten times the distance of the network's own float32 logits from its float64 ones where that is more: "
        "random weights make some networks chaotic. Among the checks these models say so.\n\n"
        "Models above 5 G MACs are checked at half their resolution, where they take it; figures are at their own. *frozen* is the "
        "share of MACs in operators that no choice of widths makes cheaper, *least* the smallest reachable share.",
        "## What fails, is refused, or is frozen by more than a hundredth", troubles(rows),
        "## Operators without a rule", unknown(rows), "## All models", table(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def brief(data: dict[str, Any]) -> dict[str, Any]:
    """What the page says of a run on another release of torch."""
    rows: Rows = data["models"]
    return {"versions": data["versions"], "models": len(rows), "pass": sum(passes(row) for row in rows.values()),
            "with exports": sum("not run" not in row.get("skipped", {}).values() for row in rows.values()),
            "failed": {name: row.get("failed") or row.get("refused") or row.get("died") for name, row in rows.items() if not passes(row)}}


def others(runs: dict[str, dict[str, Any]]) -> str:
    lines = []
    for torch, run in runs.items():
        v = run["versions"]
        trouble = "; ".join(f"**{name}**: {what}" for name, what in run["failed"].items())
        lines.append(f"On torch {torch} (torchvision {v['torchvision']}, timm {v['timm']}, onnxruntime {v['onnxruntime']}) {run['pass']} of "
                     f"{run['models']} models pass; {run['with exports']} of them were run through the three formats too. {trouble}".strip())
    return "\n\n".join(lines)


def libraries(rows: Rows) -> dict[str, Rows]:
    return {"torchvision": {n: r for n, r in rows.items() if n.startswith(TORCHVISION)},
            "timm": {n: r for n, r in rows.items() if not n.startswith(TORCHVISION)}}


def totals(rows: Rows) -> str:
    lines = ["| | models | pass every column | of these: frozen below 10 % and 0.35 reachable | labels, s (median, max) "
             "| Torch-Pruning: runs afterwards | its s (median) |", "|---|--:|--:|--:|--:|--:|--:|"]
    for name, part in libraries(rows).items():
        if not part:
            continue
        good = [row for row in part.values() if passes(row)]
        free = [row for row in good if row["frozen"] < 0.1 and row["min_ratio"] <= 0.35]
        seconds = [row["label_s"] for row in part.values() if "label_s" in row]
        other = [row["torch_pruning"] for row in part.values() if "torch_pruning" in row]
        works = [t for t in other if t["works"]]
        lines.append(f"| {name} | {len(part)} | {len(good)} | {len(free)} | {statistics.median(seconds):.2f}, {max(seconds):.2f} | "
                     + (f"{len(works)} of {len(other)} | {statistics.median(t['seconds'] for t in works):.2f} |" if works else "| |"))
    files: dict[str, bool] = defaultdict(lambda: True)
    for name, row in libraries(rows)["timm"].items():
        files[_model_to_module[name]] &= passes(row)
    return "\n".join(lines) + f"\n\n{sum(files.values())} of timm's {len(files)} model files pass with all their models."


def unknown(rows: Rows) -> str:
    """Where labels enter an operator that no rule describes; they freeze."""
    models: dict[str, list[str]] = defaultdict(list)
    for name, row in rows.items():
        for operator in row.get("unknown", {}):
            models[operator].append(name)
    return "\n".join(f"- `{operator}`: {', '.join(names)}" for operator, names in sorted(models.items())) or "None."


def troubles(rows: Rows) -> str:
    lines = []
    for name, row in rows.items():
        for kind in ("died", "refused"):
            if row.get(kind):
                lines.append(f"- **{name}**: {kind}: {row[kind]}")
        lines += [f"- **{name}**, {column}: {text}" for column, text in row.get("failed", {}).items()]
    for name, row in rows.items():
        if row.get("frozen", 0) > 0.01:
            why = "; ".join(f"{reason} ({channels} channels)" for reason, channels in row["why"])
            lines.append(f"- {name}: {row['frozen']:.0%} of the MACs frozen: {why}")
    return "\n".join(line.replace("|", "\\|") for line in lines) or "Nothing."


def table(rows: Rows) -> str:
    lines = ["| model | input | M params | G MACs | groups | channels | frozen | least | capture s | labels s | checks | Torch-Pruning: MACs left | its s |",
             "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|"]
    for name, row in sorted(rows.items(), key=lambda item: (passes(item[1]), item[0].startswith(TORCHVISION), item[0])):
        other = row.get("torch_pruning", {})
        theirs = f"{other['ratio']:.2f} | {other['seconds']:.1f}" if other.get("works") else f"{'fails' if other else ''} |"
        if "macs" not in row:
            lines.append(f"| {name} |" + " |" * 9 + f" {'refused' if row.get('refused') else 'died'} | {theirs} |")
            continue
        skipped = {**row["skipped"], **({"tolerance": f"{row['tolerance']:.0e}"} if "tolerance" in row else {})}
        checks = ", ".join(row["failed"]) or ("pass" + "".join(f"; {column}: {why}" for column, why in skipped.items()))
        lines.append(f"| {name} | {'x'.join(map(str, row['input'][1:]))} | {row['parameters'] / 1e6:.1f} | {row['macs'] / 1e9:.2f} | {row['groups']} | "
                     f"{row['channels']} | {row['frozen']:.1%} | {row['min_ratio']:.3f} | {row['capture_s']:.1f} | {row['label_s']:.2f} | "
                     f"{checks} | {theirs} |")
    return "\n".join(lines)
