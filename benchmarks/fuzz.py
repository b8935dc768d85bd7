"""Runs s2h on damaged files and odd options: no traceback, no hang, no large memory, no code of a file that runs.

    python benchmarks/fuzz.py                              5,000 cases on all cores, failures into fuzz-failures.jsonl
    python benchmarks/fuzz.py --only plan --seed 17 -v     one case again, with what it printed

A case is a kind (`KINDS`) and a seed. It damages a file in a folder of its own, which holds a small result, and runs a
command there. The command's process is forked from one that has imported everything, so that thousands of cases take
minutes. `run_case` watches it; `Verdict` says what it did wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}

import damage  # noqa: E402
import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402, F401
import torch  # noqa: E402
import typer  # noqa: E402
from damage import CANARY, MARK  # noqa: E402
from PIL import Image  # noqa: E402

from s2h_cli import bench, cli, exports, run  # noqa: E402, F401
from s2h_cli.graph import capture  # noqa: E402
from s2h_cli.report import page  # noqa: E402, F401

#: What one command may take: seconds, and bytes of memory. The last is its address space in bytes, beyond that of the
#: process that it is forked from.
SECONDS, MEMORY, ADDRESSES = 60, 4 << 30, 8 << 30
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        wide = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.body = nn.Sequential(wide, nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.body(x)).relu().mean((2, 3)))

def build(num_classes=10):
    return Net(num_classes)
"""
EVIL = f"open({CANARY!r}, 'w').close()\n" + MODEL
TRAIN = [
    "net.py:build",
    "--data",
    "data",
    "--img-size",
    "16",
    "--workers",
    "0",
    "--batch-size",
    "8",
    "--divisor",
    "2",
    "--device",
    "cpu",
]
DATA = ["--data", "data", "--workers", "0"]


def warm() -> None:
    """Does once what imports the most, so that no forked process has to."""
    torch.set_num_threads(1)
    commands()
    network = capture(
        torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.Flatten(), torch.nn.Linear(8, 2)), (3, 2, 2)
    ).network
    with tempfile.TemporaryDirectory() as folder:
        for format in exports.EXPORTS:
            exports.run_artifact(exports.export(network, folder, format), trust=True)(torch.zeros(2, 3, 2, 2))
    gc.collect()
    gc.freeze()  # what is not collected is not copied


