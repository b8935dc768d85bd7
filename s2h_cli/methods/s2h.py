"""S2HPruner (NeurIPS 2024): a soft network and its hard network train together, and the soft one teaches the hard one.

With s, h the logits of soft and hard network, y the target, sg = stop gradient, m = hard mask, w = keep probabilities:

    L          task loss of (s, y)                              gradient to the weights through soft, to u through w
    G, step 1  alpha KL(sg(s) || h)                             to the weights through hard, to u through m_hat
    G, step 2  alpha KL(s || sg(h))                             to u alone, through w: never to the weights
    R          beta (MACs(N) / MACs(full) - target)^2           to u through E

m_hat = sg(m - w) + w has value 1 on every kept channel; dropped channels are not computed, so their share of its gradient is
not either. The paper trains masks to the end; here the target is ramped over the first part of the schedule, the widths are
frozen exactly on budget soon after, and the rest trains both networks with the masks as they are (docs/results.md says
what was measured).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call

from ..masks import Importance, Masks, fit_budget, gated, plan_of_ranks
from ..plan import Plan, Space
from ..rebuild import insert_gates, kept_indices, rebuild, resize, skeleton, slice_parameters


@dataclass(frozen=True)
class Settings:
    """Constants of the method."""

    alpha: float = 1.0  #: weight of the distillation terms G
    beta: float = 20.0  #: weight of the budget term R
    temperature: float = 1.0  #: T of the width probabilities
    mask_lr: float = 0.05  #: learning rate of the width logits (Adam)
    ramp: float = 0.2  #: share of the schedule over which the target falls from 1 to the budget
    freeze: float = 0.3  #: share of the schedule after which widths stand still, exactly on budget
    compile: bool = False  #: run both networks through torch.compile once their shapes stand still, after the freeze
    sync_bn: bool = False  #: batch-norm statistics of all processes' images
    hear_every: int = 1  #: steps between two that compute G step 2, of that many times the weight


class S2H:
    """One soft network over all weights, and the hard network that slices them."""

    def __init__(self, network: fx.GraphModule, space: Space, target: float, settings: Settings = Settings()):
        self.network = network
        self.parts = {"": self}
        self.soft = insert_gates(network, space)
        if settings.sync_bn:  # in the copy that trains, on the same tensors; what is exported stays plain
            self.soft = nn.SyncBatchNorm.convert_sync_batchnorm(self.soft)
        self.space = space
        self.target = target
        self.settings = settings
        device = next(network.parameters()).device
        self.masks = Masks(space, settings.temperature).to(device)
        self.weights = dict(network.named_parameters())
        self.operands = {**self.weights, **{name: self.soft.get_buffer(name) for name in space.gates}}  # what is gated and sliced
        self.importance = Importance(space, self.weights)
        self.read_parts = {key: torch.from_numpy(parts).to(device) for key, parts in space.read_parts.items()}
        self.hard = skeleton(self.soft)
        self.run_soft, self.run_hard = runner(self.soft), runner(self.hard)
        self.plan: Plan | None = None
        self.mask_optimizer = torch.optim.Adam(self.masks.parameters(), lr=settings.mask_lr)
        self.budget = 1.0  # the target of this step
        self.ranks = self.importance.ranks()
        self.steps = 0
        self.frozen = False
        self.gates = torch.ones(space.size, device=device)  # w after the freeze
        self._follow(Plan(space, np.ones(space.size, bool)))

    # -- the interface of methods ---------------------------------------------------------------------------------

    def start_step(self, progress: float) -> None:
        """Moves the hard network to the current masks, or freezes the widths when their time has come."""
        if self.frozen:
            return
        self.budget = 1 - (1 - self.target) * min(1.0, progress / self.settings.ramp)
        self.hears = self.steps % self.settings.hear_every == 0
        self.steps += 1
        if progress >= self.settings.freeze:
            self._freeze()
        else:
            self.ranks = self.importance.ranks()
            widths = self.masks.hard_widths().detach().cpu().numpy().astype(int)
            self._follow(plan_of_ranks(self.space, widths, self.ranks))

    @property
    def passes(self) -> list[Callable[..., dict[str, torch.Tensor]]]:
        """The soft network's, then the hard one's: never are the activations of both in memory."""
        return [self.soft_terms, self.hard_terms]

    def soft_terms(self, images: torch.Tensor, targets: torch.Tensor, criterion: Callable) -> dict[str, torch.Tensor]:
        """L ("task"), before the freeze R ("budget") and, on a step that hears the masks, G step 2 ("mask").

        Args:
            images: (N, C, H, W).
            targets: what `criterion` takes beside logits (N, classes).
        """
        soft = self.run_soft(self.soft_parameters(), images)
        self.soft_logits = soft.detach()
        terms = {"task": criterion(soft, targets)}
        if not self.frozen:
            if self.hears:
                with torch.no_grad():
                    hard = self.run_hard(self.hard_parameters(), images)
                terms["mask"] = self.settings.hear_every * self.settings.alpha * divergence(soft, hard)
            macs = self.space.macs.differentiable(self.masks.hard_widths())
            terms["budget"] = self.settings.beta * (macs / self.space.full_macs - self.budget) ** 2
        return terms

    def hard_terms(self, images: torch.Tensor, targets: torch.Tensor, criterion: Callable) -> dict[str, torch.Tensor]:
        """G step 1 ("hard"), against the logits of the soft pass. Arguments as of `soft_terms`."""
        hard = self.run_hard(self.hard_parameters(None if self.frozen else self.gates_now()), images)
        return {"hard": self.settings.alpha * divergence(self.soft_logits, hard)}

    def backward(self, terms: dict[str, torch.Tensor]) -> None:
        """Accumulates the gradients of the terms of a pass."""
        mask_grad = None
        if "mask" in terms:  # G step 2 must not reach the weights: its gradient is taken for u alone, then added
            (mask_grad,) = torch.autograd.grad(terms["mask"], self.masks.u, retain_graph=True)
        sum(term for name, term in terms.items() if name != "mask").backward()
        if mask_grad is not None:
            self.masks.u.grad += mask_grad

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [] if self.frozen else [self.mask_optimizer]

    def expected_widths(self) -> np.ndarray:
        """E of each group, (groups,); after the freeze the widths themselves."""
        return self.plan.widths if self.frozen else self.masks.expected_widths().detach().cpu().numpy()

    def gates_now(self) -> torch.Tensor:
        """w of each atom, (atoms,)."""
        return self.gates if self.frozen else self.masks.keep_probability(self.ranks)

    def networks(self) -> dict[str, nn.Module]:
        return {"soft": Forward(self.soft, self.soft_parameters), "hard": Forward(self.hard, self.hard_parameters)}

    def result(self) -> fx.GraphModule:
        """The hard network with weights of its own: what is written to disk."""
        small = rebuild(self.network, self.plan)
        for name, buffer in small.named_buffers():
            buffer.copy_(self.hard.get_buffer(name))
        return small

    def state_dict(self) -> dict:
        """All that a later `load_state_dict` needs, beside the network, to go on bit for bit: tensors and plain data."""
        return {"masks": self.masks.state_dict(), "gates": self.gates,
                "mask_optimizer": self.mask_optimizer.state_dict(), "frozen": self.frozen,
                "steps": self.steps, "ranks": self.ranks, "keep": torch.from_numpy(self.plan.keep), "hard_buffers": dict(self.hard.named_buffers())}

    def load_state_dict(self, state: dict) -> None:
        self.masks.load_state_dict(state["masks"])
        self.mask_optimizer.load_state_dict(state["mask_optimizer"])
        self.frozen, self.steps = state["frozen"], state["steps"]
        self.ranks.copy_(state["ranks"])
        self.gates.copy_(state["gates"])
        self._follow(Plan(self.space, state["keep"].cpu().numpy()))
        for name, buffer in state["hard_buffers"].items():
            self.hard.get_buffer(name).copy_(buffer)
        if self.frozen:
            self._stand_still()

    # -- the method -----------------------------------------------------------------------------------------------

    def soft_parameters(self, gates: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """All weights; those that read prunable channels are gated along their input dimension."""
        if gates is None:
            gates = self.gates_now()
        out = dict(self.operands)
        for (name, dim), parts in self.read_parts.items():
            out[name] = gated(out[name], dim, gates, parts)
        return out

    def hard_parameters(self, gates: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The sliced weights. With `gates` (w), those that read are multiplied by m_hat: 1 in value, w in gradient."""
        out = slice_parameters(self.operands, self.indices)
        if gates is not None:
            estimator = 1 + (gates - gates.detach())
            for (name, dim), parts in self.read_parts.items():
                kept = self.indices[name][dim]
                out[name] = gated(out[name], dim, estimator, parts if kept is None else parts[kept])
        return out

    def _follow(self, plan: Plan) -> None:
        """Makes the hard network that of `plan`."""
        if self.plan is None or not np.array_equal(plan.keep, self.plan.keep):
            self.plan = plan
            self.indices = kept_indices(plan, self.gates.device)
            resize(self.hard, self.soft, plan, self.indices)

    @torch.no_grad()
    def _freeze(self) -> None:
        self.ranks = self.importance.ranks()
        ladder = self.masks.ladder().cpu().numpy()
        widths = fit_budget(self.space, list(ladder), self.target)
        self.gates.copy_(self.masks.keep_probability(self.ranks))
        self._follow(plan_of_ranks(self.space, widths, self.ranks))
        self.frozen = True
        self._stand_still()

    def _stand_still(self) -> None:
        if self.settings.compile:
            self.run_soft, self.run_hard = torch.compile(self.run_soft), torch.compile(self.run_hard)


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


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(softmax(p) || softmax(q)) of logits (N, classes), the mean over the batch."""
    return F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True)
