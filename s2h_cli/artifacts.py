"""Artifacts: the small network on disk, and back.

A run folder holds `model.safetensors` (parameters and buffers) and `plan.json`, whose key `network` is the graph as data: from
these two files alone `load` puts the network together again, without timm, without the user's model file and without pickle.
What the file may name is on lists here and in `graph.FUNCTIONS`; anything else is refused.

`EXPORTS` is the table of the other formats: how each is written and how it is run. `verify` runs what was written.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
import math
import os
import re
import warnings
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import fx, nn

from . import __version__
from .errors import UserError, why
from .files import writing
from .graph import FUNCTIONS, resolve, tensors_of

WEIGHTS, PLAN = "model.safetensors", "plan.json"
#: Where the metadata lie: an extra file of TorchScript and pt2, a property of ONNX.
METADATA = "s2h.json"
#: The largest difference from the network that `verify` lets pass, relative to the largest logit.
TOLERANCE = 1e-4
#: The same where it computes in float16, whose last place is 1e-3 of a number.
HALF_TOLERANCE = 3e-2

Run = Callable[[torch.Tensor], torch.Tensor]

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
#: One part of a dotted name. `torch.fx` writes these into source code.
_PART = re.compile(r"[\w \-+:/@()\[\]]+")


def _layer_class(name: str) -> type[nn.Module]:
    if name not in LAYERS:
        raise UserError(f"{PLAN} names the layer {name!r}, which s2h does not know; it may be damaged or from another version")
    if name == "StochasticDepth":
        from torchvision.ops import StochasticDepth

        return StochasticDepth
    return getattr(nn, name)


def _function(name: str) -> Callable:
    """The function behind a name in a file: one of `CALLABLES`, or `torch.ops.<namespace>.<operator>.<overload>`."""
    if name in CALLABLES:
        return CALLABLES[name]
    found: Any = None
    if re.fullmatch(r"torch\.ops\.\w+\.\w+\.\w+", name):
        found = torch.ops
        for part in name.split(".")[2:]:
            found = getattr(found, part, None)
    if not isinstance(found, torch._ops.OpOverload) or _touches_files(found):
        raise UserError(f"{PLAN} names the function {name!r}, which s2h does not know; it may be damaged or from another version, "
                        "or need an operator library that is not imported")
    return found


def _touches_files(op: torch._ops.OpOverload) -> bool:
    """Whether an operator reads or writes something outside memory; such operators take its name."""
    return any(argument.name.endswith(("name", "path", "file")) for argument in op._schema.arguments)


def _function_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, operator_name = node.target._schema.name.split("::")
        return f"torch.ops.{namespace}.{operator_name}.{node.target._overloadname}"
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
        return value
    ((kind, content),) = value.items()
    return _KINDS[kind](content, nodes)


def _torch_constant(name: str, nodes: dict[str, fx.Node]) -> Any:
    constant = getattr(torch, name)
    if not isinstance(constant, (torch.dtype, torch.layout, torch.memory_format)):
        raise ValueError(f"torch.{name} is no dtype, layout or memory format")
    return constant


_KINDS: dict[str, Callable[[Any, dict[str, fx.Node]], Any]] = {
    "float": lambda content, nodes: float(content),
    "node": lambda content, nodes: nodes[content],
    "tuple": lambda content, nodes: tuple(_decode(content, nodes)),
    "slice": lambda content, nodes: slice(*_decode(content, nodes)),
    "torch": _torch_constant,
    "device": lambda content, nodes: torch.device(content),
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
        "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
    }


def network_from_json(data: dict, state_dict: dict[str, torch.Tensor]) -> fx.GraphModule:
    """The inverse of `network_to_json`, in eval mode.

    Args:
        data: what `network_to_json` returned, possibly by way of a file that nobody vouches for.
        state_dict: a tensor for each name that `tensors_of` gives. The network uses these very tensors, without a copy.

    Raises:
        UserError: the data are damaged or name what is on no list, or the tensors do not belong to them.
    """
    try:
        root = nn.Module()
        for path, entry in data["modules"].items():
            _set(root, path, _module_from_json(entry))
        _set_tensors(root, data["tensors"], state_dict)
        graph, nodes = fx.Graph(), {}
        for entry in data["nodes"]:
            nodes[entry["name"]] = _node_from_json(graph, entry, nodes, data)
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
        expected = getattr(owner, leaf, tensor)
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


def _node_from_json(graph: fx.Graph, entry: dict, nodes: dict[str, fx.Node], data: dict) -> fx.Node:
    op, target = entry["op"], entry["target"]
    if op == "call_function":
        target = _function(target)
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
    kwargs = {_identifier(key): _decode(value, nodes) for key, value in entry["kwargs"].items()}
    return graph.create_node(op, target, args, kwargs, _identifier(entry["name"]))


def _part(text: str) -> str:
    if not _PART.fullmatch(text):
        raise ValueError(f"{text!r} is no part of a layer's name")
    return text


def _identifier(text: str) -> str:
    if not text.isidentifier():
        raise ValueError(f"{text!r} is no name")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def save(folder: str | os.PathLike, small: fx.GraphModule, plan_json: dict) -> None:
    """Writes `model.safetensors` and `plan.json` (with the keys `network` and `versions` added) into a folder.

    Raises:
        UserError: the network contains something that the data cannot hold.
    """
    plan = {**plan_json, "network": network_to_json(small), "versions": _versions()}
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors_of(small).items()}
    with writing(Path(folder)) as aside:
        (aside / PLAN).write_text(json.dumps(plan, indent=1, allow_nan=False))
        (aside / WEIGHTS).write_bytes(save_bytes(weights, {"format": "pt"}))


def record(folder: Path, results: dict[str, Any]) -> None:
    """Adds what was measured of a result to its `plan.json`, under `results`: of its `files` each by its name, the rest by its key."""
    plan = read_plan(folder)
    known = plan.setdefault("results", {})
    files = known.get("files", {}) | results.get("files", {})
    known.update(results)
    known["files"] = files
    with writing(folder) as aside:
        (aside / PLAN).write_text(json.dumps(plan, indent=1, allow_nan=False))


def _versions() -> dict[str, str | None]:
    try:
        timm = importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        timm = None
    return {"s2h": __version__, "torch": str(torch.__version__), "timm": timm}


def read_plan(path: str | os.PathLike) -> dict[str, Any]:
    """What `plan.json` of a run folder holds.

    Raises:
        UserError: the folder or the file is missing or broken.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a finished run")
    parts = sorted(str(file.parent) for file in folder.glob(f"f*/{PLAN}"))  # of a run with several budgets
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} in it; give " + (f"one of its results: {', '.join(parts)}" if parts else "the folder of a finished run"))
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / PLAN}: not JSON: {why(error)}") from error
    if not isinstance(plan, dict) or not isinstance(plan.get("network"), dict):
        raise UserError(f"{folder / PLAN}: it holds no network; give the folder of a finished run")
    return plan


