"""Masks: a learnable width for every group, the gates it gives, and the way back onto an exact budget.

For a group of C atoms with candidate widths n_1 < ... < n_K = C and logits u (S2HPruner, NeurIPS 2024, "relaxed mask"):

    p = softmax(u / T)              probability of each width
    w_c = sum of p_k over n_k > c   probability that rank c is kept: a ladder that falls with the rank c = 0, 1, ...
    E = sum of p_k n_k              expected width, also the sum of w
    N = the least candidate >= E    width of the hard network, straight-through to E

Ranks order a group's atoms by importance, the norm of the weights that write and read them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from . import distributed
from .budget import Budget
from .cost import product
from .plan import Plan, Space


#: How near to a latency asked for the clock must find a network, as shares of it; what is aimed at; and how often it is tried.
NEAR, AIM, TRIES = (0.98, 1.0), 0.99, 8


class Masks(nn.Module):
    """Width logits of all groups, as one padded matrix `u` (groups, K)."""

    def __init__(self, space: Space, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature
        k = max(len(g.candidates) for g in space.groups)
        candidates = torch.zeros(len(space.groups), k, dtype=torch.float64)
        valid = torch.zeros(len(space.groups), k, dtype=torch.bool)
        u = torch.zeros(len(space.groups), k)
        for i, group in enumerate(space.groups):
            n = len(group.candidates)
            candidates[i, :n] = torch.tensor(group.candidates)
            valid[i, :n] = True
            if n > 1:  # near full width, so that E is half a step below it; not one-hot, where gradients vanish
                q = (group.size - group.step) / group.size
                u[i, n - 1] = temperature * math.log((n - 1) * q / (1 - q))
        self.u = nn.Parameter(u)
        self.register_buffer("candidates", candidates, persistent=False)
        self.register_buffer("valid", valid, persistent=False)
        # For each atom its group, and for each (group, rank) the first candidate wider than the rank.
        sizes = torch.tensor([g.size for g in space.groups])
        self.register_buffer("group", torch.repeat_interleave(torch.arange(len(sizes)), sizes), persistent=False)
        self.register_buffer("start", torch.tensor([g.start for g in space.groups])[self.group], persistent=False)
        bins = [torch.searchsorted(torch.tensor(g.candidates), torch.arange(g.size), right=True) for g in space.groups]
        self.register_buffer("bin_of_rank", torch.cat(bins), persistent=False)

    @property
    def probabilities(self) -> torch.Tensor:
        """p, (groups, K) float64; zero where a group has no such candidate."""
        return (self.u.double() / self.temperature).masked_fill(~self.valid, -math.inf).softmax(1)

    def ladder(self) -> torch.Tensor:
        """Probability that the width is at least candidate k, (groups, K): falls with k; 1 for the first."""
        p = self.probabilities
        return p.flip(1).cumsum(1).flip(1).clamp(max=1.0).to(self.u.dtype)

    def keep_probability(self, rank: torch.Tensor) -> torch.Tensor:
        """w of each atom, (atoms,), given its rank in its group, (atoms,) int64."""
        return self.ladder()[self.group, self.bin_of_rank[self.start + rank]]

    def expected_widths(self) -> torch.Tensor:
        """E, (groups,) float64."""
        return (self.probabilities * self.candidates).sum(1)

    def hard_widths(self) -> torch.Tensor:
        """N, (groups,) float64: a candidate in value, E in gradient (straight-through)."""
        expected = self.expected_widths()
        # The last candidate is enough whatever rounding made of E: the others count how many are not.
        short = self.valid[:, 1:] & (self.candidates[:, :-1] < expected.detach()[:, None] - 1e-6)
        widths = self.candidates.gather(1, short.sum(1, keepdim=True)).squeeze(1)
        return expected + (widths - expected).detach()


class Importance:
    """Squared L2 norm of the weights that write an atom and of those that read it, each as a multiple of the mean over the channels of its
    layer, averaged over them. So every layer of a group has one vote, whatever its size and scale."""

    def __init__(self, space: Space, parameters: dict[str, torch.Tensor]):
        self.space = space
        self.parameters = parameters
        self.device = next(iter(parameters.values())).device
        self.parts = {(name, dim): torch.from_numpy(space.params[name][dim]).to(self.device) for name, dim in dict.fromkeys(space.writes + space.reads)}
        times = torch.zeros(space.size + 1, device=self.device)
        for parts in self.parts.values():
            times.index_add_(0, parts.reshape(-1), torch.ones(parts.numel(), device=self.device))
        self.times = times.clamp_(min=1)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Importance of each atom, (atoms,) float32; around 1."""
        total = torch.zeros(self.space.size + 1, device=self.device)
        for (name, dim), parts in self.parts.items():
            norm = self.parameters[name].detach().float().square().transpose(0, dim).flatten(1).sum(1)
            norm /= norm.mean().clamp(min=1e-30)
            total.index_add_(0, parts.reshape(-1), norm.repeat_interleave(parts.shape[1]))
        return (total / self.times)[:-1]

    def ranks(self) -> torch.Tensor:
        """Rank of each atom in its group, (atoms,) int64; 0 is the most important. The same in all processes of a job."""
        importance = distributed.same(self())
        ranks = torch.empty(self.space.size, dtype=torch.int64, device=self.device)
        for group in self.space.groups:
            order = importance[group.start:group.stop].argsort(descending=True, stable=True)
            ranks[group.start + order] = torch.arange(group.size, device=self.device)
        return ranks


