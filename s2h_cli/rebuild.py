"""Surgery: graph x plan x parameters -> the small network.

The small network is the same graph with other integers. `skeleton` copies the graph without its parameters, `resize` writes a
plan's integers and buffers into it, `slice_parameters` cuts the parameters. Training runs the skeleton on sliced shared
weights; `rebuild` gives it sliced weights of its own. There is no other way to a small network in the program.
"""

from __future__ import annotations

import copy
import functools
import operator
from typing import TYPE_CHECKING, Any, Callable

import numpy as np
import torch
from torch import fx, nn

from .graph import FILLED, RESHAPES, SPLITS, tensors_of

if TYPE_CHECKING:
    from .plan import Plan, Space

Indices = dict[str, list[torch.Tensor | None]]


def kept_indices(plan: Plan, device: torch.device | str = "cpu") -> Indices:
    """For each parameter, buffer and inserted gate, for each dimension, the kept indices (int64), or None where all stay."""
    gates = {name: [parts if d == use.dim else None for d, parts in enumerate(plan.space.tensors[use.operand.name][0])]
             for name, use in plan.space.gates.items()}
    cut: dict[tuple[str, int], np.ndarray] = {}
    out: Indices = {}
    for name, dims in (plan.space.params | gates).items():
        out[name] = [None] * len(dims)
        for dim, parts in enumerate(dims):
            if parts is not None and not (kept := plan.kept(parts)).all():
                cut[name, dim] = np.flatnonzero(kept)
    if cut:  # all in one go: to a GPU each transfer makes the processor wait
        together = torch.from_numpy(np.concatenate(list(cut.values()))).to(device)
        for (name, dim), indices in zip(cut, together.split([len(kept) for kept in cut.values()])):
            out[name][dim] = indices
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
        changed |= _resize_call(small, node, full, sizes)
    if changed:
        small.recompile()


def _resize_call(small: fx.GraphModule, node: fx.Node, full: fx.Node, sizes: Sizes) -> bool:
    """Makes one node, or its module, fit; whether the graph's code changed."""
    if node.op == "call_module":
        _resize_module(small.get_submodule(node.target), full, sizes)
    args = node.args
    for position, value in _resized(node, full, sizes).items():
        node.update_arg(position, value)
    return node.args != args


def _resize_module(module: nn.Module, full: fx.Node, sizes: Sizes) -> None:
    update = next((update for kinds, update in MODULES.items() if isinstance(module, kinds)), None)
    if update and sizes.touch(full):
        update(module, full, sizes)


def _resized(node: fx.Node, full: fx.Node, sizes: Sizes) -> dict[int, Any]:
    """Arguments of a call by position, where they count channels; what other nodes compute stays."""
    if node.op != "call_function" or node.meta.get("op") not in CALLS or not sizes.touch(full):
        return {}
    return {position: value if not isinstance(value, list) else
            [old if isinstance(old, fx.Node) else new for old, new in zip(node.args[position], value)]
            for position, value in CALLS[node.meta["op"]](full, sizes).items()}


def misfit(network: fx.GraphModule, plan: Plan) -> fx.Node | None:
    """The first node of `network` whose call fails at the sizes of `plan`, or gives another shape than planned; None where all fit.
    Tensors without values run through the functions of the graph, so that it costs little; layers are taken at their word."""
    sizes, tensors = Sizes(plan), tensors_of(network)
    run = fx.Interpreter(network)
    for node in network.graph.nodes:
        if node.op == "output":
            return None
        planned = _planned(plan, node)
        try:
            if node.op == "call_module":
                _resize_module(copy.copy(network.get_submodule(node.target)), node, sizes)
                made = run.env[node.args[0]].new_empty(planned)
            elif node.op in ("placeholder", "get_attr"):
                made = torch.empty(planned, device="meta", dtype=tensors[node.target].dtype if node.op == "get_attr" else None)
            else:
                args = list(node.args)
                for position, value in _resized(node, node, sizes).items():
                    args[position] = value
                args, kwargs = fx.node.map_arg((tuple(args), node.kwargs), run.env.__getitem__)
                args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: torch.device("meta") if isinstance(a, torch.device) else a)
                made = getattr(run, node.op)(node.target, args, kwargs)
        except Exception:
            made = None
        shapes = planned if isinstance(planned, list) else [planned]
        values = made if isinstance(made, (list, tuple)) else [made]
        if any(shape is not None and getattr(value, "shape", None) != shape for value, shape in zip(values, shapes)):
            if sizes.touch(node):
                return node
            blank = [shape and torch.empty(shape, device="meta") for shape in shapes]  # of an operator that runs with values alone
            made = blank if isinstance(planned, list) else blank[0]
        run.env[node] = made
    return None


def _planned(plan: Plan, node: fx.Node) -> Any:
    """`node.meta["shape"]` under a plan."""
    def left(dims: list[np.ndarray | None], shape: tuple[int, ...] | None) -> torch.Size | None:
        return None if shape is None else torch.Size(plan.count(parts, size) for parts, size in zip(dims, shape, strict=True))

    shape = node.meta.get("shape")
    if shape is None:
        return None
    dims = plan.space.tensors[node.name]
    return list(map(left, dims, shape)) if isinstance(shape, list) else left(dims[0], shape)


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

    def touch(self, node: fx.Node) -> bool:
        """Whether something that enters or leaves a node can be cut."""
        tensors = (self.plan.space.tensors.get(n.meta.get("gated", n.name), []) for n in (node, *node.all_input_nodes))
        return any(parts is not None for outputs in tensors for dims in outputs for parts in dims)

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


def _sizes_call(position: int, node: fx.Node, sizes: Sizes) -> dict[int, Any]:
    return {position: [sizes.count(node, axis) for axis in range(len(node.args[position]))]}


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
    if len(node.args) <= 6 or isinstance(node.args[6], fx.Node):  # one group, or computed from the operands
        return {}
    return {6: sizes.count(node.args[0], 1) // sizes.count(node.args[1], 1)}


CALLS: dict[str, Callable[[fx.Node, Sizes], dict[int, Any]]] = {
    **dict.fromkeys(RESHAPES, _reshape_call),
    **dict.fromkeys(SPLITS, _split_call),
    **{op: functools.partial(_sizes_call, position) for op, position in FILLED.items()},
    "slice": _slice_call,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm_call),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv_call),
}
