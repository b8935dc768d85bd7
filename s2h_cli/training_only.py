"""What a model does in training only: random parts, batch norms, code behind `self.training`.

Capture sees a model in eval mode. `drops_of` finds the modules that drop at random in training, by what they do and not by what
they are called. `observe` runs a model once in training mode with every random number at its expected value, and says what it saw.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

#: Rows of ones that a module is tried on. Enough to tell a rate of 0.001 from 0.
ROWS = 4096
#: Calls that tell how often a module drops a whole batch.
CALLS = 400
#: How far a rate that was measured may lie from the attribute that it is taken for: five standard errors.
SIGMAS = 5


class Drop(NamedTuple):
    """Dropout of some kind: the probability, and what is dropped as one: an "element", a "channel", an image ("row") or the "batch"."""

    p: float
    unit: str


@torch.library.custom_op("s2h::drop_path", mutates_args=())
def drop_path(x: torch.Tensor, p: float, mode: str) -> torch.Tensor:
    """Marks stochastic depth of probability `p` during capture; the identity."""
    return x.clone()


@drop_path.register_fake
def _(x: torch.Tensor, p: float, mode: str) -> torch.Tensor:
    return torch.empty_like(x)


#: What stands for a drop in the graph, by unit. Each is the identity until the network trains.
MARKERS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "element": lambda x, p: F.dropout(x, p, training=False),
    "channel": lambda x, p: torch.feature_dropout(x, p, train=False),
    "row": lambda x, p: drop_path(x, p, "row"),
    "batch": lambda x, p: drop_path(x, p, "batch"),
}


@contextmanager
def marked(model: nn.Module, drops: dict[str, Drop], bypass: bool = False) -> Iterator[None]:
    """Puts the marker of its drop in the place of each module's forward, or the identity with `bypass`."""
    modules = [(model.get_submodule(name), drop) for name, drop in drops.items()]
    before = [vars(module).get("forward") for module, _ in modules]
    for module, drop in modules:
        module.forward = (lambda x: x) if bypass else lambda x, drop=drop: MARKERS[drop.unit](x, drop.p)
    try:
        yield
    finally:
        for (module, _), forward in zip(modules, before):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


# ---------------------------------------------------------------------------------------------------------------------
# Which modules drop


def drops_of(model: nn.Module, images: torch.Tensor) -> dict[str, Drop]:
    """The modules that are the identity in evaluation and drop at random in training, by dotted name.

    Args:
        model: in eval mode.
        images: (N, C, H, W), run once through the model.
    """
    ranks: dict[str, int | None] = {}  # of the input of modules that gave back what they got, None where they once did not

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            same = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and _same(output, args[0])
            ranks[name] = args[0].ndim if same and ranks.get(name, args[0].ndim) == args[0].ndim else None

        return hook

    leaves = {name: module for name, module in model.named_modules()
              if name and not [*module.children(), *module.parameters(), *module.buffers()] and not isinstance(module, nn.Identity)}
    hooks = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in leaves.items()]
    try:
        with torch.no_grad(), own_randomness():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: _drop(leaves[name], rank) for name, rank in ranks.items() if rank}
    return {name: drop for name, drop in found.items() if drop}


def _same(output: Any, x: torch.Tensor) -> bool:
    return output is x or isinstance(output, torch.Tensor) and output.shape == x.shape and torch.equal(output, x)


