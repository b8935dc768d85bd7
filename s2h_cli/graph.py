"""Capture: an `nn.Module` becomes one canonical `torch.fx.GraphModule`.

The canonical graph is the only forward definition in the program. `torch.export` gives ATen operators; here they are put
back into ordinary PyTorch: layers that own parameters are `torch.nn` modules at their original dotted names, the rest are
plain functions. The same graph, given full, gated or sliced parameters, is soft network, hard network and result.

Every call node keeps these facts in `node.meta`, from which labels and cost are read:

* `op`: the ATen operator's name without overload and without the in-place underscore, e.g. `"conv2d"`;
* `args`: its ATen arguments in schema order, defaults filled in, tensors as `Ref` (a node) or `Param` (a parameter or buffer);
* `names`: the names of these arguments in the schema;
* `pointwise`: whether PyTorch says of the operator that it works on each element apart;
* `layer`: the layer's name for tables, e.g. `"layer1.0.conv1"`;
* `shape`: the output's shape (a list of shapes for several outputs) at the batch size `network.meta["batch"]`, which stands for
  the free batch: a prime that divides no other size of the network. (`network.meta["static_batch"]` is None, or the one batch
  size that the network takes.)
"""

from __future__ import annotations

import itertools
import math
import operator
import sys
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch
from torch import fx, nn

from .errors import UserError, why
from .faithful import Check
from .free_batch import fixed_at, symbolic_int
from .training_only import Drop, drops_of, forget, marked


@dataclass(frozen=True)
class Ref:
    """A tensor argument that another node computes."""

    name: str


@dataclass(frozen=True)
class Param:
    """A tensor argument that is a parameter or buffer of the model."""

    name: str


class Captured(NamedTuple):
    """What `capture` returns: the canonical network and what a user should know about it."""

    network: fx.GraphModule
    notes: list[str]
    static_batch: int | None


@contextmanager
def _custom_gradients() -> Iterator[set[str]]:
    """Names of the user's own `torch.autograd.Function`s that are called meanwhile."""
    found: set[str] = set()
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            found.add(cls.__name__)
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield found
    finally:
        torch.autograd.Function.apply = original


# ---------------------------------------------------------------------------------------------------------------------
# ATen operators whose parameters belong to one torch.nn layer: how to build the layer from the ATen arguments.


def _conv(cls: type, a: list, weight: torch.Tensor) -> nn.Module:
    _, _, bias, stride, padding, dilation, groups = a
    with torch.device("meta"):
        return cls(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), _tuple(stride), _tuple(padding),
                   _tuple(dilation), groups, bias is not None)


def _linear(a: list, weight: torch.Tensor) -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(weight.shape[1], weight.shape[0], a[2] is not None)


def _batch_norm(a: list, ndim: int) -> nn.Module:
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[ndim]
    with torch.device("meta"):
        return cls(a[3].meta["val"].shape[0], eps=a[7], momentum=a[6], affine=a[1] is not None)


def _layer_norm(a: list) -> nn.Module:
    with torch.device("meta"):
        return nn.LayerNorm(tuple(a[1]), eps=a[4], bias=a[3] is not None)


def _group_norm(a: list, weight: torch.Tensor) -> nn.Module:
    with torch.device("meta"):
        return nn.GroupNorm(a[1], weight.shape[0], eps=a[4])


class Layer(NamedTuple):
    """A `torch.nn` layer behind an ATen operator: its tensors (attribute, argument position) and its constructor."""

    tensors: dict[str, int]
    build: Callable[[list, torch.Tensor, int], nn.Module]


