"""No training: the least important channels go, one cut, onto the budget. Tries a model's whole path in seconds."""

from __future__ import annotations

import numpy as np
from torch import fx, nn

from ..masks import Importance, fit_budget
from ..plan import Plan, Space
from ..rebuild import rebuild


class OneShot:
    """Cuts by the L1 norm of the writing weights, each group's on a scale of its own mean."""

    def __init__(self, network: fx.GraphModule, space: Space, target: float):
        self.network = network
        self.parts = {"": self}
        importance = Importance(space, dict(network.named_parameters()))().cpu().numpy()
        value = []
        for group in space.groups:
            ranked = np.sort(importance[group.start:group.stop])[::-1] / max(importance[group.start:group.stop].mean(), 1e-12)
            value.append(np.array([ranked[n - 1] for n in group.candidates]))  # of the least channel that a step brings
        self.plan = Plan.from_widths(space, fit_budget(space, value, target), importance)
        self.small = rebuild(network, self.plan)

    def networks(self) -> dict[str, nn.Module]:
        return {"soft": self.network, "hard": self.small}

    def result(self) -> fx.GraphModule:
        return self.small
