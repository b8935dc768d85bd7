"""Latency: how long networks take on this machine, in the formats that people run them in.

`FORMATS` is the table of formats. Networks that are compared take turns, block by block, so that whatever else the machine does
hits all of them alike.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, ContextManager, Iterator

import numpy as np
import torch
from torch import fx, nn
from torch.utils.benchmark import Timer

from . import exports
from .errors import UserError, why
from .graph import tensors_of, to_device
from .network_json import network_from_json, network_to_json
from .program import Program

Call = Callable[[], Any]

#: A block of calls takes at least so long, so that the clock's own noise does not count; and blocks of each network, at least.
BLOCK_SECONDS = 0.02
LEAST_BLOCKS = 7
#: Seconds of each network until all are made anew: where they lie in memory moves shares by a tenth, and they would lie there to the end.
PLACED_SECONDS = 0.5
#: Formats in which they are not made anew: a compiler would take minutes.
STAY = ("compile",)


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over blocks: the median and the quartiles."""

    low: float
    median: float
    high: float
    blocks: int

    @classmethod
    def of(cls, blocks: list[float]) -> Timing:
        return cls(*np.quantile(blocks, [0.25, 0.5, 0.75]).tolist(), len(blocks))


def interleaved(calls: dict[str, Call], seconds: float, threads: int) -> dict[str, list[float]]:
    """Times calls in turn, for about `seconds` in all and at least once there and back, after a warm-up of each.

    Args:
        calls: what to time, by name.
        threads: of torch's operators on the CPU.

    Returns:
        For each, seconds a call of each block; the i-th blocks of all were timed one after the other.
    """
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()}
    once = {name: min(timer.timeit(2).mean for _ in range(2)) for name, timer in timers.items()}
    number = {name: max(1, math.ceil(BLOCK_SECONDS / each)) for name, each in once.items()}
    found: dict[str, list[float]] = {name: [] for name in timers}
    ends = time.perf_counter() + seconds
    while not any(found.values()) or time.perf_counter() < ends:
        for name in [*timers, *reversed(timers)]:  # each is first as often as last
            found[name].append(timers[name].timeit(number[name]).mean)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Formats


@dataclass(frozen=True)
class Place:
    """Where networks run."""

    device: torch.device
    threads: int


