"""The hard network: the small network of a plan, really sliced, on the weights that it shares with the whole one."""

from __future__ import annotations

from typing import Callable

import numpy as np
import torch
from torch import fx, nn
from torch.func import functional_call

from ..depth import without
from ..graph import tensors_of
from ..plan import Plan, Space
from ..rebuild import Indices, kept_indices, rebuild, resize, skeleton, slice_parameters


class HardNetwork:
    """Follows plans, at first the whole one, and has buffers of its own (batch-norm statistics).

    Args:
        network: the whole network, or its copy with gates (`rebuild.insert_gates`).
        operands: its tensors that are sliced: parameters and inserted gates, by name.
        compile, sync_bn: as in `s2h_cli.methods`.
    """

    def __init__(self, network: fx.GraphModule, space: Space, operands: dict[str, torch.Tensor], *, compile: bool = False, sync_bn: bool = False):
        self.network, self.operands, self.compile, self.sync_bn = network, operands, compile, sync_bn
        self.plan: Plan | None = None
        self.follow(Plan.whole(space))

    def follow(self, plan: Plan) -> None:
        """Makes it the network of `plan`. Where other channels stay than before, its batch-norm statistics start anew."""
        if self.plan is None or plan.space.dropped != self.plan.space.dropped:
            self._build(plan.space)
        elif np.array_equal(plan.keep, self.plan.keep):
            return
        self.plan = plan
        self.indices: Indices = kept_indices(plan, next(iter(self.operands.values())).device)
        resize(self.module, self.whole, plan, self.indices)

    def _build(self, space: Space) -> None:
        training = (self.module if self.plan else self.network).training
        self.whole = without(self.network, space.dropped)
        self.module = skeleton(self.whole)
        if self.sync_bn:
            self.module = nn.SyncBatchNorm.convert_sync_batchnorm(self.module)
        self.module.train(training)
        self.run = runner(self.module)
        self.present = tensors_of(self.whole).keys()

    def stand_still(self) -> None:
        """Says that the plan stays."""
        if self.compile:
            self.run = torch.compile(self.run)

    def parameters(self) -> dict[str, torch.Tensor]:
        return slice_parameters({name: tensor for name, tensor in self.operands.items() if name in self.present}, self.indices)

    def evaluated(self) -> nn.Module:
        return Forward(self.module, self.parameters)

    def result(self, network: fx.GraphModule) -> fx.GraphModule:
        """The network, cut, with weights of its own: what is written to disk."""
        small = rebuild(without(network, self.plan.space.dropped), self.plan)
        for name, buffer in small.named_buffers():
            buffer.copy_(self.module.get_buffer(name))
        return small

    def state_dict(self) -> dict:
        return {"keep": torch.from_numpy(self.plan.keep), "buffers": dict(self.module.named_buffers())}

    def load_state_dict(self, state: dict) -> None:
        self.follow(Plan.from_file(self.plan.space, state["keep"]))
        if empty := [name for name, weight in self.parameters().items() if not weight.numel()]:
            raise ValueError(f"kept channels: none are left in {empty[0]}")
        for name, buffer in state["buffers"].items():
            self.module.get_buffer(name).copy_(buffer)


class HardMethod:
    """What every method with a hard network answers (see `s2h_cli.methods`), if no parameters but the network's train.

    Attributes:
        network: the whole network.
        hard: its hard network.
    """

    network: fx.GraphModule
    hard: HardNetwork

    @property
    def parts(self) -> dict[str, "HardMethod"]:
        return {"": self}

    @property
    def plan(self) -> Plan:
        return self.hard.plan

    def task_terms(self, images: torch.Tensor, targets: torch.Tensor, criterion: Callable) -> dict[str, torch.Tensor]:
        """A pass: the task's loss of the hard network alone ("task").

        Args:
            images: (N, C, H, W).
            targets: what `criterion` takes beside logits (N, classes).
        """
        return {"task": criterion(self.hard.run(self.hard.parameters(), images), targets)}

    def backward(self, terms: dict[str, torch.Tensor]) -> None:
        sum(terms.values()).backward()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return []

    def expected_widths(self) -> np.ndarray:
        return self.plan.widths

    def gates_now(self) -> torch.Tensor:
        return torch.from_numpy(self.plan.keep)

    def networks(self) -> dict[str, nn.Module]:
        return {"hard": self.hard.evaluated()}

    def result(self) -> fx.GraphModule:
        return self.hard.result(self.network)


def runner(network: fx.GraphModule) -> Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]:
    """The network as a function of parameters and images (N, C, H, W)."""
    return lambda parameters, images: functional_call(network, parameters, (images,))


class Forward(nn.Module):
    """A network run on parameters that a function supplies: soft and hard network as ordinary modules, for evaluation."""

    def __init__(self, network: fx.GraphModule, parameters: Callable[[], dict[str, torch.Tensor]]):
        super().__init__()
        self.network = network
        self.parameters_now = parameters

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return runner(self.network)(self.parameters_now(), images)
