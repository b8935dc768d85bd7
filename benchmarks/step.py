"""What a training step of S2H costs beside a plain one: time, paired in one run, and peak memory, each in a process of its own.

    python benchmarks/step.py resnet50 --batch-size 32 --img-size 224

All steps are forward and backward of the same network on the same images; the hard network has the same share of every group, at the
target. The theory counts a plain step as 3 units (forward 1, backward 2), the soft network as 3, the hard network as 3 x ratio, and, of a
step that moves the masks, the mask-only backward as 2 (gates on weights) and one more forward pass of the hard network. The mean is over
a run from scratch: masks move in its first part, while the hard network comes down to the target; after the freeze that one trains alone.
Memory is what a step adds to that of the process before it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from torch import nn

from s2h_cli.budget import Budget
from s2h_cli.graph import capture
from s2h_cli.masks import widths_of
from s2h_cli.methods.s2h import S2H, Settings
from s2h_cli.plan import Space

STEPS = {"plain": lambda ratio: 3.0, "moving": lambda ratio: 3 + 2 + 4 * ratio, "alone": lambda ratio: 3 * ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--flops", type=float, nargs="+", default=[0.35, 0.15])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--memory-of", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()

    model = timm.create_model(args.model)
    started = time.perf_counter()
    network = capture(model, (3, args.img_size, args.img_size)).network.to(args.device)
    captured = time.perf_counter()
    space = Space(network)
    labelled = time.perf_counter()
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    targets = torch.randint(0, 1000, (args.batch_size,), device=args.device)
    if args.memory_of:
        step = steps(network, space, args.flops[0], images, targets)[args.memory_of]
        before = memory(args.device, "VmRSS")
        step()
        step()
        print(memory(args.device, "VmHWM") - before)
        return

    print(f"{args.model}, batch {args.batch_size}, {args.img_size} px, {args.device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")
    print(f"capture {captured - started:.2f} s, labels and plan {labelled - captured:.2f} s, {len(space.groups)} groups")
    for flops in args.flops:
        run = steps(network, space, flops, images, targets)
        times: dict[str, list[float]] = {name: [] for name in run}
        for i in range(args.repeat + 1):
            for name, step in run.items():
                begin = time.perf_counter()
                step()
                if args.device != "cpu":
                    torch.cuda.synchronize()
                if i:  # the first round warms up
                    times[name].append(time.perf_counter() - begin)
        peak = {name: int(subprocess.check_output(
            [sys.executable, __file__, args.model, "--flops", str(flops), "--batch-size", str(args.batch_size), "--img-size",
             str(args.img_size), "--device", args.device, "--memory-of", name], text=True).split()[-1]) for name in run}
        cost = {}
        for name in run:
            ratios = sorted(t / plain for t, plain in zip(times[name], times["plain"]))
            cost[name] = statistics.median(ratios)
            print(f"flops {flops:g}  {name:7}  {statistics.median(times[name]) * 1e3:8.0f} ms  x{statistics.median(ratios):.2f} "
                  f"(x{ratios[0]:.2f} to x{ratios[-1]:.2f}, theory x{STEPS[name](flops) / 3:.2f})  "
                  f"peak {peak[name] / 1e6:.0f} MB x{peak[name] / peak['plain']:.2f}")
        theory = mean({name: units(flops) / 3 for name, units in STEPS.items()}, flops)
        print(f"flops {flops:g}  a run's mean x{mean(cost, flops):.2f} (theory x{theory:.2f})")


def steps(network, space: Space, flops: float, images: torch.Tensor, targets: torch.Tensor) -> dict:
    """The kinds of step, as functions without arguments."""
    criterion = nn.CrossEntropyLoss()
    moving, alone = (prepared(network, space, flops, progress) for progress in (0.0, Settings.freeze))

    def run(method: S2H) -> None:
        network.zero_grad()
        for forward in method.passes:
            method.backward(forward(images, targets, criterion))

    def plain() -> None:
        network.zero_grad()
        criterion(network(images), targets).backward()

    def move() -> None:
        moving.hard.plan.keep[:] = True  # as where channels change their order: the hard network is cut anew
        moving.start_step(0.0)
        run(moving)
        moving.masks.u.grad = None

    return {"plain": plain, "moving": move, "alone": lambda: run(alone)}


def prepared(network, space: Space, flops: float, progress: float, **options) -> S2H:
    """S2H at a point of its schedule, in train mode, with the same share of every group at the target. Its masks are a little surer than those of
    runs are at the freeze; at -40, products too small for float32 would slow a step on a CPU down."""
    budget = Budget(flops=flops)
    method = S2H(network, space, budget, **options)
    widths = torch.from_numpy(widths_of(space, torch.ones(len(space.groups)), budget))
    with torch.no_grad():
        method.masks.u.copy_(torch.where(method.masks.candidates.cpu() == widths[:, None], 0.0, -Settings.mask_speed * Settings.freeze))
    method.network.train()
    method.hard.module.train()
    method.start_step(progress)
    return method


def mean(cost: dict[str, float], flops: float) -> float:
    """Over a whole run. What the hard network's passes cost more while it is larger than the budget is from theory."""
    ramp = Settings.ramp * (1 - flops) / 2 * 4 / 3
    return ramp + Settings.freeze * cost["moving"] + (1 - Settings.freeze) * cost["alone"]


def memory(device: str, line: str) -> int:
    """Bytes, now ("VmRSS") or at the peak ("VmHWM"): of the process on a CPU (Linux), of the allocator on a GPU."""
    if device != "cpu":
        return torch.cuda.memory_allocated() if line == "VmRSS" else torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory too
    return int(next(entry for entry in status.splitlines() if entry.startswith(line)).split()[1]) * 1024


if __name__ == "__main__":
    main()
