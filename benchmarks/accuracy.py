"""S2H against two controls that train from scratch for the same epochs: the dense network, and one of uniform widths at the same MACs.

    python benchmarks/accuracy.py digits resnet18 --flops 0.35 --epochs 20 --img-size 32
    python benchmarks/accuracy.py FASHION_MNIST_FOLDER resnet10t --flops 0.15 --epochs 8 --img-size 32

Prints a line a run: method, seed, MACs ratio, top-1 of soft and hard network, seconds.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import fx, nn

from s2h_cli.config import Recipe
from s2h_cli.data import make_loader, open_splits
from s2h_cli.graph import capture
from s2h_cli.methods.s2h import S2H
from s2h_cli.plan import Plan, Space
from s2h_cli.rebuild import rebuild
from s2h_cli.source import load_source
from s2h_cli.train.loop import fit


class Plain:
    """A network by itself, behind the interface of methods."""

    def __init__(self, network: fx.GraphModule, plan: Plan):
        self.network, self.plan, self.parts = network, plan, {"": self}

    def start_step(self, progress: float) -> None: ...

    @property
    def passes(self) -> list:
        return [lambda images, targets, criterion: {"task": criterion(self.network(images), targets)}]

    def backward(self, terms: dict[str, torch.Tensor]) -> None:
        terms["task"].backward()

    def optimizers(self) -> list:
        return []

    def networks(self) -> dict[str, nn.Module]:
        return {"hard": self.network}

    def state_dict(self) -> dict:
        return {}


def dense(network: fx.GraphModule, space: Space, flops: float) -> Plain:
    return Plain(network, Plan(space, np.ones(space.size, bool)))


def uniform(network: fx.GraphModule, space: Space, flops: float) -> Plain:
    """The same share of every group, the largest that is within the budget, with weights drawn anew for these widths."""
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        low, high = (share, high) if space.ratio(_widths(space, share)) <= flops else (low, share)
    plan = Plan.from_widths(space, _widths(space, low), np.arange(space.size))
    small = rebuild(network, plan)
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
    return Plain(small, plan)


def _widths(space: Space, share: float) -> np.ndarray:
    return np.array([max(g.step, round(g.size * share)) for g in space.groups])


class Silent:
    def step(self, *_: object) -> None: ...
    def epoch(self, *_: object) -> None: ...


def main() -> None:
    methods = {"s2h": S2H, "uniform": uniform, "dense": dense}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("--flops", type=float, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    splits = open_splits(args.data)
    for seed in args.seeds:
        for name in args.methods:
            torch.manual_seed(seed)
            source = load_source(args.model, num_classes=len(splits.class_names), pretrained=False, img_size=args.img_size)
            loading = dict(input_size=source.input_size, mean=source.mean, std=source.std, interpolation=source.interpolation,
                           crop_pct=source.crop_pct, batch_size=args.batch_size, workers=0, flip=splits.flip, seed=seed)
            network = capture(source.module, source.input_size).network
            method = methods[name](network, Space(network), args.flops)
            started = time.perf_counter()
            row = fit(method, make_loader(splits.train, train=True, **loading), make_loader(splits.val, train=False, **loading),
                      Recipe(epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=seed), Silent(),
                      classes=len(splits.class_names))[-1]
            print(f"{name:8} seed {seed}  ratio {row['ratio']:.4f}  soft {row.get('top1_soft', float('nan')):.2f}  "
                  f"hard {row['top1_hard']:.2f}  {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
