"""The table of operator rules: how labels pass through each ATen operator.

A rule gets the labelled inputs and returns the labels of the output. To support another operator, write its rule and enter it
in `RULES`. **An operator without a rule freezes every label that enters it**: the program can prune less than it might, never
wrongly.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterator, NamedTuple

import numpy as np
from torch import fx

from .errors import UserError
from .graph import FILLED, RECURRENT, RESHAPES, SPLITS, Param, Ref, tensors_of
from .labels import FIXED, Dim, Labels


class NoRule(Exception):
    """The rules do not cover a call. What enters it stays whole."""


class Tensor(NamedTuple):
    """A labelled tensor: its shape, for each dimension its labels or None, where it comes from, and whether it is a weight:
    a parameter, or computed from parameters alone (a standardised weight), so that it is the same for all images."""

    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    source: Ref | Param | None = None
    weight: bool = False


class Use(NamedTuple):
    """A labelled dimension of an operand of the operator at `node`: one that it contracts (a read), or that it makes the
    channels of its output from (a write)."""

    operand: Ref | Param
    dim: int
    node: str


@dataclass
class Call:
    """One operator call as a rule sees it. `args` hold `Tensor`s in place of tensors; `names` are what the operator's schema calls
    them; `outputs` are the shapes of the results; `pointwise`: see `graph`."""

    op: str
    args: tuple
    outputs: list[tuple[int, ...]]
    labels: Labels
    node: str
    reads: list[Use]
    writes: list[Use]
    batch: int
    names: list[str]
    pointwise: bool
    prune_head_dim: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.outputs[0]

    def named(self, *names: str) -> Any:
        """The first argument of one of these names.

        Raises:
            NoRule: the operator has no such argument.
        """
        try:
            return next(value for name, value in zip(self.names, self.args) if name in names)
        except StopIteration:
            raise NoRule from None

    def part(self, args: tuple, shape: tuple[int, ...]) -> "Call":
        """The same call on other tensors: some of the axes."""
        return replace(self, args=args, outputs=[shape])


class Labelled(NamedTuple):
    """A network with labels on everything. `tensors[node]` lists a node's outputs; `reads` and `writes` list where labelled
    dimensions are contracted and made. `unknown` lists the operators, each with its nodes, at which channels were frozen because
    no rule covers the call."""

    labels: Labels
    tensors: dict[str, list[Tensor]]
    params: dict[str, Tensor]
    reads: list[Use]
    writes: list[Use]
    unknown: dict[str, list[str]]

    def operands(self, node: fx.Node) -> tuple:
        """The arguments of a node's call, with `Tensor`s in place of tensors and None for numbers that the graph computes."""
        def labelled(value: Any) -> Any:
            return self.tensor(value) if isinstance(value, Param) or isinstance(value, Ref) and value.name in self.tensors else None

        return fx.node.map_aggregate(node.meta["args"], lambda a: labelled(a) if isinstance(a, (Ref, Param)) else a)

    def freeze_call(self, node: fx.Node) -> None:
        """Freezes what enters and leaves the call of a node, and names its operator in `unknown`."""
        for tensor in (*_tensors(self.operands(node)), *self.tensors[node.name]):
            for dim in tensor.dims:
                self.labels.freeze(dim, no_rule_for(node.meta["op"]))
        self.unknown.setdefault(node.meta["op"], []).append(node.name)

    def tensor(self, reference: Ref | Param) -> Tensor:
        """The labelled tensor that an argument of a node stands for."""
        return self.params[reference.name] if isinstance(reference, Param) else self.tensors[reference.name][0]