def load(path: str | os.PathLike) -> fx.GraphModule:
    """Loads the small network of a run folder, in eval mode. Reads `plan.json` and `model.safetensors`, nothing else.

    Args:
        path: the folder.

    Returns:
        A module that takes images (N, C, H, W) and returns logits (N, classes).

    Raises:
        UserError: the folder or a file is missing, broken, or the two do not belong together.
    """
    folder, plan = Path(path), read_plan(path)
    try:
        # Copies: memory mapped from a file is aligned differently, and then kernels round differently.
        state_dict = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read: {why(error)}") from error
    try:
        return network_from_json(plan["network"], state_dict)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Formats: how each is written, and how it is run


class Program:
    """A network on the CPU, its computed weights folded, and, once it is asked for, its `torch.export` program: both ONNX and pt2
    are written from that.

    Args:
        small: the network, on any device; it stays as it is.
        batch: images that it takes at a time; None where any number will do.
        half: weights and arithmetic in float16; images and logits stay float32.
        opset: of ONNX; None for the exporter's own.
    """

    def __init__(self, small: fx.GraphModule, *, batch: int | None = None, half: bool = False, opset: int | None = None):
        self.model, self.opset = _cpu_copy(small), opset
        self.model.meta["static_batch"] = self.model.meta["static_batch"] or batch
        _fold_weights(self.model)
        _unfuse_pads(self.model)
        if half:
            _halve(self.model)
        self.images = _images(self.model, self.model.meta["static_batch"] or 2)

    @cached_property
    def exported(self) -> torch.export.ExportedProgram:
        free = ({0: torch.export.Dim.DYNAMIC},) if self.model.meta["static_batch"] is None else None
        for node in self.model.graph.nodes:
            if node.target is nn.functional.scaled_dot_product_attention:
                node.target = _attention_of_four_axes
        self.model.recompile()
        return torch.export.export(self.model, (self.images,), dynamic_shapes=free, strict=False)