def make_base(folder: Path, timed: bool = True) -> None:
    """Writes what the cases damage: a model, images, and results `run`, `half`, `several/f0.5`, `several/f0.7` and `timed`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(MODEL)
    (folder / "evil.py").write_text(EVIL)
    (folder / "recipe.yaml").write_text(
        "epochs: 1\nopt: sgd\nlr: 0.1\nmomentum: 0.9\nsched: cosine\nmixup: 0.2\nsmoothing: 0.1\namp: false\n"
    )
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for target, name in enumerate(("dark", "light")):
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (16, 16, 3)) + 127 * target
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "data" / split / name / f"{i}.png")
    asked = {"run": ["--flops", "0.5"], "several": ["--flops", "0.5,0.7"], "timed": ["--latency", "0.95"]}
    for name, options in list(asked.items())[: 3 if timed else 2]:
        verdict = run_case(folder, ["prune", *TRAIN, *options, "--epochs", "1", "-o", name], watched=False)
        if verdict.failures and name != "timed":  # so small a network need not become faster
            raise SystemExit(f"the base cannot be made: {verdict.output}")
    (folder / "half" / "checkpoints").mkdir(parents=True)  # stopped after the first of two epochs
    shutil.copy(folder / "run" / "checkpoints" / "last", folder / "half" / "checkpoints")
    settings = (folder / "run" / "args.yaml").read_text()
    (folder / "half" / "args.yaml").write_text(settings.replace("epochs: 1\n", "epochs: 2\n").replace("output: run", "output: half"))
    module = torch.nn.Linear(1, 1)
    torch.save(module.state_dict(), folder / "weights.pth")
    for path in folder.rglob("report.html"):
        path.unlink()
    for path in folder.rglob("tensorboard"):
        shutil.rmtree(path)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of cases


def of_file(
    pattern: str, change: Callable[[random.Random, bytes], bytes], *commands: list[str]
) -> Callable[[random.Random, Path], list[str]]:
    """A kind that changes a file of a pattern, and runs one of the commands. FILE and RUN: the file and its folder."""

    def case(rng: random.Random, folder: Path) -> list[str]:
        file = rng.choice(sorted(folder.glob(pattern)))
        if rng.random() < 0.04:
            damage.replace_file(rng, file)
        else:
            file.write_bytes(change(rng, file.read_bytes()))
        home = file.parent.parent if file.parent.name == "checkpoints" else file.parent
        names = {"FILE": str(file.relative_to(folder)), "RUN": str(home.relative_to(folder))}
        return [names.get(word, word) for word in rng.choice(commands)]

    return case


def images(rng: random.Random, folder: Path) -> list[str]:
    damage.change_images(rng, folder / "data")
    command = rng.choice(
        [
            ["eval", "run", *DATA],
            ["prune", *TRAIN, "--flops", "0.5", "--dry-run"],
            ["prune", *TRAIN, "--flops", "0.5", "--epochs", "1", "-o", "new"],
            ["export", "run", "--format", "onnx", *DATA],
        ]
    )
    return command + ["--skip-bad-images"] * rng.choice([0, 1])


def options(rng: random.Random, folder: Path) -> list[str]:
    """A command with options of all kinds; it trains for an epoch at most."""
    known = commands()
    name = rng.choice(sorted(known))
    fixed = {
        "prune": [*TRAIN, "--flops", "0.5", "--epochs", "0"],
        "train": [word for word in TRAIN if word not in ("--divisor", "2")] + ["--epochs", "0"],
        "inspect": ["net.py:build"],
        "export": ["run", "--format", "onnx"],
        "report": ["run"],
        "bench": ["run", "--format", "eager", "--seconds", "0.1"],
        "eval": ["run", *DATA],
        "models": ["convnext*"],
        "recipes": ["vit"],
    }[name]
    words = [name, *fixed]
    for _ in range(rng.choice([0, 1, 1, 2, 3, 5])):
        option = rng.choice([o for o in known[name] if not {"--help", "--compile", "--log", "--push"} & set(o.opts)])
        flag = rng.choice([*option.opts, *option.secondary_opts])
        words += [flag] if flag.startswith("-") else []
        if not getattr(option, "is_flag", False):
            words.append(
                str(
                    rng.choice(
                        [
                            rng.choice(damage.NUMBERS),
                            rng.choice([word for word in damage.WORDS if "evil" not in word]),
                            rng.choice([1, 2, 3, 8, 16, 0.1, 0.5, 0.9]),
                            "data",
                            "run",
                            "net.py",
                            "recipe.yaml",
                            "run/args.yaml",
                            "run/model.onnx",
                            "onnx",
                            "adamw",
                            "step",
                            "cut",
                            "epsd",
                            "s2h",
                            "uniform",
                            "cpu",
                            "weights.pth",
                            "0.3,0.6",
                            "none",
                        ]
                    )
                )
            )
    words += ["--dry-run"] * (name in ("prune", "train") and rng.random() < 0.3)
    if rng.random() < 0.1:
        words.pop(rng.randrange(1, len(words)))
    return [word.replace("\x00", "0").encode("utf-8", "replace").decode() for word in words]


def commands() -> dict[str, list[Any]]:
    """The options and arguments of each command, but for `push`, which needs the network."""
    found = typer.main.get_command(cli.app).commands
    return {name: command.params for name, command in found.items() if name != "push"}


RESULT = (
    ["inspect", "RUN"],
    ["inspect", "RUN", "--json"],
    ["report", "RUN"],
    ["eval", "RUN", *DATA],
    ["export", "RUN", "--format", "torchscript"],
    ["export", "RUN", "--format", "onnx"],
    ["bench", "RUN", "--format", "eager", "--batch", "1", "--seconds", "0.1", "--device", "cpu"],
    ["prune", "RUN", *TRAIN[1:], "--flops", "0.5", "--dry-run"],
)
RESUME = (
    ["prune", "--resume", "-o", "RUN"],
    ["prune", *TRAIN, "--flops", "0.5", "--epochs", "1", "--resume", "-o", "RUN"],
)
KINDS: dict[str, Callable[[random.Random, Path], list[str]]] = {
    "plan": of_file("**/plan.json", damage.json_file, *RESULT),
    "args": of_file(
        "*/args.yaml",
        damage.yaml_file,
        ["report", "RUN"],
        *RESUME,
        ["prune", "--config", "FILE", "--dry-run"],
        ["export", "RUN", "--format", "torchscript"],
    ),
    "bench": of_file("*/bench.json", damage.json_file, ["report", "RUN"]),
    "csv": of_file("run/*.csv", damage.csv_file, ["report", "RUN"], *RESUME),
    "weights_of_result": of_file("run/model.safetensors", damage.safetensors_file, *RESULT),
    "onnx": of_file(
        "run/model.onnx",
        damage.onnx_file,
        ["eval", "FILE", *DATA],
        ["bench", "FILE", "--format", "onnx", "--batch", "1", "--seconds", "0.1"],
    ),
    "ts": of_file(
        "run/model.ts",
        damage.zip_file,
        ["eval", "FILE", *DATA],
        ["eval", "FILE", *DATA, "--trust"],
        ["bench", "FILE", "--batch", "1", "--seconds", "0.1", "--trust"],
    ),
    "pt2": of_file(
        "run/model.pt2",
        damage.zip_file,
        ["eval", "FILE", *DATA],
        ["eval", "FILE", *DATA, "--trust"],
        ["bench", "FILE", "--batch", "1", "--seconds", "0.1", "--trust"],
    ),
    "checkpoint": of_file("[!t]*/checkpoints/*", damage.checkpoint_file, ["prune", "net.py:build", "--resume", "-o", "RUN"]),
    "weights": of_file(
        "weights.pth",
        damage.torch_file,
        ["prune", *TRAIN, "--flops", "0.5", "--weights", "FILE", "--dry-run"],
        ["train", *[word for word in TRAIN if word not in ("--divisor", "2")], "--weights", "FILE", "--dry-run"],
    ),
    "recipe": of_file(
        "recipe.yaml",
        damage.yaml_file,
        ["prune", *TRAIN, "--flops", "0.5", "--recipe", "FILE", "--dry-run"],
        ["prune", *TRAIN, "--flops", "0.5", "--recipe", "FILE", "--epochs", "1", "-o", "new"],
    ),
    "images": images,
    "options": options,
}
#: How often each is taken.
OFTEN = {"plan": 5, "options": 3, "images": 2, "args": 2, "onnx": 2}
ORDER = [name for name in KINDS for _ in range(OFTEN.get(name, 1))]
#: How many cases of each kind `--quick` runs: of the kinds that cost little, many.
QUICK = {
    "plan": 40,
    "args": 12,
    "bench": 10,
    "csv": 8,
    "weights_of_result": 12,
    "onnx": 16,
    "ts": 8,
    "pt2": 6,
    "checkpoint": 16,
    "weights": 4,
    "recipe": 8,
    "images": 8,
    "options": 24,
}


# ---------------------------------------------------------------------------------------------------------------------
# Running a case


class Verdict(NamedTuple):
    """What became of a command: its words, what it did wrong, what it printed, seconds, and bytes of memory."""

    words: list[str]
    failures: list[str]
    output: str
    seconds: float
    memory: int


def run_case(folder: Path, words: list[str], watched: bool = True) -> Verdict:
    """Runs a command in a forked process in a folder, with limits."""
    log = folder / ".output"
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            _command(folder, words, log, watched)
        finally:
            os._exit(99)
    status, memory, failures = None, 0, []
    while status is None:
        done, code, usage = os.wait4(child, os.WNOHANG)
        if done:
            status, memory = code, max(memory, usage.ru_maxrss * 1024)
            break
        memory = max(memory, _resident(child))
        over = "memory" if memory > MEMORY else "hang" if watched and time.monotonic() - start > SECONDS else ""
        if over:
            failures.append(over)
            os.killpg(child, signal.SIGKILL)
            os.wait4(child, 0)
            break
        time.sleep(0.01)
    output = log.read_bytes().decode("utf-8", "backslashreplace") if log.exists() else ""
    if status is not None:
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, 2):
            failures.append(f"signal {-code}" if code < 0 else f"exit {code}")
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        if code == 2 and len(errors) != 1:
            failures.append(f"{len(errors)} lines of errors")
    if "Traceback" in output:
        failures.append("traceback")
    if "\x1b" in output or "\x07" in output:
        failures.append("escape")
    if watched and "--trust" not in words:
        if (folder / CANARY).exists():
            failures.append("code")
        failures += [line for line in output.splitlines() if line.startswith("WATCH ")]
    if any(MARK in path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*/report.html")):
        failures.append("markup")
    return Verdict(words, failures, output, time.monotonic() - start, memory)


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _command(folder: Path, words: list[str], log: Path, watched: bool) -> None:
    """The forked process: it ends here."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False) for number in (1, 2)
    )
    os.chdir(folder)
    (folder / ".tmp").mkdir(exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / ".tmp")
    torch.set_num_threads(1)
    if watched:
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(_watch(str(folder.resolve())))
    code: Any = 1
    try:
        cli.main(words)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _watch(folder: str) -> Callable[[str, tuple], None]:
    """An audit hook that reports what leaves the folder, and cuts the network off."""

    def hook(event: str, args: tuple) -> None:
        if event in ("socket.connect", "socket.getaddrinfo"):
            raise OSError("no network here")
        if event in ("os.system", "os.exec", "os.posix_spawn"):
            os.write(2, f"WATCH {event}\n".encode())
        elif event in ("open", "os.remove", "os.rename", "os.mkdir", "os.symlink"):
            writes = event != "open" or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and isinstance(args[0], (str, bytes)):
                path = os.path.realpath(os.fsdecode(args[0]))
                if not path.startswith((folder, "/dev/", "/proc/")):
                    os.write(2, f"WATCH {event} {path!r}\n".encode())

    return hook