def propagate(network: fx.GraphModule, exclude: tuple[str, ...] = (), prune_head_dim: bool = False) -> Labelled:
    """Walks the canonical graph once and records what each operator says about labels.

    Args:
        network: a canonical graph from `graph.capture`.
        exclude: globs on layer names (`layer1.0.conv1`, `head*`) whose weights are left whole.
        prune_head_dim: also cut channels that two activations contract (the head dimension of q and k).

    Raises:
        UserError: a glob of `exclude` matches no layer.
    """
    out = Labelled(Labels(), {}, {}, [], [], {})
    labels, tensors, params = out.labels, out.tensors, out.params
    state = tensors_of(network)

    def labelled(value: Any) -> Any:
        if isinstance(value, Ref):
            return tensors[value.name][0] if value.name in tensors else None
        if isinstance(value, Param):
            if value.name not in state:
                return None  # only its shape was asked for (`reshape_as`)
            if value.name not in params:
                data = state[value.name]
                fresh = [labels.fresh(n) if n > 1 else None for n in data.shape]
                params[value.name] = Tensor(tuple(data.shape), tuple(fresh), value, weight=True)
            return params[value.name]
        return value

    of_images: set[fx.Node] = set()  # what depends on the images, or on how many there are
    for node in network.graph.nodes:
        shape = node.meta.get("shape")
        if node.op == "placeholder" or any(source in of_images for source in node.all_input_nodes):
            of_images.add(node)
        if node.op == "placeholder":
            tensors[node.name] = [Tensor(shape, (None,) * len(shape), Ref(node.name))]
        elif node.op == "get_attr":
            tensors[node.name] = [labelled(Param(node.target))]
        elif node.op == "output":
            for dim in tensors[node.args[0].name][0].dims:
                labels.freeze(dim, "the network's output")
        elif shape is not None:
            args = node.meta["args"]
            if node.meta["op"] == "getitem":  # picks one of several outputs
                if isinstance(shape, list):  # a list among the outputs
                    tensors[node.name] = [Tensor(s, (None,) * len(s or ()), Ref(node.name)) for s in shape]
                else:
                    tensors[node.name] = [tensors[args[0].name][args[1]]._replace(source=Ref(node.name))]
                continue
            outputs = list(shape) if isinstance(shape, list) else [shape]
            args = fx.node.map_aggregate(args, labelled)
            call = Call(node.meta["op"], args, outputs, labels, node.name, out.reads, out.writes,
                        network.meta["batch"], node.meta["names"], node.meta["pointwise"], prune_head_dim)
            results = _labels_of(call, out.unknown)
            if any(source.meta.get("shape") is None for source in node.all_input_nodes) and not call.op.startswith("conv"):
                # Sizes that are computed from the batch, as batch * 32: the 32 may count channels.
                for axis, dim in ((i, d) for shape, dims in zip(outputs, results) for i, d in zip(shape or (), dims)):
                    if axis % call.batch == 0:
                        labels.freeze(dim, "its size is computed from the number of images")
            weight = node not in of_images
            tensors[node.name] = [Tensor(s, tuple(d), Ref(node.name), weight) for s, d in zip(outputs, results)]

    for glob in exclude:
        matched = [name for name in params if fnmatch.fnmatchcase(name.rpartition(".")[0], glob) or fnmatch.fnmatchcase(name, glob)]
        if not matched:
            raise UserError(f"--exclude {glob!r} matches no layer; `s2h inspect` lists the layers' names")
        for name in matched:
            for dim in params[name].dims:
                labels.freeze(dim, f"left whole by --exclude {glob}")
    return out


def _labels_of(call: Call, unknown: dict[str, list[str]]) -> list[tuple[Dim, ...]]:
    """The dims of each output, by the operator's rule. Where there is no rule, or it fails on this call, whatever it recorded is
    taken back, what enters the call is frozen, and the operator is named in `unknown`."""
    before, reads, writes = call.labels.mark(), len(call.reads), len(call.writes)
    try:
        rule = RULES.get(call.op, elementwise if call.pointwise else None)
        if rule is None:
            raise NoRule
        dims = rule(call)
        results = dims if isinstance(dims, list) else [dims]
        if all(_fits(d, shape) for d, shape in zip(results, call.outputs, strict=True)):
            return results
    except Exception:  # NoRule, or a call that the rule's author did not think of
        pass
    call.labels.take_back(before)
    del call.reads[reads:], call.writes[writes:]
    labelled = [dim for tensor in _tensors(call.args) for dim in tensor.dims if dim is not None]
    for dim in labelled:
        call.labels.freeze(dim, no_rule_for(call.op))
    if labelled:
        unknown.setdefault(call.op, []).append(call.node)
    return [(None,) * len(shape or ()) for shape in call.outputs]


def _fits(dims: tuple[Dim, ...], shape: tuple[int, ...] | None) -> bool:
    """Whether there is a label for each index of a tensor of this shape."""
    return len(dims) == len(shape or ()) and all(dim is None or len(dim) == size for dim, size in zip(dims, shape or ()))


def no_rule_for(op: str) -> str:
    """The reason that is given where no rule covers a call of an operator."""
    return f"no rule for operator {op}"


# ---------------------------------------------------------------------------------------------------------------------
# Rules. Each takes a Call and returns the dims of its output (a tuple), or a list of tuples for several outputs.


def constant(call: Call) -> tuple[Dim, ...]:
    """Makes a tensor of its own, whose values differ from index to index; of its input it takes the type alone."""
    return (None,) * len(call.shape)


def filled(call: Call) -> tuple[Dim, ...]:
    """Makes a tensor of one value, or of random ones, which can have any size."""
    return tuple(call.labels.fresh(size) if size > 1 else None for size in call.shape)


def elementwise(call: Call) -> tuple[Dim, ...]:
    """Aligned dimensions are joined, with broadcasting."""
    out: list[Dim] = []
    inputs = [a for a in call.args if isinstance(a, Tensor)]
    for i, size in enumerate(call.shape):
        aligned = [(t.shape[j], t.dims[j]) for t in inputs if (j := i - len(call.shape) + len(t.shape)) >= 0]
        same = [dim for n, dim in aligned if n == size]
        for n, dim in aligned:
            if n != size:
                call.labels.freeze(dim, "broadcast")
        joined = same[0]
        for dim in same[1:]:
            joined = call.labels.join(joined, dim)
        out.append(joined)
    return tuple(out)


def spatial(call: Call) -> list[tuple[Dim, ...]]:
    """Pooling, resizing, with indices or without: the last d axes must be unlabelled, d being the operator's (`max_pool2d`: two);
    the others pass."""
    x = call.args[0]
    channels = len(x.shape) - int(re.search(r"(\d)d", call.op)[1])
    for dim in x.dims[channels:]:
        call.labels.freeze(dim, f"{call.op} over channels")
    return [(*x.dims[:channels], *(None,) * (len(x.dims) - channels)) for _ in call.outputs]