_WEIGHT_BIAS = {"weight": 1, "bias": 2}
LAYERS: dict[str, Layer] = {
    "conv1d": Layer(_WEIGHT_BIAS, lambda a, w, n: _conv(nn.Conv1d, a, w)),
    "conv2d": Layer(_WEIGHT_BIAS, lambda a, w, n: _conv(nn.Conv2d, a, w)),
    "conv3d": Layer(_WEIGHT_BIAS, lambda a, w, n: _conv(nn.Conv3d, a, w)),
    "linear": Layer(_WEIGHT_BIAS, lambda a, w, n: _linear(a, w)),
    "batch_norm": Layer({"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}, lambda a, w, n: _batch_norm(a, n)),
    "layer_norm": Layer({"weight": 2, "bias": 3}, lambda a, w, n: _layer_norm(a)),
    "group_norm": Layer({"weight": 2, "bias": 3}, lambda a, w, n: _group_norm(a, w)),
}

#: ATen operators written as a plain PyTorch function of the same arguments. Those not listed stay ATen calls.
FUNCTIONS: dict[str, str] = {
    **{op: f"torch.nn.functional.{op}" for op in (
        "conv1d", "conv2d", "conv3d", "linear", "relu", "relu6", "hardtanh",
        "hardswish", "hardsigmoid", "silu", "mish", "gelu", "leaky_relu", "softplus", "max_pool2d", "avg_pool2d",
        "adaptive_avg_pool2d", "pad", "rms_norm", "scaled_dot_product_attention")},
    **{op: f"torch.{op}" for op in (
        "cat", "permute", "transpose", "matmul", "bmm", "roll", "select", "unbind", "sigmoid", "tanh", "mean", "softmax",
        "split", "reshape", "einsum")},
    "add": "operator.add", "sub": "operator.sub", "mul": "operator.mul", "div": "operator.truediv",
}

#: ATen operators that only give a tensor another shape: written as one `torch.reshape`.
RESHAPES = ("view", "reshape", "_unsafe_view", "unflatten", "flatten", "squeeze", "unsqueeze", "reshape_as", "view_as")
#: Operators that cut one axis into pieces: written as one `torch.split`.
SPLITS = ("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
#: Operators that make a tensor of one value, or of random ones, by the position of the argument that holds its size.
FILLED = {"empty": 0, "full": 0, "ones": 0, "rand": 0, "randn": 0, "zeros": 0, "new_empty": 1, "new_full": 1, "new_ones": 1, "new_zeros": 1}
#: Recurrent layers; they take the same arguments.
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
#: Nodes that only check shapes at run time; they go.
_ASSERTIONS = ("_assert", "sym_constrain")


def capture(model: nn.Module, input_size: tuple[int, int, int]) -> Captured:
    """Captures an image classifier as a canonical graph.

    Args:
        model: takes a float tensor (N, C, H, W), returns logits (N, classes). It is put into eval mode.
        input_size: (C, H, W) in channels and pixels.

    Raises:
        UserError: `torch.export` cannot capture the model, it does not map one tensor to one tensor, or the graph computes something
            else than the model.
    """
    model.eval()
    scripted = next((name or "the model" for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)), None)
    if scripted:
        raise UserError(f"the model cannot be captured: {scripted} is TorchScript; build it from plain torch.nn modules")
    try:
        drops = drops_of(model, torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0)))
    except Exception as error:  # the model's own code
        raise UserError(f"the model fails on one image of {'x'.join(map(str, input_size))} ({why(error)}); mend its forward") from error
    with _custom_gradients() as custom:
        exported, static_batch, fixed_by = _export(model, input_size, drops)
    _inline_regions(exported.graph_module)
    _share_tied(exported, model)
    notes = []
    if static_batch:
        notes.append(f"its graph takes batches of {static_batch} only: its forward fixes the batch size{fixed_by}")
    batch = static_batch or _stand_in(exported)
    check = Check(model, input_size, drops)
    canonical = _Canonical(exported, model, batch, check.trained.norms)
    network = canonical.build()
    notes += canonical.notes
    if custom:
        notes.append(f"captured by their forward, whose gradient replaces the backward they define: {', '.join(sorted(custom))}")
    if dropped := _without_use(model, network):
        notes.append(f"not used in evaluation, left out: {', '.join(dropped)}")
    check.evaluation(network, static_batch)
    if not static_batch:
        notes += check.training(network)
    network.meta.update(input_size=list(input_size), batch=batch, static_batch=static_batch)
    _keep_hints(model, network)
    return Captured(network, notes, static_batch)


def _without_use(model: nn.Module, network: fx.GraphModule) -> list[str]:
    """What of a model its graph lacks, by dotted name: parameters, or a module none of whose parameters are used."""
    used = {id(parameter) for parameter in network.parameters()}
    names = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name, parameter in names.items() if id(parameter) not in used]
    kept = {path for name in names.keys() - missing for path in _ancestors(name)}
    return list(dict.fromkeys(next((path for path in _ancestors(name) if path not in kept), name) for name in missing))