def _fold_weights(model: fx.GraphModule) -> None:
    """Makes constants of the weights and biases that are computed from others (weight standardisation, merged kernels): that is
    faster than to compute them for each batch, and ONNX has no batch norm in training mode that rounds as torch does."""
    operators = {getattr(nn.functional, name) for name in ("conv1d", "conv2d", "conv3d", "linear")}
    values: dict[fx.Node, Any] = {}  # of what does not depend on the images, computed in the graph's order: some change in place
    tensors = tensors_of(model)
    for node in list(model.graph.nodes):
        random = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        if node.op == "get_attr":
            values[node] = tensors[node.target].detach().clone()
        elif node.op == "call_function" and not random and all(source in values for source in node.all_input_nodes):
            with torch.no_grad():
                values[node] = node.target(*fx.node.map_arg(node.args, values.get), **fx.node.map_arg(node.kwargs, values.get))
        elif node.target in operators:
            for operand in [arg for arg in node.args[1:3] if arg in values and arg.op != "get_attr"]:
                name = f"{operand.name}_folded"
                model.register_buffer(name, values[operand].clone())
                with model.graph.inserting_before(node):
                    node.replace_input_with(operand, model.graph.get_attr(name))
    model.graph.eliminate_dead_code()
    model.recompile()


def _halve(model: fx.GraphModule) -> None:
    """Makes the network compute in float16 between images and logits of float32."""
    model.half()
    for node in model.graph.nodes:
        if node.kwargs.get("dtype") == torch.float32:
            node.update_kwarg("dtype", torch.float16)
        if node.op == "placeholder":
            with model.graph.inserting_after(node):
                cast = model.graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": torch.float16})
            node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
        elif node.op == "output":
            with model.graph.inserting_before(node):
                node.replace_input_with(logits := node.args[0], model.graph.call_function(torch.ops.aten._to_copy.default, (logits,), {"dtype": torch.float32}))
    model.recompile()


def _unfuse_pads(model: fx.GraphModule) -> None:
    """Writes a padding that feeds a max pool as a concatenation. ONNX Runtime (1.31, and before) fuses the two, and then pads with
    minus infinity in place of the value asked for."""
    for node in model.graph.nodes:
        if node.target is nn.functional.pad and any(user.target is nn.functional.max_pool2d for user in node.users):
            node.target = _pad_by_concatenation
    model.recompile()


def _pad_by_concatenation(x: torch.Tensor, pads: list[int], mode: str = "constant", value: float | None = None) -> torch.Tensor:
    """`torch.nn.functional.pad`."""
    if mode != "constant" or min(pads) < 0:
        return nn.functional.pad(x, pads, mode, value)
    for i, (before, after) in enumerate(zip(pads[::2], pads[1::2])):
        axis = x.ndim - 1 - i
        edge = torch.full_like(x.narrow(axis, 0, 1), value or 0.0)
        if before or after:
            x = torch.cat([edge] * before + [x] + [edge] * after, axis)
    return x