def _drop(module: nn.Module, rank: int) -> Drop | None:
    """What a module does to tensors of this rank in training, if it is dropout of some kind and the identity in evaluation."""
    shape = (ROWS, *(3, 2, 2, 2, 2)[: rank - 1])
    was = module.training
    try:
        with torch.no_grad(), own_randomness():
            module.eval()
            x = 10 * torch.randn(shape)
            if not _same(module(x.clone()), x):
                return None
            module.train()
            ones = torch.ones(shape)
            first = module(ones.clone())
            if not isinstance(first, torch.Tensor) or first.shape != ones.shape:
                return None
            rows = first.flatten(1)
            if (rows == rows[0, 0]).all():  # the same for the whole batch: nothing, or it is dropped as one
                few = torch.ones(2, *shape[1:])
                calls = torch.stack([module(few.clone()) for _ in range(CALLS)]).flatten(1)
                return _rated(module, calls[:, 0], "batch") if (calls == calls[:, :1]).all() else None
            if (rows == rows[:, :1]).all():
                return _rated(module, rows[:, 0], "row")
            channels = first.flatten(2) if rank > 2 else first[..., None]
            if rank > 2 and (channels == channels[..., :1]).all():
                return _rated(module, channels[..., 0].flatten(), "channel")
            return _rated(module, first.flatten(), "element")
    except Exception:  # a module that takes no such tensor is captured by its own code
        return None
    finally:
        module.train(was)


def _rated(module: nn.Module, values: torch.Tensor, unit: str) -> Drop | None:
    """The rate, from what became of ones: 0, or 1 / (1 - p)."""
    kept = values[values != 0]
    share = 1 - len(kept) / len(values)
    if len(kept) and (kept != kept[0]).any() or (share == 0 and (not len(kept) or kept[0] == 1)):
        return None
    scale = float(kept[0]) if len(kept) else 1.0
    error = SIGMAS * (max(share, 1e-3) * (1 - share) / len(values)) ** 0.5 + 1e-6
    p = 1 - 1 / scale if scale > 1 else share
    if abs(p - share) > error or scale < 1:
        return None
    near = 1e-5 if scale > 1 else error
    named = [rate for value in vars(module).values() if type(value) in (int, float) for rate in (value, 1 - value)
             if 0 < rate <= 1 and abs(rate - p) < near]
    return Drop(float(min(named, key=lambda rate: abs(rate - p), default=round(p, 6))), unit)


def forget(model: nn.Module) -> None:
    """Clears what modules keep in evaluation of what they computed from their weights: the switch to training mode does that."""
    try:
        model.train()
    except Exception:  # the model's own code; a graph that torch.export made has no such mode
        pass
    model.eval()


@contextmanager
def with_tensors(module: nn.Module, values: dict[int, torch.Tensor]) -> Iterator[None]:
    """Puts other tensors in the place of a module's parameters and buffers, given by the identity of those that are there now.

    `torch.func.functional_call` does the same, but leaves its tensors in modules that have several names."""
    kept = [(tensors, dict(tensors)) for part in module.modules() for tensors in (part._parameters, part._buffers)]
    try:
        for tensors, before in kept:
            tensors.update({name: values[id(tensor)] for name, tensor in before.items() if tensor is not None})
        yield
    finally:
        for tensors, before in kept:
            tensors.update(before)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Runs a block from a fixed seed and puts the state of every random number generator on the CPU back."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python), np.random.set_state(array)


# ---------------------------------------------------------------------------------------------------------------------
# A run with every random number at its expected value


aten = torch.ops.aten
#: What a random operator gives at rest, in place of what it draws.
EXPECTED: dict[Any, Callable[..., torch.Tensor]] = {
    aten.bernoulli_.float: lambda x, p=0.5, **_: x.fill_(p),
    aten.bernoulli_.Tensor: lambda x, p, **_: x.copy_(p),
    aten.bernoulli.default: lambda p, **_: p.clone(),
    aten.bernoulli.p: lambda x, p=0.5, **_: torch.full_like(x, p),
    aten.uniform_.default: lambda x, low=0.0, high=1.0, **_: x.fill_((low + high) / 2),
    aten.normal_.default: lambda x, mean=0.0, *_, **__: x.fill_(mean),
    aten.rand.default: lambda size, **options: torch.full(size, 0.5, **options),
    aten.rand_like.default: lambda x, **options: torch.full_like(x, 0.5, **options),
    aten.randn.default: lambda size, **options: torch.zeros(size, **options),
    aten.randn_like.default: lambda x, **options: torch.zeros_like(x, **options),
    aten.native_dropout.default: lambda x, p, train: (x.clone(), torch.ones_like(x, dtype=torch.bool)),
    aten.rrelu_with_noise.default: lambda x, noise, low, high, train=False, generator=None: F.leaky_relu(x, (low + high) / 2),
}


