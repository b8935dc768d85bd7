"""Other formats: `EXPORTS` is the table of how each is written and how it is run; `verify` runs what was written."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import warnings
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import torch
from torch import fx

from . import schema
from .artifacts import load
from .errors import UserError, why
from .files import CannotWrite, cannot_write, whole, writing
from .network_json import CALLABLES
from .program import Program, cpu_copy, random_images

#: Where the metadata lie: an extra file of TorchScript and pt2, a property of ONNX.
METADATA = "s2h.json"
#: How much of JSON is read from an exported file, in bytes: the names of some hundred thousand classes.
JSON_BYTES = 1 << 24
#: The most that protobuf, and so an ONNX file, can hold; more weights lie beside it.
ONNX_BYTES = 1 << 31
#: Operators of ONNX that run others, and perhaps without end.
CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
#: The least opset that torch's exporter writes by itself.
EXPORTERS_OPSET = 18
#: The largest difference from the network that `check` lets pass, relative to the largest logit.
TOLERANCE = 1e-4
#: The same where it computes in float16, whose last place is 1e-3 of a number: a deep network that is hardly trained adds it up to 5e-2.
HALF_TOLERANCE = 0.1
#: A network that is hardly trained adds up float32's rounding too: so many times what it does to the network itself may pass.
ROUNDING = 4

Run = Callable[[torch.Tensor], torch.Tensor]


def _write_torchscript(program: Program, file: Path, metadata: str) -> None:
    model, images = cpu_copy(program.model), program.images
    _remember_sizes(model)
    traced = torch.jit.trace(model, images, check_trace=False)
    if model.meta["static_batch"] is None:
        three = random_images(model, 3)
        try:
            free = _difference(traced(three), model(three)) <= TOLERANCE
        except RuntimeError:  # its first line says nothing
            free = False
        if not free:
            raise RuntimeError("tracing fixed the batch size")
    with whole(file) as sink:
        torch.jit.save(traced, sink, _extra_files={METADATA: metadata})


def _remember_sizes(model: fx.GraphModule) -> None:
    """Tracing takes a size that is an argument of a `torch.ops` call for a constant; the plain function of that name does not."""
    sizes: set[fx.Node] = set()
    for node in model.graph.nodes:
        inputs = set(node.all_input_nodes)
        if (node.op, node.target) == ("call_method", "size") or (inputs and inputs <= sizes and node.target in CALLABLES.values()):
            sizes.add(node)
        elif inputs & sizes and isinstance(node.target, torch._ops.OpOverload):
            name = node.target._opname
            node.target = getattr(torch, name, None) or getattr(torch.Tensor, name, node.target)
    model.recompile()


def _write_onnx(program: Program, file: Path, metadata: str) -> None:
    import onnx

    free = ({0: "batch"},) if program.model.meta["static_batch"] is None else None  # the batch is free already: this names it
    lower = program.opset is not None and program.opset < EXPORTERS_OPSET
    for optimize in (True, False):  # the exporter's own rewriting breaks some networks
        written = torch.onnx.export(program.exported, dynamo=True, input_names=["images"], output_names=["logits"], dynamic_shapes=free,
                                    verbose=False, optimize=optimize, opset_version=EXPORTERS_OPSET if lower else program.opset)
        if not lower and program.opset not in (None, got := written.model.opset_imports[""]):
            raise RuntimeError(f"the exporter wrote opset {got}, not {program.opset}; leave --opset away or give one that it knows")
        written.model.metadata_props[METADATA] = metadata
        if lower:
            onnx.save(_lowered(written.model_proto, program.opset), file)
        else:
            written.save(str(file))  # weights inside, unless they are too much for one file
        try:
            _run_onnx(file)
            return
        except Exception as error:  # onnxruntime raises whatever it likes
            refusal = error
    raise refusal


def _lowered(model: Any, opset: int) -> Any:
    """An ONNX model at an opset below the exporter's least, by ONNX's converter: it wants the axes of reductions as constants of the graph, and leaves
    an attribute of theirs that older opsets do not know."""
    import onnx

    reductions = [node for node in model.graph.node if node.op_type.startswith("Reduce")]
    axes = {name for node in reductions for name in node.input[1:]}
    moved = [tensor for tensor in model.graph.initializer if tensor.name in axes]
    for tensor in moved:
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    for node in reductions:
        kept = [attribute for attribute in node.attribute if attribute.name != "noop_with_empty_axes" or attribute.i]
        del node.attribute[:]
        node.attribute.extend(kept)
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # the converter raises C++'s errors
        raise RuntimeError(f"ONNX's converter cannot take this network down to opset {opset} ({why(error)}); from {EXPORTERS_OPSET} on it is not needed") from None


def _write_pt2(program: Program, file: Path, metadata: str) -> None:
    exported = program.exported
    with whole(file) as sink:
        torch.export.save(exported, sink, extra_files={METADATA: metadata})


def _run_torchscript(file: Path) -> Run:
    return torch.jit.load(str(file), map_location="cpu").eval()


def onnx_session(file: Path, threads: int = 0, cuda: bool = False) -> Any:
    """An ONNX Runtime session, on a GPU or on so many threads of the CPU (0: on all).

    Raises:
        UserError: a GPU is asked for, and this ONNX Runtime has none.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, too
    options.intra_op_num_threads = threads
    if cuda and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise UserError("this onnxruntime is for CPUs; install onnxruntime-gpu")
    return onnxruntime.InferenceSession(str(file), options, providers=["CUDAExecutionProvider" if cuda else "CPUExecutionProvider"])


