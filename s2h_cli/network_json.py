"""The network as data: a canonical graph as JSON, and back, without timm, without the user's model file and without pickle.

What the data may name is on the lists here, in `operators` and in `graph.FUNCTIONS`; anything else is refused.
"""

from __future__ import annotations

import math
import re
from typing import Any, Callable

import torch
from torch import fx, nn

from .errors import UserError, why
from .graph import FUNCTIONS, resolve, tensors_of
from .operators import FILLED, OPERATORS
from .schema import INT64, Network, check, shown

#: The files that hold a network: its tensors, and the data.
WEIGHTS, PLAN = "model.safetensors", "plan.json"

# ---------------------------------------------------------------------------------------------------------------------
# What a graph may name.

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode")
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
#: Layer classes by name, with the constructor arguments that are read off a layer. `Module` is a container.
LAYERS: dict[str, tuple[str, ...]] = {
    "Module": (),
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), _CONV),
    "Linear": ("in_features", "out_features", "bias"),
    **dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), _BATCH_NORM),
    "LayerNorm": ("normalized_shape", "eps", "elementwise_affine", "bias"),
    "GroupNorm": ("num_groups", "num_channels", "eps", "affine"),
    "Dropout": ("p", "inplace"),
    "Dropout2d": ("p", "inplace"),
    "StochasticDepth": ("p", "mode"),
}
_NAMES = (*FUNCTIONS.values(), *(f"operator.{name}" for name in ("floordiv", "mod", "neg", "pow", "getitem")),
          *(f"torch.{name}" for name in ("sym_int", "sym_float", "sym_max", "sym_min")))
CALLABLES: dict[str, Callable] = {name: resolve(name) for name in _NAMES}
METHODS = ("size", "expand", "contiguous")
_NAME_OF = {function: name for name, function in CALLABLES.items()}
_ATEN = "torch.ops.aten."
#: Types of numbers, the one layout and the memory formats that an argument may name.
CONSTANTS = ("float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool", "complex64", "complex128", "strided",
             "contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
#: Types of tensors that no layer owns.
TENSOR_TYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
                torch.float16, torch.bfloat16)
#: Operators of libraries that code of this process imported: of a model that the command line named (see `accept`).
_accepted: set[str] = set()
#: Layers in layers.
DEEPEST = 100
#: One part of a dotted name. `torch.fx` writes these into source code.
_PART = re.compile(r"[\w \-+:/@()\[\]]+")


def _layer_class(name: str) -> type[nn.Module]:
    if name not in LAYERS:
        raise UserError(f"{PLAN} names the layer {name!r}, which s2h does not know; it may be damaged or from another version")
    if name == "StochasticDepth":
        from torchvision.ops import StochasticDepth

        return StochasticDepth
    return getattr(nn, name)