def describe(device: torch.device, threads: int) -> str:
    """A device by its name, and the threads where it is a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


class Subject:
    """A network to time.

    Args:
        name: what the user calls it.
        input_size: (C, H, W) of its images.
        network: it as a module on the CPU; None where there is but a file.
        batch: images that it takes at a time, where that is fixed.
        files: it in other formats of `exports.EXPORTS`. What is missing is exported, where `network` is one of ours, and kept as long as this is.
    """

    def __init__(self, name: str, input_size: tuple[int, int, int], network: fx.GraphModule | None = None, files: dict[str, Path] | None = None,
                 batch: int | None = None):
        self.batch = batch or (network.meta.get("static_batch") if network is not None else None)
        self.name, self.input_size, self.network, self.files = name, tuple(input_size), network, dict(files or {})
        self._program: Program | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    def __reduce__(self) -> tuple:
        """As data (see `network_json`): `torch.fx` would trace the network anew. Files go by their paths, so exports serve while this one lives."""
        network = None if self.network is None else (network_to_json(self.network), {name: t.detach() for name, t in tensors_of(self.network).items()})
        return _subject, (self.name, self.input_size, network, self.files, self.batch)

    @property
    def formats(self) -> list[str]:
        """Those that it can be timed in."""
        if self.network is not None and "static_batch" in self.network.meta:
            return list(FORMATS)
        needs = {"torchscript": "torchscript", "onnx": "onnx", "openvino": "onnx"}
        return [name for name in FORMATS if (needs[name] in self.files if name in needs else self.network is not None)]

    def check(self, batch: int) -> None:
        """Raises UserError for a batch that it cannot take."""
        if self.batch not in (None, batch):
            raise UserError(f"it takes {self.batch} image{'s' * (self.batch > 1)} at a time: --batch {self.batch}")

    def module(self, device: torch.device) -> nn.Module:
        """A copy on the device."""
        return _copy_on(self.network, device)

    def file(self, format: str) -> Path:
        if format not in self.files:
            self._program = self._program or Program(self.network)
            self._folder = self._folder or tempfile.TemporaryDirectory()
            self.files[format] = exports.export(self._program, Path(self._folder.name), format)
        return self.files[format]


def _subject(name: str, input_size: tuple[int, int, int], network: tuple[dict, dict[str, torch.Tensor]] | None, files: dict[str, Path],
             batch: int | None) -> Subject:
    """The inverse of `Subject.__reduce__`."""
    return Subject(name, input_size, network and network_from_json(*network, trust=True), files, batch)  # of this process's own making


def _copy_on(network: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    return to_device(copy.deepcopy(network), device).eval()


def _eager(subject: Subject, images: torch.Tensor, place: Place) -> Call:
    network = subject.module(place.device)
    return lambda: network(images)


def _compiled(subject: Subject, images: torch.Tensor, place: Place) -> Call:
    network = torch.compile(subject.module(place.device))
    network(images)
    return lambda: network(images)


def _torchscript(subject: Subject, images: torch.Tensor, place: Place) -> Call:
    network = torch.jit.load(str(subject.file("torchscript")), map_location=place.device).eval()
    for _ in range(3):  # its executor profiles first, then optimizes
        network(images)
    return lambda: network(images)


def _onnx(subject: Subject, images: torch.Tensor, place: Place) -> Call:
    session = exports.onnx_session(subject.file("onnx"), threads=place.threads, cuda=place.device.type == "cuda")
    feed = {session.get_inputs()[0].name: images.cpu().numpy()}
    return lambda: session.run(None, feed)


def _openvino(subject: Subject, images: torch.Tensor, place: Place) -> Call:
    import openvino

    if place.device.type != "cpu":
        raise UserError("OpenVINO is timed on the CPU alone")
    model = openvino.Core().compile_model(str(subject.file("onnx")), "CPU", {"INFERENCE_NUM_THREADS": place.threads})
    request, feed = model.create_infer_request(), [images.numpy()]
    return lambda: request.infer(feed)


#: What makes a call of a network, of images (N, C, H, W) on the device.
FORMATS: dict[str, Callable[[Subject, torch.Tensor, Place], Call]] = {
    "eager": _eager,
    "compile": _compiled,
    "torchscript": _torchscript,
    "onnx": _onnx,
    "openvino": _openvino,
}


def installed() -> list[str]:
    """The formats that this machine has the packages for."""
    return [name for name in FORMATS if name != "openvino" or importlib.util.find_spec("openvino")]


def compare(subjects: list[Subject], formats: list[str], batches: list[int], device: torch.device, threads: int, seconds: float = 2.0,
            told: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Times networks against each other.

    Args:
        formats: keys of `FORMATS`.
        threads: of the CPU.
        seconds: for one format at one batch size, shared by the networks.
        told: is told what is being timed.

    Returns:
        A row, plain data, for each format, batch and network that offers the format: {format, batch, network, timing, share}, a `Timing` as
        dict and the share of the first network's time (median by median), or {format, batch, network, failed}, the reason in one line.
    """
    rows = []
    with torch.inference_mode(), exports.quiet(), _threads(threads), _current(device):
        place = Place(device, threads)
        for format in formats:
            for batch in batches:
                told(f"{format}, batch {batch}")
                offered = [subject for subject in subjects if format in subject.formats]
                timed, failed = blocks_of(offered, format, batch, place, seconds)
                timings = {name: Timing.of(blocks) for name, blocks in timed.items()}
                found = {name: {"timing": asdict(timing), "share": timing.median / next(iter(timings.values())).median} for name, timing in timings.items()}
                found |= {name: {"failed": reason} for name, reason in failed.items()}
                rows += [{"format": format, "batch": batch, "network": subject.name, **found[subject.name]} for subject in offered]
                torch._dynamo.reset()
    return rows