def _run_onnx(file: Path) -> Run:
    _refuse_outside(file)
    session = onnx_session(file)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _refuse_outside(file: Path) -> None:
    """Refuses an ONNX file whose weights lie elsewhere than beside it, or that has what s2h never writes and what can run without end."""
    import onnx

    model = _onnx_model(file)
    if model.functions:
        raise RuntimeError("it defines functions of its own, which s2h writes none of")
    folder = file.resolve().parent
    for message in _messages(model):
        if isinstance(message, onnx.NodeProto) and message.op_type in CONTROL_FLOW:
            raise RuntimeError(f"it has the operator {message.op_type}, which could run without end; s2h writes none")
        if isinstance(message, onnx.TensorProto) and message.data_location == onnx.TensorProto.EXTERNAL:
            location = next((entry.value for entry in message.external_data if entry.key == "location"), "")
            beside = folder / location
            if not location or Path(location).is_absolute() or beside.is_symlink() or beside.resolve().parent != folder or not beside.is_file():
                raise RuntimeError(f"it reads weights from {location!r}, which is no file beside it")


def _onnx_model(file: Path) -> Any:
    """An ONNX file, without weights that lie in other files."""
    import onnx

    if file.stat().st_size > ONNX_BYTES:
        raise RuntimeError(f"it is larger than an ONNX file can be ({ONNX_BYTES >> 30} GiB)")
    return onnx.load(str(file), load_external_data=False)


def _messages(message: Any) -> Iterator[Any]:
    """The messages inside a protobuf message, at any depth."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield inner
                yield from _messages(inner)


def _run_pt2(file: Path) -> Run:
    """No pickle is loaded, but `torch.export.load` evaluates the sizes' formulas in the file."""
    _refuse_pickles(file)
    # `torch.export.load` falls back to unsafe unpickling of the example inputs; torch's own switch forbids it.
    with _environment("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"):
        return torch.export.load(file).module()


def _refuse_pickles(file: Path) -> None:
    """Refuses a pt2 file with weights or constants that `torch.export.load` would unpickle; `export` writes none."""
    with zipfile.ZipFile(file) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
        configs = [json.loads(_member(archive, name)) for name in archive.namelist()
                   if re.search(r"/data/(weights|constants)/[^/]*config\.json$", name)]
    payloads = [payload for config in configs for payload in config["config"].values()]
    if (not configs or any(re.fullmatch(r"data/(weights|constants)/[^/]*\.pt", name) for name in names)
            or any(p["use_pickle"] or not p["path_name"].startswith(("weight_", "tensor_")) for p in payloads)):
        raise RuntimeError("it contains pickled data, which could run any code")


class Format(NamedTuple):
    """A format of `EXPORTS`: its file in a run folder; `write(program, file, metadata)`; `run(file)`; what a file of a stranger could do
    when it is loaded, if it is more than data."""

    file: str
    write: Callable[[Program, Path, str], None]
    run: Callable[[Path], Run]
    danger: str = ""


