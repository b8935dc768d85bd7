"""The table of operator rules: how labels pass through each ATen operator.

A rule gets the labelled inputs and returns the labels of the output. To support another operator, write its rule and enter it
in `RULES`. **An operator without a rule freezes every label that enters it**: the program can prune less than it might, never
wrongly.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

import numpy as np
from torch import fx

from .errors import UserError
from .graph import RESHAPES, Param, Ref
from .labels import FIXED, Dim, Labels


class Tensor(NamedTuple):
    """A labelled tensor: its shape, and for each dimension its labels or None."""

    shape: tuple[int, ...]
    dims: tuple[Dim, ...]


@dataclass
class Call:
    """One operator call as a rule sees it. `args` hold `Tensor`s in place of tensors; `params` the names of those that are
    parameters, by argument position; `outputs` are the shapes of the results."""

    op: str
    args: tuple
    params: dict[int, str]
    outputs: list[tuple[int, ...]]
    labels: Labels
    reads: list[tuple[str, int]]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.outputs[0]


class Labelled(NamedTuple):
    """A network with labels on everything. `tensors[node]` lists a node's outputs; `reads` and `writes` list the weight
    dimensions (parameter, dim) that contract a labelled dimension, and that make one."""

    labels: Labels
    tensors: dict[str, list[Tensor]]
    params: dict[str, Tensor]
    reads: list[tuple[str, int]]
    writes: list[tuple[str, int]]
    unknown: dict[str, list[str]]

    def tensor(self, reference: Ref | Param) -> Tensor:
        """The labelled tensor that an argument of a node stands for."""
        return self.params[reference.name] if isinstance(reference, Param) else self.tensors[reference.name][0]


def propagate(network: fx.GraphModule, exclude: tuple[str, ...] = ()) -> Labelled:
    """Walks the canonical graph once and records what each operator says about labels.

    Args:
        network: a canonical graph from `graph.capture`.
        exclude: globs on layer names (`layer1.0.conv1`, `head*`) whose weights are left whole.

    Raises:
        UserError: a glob of `exclude` matches no layer.
    """
    labels = Labels()
    params: dict[str, Tensor] = {}
    tensors: dict[str, list[Tensor]] = {}
    reads: list[tuple[str, int]] = []
    writes: list[tuple[str, int]] = []
    unknown: dict[str, list[str]] = {}
    state = {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers(remove_duplicate=False))}

    def labelled(value: Any) -> Any:
        if isinstance(value, Ref):
            return tensors[value.name][0] if value.name in tensors else None
        if isinstance(value, Param):
            if value.name not in params:
                data = state[value.name]
                fresh = [labels.fresh(n) if n > 1 and data.is_floating_point() else None for n in data.shape]
                params[value.name] = Tensor(tuple(data.shape), tuple(fresh))
            return params[value.name]
        return value

    for node in network.graph.nodes:
        shape = node.meta.get("shape")
        if node.op == "placeholder":
            tensors[node.name] = [Tensor(shape, (None,) * len(shape))]
        elif node.op == "get_attr":
            tensors[node.name] = [labelled(Param(node.target))]
        elif node.op == "output":
            for dim in tensors[node.args[0].name][0].dims:
                labels.freeze(dim, "the network's output")
        elif shape is not None:
            outputs = list(shape) if isinstance(shape, list) else [shape]
            args = node.meta["args"]
            if node.meta["op"] == "getitem":  # picks one of several outputs
                tensors[node.name] = [tensors[args[0].name][args[1]]]
                continue
            names = {i: a.name for i, a in enumerate(args) if isinstance(a, Param)}
            call = Call(node.meta["op"], fx.node.map_aggregate(args, labelled), names, outputs, labels, reads)
            rule = RULES.get(call.op, no_rule)
            if rule is no_rule:
                unknown.setdefault(call.op, []).append(node.name)
            dims = rule(call)
            results = dims if isinstance(dims, list) else [dims]
            tensors[node.name] = [Tensor(s, tuple(d)) for s, d in zip(outputs, results, strict=True)]
            if call.op in WRITERS and 1 in names:
                writes.append((names[1], 0))

    for glob in exclude:
        matched = [name for name in params if fnmatch.fnmatchcase(name.rpartition(".")[0], glob) or fnmatch.fnmatchcase(name, glob)]
        if not matched:
            raise UserError(f"--exclude {glob!r} matches no layer; `s2h inspect` lists the layers' names")
        for name in matched:
            for dim in params[name].dims:
                labels.freeze(dim, f"left whole by --exclude {glob}")
    return Labelled(labels, tensors, params, list(dict.fromkeys(reads)), list(dict.fromkeys(writes)), unknown)


# ---------------------------------------------------------------------------------------------------------------------
# Rules. Each takes a Call and returns the dims of its output (a tuple), or a list of tuples for several outputs.


def no_rule(call: Call) -> list[tuple[Dim, ...]]:
    """An operator nobody described: whatever enters it stays whole."""
    def freeze(value: Any) -> None:
        if isinstance(value, Tensor):
            for dim in value.dims:
                call.labels.freeze(dim, f"no rule for operator {call.op}")
        elif isinstance(value, (list, tuple)):
            for item in value:
                freeze(item)

    freeze(call.args)
    return [(None,) * len(shape or ()) for shape in call.outputs]


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


def like_first(call: Call) -> tuple[Dim, ...]:
    """One input, and the output has its labels."""
    return call.args[0].dims


def spatial(call: Call) -> tuple[Dim, ...]:
    """Pooling, resizing: the last d axes must be unlabelled, d being the operator's (`max_pool2d`: two); the others pass."""
    x = call.args[0]
    channels = len(x.shape) - int(call.op[-2])
    return tuple(dim if i < channels else _stay_whole(call, dim, f"{call.op} over channels") for i, dim in enumerate(x.dims))