def case(base: Path, kind: str, seed: int) -> Verdict:
    """Makes a case in a folder of its own and runs it."""
    rng = random.Random(f"{kind}:{seed}")
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as place:
        folder = Path(place) / "case"
        shutil.copytree(base, folder)
        words = KINDS[kind](rng, folder)
        verdict = run_case(folder, words)
        return verdict


def run_cases(base: Path, wanted: Iterable[tuple[str, int]], workers: int) -> Iterator[tuple[str, int, Verdict]]:
    """The verdicts of cases, as they come, from so many processes."""
    wanted = list(wanted)
    if workers <= 1:
        yield from ((kind, seed, case(base, kind, seed)) for kind, seed in wanted)
        return
    context = multiprocessing.get_context("fork")
    with context.Pool(workers) as pool:
        yield from pool.imap_unordered(_one, [(base, kind, seed) for kind, seed in wanted])


def _one(job: tuple[Path, str, int]) -> tuple[str, int, Verdict]:
    base, kind, seed = job
    return kind, seed, case(base, kind, seed)


def cases(seeds: range) -> list[tuple[str, int]]:
    """A case of each seed, in which each kind comes as often as `OFTEN` says."""
    return [(ORDER[seed % len(ORDER)], seed) for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="how many: 5000, or one with --only")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--quick", action="store_true", help="a few cases of each kind, always the same, as the tests do")
    parser.add_argument("--only", choices=KINDS, help="cases of this kind alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--base", type=Path, help="a folder that keeps the results that are damaged; made if need be")
    parser.add_argument("--output", type=Path, default=Path("fuzz-failures.jsonl"))
    parser.add_argument("-v", "--verbose", action="store_true", help="show what each case printed")
    args = parser.parse_args()
    warm()
    with tempfile.TemporaryDirectory() as place:
        base = args.base or Path(place) / "base"
        if not base.exists():
            make_base(base, timed=not args.quick)
        seeds = range(args.seed, args.seed + (args.cases or (1 if args.only else 5000)))
        if args.quick:
            wanted = [(kind, seed) for kind in KINDS for seed in range(QUICK[kind])]
        else:
            wanted = [(args.only, seed) for seed in seeds] if args.only else cases(seeds)
        start, found, failed, slowest, largest = time.monotonic(), Counter(), Counter(), 0.0, 0
        with open(args.output, "w") as file:
            for kind, seed, verdict in run_cases(base, wanted, args.workers):
                found[kind] += 1
                slowest, largest = max(slowest, verdict.seconds), max(largest, verdict.memory)
                if args.verbose:
                    print(kind, seed, verdict.words, verdict.output, sep="\n")
                if verdict.failures:
                    failed.update((kind, failure.split()[0]) for failure in verdict.failures)
                    last = verdict.output.strip().splitlines()[-1:] or [""]
                    print(
                        f"--only {kind} --seed {seed}: {', '.join(verdict.failures)[:200]!r}",
                        f"{' '.join(verdict.words)[:160]!r}",
                        f"{last[0][:200]!r}",
                        sep="  ",
                        flush=True,
                    )
                    file.write(
                        json.dumps(
                            {
                                "kind": kind,
                                "seed": seed,
                                "failures": verdict.failures,
                                "words": verdict.words,
                                "output": verdict.output[-4000:],
                            }
                        )
                        + "\n"
                    )
                    file.flush()
    print(
        f"{sum(found.values())} cases in {time.monotonic() - start:.0f} s, the slowest {slowest:.1f} s, "
        f"the largest {largest / 2**30:.1f} GiB; failures:"
    )
    for (kind, failure), count in sorted(failed.items()):
        print(f"  {kind:18} {failure:12} {count} of {found[kind]}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