EXPORTS: dict[str, Format] = {
    "torchscript": Format("model.ts", _write_torchscript, _run_torchscript, "a TorchScript file is a program, which can read and write files"),
    "onnx": Format("model.onnx", _write_onnx, _run_onnx),
    "pt2": Format("model.pt2", _write_pt2, _run_pt2, "loading a pt2 file evaluates expressions in it, which can run any code"),
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
        CannotWrite: the file cannot be written.
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
            if isinstance(cause, OSError):
                raise cannot_write(file.parent, cause) from error
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


def checked_format(path: Path) -> str:
    """The format of an exported file.

    Raises:
        UserError: there is no such file, or its name is of no format.
    """
    endings = ", ".join(Path(f.file).suffix for f in EXPORTS.values())
    if not path.is_file():
        raise UserError(f"{path}: no such file or run; give a run's folder, or a file that ends in {endings}")
    if (format := format_of(path)) is None:
        raise UserError(f"{path}: not an artifact; give the run's folder, or a file that ends in {endings}")
    return format


def check_trust(path: Path, trust: bool) -> str:
    """The format of an exported file that may be loaded.

    Raises:
        UserError: there is no such file, its ending is unknown, or it could run code and is not trusted.
    """
    format = checked_format(path)
    if (danger := EXPORTS[format].danger) and not trust:
        raise UserError(f"{path} is not loaded: {danger}; add --trust if you made it or trust who did, or give the run's folder, which is data")
    return format


def load_artifact(path: str | os.PathLike, trust: bool = False) -> Run:
    """What runs a run folder or an exported file; a module, but for ONNX.

    Args:
        trust: load formats that can run code, too: for files that this process wrote, or whose origin the user trusts.

    Raises:
        UserError: there is no such file, its ending is unknown, it could run code and is not trusted, or it cannot be loaded.
    """
    path = Path(path)
    if path.is_dir():
        return load(path, trust)
    format = check_trust(path, trust)
    try:
        with quiet():
            return EXPORTS[format].run(path)
    except ImportError as error:
        raise UserError(f"{path}: running it needs the package {error.name}; install it with pip") from error
    except Exception as error:  # loaders raise whatever they like
        raise UserError(f"{path}: cannot be loaded: {why(error)}; export it again") from error


def run_artifact(path: str | os.PathLike, trust: bool = False) -> Run:
    """A function from images (N, C, H, W), float32 on the CPU, to logits (N, classes), for a run folder or an exported file.

    The function raises UserError where the network fails on images, or gives something else than logits.

    Args:
        trust: as of `load_artifact`.

    Raises:
        UserError: as of `load_artifact`.
    """
    run = load_artifact(path, trust)

    @torch.no_grad()
    def checked(images: torch.Tensor) -> torch.Tensor:
        try:
            logits = run(images)
        except Exception as error:  # runtimes raise whatever they like
            raise UserError(f"{path}: fails on images of {tuple(images.shape)}: {why(error)}") from error
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(images) or not logits.is_floating_point():
            got = f"{logits.dtype} of {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise UserError(f"{path}: gives {got} for {len(images)} images, not their logits; export it again")
        return logits

    return checked


def read_metadata(path: str | os.PathLike) -> dict:
    """The metadata given to `export`, which no code of the file is run for; empty for a file of other origin.

    Raises:
        UserError: the file cannot be read, or its metadata are not those that s2h writes.
    """
    path = Path(path)
    format = checked_format(path)
    try:
        if format == "onnx":
            text = next((p.value for p in _onnx_model(path).metadata_props if p.key == METADATA), "{}")
        else:
            with zipfile.ZipFile(path) as archive:
                name = next((n for n in archive.namelist() if n.endswith(f"/extra/{METADATA}")), None)
                text = _member(archive, name).decode() if name else "{}"
        if len(text) > JSON_BYTES:
            raise ValueError("its metadata are too long")
        return schema.check(schema.Metadata, schema.parse_json(text, METADATA), METADATA)
    except Exception as error:  # a broken file makes the readers raise whatever they like
        raise UserError(f"{path}: cannot be read: {why(error)}; export it again") from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A file in an archive, of a bounded size: a small archive can hold a huge one."""
    with archive.open(name) as file:
        content = file.read(JSON_BYTES + 1)
    if len(content) > JSON_BYTES:
        raise ValueError(f"{name} in it is too long")
    return content


def export_all(program: Program, folder: Path, formats: Iterable[str], metadata: dict, kind: str = "") -> tuple[dict[str, Path], list[str]]:
    """Writes several formats into a folder; one that fails does not cost the others.

    Args:
        kind: as of `file_of`.

    Returns:
        The files by name; and why others are not there, a line each.
    """
    files, failed = {}, []
    for format in formats:
        try:
            file = export(program, folder / file_of(format, kind), format, metadata)
            files[file.name] = file
        except CannotWrite:  # nor can the others
            raise
        except UserError as error:
            failed.append(str(error))
    return files, failed


def check(small: fx.GraphModule, paths: dict[str, Path], input_size: tuple[int, int, int], *, batch: int | None = None,
          tolerance: float = TOLERANCE) -> tuple[dict[str, float], dict[str, str]]:
    """Loads artifacts and compares them: see `verify`.

    Args:
        paths: run folders or exported files, by name.
        batch: images that they take at a time, where that is fixed.

    Returns:
        The differences of those that are right, and what is wrong with each that is not, by name.
    """
    model = cpu_copy(small)
    only = batch or model.meta["static_batch"]
    images = [random_images(model, n, input_size) for n in ([only] if only else [1, 5])]
    with torch.no_grad():
        expected = [model(x) for x in images]
    found, wrong = {}, {}
    for name, path in paths.items():
        try:
            difference = _furthest(run_artifact(path, trust=True), images, expected)
        except UserError as error:
            wrong[name] = str(error).removeprefix(f"{path}: ")
        except Exception as error:  # runtimes raise whatever they like
            wrong[name] = f"fails on random images: {why(error)}"
        else:
            if difference > tolerance:
                tolerance = max(tolerance, min(ROUNDING * _rounding(model, images, expected), HALF_TOLERANCE))
            if difference <= tolerance:
                found[name] = difference
            else:
                wrong[name] = f"its logits differ from the network's by {difference:.1e} of the largest; at most {tolerance:.0e} is right"
    return found, wrong


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers


def _furthest(run: Run, images: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(_difference(run(x), logits) for x, logits in zip(images, expected))


def _rounding(model: fx.GraphModule, images: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """How far a network is from itself in float64; 0 where it cannot be told."""
    try:
        with torch.no_grad():
            exact = copy.deepcopy(model).double()
            found = _furthest(lambda x: exact(x.double()), images, expected)
    except RuntimeError:  # it asks for float32 somewhere
        return 0.0
    return found if math.isfinite(found) else 0.0


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
