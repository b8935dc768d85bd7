"""Turns a MODEL string into a module with a fitting head and its preprocessing."""

import difflib
import importlib.util
import inspect
import re
import socket
import sys
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
import torchvision
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from . import artifacts, hub
from .checkpoints import read_weights
from .errors import UserError, why
from .exports import quiet
from .logits import PickLogits, find_logits, is_head, shown, tensors_in

TORCHVISION = "torchvision:"
OWN = re.compile(r"\.py(:|$)")  # in the spec of a model that the user's own code builds
AUX_HEADS = ("aux1", "aux2", "AuxLogits")  # training-only heads of googlenet and inception_v3
PROBE_SECONDS = 10  # how long the server of the weights may take to answer
STALL_SECONDS = 30  # a download that brings no byte for so long has failed
SHOWN_KEYS = 3
QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torch.ao.nn.qat", "torch.nn.quantized", "torch.nn.qat")
CLIP_FRAMES = 16
KINDS_OF_TORCHVISION = {"segmentation": "segmentation model", "detection": "detector", "video": "video classifier", "optical_flow": "model of optical flow",
                        "quantization": "quantized model"}
VIDEO = "takes clips (N, C, T, H, W), not images (N, C, H, W); s2h prunes image classifiers"
NEW_HEAD = "the head is new and untrained"
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch._dynamo.OptimizedModule)  # around a model: taken off


@dataclass
class Source:
    """A model to prune, and how its images are prepared.

    Attributes:
        name: Short name that is safe for a folder, such as ``resnet18``.
        spec: The MODEL string as the user typed it.
        module: The model in eval mode, float32, on the CPU. It maps (N, C, H, W) to (N, classes).
        input_size: (C, H, W) in pixels.
        mean: Per-channel mean of the normalisation, on the 0..1 scale.
        std: Per-channel standard deviation of the normalisation, on the 0..1 scale.
        interpolation: Name of the resize filter, such as ``bicubic``.
        crop_pct: Share of the resized image's side that the centre crop keeps at evaluation.
        pretrained: Whether weights were loaded, from the net or from a file. False: s2h loaded
            none, so the parameters are as the model's builder left them.
        classes: Names of the classes that the head knows, where that is known: of a run.
        notes: What the user should know about how the model was put together.
    """

    name: str
    spec: str
    module: nn.Module
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    pretrained: bool = False
    classes: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def new_head(self) -> bool:
        """Whether the head was made anew, for other classes than the weights know."""
        return any(note.startswith(NEW_HEAD) for note in self.notes)

    @property
    def may_know(self) -> bool:
        """Whether it can be trained for its classes: it has loaded weights, or those that its own code left, and its own head."""
        return not self.new_head and (self.pretrained or OWN.search(self.spec) is not None)


def load_source(
    spec: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = True,
    weights: Path | None = None,
    img_size: int | None = None,
    fetch: bool = True,
    drop: float | None = None,
    drop_path: float | None = None,
) -> Source:
    """Builds the model that a MODEL string names.

    Args:
        spec: A timm name (``resnet50.a1_in1k``), ``torchvision:NAME``, ``path/to/file.py:CALLABLE``, the folder of a run, or
            ``hf://user/name``.
        num_classes: Outputs the head is fitted to; None leaves the head as the model comes.
        pretrained: Download the weights that timm or torchvision has for the name, if any.
        weights: File with a state dict, used instead of the downloaded weights.
        img_size: Side of the square input image in pixels; None for the model's own size.
        fetch: False builds the model as it is with these weights, without them: a checkpoint has its own.
        drop: Rate of dropout before the head; None leaves it as the model comes.
        drop_path: Rate of stochastic depth; None leaves it as the model comes.

    Returns:
        The model with its preprocessing.

    Raises:
        UserError: The model or the weights cannot be found, built, downloaded or fitted, or the
            model does not take images of the size.
    """
    wanted = pretrained and weights is None
    download = wanted and fetch
    own = OWN.search(spec) is not None
    rates = {name: rate for name, rate in (("drop_rate", drop), ("drop_path_rate", drop_path)) if rate is not None}
    run = is_run(spec)
    if rates and (own or run or spec.startswith(TORCHVISION)):
        where = "" if run else f", and set the rates of '{spec}' where it is built"
        raise UserError(f"--drop and --drop-path are for timm's models; leave them away, or take them out of the recipe{where}")
    if run:
        source = _from_run(spec, img_size)
    elif own:
        source = _from_file(spec, num_classes, img_size)
    elif spec.startswith(TORCHVISION):
        source = _from_torchvision(spec, wanted, download, img_size)
    else:
        source = _from_timm(spec, num_classes, download, img_size, rates)
    _refuse_unusual_weights(source)
    source.module.cpu().float().eval()

    outputs = _count_outputs(source)
    if num_classes is not None and outputs != num_classes:
        _replace_head(source, outputs, num_classes)
        if source.pretrained or (own and weights is None):
            source.notes.append(_new_head(outputs, num_classes))
    if weights is not None and fetch:
        _load_weights(source, Path(weights), num_classes)
    return source


