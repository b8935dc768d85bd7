"""Surgery: graph x plan x parameters -> the small network.

The small network is the same graph with other integers. `skeleton` copies the graph without its parameters, `resize` writes a
plan's integers and buffers into it, `slice_parameters` cuts the parameters. Training runs the skeleton on sliced shared
weights; `rebuild` gives it sliced weights of its own. There is no other way to a small network in the program.
"""

from __future__ import annotations

import copy
import operator
from typing import Any, Callable

import numpy as np
import torch
from torch import fx, nn

from .graph import RESHAPES
from .plan import Plan, Space

Indices = dict[str, list[torch.Tensor | None]]


def kept_indices(plan: Plan, device: torch.device | str = "cpu") -> Indices:
    """For each parameter, buffer and inserted gate, for each dimension, the kept indices (int64), or None where all stay."""
    out: Indices = {}
    gates = {name: [parts if d == use.dim else None for d, parts in enumerate(plan.space.tensors[use.operand.name][0])]
             for name, use in plan.space.gates.items()}
    for name, dims in (plan.space.params | gates).items():
        kept = [None if parts is None else plan.kept(parts) for parts in dims]
        out[name] = [None if k is None or k.all() else torch.from_numpy(k).nonzero().squeeze(1).to(device) for k in kept]
    return out


def slice_tensor(tensor: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor:
    """Cuts each dimension to its kept indices; differentiable."""
    for dim, index in enumerate(indices):
        if index is not None:
            tensor = tensor.index_select(dim, index)
    return tensor


def slice_parameters(parameters: dict[str, torch.Tensor], indices: Indices) -> dict[str, torch.Tensor]:
    return {name: slice_tensor(tensor, indices.get(name, [])) for name, tensor in parameters.items()}


def skeleton(network: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph with modules and buffers of its own; its parameters hold no memory (device meta)."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, memo)


def resize(small: fx.GraphModule, network: fx.GraphModule, plan: Plan, indices: Indices) -> None:
    """Makes a skeleton of `network` fit the parameters that `plan` leaves: integers of modules and calls, and buffers."""
    for name, buffer in network.named_buffers():
        owner, _, leaf = name.rpartition(".")
        small.get_submodule(owner)._buffers[leaf] = slice_tensor(buffer, indices.get(name, [])).clone()
    sizes = Sizes(plan)
    changed = False
    for node, full in zip(small.graph.nodes, network.graph.nodes, strict=True):
        if node.op == "call_module":
            module = small.get_submodule(node.target)
            update = next((update for kinds, update in MODULES.items() if isinstance(module, kinds)), None)
            if update:
                update(module, full, sizes)
        elif node.op == "call_function" and node.meta.get("op") in CALLS:
            for position, value in CALLS[node.meta["op"]](full, sizes).items():
                # Integers of the full graph's call, changed where they count channels; nodes stay this graph's own.
                old = node.args[position]
                new = value if not isinstance(value, list) else [o if isinstance(o, fx.Node) else v for o, v in zip(old, value)]
                changed |= new != old
                node.update_arg(position, new)
    if changed:
        small.recompile()


def rebuild(network: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """The small network of `plan`, with weights and buffers of its own, in eval mode."""
    indices = kept_indices(plan, next(network.parameters()).device)
    small = skeleton(network)
    resize(small, network, plan, indices)
    for name, tensor in slice_parameters(dict(network.named_parameters()), indices).items():
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(tensor.detach().clone(), requires_grad=network.get_parameter(name).requires_grad)
        small.get_submodule(owner).register_parameter(leaf, parameter)
    return small.eval()


def insert_gates(network: fx.GraphModule, space: Space) -> fx.GraphModule:
    """The same network, on the same tensors, with a factor at each operand of `space.gates`: a buffer of ones, shaped to
    broadcast along the operand's dimension. Who runs the network puts gates in its place."""
    graph, nodes = fx.Graph(), {}
    graph.output(graph.graph_copy(network.graph, nodes))
    gated = fx.GraphModule(network, graph, type(network).__name__)
    of_name = {node.name: new for node, new in nodes.items()}
    device = next(network.parameters()).device
    for name, use in space.gates.items():
        operand, user = of_name[use.operand.name], of_name[use.node]
        shape = [-1 if d == use.dim else 1 for d in range(len(operand.meta["shape"]))]
        gated.register_buffer(name, torch.ones(operand.meta["shape"][use.dim], device=device).view(shape), persistent=False)
        with graph.inserting_before(user):
            factor = graph.get_attr(name)
            product = graph.call_function(operator.mul, (operand, factor))
        product.meta.update(shape=operand.meta["shape"], gated=use.operand.name)
        user.replace_input_with(operand, product)
    gated.recompile()
    gated.meta.update(network.meta)
    return gated.train(network.training)


class Sizes:
    """Kept counts around the nodes of the full graph."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def count(self, node: fx.Node, axis: int, which: int = 0) -> int:
        """Kept indices along an axis of a node's output (of output `which`)."""
        shape = node.meta["shape"]
        shape = shape[which] if isinstance(shape, list) else shape
        return self.plan.count(self._parts(node, axis, which), shape[axis])

    def _parts(self, node: fx.Node, axis: int, which: int = 0) -> np.ndarray | None:
        return self.plan.space.tensors[node.meta.get("gated", node.name)][which][axis]

    def before(self, node: fx.Node, axis: int, position: int) -> int:
        """Where a bound among a node's indices along an axis comes to lie."""
        parts = self._parts(node, axis)
        return position if parts is None else int(self.plan.kept(parts)[:position].sum())

    def is_cut(self, node: fx.Node, axis: int) -> bool:
        return self._parts(node, axis) is not None


# ---------------------------------------------------------------------------------------------------------------------
# The integers that count channels: attributes of modules, and arguments of calls by position. Nodes are the full graph's.


def _conv(module: nn.Module, node: fx.Node, sizes: Sizes) -> None:
    weight = node.graph.owning_module.get_parameter(f"{node.target}.weight")
    module.in_channels, module.out_channels = sizes.count(node.args[0], 1), sizes.count(node, 1)
    module.groups = module.in_channels // sizes.plan.count(sizes.plan.space.params[f"{node.target}.weight"][1], weight.shape[1])


def _linear(module: nn.Module, node: fx.Node, sizes: Sizes) -> None:
    module.in_features, module.out_features = sizes.count(node.args[0], -1), sizes.count(node, -1)


def _batch_norm(module: nn.Module, node: fx.Node, sizes: Sizes) -> None:
    module.num_features = sizes.count(node, 1)


def _layer_norm(module: nn.Module, node: fx.Node, sizes: Sizes) -> None:
    module.normalized_shape = tuple(sizes.count(node, axis) for axis in range(-len(module.normalized_shape), 0))


def _group_norm(module: nn.Module, node: fx.Node, sizes: Sizes) -> None:
    module.num_channels = sizes.count(node, 1)


MODULES: dict[tuple[type, ...], Callable[[nn.Module, fx.Node, Sizes], None]] = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): _conv,
    (nn.Linear,): _linear,
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm): _batch_norm,
    (nn.LayerNorm,): _layer_norm,
    (nn.GroupNorm,): _group_norm,
}


