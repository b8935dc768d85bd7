"""The controls: the whole network trains up to a point of the schedule, is cut there once, and what is left trains on.

    dense      never cut
    uniform    cut before the first step: the same share of every group, its channels of greatest norm
    random     cut before the first step: widths drawn at random, scaled to the budget, and channels drawn at random
    magnitude  cut at half of the schedule: the channels of least norm, each group's on a scale of its own mean, go first

What is left keeps the weights that it had. With `--teacher` all of them are distilled.
"""

from __future__ import annotations

from functools import partial
from typing import Callable

import numpy as np
import torch
from torch import fx

from .. import distributed
from ..budget import Budget
from ..masks import Importance, widths_of, widths_of_scores
from ..plan import Plan, Space
from .hard import HardMethod, HardNetwork

Choose = Callable[[Space, Budget, np.ndarray], Plan]


class Cut(HardMethod):
    """Trains one network, on the weights of the whole one.

    Args:
        choose: the plan, of space, budget and importance (atoms,).
        at: share of the schedule after which it is cut.
        compile, sync_bn: as in `s2h_cli.methods`.
    """

    def __init__(self, network: fx.GraphModule, space: Space, budget: Budget, *, choose: Choose, at: float,
                 compile: bool = False, sync_bn: bool = False):
        self.network, self.space, self.budget, self.choose, self.at = network, space, budget, choose, at
        weights = dict(network.named_parameters())
        self.importance = Importance(space, weights)
        self.hard = HardNetwork(network, space, weights, compile=compile, sync_bn=sync_bn)
        self.is_cut = False

    def start_step(self, progress: float) -> None:
        if progress >= self.at and not self.is_cut:
            importance = self.importance()
            keep = torch.from_numpy(self.choose(self.space, self.budget, importance.cpu().numpy()).keep)
            keep = distributed.same(keep.to(importance.device))  # random numbers are each process's own
            self.hard.follow(Plan(self.space, keep.cpu().numpy()))
            self._stand_still()

    @property
    def passes(self) -> list[Callable[..., dict[str, torch.Tensor]]]:
        return [self.task_terms]

    def state_dict(self) -> dict:
        return {"hard": self.hard.state_dict(), "is_cut": self.is_cut}

    def load_state_dict(self, state: dict) -> None:
        self.hard.load_state_dict(state["hard"])
        if state["is_cut"]:
            self._stand_still()

    def _stand_still(self) -> None:
        self.is_cut = True
        self.hard.stand_still()


def whole(space: Space, budget: Budget, importance: np.ndarray) -> Plan:
    return Plan.whole(space)


def uniform(space: Space, budget: Budget, importance: np.ndarray) -> Plan:
    return Plan.from_widths(space, widths_of(space, torch.ones(len(space.groups)), budget), importance)


def at_random(space: Space, budget: Budget, importance: np.ndarray) -> Plan:
    """From torch's random numbers: those of the step."""
    shares = 0.1 + 0.9 * torch.rand(len(space.groups))
    return Plan.from_widths(space, widths_of(space, shares, budget), torch.rand(space.size).numpy())


def by_magnitude(space: Space, budget: Budget, importance: np.ndarray) -> Plan:
    means = np.array([max(importance[group.start:group.stop].mean(), 1e-12) for group in space.groups], importance.dtype)
    return Plan.from_widths(space, widths_of_scores(space, importance / np.repeat(means, space.full), budget), importance)


Dense = partial(Cut, choose=whole, at=0.0)
Uniform = partial(Cut, choose=uniform, at=0.0)
Random = partial(Cut, choose=at_random, at=0.0)
Magnitude = partial(Cut, choose=by_magnitude, at=0.5)
