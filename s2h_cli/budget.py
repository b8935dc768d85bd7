"""Budgets: which share of the whole network's costs may remain. `masks.fit_budget` meets one exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .plan import Space

#: The costs that a budget can limit, by the names of their options, and what they are counted in.
KINDS = {"flops": "MACs", "params": "parameters", "latency": "latency"}


@dataclass(frozen=True)
class Budget:
    """Shares of the whole network's costs, 0 to 1, that may remain. All that are given hold."""

    flops: float | None = None
    params: float | None = None
    latency: float | None = None

    @property
    def shares(self) -> dict[str, float]:
        return {kind: share for kind in KINDS if (share := getattr(self, kind)) is not None}

    def holds(self, space: Space, widths: np.ndarray) -> bool:
        return all(space.share(kind, widths) <= share for kind, share in self.shares.items())

    def exceeds(self, space: Space, widths: np.ndarray) -> bool:
        """Whether it allows more of every cost than these widths have."""
        return all(space.share(kind, widths) < share for kind, share in self.shares.items())

    def excess(self, space: Space, widths: torch.Tensor) -> torch.Tensor:
        """Share minus allowed share of the cost that is furthest over its limit, a float64 scalar, differentiable in real widths (groups,)."""
        import torch  # here, as the command line imports this module for --help

        found = {kind: space.costs[kind].differentiable(widths) / space.full_costs[kind] for kind in self.shares}
        worst = torch.stack([found[kind].detach() / share for kind, share in self.shares.items()]).argmax(0, keepdim=True)  # on a GPU none waits for it
        return torch.stack([found[kind] - share for kind, share in self.shares.items()]).index_select(0, worst).squeeze(0)

    def met(self, space: Space, widths: np.ndarray) -> bool:
        """Whether what can be counted holds; latency is measured."""
        return replace(self, latency=None).holds(space, widths)

    def on_the_way(self, progress: float) -> Budget:
        """From the whole network (0) to this budget (1)."""
        return replace(self, **{kind: 1 - (1 - share) * progress for kind, share in self.shares.items()})

    def relaxed(self, factor: float) -> Budget:
        """So many times this budget, at most the whole network."""
        return replace(self, **{kind: min(1.0, share * factor) for kind, share in self.shares.items()})

    def check(self, space: Space) -> None:
        """Raises UserError if not even the smallest widths are within it; of latency `lookup` says that."""
        for kind, share in self.shares.items():
            if kind != "latency" and (least := space.share(kind, space.least)) > share:
                raise UserError(f"--{kind} {share:g} cannot be reached: the smallest reachable share is {math.ceil(least * 1e4) / 1e4:.4f}; "
                                "ask for that or more, or lower --divisor")