def conv(call: Call) -> tuple[Dim, ...]:
    """Reads dim 1 of the weight, writes dim 0."""
    x, weight, bias, *_, groups = call.args
    channels, rows, columns = x.dims[1], weight.dims[0], weight.dims[1]
    for dim in (*x.dims[2:], *weight.dims[2:]):
        call.labels.freeze(dim, "spatial positions of a convolution")
    per_group = weight.shape[1]
    if groups == 1:
        call.labels.join(channels, columns, "input of a layer that cannot be cut")
        _reads(call)
    elif groups >= per_group:  # whole groups are the unit (depthwise: groups of one channel)
        call.labels.freeze(columns, "inside one group of a grouped convolution")
        unit = _tie(call, channels, (groups, per_group), axis=1)
        rows_unit = _tie(call, rows, (groups, -1), axis=1)
        call.labels.join(unit, rows_unit, "input of a grouped convolution that cannot be cut")
    else:  # few wide groups: position j is cut in each of them
        call.labels.join(_tie(call, channels, (groups, per_group), axis=0), columns, "input of a layer that cannot be cut")
        _tie(call, rows, (groups, -1), axis=0)
        _reads(call)
    if bias is not None:
        call.labels.join(rows, bias.dims[0])
    return (x.dims[0], rows, *(None,) * (len(call.shape) - 2))


def linear(call: Call) -> tuple[Dim, ...]:
    x, weight, bias = call.args
    call.labels.join(x.dims[-1], weight.dims[1], "input of a layer that cannot be cut")
    _reads(call)
    if bias is not None:
        call.labels.join(weight.dims[0], bias.dims[0])
    return (*x.dims[:-1], weight.dims[0])


