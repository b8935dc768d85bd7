"""Cost: MACs and parameters as one formula in the widths of the groups.

The convention is fvcore's: a fused multiply-add counts as one, biases and activations as nothing, batch norm in eval mode as
two per element, layer and group norm as five, adaptive average pooling as one. Scaled dot-product attention, for which fvcore
has no handle, counts as its two matrix products. All figures are for one image.

`FORMULAS` is the table from operator to formula. `CostModel` evaluates it for widths given as a NumPy array or as a torch
tensor, differentiably; `count_macs` is fvcore's own count of a real network, which must agree.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from .graph import RECURRENT
from .labels import Dim
from .rules import Tensor, einsum_axes

Axis = tuple[int, Dim]
#: A product: a constant times the number of kept indices of each axis.
Product = tuple[float, list[Axis]]


def _axes(tensor: Tensor, start: int = 0, stop: int | None = None) -> list[Axis]:
    return list(zip(tensor.shape, tensor.dims))[start:stop]


def _weighted(args: tuple, out: Tensor) -> list[Product]:
    """Of a convolution or a linear layer: each output sums over all that one row of the weight reads."""
    return [(1, _axes(out) + _axes(args[1], 1))]


def _matmul(args: tuple, out: Tensor) -> list[Product]:
    return [(1, _axes(out) + _axes(args[0], -1))]


def _add_product(args: tuple, out: Tensor) -> list[Product]:
    return _matmul(args[1:], out)


def _attention(args: tuple, out: Tensor) -> list[Product]:
    q, k, _, *_ = args
    return [(1, _axes(q) + _axes(k, -2, -1)), (1, _axes(out) + _axes(k, -2, -1))]


def _einsum(args: tuple, out: Tensor) -> list[Product]:
    return [(1, _axes(out) + _contracted(args[0], [_axes(t) for t in args[1]], [t.shape for t in args[1]]))]


def _recurrent(args: tuple, out: Tensor) -> list[Product]:
    return [(1, _axes(args[0], 0, -1) + _axes(weight)) for weight in args[2] if len(weight.shape) == 2]


def _batch_norm(args: tuple, out: Tensor) -> list[Product]:
    affine, training = args[1] is not None, args[5]
    return [(4 + affine if training else 1 + affine, _axes(out))]


def _norm(args: tuple, out: Tensor) -> list[Product]:
    return [(4 if args[2] is None else 5, _axes(out))]


def _instance_norm(args: tuple, out: Tensor) -> list[Product]:
    return [(4 if args[1] is None else 5, _axes(out))]


def _transposed_conv(args: tuple, out: Tensor) -> list[Product]:
    return [(1, _axes(args[0]) + _axes(args[1], 1))]


def _contracted(equation: str, operands: list[list[Any]], shapes: list[tuple[int, ...]]) -> list[Any]:
    """What is given for each axis of the operands of an einsum: of those axes that its output lacks."""
    inputs, output = einsum_axes(equation, shapes)
    found = {name: axis for names, axes in zip(inputs, operands) for name, axis in zip(names, axes)}
    return [axis for name, axis in found.items() if name not in output]


FORMULAS: dict[str, Callable[[tuple, Tensor], list[Product]]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), _weighted), "matmul": _matmul, "bmm": _matmul,
    "addmm": _add_product, "baddbmm": _add_product,
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_conv),
    "einsum": _einsum, "scaled_dot_product_attention": _attention,
    **dict.fromkeys(RECURRENT, _recurrent),
    "batch_norm": _batch_norm, "layer_norm": _norm, "group_norm": _norm, "instance_norm": _instance_norm,
    "adaptive_avg_pool2d": lambda args, out: [(1, _axes(args[0]))],
    "grid_sampler": lambda args, out: [(4, _axes(out))],
    "upsample_nearest2d": lambda args, out: [(1, _axes(out))],
    "upsample_bilinear2d": lambda args, out: [(4, _axes(out))],
}


def channel_axis(op: str) -> int:
    """The axis that holds the channels of what an operator takes and gives."""
    return 1 if op.startswith(("conv", "batch_norm", "group_norm", "instance", "adaptive", "upsample")) else -1


class Count(NamedTuple):
    """Number of kept indices of an axis: the sum over terms of a coefficient times the widths of some groups."""

    terms: tuple[tuple[float, tuple[int, ...]], ...]


@dataclass
class CostModel:
    """Evaluates sums of products of counts. Index arrays are padded: count `len(counts)` and width `groups` are 1.

    `owner[i]` is the row (a layer, a parameter) that product i belongs to.
    """

    groups: int
    rows: int
    coefficients: np.ndarray  # (products,)
    owner: np.ndarray  # (products,)
    factors: np.ndarray  # (products, k) into counts
    term_coefficients: np.ndarray  # (terms,)
    term_owner: np.ndarray  # (terms,) into counts
    term_factors: np.ndarray  # (terms, m) into widths
    counts: int
    products: list[list[tuple[float, list[Count]]]]  # of each row, as it was built
    _on_device: dict[torch.device, list[torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def build(cls, groups: int, rows: list[list[tuple[float, list[Count]]]]) -> "CostModel":
        """From rows of (constant, counts of its axes)."""
        index: dict[Count, int] = {}
        products = [(constant, [index.setdefault(c, len(index)) for c in counts], i)
                    for i, row in enumerate(rows) for constant, counts in row]
        terms = [(coefficient, list(factors), i) for count, i in index.items() for coefficient, factors in count.terms]
        return cls(groups, len(rows), np.array([p[0] for p in products], float), np.array([p[2] for p in products], int),
                   _padded([p[1] for p in products], len(index)), np.array([t[0] for t in terms], float),
                   np.array([t[2] for t in terms], int), _padded([t[1] for t in terms], groups), len(index), rows)

    def only(self, rows: np.ndarray) -> "CostModel":
        """The same rows, of which those that are not in the boolean array (rows,) cost nothing."""
        return replace(self, coefficients=np.where(rows[self.owner], self.coefficients, 0.0), _on_device={})

    def by_row(self, widths: np.ndarray) -> np.ndarray:
        """Cost of each row for integer widths (groups,): exact integers."""
        wide = np.append(np.asarray(widths, float), 1.0)
        counts = np.bincount(self.term_owner, self.term_coefficients * wide[self.term_factors].prod(1), self.counts)
        products = self.coefficients * np.append(counts, 1.0)[self.factors].prod(1)
        return np.rint(np.bincount(self.owner, products, self.rows)).astype(np.int64)

    def total(self, widths: np.ndarray) -> int:
        return int(self.by_row(widths).sum())

    def differentiable(self, widths: torch.Tensor) -> torch.Tensor:
        """Total cost, a float64 scalar, for real widths (groups,)."""
        owner, coefficients, factors, product_coefficients, product_factors = self._tensors(widths.device)
        one = widths.new_ones(1, dtype=torch.float64)
        terms = coefficients * product(torch.cat([widths.double(), one])[factors])
        counts = torch.cat([one.new_zeros(self.counts).index_add(0, owner, terms), one])
        return (product_coefficients * product(counts[product_factors])).sum()

    def _tensors(self, device: torch.device) -> list[torch.Tensor]:
        """The arrays as tensors, moved to a device once."""
        if device not in self._on_device:
            arrays = (self.term_owner, self.term_coefficients, self.term_factors, self.coefficients, self.factors)
            self._on_device[device] = [torch.from_numpy(a).to(device) for a in arrays]
        return self._on_device[device]


def product(rows: torch.Tensor) -> torch.Tensor:
    """Product of each row of (n, k), (n,). Unlike that of `prod`, its gradient does not make the processor wait for a GPU."""
    return functools.reduce(torch.mul, rows.unbind(1))


def _padded(rows: list[list[int]], padding: int) -> np.ndarray:
    width = max(map(len, rows), default=1) or 1
    return np.array([row + [padding] * (width - len(row)) for row in rows], int).reshape(len(rows), width)


def count_macs(network: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """fvcore's own count of a real network in eval mode, by operator, for one image of (C, H, W).

    The sum over operators is `FlopCountAnalysis(network, x).total()` with handles for what fvcore passes over or only
    estimates: attention, convolutions padded by name ("same"), einsum, and products that broadcast.
    """
    parameter = next(network.parameters())
    analysis = FlopCountAnalysis(network.eval(), torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    analysis.set_op_handle(**{
        "aten::scaled_dot_product_attention": _attention_handle,
        "aten::_convolution_mode": lambda i, o: math.prod(_sizes(o[0])) * math.prod(_sizes(i[1])[1:]),
        "aten::matmul": lambda i, o: math.prod(_sizes(o[0])) * _sizes(i[0])[-1],
        "aten::baddbmm": lambda i, o: math.prod(_sizes(o[0])) * _sizes(i[1])[-1],
        **dict.fromkeys((f"aten::{op}" for op in RECURRENT), _recurrent_handle),
        "aten::einsum": lambda i, o: math.prod(_sizes(o[0])) * math.prod(
            _contracted(i[0].toIValue(), *[[_sizes(value) for value in i[1].node().inputs()]] * 2)),
    })
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: int(macs) for name, macs in analysis.by_operator().items()}


def _sizes(value: Any) -> list[int]:
    """Shape of a traced value."""
    return value.type().sizes()


def _attention_handle(inputs: list[Any], outputs: list[Any]) -> int:
    q, k, v = map(_sizes, inputs[:3])
    return math.prod(q) * k[-2] + math.prod(q[:-1]) * k[-2] * v[-1]


def _recurrent_handle(inputs: list[Any], outputs: list[Any]) -> int:
    weights = [_sizes(value) for value in inputs[2].node().inputs()]
    return sum(math.prod(_sizes(inputs[0])[:-1]) * math.prod(w) for w in weights if len(w) == 2)
