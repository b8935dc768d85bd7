"""No training: the least important channels go, one cut, onto the budget. Tries a model's whole path in seconds."""

from __future__ import annotations

from torch import fx, nn

from ..budget import Budget
from ..masks import Importance
from ..plan import Space
from ..rebuild import rebuild
from .cut import by_magnitude


class OneShot:
    """Cuts by the norm of the weights that write and read a channel, each group's on a scale of its own mean."""

    def __init__(self, network: fx.GraphModule, space: Space, budget: Budget):
        self.network, self.budget = network, budget
        self.parts = {"": self}
        self.plan = by_magnitude(space, budget, Importance(space, dict(network.named_parameters()))().cpu().numpy())
        self.small = rebuild(network, self.plan)

    def networks(self) -> dict[str, nn.Module]:
        return {"soft": self.network, "hard": self.small}

    def result(self) -> fx.GraphModule:
        return self.small
