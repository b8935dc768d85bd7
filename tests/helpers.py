"""What several test files need: random weights, random plans, and the comparisons that every network must pass."""

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn
from torch.func import functional_call

from s2h_cli import exports
from s2h_cli.cost import count_macs
from s2h_cli.errors import UserError
from s2h_cli.graph import Captured, Param, Ref, capture, tensors_of
from s2h_cli.network_json import WEIGHTS
from s2h_cli.plan import Plan, Space
from s2h_cli.rules import STATISTICS
from s2h_cli.rebuild import insert_gates, kept_indices, rebuild, resize, slice_parameters


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, biases and statistics, none of them zero, of a scale that keeps activations alive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.5 * noise.tanh())
            elif name.endswith("running_mean"):
                tensor.copy_(0.2 * noise)
            elif not isinstance(tensor, nn.Parameter):
                continue  # tables such as masks and positions
            elif tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))
    return module


def settle(network: fx.GraphModule) -> None:
    """Gives batch norms the statistics of random images: with random ones, deep networks amplify rounding."""
    momenta = {module: module.momentum for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    for module in momenta:
        module.momentum = 1.0
    with torch.no_grad():
        network.train()(images(network, network.meta["static_batch"] or 4, seed=1))
    network.eval()
    for module, momentum in momenta.items():
        module.momentum = momentum


def images(network: fx.GraphModule, batch: int | None = None, seed: int = 0) -> torch.Tensor:
    """Random images: `batch` of them, or as many as the network takes, which are three where it takes any number."""
    return torch.randn(batch or network.meta["static_batch"] or 3, *network.meta["input_size"], generator=torch.Generator().manual_seed(seed))


def captured(model: nn.Module, input_size: tuple[int, int, int]) -> Captured:
    """The canonical graph of a randomised model."""
    return capture(randomise(model), input_size)


def random_plan(space: Space, seed: int = 0, share: float = 0.35, only: list[bool] | None = None) -> Plan:
    """Keeps a random share of the atoms of each group (of the groups marked in `only`), at least `step` of them."""
    generator = np.random.default_rng(seed)
    keep = np.ones(space.size, bool)
    for i, group in enumerate(space.groups):
        if only is None or only[i]:
            n = min(group.size, max(group.step, round(share * group.size)))
            keep[group.start:group.stop] = False
            keep[group.start + generator.permutation(group.size)[:n]] = True
    return Plan(space, keep)


def exact_groups(network: fx.GraphModule, space: Space) -> list[bool]:
    """For each group, whether no normalisation takes its mean over these channels: there, cutting equals zeroing."""
    normalised: set[int] = set()
    for node in network.graph.nodes:
        if node.meta.get("op") in NORMS:
            for axis in normalised_axes(node):
                parts = space.tensors[node.args[0].name][0][axis]
                normalised.update([] if parts is None else parts.ravel().tolist())
    return [not normalised.intersection(range(g.start, g.stop)) for g in space.groups]


#: Normalisations that may take statistics over channels; batch norm does of a weight (weight standardisation).
NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "_weight_norm", *STATISTICS)


def normalised_axes(node: fx.Node) -> list[int]:
    """The axes that a normalisation takes its statistics over, but for the batch and space of images."""
    op, args, rank = node.meta["op"], node.meta["args"], len(node.meta["shape"])
    if op in STATISTICS:
        axes = args[2 if "norm" in op else 1]
        rank = len(node.args[0].meta["shape"])
        return [axis % rank for axis in ([axes] if type(axes) is int else axes or range(rank))]
    if op == "group_norm":
        return [1]
    if op == "_weight_norm":
        return [axis for axis in range(rank) if axis != args[2]]
    if op == "batch_norm":
        return [axis for axis in range(rank) if axis != 1] if args[5] else []
    return list(range(rank - len(args[1]), rank))


