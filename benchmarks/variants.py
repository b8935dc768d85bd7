"""S2H with one of its parts changed that is no constant of its `Settings`: rows of the ablations in `accuracy.py`."""

from __future__ import annotations

from typing import Any, Callable
from unittest.mock import patch

import torch

from s2h_cli.methods import s2h
from s2h_cli.methods.s2h import S2H


class OtherDirection(S2H):
    """G with the two networks in each other's place, what is learnt from first: KL(h || sg(s)) in step 1, KL(sg(h) || s) in step 2."""

    def soft_terms(self, *step: Any) -> dict[str, torch.Tensor]:
        return self._turned(super().soft_terms, *step)

    def hard_terms(self, *step: Any) -> dict[str, torch.Tensor]:
        return self._turned(super().hard_terms, *step)

    @staticmethod
    def _turned(terms: Callable, *step: Any) -> dict[str, torch.Tensor]:
        as_it_is = s2h.divergence
        with patch.object(s2h, "divergence", lambda p, q: as_it_is(q, p)):
            return terms(*step)


class FixedOrder(S2H):
    """Channels keep the order of importance that they had at the start."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        first = self.ranks
        self.importance.ranks = lambda: first


class Balanced(S2H):
    """The gradient of each term reaches u with the same norm, 1."""

    def backward(self, terms: dict[str, torch.Tensor]) -> None:
        u = self.masks.u
        total = torch.zeros_like(u) if u.grad is None else u.grad
        for name in sorted(terms, key=["mask", "budget", "task", "hard"].index):  # those that reach the weights last: they free the graph
            u.grad = None
            if name in ("mask", "budget"):
                u.grad, = torch.autograd.grad(terms[name], u, retain_graph=True)
            else:
                terms[name].backward()
            if u.grad is not None:  # the hard network alone has no masks
                total = total + u.grad / u.grad.norm().clamp(min=1e-12)
        u.grad = total


VARIANTS = {"other direction": OtherDirection, "fixed order": FixedOrder, "balanced": Balanced}
