"""Depth: residual blocks that a network can do without.

A block is a numbered module (`layer1.2`, `blocks.7`) that one tensor enters and one leaves, with the same labels, and through which
the one reaches the other by additions and activations alone. Without the block, what enters it goes on as what leaves it. A *stage* is
a run of such blocks, each fed by the one before; it is shortened from its end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from torch import fx

from .graph import RESHAPES, Ref
from .plan import Space

#: Operators that the way around a block's branches may hold.
SHORTCUT = (*RESHAPES, "add", "relu", "relu6", "hardtanh", "hardswish", "silu", "gelu", "leaky_relu", "clone", "contiguous")

_NUMBERED = re.compile(r"\.?\d+(?=\.|$)")


@dataclass(frozen=True)
class Block:
    """A module, and the nodes whose outputs enter and leave it."""

    name: str
    enters: str
    leaves: str


def stages(network: fx.GraphModule, space: Space) -> list[list[Block]]:
    """The droppable blocks of a network, by stage, in the order of the network."""
    inside: dict[str, list[fx.Node]] = {}
    for node in network.graph.nodes:
        layer = node.meta.get("layer") or ""
        for end in (match.end() for match in _NUMBERED.finditer(layer)):
            inside.setdefault(layer[:end], []).append(node)
    counted = {layer.node for layer in space.layers}
    found = [block for name, nodes in inside.items() if counted & {node.name for node in nodes} and (block := _block(name, nodes, space))]
    found = [block for block in found if not any(other.name.startswith(block.name + ".") for other in found)]  # the innermost
    out: list[list[Block]] = []
    for block in found:
        follows = out and out[-1][-1].leaves == block.enters and _parent(out[-1][-1]) == _parent(block)
        out[-1].append(block) if follows else out.append([block])
    return out


def without(network: fx.GraphModule, blocks: tuple[Block, ...]) -> fx.GraphModule:
    """The network without some of its blocks, on the same tensors; its nodes keep their names. Itself where there are none."""
    if not blocks:
        return network
    graph, nodes = fx.Graph(), {}
    graph.output(graph.graph_copy(network.graph, nodes))
    of_name = {node.name: new for node, new in nodes.items()}
    written = {node.name for node in graph.nodes if not node.users}  # in place, on what others read
    instead: dict[Ref, Ref] = {}  # of what leaves a block, what enters it, or the block before it
    for block in blocks:
        instead[Ref(block.leaves)] = entering = instead.get(Ref(block.enters), Ref(block.enters))
        of_name[block.leaves].replace_all_uses_with(of_name[entering.name])
    for node in graph.nodes:
        if "args" in node.meta:
            node.meta["args"] = fx.node.map_aggregate(node.meta["args"], lambda a: instead.get(a, a) if isinstance(a, Ref) else a)
    for node in reversed(graph.nodes):
        inside = any(f"{node.meta.get('layer')}.".startswith(block.name + ".") for block in blocks)
        if not node.users and node.op != "placeholder" and (inside or node.name not in written):
            graph.erase_node(node)
    out = fx.GraphModule(network, graph, type(network).__name__)
    out.meta.update(network.meta)
    return out.train(network.training)


def shorten(network: fx.GraphModule, space: Space, blocks: tuple[Block, ...]) -> Space:
    """The space of the network without some of its blocks: the same atoms, where those blocks cost nothing. Shares of MACs stay
    shares of the whole network."""
    return space.only(without(network, blocks), blocks)


def _block(name: str, nodes: list[fx.Node], space: Space) -> Block | None:
    mine = set(nodes)
    enters = {arg for node in nodes for arg in node.all_input_nodes if arg not in mine and arg.op != "get_attr" and arg.meta["shape"] is not None}
    leaves = {node for node in nodes for user in node.users if user not in mine}
    if len(enters) != 1 or len(leaves) != 1:
        return None
    (entering,), (leaving,) = enters, leaves
    if isinstance(leaving.meta["shape"], list) or entering.meta["shape"] != leaving.meta["shape"]:
        return None
    if not all(_same(a, b) for a, b in zip(space.tensors[entering.name][0], space.tensors[leaving.name][0])):
        return None
    front, seen = [leaving], set()
    while front:
        node = front.pop()
        if node is entering:
            return Block(name, entering.name, leaving.name)
        if node in mine and node not in seen and node.meta.get("op") in SHORTCUT:
            seen.add(node)
            front += node.all_input_nodes
    return None


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is None and b is None or a is not None and b is not None and np.array_equal(a, b)


def _parent(block: Block) -> str:
    return block.name.rpartition(".")[0]