class Masked(fx.Interpreter):
    """Runs the full network with normalisations that see the kept channels only: the reference where a norm is cut."""

    def __init__(self, network: fx.GraphModule, plan: Plan):
        super().__init__(zero_reads(network, plan))
        self.plan = plan

    def run_node(self, node: fx.Node):
        op = node.meta.get("op")
        dims = self.plan.space.tensors[node.args[0].name][0] if op in NORMS else []
        if op not in NORMS or all(dims[axis] is None for axis in normalised_axes(node)):
            return super().run_node(node)
        (x, *rest), kwargs = self.fetch_args_kwargs_from_env(node)
        args = node.meta["args"]
        if op in STATISTICS:
            for axis in normalised_axes(node):
                if dims[axis] is not None:
                    x = x.index_select(axis, torch.from_numpy(self.plan.kept(dims[axis])).nonzero().squeeze(1))
            return node.target(x, *rest, **kwargs)
        keep = torch.ones_like(x)
        for axis, parts in enumerate(dims):
            if parts is not None:
                shape = [-1 if i == axis else 1 for i in range(x.ndim)]
                keep = keep * torch.from_numpy(self.plan.kept(parts)).reshape(shape)
        if op == "_weight_norm":
            return node.target(x * keep, *rest).nan_to_num(0)  # a row that is cut whole has no length
        if op == "group_norm":
            affine, eps, shape = args[2:4], args[4], (-1, *(1,) * (x.ndim - 2))
            rows = lambda t: t.reshape(len(x), args[1], -1)  # noqa: E731
        elif op == "batch_norm":
            affine, eps, shape = args[1:3], args[7], (-1, *(1,) * (x.ndim - 2))
            rows = lambda t: t.transpose(0, 1).reshape(x.shape[1], -1)  # noqa: E731
        else:
            affine, eps, shape = (args[2:4], args[4], args[1]) if op == "layer_norm" else (args[2:3], args[3], args[1])
            rows = lambda t: t.reshape(*x.shape[:-len(args[1])], -1)  # noqa: E731
        flat, mask = rows(x), rows(keep)
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        centred = flat * mask if op == "rms_norm" else (flat - (flat * mask).sum(-1, keepdim=True) / count) * mask
        y = centred / ((centred ** 2).sum(-1, keepdim=True) / count + (eps or torch.finfo(x.dtype).eps)).sqrt()
        y = y.reshape(x.transpose(0, 1).shape).transpose(0, 1) if op == "batch_norm" else y.reshape(x.shape)
        for tensor, combine in zip(affine, (torch.mul, torch.add)):
            if tensor is not None:
                value = self.env_of(tensor)
                y = combine(y, value.reshape(shape))
        return y

    def env_of(self, reference: Ref | Param) -> torch.Tensor:
        if isinstance(reference, Param):
            return tensors_of(self.module)[reference.name]
        return next(value for node, value in self.env.items() if node.name == reference.name)


def zero_reads(network: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """The full network, deaf to the removed channels."""
    deaf = copy.deepcopy(insert_gates(network, plan.space))
    with torch.no_grad():
        for (name, dim), parts in plan.space.read_parts.items():
            gone = np.flatnonzero(~plan.kept(parts))
            tensors_of(deaf)[name].index_fill_(dim, torch.from_numpy(gone), 0)
    return deaf


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def error_of_cutting(network: fx.GraphModule, plan: Plan, masked: bool = False) -> float:
    """How far the rebuilt network is from the full one with zeroed reads (and, if `masked`, masked norms)."""
    x = images(network)
    with torch.no_grad():
        expected = (Masked(network, plan).run if masked else zero_reads(network, plan))(x)
        assert expected.isfinite().all() and expected.std() > 0
        return relative_error(rebuild(network, plan)(x), expected)


#: fvcore's names for the operators that it calls otherwise.
KINDS = {**dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "conv"), "conv1d": "conv", "conv2d": "conv", "conv3d": "conv"}


def planned_macs(space: Space, widths: np.ndarray) -> dict[str, int]:
    """The plan's MACs by fvcore's operator names."""
    counter: Counter[str] = Counter()
    for layer, macs in zip(space.layers, space.macs.by_row(widths).tolist(), strict=True):
        counter[KINDS.get(layer.kind, layer.kind)] += macs
    return {kind: macs for kind, macs in counter.items() if macs}


def fvcore_macs(network: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    counter: Counter[str] = Counter()
    for kind, macs in count_macs(network, tuple(input_size)).items():
        counter["conv" if kind == "_convolution_mode" else kind] += macs
    return {kind: macs for kind, macs in counter.items() if macs}


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def hard_output(network: fx.GraphModule, small: fx.GraphModule, plan: Plan, x: torch.Tensor) -> torch.Tensor:
    """The output of the hard network as training computes it: a resized skeleton on sliced shared weights."""
    indices = kept_indices(plan)
    resize(small, network, plan, indices)
    return functional_call(small, slice_parameters(dict(network.named_parameters()), indices), (x,))




def verify(small: fx.GraphModule, folder: Path, input_size: tuple[int, int, int]) -> dict[str, float]:
    """The differences of `exports.check` by file, of all artifacts in a run's folder; raises UserError for one that is wrong."""
    names = [WEIGHTS, *(format.file for format in exports.EXPORTS.values())]
    found, wrong = exports.check(small, {name: folder if name == WEIGHTS else folder / name for name in names if (folder / name).exists()}, input_size)
    for name, text in wrong.items():
        raise UserError(f"{folder / name}: {text}")
    return found