def product(call: Call) -> tuple[Dim, ...]:
    """Matrix product of two activations: how many channels it contracts sets the softmax scale, so they stay."""
    a, b = call.args[:2]
    for dim in (a.dims[-1], b.dims[-2] if len(b.dims) > 1 else b.dims[-1]):
        call.labels.freeze(dim, "contracted between two activations (head dimension of q·k)")
    if len(a.shape) < 2 or len(b.shape) < 2:
        return no_rule(call)[0]
    batch = elementwise(Call(call.op, (Tensor(a.shape[:-2], a.dims[:-2]), Tensor(b.shape[:-2], b.dims[:-2])), {},
                             [call.shape[:-2]], call.labels, call.reads))
    return (*batch, a.dims[-2], b.dims[-1])


def attention(call: Call) -> tuple[Dim, ...]:
    """Scaled dot-product attention: q (…, L, E), k (…, S, E), v (…, S, Ev)."""
    q, k, v, mask = call.args[:4]
    for dim in (q.dims[-1], k.dims[-1]):
        call.labels.freeze(dim, "contracted between two activations (head dimension of q·k)")
    for tokens in (q.dims[-2], k.dims[-2], v.dims[-2]):
        call.labels.freeze(tokens, "tokens of attention")
    heads = [Tensor(t.shape[:-2], t.dims[:-2]) for t in (q, k, v)]
    if q.shape[:-2] != k.shape[:-2]:  # grouped queries: several heads of q share one of k
        for dim in (d for t in heads for d in t.dims):
            call.labels.freeze(dim, "heads of grouped-query attention")
        return (*(None,) * (len(call.shape) - 1), v.dims[-1])
    if mask is not None:
        for tokens in mask.dims[-2:]:
            call.labels.freeze(tokens, "tokens of attention")
        heads.append(Tensor(mask.shape[:-2], mask.dims[:-2]))
    batch = elementwise(Call(call.op, tuple(heads), {}, [call.shape[:-2]], call.labels, call.reads))
    return (*batch, None, v.dims[-1])


def batch_norm(call: Call) -> tuple[Dim, ...]:
    x, *affine = call.args[:5]
    for tensor in affine:
        if tensor is not None:
            call.labels.join(x.dims[1], tensor.dims[0])
    # Statistics of the batch are taken over all other axes.
    return tuple(dim if i == 1 or not call.args[5] else _stay_whole(call, dim, "normalised over channels")
                 for i, dim in enumerate(x.dims))


def layer_norm(call: Call) -> tuple[Dim, ...]:
    x, normalized, *affine = call.args[:4]
    for tensor in affine:
        if tensor is not None:
            for dim, own in zip(x.dims[-len(normalized):], tensor.dims, strict=True):
                call.labels.join(dim, own)
    return x.dims


def group_norm(call: Call) -> tuple[Dim, ...]:
    """The number of norm groups stays; position j is cut in each of them."""
    x, groups, *affine = call.args[:4]
    _tie(call, x.dims[1], (groups, -1), axis=0)
    for tensor in affine:
        if tensor is not None:
            call.labels.join(x.dims[1], tensor.dims[0])
    return x.dims


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


def reduce(call: Call) -> tuple[Dim, ...]:
    """Mean, sum, max over dimensions: these must be unlabelled."""
    x, axes = call.args[0], call.args[1] if len(call.args) > 1 else None
    axes = [axes] if type(axes) is int else axes if isinstance(axes, (list, tuple)) else []  # mean(), var(unbiased), ...: all
    axes = {axis % len(x.shape) for axis in axes or range(len(x.shape))}
    for axis in axes:
        call.labels.freeze(x.dims[axis], f"{call.op} over channels")
    keep = len(call.shape) == len(x.shape)
    return tuple(None if i in axes else dim for i, dim in enumerate(x.dims) if keep or i not in axes)


def along(call: Call) -> tuple[Dim, ...]:
    """Softmax and others that mix one dimension and keep the shape."""
    x, axis = call.args[:2]
    axis %= len(x.shape)
    return tuple(_stay_whole(call, dim, f"{call.op} over channels") if i == axis else dim for i, dim in enumerate(x.dims))


