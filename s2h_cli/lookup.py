"""A latency model by layer, measured on this device: latency as a cost that a budget can limit (`Space.costs["latency"]`).

An operator's time is taken for a + b * elements it reads + c * elements it writes + d * weights + e * MACs, none of them negative: fixed
cost, memory and arithmetic, each a polynomial in the widths. So the sum over operators is a `cost.CostModel`, differentiable in the widths, in
nanoseconds a batch. Its numbers come from small networks of random widths: each is run operator by operator, and as a whole in the
format that counts; what is left there of each part (of the memory of an element-wise operator that is fused, nothing) is fitted to the latter.

The model is for finding the widths. Whether they are right the clock decides: `masks.fit_budget` asks `Space.clock`, which times the
network that it found against the whole one, and tries again until the two agree.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from . import distributed, fresh, latency
from .budget import Budget
from .cost import CostModel, Count
from .errors import UserError
from .masks import widths_of
from .plan import Plan, Space
from .rebuild import rebuild

#: Networks of random widths that are measured, beside the whole one; rounds of each, operator by operator; and seconds of each as a whole.
NETWORKS, ROUNDS, EACH = 15, 7, 1.0
#: Seconds that a network and the whole one are timed for to know the share of its time; and a rough reading, which is enough where that is off
#: what is aimed at by so much, as a share.
READING, ROUGH, FAR = 20.0, 5.0, 0.1
#: How far above its limit a result may be measured in the end, as a share, without a word.
OVER = 0.03
#: The divisors that `--divisor auto` tries, and how much slower than the best a smaller one may be.
DIVISORS, PAYS = (4, 8, 16, 32), 0.03
#: Of coordinate descent.
SWEEPS = 2000
NANO = 1e9


@dataclass(frozen=True)
class Where:
    """What latency is meant: of a batch of so many images in a format of `latency.FORMATS`."""

    format: str
    batch: int
    device: torch.device

    def rows(self, subjects: list[latency.Subject], seconds: float) -> list[dict[str, Any]]:
        """Those of `latency.compare`."""
        return latency.compare(subjects, [self.format], [self.batch], self.device, torch.get_num_threads(), seconds)

    def times(self, subjects: list[latency.Subject], seconds: float) -> dict[str, latency.Timing]:
        """Of one batch of each network.

        Raises:
            UserError: one cannot be run there.
        """
        rows = self.rows(subjects, seconds)
        for row in rows:
            if "failed" in row:
                raise UserError(f"--latency cannot be measured in {self.format} ({row['failed']}); choose another --latency-format")
        return {row["network"]: latency.Timing(**row["timing"]) for row in rows}

    def share(self, whole: fx.GraphModule, small: fx.GraphModule, aim: float) -> float:
        """The time of the small network as a share of the whole one's, in a fresh process; a rough one where that is `FAR` from what is aimed
        at. In all processes of the job what the first one measured."""
        return distributed.from_first(fresh.call(self._share, subjects_of({"whole": whole, "small": small}), aim) if distributed.RANK == 0 else None)

    def _share(self, subjects: list[latency.Subject], aim: float) -> float:
        for seconds in (ROUGH, READING):  # files that are exported serve both
            times = self.times(subjects, seconds)
            found = times["small"].median / times["whole"].median
            if abs(found / aim - 1) > FAR:
                break
        return found


def subjects_of(networks: dict[str, fx.GraphModule]) -> list[latency.Subject]:
    return [latency.Subject(name, network.meta["input_size"], network) for name, network in networks.items()]


@dataclass(frozen=True)
class Table:
    """What was measured: plain data, so that a run that goes on has the same numbers.

    Attributes:
        nodes: of the network, in its order.
        nanoseconds: (nodes, 5): the coefficients of each node's features (`_features`).
        whole, least: seconds of a batch of the whole network, and of the smallest.
        error: the mean error of the model on the networks that it was fitted to, as a share.
    """

    nodes: list[str]
    nanoseconds: list[list[float]]
    whole: float
    least: float
    error: float

    def cost(self, network: fx.GraphModule, space: Space) -> CostModel:
        """The cost model by node, in nanoseconds."""
        features = _features(network, space)
        return CostModel.build(len(space.groups), [[(c * constant, counts) for c, products in zip(row, features[name]) for constant, counts in products]
                                                   for name, row in zip(self.nodes, self.nanoseconds)])


def add_latency(network: fx.GraphModule, space: Space, where: Where, known: Table | None = None) -> Table:
    """Gives a space the cost "latency", and a clock. Of several processes the first one measures.

    Args:
        known: the table of an earlier session of the run; measured anew without it.
    """
    table = known or Table(**distributed.from_first(asdict(measure(network, space, where)) if distributed.RANK == 0 else None))
    space.costs["latency"] = table.cost(network, space)

    def clock(widths: np.ndarray, aim: float) -> float:
        """Latency at these widths as a share of the whole network's, measured (see `Where.share`)."""
        return where.share(network, rebuild(network, Plan.from_widths(space, widths, np.zeros(space.size))), aim)

    space.clock = clock
    return table


