"""Everything worth knowing about s2h on one GPU, in at most nine minutes.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --output gpu.json --only 1,prune --minutes 4
    python benchmarks/gpu.py --output gpu.json --small

Run it from a clone; s2h need not be installed. `--small` makes everything tiny, so that it runs on a CPU too.

The items are in `ITEMS`. Each is a process of its own with a time limit, and gives rows of facts. FILE is written anew
after every row, so a machine that goes away takes nothing with it. An item that fails or runs out of time keeps its
rows and says why it ended. What needs a GPU is "skipped: no CUDA GPU" without one. The exit code is 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = "skipped: no CUDA GPU"
#: Lines of an error that are kept.
ERROR_LINES = 25
#: Seconds between two looks at what an item has found.
LOOK = 0.5

Row = dict[str, Any]
#: Model, side of its images in pixels, images a step.
Case = tuple[str, int, int]


class Scale(NamedTuple):
    """How much is measured."""

    first: Case  # of item 1
    precisions: list[str]  # of item 1, see `gpu_steps.PRECISIONS`
    main: list[Case]  # of item 2
    others: list[Case]  # of item 4
    steps: int  # that are timed, of each kind
    workers: list[int]
    loader_images: int
    prune: list[str]  # model and options
    prune_images: int
    latency: tuple[str, int]  # model, side of its images in pixels
    formats: list[str]
    batches: list[int]
    seconds: float  # of each format at each batch


FULL = Scale(
    first=("resnet18", 64, 64),
    precisions=["fp32", "bf16, channels_last", "fp16", "compile"],
    main=[("resnet50", 224, 256)],
    others=[("vit_small_patch16_224", 224, 256), ("resnet18", 32, 256)],
    steps=15,
    workers=[4, 8, 16],
    loader_images=4000,
    prune=["resnet50", "--amp", "--channels-last", "--batch-size", "256", "--workers", "16"],
    prune_images=8000,
    latency=("resnet50", 224),
    formats=["eager", "onnx", "compile"],
    batches=[1, 64, 256],
    seconds=2.0,
)
#: Without --compile, which takes a compiler on a CPU more than a minute.
SMALL = Scale(
    first=("resnet10t", 32, 4),
    precisions=["fp32", "bf16, channels_last", "fp16"],
    main=[("resnet10t", 32, 4)],
    others=[("vit_tiny_patch16_224", 32, 4)],
    steps=2,
    workers=[0, 2],
    loader_images=40,
    prune=["resnet10t", "--amp", "--channels-last", "--img-size", "32", "--batch-size", "8", "--workers", "2"],
    prune_images=40,
    latency=("resnet10t", 32),
    formats=["eager", "onnx"],
    batches=[1, 4],
    seconds=0.1,
)


# ---------------------------------------------------------------------------------------------------------------------
# The items: each imports what it needs, so that a package that is missing fails no other


def steps(scale: Scale) -> Iterator[Row]:
    """1: the machine; whether one step of each kind is right in each precision, and the lines at which it makes
    the processor wait.
    """
    yield environment()
    import gpu_steps
    import torch

    setting = gpu_steps.setting(*scale.first, device())
    for precision in scale.precisions:
        for kind in gpu_steps.KINDS:
            what, run = {"precision": precision, "kind": kind}, None
            try:
                run = gpu_steps.stepper(kind, setting, gpu_steps.PRECISIONS[precision])
                yield {**what, **gpu_steps.right(run)}
                yield {**what, **(gpu_steps.waits(run) if torch.cuda.is_available() else {"waits": SKIPPED})}
            except Exception:
                yield {**what, "failed": last_lines(traceback.format_exc())}
    if "compile" not in scale.precisions:
        yield {"precision": "compile", "skipped": "--small does not compile"}


def big(scale: Scale) -> Iterator[Row]:
    """2: what the steps of a large model take, and the same with cuDNN choosing its algorithms by trial."""
    import torch

    gpu = torch.cuda.is_available()
    yield from speed(scale.main, scale.steps, (False, True) if gpu else (False,))
    if not gpu:
        yield {"cudnn.benchmark": True, "ms": SKIPPED}


def tests(scale: Scale) -> Iterator[Row]:
    """3: tests/test_cuda.py, a row for each test."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-v",
        "--tb=short",
        "--durations=0",
        "tests/test_cuda.py",
    ]
    for row in spoken(command):
        if re.search(r"::|^E  |\d+ (passed|failed|skipped)", row["line"]):
            yield row


