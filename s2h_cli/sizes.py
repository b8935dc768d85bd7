"""How much memory a network would take, found without taking it: before a network from a file runs for the first time."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import UserError, why
from .graph import RECURRENT, tensors_of

GIGABYTE = 2**30
#: Bytes that all tensors which one image needs at a time may have, and those of one tensor. (The largest of the zoo: docs/security.md.)
MOST, LARGEST = 3 * GIGABYTE, 2 * GIGABYTE
#: Steps of a recurrent layer, and tensors that one call may return.
MOST_STEPS, MOST_PARTS = 4096, 65536
#: Largest whole number, and exponent of one, that Python's own arithmetic on sizes may have.
MOST_WHOLE, MOST_EXPONENT = 2**63, 64


def check_sizes(network: fx.GraphModule, classes: int | None = None) -> dict[fx.Node, Any]:
    """Propagates the sizes of one image through a network.

    Args:
        classes: of the data that it was made for.

    Returns:
        For each node its shape, a list of shapes for several outputs, or None for no tensor.

    Raises:
        UserError: it needs too much memory, or its sizes do not fit together.
    """
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False):
            images = torch.zeros(network.meta["static_batch"] or 1, *network.meta["input_size"])
            state = {name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype) for name, tensor in tensors_of(network).items()}
            with _Bounded():
                sizes = _Sizes(network, state)
                out = sizes.run(images)
    except UserError:
        raise
    except Exception as error:  # sizes that do not fit make torch raise whatever it likes
        raise UserError(f"the network cannot run: {why(error)}; plan.json may be damaged") from error
    if not isinstance(out, torch.Tensor) or out.ndim != 2 or classes is not None and out.shape[1] != classes:
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise UserError(f"the network gives {shape} for one image, not (1, {classes or 'classes'}); plan.json may be damaged")
    return sizes.shapes


class _Bounded(TorchDispatchMode):
    """Bounds every tensor that an operator makes, those inside it too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _bytes(tensor) > LARGEST:
                raise UserError(f"the network makes a tensor of {_bytes(tensor) / GIGABYTE:.0f} GB for one image, where {LARGEST // GIGABYTE} GB are the most; "
                                "plan.json may be damaged")
        return out


class _Sizes(fx.Interpreter):
    """Runs a network on tensors without content, and sums up what is alive."""

    extra_traceback = False  # nothing is added to our messages

    def __init__(self, network: fx.GraphModule, state: dict[str, torch.Tensor]):
        super().__init__(network)
        self.state, self.live, self.sizes, self.shapes = state, 0, {}, {}

    def run_node(self, node: fx.Node) -> Any:
        out = super().run_node(node)
        self.sizes[node] = sum(_bytes(tensor) for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)) if node.op != "get_attr" else 0
        self.shapes[node] = [_shape(part) for part in out] if isinstance(out, (list, tuple)) else _shape(out)
        self.live += self.sizes[node]
        if self.live > MOST:
            raise UserError(f"the network needs more than {MOST // GIGABYTE} GB for one image, at {node.name}; plan.json may be damaged")
        self.live -= sum(self.sizes[gone] for gone in self.user_to_last_uses.get(node, ()))
        return out

    def get_attr(self, target: str, args: tuple, kwargs: dict) -> Any:
        return self.state[target]

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        module = self.fetch_attr(target)
        own = {name: self.state[f"{target}.{name}"] for name in tensors_of(module)}
        return torch.func.functional_call(module, own, args, kwargs, tie_weights=False)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if getattr(target, "__module__", "") == "_operator" and target is not operator.getitem:
            _check_arithmetic(target, args)
        name = target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else target.__name__
        if name in RECURRENT:
            _check_recurrent(*args[:6], *args[6:9])
        if ("split" in name or name in ("unbind", "chunk", "unsafe_chunk")) and max(args[0].shape, default=0) > MOST_PARTS:
            raise UserError(f"the network takes a tensor apart into more than {MOST_PARTS} parts; plan.json may be damaged")
        out = super().call_function(target, args, kwargs)
        if isinstance(out, int) and abs(out) >= MOST_WHOLE:
            raise UserError("the network computes a size beyond all bounds; plan.json may be damaged")
        return out


def _check_arithmetic(target: Any, args: tuple) -> None:
    """Python's operators take tensors and numbers here, nothing that grows."""
    if not all(isinstance(arg, (torch.Tensor, int, float)) for arg in args):
        raise UserError(f"the network calls {target.__name__} on something that is no tensor and no number; plan.json may be damaged")
    if target is operator.pow and not any(isinstance(arg, torch.Tensor) for arg in args) and abs(args[1]) > MOST_EXPONENT:
        raise UserError("the network computes a power beyond all bounds; plan.json may be damaged")


def _check_recurrent(x: torch.Tensor, state: Any, weights: list[torch.Tensor], has_biases: bool, layers: int, *_: Any) -> None:
    """The weights of a recurrent layer have the sizes that its state asks for: torch does not look."""
    hidden = (state[0] if isinstance(state, (list, tuple)) else state).shape[-1]
    if max(x.shape[:2]) > MOST_STEPS:
        raise UserError(f"the network has a recurrent layer of more than {MOST_STEPS} steps; plan.json may be damaged")
    rows = {weight.shape[0] for weight in weights}
    each = 4 if has_biases else 2
    first = [x.shape[-1], hidden]
    directions = state[0].shape[0] // layers if isinstance(state, (list, tuple)) else state.shape[0] // layers
    for i in range(0, len(weights), each):
        inner = first[0] if i // each < directions else hidden * directions
        if weights[i].shape[1:] != (inner,) or weights[i + 1].shape[1:] != (hidden,):
            rows = set()
    if len(rows) != 1 or rows.pop() % hidden or len(weights) != each * layers * directions:
        raise UserError("the weights of a recurrent layer do not fit its state; plan.json may be damaged")


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(map(int, value.shape)) if isinstance(value, torch.Tensor) else None


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
