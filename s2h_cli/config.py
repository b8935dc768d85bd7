"""What a run was asked for: `args.yaml`, recipes, and the command line, in one flat set of settings."""

from __future__ import annotations

import difflib
import math
import re
import shlex
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .budget import KINDS, Budget
from .errors import UserError
from .files import writing
from .ranges import whole_number

RECIPES = Path(__file__).parent / "recipes"


@dataclass(kw_only=True)
class Recipe:
    """How to train. None means: by model and data, or off. Names are those of timm's training script where it has them."""

    epochs: int | None = None
    batch_size: int = 64  #: images per step, over all processes
    grad_accum_steps: int = 1  #: steps whose gradients one update of the weights adds up
    opt: str = "adamw"
    lr: float | None = None  #: peak learning rate
    weight_decay: float = 0.05
    momentum: float = 0.9
    layer_decay: float | None = None
    clip_grad: float | None = None  #: largest norm of the gradient of all weights
    sched: str = "cosine"
    warmup_epochs: int | None = None
    min_lr: float | None = None
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    aa: str | None = None  #: timm's name of an augmentation policy
    color_jitter: float | None = None
    reprob: float = 0.0
    crop_min: float | None = None  #: least share of the image that a random crop keeps
    hflip: float | None = None  #: probability that an image is mirrored
    drop: float | None = None
    drop_path: float | None = None
    ema: float | None = None  #: decay of a moving average of the weights, an update
    amp: bool = False
    amp_dtype: str = "bfloat16"
    channels_last: bool = False
    compile: bool = False
    sync_bn: bool = False
    seed: int = 0


@dataclass(kw_only=True)
class Config(Recipe):
    """What `s2h prune` was asked for: the content of `args.yaml`."""

    model: str
    data: str
    flops: float | list[float] | None = None  #: share of the MACs that remains, or several
    params: float | None = None  #: share of the parameters that remains
    latency: str | None = None  #: share of the latency that remains, or milliseconds: "0.5", "4ms"
    latency_format: str = "eager"
    latency_batch: int = 1
    method: str = "s2h"
    output: str | None = None
    pretrained: bool = True
    weights: str | None = None
    teacher: str | None = None
    img_size: int | None = None
    divisor: int | str = 8  #: "auto": the one that pays on this device, measured
    exclude: list[str] = field(default_factory=list)
    prune_head_dim: bool = False
    val_fraction: float = 0.1
    skip_bad_images: bool = False
    workers: int = 4
    device: str = "auto"
    checkpoint_every: int | None = None  #: steps between two checkpoints inside an epoch
    log: str | None = None

    @property
    def budgets(self) -> list[Budget]:
        return [Budget(flops=flops, params=self.params) for flops in (self.flops if isinstance(self.flops, list) else [self.flops])]

    @property
    def shares(self) -> dict[str, str]:
        """What of which cost may remain, as the options take it."""
        found = {kind: [repr(share).removesuffix(".0") for budget in self.budgets if (share := budget.shares.get(kind)) is not None] for kind in KINDS}
        return {kind: ",".join(dict.fromkeys(values)) for kind, values in found.items() if values} | ({"latency": self.latency} if self.latency else {})

    def command(self, *extra: str) -> str:
        """The command line that asks for this run."""
        words = ["s2h", "prune", self.model]
        for option in fields(self):
            value = getattr(self, option.name)
            flag = "--" + option.name.replace("_", "-")
            if option.name == "model" or value == option.default or value is None:
                continue
            if option.name in self.shares:
                value = self.shares[option.name]
            if isinstance(value, bool):
                words.append(flag if value else "--no-" + flag[2:])
            else:
                for item in value if isinstance(value, list) else [value]:
                    words += [flag, str(item)]
        return shlex.join([*words, *extra])


def configure(given: dict[str, Any], recipe: str | None = None, file: Path | None = None, trust: bool = True) -> Config:
    """Settings by name: what was given, over those of an earlier run's `args.yaml` or of a recipe, over the defaults.

    Args:
        trust: whether the file may name code; what is given always may.

    Raises:
        UserError: both a recipe and a file are given, there is no such one, it has an unknown setting or a value of a wrong type, or model, data or
            budget are missing.
    """
    if recipe and file:
        raise UserError(f"--config {file} has every setting, so that --recipe {recipe} would change nothing; give one of them")
    settings = read_recipe(recipe) if recipe else {}
    if file is not None:
        # Where an earlier run wrote to is not asked for again.
        settings |= {name: value for name, value in _read(file, Config).items() if name != "output"}
        if not trust:
            check_named({name: value for name, value in settings.items() if name not in given}, file)
    settings |= given
    if settings.get("method") == "dense":
        settings |= {kind: given.get(kind) for kind in KINDS} | {"flops": given.get("flops", 1.0)}  # not an earlier run's
    limited = any(settings.get(kind) is not None for kind in KINDS)
    for name, example in (("model", "resnet50"), ("data", "--data ./imagenet"), ("budget", "--flops 0.35 (or --params, --latency)")):
        if not limited if name == "budget" else name not in settings:
            raise UserError(f"no {name} is given; name it, such as {example}, or a --config FILE that has it")
    if isinstance(settings.get("flops"), list):  # of a file
        settings["flops"] = ",".join(map(repr, settings["flops"]))
    if isinstance(divisor := settings.get("divisor"), str) and divisor != "auto":
        settings["divisor"] = whole_number(divisor, "divisor", ", or auto")
    if settings.get("latency") is not None:
        text = settings["latency"] = str(settings["latency"])  # a number, of a file
        share = latency_share(text, 1.0)
        if not 0 < share < math.inf or (share >= 1 and not text.endswith("ms")):
            raise UserError(f"--latency {text} is no share of the latency; give a number between 0 and 1, such as 0.5, or milliseconds, such as {text if share > 0 else 4}ms")
    if isinstance(settings.get("flops"), str):
        settings["flops"] = _budgets(settings["flops"])
    return Config(**settings)


