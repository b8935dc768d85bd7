"""What a user ships: one run of a network on the digits, and everything that is made of it, measured.

    python benchmarks/ship.py resnet18 mobilenetv3_small_100 vit_tiny_patch16_224 swin_tiny_patch4_window7_224 [--alone PYTHON]

Through the command line, as a user would: `s2h prune` at half the MACs; `s2h export` in every format, in float16 and in int8, each measured on
the validation images; the infer scripts, run by PYTHON, an interpreter with torch, onnxruntime and pillow and without s2h, timm and torchvision,
on those images as files; the report in Chromium at two widths; then the exactness of `--params 0.5`, and `--latency`, measured again at the end of
the run, and by five runs of `s2h bench`, of which the median counts. The latter two are cut without training. A line a model is printed, as JSON.

The latency wants a machine that does nothing else, and one thread (OMP_NUM_THREADS=1) unless the others are free too.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import test_report  # noqa: E402

from s2h_cli import bench as bench_module  # noqa: E402
from s2h_cli import data, load, lookup  # noqa: E402
from s2h_cli.source import load_source  # noqa: E402

BUDGET, MEASUREMENTS = 0.5, 5
PARTS = ("run", "alone", "page", "params", "latency")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--epochs", default="20")
    parser.add_argument("--alone", metavar="PYTHON", help="[default: the infer scripts are not run]")
    parser.add_argument("--latency", type=float, default=0.5, help="share of the time; small images leave a network of many layers little to cut")
    parser.add_argument("--latency-format", default="eager")
    parser.add_argument("--latency-batch", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; alone and page need run")
    args = parser.parse_args()
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"model": model, **measured(model, Path(folder), args)}), flush=True)


def measured(model: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of `PARTS`; percentages, shares, and relative differences."""
    found: dict[str, Any] = {}
    prune = ["prune", model, "--data", "digits", "--no-pretrained"]
    run = folder / "run"
    if "run" in args.parts:
        s2h(*prune, "--flops", BUDGET, "--epochs", args.epochs, "-o", run)
        for options in ([], ["--fp16"], ["--int8"]):
            s2h("export", run, "--data", "digits", "--workers", 0, *options)
        results = json.loads((run / "plan.json").read_text())["results"]
        found |= {"hard": results["top1"]["hard"], "files": {name: {**facts, "bytes": (run / name).stat().st_size} for name, facts in results["files"].items()}}
    if "alone" in args.parts and args.alone:
        found["alone"] = by_scripts(run, folder / "images", args.alone)
    if "page" in args.parts:
        found["page"] = [{key: one[key] for key in ("width", "needs", "out", "marks")} for one in test_report.seen(run / "report.html")]
    if "params" in args.parts:
        s2h(*prune, "--params", BUDGET, "--epochs", 0, "-o", folder / "params")
        whole, small = load_source(model, num_classes=10, img_size=32, pretrained=False).module, load(folder / "params")
        found["params"] = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in whole.parameters())
    if "latency" in args.parts:
        s2h(*prune, "--latency", args.latency, "--latency-format", args.latency_format, "--latency-batch", args.latency_batch, "--epochs", 0, "-o", folder / "latency")
        found["latency_at_end"] = share_of(bench_module.read(folder / "latency"))  # the run's own, before bench adds to it
        found["latency"] = sorted(bench(folder / "latency", args.latency_format, args.latency_batch) for _ in range(MEASUREMENTS))
        found["latency_errors"] = [share / args.latency - 1 for share in (found["latency_at_end"], statistics.median(found["latency"]))]
    return found


def share_of(found: dict[str, Any]) -> float:
    """Of the whole network's time, by the figures of `s2h bench` or of a run's `bench.json`."""
    (share,) = bench_module.shares(found["pairs"][0], found["rows"]).values()
    return share


def s2h(*words: Any) -> str:
    """What a command prints; stops where it fails."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "s2h_cli", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"s2h {' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


def bench(run: Path, format: str, batch: int) -> float:
    """The share of the whole network's time, in pairs, timed for as long as in the run."""
    return share_of(json.loads(s2h("bench", run, "--format", format, "--batch", batch, "--seconds", lookup.READING, "--json")))


def by_scripts(run: Path, images: Path, python: str) -> dict[str, float]:
    """Top-1 in percent of each infer script on the validation images, written as PNG files."""
    images.mkdir()
    source = data.open_splits("digits").val.source
    target = {}
    for i in range(len(source)):
        image, label = source[i]
        image.save(images / f"{i}.png")
        target[str(images / f"{i}.png")] = str(label)
    found = {}
    for script in sorted(run.glob("infer_*.py")):
        done = subprocess.run([python, script, *target], capture_output=True, text=True, check=True)
        said = dict(re.fullmatch(r"(.*) (\S+)", line).groups() for line in done.stdout.splitlines())
        found[script.name] = 100 * sum(said[path] == label for path, label in target.items()) / len(target)
    return found


if __name__ == "__main__":
    main()
