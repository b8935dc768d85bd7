"""What follows from a small network is computed from it: `checked` holds a `plan.json` against its own network.

What cannot be computed stays the file's claim, checked for sense alone: figures of the whole network, accuracy, times.
"""

from __future__ import annotations

import json
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from torch import fx, nn

from . import artifacts, schema
from .cost import FORMULAS, channel_axis
from .errors import UserError
from .graph import FUNCTIONS, LAYERS, aten_call, tensors_of
from .network_json import PLAN, network_from_json, network_to_json
from .plan import Plan, Space
from .report.facts import describe
from .rules import Tensor
from .schema import refuse
from .sizes import check_sizes

#: Keys of a plan that describe it; `s2h_cli.load` needs none of them.
KEYS = ("model", "input_size", "macs", "params", "budget", "dropped", "layers", "groups", "frozen", "kept_indices", "data", "versions")
#: Layers whose weight has a row for each output channel.
MATRICES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_OP_OF = {name: op for op, name in FUNCTIONS.items()}


class Row(NamedTuple):
    """One counted operator of a network: what it may be called where it reads tensors, channels in and out, MACs of one image."""

    names: set[str]
    kind: str
    inputs: int
    outputs: int
    macs: int


def counted(network: fx.GraphModule, shapes: dict[fx.Node, Any]) -> list[Row]:
    """The operators that cost something, in the order of the graph; their sum is fvcore's count (see `cost`).

    Args:
        shapes: those of `sizes.check_sizes`.
    """
    rows = []
    for node in network.graph.nodes:
        op, args = _call(node, network)
        if op not in FORMULAS:
            continue
        args = fx.node.map_aggregate(tuple(args), lambda arg: _labelled(shapes[arg]) if isinstance(arg, fx.Node) else arg)
        out = _labelled(shapes[node])
        try:
            products = FORMULAS[op](args, out)
        except Exception:  # such a call is not counted in a plan either
            continue
        macs = sum(constant * math.prod(size for size, _ in axes) for constant, axes in products)
        inputs, outputs = (tensor.shape[channel_axis(op)] if isinstance(tensor, Tensor) else 0 for tensor in (args[0], out))
        rows.append(Row(_names(node), op, inputs, outputs, round(macs)))
    return rows


def _labelled(shape: Any) -> Any:
    """A tensor without labels; of several outputs the first."""
    shape = shape[0] if isinstance(shape, list) else shape
    return shape if shape is None else Tensor(shape, (None,) * len(shape))


def _names(node: fx.Node) -> set[str]:
    """What a row may be called: the layer, and the tensors that it reads and their owners."""
    read = [source.target for source in node.all_input_nodes if source.op == "get_attr"]
    return {*read, *(name.rpartition(".")[0] for name in read), *([node.target] if node.op == "call_module" else [])}


def _call(node: fx.Node, network: fx.GraphModule) -> tuple[str, list]:
    """A node as `graph.capture` met it: operator, and arguments in ATen's order."""
    if node.op == "call_module":
        module = network.get_submodule(node.target)
        op = next((op for op, kinds in _KINDS.items() if isinstance(module, kinds)), "")
        if not op:
            return "", []
        args = [*node.args, *[None] * 6]
        for attribute, position in LAYERS[op].tensors.items():
            tensor = getattr(module, attribute, None)
            args[position] = None if tensor is None else Tensor(tuple(tensor.shape), (None,) * tensor.ndim)
        if op == "batch_norm":
            args[5] = args[3] is None  # without statistics of its own it takes those of the batch
        return op, args
    if node.op != "call_function":
        return "", []
    if hasattr(node.target, "_schema"):
        return aten_call(node)
    return _OP_OF.get(_name(node.target), ""), list(node.args)


_KINDS = {**{f"conv{n}d": (getattr(nn, f"Conv{n}d"),) for n in (1, 2, 3)}, "linear": (nn.Linear,), "batch_norm": (nn.modules.batchnorm._BatchNorm,),
          "layer_norm": (nn.LayerNorm,), "group_norm": (nn.GroupNorm,)}


def _name(function: Any) -> str:
    from .network_json import _NAME_OF

    return _NAME_OF.get(function, "")


def macs(network: fx.GraphModule) -> int:
    """The MACs of one image.

    Raises:
        UserError: the network needs too much memory, or its sizes do not fit together.
    """
    return sum(row.macs for row in counted(network, check_sizes(network)))


def checked(path: str | os.PathLike, trust: bool = False) -> artifacts.Result:
    """A result whose `plan.json` says of its network what is so: all that follows from the network was computed and compared.

    Args:
        trust: as of `artifacts.load`.

    Raises:
        UserError: there is no result, it cannot be loaded, or it says what is not so.
    """
    result = artifacts.read(path, trust, needs=KEYS)
    check(result, str(Path(path) / PLAN))
    return result


def check_kept(network: fx.GraphModule, space: Space, where: str) -> None:
    """Writes a network of which nothing was cut and reads it again, in memory: before it is trained.

    Raises:
        UserError: a result of it could not be loaded again.
    """
    plan = Plan.whole(space)
    state = {name: tensor.detach().cpu() for name, tensor in tensors_of(network).items()}
    try:
        text = json.dumps({**describe(plan, where, network.meta["input_size"]), "kept_indices": plan.by_group(), "network": network_to_json(network)})
        kept = schema.check(schema.Plan, schema.parse_json(text, PLAN), PLAN)
        loaded = network_from_json(kept["network"], state, trust=True)
        check(artifacts.Result(kept, loaded, check_sizes(loaded)), PLAN)
    except UserError as error:
        raise UserError(f"a result of '{where}' could not be loaded again, so it is not trained: {error}") from error


