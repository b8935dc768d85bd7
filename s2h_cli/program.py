"""A network made ready for exporters: what they cannot hold, or get wrong, is written in another way that computes the same."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from .graph import tensors_of, to_device


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
        self.model, self.opset = cpu_copy(small), opset
        self.model.meta["static_batch"] = self.model.meta["static_batch"] or batch
        _fold_weights(self.model)
        _unfuse_pads(self.model)
        if half:
            _halve(self.model)
        self.images = random_images(self.model, self.model.meta["static_batch"] or 2)

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
        node.args, node.kwargs = (fx.node.map_aggregate(given, lambda value: torch.float16 if value is torch.float32 else value)
                                  for given in (node.args, node.kwargs))
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


def cpu_copy(network: fx.GraphModule) -> fx.GraphModule:
    return to_device(copy.deepcopy(network), "cpu").eval()


def random_images(network: fx.GraphModule, n: int, input_size: tuple[int, int, int] | None = None) -> torch.Tensor:
    """Random images (n, C, H, W), the same at every call."""
    return torch.randn(n, *(input_size or network.meta["input_size"]), generator=torch.Generator().manual_seed(n))
