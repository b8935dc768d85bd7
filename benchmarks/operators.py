"""Every operator of PyTorch's own database, and layers of torch.nn, between a convolution and a linear layer.

    python benchmarks/operators.py [--only GLOB] [--jobs N] [--variants N] [--missing]

PyTorch tests each of its operators on sample inputs (`op_db`). Here one tensor of such a sample, or all of them, is the output of a
convolution, whose channels lie along one of its axes, and the result is read by a linear layer. For each such network:

* the captured network computes what the model computes;
* with channels of the convolution removed, the small network computes what the whole one computes when it is deaf to them, and
  costs what the plan says; or the channels stay, and there is a reason;
* no exception leaves our code but a `UserError`.

Each operator runs in a process of its own, under a limit of time. Results are kept in `operators.json`, and `docs/operators.md` is
written from it. Needs expecttest, which PyTorch's database imports.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import logging
import re
import sys
import textwrap
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import torch
from torch import fx, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import helpers  # noqa: E402
import zoo  # noqa: E402

from s2h_cli.errors import UserError  # noqa: E402
from s2h_cli.graph import capture  # noqa: E402
from s2h_cli.plan import Space  # noqa: E402
from s2h_cli.rebuild import rebuild  # noqa: E402

DATA, PAGE = Path("operators.json"), ROOT / "docs" / "operators.md"
LIMIT_S = 90.0
TOLERANCE = 1e-4
LARGE = 4096  # results of more values are not read: the linear layer would be large
OPERATORS = {f"{op.name} ({op.variant_test_name})" if op.variant_test_name else op.name: op for op in op_db}


# ---------------------------------------------------------------------------------------------------------------------
# Networks around one operator


@dataclass(frozen=True)
class Variant:
    """One way to call an operator on a convolution's output: the tensors among `leaves` (all arguments, flat) at the positions
    `fed` come from a convolution, their axis `axis` holds its channels. `batched`: the first axis holds the images; else there is
    one image and no axis for it."""

    function: Callable
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    fed: tuple[int, ...]
    axis: int
    batched: bool

    @property
    def channels(self) -> int:
        return self.leaves[self.fed[0]].shape[self.axis]

    @property
    def rest(self) -> list[int]:
        """The sizes of the axes that hold neither images nor channels."""
        shape = self.leaves[self.fed[0]].shape
        return [n for i, n in enumerate(shape) if i != self.axis and not (self.batched and i == 0)]

    def call(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors that the operator gives."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.fed, tensors):
            leaves[i] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return [t for t in pytree.tree_leaves(self.function(*args, **kwargs)) if isinstance(t, torch.Tensor)]

    def layout(self, y: torch.Tensor) -> torch.Tensor:
        """The output (N, C, 1, rest) of a convolution in the shape that the operator gets."""
        if self.batched:
            return y.reshape(-1, self.channels, *self.rest).movedim(1, self.axis)
        return y.reshape(self.channels, *self.rest).movedim(0, self.axis)


class Net(nn.Module):
    """Convolutions, the operator, a linear layer for each of its results; and a branch beside, so that there is something to cut."""

    def __init__(self, variant: Variant, sizes: list[int]):
        super().__init__()
        self.variant = variant
        self.ranges = [[float(v) for v in variant.leaves[i].aminmax()] for i in variant.fed]  # values that the operator is defined for
        self.convs = nn.ModuleList(nn.Conv2d(3, variant.channels, 1) for _ in variant.fed)
        self.heads = nn.ModuleList(nn.Linear(size, 5) for size in sizes)
        self.beside, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

    def results(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.variant.call([self.variant.layout(low + (high - low) * conv(x).sigmoid()) for conv, (low, high) in zip(self.convs, self.ranges)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.beside(x).mean((2, 3)))
        for head, result in zip(self.heads, self.results(x)):
            logits = logits + head(flat(result, self.variant.batched))
        return logits


def flat(result: torch.Tensor, batched: bool) -> torch.Tensor:
    """(N, values) in float32."""
    result = torch.view_as_real(result) if result.is_complex() else result
    return result.reshape(-1, result[0].numel() if batched else result.numel()).float()


def variants_of(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Iterator[Variant]:
    """Every choice of tensors and channel axis for one call."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in leaves]
    places = [i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.ndim]
    same = tuple(i for i in places if leaves[i].shape == leaves[places[0]].shape)
    for fed in dict.fromkeys([*((i,) for i in places), *([same] if len(same) > 1 else [])]):
        shape = leaves[fed[0]].shape
        for axis in reversed(range(len(shape))):
            if shape[axis] > 1 and min(shape) > 0:
                free = Variant(function, tuple(leaves), spec, fed, axis, True)
                yield free if axis > 0 and takes_any_batch(free) else Variant(function, tuple(leaves), spec, fed, axis, False)