def fit_head(source: Source, classes: list[str]) -> None:
    """Gives a source that knows as many other classes than these a new head."""
    if not source.new_head and source.classes not in (None, classes):
        _replace_head(source, len(classes), len(classes))
        source.notes.append(f"{NEW_HEAD}: {len(classes)} other classes")


def is_run(spec: str) -> bool:
    """Whether a MODEL string is the folder of a run, here or on the hub. A folder that is called like a model of timm is not meant, unless it is written as `./NAME`."""
    try:
        return spec.startswith(hub.HUB) or Path(spec).is_dir() and not timm.is_model(spec)
    except (OSError, ValueError):  # too long for a path, or no path
        return False


def _from_run(spec: str, img_size: int | None) -> Source:
    """The result of an earlier run, as a model to start from."""
    plan, module, _ = artifacts.read(hub.local(spec), needs=("data",))
    made = plan["data"]
    if img_size not in (None, made["input_size"][1]):
        module.meta["input_size"] = [made["input_size"][0], img_size, img_size]
    return Source(short_name(spec), spec, module, tuple(module.meta["input_size"]), tuple(made["mean"]), tuple(made["std"]),
                  made["interpolation"], made["crop_pct"], pretrained=True, classes=made["classes"])


def _from_timm(spec: str, num_classes: int | None, download: bool, img_size: int | None, rates: dict[str, float]) -> Source:
    if not timm.is_model(spec):
        raise _unknown_model(spec)
    try:
        cfg = get_pretrained_cfg(spec, allow_unregistered=False)
    except RuntimeError:  # the part after the dot is no set of weights
        known = timm.list_models(spec.split(".")[0] + ".*", pretrained=True)
        raise UserError(f"timm has no weights '{spec}'; use one of: {', '.join(known) or spec.split('.')[0]}") from None

    def build(pretrained: bool) -> nn.Module:
        # a model of fixed input size takes img_size; any other fits itself to its input
        size = img_size if cfg.fixed_input_size else None
        try:
            return timm.create_model(spec, pretrained=pretrained, num_classes=num_classes, img_size=size, **rates)
        except Exception as error:
            if pretrained:
                raise
            raise UserError(
                f"timm cannot build '{spec}'{_at_size(img_size)} ({why(error)}); choose another --img-size or model"
            ) from error

    notes = []
    has_weights = bool(cfg.has_weights)
    if download and has_weights:
        hub_file = None
        if cfg.hf_hub_id:
            hub_file = huggingface_hub.hf_hub_url(
                cfg.hf_hub_id.split("@")[0], cfg.hf_hub_filename or "model.safetensors"
            )
        module = _download(build, spec, hub_file, cfg.url)
        if num_classes not in (None, cfg.num_classes):
            notes.append(_new_head(cfg.num_classes, num_classes))
    else:
        module = build(pretrained=False)
        if download:
            notes.append(f"timm has no weights for '{spec}': it starts from random weights")
    source = _source(spec, module, module.pretrained_cfg, img_size)
    source.pretrained = download and has_weights
    source.notes = notes
    return source