def best_divisor(network: fx.GraphModule, spaces: dict[int, Space], budget: Budget, where: Where) -> tuple[int, dict[int, float]]:
    """The least divisor that pays: at which a network on budget is at most `PAYS` slower for its MACs than at the best one.

    Args:
        spaces: of the network, by divisor.
        budget: what the networks that are timed are cut to, at the same share of every group.

    Returns:
        The divisor, and for each the time for its MACs, as a share of the whole network's. In all processes those that the first one measured.
    """
    found = None
    if distributed.RANK == 0:
        networks, macs = {"whole": network}, {}
        for divisor, space in spaces.items():
            widths = widths_of(space, torch.ones(len(space.groups)), budget)
            networks[str(divisor)] = rebuild(network, Plan.from_widths(space, widths, np.zeros(space.size)))
            macs[divisor] = space.ratio(widths)
        times = where.times(subjects_of(networks), 2 * EACH * len(networks))
        found = {divisor: times[str(divisor)].median / times["whole"].median / macs[divisor] for divisor in spaces}
    found = distributed.from_first(found)
    return min(divisor for divisor, time in found.items() if time <= min(found.values()) * (1 + PAYS)), found


def measure(network: fx.GraphModule, space: Space, where: Where) -> Table:
    """Measures the whole network and `NETWORKS` small ones, and fits the model."""
    rng = np.random.default_rng(0)
    some = [np.array([rng.choice(group.candidates) for group in space.groups]) for _ in range(NETWORKS)]
    widths = [space.full, space.least, *some]
    plans = [Plan.from_widths(space, w, np.zeros(space.size)) for w in widths]
    networks = {str(i): rebuild(network, plan) for i, plan in enumerate(plans)}
    features = _features(network, space)
    nodes = list(features)
    by_feature = CostModel.build(len(space.groups), [products for name in nodes for products in features[name]])
    x = np.array([by_feature.by_row(w) for w in widths], float).reshape(len(widths), len(nodes), -1)
    alone = np.array([[times[name] for name in nodes] for times in (latency.by_node(small, where.batch, where.device, torch.get_num_threads(), ROUNDS)
                                                                    for small in networks.values())])
    coefficients = np.array([_nonnegative(x[:, i], alone[:, i]) for i in range(len(nodes))])

    subjects = subjects_of(networks)
    together = where.times(subjects, EACH * len(networks))
    ends = fresh.call(where.times, subjects[:2], READING)
    # In this process, with all of its networks, they are slower, by much the same time each: so many do not go to a fresh one.
    whole, least = (ends[i].median for i in ("0", "1"))
    seconds = np.interp([timing.median for timing in together.values()], [together["1"].median, together["0"].median], [least, whole])
    # What each feature of each kind of operator takes in the format.
    kinds = np.array([latency.kind_of(network, node) for node in network.graph.nodes if node.name in features])
    parts = [(kind, f) for kind in dict.fromkeys(kinds.tolist()) for f in range(x.shape[2])]
    columns = np.array([(x[:, kinds == kind, f] * coefficients[kinds == kind, f]).sum(1) for kind, f in parts]).T
    *scales, fixed = _nonnegative(np.column_stack([columns, np.ones(len(widths))]), seconds)
    for (kind, f), scale in zip(parts, scales):
        coefficients[kinds == kind, f] *= scale
    coefficients[0, 0] += fixed
    error = np.abs(np.einsum("pnf,nf->p", x, coefficients) / seconds - 1).mean()
    return Table(nodes, (coefficients * NANO).tolist(), whole, least, float(error))


def _features(network: fx.GraphModule, space: Space) -> dict[str, list[list[tuple[float, list[Count]]]]]:
    """For each operator five sums of products: one, elements that it reads, elements that it writes, weights, MACs; but for factors."""
    macs = dict(zip((layer.node for layer in space.layers), space.macs.products))
    weights = dict(zip(space.parameter_names, space.parameters.products))
    known: dict[int, Count] = {}

    def elements(node: fx.Node) -> list[tuple[float, list[Count]]]:
        shapes = node.meta["shape"] if isinstance(node.meta["shape"], list) else [node.meta["shape"]]
        return [space.product(1.0, list(zip(shape, parts)), known) for shape, parts in zip(shapes, space.tensors[node.name])]

    found = {}
    for node in network.graph.nodes:
        if node.op in ("call_module", "call_function") and node.meta.get("shape") is not None and node.name in space.tensors:
            read = [product for source in node.all_input_nodes if source.name in space.tensors and source.meta.get("shape") is not None
                    for product in elements(source)]
            found[node.name] = [[(1.0, [])], read, elements(node), weights.get(f"{node.target}.weight", []), macs.get(node.name, [])]
    return found


def _nonnegative(a: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares of relative errors, |a x / y - 1|^2, with x >= 0, by coordinate descent."""
    size = np.abs(a).max(0)
    size[size == 0] = 1.0
    scaled = a / size / y[:, None]
    gram, against = scaled.T @ scaled, scaled.sum(0)
    x = np.zeros(a.shape[1])
    for _ in range(SWEEPS):
        for j in np.flatnonzero(gram.diagonal()):
            x[j] = max(0.0, x[j] + (against[j] - gram[j] @ x) / gram[j, j])
    return x / size