def conv(call: Call) -> tuple[Dim, ...]:
    """Reads dim 1 of the weight, writes dim 0."""
    x, weight, bias = call.args[:3]
    if len(x.shape) < len(weight.shape):
        raise NoRule  # one image without an axis for it
    channels, rows, columns = x.dims[1], weight.dims[0], weight.dims[1]
    positions = [dim if _is_one_position(call, i) else _stay_whole(call, dim, "spatial positions of a convolution") for i, dim in enumerate(x.dims[2:])]
    for dim in weight.dims[2:]:
        call.labels.freeze(dim, "spatial positions of a convolution")
    per_group = weight.shape[1]
    groups = x.shape[1] // per_group
    # A network with a kernel for each image folds the batch into the groups; what matters is how many groups one image has.
    of_image = groups // call.batch if groups % call.batch == 0 else groups
    if groups == 1:
        call.labels.join(channels, columns, "input of a layer that cannot be cut")
        _read(call, weight, 1)
    elif of_image >= per_group or _is_repeated(channels, groups):  # whole groups are the unit (depthwise: groups of one channel)
        call.labels.freeze(columns, "inside one group of a grouped convolution")
        unit = _tie(call, channels, (groups, per_group), axis=1)
        rows_unit = _tie(call, rows, (groups, -1), axis=1)
        call.labels.join(unit, rows_unit, "input of a grouped convolution that cannot be cut")
        rows = None if rows is None else np.repeat(rows_unit, len(rows) // groups)
    else:  # few wide groups: position j is cut in each of them
        call.labels.join(_tie(call, channels, (groups, per_group), axis=0), columns, "input of a layer that cannot be cut")
        _tie(call, rows, (groups, -1), axis=0)
        _read(call, weight, 1)
    _write(call, weight, 0)
    if bias is not None:
        call.labels.join(weight.dims[0], bias.dims[0])
    return (x.dims[0], rows, *positions)


def _is_one_position(call: Call, i: int) -> bool:
    """Whether a convolution sees one position at a time along its i-th axis of space, and every one once."""
    weight, (stride, padding) = call.args[1], call.args[3:5]
    of_axis = lambda values: values[i % len(values)]  # noqa: E731: one value stands for all axes
    return weight.shape[2 + i] == 1 and of_axis(stride) == 1 and (isinstance(padding, str) or of_axis(padding) == 0)


def _is_repeated(dim: Dim, groups: int) -> bool:
    """Whether the labels are the same all over each group."""
    return dim is not None and bool((dim.reshape(groups, -1) == dim.reshape(groups, -1)[:, :1]).all())


def transposed_conv(call: Call) -> tuple[Dim, ...]:
    """Reads dim 0 of the weight, writes dim 1."""
    x, weight, bias, _, _, _, groups = call.args[:7]
    for dim in (*x.dims[2:], *weight.dims[2:]):
        call.labels.freeze(dim, "spatial positions of a convolution")
    rows = weight.dims[1]
    if groups == 1:
        call.labels.join(x.dims[1], weight.dims[0], "input of a layer that cannot be cut")
        _read(call, weight, 0)
        _write(call, weight, 1)
    else:
        for dim in (x.dims[1], *weight.dims[:2]):
            call.labels.freeze(dim, "grouped transposed convolution")
        rows = None
    if bias is not None:
        call.labels.join(rows, bias.dims[0])
    return (x.dims[0], rows, *(None,) * (len(call.shape) - 2))


def linear(call: Call) -> tuple[Dim, ...]:
    x, weight, bias = call.args
    _contracted(call, x.dims[-1], weight.dims[1], weight, 1)
    _write(call, weight, 0)
    if bias is not None:
        call.labels.join(weight.dims[0], bias.dims[0])
    return (*x.dims[:-1], weight.dims[0])


def matmul(call: Call) -> tuple[Dim, ...]:
    a, b = call.args[:2]
    batch = [f"batch{i}" for i in range(len(call.shape), 0, -1)]
    of_a = [*batch[len(batch) - len(a.shape) + 2:], "row", "inner"] if len(a.shape) > 1 else ["inner"]
    of_b = [*batch[len(batch) - len(b.shape) + 2:], "inner", "column"] if len(b.shape) > 1 else ["inner"]
    out = [*batch[len(batch) - max(len(a.shape), len(b.shape)) + 2:]]
    return _contract(call, a, b, of_a, of_b, out + ["row"] * (len(a.shape) > 1) + ["column"] * (len(b.shape) > 1))


def add_product(call: Call) -> tuple[Dim, ...]:
    """bias + a @ b."""
    bias, a, b = call.args[:3]
    dims = matmul(call.part((a, b), call.shape))
    return elementwise(call.part((bias, Tensor(call.shape, dims)), call.shape))


def einsum_axes(equation: str, shapes: list[tuple[int, ...]]) -> tuple[list[list[str]], list[str]]:
    """Names of the axes of each operand of an einsum, and of its output. Those behind `...` are called by their place from the right."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    named = []
    for letters, shape in zip(inputs.split(","), shapes, strict=True):
        left, dots, right = letters.partition("...")
        rest = len(shape) - len(left) - len(right) if dots else 0
        named.append([*left, *(f".{i}" for i in reversed(range(rest))), *right])
    dotted = max(([name for name in names if name[0] == "."] for names in named), key=len)
    if not arrow:
        letters = [name for names in named for name in names if name[0] != "."]
        output = "..." + "".join(sorted(name for name in letters if letters.count(name) == 1))
    left, dots, right = output.partition("...")
    return named, [*left, *(dotted if dots else []), *right]


def einsum(call: Call) -> tuple[Dim, ...]:
    """Operands from left to right; axes that a later operand or the output has are contracted with that operand."""
    equation, operands = call.args[:2]
    inputs, output = einsum_axes(equation, [t.shape for t in operands])
    if any(len(set(names)) < len(names) for names in (*inputs, output)):
        raise NoRule  # a diagonal
    for i, names in enumerate(inputs):
        later = {name for other in (*inputs[i + 1:], output) for name in other}
        if i == 0:
            made, axes = operands[0], names
            continue
        sizes = {**dict(zip(names, operands[i].shape)), **{n: size for n, size in zip(axes, made.shape) if size > 1}}
        left = output if i == len(inputs) - 1 else [name for name in dict.fromkeys(axes + names) if name in later]
        if len(inputs) > 2 and not set(axes + names) <= set(left):
            raise NoRule  # a gate on the contracted operand of more than two would have no one place
        dims = _contract(call, made, operands[i], axes, names, left)
        made, axes = Tensor(tuple(sizes[name] for name in left), dims, weight=made.weight and operands[i].weight), left
    dims = dict(zip(axes, made.dims))
    for name in dims.keys() - set(output):
        call.labels.freeze(dims[name], "einsum sums over channels")
    return tuple(dims[name] for name in output)


def _contract(call: Call, a: Tensor, b: Tensor, of_a: list[str], of_b: list[str], out: list[str]) -> tuple[Dim, ...]:
    """Sum of products over the axes that two tensors share and the output lacks; axes are named."""
    weight = a if a.weight else b
    dims: dict[str, Dim] = {}
    for name in dict.fromkeys(of_a + of_b):
        places = [(t, names.index(name)) for t, names in ((a, of_a), (b, of_b)) if name in names]
        if len(places) == 1:
            (tensor, axis), = places
            dims[name] = tensor.dims[axis]
            if name not in out:
                dims[name] = _stay_whole(call, dims[name], f"{call.op} sums over channels")
            elif tensor.weight:
                _write(call, tensor, axis)
        elif name in out:
            axes = tuple(Tensor((t.shape[axis],), (t.dims[axis],)) for t, axis in places)
            (dims[name],) = elementwise(call.part(axes, (max(t.shape[0] for t in axes),)))
        else:
            tensor, axis = places[0] if weight is a else places[1]
            _contracted(call, *(t.dims[i] for t, i in places), tensor, axis)
    return tuple(dims[name] for name in out)


def _contracted(call: Call, a: Dim, b: Dim, operand: Tensor, axis: int) -> None:
    """Joins two contracted dimensions; axis `axis` of `operand` is one of them, and takes the gate.

    A weight reads what it contracts. Between two activations, how many channels they contract sets the softmax scale of
    attention, so these stay unless asked for."""
    if operand.weight or call.prune_head_dim:
        call.labels.join(a, b, "input of a layer that cannot be cut")
        _read(call, operand, axis)
    else:
        for dim in (a, b):
            call.labels.freeze(dim, HEAD_DIM)


def attention(call: Call) -> tuple[Dim, ...]:
    """Scaled dot-product attention: q (…, L, E), k (…, S, E), v (…, S, Ev)."""
    q, k, v, mask = call.args[:4]
    if len(q.shape) != len(k.shape):
        raise NoRule
    _contracted(call, q.dims[-1], k.dims[-1], q, len(q.dims) - 1)
    for tokens in (q.dims[-2], k.dims[-2], v.dims[-2]):
        call.labels.freeze(tokens, "tokens of attention")
    heads = [Tensor(t.shape[:-2], t.dims[:-2]) for t in (q, k, v)]
    if any(n not in (1, m) for n, m in zip(k.shape[:-2], q.shape[:-2])):  # several heads of q share one of k, but not all of them
        for dim in (d for t in heads for d in t.dims):
            call.labels.freeze(dim, "heads of grouped-query attention")
        return (*(None,) * (len(call.shape) - 1), v.dims[-1])
    if mask is not None:
        for tokens in mask.dims[-2:]:
            call.labels.freeze(tokens, "tokens of attention")
        heads.append(Tensor(mask.shape[:-2], mask.dims[:-2]))
    return (*elementwise(call.part(tuple(heads), call.shape[:-2])), None, v.dims[-1])


def batch_norm(call: Call) -> tuple[Dim, ...]:
    x, *affine = call.args[:5]
    _per_channel(call, x, affine)
    # Statistics of the batch are taken over all other axes. Of a weight (weight standardisation) they are those of what is left.
    passes = x.weight or not call.args[5]
    return tuple(dim if i == 1 or passes else _stay_whole(call, dim, "normalised over channels") for i, dim in enumerate(x.dims))


def layer_norm(call: Call) -> tuple[Dim, ...]:
    x, normalized, *affine = call.args[:4]
    for tensor in affine:
        if tensor is not None:
            for dim, own in zip(x.dims[-len(normalized):], tensor.dims, strict=True):
                call.labels.join(dim, own)
    return x.dims


def rms_norm(call: Call) -> tuple[Dim, ...]:
    return layer_norm(replace(call, args=call.args[:3]))


def weight_norm(call: Call) -> tuple[Dim, ...]:
    """A direction v, each of whose slices along one axis is given the length g."""
    v, g, axis = call.args
    if g.shape:  # else it is the length of the whole direction
        call.labels.join(v.dims[axis], g.dims[axis])
    return v.dims


def instance_norm(call: Call) -> tuple[Dim, ...]:
    x, *affine = call.args[:5]
    _per_channel(call, x, affine)
    return tuple(dim if i < 2 else _stay_whole(call, dim, "normalised over channels") for i, dim in enumerate(x.dims))


def prelu(call: Call) -> tuple[Dim, ...]:
    x, slope = call.args
    if slope.shape and slope.shape[0] > 1:
        call.labels.join(x.dims[1], slope.dims[0])
    return x.dims


def recurrent(call: Call) -> list[tuple[Dim, ...]]:
    """Each direction of an LSTM, GRU or RNN reads the input through one weight; what it computes stays whole."""
    x, state, weights, has_biases, layers, _, _, bidirectional = call.args[:8]
    inputs = weights[:: 4 if has_biases else 2][:1 + bidirectional] if layers == 1 else []
    for tensor in _tensors((state, weights)):
        for axis, dim in enumerate(tensor.dims):
            if axis != 1 or not any(tensor is w for w in inputs):
                call.labels.freeze(dim, f"hidden state of {call.op}")
    for weight in inputs:
        call.labels.join(x.dims[-1], weight.dims[1], "input of a layer that cannot be cut")
        _read(call, weight, 1)
    for dim in x.dims if not inputs else x.dims[:-1]:
        call.labels.freeze(dim, f"steps of {call.op}")
    return [(None,) * len(shape) for shape in call.outputs]


def group_norm(call: Call) -> tuple[Dim, ...]:
    """The number of norm groups stays; position j is cut in each of them."""
    x, groups, *affine = call.args[:4]
    _tie(call, x.dims[1], (groups, -1), axis=0)
    _per_channel(call, x, affine)
    return tuple(dim if i < 2 else _stay_whole(call, dim, "normalised over channels") for i, dim in enumerate(x.dims))


def reshape(call: Call) -> tuple[Dim, ...]:
    """Unfolds every input axis into the factors that both shapes share, and folds these into the output's axes.

    Example: (B, 768) -> (B*12, 64) has the factors B, 12, 64: 768 splits into (12, 64), then (B, 12) merge.
    """
    x = call.args[0]
    before, after = _spans(x.shape), _spans(call.shape)
    steps = sorted({edge for span in before + after for edge in span})
    shared = sorted({1, *(high for _, high in before)} & {1, *(high for _, high in after)})
    factors: dict[tuple[int, int], Dim] = {}  # (stride, stride of the next factor to the left) -> labels
    for low, high in zip(shared, shared[1:]):
        inside = [step for step in steps if low <= step <= high]
        dims = [(span, dim) for span, dim in zip(before, x.dims, strict=True) if low <= span[0] < span[1] <= high]
        if any(b % a for a, b in zip(inside, inside[1:])):  # no shared factors: flatten and cut anew
            flat = call.labels.merge([dim for _, dim in dims], [b // a for (a, b), _ in dims])
            inside = sorted({edge for span in after for edge in span if low <= edge <= high})
            dims = [((low, high), flat)]
        for (a, b), dim in dims:
            edges = [step for step in inside if a <= step <= b][::-1]
            spans = [(edges[k + 1], edges[k]) for k in range(len(edges) - 1)]
            sizes = [v // u for u, v in spans]
            factors.update(zip(spans, [dim] if len(spans) == 1 else call.labels.split(dim, sizes), strict=True))
    out = []
    for low, high in after:
        spans = [span for span in sorted(factors, reverse=True) if low <= span[0] and span[1] <= high]
        out.append(call.labels.merge([factors[span] for span in spans], [b // a for a, b in spans]))
    return tuple(out)


def _spans(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The (stride, stride times size) of each axis of a contiguous tensor of this shape."""
    spans, stride = [], 1
    for size in reversed(shape):
        spans.append((stride, stride * size))
        stride *= size
    return spans[::-1]


def permute(call: Call) -> tuple[Dim, ...]:
    x, order = call.args[:2]
    return tuple(x.dims[i] for i in order)


def movedim(call: Call) -> tuple[Dim, ...]:
    x, source, destination = call.args
    order = np.moveaxis(np.empty(tuple(range(len(x.shape)))), source, destination).shape
    return tuple(x.dims[i] for i in order)


def transpose(call: Call) -> tuple[Dim, ...]:
    x = call.args[0]
    a, b = call.args[1:3] if len(call.args) > 1 else (0, 1)
    dims = list(x.dims)
    dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


def expand(call: Call) -> tuple[Dim, ...]:
    x = call.args[0]
    lead = len(call.shape) - len(x.shape)
    return (None,) * lead + tuple(
        dim if before == after else _stay_whole(call, dim, "expanded")
        for dim, before, after in zip(x.dims, x.shape, call.shape[lead:], strict=True))


def expand_as(call: Call) -> tuple[Dim, ...]:
    """Repeated along axes of length 1, whose labels are then those of the other tensor."""
    return elementwise(call.part(call.args[:2], call.shape))


def repeat(call: Call) -> tuple[Dim, ...]:
    x, times = call.args[:2]
    times = [1] * (len(x.shape) - len(times)) + list(times)
    lead = len(times) - len(x.shape)
    return (None,) * lead + tuple(None if dim is None else np.tile(dim, n) for dim, n in zip(x.dims, times[lead:], strict=True))


def repeat_interleave(call: Call) -> tuple[Dim, ...]:
    x, times, axis = call.args[:3]
    if type(times) is not int or axis is None:
        raise NoRule
    return tuple(np.repeat(dim, times) if i == axis % len(x.shape) and dim is not None else dim for i, dim in enumerate(x.dims))


def norm(call: Call) -> tuple[Dim, ...]:
    """Vector norm over dimensions: (x, order, dims)."""
    return reduce(call.part((call.args[0], call.args[2] if len(call.args) > 2 else None), call.shape))


def reduce(call: Call) -> tuple[Dim, ...]:
    """Mean, sum, max over dimensions: these must be unlabelled, but for the statistics of a normalisation written out (an RMS
    norm as `x * rsqrt(mean(x**2, dim, keepdim=True))`), which are then those of the kept channels, as in a layer norm."""
    x, axes = call.args[0], call.args[1] if len(call.args) > 1 else None
    axes = [axes] if type(axes) is int else axes if isinstance(axes, (list, tuple)) else []  # mean(), var(unbiased), ...: all
    axes = {axis % len(x.shape) for axis in axes or range(len(x.shape))}
    keep = len(call.shape) == len(x.shape)
    if not (keep and call.op in STATISTICS):
        for axis in axes:
            call.labels.freeze(x.dims[axis], f"{call.op} over channels")
    return tuple(None if i in axes else dim for i, dim in enumerate(x.dims) if keep or i not in axes)


def reduce_twice(call: Call) -> list[tuple[Dim, ...]]:
    """Values and indices, or variance and mean; `max(a, b)` of two tensors is element-wise."""
    if len(call.args) > 1 and isinstance(call.args[1], Tensor):
        return [elementwise(call)]
    return [reduce(call.part(call.args, shape)) for shape in call.outputs]


def along(call: Call) -> list[tuple[Dim, ...]]:
    """Works along the axes that its argument `dim` names, and on each index of the other axes apart, in all its tensors alike: the
    labels along these axes are frozen, the others pass to each output."""
    tensors = [t for t in _tensors(call.args) if t.shape]
    rank = len(tensors[0].shape)
    axes = call.named("dim", "dims")
    axes = {axis % rank for axis in ([axes] if type(axes) is int else axes or range(rank))}
    others = [i for i in range(rank) if i not in axes]
    if any([t.shape[i] for i in others] != [tensors[0].shape[i] for i in others] for t in tensors):
        raise NoRule  # `scatter` with few indices, say, which touches the first rows alone
    passed: list[Dim] = [None] * rank
    for i in range(rank):
        if i in axes:
            for tensor in tensors:
                call.labels.freeze(tensor.dims[i], f"{call.op} over channels")
        else:
            passed[i] = functools.reduce(call.labels.join, [t.dims[i] for t in tensors])
    return [tuple(passed) if len(shape) == rank else tuple(passed[i] for i in others) for shape in call.outputs]


def grid_sampler(call: Call) -> tuple[Dim, ...]:
    """Picks from all places of (N, C, ...) those that a grid (N, ..., 2 or 3) names."""
    x, grid = call.args[:2]
    for dim in (*x.dims[2:], *grid.dims[1:]):
        call.labels.freeze(dim, "grid_sampler over channels")
    return (call.labels.join(x.dims[0], grid.dims[0]), x.dims[1], *(None,) * (len(call.shape) - 2))


def channel_shuffle(call: Call) -> tuple[Dim, ...]:
    """(groups, channels of a group) turned round. The number of groups stays; position j is cut in each of them."""
    x, groups = call.args
    positions = _tie(call, x.dims[1], (groups, -1), axis=0)
    return (x.dims[0], None if positions is None else np.repeat(positions, groups), *x.dims[2:])


def pad(call: Call) -> tuple[Dim, ...]:
    """Axes that are padded, or shifted by a negative pad, must be unlabelled. Pads come in pairs, the last axis first."""
    x, pads = call.args[:2]
    touched = {len(x.shape) - 1 - i // 2 for i, n in enumerate(pads) if n}
    return tuple(_stay_whole(call, dim, "padded channels") if i in touched else dim for i, dim in enumerate(x.dims))


def cat(call: Call) -> tuple[Dim, ...]:
    inputs, axis = call.args[0], call.args[1] if len(call.args) > 1 else 0
    axis %= len(call.shape)
    others = tuple(Tensor(_without(t.shape, axis), _without(t.dims, axis)) for t in inputs)
    out = elementwise(call.part(others, _without(call.shape, axis)))
    joined = None
    if any(t.dims[axis] is not None for t in inputs):
        joined = np.concatenate([np.full(t.shape[axis], FIXED) if t.dims[axis] is None else t.dims[axis] for t in inputs])
    return (*out[:axis], joined, *out[axis:])


def stack(call: Call) -> tuple[Dim, ...]:
    inputs, axis = call.args[0], (call.args[1] if len(call.args) > 1 else 0) % len(call.shape)
    out = elementwise(call.part(tuple(inputs), _without(call.shape, axis)))
    return (*out[:axis], None, *out[axis:])


def split(call: Call) -> list[tuple[Dim, ...]]:
    x, axis = call.args[0], (call.args[2] if len(call.args) > 2 else 0) % len(call.args[0].shape)
    out, start = [], 0
    for shape in call.outputs:
        part = None if x.dims[axis] is None else x.dims[axis][start:start + shape[axis]]
        out.append((*x.dims[:axis], part, *x.dims[axis + 1:]))
        start += shape[axis]
    return out


def slice_(call: Call) -> tuple[Dim, ...]:
    x, axis, start, stop, step = call.args
    dims = list(x.dims)
    if dims[axis] is not None:
        dims[axis] = dims[axis][start:stop] if step == 1 else _stay_whole(call, dims[axis], "strided slice of channels")
    return tuple(dims)


def select(call: Call) -> tuple[Dim, ...]:
    x, axis = call.args[:2]
    call.labels.freeze(x.dims[axis], PICKED)
    return _without(x.dims, axis % len(x.shape))


def unbind(call: Call) -> list[tuple[Dim, ...]]:
    return [select(call.part((call.args[0], call.args[1] if len(call.args) > 1 else 0), shape)) for shape in call.outputs]


def glu(call: Call) -> tuple[Dim, ...]:
    """First half times a function of the second."""
    x, axis = call.args[0], (call.args[1] if len(call.args) > 1 else -1) % len(call.args[0].shape)
    half = call.shape[axis]
    return tuple(dim if i != axis or dim is None else call.labels.join(dim[:half], dim[half:]) for i, dim in enumerate(x.dims))


def index(call: Call) -> tuple[Dim, ...]:
    """`x[i, :, j]`: what is indexed must be unlabelled; the rest passes. Gaps between indices move their axes to the front."""
    x, indices = call.args
    used = [i for i, t in enumerate(indices) if isinstance(t, Tensor)]
    rank = max((len(indices[i].shape) for i in used), default=0)
    for i in used:
        for dim in (x.dims[i], *indices[i].dims):
            call.labels.freeze(dim, "indexed")
    rest = [dim for i, dim in enumerate(x.dims) if i not in used]
    front = used[0] if used and used == list(range(used[0], used[-1] + 1)) else 0
    out = (*rest[:front], *(None,) * rank, *rest[front:])
    return out  # of another rank where a mask takes several axes: that is no rule


def index_select(call: Call) -> tuple[Dim, ...]:
    x, axis = call.args[:2]
    return tuple(_stay_whole(call, dim, "indexed") if i == axis % len(x.shape) else dim for i, dim in enumerate(x.dims))


def embedding(call: Call) -> tuple[Dim, ...]:
    table, indices = call.args[:2]
    call.labels.freeze(table.dims[0], "indexed")
    return (None,) * len(indices.shape) + table.dims[1:]


def im2col(call: Call) -> tuple[Dim, ...]:
    """Patches as columns: channel c becomes the channels (c, position in the patch)."""
    x = call.args[0]
    for dim in x.dims[2:]:
        call.labels.freeze(dim, "im2col over channels")
    return (x.dims[0], call.labels.merge([x.dims[1], None], [x.shape[1], call.shape[1] // x.shape[1]]), None)


def col2im(call: Call) -> tuple[Dim, ...]:
    """The inverse of `im2col`: sums patches."""
    x = call.args[0]
    channels, patch = call.labels.split(x.dims[1], [call.shape[1], x.shape[1] // call.shape[1]])
    for dim in (patch, x.dims[2]):
        call.labels.freeze(dim, "col2im over channels")
    return (x.dims[0], channels, None, None)


def unfold(call: Call) -> tuple[Dim, ...]:
    """Sliding windows along one axis, which come last."""
    x, axis = call.args[:2]
    return (*(_stay_whole(call, dim, "unfold over channels") if i == axis % len(x.shape) else dim for i, dim in enumerate(x.dims)), None)


def pixel_shuffle(call: Call) -> tuple[Dim, ...]:
    x, factor = call.args
    channels, position = call.labels.split(x.dims[-3], [call.shape[-3], factor * factor])
    for dim in (position, *x.dims[-2:]):
        call.labels.freeze(dim, "pixel_shuffle over channels")
    return (*x.dims[:-3], channels, None, None)


def pixel_unshuffle(call: Call) -> tuple[Dim, ...]:
    x, factor = call.args
    for dim in x.dims[-2:]:
        call.labels.freeze(dim, "pixel_unshuffle over channels")
    return (*x.dims[:-3], call.labels.merge([x.dims[-3], None], [x.shape[-3], factor * factor]), None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers of the rules


#: Reductions that a normalisation is made of.
STATISTICS = ("mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm")
#: Why an axis stays whole that one index is picked out of: mostly that of (q, k, v).
PICKED = "one index picked out of the channels"
#: Why channels that two activations contract stay whole.
HEAD_DIM = "contracted between two activations (head dimension of q·k)"


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors among the arguments of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _read(call: Call, operand: Tensor, dim: int) -> None:
    """Records that an operand contracts a labelled dimension."""
    call.reads.append(Use(operand.source, dim, call.node))


def _write(call: Call, operand: Tensor, dim: int) -> None:
    """Records that a weight makes the channels of the output."""
    if operand.weight:
        call.writes.append(Use(operand.source, dim, call.node))


def _per_channel(call: Call, x: Tensor, tensors: list[Tensor | None]) -> None:
    """Joins vectors with an entry for each channel to the channels of x."""
    for tensor in tensors:
        if tensor is not None:
            call.labels.join(x.dims[1], tensor.dims[0])


def _tie(call: Call, dim: Dim, grid: tuple[int, int], axis: int) -> Dim:
    """Joins all labels of a dimension along one axis of a grid that it is laid out in, and returns one of them each."""
    if dim is None:
        return None
    rows = dim.reshape(grid)
    first = np.broadcast_to(rows.take([0], axis), rows.shape)
    call.labels.join(rows.reshape(-1), first.reshape(-1))
    return rows.take(0, axis)


def _stay_whole(call: Call, dim: Dim, reason: str) -> None:
    call.labels.freeze(dim, reason)
    return None


def _without(items: tuple, axis: int) -> tuple:
    return items[:axis] + items[axis + 1:]


_ELEMENTWISE = """abs acos add alpha_dropout addcdiv addcmul asin atan atan2 bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min
    clone contiguous copy cos cosh detach div dropout drop_path elu eq erf erfc exp exp2 expm1 feature_dropout floor floor_divide fmod
    frac ge gelu gt hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan le leaky_relu lerp log log10 log1p log2 log_sigmoid
    logical_and logical_not logical_or lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg pow reciprocal relu relu6
    remainder round rrelu rsqrt rsub selu sigmoid sign silu sin sinh softplus softshrink sqrt square sub tan tanh threshold to _to_copy
    true_divide trunc type_as where zero fill zeros_like ones_like full_like rand_like randn_like""".split()
_CONSTANT = "arange eye linspace logspace scalar_tensor tril_indices triu_indices".split()

RULES: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_CONSTANT, constant),
    **dict.fromkeys(FILLED, filled),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed_conv),
    "linear": linear, "matmul": matmul, "bmm": matmul, "addmm": add_product, "baddbmm": add_product, "einsum": einsum,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(RECURRENT, recurrent),
    "batch_norm": batch_norm, "layer_norm": layer_norm, "rms_norm": rms_norm, "group_norm": group_norm,
    "instance_norm": instance_norm, "_weight_norm": weight_norm, "prelu": prelu,
    **dict.fromkeys(RESHAPES, reshape),
    "permute": permute, "movedim": movedim, **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t"), transpose),
    **dict.fromkeys(("expand", "broadcast_to"), expand), "expand_as": expand_as,
    **dict.fromkeys(("repeat", "tile"), repeat), "repeat_interleave": repeat_interleave,
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "argmax", "argmin", "prod", "any", "all", "nansum",
                     "nanmean", "count_nonzero"), reduce),
    **dict.fromkeys(("max", "min", "var_mean", "std_mean"), reduce_twice),
    **dict.fromkeys(("linalg_vector_norm", "norm"), norm),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk", "kthvalue", "mode",
                     "median", "nanmedian", "aminmax", "diff", "gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce", "roll", "flip",
                     "cosine_similarity", "linalg_vecdot", "linalg_cross", "trapezoid"), along),
    **dict.fromkeys((f"{pool}{d}d" for pool in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool") for d in (1, 2, 3)), spatial),
    **dict.fromkeys((f"max_pool{d}d_with_indices" for d in (1, 2, 3)), spatial),
    **dict.fromkeys((*(f"{nearest}{d}d" for nearest in ("upsample_nearest", "_upsample_nearest_exact") for d in (1, 2, 3)), "upsample_linear1d",
                     "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa",
                     "upsample_trilinear3d"), spatial),
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), grid_sampler),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
    "pad": pad, "constant_pad_nd": pad, **dict.fromkeys(("cat", "concat", "concatenate"), cat), "stack": stack,
    **dict.fromkeys(SPLITS, split),
    "slice": slice_, "select": select, "unbind": unbind, "glu": glu,
    "index": index, "index_select": index_select, "embedding": embedding,
    "im2col": im2col, "col2im": col2im, "unfold": unfold, "pixel_shuffle": pixel_shuffle, "pixel_unshuffle": pixel_unshuffle,
}