def _budgets(text: str) -> float | list[float]:
    """`0.35`, or `0.15,0.35` for several."""
    try:
        budgets = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--flops {text} is no share of the MACs; give a number such as 0.35, or several such as 0.15,0.35") from None
    if len({f"{budget:g}" for budget in budgets}) < len(budgets):
        raise UserError(f"--flops {text} names a budget twice; give different ones")
    return budgets if len(budgets) > 1 else budgets[0]


def latency_share(text: str, whole: float) -> float:
    """`0.5`, or `4ms` of a network that takes `whole` seconds, as a share.

    Raises:
        UserError: it is neither.
    """
    try:
        return float(text.removesuffix("ms")) / (1e3 * whole if text.endswith("ms") else 1)
    except ValueError:
        raise UserError(f"--latency {text} is no share and no time; give a number such as 0.5, or milliseconds such as 4ms") from None


def write(config: Config, folder: Path) -> None:
    """Writes `args.yaml`.

    Raises:
        UserError: the folder cannot be written to.
    """
    with writing(folder) as aside:
        (aside / "args.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def earlier(path: Path) -> Config:
    """The settings in an `args.yaml`.

    Raises:
        UserError: it cannot be read.
    """
    return configure(_read(path, Config))


def of_result(folder: Path) -> tuple[Path, Config | None]:
    """The folder of the run that a result is of, its own or, for one of several budgets, the one above; and the run's settings, if they are there.

    Raises:
        UserError: `args.yaml` cannot be read.
    """
    home = folder if (folder / "args.yaml").exists() else folder.parent
    return home, earlier(home / "args.yaml") if (home / "args.yaml").exists() else None


def resumed(config: Config, folder: Path, trust: bool = True) -> Config:
    """The settings a run was started with, checked against what is asked for now.

    Raises:
        UserError: another model, data set or budget is asked for, or `args.yaml` cannot be read.
    """
    path = folder / "args.yaml"
    if not path.is_file():
        raise UserError(f"nothing to resume: no args.yaml in '{folder}'; leave --resume away or name the run's folder with -o")
    saved = earlier(path)
    for name in ("model", "data", *KINDS, "method"):
        if getattr(saved, name) != getattr(config, name):
            raise UserError(f"cannot resume: '{folder}' was started with {name} {getattr(saved, name)}, "
                            f"not {getattr(config, name)}; ask for the same, or start a new run")
    if not trust:  # what is the same as in `config` was given, or is checked
        check_named({name: value for name, value in asdict(saved).items() if value != getattr(config, name)}, path)
    if config.device != Config.device:
        saved.device = config.device  # another machine's
    return saved


def recipes() -> dict[str, str]:
    """The text of each recipe that comes with s2h, by name."""
    return {path.stem: path.read_text() for path in sorted(RECIPES.glob("*.yaml"))}


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe that comes with s2h, or of a YAML file.

    Raises:
        UserError: there is none of the name, or it is no recipe.
    """
    path = RECIPES / f"{name}.yaml" if name in recipes() else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"no recipe '{name}'; use {', '.join(recipes())}, or a .yaml file of your own (see s2h recipes)")
    return _read(path, Recipe)


def _read(path: Path, kind: type) -> dict[str, Any]:
    """Settings of a YAML file, checked by name and type against the fields of `kind`."""
    from . import schema  # when a file is read alone: `s2h --help` stays quick

    settings = schema.read_yaml(path) or {}
    if not isinstance(settings, dict):
        raise UserError(f"'{path}' is no list of 'setting: value' lines; see s2h recipes")
    types_of = typing.get_type_hints(kind)
    for name, value in settings.items():
        if name not in types_of:
            near = difflib.get_close_matches(str(name), types_of, 3) or sorted(types_of)[:5]
            raise UserError(f"'{path}': no setting '{schema.shown(str(name))}'; did you mean {', '.join(near)}?")
        try:
            settings[name] = schema.setting(types_of[name], value)
        except ValueError:
            names = " or ".join("nothing" if k is type(None) else getattr(k, "__name__", str(k)) for k in typing.get_args(types_of[name]) or [types_of[name]])
            raise UserError(f"'{path}': {name} is {schema.shown(repr(value))}; it must be of type {names}, finite and of usual length") from None
    return settings


#: Data sets that timm fetches from anyone on the hub.
_FETCHED = ("hfds/", "hfids/", "wds/", "tfds/")
_CODE = re.compile(r"\.py(:|$)|^(?!torchvision:)[^/\\]*:")


def runs_code(name: str, value: Any) -> bool:
    """Whether a setting names code to run, or something to fetch or to send: a Python file, a repository of anyone's, a data set by a script, a log."""
    if name in ("model", "teacher"):
        return value is not None and _CODE.search(value) is not None
    return name == "data" and str(value).lower().startswith(_FETCHED) or name == "log" and value is not None


def check_named(settings: dict[str, Any], where: Path) -> None:
    """Raises UserError for settings of a file that name code, or something to fetch or to send."""
    for name, value in settings.items():
        if runs_code(name, value):
            option = "MODEL" if name == "model" else f"--{name}"
            raise UserError(f"'{where}' names the {name} '{value}', and a file of others must not run code, fetch or send anything: name it on the command line too "
                            f"({option} {value}), or give --trust if you know who made the file")