def blocks_of(subjects: list[Subject], format: str, batch: int, place: Place, seconds: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds a call of each block of each network, which are made anew, elsewhere in memory, after `PLACED_SECONDS`; and why those that
    cannot be run cannot."""
    blocks: dict[str, list[float]] = defaultdict(list)
    calls, failed = {}, {}
    ends = time.perf_counter() + seconds
    while not blocks or time.perf_counter() < ends or any(len(own) < LEAST_BLOCKS for own in blocks.values()):
        for subject in subjects:
            if subject.name in failed or subject.name in calls and format in STAY:
                continue
            try:
                subject.check(batch)
                calls[subject.name] = FORMATS[format](subject, torch.randn(batch, *subject.input_size, device=place.device), place)
                calls[subject.name]()
            except Exception as error:  # compilers and runtimes raise whatever they like
                for kept in (calls, blocks):
                    kept.pop(subject.name, None)
                failed[subject.name] = str(error) if isinstance(error, UserError) else why(error)
        if not calls:
            break
        for name, own in interleaved(calls, min(seconds, PLACED_SECONDS * len(calls)), place.threads).items():
            blocks[name] += own
    return blocks, failed


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _current(device: torch.device) -> ContextManager:
    """Makes a GPU the one that torch's timer waits for."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Where the time goes


#: Kinds of operators, and what bounds each; the first that holds counts.
KINDS: dict[str, Callable[[nn.Module | None, str], bool]] = {
    "depthwise convolutions": lambda layer, name: isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.in_channels > 1,
    "convolutions": lambda layer, name: isinstance(layer, nn.modules.conv._ConvNd) or name.startswith("conv"),
    "linear layers": lambda layer, name: isinstance(layer, nn.Linear) or name == "linear",
    "attention and matrix products": lambda layer, name: name in ("scaled_dot_product_attention", "matmul", "bmm", "einsum"),
    "norms": lambda layer, name: "norm" in (type(layer).__name__ if layer else name).lower(),
    "the rest, element by element": lambda layer, name: True,
}


def kind_of(network: fx.GraphModule, node: fx.Node) -> str:
    """The key of `KINDS` for a node that computes something."""
    layer = network.get_submodule(node.target) if node.op == "call_module" else None
    name = getattr(node.target, "__name__", str(node.target))
    return next(kind for kind, holds in KINDS.items() if holds(layer, name))


class _Clocked(fx.Interpreter):
    """Runs a network node by node, and keeps the seconds of each that computes something."""

    def __init__(self, network: fx.GraphModule):
        super().__init__(network)
        self.seconds: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        started = time.perf_counter()
        out = super().run_node(n)
        if isinstance(out, torch.Tensor) and out.is_cuda:
            torch.cuda.synchronize(out.device)
        if n.op not in ("placeholder", "get_attr", "output"):
            self.seconds[n.name] = time.perf_counter() - started
        return out


def by_node(network: fx.GraphModule, batch: int, device: torch.device, threads: int, rounds: int) -> dict[str, float]:
    """Seconds that one batch spends in each operator, in eager mode, by the name of its node: the median over rounds, after one to warm up."""
    found: dict[str, list[float]] = defaultdict(list)
    network = _copy_on(network, device)
    images = torch.randn(batch, *network.meta["input_size"], device=device)
    with torch.inference_mode(), _threads(threads):
        for i in range(rounds + 1):
            clocked = _Clocked(network)
            clocked.run(images)
            for name, seconds in clocked.seconds.items() if i else ():
                found[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def by_kind(network: fx.GraphModule, batch: int, device: torch.device, threads: int, rounds: int = 5) -> dict[str, float]:
    """The same by kind of operator."""
    nodes = {node.name: node for node in network.graph.nodes}
    found: dict[str, float] = defaultdict(float)
    for name, seconds in by_node(network, batch, device, threads, rounds).items():
        found[kind_of(network, nodes[name])] += seconds
    return {kind: found[kind] for kind in KINDS if kind in found}
