"""What can be cut (`Space`), and what is kept of it (`Plan`): pure data, read off the labels.

A *group* is a set of atoms that occur in the same dimensions of the same parameters equally often: the channels of a residual
stream, of an inner convolution, the heads of an attention layer. Any of its atoms may go; only how many stay matters for the
cost. All atoms of the network are numbered so that each group is one run of numbers.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Callable, Iterator

import numpy as np
import torch
from torch import fx

from . import rebuild
from .cost import FORMULAS, CostModel, Count, Product, channel_axis
from .errors import UserError
from .graph import Param, Ref
from .labels import Dim, Solved
from .rules import HEAD_DIM, PICKED, Labelled, Tensor, propagate

#: A group is offered at least this many widths, if it has as many atoms; its step is halved until it is.
MIN_CANDIDATES = 8


@dataclass(frozen=True)
class Group:
    """Atoms `start` to `stop` of the network. `channels` is how many channels of its layers one atom stands for; widths are
    multiples of `step` atoms from `least` on, or all of them. `layers` are those whose output channels these are."""

    name: str
    start: int
    stop: int
    step: int
    channels: int
    layers: tuple[str, ...]
    least: int = 1

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def candidates(self) -> list[int]:
        """The widths to choose from, in atoms, ascending; the last is the full one."""
        return [*(width for width in range(self.step, self.size, self.step) if width >= self.least), self.size]


@dataclass(frozen=True)
class Layer:
    """One counted operator. `inputs` and `outputs` are the labels of its channel axes as parts (see `Space.params`) or sizes."""

    node: str
    name: str
    kind: str
    inputs: np.ndarray | int
    outputs: np.ndarray | int


@dataclass(frozen=True)
class Frozen:
    """Output channels that cannot be cut, and why."""

    layers: tuple[str, ...]
    reason: str
    channels: int


class Space:
    """Everything that can be cut in one network.

    Attributes:
        groups: the groups, in the order of the network.
        size: number of atoms in all.
        params: for each parameter and buffer, for each dimension, its parts: an integer array (n, k) of the atoms that index i
            stands or falls with, padded with `size`; or None where nothing can be cut.
        tensors: the same for the outputs of each node.
        reads: (parameter, dim) that contract a labelled dimension: where gates go.
        gates: the same for operands that are computed (a standardised weight, queries whose head dimension is cut), by the name
            of the buffer that `rebuild.insert_gates` makes for each.
        writes: (parameter, dim) that make one: where importance is read.
        layers, macs, parameters: the counted operators, and the cost models by layer and by parameter.
        costs: the cost models by the kinds of `budget.KINDS`; "latency" where it is measured (`lookup.add_latency`).
        clock: measures the share of the latency that widths (groups,) have (`lookup.add_latency`); None where there is none.
        dropped: blocks that the network is without (`depth.Block`); what was in them has no cost.
        gone: (groups,) of which groups nothing is left.
        whole: the space with no block dropped.
        frozen: what cannot be cut, and why.
        unknown: operators without a rule, with the nodes they occur at.
    """

    def __init__(self, network: fx.GraphModule, exclude: tuple[str, ...] = (), divisor: int = 8, prune_head_dim: bool = False):
        self.dropped: tuple[Any, ...] = ()
        self.whole = self
        labelled = propagate(network, exclude, prune_head_dim)
        self._calls = list(_counted(network, labelled))
        self._solved = labelled.labels.solve()
        self._written = list(dict.fromkeys(self._writes(network, labelled)))
        self._group(labelled, divisor)
        while self._freeze_irregular(labelled) or self._freeze_misfit(network, labelled):
            self._group(labelled, divisor)
        if not self.groups:
            raise UserError("no channel of this model can be pruned: "
                            + "; ".join(f"{f.channels} channels: {f.reason}" for f in self._frozen(labelled)))
        self.reads = list(dict.fromkeys((use.operand.name, use.dim) for use in labelled.reads if isinstance(use.operand, Param)
                                        and self.params[use.operand.name][use.dim] is not None))
        computed = [use for use in labelled.reads if isinstance(use.operand, Ref)
                    and self.tensors[use.operand.name][0][use.dim] is not None]
        self.gates = {f"gate_{i}": use for i, use in enumerate(computed)}
        self.writes = [(name, dim) for name, dim in self._written if self.params[name][dim] is not None]
        self.gone = np.zeros(len(self.groups), bool)
        self.clock: Callable[[np.ndarray, float], float] | None = None
        self.frozen = self._frozen(labelled)
        self.unknown = labelled.unknown
        self._count(network, labelled)
        self._parts_of.clear()

    # -- widths ---------------------------------------------------------------------------------------------------

    @property
    def full(self) -> np.ndarray:
        """Widths (groups,) with nothing cut."""
        return np.array([g.size for g in self.groups], int)

    @property
    def least(self) -> np.ndarray:
        """The smallest widths (groups,)."""
        return np.array([g.candidates[0] for g in self.groups], int)

    def at_least(self, widths: np.ndarray) -> Space:
        """The same space without what is narrower than these widths (groups,)."""
        found = copy.copy(self)
        found.groups = [replace(group, least=int(width)) for group, width in zip(self.groups, widths)]
        return found

    @cached_property
    def read_parts(self) -> dict[tuple[str, int], np.ndarray]:
        """Parts of every dimension that takes a gate, by (parameter or inserted gate, dim)."""
        return {**{(name, dim): self.params[name][dim] for name, dim in self.reads},
                **{(name, use.dim): self.tensors[use.operand.name][0][use.dim] for name, use in self.gates.items()}}

    @cached_property
    def full_costs(self) -> dict[str, int]:
        """Those of the whole network."""
        return {kind: cost.total(self.full) for kind, cost in self.whole.costs.items()}

    @property
    def full_macs(self) -> int:
        """MACs of the whole network."""
        return self.full_costs["flops"]

    @property
    def min_ratio(self) -> float:
        """The smallest share of MACs that can be reached."""
        return self.ratio(self.least)

    def share(self, kind: str, widths: np.ndarray) -> float:
        """A cost at these widths, as a share of the whole network's."""
        return self.costs[kind].total(widths) / self.full_costs[kind]

    def ratio(self, widths: np.ndarray) -> float:
        """Share of the whole network's MACs."""
        return self.share("flops", widths)

    def only(self, network: fx.GraphModule, dropped: tuple[Any, ...]) -> "Space":
        """The same atoms, at the cost of a network that has only some of the nodes and parameters (see `depth.shorten`)."""
        nodes = {node.name for node in network.graph.nodes}
        parameters = dict(network.named_parameters()).keys()
        out = copy.copy(self)
        out.dropped, out.whole = dropped, self.whole
        out.gone = np.array([not any(name in parameters or f"{name}.weight" in parameters for name in group.layers) for group in self.groups])
        out.macs = self.macs.only(np.array([layer.node in nodes for layer in self.layers]))
        out.parameters = self.parameters.only(np.array([name in parameters for name in self.parameter_names]))
        out.costs = {"flops": out.macs, "params": out.parameters}
        return out

    # -- construction ---------------------------------------------------------------------------------------------

    def _writes(self, network: fx.GraphModule, labelled: Labelled) -> Iterator[tuple[str, int]]:
        """(parameter, dim) behind each write: of a computed weight, the matrices it is computed from."""
        sources = {node.name: node.meta["args"] for node in network.graph.nodes if "args" in node.meta}

        def parameters(value: Any) -> Iterator[str]:
            if isinstance(value, Param):
                yield value.name
            elif isinstance(value, Ref):
                yield from parameters(sources[value.name])
            elif isinstance(value, (list, tuple)):
                for item in value:
                    yield from parameters(item)

        for use in labelled.writes:
            if isinstance(use.operand, Param):
                yield use.operand.name, use.dim
                continue
            made = labelled.tensor(use.operand).dims[use.dim]
            if made is None:
                continue
            atoms = set(self._solved.atoms_of(made).ravel().tolist())
            for name in dict.fromkeys(parameters(use.operand)):
                shape, dims = labelled.params[name][:2]
                for i, dim in enumerate(dims):
                    if math.prod(shape) > shape[i] and dim is not None and atoms <= set(self._solved.atoms_of(dim).ravel().tolist()):
                        yield name, i

    def _group(self, labelled: Labelled, divisor: int) -> None:
        solved = self._solved
        live = np.zeros(labelled.labels.count, bool)
        channels = np.full(labelled.labels.count, np.iinfo(int).max)
        signature = np.zeros(labelled.labels.count, np.uint64)
        for name, dim in self._written:
            atoms = _live_atoms(solved, labelled.params[name].dims[dim])
            live[atoms] = True
            seen, times = np.unique(atoms, return_counts=True)
            channels[seen] = np.minimum(channels[seen], times)
        occurrences = {id(dim): (f"{name}.{i}.{d}", dim) for name, ts in labelled.tensors.items()
                       for i, t in enumerate(ts) for d, dim in enumerate(t.dims)}
        occurrences |= {id(dim): (f"{name}:{d}", dim) for name, t in labelled.params.items() for d, dim in enumerate(t.dims)}
        for key, dim in occurrences.values():
            for k, column in enumerate(() if dim is None else solved.atoms_of(dim).T):
                with np.errstate(over="ignore"):
                    np.add.at(signature, column[column >= 0], _hash(f"{key}.{k}"))
        atoms = np.flatnonzero(live)
        _, first, member = np.unique(signature[atoms], return_index=True, return_inverse=True)
        place = np.empty(len(first), int)
        place[np.argsort(first)] = np.arange(len(first))  # groups in the order of the network
        owner = np.full(labelled.labels.count, -1)
        owner[atoms] = place[member]
        layers: list[dict[str, None]] = [{} for _ in first]
        for name, dim in self._written:
            for group in np.unique(owner[_live_atoms(solved, labelled.params[name].dims[dim])]).tolist():
                layers[group][_layer_name(name)] = None

        atoms = atoms[np.argsort(owner[atoms], kind="stable")]
        self._number = np.full(labelled.labels.count + 1, len(atoms))  # FIXED, -1, finds the last entry: the padding
        self._number[atoms] = np.arange(len(atoms))
        self.size = len(atoms)
        self.groups: list[Group] = []
        sizes = np.bincount(owner[atoms], minlength=len(first)).tolist()
        names = Counter()
        for size, start, tied in zip(sizes, np.cumsum([0, *sizes]).tolist(), layers):
            wide = int(channels[atoms[start:start + size]].min())
            step = max(1, divisor // wide)
            while step > 1 and size < MIN_CANDIDATES * step:
                step //= 2
            name = next(iter(tied))
            names[name] += 1
            name = name if names[name] == 1 else f"{name}#{names[name]}"
            self.groups.append(Group(name, start, start + size, step, wide, tuple(tied)))

        # Group of each atom, (size + 1,); the padding belongs to no group.
        self._owner = np.append(np.repeat(np.arange(len(self.groups)), self.full), len(self.groups))
        self._parts_of: dict[int, np.ndarray | None] = {}  # by identity: `labelled` keeps the arrays alive meanwhile

    def _parts(self, dim: Dim) -> np.ndarray | None:
        if dim is None:
            return None
        if id(dim) not in self._parts_of:
            parts = self._number[self._solved.atoms_of(dim)]
            self._parts_of[id(dim)] = parts if (parts < self.size).any() else None
        return self._parts_of[id(dim)]

    def _freeze_irregular(self, labelled: Labelled) -> bool:
        """Freezes atoms that combine in a pattern that widths alone do not describe; whether there were any."""
        found = False
        for layer, products in self._calls:
            for _, dim in (axis for _, axes in products for axis in axes):
                parts = self._parts(dim)
                if parts is not None and not self._regular(parts):
                    labelled.labels.freeze(dim, f"cut in an irregular pattern in {layer.name}")
                    found = True
        if found:
            self._solved = labelled.labels.solve()
        return found

    def _freeze_misfit(self, network: fx.GraphModule, labelled: Labelled) -> bool:
        """Freezes what enters and leaves a call that cannot be made smaller, or whose output then has another shape than planned;
        whether there was one. The network is tried at its smallest widths, without values."""
        self.params = {name: [self._parts(dim) for dim in t.dims] for name, t in labelled.params.items()}
        self.tensors = {name: [[self._parts(dim) for dim in t.dims] for t in ts] for name, ts in labelled.tensors.items()}
        node = rebuild.misfit(network, Plan.from_widths(self, self.least, np.zeros(self.size))) if self.groups else None
        if node is not None:
            labelled.freeze_call(node)
            self._solved = labelled.labels.solve()
        return node is not None

    def _regular(self, parts: np.ndarray) -> bool:
        """Whether the axis holds every combination of its groups' atoms equally often."""
        if parts.shape[1] == 1:  # single atoms: of one signature, so they occur equally often
            return True
        tuples, _, times = _unique_rows(np.sort(parts, 1), self.size + 1)
        kinds, which, _ = _unique_rows(self._owner[tuples], len(self.groups) + 1)
        for i, kind in enumerate(kinds):
            groups = kind[kind < len(self.groups)].tolist()
            mine = times[which == i]
            distinct = len(set(groups)) == len(groups)
            if not distinct or len(mine) != math.prod(self.groups[g].size for g in groups) or len(set(mine.tolist())) > 1:
                return False
        return True

    def _count(self, network: fx.GraphModule, labelled: Labelled) -> None:
        known: dict[int, Count] = {}

        def product(constant: float, axes: list) -> tuple[float, list[Count]]:
            return self.product(constant, [(size, self._parts(dim)) for size, dim in axes], known)

        self.macs = CostModel.build(len(self.groups), [[product(*p) for p in products] for _, products in self._calls])
        self.layers = [Layer(x.node, x.name, x.kind, self._channels(x.inputs), self._channels(x.outputs)) for x, _ in self._calls]
        names = dict(network.named_parameters()).keys()
        owned = {name: t for name, t in labelled.params.items() if name in names}
        self.parameters = CostModel.build(len(self.groups), [
            [product(1, list(zip(t.shape, t.dims)))] for t in owned.values()])
        self.parameter_names = list(owned)
        self.costs = {"flops": self.macs, "params": self.parameters}

    def product(self, constant: float, axes: list[tuple[int, np.ndarray | None]], known: dict[int, Count]) -> tuple[float, list[Count]]:
        """A constant times the number of kept indices of each axis, given as (size, parts): what `CostModel.build` takes. `known`: counts of
        parts that are alive, by identity."""
        counts = []
        for size, parts in axes:
            if parts is None:
                constant *= size
            else:
                if id(parts) not in known:
                    known[id(parts)] = self._polynomial(parts)
                counts.append(known[id(parts)])
        return constant, counts

    def _channels(self, axis: tuple[int, Dim]) -> np.ndarray | int:
        parts = self._parts(axis[1])
        return axis[0] if parts is None else parts

    def _polynomial(self, parts: np.ndarray) -> Count:
        kinds, _, times = _unique_rows(np.sort(self._owner[parts], 1), len(self.groups) + 1)
        terms = []
        for kind, n in zip(kinds, times):
            groups = tuple(int(g) for g in kind if g < len(self.groups))
            terms.append((n / math.prod(self.groups[g].size for g in groups), groups))
        return Count(tuple(terms))

    def _frozen(self, labelled: Labelled) -> list[Frozen]:
        by_reason: dict[str, dict[str, int]] = {}
        for name, dim in self._written:
            labels = labelled.params[name].dims[dim]
            if labels is None:
                continue
            atoms = self._solved.atoms_of(labels)
            stuck = (self._number[atoms] == self.size).all(1)
            for parts in atoms[stuck].tolist():
                reasons = [self._solved.reasons.get(atom, "nothing reads these channels through a weight") for atom in parts if atom >= 0]
                # An index that stands for several atoms, as (q, head, channel): what holds its head says more than the rest.
                reason = next((r for r in reasons if r not in (PICKED, HEAD_DIM)), reasons[-1])
                layers = by_reason.setdefault(reason, {})
                layers[_layer_name(name)] = layers.get(_layer_name(name), 0) + 1
        return [Frozen(tuple(layers), reason, sum(layers.values())) for reason, layers in by_reason.items()]


@dataclass(frozen=True)
class Plan:
    """Which atoms stay: a boolean array (space.size,). Everything else about the small network follows from it."""

    space: Space
    keep: np.ndarray

    @classmethod
    def whole(cls, space: Space) -> "Plan":
        """Nothing is cut."""
        return cls(space, np.ones(space.size, bool))

    @classmethod
    def from_file(cls, space: Space, keep: torch.Tensor) -> "Plan":
        """The plan of a tensor that a checkpoint holds.

        Raises:
            ValueError: it is none of this space.
        """
        if keep.dtype != torch.bool or keep.shape != (space.size,):
            raise ValueError(f"kept channels: {space.size} truth values are needed, not {keep.numel()} of {keep.dtype}")
        return cls(space, keep.cpu().numpy())

    @cached_property
    def widths(self) -> np.ndarray:
        """Kept atoms of each group, (groups,)."""
        return np.array([int(self.keep[g.start:g.stop].sum()) for g in self.space.groups])

    @cached_property
    def ratio(self) -> float:
        """Share of the whole network's MACs that is left."""
        return self.space.ratio(self.widths)

    def count(self, parts: np.ndarray | None, full: int) -> int:
        """Kept indices of an axis of `full` indices with these parts."""
        return full if parts is None else int(self.kept(parts).sum())

    def kept(self, parts: np.ndarray) -> np.ndarray:
        """Boolean (n,): an index stays if all its atoms do."""
        return np.append(self.keep, True)[parts].all(1)

    def by_group(self) -> dict[str, list[int]]:
        """The kept positions inside each group: what goes into `plan.json`."""
        return {g.name: np.flatnonzero(self.keep[g.start:g.stop]).tolist() for g in self.space.groups}

    @classmethod
    def from_widths(cls, space: Space, widths: np.ndarray, importance: np.ndarray) -> "Plan":
        """The `widths` most important atoms of each group; `importance` is (space.size,)."""
        keep = np.zeros(space.size, bool)
        for group, n in zip(space.groups, widths):
            order = np.argsort(-importance[group.start:group.stop], kind="stable")
            keep[group.start + order[:n]] = True
        return cls(space, keep)


def _counted(network: fx.GraphModule, labelled: Labelled) -> Iterator[tuple[Layer, list[Product]]]:
    """(layer, cost for one image) of every operator that `FORMULAS` counts."""
    for node in network.graph.nodes:
        formula = FORMULAS.get(node.meta.get("op", ""))
        if formula is None:
            continue
        args, out = labelled.operands(node), labelled.tensors[node.name][0]
        try:
            products = formula(args, out)
        except Exception:  # a call that the formula's author did not think of
            labelled.freeze_call(node)
            continue
        axis = channel_axis(node.meta["op"])
        batch = network.meta["batch"]
        channels = [_channel_axis(t, axis, batch) for t in (args[0], out)]
        # For one image: an axis that holds the batch (some models multiply over the batch, twice) counts for one.
        yield Layer(node.name, node.meta["layer"], node.meta["op"], *channels), [
            (n / batch ** sum(size % batch == 0 for size, _ in axes), axes) for n, axes in products]


def _channel_axis(tensor: Any, axis: int, batch: int) -> tuple[int, Dim]:
    """Size and labels of an axis. Of one that holds the channels of each image of a batch, those of one image."""
    if not isinstance(tensor, Tensor) or not -len(tensor.shape) <= axis < len(tensor.shape):
        return 0, None
    size, dim = tensor.shape[axis], tensor.dims[axis]
    return (size // batch, dim if dim is None else dim[:size // batch]) if size % batch == 0 else (size, dim)


def _live_atoms(solved: Solved, dim: Dim) -> np.ndarray:
    """All atoms of an axis that are not frozen, with repetition."""
    if dim is None:
        return np.zeros(0, int)
    atoms = solved.atoms_of(dim).ravel()
    atoms = atoms[atoms >= 0]
    return atoms[~solved.frozen[atoms]]


def _unique_rows(rows: np.ndarray, base: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct rows (n, k) of integers from 0 to base - 1, for each given row its place among them, and how often each occurs:
    `np.unique(rows, axis=0, ...)` by way of one integer a row, which sorts faster, where that fits."""
    k = rows.shape[1]
    if base ** k > np.iinfo(np.int64).max:
        unique, place, times = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
        return unique, place.reshape(-1), times
    powers = np.array([base ** i for i in reversed(range(k))])
    unique, place, times = np.unique(rows @ powers, return_inverse=True, return_counts=True)
    return unique[:, None] // powers % base, place, times


def _hash(key: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))


def _layer_name(parameter: str) -> str:
    return parameter.removesuffix(".weight")