def _attention_of_four_axes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, *args: Any,
                            **options: Any) -> torch.Tensor:
    """Attention over (batch, heads, tokens, channels), the only form that the ONNX exporter knows: other axes are folded in."""
    if q.ndim in (2, 4) or q.shape[:-2] != k.shape[:-2]:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, *args, **options)
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.shape[-2])
        mask = mask.reshape(-1, *mask.shape[-3:])
    folded = [t.reshape(-1, *t.shape[-3:]) for t in (q, k, v)]
    return nn.functional.scaled_dot_product_attention(*folded, mask, *args, **options).reshape(*q.shape[:-1], v.shape[-1])


def _write_torchscript(program: Program, file: Path, metadata: str) -> None:
    model, images = _cpu_copy(program.model), program.images
    _remember_sizes(model)
    traced = torch.jit.trace(model, images, check_trace=False)
    if model.meta["static_batch"] is None:
        three = _images(model, 3)
        try:
            free = _difference(traced(three), model(three)) <= TOLERANCE
        except RuntimeError:  # its first line says nothing
            free = False
        if not free:
            raise RuntimeError("tracing fixed the batch size")
    torch.jit.save(traced, str(file), _extra_files={METADATA: metadata})


def _remember_sizes(model: fx.GraphModule) -> None:
    """Tracing takes a size that is an argument of a `torch.ops` call for a constant; the plain function of that name does not."""
    sizes: set[fx.Node] = set()
    for node in model.graph.nodes:
        inputs = set(node.all_input_nodes)
        if (node.op, node.target) == ("call_method", "size") or (inputs and inputs <= sizes and node.target in _NAME_OF):
            sizes.add(node)
        elif inputs & sizes and isinstance(node.target, torch._ops.OpOverload):
            name = node.target._opname
            node.target = getattr(torch, name, None) or getattr(torch.Tensor, name, node.target)
    model.recompile()


def _write_onnx(program: Program, file: Path, metadata: str) -> None:
    free = ({0: "batch"},) if program.model.meta["static_batch"] is None else None  # the batch is free already: this names it
    for optimize in (True, False):  # the exporter's own rewriting breaks some networks
        onnx = torch.onnx.export(program.exported, dynamo=True, input_names=["images"], output_names=["logits"], dynamic_shapes=free,
                                 verbose=False, optimize=optimize, opset_version=program.opset)
        written = onnx.model.opset_imports[""]
        if program.opset not in (None, written):
            raise RuntimeError(f"the exporter wrote opset {written}, not {program.opset}")
        onnx.model.metadata_props[METADATA] = metadata
        onnx.save(str(file))  # weights inside, unless they are too much for one file
        try:
            _run_onnx(file)
            return
        except Exception as error:  # onnxruntime raises whatever it likes
            refusal = error
    raise refusal


def _write_pt2(program: Program, file: Path, metadata: str) -> None:
    torch.export.save(program.exported, file, extra_files={METADATA: metadata})


def _run_torchscript(file: Path) -> Run:
    return torch.jit.load(str(file), map_location="cpu").eval()


def onnx_session(file: Path, threads: int = 0, cuda: bool = False) -> Any:
    """An ONNX Runtime session, on a GPU or on so many threads of the CPU (0: on all).

    Raises:
        UserError: a GPU is asked for, and this ONNX Runtime has none.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if cuda and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise UserError("this onnxruntime is for CPUs; install onnxruntime-gpu")
    return onnxruntime.InferenceSession(str(file), options, providers=["CUDAExecutionProvider" if cuda else "CPUExecutionProvider"])


def _run_onnx(file: Path) -> Run:
    session = onnx_session(file)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _run_pt2(file: Path) -> Run:
    """No pickle is loaded, but `torch.export.load` evaluates the sizes' formulas in the file: run only files of known origin."""
    _refuse_pickles(file)
    # `torch.export.load` falls back to unsafe unpickling of the example inputs; torch's own switch forbids it.
    with _environment("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"):
        return torch.export.load(file).module()


