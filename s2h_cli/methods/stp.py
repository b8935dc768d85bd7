"""STP (ECCV 2024, arXiv 2403.06417): subnetworks that share the weights of the whole network learn from it, and the best one stays.

On every step the whole network learns the task, then two subnetworks learn its logits: one on budget, and a larger one (the paper's
subnet mutating expansion, against the gap in capacity). No weight is driven to zero. The loss itself guides the exploration: a
challenger, drawn at random or made from the best subnetwork by changing some widths, takes turns with it for some steps, and takes
its place if the mean of its KL(whole || subnetwork) over them is lower. From `settle` of the schedule on the best one alone learns.

A subnetwork is here a choice of widths, its channels those of greatest L1 norm. The paper also drops blocks from the ends of stages;
that is not done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from torch import fx, nn

from .. import distributed
from ..masks import Importance, plan_of_ranks, widths_of
from ..plan import Space
from .hard import HardMethod, HardNetwork
from .s2h import divergence


@dataclass(frozen=True)
class Settings:
    """Constants of the method."""

    explore: float = 0.5  #: probability that a challenger is drawn at random
    change: float = 0.2  #: probability that a mutation changes the width of a group
    turns: int = 5  #: steps that best and challenger train each before they are compared
    growth: float = 2.0  #: the larger subnetwork has up to this many times the MACs of the budget
    settle: float = 0.5  #: share of the schedule after which the best subnetwork stays


class STP(HardMethod):
    """The whole network, and subnetworks on slices of its weights. `compile` and `sync_bn` as in `s2h_cli.methods`.

    A subnetwork is told by its *shares*: (groups,) numbers that its widths are in proportion to, as far as the budget goes.
    """

    def __init__(self, network: fx.GraphModule, space: Space, target: float, settings: Settings = Settings(), *,
                 compile: bool = False, sync_bn: bool = False):
        self.network, self.space, self.target, self.settings = network, space, target, settings
        self.weights = dict(network.named_parameters())
        self.importance = Importance(space, self.weights)
        self.whole, self.hard, self.larger = (
            HardNetwork(network, space, self.weights, compile=compile, sync_bn=sync_bn) for _ in range(3))
        self.larger.module.train()  # the loop knows the networks that are evaluated
        self.shares = torch.ones(2, len(space.groups))  # of the best subnetwork, and of its challenger
        self.widths = np.zeros((3, len(space.groups)), int)  # of both, and of the larger subnetwork
        self.scores = torch.zeros(2, device=next(network.parameters()).device)  # sums of KL since the last comparison
        self.steps = 0
        self.settled = False

    # -- the interface of methods ---------------------------------------------------------------------------------

    def start_step(self, progress: float) -> None:
        """Picks the subnetworks of this step."""
        if self.settled:
            return
        if self.steps % (2 * self.settings.turns) == 0:
            self._compare()
        settles = progress >= self.settings.settle
        self.turn = 0 if settles else self.steps % 2
        ranks = self.importance.ranks()
        self.hard.follow(plan_of_ranks(self.space, self.widths[self.turn], ranks))
        self.larger.follow(plan_of_ranks(self.space, self.widths[2], ranks))
        self.steps += 1
        if settles:
            self._settle()

    @property
    def passes(self) -> list[Callable[..., dict[str, torch.Tensor]]]:
        return [self.whole_terms, self.hard_terms, self.larger_terms][:2 if self.settled else 3]

    def whole_terms(self, images: torch.Tensor, targets: torch.Tensor, criterion: Callable) -> dict[str, torch.Tensor]:
        """The task's loss of the whole network. Arguments as of `S2H.soft_terms`."""
        logits = self.whole.run(self.weights, images)
        self.logits = logits.detach()
        return {"task": criterion(logits, targets)}

    def hard_terms(self, images: torch.Tensor, targets: torch.Tensor, criterion: Callable) -> dict[str, torch.Tensor]:
        """KL(whole || subnetwork on budget), which is its score too."""
        loss = divergence(self.logits, self.hard.run(self.hard.parameters(), images))
        self.scores[self.turn] += loss.detach()
        return {"hard": loss}

    def larger_terms(self, images: torch.Tensor, targets: torch.Tensor, criterion: Callable) -> dict[str, torch.Tensor]:
        """KL(whole || larger subnetwork)."""
        return {"larger": divergence(self.logits, self.larger.run(self.larger.parameters(), images))}

    def networks(self) -> dict[str, nn.Module]:
        return {"whole": self.whole.evaluated(), "hard": self.hard.evaluated()}

    def state_dict(self) -> dict:
        return {"hard": self.hard.state_dict(), "whole": self.whole.state_dict(), "larger": self.larger.state_dict(), "shares": self.shares,
                "widths": torch.from_numpy(self.widths), "scores": distributed.mean(self.scores.clone()), "steps": self.steps, "settled": self.settled}

    def load_state_dict(self, state: dict) -> None:
        for network in ("hard", "whole", "larger"):
            getattr(self, network).load_state_dict(state[network])
        self.shares, self.widths, self.steps = state["shares"], state["widths"].numpy(), state["steps"]
        self.scores.copy_(state["scores"])
        if state["settled"]:
            self._settle()

    # -- the method -----------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        """The better of two goes on as the best; a new challenger, and a new larger subnetwork. The same in all processes of a job."""
        best, challenger = distributed.mean(self.scores).tolist()
        if challenger < best:
            self.shares[0], self.widths[0] = self.shares[1], self.widths[1]
        draws = distributed.same(torch.rand(5, len(self.space.groups)).to(self.scores.device)).cpu()
        if draws[0, 0] < self.settings.explore or self.steps == 0:
            self.shares[1] = 0.1 + 0.9 * draws[1]
        else:
            self.shares[1] = torch.where(draws[1] < self.settings.change, 0.1 + 0.9 * draws[2], self.shares[0])
        grown = torch.where(draws[3] < self.settings.change, 0.1 + 0.9 * draws[4], self.shares[0])
        budget = min(1.0, self.target * (1 + (self.settings.growth - 1) * float(draws[0, -1])))
        if self.steps == 0:
            self.widths[0] = widths_of(self.space, self.shares[0], self.target)
        self.widths[1] = widths_of(self.space, self.shares[1], self.target)
        self.widths[2] = widths_of(self.space, grown, budget)
        self.scores.zero_()

    def _settle(self) -> None:
        self.settled = True
        self.turn = 0
        self.whole.stand_still()
        self.hard.stand_still()
