"""EPSD (AAAI 2024, arXiv 2402.00084): prune early what self-distillation needs least, then train the rest with self-distillation.

On the first few steps every channel is scored by what its gate does to the self-distillation loss after some steps of gradient
descent, with gradients through those steps; then the network is cut onto the budget, once. The paper scores single weights; here
it is channels. The self-distillation is CS-KD (CVPR 2020): an image learns from the logits of another image of its class,

    L_sd = CE + weight T^2 KL(softmax(sg(z') / T) || softmax(z / T))

where z' are the logits of an image of the same class in the batch. An image alone in its class has no such partner and no such term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import distributed
from ..budget import Budget
from ..masks import gate_reads, widths_of_scores
from ..plan import Plan, Space
from ..rebuild import insert_gates
from .hard import HardMethod, HardNetwork, runner


@dataclass(frozen=True)
class Settings:
    """Constants of the method."""

    weight: float = 1.0  #: of the distillation term
    temperature: float = 4.0
    scored: int = 8  #: first steps of the schedule on which channels are scored; the whole network trains meanwhile
    inner_steps: int = 3  #: of gradient descent, each on a part of the batch, that a score looks ahead
    inner_lr: float = 0.01


class EPSD(HardMethod):
    """Whole for the first steps, then cut. `compile` and `sync_bn` as in `s2h_cli.methods`."""

    def __init__(self, network: fx.GraphModule, space: Space, budget: Budget, settings: Settings = Settings(), *,
                 compile: bool = False, sync_bn: bool = False):
        self.network, self.space, self.budget, self.settings = network, space, budget, settings
        self.weights = dict(network.named_parameters())
        device = next(network.parameters()).device
        self.gated = insert_gates(network, space).train()  # the loop knows the networks that are evaluated
        self.operands = {**self.weights, **{name: self.gated.get_buffer(name) for name in space.gates}}
        self.read_parts = {key: torch.from_numpy(parts).to(device) for key, parts in space.read_parts.items()}
        self.hard = HardNetwork(network, space, self.weights, compile=compile, sync_bn=sync_bn)
        self.scores = torch.zeros(space.size, device=device)
        self.steps = 0

    # -- the interface of methods ---------------------------------------------------------------------------------

    def start_step(self, progress: float) -> None:
        if self.steps == self.settings.scored or progress >= 1 and self.steps < self.settings.scored:
            self.hard.follow(plan_of_scores(self.space, self.budget, distributed.mean(self.scores).cpu().numpy()))
            self.steps = self.settings.scored
            self.hard.stand_still()
        self.steps += 1

    @property
    def passes(self) -> list[Callable[..., dict[str, torch.Tensor]]]:
        return [self.terms]

    def terms(self, images: torch.Tensor, targets: torch.Tensor, criterion: Callable) -> dict[str, torch.Tensor]:
        """The task's loss and that of self-distillation. Arguments as of `S2H.soft_terms`."""
        if self.steps <= self.settings.scored:
            self.scores += self.score(images, targets)
        logits = self.hard.run(self.hard.parameters(), images)
        return {"task": criterion(logits, targets), "self": self.settings.weight * class_wise(logits, targets, self.settings.temperature)}

    def state_dict(self) -> dict:
        return {"hard": self.hard.state_dict(), "scores": distributed.mean(self.scores.clone()), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.hard.load_state_dict(state["hard"])
        self.scores.copy_(state["scores"])
        self.steps = state["steps"]
        if self.steps > self.settings.scored:
            self.hard.stand_still()

    # -- the method -----------------------------------------------------------------------------------------------

    def score(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """|d L_sd / d gate| of each atom (atoms,), with L_sd that of the last part of the batch after gradient descent on the others."""
        gates = torch.ones(self.space.size, dtype=self.scores.dtype, device=self.scores.device, requires_grad=True)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            (gradient,) = torch.autograd.grad(self.looking_ahead(gates, images, targets), gates)
        return gradient.abs()

    def looking_ahead(self, gates: torch.Tensor, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """L_sd after `inner_steps` steps of gradient descent with these gates; differentiable in them, through the steps."""
        operands = {name: tensor.detach().requires_grad_(name in self.weights) for name, tensor in self.operands.items()}
        buffers = {name: buffer.clone() for name, buffer in self.gated.named_buffers() if name not in operands}
        run = runner(self.gated)
        parts = min(self.settings.inner_steps + 1, max(1, len(images) // 2))  # of two images at least, for batch norm
        for i, (x, y) in enumerate(zip(images.tensor_split(parts), targets.tensor_split(parts)), 1):
            logits = run({**gate_reads(operands, self.read_parts, gates), **buffers}, x)
            loss = F.cross_entropy(logits, y) + self.settings.weight * class_wise(logits, y, self.settings.temperature)
            if i < parts:
                gradients = torch.autograd.grad(loss, [operands[name] for name in self.weights], create_graph=True)
                operands |= {name: operands[name] - self.settings.inner_lr * gradient for name, gradient in zip(self.weights, gradients)}
        return loss


def class_wise(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(sg(z') || z), the mean over the batch, of logits (N, classes) and those of each image's partner: the image before it in its class.

    Args:
        targets: classes (N,), or shares (N, classes) of which the largest counts.
    """
    classes = targets if targets.dim() == 1 else targets.argmax(1)
    order = classes.argsort(stable=True)
    ordered = classes[order]
    starts, ends = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))  # of each image's class
    # The image before in the class; the first one's is the last one.
    place = torch.arange(len(order), device=order.device)
    before = torch.where(place == starts, ends, place) - 1
    partner = torch.empty_like(order)
    partner[order] = order[before]
    z, theirs = logits / temperature, logits.detach()[partner] / temperature
    return temperature ** 2 * F.kl_div(z.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)


def plan_of_scores(space: Space, budget: Budget, scores: np.ndarray) -> Plan:
    """The atoms of greatest score (atoms,), on budget."""
    return Plan.from_widths(space, widths_of_scores(space, scores, budget), scores)