def _refuse_pickles(file: Path) -> None:
    """Refuses a pt2 file with weights or constants that `torch.export.load` would unpickle; `export` writes none."""
    with zipfile.ZipFile(file) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
        configs = [json.loads(archive.read(name)) for name in archive.namelist()
                   if re.search(r"/data/(weights|constants)/[^/]*config\.json$", name)]
    payloads = [payload for config in configs for payload in config["config"].values()]
    if (not configs or any(re.fullmatch(r"data/(weights|constants)/[^/]*\.pt", name) for name in names)
            or any(p["use_pickle"] or not p["path_name"].startswith(("weight_", "tensor_")) for p in payloads)):
        raise RuntimeError("it contains pickled data, which could run any code")


class Format(NamedTuple):
    """A format of `EXPORTS`: its file in a run folder; `write(program, file, metadata)`; `run(file)`."""

    file: str
    write: Callable[[Program, Path, str], None]
    run: Callable[[Path], Run]


EXPORTS: dict[str, Format] = {
    "torchscript": Format("model.ts", _write_torchscript, _run_torchscript),
    "onnx": Format("model.onnx", _write_onnx, _run_onnx),
    "pt2": Format("model.pt2", _write_pt2, _run_pt2),
}


def export(small: fx.GraphModule | Program, path: str | os.PathLike, format: str, metadata: dict | None = None) -> Path:
    """Writes the network in another format. The batch is free unless the network's is fixed; the network stays as it is.

    Args:
        small: the network, on any device, or its `Program`, which several formats can share.
        path: the file, or a folder, where the file gets the name that `EXPORTS` gives it.
        format: a key of `EXPORTS`.
        metadata: JSON data that `read_metadata` finds in the file again, e.g. class names, mean, std.

    Returns:
        The file.

    Raises:
        UserError: the format is unknown, or its exporter fails.
    """
    name, file = file_of(format), Path(path)
    chosen = EXPORTS[format]
    if file.is_dir() or not file.suffix:
        file = file / name
    program = small if isinstance(small, Program) else Program(small)
    with writing(file.parent) as aside:
        try:
            with quiet(), torch.no_grad():
                chosen.write(program, aside / file.name, json.dumps(metadata or {}))
        except Exception as error:  # exporters raise whatever they like; what they wrap says more
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise UserError(f"export to {format} failed: {why(cause)}") from error
    return file


def file_of(format: str, kind: str = "") -> str:
    """The name of a format's file: `model.onnx`, or of a kind `model-int8.onnx`.

    Raises:
        UserError: the format is unknown.
    """
    if format not in EXPORTS:
        raise UserError(f"unknown format {format!r}; choose from {', '.join(EXPORTS)}")
    stem, ending = EXPORTS[format].file.split(".")
    return f"{stem}-{kind}.{ending}" if kind else f"{stem}.{ending}"


def format_of(path: str | os.PathLike) -> str | None:
    """The key of `EXPORTS` that a file's name says it is, if any."""
    return next((name for name, f in EXPORTS.items() if Path(f.file).suffix == Path(path).suffix.lower()), None)


