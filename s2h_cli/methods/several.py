"""Several budgets from one run: one network, whose steps train the parts of a method, one for each budget, in turn."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import fx

from ..budget import Budget
from ..plan import Space


class Several:
    """What is trained is the one network that all parts share; masks and hard network are each part's own.

    Args:
        part: a method, which is called with the network, the space and a budget.
        budgets: which differ in their MACs.
    """

    def __init__(self, part: Callable, network: fx.GraphModule, space: Space, budgets: list[Budget]):
        self.network = network
        self.parts = {f"_{budget.flops:g}": part(network, space, budget) for budget in budgets}
        self.turn = -1

    @property
    def now(self) -> Any:
        """The part whose turn it is."""
        return list(self.parts.values())[self.turn % len(self.parts)]

    def start_step(self, progress: float) -> bool:
        self.turn += 1
        return any([part.start_step(progress) for part in (self.parts.values() if progress >= 1 else [self.now])])

    @property
    def passes(self) -> list[Callable]:
        return self.now.passes

    def backward(self, terms: dict[str, torch.Tensor]) -> None:
        self.now.backward(terms)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self.now.optimizers()

    def state_dict(self) -> dict:
        return {"turn": self.turn, "parts": {name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.turn = state["turn"]
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