def roll(call: Call) -> tuple[Dim, ...]:
    x, _, axes = call.args
    axes = {axis % len(x.shape) for axis in axes} or set(range(len(x.shape)))
    return tuple(_stay_whole(call, dim, "roll over channels") if i in axes else dim for i, dim in enumerate(x.dims))


def pad(call: Call) -> tuple[Dim, ...]:
    """Axes that are padded, or shifted by a negative pad, must be unlabelled. Pads come in pairs, the last axis first."""
    x, pads = call.args[:2]
    touched = {len(x.shape) - 1 - i // 2 for i, n in enumerate(pads) if n}
    return tuple(_stay_whole(call, dim, "padded channels") if i in touched else dim for i, dim in enumerate(x.dims))


def cat(call: Call) -> tuple[Dim, ...]:
    inputs, axis = call.args[0], call.args[1] if len(call.args) > 1 else 0
    axis %= len(call.shape)
    out = list(elementwise(Call(call.op, tuple(Tensor(_without(t.shape, axis), _without(t.dims, axis)) for t in inputs), {},
                                [_without(call.shape, axis)], call.labels, call.reads)))
    joined = None
    if any(t.dims[axis] is not None for t in inputs):
        joined = np.concatenate([np.full(t.shape[axis], FIXED) if t.dims[axis] is None else t.dims[axis] for t in inputs])
    return (*out[:axis], joined, *out[axis:])


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
    call.labels.freeze(x.dims[axis], "one index picked out of the channels")
    return _without(x.dims, axis % len(x.shape))


def unbind(call: Call) -> list[tuple[Dim, ...]]:
    return [select(Call(call.op, (call.args[0], call.args[1] if len(call.args) > 1 else 0), {}, [s], call.labels, call.reads))
            for s in call.outputs]


def index(call: Call) -> tuple[Dim, ...]:
    """`table[indices]`: the first dimension is picked from, the others pass. Other forms have no rule."""
    x, indices = call.args
    if len(indices) != 1 or not isinstance(indices[0], Tensor):
        return no_rule(call)[0]
    call.labels.freeze(x.dims[0], "indexed")
    return (None,) * len(indices[0].shape) + x.dims[1:]


# ---------------------------------------------------------------------------------------------------------------------
# Helpers of the rules


def _reads(call: Call) -> None:
    """Records that the weight contracts its dim 1 with a labelled dimension. A weight that is computed cannot take a gate."""
    if 1 in call.params:
        call.reads.append((call.params[1], 1))
    else:
        call.labels.freeze(call.args[1].dims[1], "read by a weight that is computed")


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


_ELEMENTWISE = """abs add clamp clone contiguous copy detach div dropout drop_path elu erf exp feature_dropout floor gelu hardsigmoid hardswish
    hardtanh leaky_relu log log1p maximum minimum mish mul neg pow reciprocal relu relu6 rsqrt rsub sigmoid silu sin cos softplus
    sqrt square sub tanh to _to_copy type_as where masked_fill true_divide""".split()

RULES: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), conv),
    "linear": linear,
    "matmul": product, "bmm": product,
    "scaled_dot_product_attention": attention,
    "batch_norm": batch_norm, "layer_norm": layer_norm, "group_norm": group_norm,
    **dict.fromkeys(RESHAPES, reshape),
    "permute": permute, "transpose": transpose, "t": transpose, "expand": expand,
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std"), reduce),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum"), along),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
                     "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"), spatial),
    "roll": roll, "pad": pad, "constant_pad_nd": pad, "cat": cat,
    **dict.fromkeys(("split", "chunk", "split_with_sizes"), split),
    "slice": slice_, "select": select, "unbind": unbind, "index": index,
}

#: Operators whose weight's dim 0 makes the output's channels.
WRITERS = ("conv1d", "conv2d", "conv3d", "linear")
