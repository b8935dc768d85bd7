"""Which share of a network's time stands still: a whole network and one cut to about half of its time are timed in turn, as `s2h bench` does, for minutes,
and the share is taken of windows of about 20 seconds by several quantiles of their blocks.

    OMP_NUM_THREADS=1 python benchmarks/steady.py MODEL ... [--minutes 2.5] [--flops 0.45]

Prints a line of JSON for each model: by quantile, how far the share moves from window to window, the standard deviation in percent of the share; "paired" is the
median of the ratios of neighbouring blocks. The machine should do nothing else, or what is asked about.
"""

import argparse
import json
import time

import numpy as np
import torch
from s2h_cli import latency, lookup
from s2h_cli.budget import Budget
from s2h_cli.graph import capture
from s2h_cli.masks import widths_of
from s2h_cli.plan import Plan, Space
from s2h_cli.rebuild import rebuild
from s2h_cli.source import load_source
from torch import fx

QUANTILES = (0.0, 0.1, 0.25, 0.5)
#: Of each share.
WINDOW_SECONDS = 20.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--minutes", type=float, default=2.5, help="of each model")
    parser.add_argument("--flops", type=float, default=0.45, help="share of the MACs of the small network, all groups cut alike")
    args = parser.parse_args()
    for model in args.models:
        windows = shares(model, args.flops, 60 * args.minutes)
        moves = {name: round(100 * np.std(own, ddof=1) / np.mean(own), 2) for name, own in zip([*map(str, QUANTILES), "paired"], zip(*windows))}
        print(json.dumps({"model": model, "windows": len(windows), "share": np.mean([own[QUANTILES.index(0.5)] for own in windows]).round(3), "moves": moves}), flush=True)


def shares(model: str, flops: float, seconds: float) -> list[list[float]]:
    """The shares of each window, by quantile and paired."""
    _, network, small = pair(model, flops)
    subjects, place = lookup.subjects_of({"whole": network, "small": small}), latency.Place(torch.device("cpu"), torch.get_num_threads())
    found, ends = [], time.time() + seconds
    with torch.inference_mode():
        while time.time() < ends:
            blocks, _ = latency.blocks_of(subjects, "eager", 1, place, WINDOW_SECONDS)
            whole, cut = np.array(blocks["whole"]), np.array(blocks["small"])
            found.append([*(np.quantile(cut, QUANTILES) / np.quantile(whole, QUANTILES)), np.median(cut / whole)])
    return found


def pair(model: str, flops: float, img_size: int = 32) -> tuple[Space, fx.GraphModule, fx.GraphModule]:
    """A network for images of so many pixels with its space, and it cut to a share of its MACs, all groups alike."""
    source = load_source(model, num_classes=10, pretrained=False, img_size=img_size)
    network = capture(source.module, source.input_size).network
    space = Space(network)
    widths = widths_of(space, torch.ones(len(space.groups)), Budget(flops=flops))
    return space, network, rebuild(network, Plan.from_widths(space, widths, np.zeros(space.size)))


if __name__ == "__main__":
    main()