def gated(weight: torch.Tensor, dim: int, gates: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """A weight times the gate of each index along `dim`: the product over its atoms.

    Args:
        gates: one for each atom, (atoms,).
        parts: the atoms of each of the n indices, (n, k) int64, padded with `atoms`.
    """
    gate = product(torch.cat([gates, gates.new_ones(1)])[parts])
    return weight * gate.view([-1 if d == dim else 1 for d in range(weight.dim())])


def gate_reads(operands: dict[str, torch.Tensor], read_parts: dict[tuple[str, int], torch.Tensor], gates: torch.Tensor) -> dict[str, torch.Tensor]:
    """All operands; those that read prunable channels are gated along the dimension that reads.

    Args:
        operands: parameters and inserted gates, by name.
        read_parts: see `Space.read_parts`.
        gates: one for each atom, (atoms,).
    """
    out = dict(operands)
    for (name, dim), parts in read_parts.items():
        out[name] = gated(out[name], dim, gates, parts)
    return out


def plan_of_ranks(space: Space, widths: np.ndarray, ranks: torch.Tensor) -> Plan:
    """Keeps the first `widths` ranks of each group."""
    return Plan(space, ranks.cpu().numpy() < np.repeat(widths, space.full))


def fit_budget(space: Space, value: list[np.ndarray], budget: Budget) -> np.ndarray:
    """Widths that meet a budget exactly: it holds, and would not if any group were one step wider.

    Starts at the smallest widths and takes the most valuable step that still fits, until none fits. Latency is what the space's clock
    says: what the model of it is allowed is changed until the network that is found takes the time asked for, within `NEAR`,
    in the mean of two readings.

    Args:
        value: for each group, for each candidate width, what the step up to it is worth; falling along a group.

    Returns:
        Widths (groups,) in atoms.

    Raises:
        UserError: not even the smallest widths are within the budget.
    """
    budget.check(space)
    if budget.latency is None:
        return _fitted(space, value, budget)

    def reading(widths: np.ndarray) -> float:
        return space.clock(widths, budget.latency) / budget.latency

    allowed, slope = budget.latency, 1.0  # slope: how the clock follows what is allowed, in logarithms
    tried: list[tuple[float, float, np.ndarray]] = []
    for _ in range(TRIES):
        widths = _fitted(space, value, replace(budget, latency=allowed))
        if tried and np.array_equal(widths, tried[-1][2]):  # another limit, or the step of a width, allows no other
            break
        share = reading(widths)
        if NEAR[0] <= share <= NEAR[1]:  # of many readings one is near by chance
            share = (share + reading(widths)) / 2
        if tried and share != tried[-1][1]:
            slope = min(4.0, max(0.25, math.log(share / tried[-1][1]) / math.log(allowed / tried[-1][0])))
        tried.append((allowed, share, widths))
        if NEAR[0] <= share <= NEAR[1]:
            break
        allowed *= (AIM / share) ** (1 / slope)
    return min(tried, key=lambda found: abs(found[1] - AIM))[2]


def _fitted(space: Space, value: list[np.ndarray], budget: Budget) -> np.ndarray:
    widths = space.least.copy()
    steps = sorted((-float(value[i][k]), k, i) for i, g in enumerate(space.groups) for k in range(1, len(g.candidates)))
    full = set()
    for _, k, i in steps:
        if i in full:
            continue
        trial = widths.copy()
        trial[i] = space.groups[i].candidates[k]
        if budget.holds(space, trial):
            widths = trial
        else:
            full.add(i)
    return widths


def widths_of(space: Space, shares: torch.Tensor, budget: Budget) -> np.ndarray:
    """Widths (groups,) in proportion to `shares` (groups,) of the full ones, exactly on budget."""
    return fit_budget(space, _in_proportion(space, shares.tolist()), budget)


def _in_proportion(space: Space, shares: list[float]) -> list[np.ndarray]:
    return [-np.array(group.candidates) / group.size / share for group, share in zip(space.groups, shares)]


def floored(space: Space, share: float, budget: Budget) -> Space:
    """The space without widths below so large a share of those that every group has where all on this budget are cut alike, rounded down to
    a step. Of a latency its model is asked, not the clock."""
    uniform = _fitted(space, _in_proportion(space, [1.0] * len(space.groups)), budget)
    return space.at_least(np.array([int(share * width) // group.step * group.step for group, width in zip(space.groups, uniform)]))


def widths_of_scores(space: Space, scores: np.ndarray, budget: Budget) -> np.ndarray:
    """Widths (groups,) that keep the atoms of greatest score (atoms,), exactly on budget: a step is worth the least atom that it brings."""
    return fit_budget(space, [np.sort(scores[group.start:group.stop])[::-1][np.array(group.candidates) - 1] for group in space.groups], budget)