def takes_any_batch(variant: Variant) -> bool:
    """Whether the operator takes and gives another number of images than its sample has."""
    try:
        for n in (2, 3):
            fed = [variant.leaves[i][:1].repeat(n, *[1] * (variant.leaves[i].ndim - 1)) for i in variant.fed]
            results = variant.call(fed)
            if not results or any(t.ndim == 0 or len(t) != n for t in results):
                return False
    except Exception:
        return False
    return True


def cuts_through(variant: Variant) -> bool:
    """Whether removing channels before the operator is the same as removing them behind it: then it needs no freezing."""
    fed = [variant.leaves[i] for i in variant.fed]
    keep = torch.arange(0, variant.channels, 2)
    try:
        whole, small = variant.call(fed), variant.call([t.index_select(variant.axis, keep) for t in fed])
        return all(any(n == variant.channels and torch.allclose(w.index_select(i, keep), s, equal_nan=True)
                       for i, n in enumerate(w.shape) if w.shape[:i] == s.shape[:i]) for w, s in zip(whole, small, strict=True))
    except Exception:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# What must hold


def examine(variant: Variant) -> tuple[str, str]:
    """What becomes of a variant, and the reason: "skipped", "refused", "pruned", "frozen" (rightly, or by a "gap" in the rules)
    or "wrong"."""
    torch.manual_seed(0)
    size = (3, 1, int(np.prod(variant.rest)))
    x = torch.randn(1, *size) if not variant.batched else torch.randn(3, *size)
    try:
        results = Net(variant, []).results(x)
        sizes = [flat(t, variant.batched).shape[1] for t in results]
        if not results or not sum(sizes) or max(sizes) > LARGE:
            return "skipped", "no result to read"
        model = helpers.randomise(Net(variant, sizes)).eval()
        with torch.no_grad():
            expected = model(x)
            if not expected.isfinite().all():
                return "skipped", "not finite on such input"
    except Exception as error:
        return "skipped", f"does not take such input: {brief(error)}"
    try:
        captured = capture(model, size)
        network = captured.network
        if captured.static_batch:
            x = x[:captured.static_batch]
            expected = model(x).detach()
    except UserError as error:
        return "refused", str(error).partition("; docs/")[0][:200]
    except Exception as error:
        return "wrong", f"capture: {brief(error)}"
    chance = any(map(is_random, network.graph.nodes))
    try:
        space = Space(network, divisor=1)
        if not chance:
            with torch.no_grad():
                error = relative(network(x), expected)
                tolerance = max(TOLERANCE, 10 * relative(model(x * (1 + 1e-6)), expected))  # near poles any rounding is seen
            if error > tolerance:
                return "wrong", f"captured network differs by {error:.1e}"
        names = {f"convs.{i}" for i in range(len(variant.fed))}
        if not any(name.startswith("convs.") for name, _ in network.named_parameters()):
            return "skipped", "only the shape is used"
        free = {name for group in space.groups for name in group.layers} & names
        for seed in range(3 if free and not chance else 0):
            plan = helpers.random_plan(space, seed, 0.5)
            error = helpers.error_of_cutting(network, plan, masked=True)
            if not error <= tolerance:
                return "wrong", f"small network differs by {error:.1e}"
        if free:
            small = rebuild(network, plan := helpers.random_plan(space))
            planned, counted = helpers.planned_macs(space, plan.widths), helpers.fvcore_macs(small, size)
            if planned != counted:
                return "wrong", f"MACs of the plan {planned}, of fvcore {counted}"
            return "pruned", ""
        reasons = [f.reason for f in space.frozen if names & set(f.layers)]
        if not reasons:
            return "wrong", "frozen for no reason"
        unnamed = [r for r in reasons if r.startswith("no rule for operator ") and r.removeprefix("no rule for operator ") not in space.unknown]
        if unnamed:
            return "wrong", f"not in Space.unknown: {unnamed[0]}"
        return "gap" if cuts_through(variant) and not chance else "frozen", reasons[0]
    except Exception as error:
        return "wrong", brief(error)


def is_random(node: fx.Node) -> bool:
    """Whether two calls give different results. Samples of random operators set the seed themselves, which no graph holds."""
    op = node.meta.get("op", "")
    seeded = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return seeded or "dropout" in op or "empty" in op or op == "scaled_dot_product_attention" and bool(node.meta["args"][4])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def all_variants(name: str) -> list[Variant]:
    """Those of all samples of an operator; of its in-place form too."""
    op = OPERATORS[name]
    found = []
    for sample in op.sample_inputs("cpu", torch.float32):
        args = (sample.input, *sample.args)
        found += variants_of(op.op, args, sample.kwargs)
        if len(found) > 400:
            break
    return found


