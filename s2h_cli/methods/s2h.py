"""S2HPruner (NeurIPS 2024): a soft network and its hard network train together, and the soft one teaches the hard one.

With s, h the logits of soft and hard network, y the target, sg = stop gradient, m = hard mask, w = keep probabilities:

    L          task loss of (s, y)                              gradient to the weights through soft, to u through w
    G, step 1  alpha KL(sg(s) || h)                             to the weights through hard, to u through m_hat
    G, step 2  alpha KL(s || sg(h))                             to u alone, through w: never to the weights
    R          beta (MACs(N) / MACs(full) - target)^2           to u through E (of several costs, the one furthest over its limit)

m_hat = sg(m - w) + w has value 1 on every kept channel; dropped channels are not computed, so their share of its gradient is
not either. The paper trains both networks and the masks to the end. Here the target is ramped over the first part of the schedule, then
the widths are frozen exactly on budget, and the hard network trains on alone, on the task's loss; and no group may fall far below the others
(docs/method.md says what was measured).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from ..budget import Budget
from ..masks import Importance, Masks, fit_budget, floored, gate_reads, gated, plan_of_ranks
from ..plan import Space
from ..rebuild import insert_gates
from .hard import Forward, HardMethod, HardNetwork, runner


@dataclass(frozen=True)
class Settings:
    """Constants of the method. Those from `hears` on are for ablations; docs/method.md says what each decided."""

    alpha: float = 1.0  #: weight of the distillation terms G
    beta: float = 20.0  #: weight of the budget term R
    temperature: float = 1.0  #: T of the width probabilities
    mask_speed: float = 75.0  #: how far Adam can move a width logit in a whole schedule: its learning rate times the steps
    ramp: float = 0.15  #: share of the schedule over which what is allowed falls from the whole network to the budget
    freeze: float = 0.25  #: share of the schedule after which widths stand still, exactly on budget, and the hard network trains alone
    floor: float = 0.5  #: share of what cutting all groups alike would leave it that a group keeps at least
    hears: tuple[str, ...] = ("task", "hard", "mask")  #: the terms whose gradient reaches u, beside R
    teaches: bool = True  #: whether the hard network trains before the freeze: G step 1


#: From a trained network that teaches as well: a short search for the widths, then the small network alone.
TRAINED = Settings(mask_speed=150.0, ramp=0.04, freeze=0.06, floor=0.0)


class S2H(HardMethod):
    """One soft network over all weights, and the hard network that slices them. `compile` and `sync_bn` as in `s2h_cli.methods`."""

    def __init__(self, network: fx.GraphModule, space: Space, budget: Budget, settings: Settings = Settings(), *,
                 compile: bool = False, sync_bn: bool = False):
        self.network = network
        self.soft = insert_gates(network, space)
        if sync_bn:  # in the copy that trains, on the same tensors
            self.soft = nn.SyncBatchNorm.convert_sync_batchnorm(self.soft)
        self.space = space
        self.budget = budget
        self.settings = settings
        device = next(network.parameters()).device
        self.choices = floored(space, settings.floor, budget)
        self.masks = Masks(self.choices, settings.temperature).to(device)
        self.weights = dict(network.named_parameters())
        self.operands = {**self.weights, **{name: self.soft.get_buffer(name) for name in space.gates}}  # what is gated and sliced
        self.importance = Importance(space, self.weights)
        self.read_parts = {key: torch.from_numpy(parts).to(device) for key, parts in space.read_parts.items()}
        self.hard = HardNetwork(self.soft, space, self.operands, compile=compile, sync_bn=sync_bn)
        self.run_soft = runner(self.soft)
        self.mask_optimizer = torch.optim.Adam(self.masks.parameters(), lr=0.0)
        self.progress = 0.0  # at the last step
        self.allowed = budget.on_the_way(0.0)  # at this step
        self.ranks = self.importance.ranks()
        self.frozen = False

    # -- the interface of methods ---------------------------------------------------------------------------------

    def start_step(self, progress: float) -> bool:
        """Moves the hard network to the current masks, or freezes it on budget when its time has come."""
        self.mask_optimizer.param_groups[0]["lr"] = self.settings.mask_speed * (progress - self.progress)
        self.progress = progress
        if self.frozen:
            return False
        self.allowed = self.budget.on_the_way(min(1.0, progress / self.settings.ramp))
        if progress >= self.settings.freeze:
            self._freeze()
            return self.alone
        self.ranks = self.importance.ranks()
        widths = self.masks.hard_widths().detach().cpu().numpy().astype(int)
        self.hard.follow(plan_of_ranks(self.space, widths, self.ranks))
        return False

    @property
    def alone(self) -> bool:
        """Whether the hard network is all that is left: from the freeze on, but where that is the end."""
        return self.frozen and self.settings.freeze < 1.0

    @property
    def passes(self) -> list[Callable[..., dict[str, torch.Tensor]]]:
        """The soft network's, then the hard one's: never are the activations of both in memory."""
        if self.alone:
            return [self.task_terms]
        return [self.soft_terms, self.hard_terms][:1 + self.settings.teaches]

    def soft_terms(self, images: torch.Tensor, targets: torch.Tensor, criterion: Callable) -> dict[str, torch.Tensor]:
        """L ("task"), G step 2 ("mask") and R ("budget").

        Args:
            images: (N, C, H, W).
            targets: what `criterion` takes beside logits (N, classes).
        """
        soft = self.run_soft(self.soft_parameters(), images)
        self.soft_logits = soft.detach()
        terms = {"task": criterion(soft, targets)}
        if "mask" in self.settings.hears:
            with torch.no_grad():
                hard = self.hard.run(self.hard_parameters(), images)
            terms["mask"] = self.settings.alpha * divergence(soft, hard)
        return terms | {"budget": self.settings.beta * self.allowed.excess(self.space, self.masks.hard_widths()) ** 2}

    def hard_terms(self, images: torch.Tensor, targets: torch.Tensor, criterion: Callable) -> dict[str, torch.Tensor]:
        """G step 1 ("hard"), against the logits of the soft pass. Arguments as of `soft_terms`."""
        hard = self.hard.run(self.hard_parameters(self.gates_now() if "hard" in self.settings.hears else None), images)
        return {"hard": self.settings.alpha * divergence(self.soft_logits, hard)}

    def backward(self, terms: dict[str, torch.Tensor]) -> None:
        """Accumulates the gradients of the terms of a pass."""
        u = self.masks.u
        # G step 2 must not reach the weights, and R does not: their gradients are taken for u alone, then added.
        own = [torch.autograd.grad(terms[name], u, retain_graph=True)[0] for name in ("mask", "budget") if name in terms]
        before = None if u.grad is None else u.grad.clone()
        sum(term for name, term in terms.items() if name not in ("mask", "budget")).backward()
        if "task" in terms and "task" not in self.settings.hears:
            u.grad = before
        if own:
            u.grad = sum(own) if u.grad is None else u.grad + sum(own)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [] if self.frozen else [self.mask_optimizer]

    def expected_widths(self) -> np.ndarray:
        """E of each group, (groups,); the widths themselves once the hard network is alone."""
        return super().expected_widths() if self.alone else self.masks.expected_widths().detach().cpu().numpy()

    def gates_now(self) -> torch.Tensor:
        """w of each atom, (atoms,); the kept ones once the hard network is alone."""
        return super().gates_now() if self.alone else self.masks.keep_probability(self.ranks)

    def networks(self) -> dict[str, nn.Module]:
        soft = {} if self.alone else {"soft": Forward(self.soft, self.soft_parameters)}
        return soft | super().networks()

    def state_dict(self) -> dict:
        """All that a later `load_state_dict` needs, beside the network, to go on bit for bit: tensors and plain data."""
        return {"masks": self.masks.state_dict(), "mask_optimizer": self.mask_optimizer.state_dict(),
                "progress": self.progress, "frozen": self.frozen, "ranks": self.ranks, "hard": self.hard.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.masks.load_state_dict(state["masks"])
        self.mask_optimizer.load_state_dict(state["mask_optimizer"])
        self.progress, self.frozen = state["progress"], state["frozen"]
        self.ranks.copy_(state["ranks"])
        self.hard.load_state_dict(state["hard"])
        if self.frozen:
            self.hard.stand_still()

    # -- the method -----------------------------------------------------------------------------------------------

    def soft_parameters(self, gates: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """All weights; those that read prunable channels are gated along their input dimension."""
        return gate_reads(self.operands, self.read_parts, self.gates_now() if gates is None else gates)

    def hard_parameters(self, gates: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The sliced weights. With `gates` (w), those that read are multiplied by m_hat: 1 in value, w in gradient."""
        out = self.hard.parameters()
        if gates is not None:
            estimator = 1 + (gates - gates.detach())
            for (name, dim), parts in self.read_parts.items():
                kept = self.hard.indices[name][dim]
                out[name] = gated(out[name], dim, estimator, parts if kept is None else parts[kept])
        return out

    def _freeze(self) -> None:
        self.ranks = self.importance.ranks()
        widths = fit_budget(self.choices, list(self.masks.ladder().detach().cpu().numpy()), self.budget)
        self.hard.follow(plan_of_ranks(self.space, widths, self.ranks))
        self.hard.stand_still()
        self.frozen = True


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(softmax(p) || softmax(q)) of logits (N, classes), the mean over the batch."""
    return F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True)


#: Differentiable masks alone: nothing distils, and the network is cut at the end. The baseline that has the gap.
DMP = partial(S2H, settings=Settings(hears=("task",), teaches=False, freeze=1.0, floor=0.0))
