"""What a process did before changes what a share of the time is: a network and one cut to about half of its time are timed against each other by turns in
a fresh process and in one that has measured a latency table, as a run with `--latency` has when it chooses widths.

    OMP_NUM_THREADS=1 python benchmarks/history.py MODEL ... [--batch 1] [--flops 0.45] [--turns 20]

Prints a line of JSON for each model: for either process the medians of a batch in ms, and the mean share with its standard error. The machine should do
nothing else.
"""

import argparse
import json

import numpy as np
import torch
from s2h_cli import fresh, latency, lookup
from steady import pair

#: Of each turn.
SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--flops", type=float, default=0.45, help="share of the MACs of the small network, all groups cut alike")
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    where = lookup.Where("eager", args.batch, torch.device("cpu"))
    for model in args.models:
        space, whole, small = pair(model, args.flops)
        subjects = lookup.subjects_of({"whole": whole, "small": small})
        lookup.measure(whole, space, where)
        turns = {"fresh": [], "worn": []}
        for _ in range(args.turns):
            turns["fresh"].append(milliseconds(fresh.call(where.times, subjects, SECONDS)))
            turns["worn"].append(milliseconds(where.times(subjects, SECONDS)))
        print(json.dumps({"model": model, "batch": args.batch, **{process: told(np.array(own)) for process, own in turns.items()}}), flush=True)


def milliseconds(times: dict[str, latency.Timing]) -> list[float]:
    return [1e3 * times[name].median for name in ("whole", "small")]


def told(turns: np.ndarray) -> dict[str, float]:
    """Of milliseconds (turns, 2)."""
    whole, small = np.median(turns, axis=0)
    share = turns[:, 1] / turns[:, 0]
    return {"whole": round(whole, 2), "small": round(small, 2), "share": round(share.mean(), 4), "error": round(share.std(ddof=1) / len(share) ** 0.5, 4)}


if __name__ == "__main__":
    main()