def _reshape_call(node: fx.Node, sizes: Sizes) -> dict[int, Any]:
    if node.target is not torch.reshape:  # the batch is in two axes: a call without sizes
        return {}
    return {1: [sizes.count(node, axis) if isinstance(s, int) and s != -1 else s for axis, s in enumerate(node.args[1])]}


def _split_call(node: fx.Node, sizes: Sizes) -> dict[int, Any]:
    return {1: [sizes.count(node, node.args[2], which) for which in range(len(node.args[1]))]}


def _slice_call(node: fx.Node, sizes: Sizes) -> dict[int, Any]:
    x, axis, *bounds = node.args
    if not sizes.is_cut(x, axis):
        return {}
    return {2 + i: sizes.before(x, axis, bound) for i, bound in enumerate(bounds[:2]) if bound is not None}


def _layer_norm_call(node: fx.Node, sizes: Sizes) -> dict[int, Any]:
    return {1: [sizes.count(node, axis) for axis in range(-len(node.args[1]), 0)]}


def _conv_call(node: fx.Node, sizes: Sizes) -> dict[int, Any]:
    return {6: sizes.count(node.args[0], 1) // sizes.count(node.args[1], 1)} if len(node.args) > 6 else {}


CALLS: dict[str, Callable[[fx.Node, Sizes], dict[int, Any]]] = {
    **dict.fromkeys(RESHAPES, _reshape_call),
    **dict.fromkeys(("split", "chunk", "split_with_sizes"), _split_call),
    "slice": _slice_call,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm_call),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv_call),
}