def _from_torchvision(spec: str, wanted: bool, download: bool, img_size: int | None) -> Source:
    name = spec.removeprefix(TORCHVISION)
    if name not in torchvision_names():
        if name in torchvision.models.list_models():
            kind = torchvision.models.get_model_builder(name).__module__.split(".")[2]
            raise UserError(f"torchvision's {name} is a {KINDS_OF_TORCHVISION.get(kind, kind)}; s2h prunes image classifiers (see s2h models)")
        raise _unknown_model(spec)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    preprocessing = weights.transforms()
    size = preprocessing.crop_size[0]

    def build(pretrained: bool) -> nn.Module:
        if pretrained and not (name.startswith("vit_") and img_size):
            return torchvision.models.get_model(name, weights=weights)
        options = {}
        if name in ("googlenet", "inception_v3"):
            # as by default, without the warning about it; published weights want their own normalisation in the graph
            options.update(init_weights=True, transform_input=wanted)
        if name.startswith("vit_"):
            options["image_size"] = size if img_size is None else img_size
        try:
            module = torchvision.models.get_model(name, weights=None, **options)
        except Exception as error:
            raise UserError(
                f"torchvision cannot build '{name}'{_at_size(img_size)} ({why(error)}); choose another --img-size"
            ) from error
        if pretrained:
            module.load_state_dict(_resampled(module, weights.get_state_dict(progress=False)))
        return module

    module = _download(build, spec, None, weights.url) if download else build(pretrained=False)
    dropped = [aux for aux in AUX_HEADS if getattr(module, aux, None) is not None]
    for aux in dropped:
        setattr(module, aux, None)
        module.aux_logits = False
    cfg = {
        "input_size": (3, size, size),
        "mean": tuple(preprocessing.mean),
        "std": tuple(preprocessing.std),
        "interpolation": preprocessing.interpolation.value,
        "crop_pct": size / preprocessing.resize_size[0],
    }
    source = _source(spec, module, cfg, img_size)
    source.pretrained = download
    if dropped:
        source.notes.append(f"used in training only, dropped: {', '.join(dropped)}")
    return source


def _from_file(spec: str, num_classes: int | None, img_size: int | None) -> Source:
    file, _, attribute = spec.rpartition(".py")
    path, attribute = Path(file + ".py"), attribute.removeprefix(":")
    if not path.is_file():
        raise UserError(f"no file '{path}'; give MODEL as path/to/file.py:CALLABLE")
    namespace = _import_file(path)
    build = getattr(namespace, attribute, None) if attribute else None
    if not callable(build):
        found = [
            name
            for name, value in vars(namespace).items()
            if callable(value) and getattr(value, "__module__", None) == namespace.__name__
        ]
        raise UserError(
            f"'{path}' has no callable '{attribute}'; "
            + (f"use one of: {', '.join(found)}" if found else "define a function that returns the model")
        )
    arguments = {"num_classes": num_classes} if num_classes is not None and _takes_num_classes(build) else {}
    try:
        module = build(**arguments)
    except (Exception, SystemExit) as error:
        raise UserError(f"'{spec}' failed{_where(error, path)} ({why(error)}); mend the function") from error
    if not isinstance(module, nn.Module):
        raise UserError(f"'{spec}' returned a {type(module).__name__}, not a torch.nn.Module; return the model")
    while isinstance(module, WRAPPERS):
        module = module._orig_mod if isinstance(module, torch._dynamo.OptimizedModule) else module.module
    cfg = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    return _source(spec, module, cfg, img_size)


def _import_file(path: Path):
    """Imports a Python file by its path; as for a script, its folder can be imported from."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"s2h_model_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    namespace = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = namespace
    try:
        module_spec.loader.exec_module(namespace)
    except (Exception, SystemExit) as error:
        raise UserError(f"cannot import '{path}'{_where(error, path)} ({why(error)}); mend the file") from error
    return namespace


def _where(error: BaseException, path: Path) -> str:
    """Names the last line of a file that an error came through, if any."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return f" at line {lines[-1]}" if lines else ""


def _takes_num_classes(build: Callable) -> bool:
    try:
        parameters = inspect.signature(build).parameters
    except ValueError:  # a callable written in C tells no signature
        return False
    return "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def short_name(spec: str) -> str:
    """The name of a MODEL string that is safe for a folder: ``torchvision:resnet18`` is ``resnet18``."""
    file, extension, _ = spec.rstrip("/").rpartition(".py")
    name = Path(file).name if extension else spec.rstrip("/").removeprefix(TORCHVISION).rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "_", name)