def check(result: artifacts.Result, where: str) -> None:
    """Raises UserError where a plan says what is not so of its network, or what does not fit together."""
    plan, network, shapes = result

    def equal(place: str, found: Any, so: Any) -> None:
        if found != so:
            refuse(where, (place,), f"it says {found}, and it is {so}")

    kept = [layer for layer in plan["layers"] if layer["macs"][0] or not layer["macs"][1]]  # the others are in blocks that are dropped
    rows = counted(network, shapes)
    equal("layers", len(kept), len(rows))
    for i, (layer, row) in enumerate(zip(kept, rows)):
        for key, found, so in (("kind", layer["kind"], row.kind), ("in", layer["in"][0], row.inputs),
                               ("out", layer["out"][0], row.outputs), ("macs", layer["macs"][0], row.macs)):
            equal(f"layers.{i}.{key}", found, so)
        if row.names and layer["name"] not in row.names:
            refuse(where, ("layers", i, "name"), f"it says {layer['name']}, and it is {min(row.names)}")
        _check_whole(layer, network, where)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    names = {layer["name"] for layer in plan["layers"]}
    owned: dict[str, int] = {}
    for name, size in sizes.items():
        owner = name if name in names else name.rpartition(".")[0]
        owned[owner] = owned.get(owner, 0) + size
    for layer in plan["layers"]:
        dropped = layer["macs"][1] and not layer["macs"][0]
        equal(f"layers.{layer['name']}.params", layer["params"][0], owned.get(layer["name"], 0))
        for key in ("in", "out", "macs", "params"):
            if layer[key][0] > layer[key][1] or dropped and layer[key][0]:
                refuse(where, ("layers", layer["name"], key), f"{layer[key][0]} of {layer[key][1]} cannot be kept")
    macs, params = plan["macs"], plan["params"]
    equal("macs.pruned", macs["pruned"], sum(row.macs for row in rows))
    equal("macs.full", macs["full"], sum(layer["macs"][1] for layer in plan["layers"]))
    equal("params.pruned", params["pruned"], sum(sizes.values()))
    for key, cost in (("macs", macs), ("params", params)):
        if not math.isclose(cost["ratio"] * cost["full"], cost["pruned"], rel_tol=1e-9):
            refuse(where, (key, "ratio"), f"it says {cost['ratio']}, and {cost['pruned']} of {cost['full']} is {cost['pruned'] / max(cost['full'], 1):.4f}")
    equal("macs.target", macs["target"], (plan["budget"] or {}).get("flops"))
    equal("kept_indices", sorted(plan["kept_indices"]), sorted(group["name"] for group in plan["groups"]))
    for group in plan["groups"]:
        indices = plan["kept_indices"][group["name"]]
        equal(f"groups.{group['name']}.kept", group["kept"], len(indices))
        if any(a >= b for a, b in zip(indices, indices[1:])) or indices and indices[-1] >= group["size"]:
            refuse(where, ("kept_indices", group["name"]), f"its indices are not ascending below {group['size']}")
    _check_groups(plan, {name for name, module in network.named_modules() if isinstance(module, MATRICES)}, where)


def _check_whole(layer: dict[str, Any], network: fx.GraphModule, where: str) -> None:
    """What is said of a layer before the cut: its parameters follow from its widths, and it had no fewer MACs than they say."""
    module = dict(network.named_modules()).get(layer["name"])
    if not isinstance(module, (*MATRICES, nn.modules.batchnorm._BatchNorm)) or 0 in (layer["in"][0], layer["out"][0]):
        return
    weight, bias = (0 if tensor is None else tensor.numel() for tensor in (module.weight, module.bias))
    if layer["params"][0] != weight + bias:  # it shares them with others
        return
    inputs, outputs = (Fraction(layer[key][1], layer[key][0]) for key in ("in", "out"))
    per_group = [inputs, Fraction(1)] if getattr(module, "groups", 1) > 1 else [inputs if isinstance(module, MATRICES) else Fraction(1)]
    fits = {weight * outputs * across + bias * outputs: layer["macs"][0] * outputs * across for across in per_group}
    if layer["params"][1] not in fits:
        refuse(where, ("layers", layer["name"], "params"), f"{layer['params'][1]} parameters before the cut do not follow from its widths")
    if layer["macs"][1] < fits[layer["params"][1]]:
        refuse(where, ("layers", layer["name"], "macs"), f"{layer['macs'][1]} MACs before the cut are fewer than its widths say")


def _check_groups(plan: dict[str, Any], matrices: set[str], where: str) -> None:
    """A group keeps the share of its channels that a layer of it does, where the channels of the layer are those of the group alone."""
    outputs = {layer["name"]: layer["out"] for layer in plan["layers"] if layer["macs"][0] and layer["name"] in matrices}
    groups_of: dict[str, int] = {}
    for group in plan["groups"]:
        for name in group["layers"]:
            groups_of[name] = groups_of.get(name, 0) + 1
    mixed = {name for entry in plan["frozen"] for name in entry["layers"]}
    for group in plan["groups"]:
        for name in group["layers"]:
            if groups_of[name] == 1 and name not in mixed and name in outputs and outputs[name][0] * group["size"] != outputs[name][1] * group["kept"]:
                refuse(where, ("groups", group["name"]), f"it keeps {group['kept']} of {group['size']}, but {name} {outputs[name][0]} of {outputs[name][1]}")