def _ancestors(name: str) -> list[str]:
    """The modules around a parameter, the outermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:i + 1]) for i in range(len(parts))]


def _keep_hints(model: nn.Module, network: fx.GraphModule) -> None:
    """What timm's optimizer factory asks a model: which weights do not decay, and the order of its layers."""
    if hasattr(model, "no_weight_decay"):
        whole = set(model.no_weight_decay())
        network.no_weight_decay = lambda: whole
    if hasattr(model, "group_matcher"):
        matcher = model.group_matcher(coarse=False)
        network.group_matcher = lambda coarse: matcher


class _Exported(NamedTuple):
    """An exported program, the batch size where it could not stay free, and the line of the model that fixes it."""

    program: torch.export.ExportedProgram
    static_batch: int | None
    fixed_by: str


def _export(model: nn.Module, input_size: tuple[int, int, int], drops: dict[str, Drop]) -> _Exported:
    """Exports with a free batch; where the model's code fixes it, with symbols for its `int`; else with a fixed batch."""
    fixed_by = ""
    for batch, symbolic in ((2, nullcontext()), (2, symbolic_int(model)), (1, nullcontext())):
        shapes = ({0: torch.export.Dim.DYNAMIC},) if batch > 1 else None
        forget(model)
        try:
            with marked(model, drops), fixed_at(_culprit) as lines, symbolic, torch.enable_grad():  # no_grad leaves its trace
                program = torch.export.export(model, (torch.zeros(batch, *input_size),), strict=False, dynamic_shapes=shapes)
            return _Exported(program, None if shapes else batch, fixed_by)
        except Exception as error:  # torch.export raises whatever the model's own code raises
            last = error
            fixed_by = next(filter(None, lines), fixed_by)
        finally:
            forget(model)
    raise UserError(f"the model cannot be captured at input {'x'.join(map(str, input_size))}"
                    f"{_culprit(traceback.extract_tb(last.__traceback__))}: {type(last).__name__}: "
                    f"{' '.join(str(last).split())[:160]}; docs/any-model.md says how to go on")


def _stand_in(exported: torch.export.ExportedProgram) -> int:
    """The smallest prime from 37 that divides no size in the graph: small, since labels of a batch merged into channels repeat."""
    values = [node.meta.get("val") for node in exported.graph.nodes]
    tensors = [t for value in values for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, torch.Tensor)]
    sizes = {size for tensor in tensors for size in tensor.shape if isinstance(size, int)}
    return next(n for n in itertools.count(37) if all(n % i for i in range(2, math.isqrt(n) + 1))
                and not any(size and size % n == 0 for size in sizes))


def _culprit(stack: list[traceback.FrameSummary]) -> str:
    """The last line of the model's own code in a stack."""
    ours = tuple(str(Path(module.__file__).parent) for module in (torch, sys.modules[__package__]))
    frames = [frame for frame in stack if not frame.filename.startswith((*ours, "<"))]
    return f", at {Path(frames[-1].filename).name} line {frames[-1].lineno}, '{frames[-1].line}'" if frames else ""


def _inline_regions(outer: fx.GraphModule) -> None:
    """Regions of disabled autocast and of `no_grad`, which torch.export keeps as submodules, become part of the graph."""
    for node in list(outer.graph.nodes):
        region = _REGIONS.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
        if region is None:
            continue
        autocast, detached, inner, operands = region(node.args)
        if autocast:
            raise UserError(f"the model computes a part in autocast ({_where(node)}); take the autocast out of its forward: "
                            "--amp trains in bfloat16")
        place, inner = inner, outer.get_submodule(inner.target)
        _inline_regions(inner)
        with outer.graph.inserting_before(node):
            results = outer.graph.graph_copy(inner.graph, dict(zip(inner.graph.find_nodes(op="placeholder"), operands)))
        for user in list(node.users):  # each picks one of the results
            if detached:
                user.target, user.args = torch.ops.aten.detach.default, (results[user.args[1]],)
            else:
                user.replace_all_uses_with(results[user.args[1]])
                outer.graph.erase_node(user)
        outer.graph.erase_node(node)
        outer.graph.erase_node(place)