def _function(name: str, trust: bool) -> Callable:
    """The function behind a name in a file: one of `CALLABLES`, or an operator of ATen on the list in `operators`. With `trust` any operator."""
    if name in CALLABLES:
        return CALLABLES[name]
    name = _ATEN + FILLED.get(name.removeprefix(_ATEN), name.removeprefix(_ATEN)) if name.startswith(_ATEN) else name
    if not (trust or name in _accepted or name.startswith(_ATEN) and name.removeprefix(_ATEN) in OPERATORS):
        raise UserError(f"{PLAN} names the function {shown(name)!r}, which s2h does not know as one that only computes; if you know who made it, import what it "
                        "needs and call s2h_cli.load(FOLDER, trust=True)")
    found: Any = None
    if re.fullmatch(r"torch\.ops\.\w+\.\w+\.\w+", name):
        found = torch.ops
        for part in name.split(".")[2:]:
            found = getattr(found, part, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise UserError(f"{PLAN} names the function {shown(name)!r}, which s2h does not know here; it may be damaged, from another version, or need an operator "
                        "library that is not imported")
    return found


def foreign(network: fx.GraphModule) -> list[str]:
    """The operators of a network that a file of a stranger may not name.

    Raises:
        UserError: a file cannot hold the network at all.
    """
    odd = [name for name in network_to_json(network)["modules"].keys() | tensors_of(network).keys() if not all(map(_PART.fullmatch, name.split(".")))]
    if odd:
        raise UserError(f"the layer {sorted(odd)[0]!r} has a name that {PLAN} cannot hold; give it one of letters, digits and underscores")
    names = dict.fromkeys(_function_name(node) for node in network.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return [name for name in names if name.removeprefix(_ATEN) not in OPERATORS]


def accept(names: list[str]) -> None:
    """Takes operators for good in this process: those of a model that the user named."""
    _accepted.update(names)


def _function_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, operator_name = node.target._schema.name.split("::")
        name = f"{operator_name}.{node.target._overloadname}"
        return f"torch.ops.{namespace}.{FILLED.get(name, name) if namespace == 'aten' else name}"
    if node.target not in _NAME_OF:
        raise UserError(f"the network calls {node.target!r} ({node.name}), which {PLAN} cannot hold")
    return _NAME_OF[node.target]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments as JSON: what JSON has no word for becomes a dict of one key.


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise UserError(f"the network has an argument {value!r} ({type(value).__name__}), which {PLAN} cannot hold")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return _whole(value) if isinstance(value, int) else value
    ((kind, content),) = value.items()
    return _KINDS[kind](content, nodes)


def _torch_constant(name: str, nodes: dict[str, fx.Node]) -> Any:
    if name not in CONSTANTS:
        raise ValueError(f"torch.{shown(str(name))} is no dtype, layout or memory format that a network here has")
    return getattr(torch, name)


def _cpu(name: str) -> torch.device:
    if name != "cpu":
        raise ValueError(f"the device {shown(str(name))}, where a file has its tensors on the CPU")
    return torch.device(name)


def _whole(value: int) -> int:
    if abs(value) > INT64:
        raise ValueError("a whole number of more than 64 bits")
    return value


_KINDS: dict[str, Callable[[Any, dict[str, fx.Node]], Any]] = {
    "float": lambda content, nodes: float(content),
    "node": lambda content, nodes: nodes[content],
    "tuple": lambda content, nodes: tuple(_decode(content, nodes)),
    "slice": lambda content, nodes: slice(*_decode(content, nodes)),
    "torch": _torch_constant,
    "device": lambda content, nodes: _cpu(content),
}


# ---------------------------------------------------------------------------------------------------------------------
# The network as data


def network_to_json(small: fx.GraphModule) -> dict:
    """The canonical network as JSON data: everything but the values of its tensors.

    Raises:
        UserError: it contains something that the data cannot hold.
    """
    return {
        "class": type(small).__name__,
        "meta": {"input_size": list(small.meta["input_size"]), "static_batch": small.meta["static_batch"]},
        "modules": {path: _module_to_json(path, module) for path, module in small.named_modules(remove_duplicate=False) if path},
        "tensors": _tensors_to_json(small),
        "nodes": [_node_to_json(node) for node in small.graph.nodes],
    }


def _module_to_json(path: str, module: nn.Module) -> dict:
    name = type(module).__name__
    if name not in LAYERS or type(module) is not _layer_class(name):
        raise UserError(f"the network's layer {path} is a {name}, which {PLAN} cannot hold")
    values = {key: getattr(module, key) for key in LAYERS[name]}
    if "bias" in values:
        values["bias"] = values["bias"] is not None
    return {"class": name, **{key: _encode(value) for key, value in values.items()}}


def _tensors_to_json(small: nn.Module) -> dict:
    out, first = {}, {}
    for name, tensor in tensors_of(small).items():
        owner, _, leaf = name.rpartition(".")
        if isinstance(tensor, nn.Parameter):
            out[name] = {"kind": "parameter", "requires_grad": tensor.requires_grad}
        else:
            out[name] = {"kind": "buffer", "persistent": leaf not in small.get_submodule(owner)._non_persistent_buffers_set}
        same = first.setdefault(id(tensor), name)
        if same != name:
            out[name]["same_as"] = same
    return out


def _node_to_json(node: fx.Node) -> dict:
    return {
        "op": node.op,
        "name": node.name,
        "target": _function_name(node) if node.op == "call_function" else node.target,
        "args": [_encode(arg) for arg in node.args],
        "kwargs": {key: _encode(value) for key, value in node.kwargs.items() if not (key == "memory_format" and _is_filled(node))},
    }


def _is_filled(node: fx.Node) -> bool:
    """Whether a node makes memory that nobody wrote to; zeros, which stand for it in a file, take no memory format."""
    return isinstance(node.target, torch._ops.OpOverload) and str(node.target).removeprefix("aten.") in FILLED


def network_from_json(data: dict, state_dict: dict[str, torch.Tensor], trust: bool = False) -> fx.GraphModule:
    """The inverse of `network_to_json`, in eval mode.

    Args:
        data: what `network_to_json` returned, possibly by way of a file that nobody vouches for.
        state_dict: a tensor for each name that `tensors_of` gives. The network uses these very tensors, without a copy.
        trust: take operators that are on no list, as of a library that the caller imported.

    Raises:
        UserError: the data are damaged or name what is on no list, or the tensors do not belong to them.
    """
    data = check(Network, data, f"{PLAN} does not describe a network")
    try:
        root = nn.Module()
        for path, entry in data["modules"].items():
            _set(root, path, _module_from_json(entry))
        _set_tensors(root, data["tensors"], state_dict)
        graph, nodes = fx.Graph(), {}
        for entry in data["nodes"]:
            nodes[entry["name"]] = _node_from_json(graph, entry, nodes, data, trust)
        graph.lint()
        network = fx.GraphModule(root, graph, _identifier(data["class"]))
        _set_tensors(network, data["tensors"], state_dict)  # again: older torch makes the root's buffers persistent
        network.meta.update(input_size=[int(n) for n in data["meta"]["input_size"]], static_batch=data["meta"]["static_batch"])
    except UserError:
        raise
    except Exception as error:  # damaged data make torch raise whatever it likes
        raise UserError(f"{PLAN} does not describe a network: {why(error)}; it may be damaged or from another version") from error
    missing = [name for name, tensor in tensors_of(network).items() if tensor.is_meta]
    if missing:
        raise UserError(f"{PLAN} lists no tensor for {missing[0]}; it may be damaged")
    return network.eval()


def _module_from_json(entry: dict) -> nn.Module:
    cls = _layer_class(entry["class"])
    with torch.device("meta"):
        return cls(**{key: _decode(entry[key], {}) for key in LAYERS[entry["class"]]})


def _set(root: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    if path.count(".") >= DEEPEST:
        raise ValueError(f"the layer {shown(path)} is in more than {DEEPEST} others")
    root.get_submodule(owner).add_module(_part(leaf), module)


def _set_tensors(root: nn.Module, entries: dict, state_dict: dict[str, torch.Tensor]) -> None:
    """Puts the given tensors in place of the meta tensors, and next to them those that the graph reads itself."""
    for name in sorted(entries.keys() ^ state_dict.keys()):
        there, gone = (PLAN, WEIGHTS) if name in entries else (WEIGHTS, PLAN)
        raise UserError(f"{WEIGHTS} does not match {PLAN}: {name} is in {there} but not in {gone}")
    made: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        path, _, leaf = name.rpartition(".")
        owner = root.get_submodule(path)
        tensor = state_dict[name]
        expected = getattr(owner, leaf, None)
        if expected is None and hasattr(owner, leaf):
            raise ValueError(f"{name} is a tensor that its layer does not have")
        _check_values(name, tensor, entry["kind"], expected)
        expected = tensor if expected is None else expected
        if expected.shape != tensor.shape:
            raise UserError(f"{WEIGHTS} does not match {PLAN}: {name} has shape {tuple(tensor.shape)}, not {tuple(expected.shape)}")
        if "same_as" in entry:
            made[name] = made[entry["same_as"]]
        else:
            made[name] = nn.Parameter(tensor, entry["requires_grad"]) if entry["kind"] == "parameter" else tensor
        if entry["kind"] == "parameter":
            owner.register_parameter(_part(leaf), made[name])
        else:
            owner.register_buffer(_part(leaf), made[name], persistent=entry["persistent"])


def _check_values(name: str, tensor: torch.Tensor, kind: str, expected: torch.Tensor | None) -> None:
    """Raises UserError for a tensor of another type than its layer has, or with values that no network has. Infinity is left to masks."""
    types = (expected.dtype,) if expected is not None else (torch.float32, torch.complex64) if kind == "parameter" else TENSOR_TYPES
    if tensor.dtype not in types:
        raise UserError(f"{WEIGHTS}: {name} is of {tensor.dtype}, not of {' or '.join(map(str, types))}; it may be damaged, or was converted: export with "
                        "--fp16 or --int8 instead")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    if tensor.isnan().any() or (kind == "parameter" or expected is not None) and not tensor.isfinite().all():
        raise UserError(f"{WEIGHTS}: {name} holds values that are not finite; it is damaged, or its training went wrong")


def _node_from_json(graph: fx.Graph, entry: dict, nodes: dict[str, fx.Node], data: dict, trust: bool) -> fx.Node:
    op, target = entry["op"], entry["target"]
    if op == "call_function":
        target = _function(target, trust)
    elif op == "call_method":
        if target not in METHODS:
            raise UserError(f"{PLAN} names the tensor method {target!r}, which s2h does not know; it may be damaged")
    elif op in ("call_module", "get_attr"):
        if target not in data["modules" if op == "call_module" else "tensors"]:
            raise ValueError(f"{target!r} is no layer or tensor of the network")
    elif op in ("placeholder", "output"):
        target = _identifier(target)
    else:
        raise ValueError(f"node of kind {op!r}")
    args = tuple(_decode(arg, nodes) for arg in entry["args"])
    filled = entry["target"] in {_ATEN + name for name in FILLED}  # of an older version
    kwargs = {_identifier(key): _decode(value, nodes) for key, value in entry["kwargs"].items() if not (filled and key == "memory_format")}
    return graph.create_node(op, target, args, kwargs, _identifier(entry["name"]))


def _part(text: str) -> str:
    if not _PART.fullmatch(text):
        raise ValueError(f"{text!r} is no part of a layer's name")
    return text


def _identifier(text: str) -> str:
    if not text.isidentifier():
        raise ValueError(f"{text!r} is no name")
    return text
