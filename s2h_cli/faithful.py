"""Whether a captured network computes what the model computes: in evaluation, and in training with everything random at rest.

Both run on the same random images and on the same weights. Weights that are constant (zeros of a residual branch, ones of a norm)
get random values for the time of the check, since a layer that is multiplied by zero could be wrong unseen.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Callable, Iterator

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from .errors import UserError
from .training_only import Drop, Observed, at_rest, forget, observe

#: Differences of logits relative to the largest: below the first there is none; above the second there is one, even in a network
#: that cannot run in float64 and so cannot show what is rounding.
EQUAL, ROUNDING = 1e-6, 1e-4
#: The largest difference in float64.
EXACT = 1e-9
#: Images that run in evaluation (another number than capture saw) and in training (the least that batch norm takes).
EVALUATED, TRAINED = 3, 2
#: Standard deviation of what constant weights get.
NOISE = 0.1


class Check:
    """A model's tensors and images, prepared once for all comparisons.

    Args:
        model: in eval mode; it comes out as it was.
        input_size: (C, H, W).
        drops: modules that drop at random, as of `training_only.drops_of`.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int], drops: dict[str, Drop]):
        self.model, self.input_size, self.drops = model, input_size, drops
        generator = torch.Generator().manual_seed(0)
        self.values: dict[int, torch.Tensor] = {}  # by the identity of a tensor of the model
        for parameter in model.parameters():
            value = parameter.detach()
            if value.is_floating_point() and value.numel() and (value == value.flatten()[0]).all():
                value = value + NOISE * torch.randn(value.shape, generator=generator)
            self.values[id(parameter)] = value
        self.trained = observe(model, drops, self.tensors(model), self.images(TRAINED))
        if self.trained.output is not None and not all(t.isfinite().all() for t in _floats(self.trained.output)):
            self.values = {}  # the noise was too much
            self.trained = observe(model, drops, self.tensors(model), self.images(TRAINED))

    def tensors(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> dict[int, torch.Tensor]:
        """What the model, or a network that shares its tensors, runs on here, by the identity of its own. Buffers are copies."""
        found = {id(parameter): self.values.get(id(parameter), parameter.detach()) for parameter in module.parameters()}
        found |= {id(buffer): buffer.clone() for buffer in module.buffers()}
        return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in found.items()}

    def images(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(n, *self.input_size, generator=torch.Generator().manual_seed(n)).to(dtype)

    # -- the comparisons ------------------------------------------------------------------------------------------

    def evaluation(self, network: fx.GraphModule, static_batch: int | None) -> None:
        """Raises UserError where the network differs from the model in evaluation."""
        n = static_batch or EVALUATED

        def outputs(dtype: torch.dtype) -> tuple[Any, Any]:
            return self._run(self.model, n, dtype), _or_none(lambda: self._run(network, n, dtype))

        if (difference := self._difference(outputs)) is not None:
            name = self._first(network, n, training=False)
            raise UserError(f"the captured network differs from the model, first at '{name}' (by {difference:.1e} of the largest logit): s2h would train "
                            "something else; please report this model, and see docs/any-model.md")

    def training(self, network: fx.GraphModule) -> list[str]:
        """Notes on what the network does not do in training as the model does.

        Raises:
            UserError: they differ, and nothing random or self-updating explains it.
        """
        seen, notes = self.trained, []
        if seen.failure is not None:
            return [f"the model cannot run in training mode on random images, so that it was compared in evaluation only ({_line(seen.failure)})"]
        lost = _lost(network, seen)
        if lost:
            notes.append(f"random in training, which is not captured, so that s2h trains without it: {', '.join(lost)}")
        if seen.updated:
            notes.append(f"changes in training with each batch, and stays as it is here: {', '.join(sorted(seen.updated))}")

        def outputs(dtype: torch.dtype) -> tuple[Any, Any]:
            model = seen if dtype == torch.float32 else self._observed(dtype)
            if model.failure is not None:
                raise model.failure
            found = _or_none(lambda: self._run_training(network, dtype))
            return found if found is None else _logits(model.output, found), found

        difference = self._difference(outputs)
        if difference is not None:
            name = self._first(network, TRAINED, training=True)
            changing = {buffer.rpartition(".")[0] for buffer in seen.updated}
            if not any(_within(name, other) for other in (*seen.draws, *changing)):
                raise UserError(f"in training mode the model computes something else than in evaluation, first at '{name}'; s2h trains what evaluation "
                                "computes: take what depends on self.training out of its forward, or see docs/any-model.md")
        return notes

    def _observed(self, dtype: torch.dtype) -> Observed:
        return observe(self.model, self.drops, self.tensors(self.model, dtype), self.images(TRAINED, dtype))

    def _run(self, module: nn.Module, n: int, dtype: torch.dtype) -> Any:
        if module is self.model:
            forget(module)
        try:
            with at_rest(module, self.tensors(module, dtype)):
                return module(self.images(n, dtype))
        finally:
            if module is self.model:
                forget(module)

    def _run_training(self, network: fx.GraphModule, dtype: torch.dtype) -> Any:
        _train_at_rest(network)
        try:
            return self._run(network, TRAINED, dtype)
        finally:
            network.eval()

    def _difference(self, outputs: Any) -> float | None:
        """How far two outputs are apart, if that is more than rounding."""
        found = _apart(*outputs(torch.float32))
        if found <= EQUAL:
            return None
        try:
            exact = _apart(*outputs(torch.float64))
        except Exception:  # the model asks for float32 somewhere
            return found if found > ROUNDING else None
        return found if not exact <= EXACT else None

    def _first(self, network: fx.GraphModule, n: int, training: bool) -> str:
        """The first layer of the model, in the order in which they end, whose output no node of the network has."""
        try:
            return self._first_in(network, n, training, torch.float64, EXACT)
        except Exception:  # the model asks for float32 somewhere
            return self._first_in(network, n, training, torch.float32, ROUNDING)

    def _first_in(self, network: fx.GraphModule, n: int, training: bool, dtype: torch.dtype, tolerance: float) -> str:
        outputs = _Outputs(network, tolerance)
        if training:
            _train_at_rest(network)
        try:
            with at_rest(network, self.tensors(network, dtype)):
                outputs.run(self.images(n, dtype))
        except Exception:  # the network cannot run: its outputs up to there tell where it is wrong
            pass
        finally:
            network.eval()
        found: list[str] = []

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if not found and not all(outputs.has(tensor) for tensor in _floats(output)):
                    found.append(name)

            return hook

        hooks = [module.register_forward_hook(watch(name)) for name, module in self.model.named_modules() if name]
        try:
            if training:
                failure = self._observed(dtype).failure
                if failure is not None:
                    raise failure
            else:
                self._run(self.model, n, dtype)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else "the output"


class _Outputs(fx.Interpreter):
    """Runs a network and remembers what each of its nodes gave."""

    def __init__(self, network: fx.GraphModule, tolerance: float):
        super().__init__(network)
        self.tolerance = tolerance
        self.found: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        for tensor in _floats(result):
            self.found.setdefault(tuple(tensor.shape), []).append(tensor.clone())
        return result

    def has(self, tensor: torch.Tensor) -> bool:
        return any(_apart(value, tensor) <= self.tolerance for value in self.found.get(tuple(tensor.shape), []))


def _or_none(run: Callable[[], Any]) -> Any:
    """What a captured network gives, or None where it cannot run: that is a difference too."""
    try:
        return run()
    except Exception:
        return None


def _train_at_rest(network: fx.GraphModule) -> None:
    """Training mode, but for what drops at random."""
    network.train()
    for module in network.modules():
        if isinstance(module, _dropouts()):
            module.eval()


@cache
def _dropouts() -> tuple[type, ...]:
    from torchvision.ops import StochasticDepth  # not at the top: a result loads without torchvision

    return (nn.Dropout, nn.Dropout2d, StochasticDepth)


def _lost(network: fx.GraphModule, seen: Observed) -> list[str]:
    """Layers that draw more often than the network drops there."""
    kept: dict[str, int] = {}
    for node in network.graph.nodes:
        if node.op == "call_module" and isinstance(network.get_submodule(node.target), _dropouts()):
            layer = "" if node.meta["layer"] == node.name else node.meta["layer"]  # it stands in the model's own forward
            kept[layer] = kept.get(layer, 0) + 1
    return [name or "the model's forward" for name, count in seen.draws.items() if count > kept.get(name, 0)]


def _within(name: str, other: str) -> bool:
    """Whether what happens in `other` shows in the output of `name`: it is the same layer, or one inside."""
    return other == name or other.startswith(f"{name}.") or other == ""


def _logits(output: Any, like: torch.Tensor) -> torch.Tensor:
    """The tensor among a model's outputs in training that is nearest to the logits: models return auxiliary ones beside them."""
    tensors = [tensor for tensor in _floats(output) if tensor.shape == like.shape]
    return min(tensors, key=lambda tensor: _apart(tensor, like), default=torch.empty(0))


def _floats(output: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())


def _apart(a: Any, b: Any) -> float:
    """The largest difference relative to the largest value; infinite for other shapes, or where one alone is not finite."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.shape != b.shape or a.isfinite().ne(b.isfinite()).any():
        return math.inf
    if not a.numel():
        return 0.0
    apart = (a - b).abs().nan_to_num(0.0, 0.0, 0.0).max()
    return float(apart / b.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(torch.finfo(b.dtype).tiny))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