def _source(spec: str, module: nn.Module, cfg: dict, img_size: int | None) -> Source:
    """Reads the preprocessing from a timm-style configuration (timm's defaults for what it lacks)."""
    data = resolve_data_config({}, pretrained_cfg=cfg, model=module)
    channels, *size = data["input_size"]
    if img_size is not None:
        size = [img_size, img_size]
    return Source(
        name=short_name(spec),
        spec=spec,
        module=module,
        input_size=(channels, *size),
        mean=_per_channel(data["mean"], channels),
        std=_per_channel(data["std"], channels),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _at_size(img_size: int | None) -> str:
    return "" if img_size is None else f" for {img_size}x{img_size} images"


def torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _unknown_model(spec: str) -> UserError:
    names = {name: [name] for name in timm.list_models() + timm.list_models(pretrained=True)}
    for name in torchvision_names():
        names.setdefault(name, []).append(TORCHVISION + name)
    near = difflib.get_close_matches(spec.rpartition(":")[2], names, n=4)
    shown = [full for name in near for full in names[name]]
    advice = f"did you mean {', '.join(shown)}?" if shown else "use a timm name, torchvision:NAME or FILE.py:CALLABLE"
    return UserError(f"no model '{spec}'; {advice}")


def _download(
    build: Callable[[bool], nn.Module], spec: str, hub_file: str | None, url: str | None
) -> nn.Module:
    """Builds a model with its published weights, from the cache where they lie there.

    Without the net it fails within seconds: the server is asked once before any of the libraries
    goes through its retries. A download that runs may take its time.

    Args:
        build: Builds the model, with its weights if called with True.
        spec: The MODEL string, for messages.
        hub_file: Address of the weights on the Hugging Face hub, None if they are not there.
        url: Address of the weights that torch.hub fetches if there is no hub_file.

    Raises:
        UserError: The weights could not be had, or do not fit the model at this image size.
    """
    cached = hub_file is None and Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).is_file()
    online = cached or _answers(hub_file or url)
    settings = huggingface_hub.constants
    before = settings.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    settings.HF_HUB_OFFLINE = settings.HF_HUB_OFFLINE or not online
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        if not online and hub_file is None:
            raise OSError("not in the cache of torch.hub")
        return build(True)
    except Exception as error:
        build(False)  # raises if it is the model that is at fault and not the weights
        cause = why(error) if online else f"no answer from {hub_file or url}"
        raise UserError(
            f"weights for '{spec}' could not be downloaded or loaded ({cause}); connect to the net, "
            "give a file with --weights or start from random weights with --no-pretrained"
        ) from error
    finally:
        settings.HF_HUB_OFFLINE = before[0]
        socket.setdefaulttimeout(before[1])


def _answers(url: str) -> bool:
    """Tells whether the server of an address answers within PROBE_SECONDS."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:  # refused, but by a server: the download will say why
            pass
        except Exception:  # whatever it is, nothing can be downloaded
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # resolving a name knows no time limit
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


def on_blank(module: nn.Module, input_size: tuple[int, int, int]) -> Any:
    """What a module gives for one blank image (C, H, W), or raises, in silence: torch.fx prints the code of a graph that fails."""
    with torch.no_grad(), quiet():
        return module(torch.zeros(1, *input_size))


def _refuse_unusual_weights(source: Source) -> None:
    """Raises UserError for a model that is quantized, or whose weights are no plain tensors of real numbers."""
    for name, module in source.module.named_modules():
        kind = type(module)
        if kind.__module__.startswith(QUANTIZED) or isinstance(module, (torch.ao.quantization.FakeQuantizeBase, torch.ao.quantization.ObserverBase)):
            raise UserError(
                f"'{source.spec}' is quantized, or prepared for it ({name or 'the model'} is a {kind.__name__}); "
                "prune the model from before quantization, then quantize the result: s2h export --int8"
            )
    for name, tensor in [*source.module.named_parameters(), *source.module.named_buffers()]:
        plain = type(tensor.data) is torch.Tensor and tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.is_complex() or (isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()):
            what = f"{type(tensor.data).__name__}, {tensor.dtype}, {tensor.layout}".replace("torch.", "")
            raise UserError(f"'{source.spec}' has a weight that s2h cannot train: {name} ({what}); give a model with dense float weights")


def _count_outputs(source: Source) -> int:
    """The length of the model's output. Of a model that returns more than its logits only they are kept from here on; a note says which."""
    if len(source.input_size) != 3:
        raise UserError(f"'{source.spec}' {VIDEO}")
    channels, height, width = source.input_size
    try:
        output = on_blank(source.module, source.input_size)
        if not isinstance(output, torch.Tensor) and (path := find_logits(output)):
            source.module.register_forward_hook(PickLogits(path))
            source.notes.append(f"the model returns a {type(output).__name__}; its logits are taken from: {shown(path)}")
            output = on_blank(source.module, source.input_size)
    except Exception as error:
        if _takes_clips(source):
            raise UserError(f"'{source.spec}' {VIDEO}") from error
        raise UserError(
            f"'{source.spec}' cannot take {height}x{width} images with {channels} channels ({why(error)}); "
            "choose another --img-size, or give your own model a default_cfg = {'input_size': (C, H, W)}"
        ) from error
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != 1:
        found = [f"{shown(path)} {tuple(tensor.shape)}" for path, tensor in tensors_in(output)]
        got = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__} of {', '.join(found) or 'no tensors'}"
        raise UserError(
            f"'{source.spec}' gives {got} for one image, not logits of shape (1, classes); use an image classifier, or wrap it "
            "so that it returns the logits alone"
        )
    return output.shape[1]