def spread(items: list, n: int) -> list:
    """At most `n` of them, evenly spread."""
    return [items[i * len(items) // n] for i in range(n)] if len(items) > n else items


def sweep(name: str, variants: int) -> dict[str, Any]:
    """Counts of what became of an operator's variants, and for each the reasons."""
    torch.manual_seed(0)
    found: dict[str, Counter[str]] = {}
    for variant in spread(all_variants(name), variants):
        kind, reason = examine(variant)
        found.setdefault(kind, Counter())[reason] += 1
    return {kind: dict(counter) for kind, counter in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The page

#: What may become of a call, and how the page says it.
OUTCOMES = {
    "pruned": "channels pass through: some were cut, and the small network was right",
    "frozen": "channels stay, with a reason, and must: the operator mixes them",
    "gap": "channels stay, with a reason, although the operator leaves them apart",
    "refused": "the network is refused in one line",
    "skipped": "not tried: the operator does not take the output of a convolution, or nothing can read its result",
    "wrong": "the captured or the small network differs, or an exception",
    "died": "the process did not come back",
}


def page(data: dict[str, Any]) -> str:
    """`docs/operators.md` from what `sweep` found for each operator."""
    counts = {kind: [sum(row[kind].values()) if isinstance(row[kind], dict) else 1 for row in data.values() if kind in row] for kind in OUTCOMES}
    tried = {name: row for name, row in data.items() if set(row) - {"skipped"}}
    through = [name for name, row in tried.items() if "pruned" in row]
    parts = [
        "# Operators",
        "Written by `python benchmarks/operators.py`: do not edit. Each operator of PyTorch's own test\n"
        "database stands between convolutions and a linear layer, called with sample inputs of that\n"
        f"database. {len(data)} operators, {len(tried)} of which take the output of a convolution; torch {torch.__version__.partition('+')[0]}.",
        "| outcome | operators | calls |\n|---|--:|--:|\n" + "\n".join(f"| {text} | {len(counts[kind])} | {sum(counts[kind])} |" for kind, text in OUTCOMES.items()),
        "An operator may stand in several rows: whether channels pass depends on the axis they lie along.",
        f"## Channels pass through ({len(through)})", wrapped(through),
        *_section("Channels stay although they need not", tried, "gap"),
        *_section("Channels stay", {name: row for name, row in tried.items() if "pruned" not in row}, "frozen"),
        *_section("Refused", tried, "refused"), *_section("Wrong", tried, "wrong"),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, rows: dict[str, Any], kind: str) -> list[str]:
    """The operators of an outcome, by its reason."""
    by_reason: dict[str, list[str]] = {}
    for name, row in rows.items():
        for reason in row.get(kind, {}):
            brief = re.sub(r"\S+ over channels", "it runs over channels", reason.partition(" at \"")[0])
            by_reason.setdefault("no rule" if reason.startswith("no rule for") else brief, []).append(name)
    if not by_reason:
        return []
    return [f"## {title}", *(f"{reason}:\n\n{wrapped(list(dict.fromkeys(names)))}" for reason, names in sorted(by_reason.items()))]


def wrapped(names: list[str]) -> str:
    """Names as lines of at most 100 characters."""
    return textwrap.fill(", ".join(f"`{name}`" for name in names), 100, break_long_words=False, break_on_hyphens=False)


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="GLOB", default="*", help="Operators that match; the rows of the others stay.")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="Processes at a time; each uses one core.")
    parser.add_argument("--variants", metavar="N", type=int, default=8, help="Calls of each operator at most.")
    parser.add_argument("--missing", action="store_true", help="Leave out what the data has already.")
    parser.add_argument("--output", type=Path, default=DATA)
    args = parser.parse_args()
    data = json.loads(args.output.read_text()) if args.output.exists() else {}
    names = [name for name in OPERATORS if fnmatch.fnmatchcase(name, args.only) and not (args.missing and name in data)]
    tasks = [zoo.Task(name, functools.partial(sweep, variants=args.variants), LIMIT_S) for name in names]
    for task, result in zoo.run_all(tasks, args.jobs):
        data[task.model] = result
        args.output.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(data.items())) + "\n}\n")
        print(task.model, {k: v if k in ("wrong", "gap", "died") else sum(v.values()) for k, v in result.items()}, flush=True)
    if data.keys() >= OPERATORS.keys():
        PAGE.write_text(page(data))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    main()
