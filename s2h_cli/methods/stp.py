"""STP (ECCV 2024, arXiv 2403.06417): subnetworks that share the weights of the whole network learn from it, and the best one stays.

On every step the whole network learns the task, then two subnetworks learn its logits: one on budget, and a larger one (the paper's
subnet mutating expansion, against the gap in capacity). No weight is driven to zero. The loss itself guides the exploration: a
challenger, drawn at random or made from the best subnetwork by changing some widths and depths, takes turns with it for some steps, and
takes its place if the mean of its KL(whole || subnetwork) over them is lower. From `settle` of the schedule on the best one alone learns.

A subnetwork is a choice of depths, by how many blocks each stage is shortened from its end, and of widths, a group's channels being those
of greatest norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from torch import fx, nn

from .. import distributed
from ..budget import Budget
from ..depth import shorten, stages
from ..masks import Importance, plan_of_ranks, widths_of
from ..plan import Plan, Space
from .hard import HardMethod, HardNetwork
from .s2h import divergence


@dataclass(frozen=True)
class Settings:
    """Constants of the method."""

    explore: float = 0.5  #: probability that a challenger is drawn at random
    change: float = 0.2  #: probability that a mutation changes the width of a group, or the depth of a stage
    turns: int = 5  #: steps that best and challenger train each before they are compared
    growth: float = 2.0  #: the larger subnetwork has up to this many times the MACs of the budget
    settle: float = 0.5  #: share of the schedule after which the best subnetwork stays


@dataclass
class Subnetwork:
    """A choice, as numbers.

    Attributes:
        shares: (groups,) numbers that the widths are in proportion to, as far as the budget goes.
        depths: (stages,) blocks that are left of each stage.
        widths: (groups,) atoms.
    """

    shares: torch.Tensor
    depths: torch.Tensor
    widths: torch.Tensor


class STP(HardMethod):
    """The whole network, and subnetworks on slices of its weights: the best one (`hard`), its challenger, and a larger one.
    `compile` and `sync_bn` as in `s2h_cli.methods`."""

    def __init__(self, network: fx.GraphModule, space: Space, budget: Budget, settings: Settings = Settings(), *,
                 compile: bool = False, sync_bn: bool = False):
        self.network, self.space, self.budget, self.settings = network, space, budget, settings
        self.weights = dict(network.named_parameters())
        self.importance = Importance(space, self.weights)
        self.whole, self.hard, self.challenger, self.larger = (
            HardNetwork(network, space, self.weights, compile=compile, sync_bn=sync_bn) for _ in range(4))
        for inner in (self.challenger, self.larger):
            inner.module.train()  # the loop knows the networks that are evaluated
        self.stages = stages(network, space)
        self.shortened: dict[tuple[int, ...], Space] = {}  # by depths
        self.full = torch.tensor([len(stage) for stage in self.stages], dtype=torch.int64)
        everything = Subnetwork(torch.ones(len(space.groups)), self.full, torch.from_numpy(space.full))
        self.choices = {"hard": everything, "challenger": everything, "larger": everything}
        self.scores = torch.zeros(2, device=next(network.parameters()).device)  # sums of KL since the last comparison: best, challenger
        self.steps = 0
        self.settled = False

    # -- the interface of methods ---------------------------------------------------------------------------------

    def start_step(self, progress: float) -> None:
        """Picks the subnetworks of this step."""
        if self.settled:
            return
        compares = self.steps % (2 * self.settings.turns) == 0
        if compares:
            self._compare()
        settles = progress >= self.settings.settle
        self.turn = 0 if settles else self.steps % 2
        ranks = self.importance.ranks()
        for name in self.choices if compares else ("challenger" if self.turn else "hard", "larger"):  # channels move with the weights
            choice = self.choices[name]
            getattr(self, name).follow(plan_of_ranks(self._space(choice.depths), choice.widths.numpy(), ranks))
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
        """KL(whole || subnetwork on budget) of the one whose turn it is, which is its score too."""
        inner = self.challenger if self.turn else self.hard
        loss = self._divergence(inner, images)
        self.scores[self.turn] += loss.detach()
        return {"hard": loss}

    def larger_terms(self, images: torch.Tensor, targets: torch.Tensor, criterion: Callable) -> dict[str, torch.Tensor]:
        """KL(whole || larger subnetwork)."""
        return {"larger": self._divergence(self.larger, images)}

    def networks(self) -> dict[str, nn.Module]:
        return {"whole": self.whole.evaluated(), "hard": self.hard.evaluated()}

    def state_dict(self) -> dict:
        return {"whole": self.whole.state_dict(), **{name: getattr(self, name).state_dict() for name in self.choices},
                "choices": {name: vars(choice) for name, choice in self.choices.items()},
                "scores": distributed.mean(self.scores.clone()), "steps": self.steps, "settled": self.settled}

    def load_state_dict(self, state: dict) -> None:
        self.whole.load_state_dict(state["whole"])
        for name, choice in state["choices"].items():
            self.choices[name] = choice = Subnetwork(**choice)
            inner = getattr(self, name)
            inner.follow(Plan(self._space(choice.depths), inner.plan.keep))
            inner.load_state_dict(state[name])
        self.steps = state["steps"]
        self.scores.copy_(state["scores"])
        if state["settled"]:
            self._settle()

    # -- the method -----------------------------------------------------------------------------------------------

    def _divergence(self, inner: HardNetwork, images: torch.Tensor) -> torch.Tensor:
        """KL(whole || inner). Weights of dropped blocks take part by nothing of theirs: data parallelism waits for the gradient of every weight."""
        absent = sum(weight.flatten()[:0].sum() for name, weight in self.weights.items() if name not in inner.present)
        return divergence(self.logits, inner.run(inner.parameters(), images)) + absent

    def _compare(self) -> None:
        """The better of two goes on as the best; a new challenger, and a new larger subnetwork. The same in all processes of a job."""
        groups, deep = len(self.space.groups), len(self.stages)
        if self.steps == 0:
            self.choices["hard"] = self._on_budget(torch.ones(groups), self.full, self.budget)
        best, challenger = distributed.mean(self.scores).tolist()
        if challenger < best:
            self.hard, self.challenger = self.challenger, self.hard
            self.choices["hard"] = self.choices["challenger"]
        draws = distributed.same(torch.rand(4, groups + deep + 1).to(self.scores.device)).cpu()
        explores, growth = draws[0, -1] < self.settings.explore, float(draws[2, -1])
        now = self.choices["hard"]

        def drawn(change: torch.Tensor, to: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Shares and depths of the best subnetwork, some of them changed."""
            shares = torch.where(change[:groups], 0.1 + 0.9 * to[:groups], now.shares)
            return shares, torch.where(change[groups:-1], (to[groups:-1] * (self.full + 1)).long(), now.depths)

        chance = 1.0 if explores else self.settings.change
        self.choices["challenger"] = self._on_budget(*drawn(draws[0] < chance, draws[1]), self.budget)
        larger = self.budget.relaxed(1 + (self.settings.growth - 1) * growth)
        self.choices["larger"] = self._on_budget(*drawn(draws[2] < self.settings.change, draws[3]), larger)
        self.scores.zero_()

    def _on_budget(self, shares: torch.Tensor, depths: torch.Tensor, budget: Budget) -> Subnetwork:
        """The subnetwork of these shares and depths; where the blocks that are left cannot fill the budget, the deepest cut stages get theirs back."""
        depths = depths.clone()
        while budget.exceeds(space := self._space(depths), space.full):
            depths[(self.full - depths).argmax()] += 1
        return Subnetwork(shares, depths, torch.from_numpy(np.where(space.gone, 0, widths_of(space, shares, budget))))

    def _space(self, depths: torch.Tensor) -> Space:
        key = tuple(depths.tolist())
        if key not in self.shortened:
            blocks = tuple(block for stage, depth in zip(self.stages, key) for block in stage[depth:])
            self.shortened[key] = shorten(self.network, self.space, blocks)
        return self.shortened[key]

    def _settle(self) -> None:
        self.settled = True
        self.turn = 0
        self.whole.stand_still()
        self.hard.stand_still()