#: Higher-order operators of torch.export: whether autocast is on in the region, whether gradients are off, its submodule, its
#: operands.
_REGIONS: dict[str, Callable[[tuple], tuple[bool, bool, fx.Node, tuple]]] = {
    "wrap_with_autocast": lambda args: (args[2], False, args[4], args[5:]),
    "wrap_with_set_grad_enabled": lambda args: (False, not args[0], args[1], args[2:]),
}


def _share_tied(exported: torch.export.ExportedProgram, model: nn.Module) -> None:
    """A parameter of two names enters the graph once, under the first."""
    state = tensors_of(model)
    named = {**exported.graph_signature.inputs_to_parameters, **exported.graph_signature.inputs_to_buffers}
    first: dict[int, fx.Node] = {}
    for node in exported.graph.find_nodes(op="placeholder"):
        if node.name in named:
            same = first.setdefault(id(state[named[node.name]]), node)
            if same is not node:
                node.replace_all_uses_with(same)


class _Canonical:
    """Rewrites one exported program as a GraphModule of torch.nn layers and plain functions."""

    def __init__(self, exported: torch.export.ExportedProgram, model: nn.Module, batch: int, norms: dict[str, set[bool]]):
        self.batch = batch
        self.norms = norms  # which batch norms took the statistics of the batch, in training mode, by their `running_mean`
        self.exported = exported
        self.model = model
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.tensors = {**tensors_of(model), **exported.constants}
        self.new: dict[fx.Node, fx.Node] = {}  # exported node -> canonical node
        self.params: dict[fx.Node, str] = {}  # exported placeholder -> dotted name
        self.shared: dict[str, str] = {}  # paths of batch norms, by their `running_mean`: one may run several times
        self.notes: list[str] = []

    def build(self) -> fx.GraphModule:
        signature = self.exported.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        _drop_assertions(self.exported.graph)
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                if node.name in named:
                    self.params[node] = named[node.name]
                else:
                    self.symbols = _symbols(node.meta["val"])
                    self.new[node] = self.graph.placeholder(node.name)
                    self.new[node].meta["shape"] = self._shape(node)
            elif node.op == "output":
                (outputs,) = node.args
                if len(outputs) != 1 or not isinstance(outputs[0], fx.Node):
                    raise UserError(f"the model returns {len(outputs)} outputs; wrap it so that it returns the logits alone")
                self.graph.output(self._value(outputs[0]))
            elif node.op == "call_function":
                if isinstance(node.target, torch._ops.HigherOrderOperator):
                    raise UserError(f"the model cannot be captured: it contains the construct '{node.target}' ({_where(node)}); "
                                    "docs/any-model.md says how to go on")
                self.new[node] = self._call(node)
        network = fx.GraphModule(self.root, self.graph, type(self.model).__name__)
        network.graph.eliminate_dead_code()
        network.delete_all_unused_submodules()
        network.recompile()
        return network.eval()

    # -- values ---------------------------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> fx.Node:
        """The canonical node of an exported one; parameters become `get_attr`."""
        if node not in self.new:
            name = self.params[node]
            self._register(name)
            self.new[node] = self.graph.get_attr(name)
            self.new[node].name = node.name  # exported names are unique, those that fx would choose might meet them
            self.new[node].meta.update(op="get_attr", args=(Param(name),), shape=self._shape(node))
        return self.new[node]

    def _register(self, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        owner = _container(self.root, path)
        tensor = self.tensors[name]
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)

    def _call(self, node: fx.Node) -> fx.Node:
        op, args = aten_call(node)
        # Where a node becomes nothing (a dropout of probability 0, a slice of everything) its input stands for it.
        if _is_identity(op, args, node):
            return self._value(args[0])
        new = self._layer(node, op, args) or self._function(node, op, args)
        new.meta.update(op=op, shape=self._shape(node), layer=self._layer_name(node, args), pointwise=_is_pointwise(node), names=_argument_names(node),
                        args=fx.node.map_aggregate(tuple(args), self._reference))
        new.name = node.name
        if _mutates(node) and not _mutates(new):
            # The model changed its input in place; here a new value takes its place for every later reader.
            before = self._value(args[0])
            self.new.update({old: new for old, current in self.new.items() if current is before})
        return new

    def _shape(self, node: fx.Node) -> Any:
        """Shape of a node's output; a list of shapes for several outputs; None for no tensor."""
        value = node.meta.get("val")
        return [self._sizes(v, node) for v in value] if isinstance(value, (list, tuple)) else self._sizes(value, node)

    def _sizes(self, value: Any, node: fx.Node) -> tuple[int, ...] | None:
        if not isinstance(value, torch.Tensor):
            return None
        symbols = _symbols(value)
        if symbols - self.symbols:
            raise UserError(f"the model cannot be captured: the shape of {node.name} ({_where(node)}) depends on what is in the image; "
                            "docs/any-model.md says how to go on")
        return tuple(self._size(s, self.batch) for s in value.shape)

    def _size(self, size: int | torch.SymInt, batch: int) -> int:
        return size if isinstance(size, int) else int(size.node.expr.subs({symbol: batch for symbol in self.symbols}))

    def _is_free(self, size: int | torch.SymInt) -> bool:
        """Whether a size follows the batch; an expression of it, such as `n * 16 // n`, need not."""
        return self._size(size, self.batch) != self._size(size, 2 * self.batch)

    def _reference(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        return Param(self.params[value]) if value in self.params else Ref(self._value(value).name)

    def _layer_name(self, node: fx.Node, args: list) -> str:
        """What to call the node in tables: its weight's owner, or the module whose forward made it."""
        for arg in args:
            if isinstance(arg, fx.Node) and arg in self.params:
                return self.params[arg].removesuffix(".weight")
        stack = node.meta.get("nn_module_stack")
        return stack and next(reversed(stack.values()))[0] or node.name

    # -- layers and functions -------------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, op: str, args: list) -> fx.Node | None:
        """The node as a torch.nn module at its original name, if its tensors belong to it alone."""
        if op in ("dropout", "feature_dropout", "drop_path"):
            path = next(reversed(node.meta["nn_module_stack"].values()))[0] if node.meta.get("nn_module_stack") else ""
            return self._module(path or node.name, _dropout(op, args), node, args[0])
        layer = LAYERS.get(op)
        if op == "batch_norm":
            return self._batch_norm(node, args)
        if layer is None or not isinstance(args[layer.tensors["weight"]], fx.Node):
            return None
        weight = args[layer.tensors["weight"]]
        path = self.params.get(weight, "").rpartition(".")[0]
        for attribute, position in layer.tensors.items():
            tensor = args[position]
            if tensor is None:
                continue
            if self.params.get(tensor) != f"{path}.{attribute}" or len(tensor.users) > 1:
                return None
        module = layer.build(args, weight.meta["val"], len(node.meta["val"].shape))
        if any(args[position] is None for attribute, position in layer.tensors.items() if getattr(module, attribute) is not None):
            return None  # a norm with a weight but no bias, which torch.nn does not make
        own = {attribute: self.tensors[f"{path}.{attribute}"] for attribute, position in layer.tensors.items() if args[position] is not None}
        if any(attribute in module._parameters and not isinstance(tensor, nn.Parameter) for attribute, tensor in own.items()):
            return None  # a filter that does not train, kept in a buffer called `weight`
        for attribute, tensor in own.items():
            if attribute in module._parameters:
                module.register_parameter(attribute, tensor)
            else:
                module.register_buffer(attribute, tensor)
        return self._module(path, module, node, args[0])

    def _batch_norm(self, node: fx.Node, args: list) -> fx.Node | None:
        """A batch norm as a module, if it normalises by its batch in training and its tensors belong to it alone. It may run several times."""
        tensors = args[1:5]
        mean = self.params.get(args[3])
        if mean is None or args[4] is None or self.norms.get(mean, {True}) != {True}:
            return None
        if (args[1] is None) != (args[2] is None) or any(t not in self.params for t in tensors if t is not None):
            return None
        calls = {user: aten_call(user) for t in tensors if t is not None for user in t.users}
        if any(op != "batch_norm" or other[1:5] != tensors for op, other in calls.values()):
            return None
        owner = mean.rpartition(".")[0]
        path = owner or node.name
        if mean in self.shared:
            return self.graph.create_node("call_module", self.shared[mean], (self._value(args[0]),))
        module = _batch_norm(args, len(node.meta["val"].shape))
        module.momentum = getattr(self.model.get_submodule(owner), "momentum", module.momentum)  # None, a mean over all batches, is 0 in the graph
        own = {attribute: t for attribute, t in zip(LAYERS["batch_norm"].tensors, tensors) if t is not None}
        for attribute, t in own.items():
            tensor = self.tensors[self.params[t]]
            if attribute in module._parameters and not isinstance(tensor, nn.Parameter):  # a buffer, which does not train
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(module, attribute, tensor)
        module.num_batches_tracked = torch.zeros((), dtype=torch.long)
        made = self._module(path, module, node, args[0])
        for attribute, t in own.items():
            if self.params[t] != (name := f"{made.target}.{attribute}"):
                self.notes.append(f"{self.params[t]} is a batch norm's {attribute}, and is called {name} in the result")
                self.params[t] = name
        self.shared[self.params[args[3]]] = made.target
        return made

    def _module(self, path: str, module: nn.Module, node: fx.Node, x: fx.Node) -> fx.Node | None:
        parent, _, leaf = path.rpartition(".")
        owner = _container(self.root, parent)
        present = owner._modules.get(leaf)
        if present is not None:
            if type(present) is not nn.Module:  # another layer lives at this name already
                path = f"{path}_{node.name}"
                owner, leaf = _container(self.root, parent), path.rpartition(".")[2]
            else:  # a container that was made for its children: they move into the layer
                for kind in ("_modules", "_parameters", "_buffers"):
                    getattr(module, kind).update({name: value for name, value in getattr(present, kind).items() if name not in getattr(module, kind)})
        owner.add_module(leaf, module)
        return self.graph.create_node("call_module", path, (self._value(x),))

    def _function(self, node: fx.Node, op: str, args: list) -> fx.Node:
        if op == "batch_norm" and args[3] is not None:
            self.notes.append(f"{self._layer_name(node, args)} is a batch norm that does not follow its batch in training: its statistics stay as they are")
        if op == "sym_size":
            return self.graph.call_method("size", (self._value(args[0]), args[1]))
        if op in RESHAPES:
            return self._reshape(node, op, args)
        if op in SPLITS:
            dim = args[2] if len(args) > 2 else 0
            sizes = [value.shape[dim] for value in node.meta["val"]]
            if not any(map(self._is_free, sizes)):  # else the batch itself is split
                return self.graph.call_function(torch.split, (self._value(args[0]), [self._size(size, self.batch) for size in sizes], dim))
        if op == "expand":
            sizes = [self._value(s) if isinstance(s, fx.Node) else -1 if _kept_by_expand(node, args, i) else s
                     for i, s in enumerate(args[1])]
            return self.graph.call_method("expand", (self._value(args[0]), *sizes))
        if op == "contiguous":
            return self.graph.call_method("contiguous", (self._value(args[0]),))
        target = node.target
        in_place_on_view = _mutates(node) and _has_views(args[0])
        if _is_plain(node, op, args) and not in_place_on_view:
            target = resolve(FUNCTIONS[op])
        kwargs = dict(node.kwargs)
        if op in ("conv1d", "conv2d", "conv3d") and isinstance(args[6], fx.Node):
            return self.graph.call_function(target, (*fx.node.map_arg(tuple(args[:6]), self._value), self._groups(node, args)))
        if op in RECURRENT and not args[5]:
            return self.graph.call_function(target, fx.node.map_arg((*args[:6], True, *args[7:]), self._value))  # cuDNN trains no other
        if op == "scaled_dot_product_attention" and kwargs.get("scale") is None:
            kwargs["scale"] = args[0].meta["val"].shape[-1] ** -0.5  # it stays when the head dimension is cut
        return self.graph.call_function(target, fx.node.map_arg(node.args, self._value), fx.node.map_arg(kwargs, self._value))

    def _groups(self, node: fx.Node, args: list) -> fx.Node:
        """Groups of a convolution that grow with the batch, read off its operands: that holds for any number of channels."""
        sizes = [self.graph.create_node("call_method", "size", (self._value(operand), 1), name=f"{node.name}_{of}")
                 for operand, of in zip(args, ("channels", "in_group"))]
        return self.graph.create_node("call_function", operator.floordiv, tuple(sizes), name=f"{node.name}_groups")

    def _reshape(self, node: fx.Node, op: str, args: list) -> fx.Node:
        """Static sizes as integers, the one that depends on the batch as -1, so that the batch stays free."""
        shape = node.meta["val"].shape
        free = [i for i, size in enumerate(shape) if self._is_free(size)]
        sizes = [-1 if i in free else self._size(size, self.batch) for i, size in enumerate(shape)]
        if len(free) > 1:
            given = args[1] if op in ("view", "reshape", "_unsafe_view") else None
            if given is None:
                return self.graph.call_function(node.target, fx.node.map_arg(node.args, self._value))
            sizes = [self._value(given[i]) if i in free and isinstance(given[i], fx.Node) else s for i, s in enumerate(sizes)]
        return self.graph.call_function(torch.reshape, (self._value(args[0]), sizes))


# ---------------------------------------------------------------------------------------------------------------------
# Small facts about nodes


def aten_call(node: fx.Node) -> tuple[str, list]:
    """An exported node's operator name and its arguments in schema order, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target)), list(node.args)
    schema = target._schema
    args = [node.args[i] if i < len(node.args) else node.kwargs.get(arg.name, arg.default_value)
            for i, arg in enumerate(schema.arguments)]
    namespace, name = schema.name.split("::")
    if namespace not in ("aten", "s2h"):
        return schema.name, args
    if name.endswith("_") and not name.startswith("_"):
        name = name[:-1]
    return name, args


def _argument_names(node: fx.Node) -> list[str]:
    return [argument.name for argument in node.target._schema.arguments] if isinstance(node.target, torch._ops.OpOverload) else []


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_identity(op: str, args: list, node: fx.Node) -> bool:
    if op in ("dropout", "feature_dropout"):
        return not args[1]
    if op == "slice":
        full = node.meta["val"].shape == args[0].meta["val"].shape
        return full and args[4] == 1
    if op == "pad":
        return not any(args[1])
    return op in ("alias", "lift_fresh_copy")


def _is_plain(node: fx.Node, op: str, args: list) -> bool:
    """Whether the ATen call means the same as the function that `FUNCTIONS` names."""
    scaled = op in ("add", "sub") and len(args) > 2 and args[2] != 1
    return isinstance(node.target, torch._ops.OpOverload) and op in FUNCTIONS and not scaled and "rounding_mode" not in node.kwargs


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _has_views(node: fx.Node) -> bool:
    """Whether a tensor shares its memory with another one of the graph."""
    def is_view(n: fx.Node) -> bool:
        if n.target is operator.getitem:
            return is_view(n.args[0])
        return (isinstance(n.target, torch._ops.OpOverload) and not _mutates(n)
                and any(arg.alias_info is not None for arg in n.target._schema.arguments))

    return is_view(node) or any(is_view(user) for user in node.users)


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and aten_call(node)[0].startswith(_ASSERTIONS):
            graph.erase_node(node)


def _kept_by_expand(node: fx.Node, args: list, i: int) -> bool:
    before, after = args[0].meta["val"].shape, node.meta["val"].shape
    j = i - (len(after) - len(before))
    return j >= 0 and before[j] == after[i] and isinstance(after[i], int)


def _dropout(op: str, args: list) -> nn.Module:
    if op == "drop_path":
        from torchvision.ops import StochasticDepth

        return StochasticDepth(args[1], args[2])
    return (nn.Dropout if op == "dropout" else nn.Dropout2d)(args[1])


def _symbols(tensor: torch.Tensor) -> set[Any]:
    """The symbols that a tensor's sizes depend on."""
    return {symbol for size in tensor.shape if not isinstance(size, int) for symbol in size.node.expr.free_symbols}


def _where(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return f"in {next(reversed(stack.values()))[0] or 'the model'}" if stack else "no layer named"


def _container(root: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, made of empty modules where it is missing."""
    for name in filter(None, path.split(".")):
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    return root


def tensors_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by dotted name, tied ones under each of their names, non-persistent buffers too."""
    return {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers(remove_duplicate=False))}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def to_device(network: fx.GraphModule, device: torch.device | str) -> fx.GraphModule:
    """Moves a network, and the tensors that its graph makes on a device of its own (`arange`, `zeros`)."""
    for node in network.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device(device))
    network.recompile()
    return network.to(device)


def resolve(name: str) -> Callable:
    """The function behind a name of `FUNCTIONS`."""
    module, _, attribute = name.rpartition(".")
    return getattr({"torch": torch, "torch.nn.functional": nn.functional, "operator": operator}[module], attribute)