def others(scale: Scale) -> Iterator[Row]:
    """4: item 2 for a transformer, and for small images, where a step has little to compute."""
    yield from speed(scale.others, scale.steps)


def loader(scale: Scale) -> Iterator[Row]:
    """5: images a second that the loader gives, by its number of processes."""
    import loader

    with tempfile.TemporaryDirectory() as folder:
        images = loader.open_splits(loader.make_images(Path(folder), scale.loader_images)).train
        for workers in scale.workers:
            found = loader.speeds(
                images,
                folder,
                loader.Recipe(),
                img_size=224,
                batch_size=min(128, len(images)),
                workers=workers,
                repeat=2,
            )
            yield {
                "workers": workers,
                "images": len(images),
                **{f"{name}_images_per_second": max(each) for name, each in found.items()},
            }


def prune(scale: Scale) -> Iterator[Row]:
    """6: a whole run on made JPEGs, its lines with the second at which they came, and what it wrote."""
    from loader import make_images

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        make_images(Path(folder, "data"), scale.prune_images)
        yield {"images": scale.prune_images, "seconds": time.perf_counter() - started}
        output = Path(folder, "run")
        command = [
            sys.executable,
            "-m",
            "s2h_cli",
            "prune",
            *scale.prune,
            "--no-pretrained",
            "--data",
            f"{folder}/data",
            "--flops",
            "0.35",
            "--epochs",
            "2",
            "--device",
            str(device()),
            "-o",
            str(output),
        ]
        yield from spoken(command)
        yield {
            "summary": (output / "summary.csv").read_text().splitlines(),
            "latency": json.loads((output / "bench.json").read_text()),
        }


def latencies(scale: Scale) -> Iterator[Row]:
    """7: the latency of a network and of it cut to 0.35. ONNX Runtime is timed on the CPU, and last, where it
    is built for CPUs alone.
    """
    import onnxruntime
    import torch
    from s2h_cli import latency
    from s2h_cli.lookup import subjects_of
    from steady import pair

    model, px = scale.latency
    _, whole, small = pair(model, 0.35, px)
    subjects = subjects_of({"whole": whole, "small": small})
    places = {format: device() for format in scale.formats}
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        places["onnx"] = torch.device("cpu")
    for format in sorted(places, key=lambda format: places[format].type == "cpu"):
        for batch in scale.batches:
            for row in latency.compare(
                subjects, [format], [batch], places[format], torch.get_num_threads(), scale.seconds
            ):
                yield {
                    "model": model,
                    "px": px,
                    "place": latency.describe(places[format], torch.get_num_threads()),
                    **row,
                }


class Item(NamedTuple):
    """Rows, and the seconds that they may take."""

    rows: Callable[[Scale], Iterator[Row]]
    seconds: float


#: In the order in which they run, numbered from 1.
ITEMS = {
    "steps": Item(steps, 100),
    "big": Item(big, 60),
    "tests": Item(tests, 75),
    "others": Item(others, 65),
    "loader": Item(loader, 50),
    "prune": Item(prune, 100),
    "latency": Item(latencies, 90),
}


# ---------------------------------------------------------------------------------------------------------------------
# What several items need