@dataclass
class Observed:
    """What a model did in training mode.

    Attributes:
        output: what it returned, or None where it failed.
        failure: the error where it failed.
        draws: how often each module drew random numbers, by dotted name.
        norms: whether each batch norm took the statistics of its batch, by the name of its `running_mean`.
        updated: buffers that it changed, but for statistics of batch norms.
    """

    output: Any = None
    failure: Exception | None = None
    draws: Counter[str] = field(default_factory=Counter)
    norms: dict[str, set[bool]] = field(default_factory=dict)
    updated: set[str] = field(default_factory=set)


class AtRest(TorchDispatchMode):
    """Random operators give their expected values; where they ran, and how batch norms ran, is recorded in `seen`."""

    def __init__(self, seen: Observed, names: dict[int, str]):
        super().__init__()
        self.seen, self.names, self.stack = seen, names, [""]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not _off(func, args, kwargs):
            self.seen.draws[self.stack[-1]] += 1
            if func in EXPECTED:
                kwargs.pop("generator", None)
                return EXPECTED[func](*args, **kwargs)
        if "batch_norm" in func.__name__:
            given = dict(zip((argument.name for argument in func._schema.arguments), args))
            mean, training = given.get("running_mean"), given.get("training", True)
            if mean is not None and mean.data_ptr() in self.names:
                self.seen.norms.setdefault(self.names[mean.data_ptr()], set()).add(bool(training))
        return func(*args, **kwargs)


def _off(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a random operator is called in a way that draws nothing."""
    given = {argument.name: argument.default_value for argument in func._schema.arguments}
    given |= dict(zip(given, args)) | kwargs
    return given.get("dropout_p") == 0 or given.get("train") is False or given.get("training") is False or given.get("p") == 0


@contextmanager
def at_rest(model: nn.Module, values: dict[int, torch.Tensor], seen: Observed | None = None) -> Iterator[None]:
    """A block in which `model` runs on other tensors, with every random number of torch at its expected value.

    Args:
        model: the module that runs; what it does is recorded in `seen`.
        values: as of `with_tensors`.
    """
    seen = seen or Observed()
    names = {values[id(buffer)].data_ptr(): name for name, buffer in model.named_buffers() if buffer.numel()}
    paths = {module: name for name, module in model.named_modules()}
    mode, states = AtRest(seen, names), []

    def enter(module: nn.Module, args: Any) -> None:
        mode.stack.append(paths[module])
        states.append((random.getstate(), np.random.get_state()[2]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        name, (python, array) = mode.stack.pop(), states.pop()
        inside = any(drawn.startswith(f"{name}.") for drawn in seen.draws)
        if (python != random.getstate() or array != np.random.get_state()[2]) and not inside:
            seen.draws[name] += 1

    hooks = [hook for module in paths for hook in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))]
    try:
        with torch.no_grad(), own_randomness(), with_tensors(model, values), mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def observe(model: nn.Module, drops: dict[str, Drop], values: dict[int, torch.Tensor], images: torch.Tensor) -> Observed:
    """Runs a model in training mode on copies of its tensors; leaves it in eval mode.

    Args:
        model: any; what its forward raises is kept in `failure`.
        drops: as of `drops_of`: these are taken for the identity.
        values: as of `with_tensors`; buffers among them are changed.
        images: (N, C, H, W).
    """
    seen = Observed()
    buffers = {name: values[id(buffer)] for name, buffer in model.named_buffers()}
    before = {name: value.clone() for name, value in buffers.items()}
    try:
        model.train()
        with marked(model, drops, bypass=True), at_rest(model, values, seen):
            seen.output = model(images)
    except Exception as error:  # the model's own code
        seen.failure = error
    finally:
        model.eval()
    statistics = {name.rpartition(".")[0] for name in seen.norms}
    seen.updated = {name for name, value in buffers.items() if name.rpartition(".")[0] not in statistics
                    and not torch.equal(value.nan_to_num(), before[name].nan_to_num())}
    return seen