def load_artifact(path: str | os.PathLike) -> Run:
    """What runs a run folder or an exported file; a module, but for ONNX.

    Raises:
        UserError: there is no such file, its ending is unknown, or it cannot be loaded.
    """
    path = Path(path)
    if path.is_dir():
        return load(path)
    format = format_of(path)
    if format is None:
        endings = ", ".join(Path(f.file).suffix for f in EXPORTS.values())
        raise UserError(f"{path}: not an artifact; give a run folder or a file that ends in {endings}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with quiet():
            return EXPORTS[format].run(path)
    except ImportError as error:
        raise UserError(f"{path}: running it needs the package {error.name}; install it with pip") from error
    except Exception as error:  # loaders raise whatever they like
        raise UserError(f"{path}: cannot be loaded: {why(error)}") from error


def run_artifact(path: str | os.PathLike) -> Run:
    """A function from images (N, C, H, W), float32 on the CPU, to logits (N, classes), for a run folder or an exported file.

    Raises:
        UserError: as of `load_artifact`.
    """
    run = load_artifact(path)
    return torch.no_grad()(lambda images: run(images))


def read_metadata(path: str | os.PathLike) -> dict:
    """The metadata given to `export`; empty for a file of other origin.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".onnx":
            import onnx

            properties = onnx.load(str(path), load_external_data=False).metadata_props
            text = next((p.value for p in properties if p.key == METADATA), "{}")
        else:
            with zipfile.ZipFile(path) as archive:
                name = next((n for n in archive.namelist() if n.endswith(f"/extra/{METADATA}")), None)
                text = archive.read(name).decode() if name else "{}"
        return json.loads(text)
    except Exception as error:  # a broken file makes the readers raise whatever they like
        raise UserError(f"{path}: cannot be read: {why(error)}") from error


def verify(small: fx.GraphModule, folder: str | os.PathLike, input_size: tuple[int, int, int]) -> dict[str, float]:
    """Loads each artifact of a run folder back and compares its logits with the network's on random images.

    Args:
        small: the network, on any device; it stays as it is.
        folder: the run folder.
        input_size: (C, H, W) of the images.

    Returns:
        For each artifact's file name, the largest difference relative to the largest absolute logit, over batches of 1 and 5
        (or of the fixed size).

    Raises:
        UserError: an artifact cannot be loaded or run, or differs by more than `TOLERANCE`.
    """
    folder = Path(folder)
    paths = {WEIGHTS: folder, **{f.file: folder / f.file for f in EXPORTS.values()}}
    return check(small, {name: path for name, path in paths.items() if (folder / name).exists()}, input_size)


def check(small: fx.GraphModule, paths: dict[str, Path], input_size: tuple[int, int, int], *, batch: int | None = None,
          tolerance: float = TOLERANCE) -> dict[str, float]:
    """Loads artifacts and compares them: see `verify`.

    Args:
        paths: run folders or exported files, by name.
        batch: images that they take at a time, where that is fixed.
    """
    model = _cpu_copy(small)
    only = batch or model.meta["static_batch"]
    images = [_images(model, n, input_size) for n in ([only] if only else [1, 5])]
    with torch.no_grad():
        expected = [model(x) for x in images]
    differences = {}
    for name, path in paths.items():
        run, file = run_artifact(path), path / WEIGHTS if path.is_dir() else path
        try:
            differences[name] = max(_difference(run(x), logits) for x, logits in zip(images, expected))
        except Exception as error:  # runtimes raise whatever they like
            raise UserError(f"{file}: fails on random images: {why(error)}") from error
        if not differences[name] <= tolerance:
            raise UserError(f"{file}: its logits differ from the network's by {differences[name]:.1e} of the largest; at most {tolerance:.0e} is right")
    return differences


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers


def _cpu_copy(network: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(network).cpu().eval()


def _images(network: fx.GraphModule, n: int, input_size: tuple[int, int, int] | None = None) -> torch.Tensor:
    """Random images (n, C, H, W), the same at every call."""
    return torch.randn(n, *(input_size or network.meta["input_size"]), generator=torch.Generator().manual_seed(n))


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest expected logit; infinite for another shape or for NaN in one of the two."""
    if logits.shape != expected.shape or logits.isfinite().ne(expected.isfinite()).any():
        return math.inf
    apart = (logits - expected).abs().nan_to_num(0.0).max()
    return float(apart / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporters' prints, warnings and log lines from the user's terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