def device() -> Any:
    import torch

    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def environment() -> Row:
    """The machine, and the versions of the project's packages (None: not installed)."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = [re.split(r"[^\w.-]", entry)[0] for entry in project["dependencies"]]

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    found = {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "packages": {package: version(package) for package in packages},
    }
    import torch

    if not torch.cuda.is_available():
        return {**found, "gpu": SKIPPED}
    about = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    return {
        **found,
        "gpu": about.name,
        "gpu_gb": about.total_memory / 1e9,
        "multiprocessors": about.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": f"{about.major}.{about.minor}",
    }


def speed(cases: list[Case], count: int, trials: tuple[bool, ...] = (False,)) -> Iterator[Row]:
    """Time and memory of the steps of each kind, in bfloat16 and channels-last, and what the GPU does meanwhile.

    Args:
        trials: whether cuDNN tries several algorithms for each shape that it meets.
    """
    import gpu_steps
    import torch

    for case in cases:
        setting = gpu_steps.setting(*case, device())
        for trial in trials:
            torch.backends.cudnn.benchmark, plain = trial, None
            for kind in gpu_steps.KINDS:
                what, run = (
                    {"model": case[0], "px": case[1], "batch": case[2], "cudnn.benchmark": trial, "kind": kind},
                    None,
                )
                try:
                    run = gpu_steps.stepper(kind, setting, gpu_steps.PRECISIONS["bf16, channels_last"])
                    found = gpu_steps.times(run, count)
                    plain = plain or found["ms"]
                    yield {
                        **what,
                        **found,
                        "of_plain": found["ms"] / plain,
                        "images_per_second": 1e3 * case[2] / found["ms"],
                    }
                    yield {
                        **what,
                        **(gpu_steps.kernels(run, found["ms"]) if torch.cuda.is_available() else {"busy": SKIPPED}),
                    }
                except Exception:
                    yield {**what, "failed": last_lines(traceback.format_exc())}


def spoken(command: list[str]) -> Iterator[Row]:
    """The lines that a command prints, each with the second at which it came.

    Raises:
        RuntimeError: it fails.
    """
    started, lines = time.perf_counter(), []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        lines.append(line.rstrip())
        yield {"at": round(time.perf_counter() - started, 1), "line": line.rstrip()}
    if code := process.wait():
        raise RuntimeError(f"exit code {code}\n" + last_lines("\n".join(lines)))


def last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-ERROR_LINES:])


# ---------------------------------------------------------------------------------------------------------------------
# Processes, limits, and the file


def run(name: str, item: Item, limit: float, small: bool, found: Row, told: Callable[[], None]) -> None:
    """Runs an item in a process of its own.

    Args:
        limit: its seconds.
        found: gets the rows and how it ended.
        told: is called whenever there is more to write.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows, errors = Path(folder, "rows"), Path(folder, "errors")
        rows.touch()
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, __file__, "--output", str(rows), "--item", name, *["--small"] * small],
                cwd=ROOT,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            )
        try:
            over = False
            while not over:
                over = process.poll() is not None or time.perf_counter() - started > limit
                lines = rows.read_text().splitlines()
                for line in lines[len(found["rows"]) :]:
                    found["rows"].append(json.loads(line))
                    print(f"  {line}", flush=True)
                    told()
                if not over:
                    time.sleep(LOOK)
        finally:
            code = process.poll()
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
        found["seconds"] = round(time.perf_counter() - started, 1)
        found["ended"] = (
            "done" if code == 0 else f"out of time after {limit:.0f} s" if code is None else f"exit code {code}"
        )
        if code != 0:
            found["error"] = last_lines(errors.read_text())


def chosen(text: str | None) -> list[str]:
    names = list(ITEMS)
    found = [
        names[int(word) - 1] if word.isdigit() and 0 < int(word) <= len(names) else word
        for word in (text or ",".join(names)).split(",")
    ]
    if wrong := [word for word in found if word not in ITEMS]:
        raise SystemExit(
            f"no item {wrong[0]}; choose from {', '.join(f'{i} {name}' for i, name in enumerate(names, 1))}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FILE", type=Path)
    parser.add_argument(
        "--only",
        metavar="ITEMS",
        help="numbers or names, with commas: " + ", ".join(f"{i} {name}" for i, name in enumerate(ITEMS, 1)),
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="of all items together")
    parser.add_argument("--small", action="store_true", help="everything tiny")
    parser.add_argument("--item", choices=ITEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.item:
        with args.output.open("a") as out:
            for row in ITEMS[args.item].rows(SMALL if args.small else FULL):
                out.write(json.dumps(row) + "\n")
                out.flush()
        return

    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # so that the item that runs is ended too
    started = time.perf_counter()
    record: Row = {"small": args.small, "items": {}}

    def write() -> None:
        record["seconds"] = round(time.perf_counter() - started, 1)
        aside = args.output.with_name(args.output.name + ".new")
        aside.write_text(json.dumps(record, indent=1))
        aside.replace(args.output)

    for name in chosen(args.only):
        left = 60 * args.minutes - (time.perf_counter() - started)
        found = record["items"][name] = {"ended": "not started: no time was left", "rows": []}
        write()
        if left > 0:
            print(f"{name}: {ITEMS[name].rows.__doc__}", flush=True)
            found["ended"] = "the program was stopped"
            run(name, ITEMS[name], min(ITEMS[name].seconds, left), args.small, found, write)
            print(
                f"  {found['ended']}, {found['seconds']} s",
                *[found[key] for key in ("error",) if key in found],
                sep="\n  ",
                flush=True,
            )
            write()
    bad = [
        name
        for name, found in record["items"].items()
        if found["ended"] != "done" or any("failed" in row for row in found["rows"])
    ]
    print(
        f"{args.output}: {len(record['items']) - len(bad)} of {len(record['items'])} items without a failure "
        f"in {record['seconds']} s"
        + (f"; look at {', '.join(bad)}" if bad else "")
    )
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