def _takes_clips(source: Source) -> bool:
    """Whether the model takes clips (N, C, T, H, W) in place of images."""
    channels, height, width = source.input_size
    try:
        on_blank(source.module, (channels, CLIP_FRAMES, height, width))
    except Exception:
        return False
    return True


def _head_names(module: nn.Module, outputs: int) -> list[str]:
    """Names the layers, in module order, that could give the outputs."""

    def is_head(layer: nn.Module) -> bool:
        if isinstance(layer, nn.Conv2d):
            return layer.kernel_size == (1, 1) and layer.groups == 1 and layer.out_channels == outputs
        return isinstance(layer, nn.Linear) and layer.out_features == outputs

    return [name for name, layer in module.named_modules() if is_head(layer)]


def _replace_head(source: Source, outputs: int, num_classes: int) -> None:
    module = source.module
    # torchvision's models all are classifiers; one of them has an activation behind its head
    heads = [name for name in _head_names(module, outputs)
             if source.spec.startswith(TORCHVISION) or is_head(module, name, torch.zeros(1, *source.input_size))]
    if not heads:
        raise UserError(
            f"'{source.spec}' has {outputs} outputs, the data {num_classes} classes, and no classifier to replace: no nn.Linear or "
            "1x1 nn.Conv2d that gives the outputs without an activation behind it; let the function take num_classes and end in such a layer"
        )
    old = module.get_submodule(heads[-1])
    has_bias = old.bias is not None
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=has_bias)
    else:
        new = nn.Conv2d(old.in_channels, num_classes, 1, bias=has_bias)
    module.set_submodule(heads[-1], new)
    if hasattr(module, "num_classes"):
        module.num_classes = num_classes
    if _count_outputs(source) != num_classes:
        raise UserError(
            f"'{source.spec}' keeps {outputs} outputs after '{heads[-1]}' was replaced to give {num_classes}; "
            "let the function take num_classes"
        )


def _new_head(old: int, new: int) -> str:
    return f"{NEW_HEAD}: {new} classes in place of {old}"


def _resampled(module: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Position embeddings and tables fitted to the model's image size, as timm and torchvision do it for their own weights."""
    if isinstance(module, torchvision.models.VisionTransformer):
        return torchvision.models.vision_transformer.interpolate_embeddings(module.image_size, module.patch_size, state)
    resample = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    return resample(state, module) if resample else state


def _load_weights(source: Source, path: Path, num_classes: int | None) -> None:
    """Loads a file into the model; a head for another number of classes stays freshly initialised."""
    own = source.module.state_dict()
    state, notes = read_weights(path, own)
    heads = {f"{name}.{part}" for name in _head_names(source.module, num_classes or 0) for part in ("weight", "bias")}
    if any(key in own and key not in heads and own[key].shape != value.shape for key, value in state.items()):
        try:
            state = _resampled(source.module, state)
        except Exception:  # weights of another model: what does not fit is told below
            pass
    aux = tuple(f"{name}." for name in AUX_HEADS if getattr(source.module, name, ...) is None)
    state = {key: value for key, value in state.items() if not key.startswith(aux)}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
    if num_classes is not None and not missing and not unexpected:
        if wrong and all(key in heads and state[key].shape[1:] == own[key].shape[1:] for key in wrong):
            source.notes.append(_new_head(len(state[wrong[0]]), num_classes))
            for key in wrong:
                del state[key]
            wrong = []
    shapes = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in wrong]
    misfits = [
        f"{len(keys)} {what} ({', '.join(keys[:SHOWN_KEYS])}{', ...' if len(keys) > SHOWN_KEYS else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of wrong shape", shapes))
        if keys
    ]
    if misfits:
        raise UserError(
            f"'{path}' does not fit '{source.spec}': keys {', '.join(misfits)}; give weights of this very model"
        )
    try:
        source.module.load_state_dict(state, strict=False)
    except Exception as error:  # torch names the tensors that it cannot copy
        raise UserError(f"'{path}' cannot be loaded into '{source.spec}' ({why(error)}); give plain float weights") from error
    source.notes += notes
    source.pretrained = True
    source.classes = None  # which classes the head of the file knows it does not tell
