"""What the files of a result may say: types, ranges and lengths, in one place. A file that a stranger wrote is read through here.

`read_json` and `read_yaml` give plain data; `check` holds them against a type of this module. Each error is one line: the file, the place in it,
what is wrong, what to do.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Optional, Union

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from .errors import UserError, why
from .files import read_text
from .shown import printable

MEGABYTE = 2**20
#: The largest files that are read. The largest plan of the zoo has some MB.
LIMITS = {".json": 64 * MEGABYTE, ".csv": 64 * MEGABYTE, ".yaml": MEGABYTE // 16}
#: What to do about a file that says what it cannot say.
DAMAGED = "it may be damaged, or from another version of s2h"


# ---------------------------------------------------------------------------------------------------------------------
# Values

INT64 = 2**63 - 1
#: Pixels of one side of an image, or its channels; and the channels that have a mean and a standard deviation.
LARGEST_SIDE, MOST_CHANNELS = 4096, 4
#: The largest fixed batch of an exported file.
LARGEST_BATCH = 65536

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Finite, Field(gt=0)]
Share = Annotated[Finite, Field(ge=0, le=1)]
Part = Annotated[Finite, Field(gt=0, le=1)]
Percent = Annotated[Finite, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0, le=INT64)]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
#: Text of any characters, such as a path: `shown` says how it is shown.
Text = Annotated[str, Field(max_length=4096)]
#: A dotted name of a layer: letters, digits and the marks that names have in `torch.nn` and in models of timm; see `network_json`.
LayerName = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[\w \-+:/@()\[\].#]+$")]
InputSize = Annotated[list[Side], Field(min_length=3, max_length=3)]
FileName = Annotated[str, Field(max_length=255, pattern=r"^\w[\w.-]*$")]


def _record(name: str, fields: dict[str, Any], total: bool = True, extra: Literal["ignore", "forbid"] = "ignore") -> Any:
    """A dict with these keys, or with some of them; what else is in it is left out, or an error."""
    made = TypedDict(name, fields, total=total)
    made.__pydantic_config__ = ConfigDict(strict=True, extra=extra)
    return made


def _pair(of: Any) -> Any:
    return Annotated[list[of], Field(min_length=2, max_length=2)]


# ---------------------------------------------------------------------------------------------------------------------
# plan.json

Node = _record("Node", {"op": Literal["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"], "name": Text, "target": Text,
                        "args": Annotated[list[Any], Field(max_length=4096)], "kwargs": Annotated[dict[str, Any], Field(max_length=64)]})
TensorEntry = _record("TensorEntry", {"kind": Literal["parameter", "buffer"], "requires_grad": NotRequired[bool], "persistent": NotRequired[bool],
                                      "same_as": NotRequired[LayerName]})
Network = _record("Network", {
    "class": Text,
    "meta": _record("Meta", {"input_size": InputSize, "static_batch": Optional[Annotated[int, Field(ge=1, le=4096)]]}),
    "modules": Annotated[dict[LayerName, Annotated[dict[str, Any], Field(max_length=16)]], Field(max_length=100_000)],
    "tensors": Annotated[dict[LayerName, TensorEntry], Field(max_length=100_000)],
    "nodes": Annotated[list[Node], Field(max_length=100_000)],
})

Names = Annotated[list[LayerName], Field(max_length=10_000)]
Layer = _record("Layer", {"name": LayerName, "kind": Annotated[str, Field(max_length=64, pattern=r"^\w+$")], "in": _pair(Count), "out": _pair(Count), "macs": _pair(Count),
                          "params": _pair(Count)})
Group = _record("Group", {"name": LayerName, "size": Annotated[Count, Field(ge=1)], "kept": Count, "layers": Names})
Frozen = _record("Frozen", {"layers": Names, "reason": Text, "channels": Count})
_DATA = {
    "input_size": InputSize, "mean": Annotated[list[Finite], Field(min_length=1, max_length=MOST_CHANNELS)], "std": Annotated[list[Positive], Field(min_length=1, max_length=MOST_CHANNELS)],
    "interpolation": Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"], "crop_pct": Annotated[Finite, Field(ge=0.01, le=10)],
    "classes": Annotated[list[Annotated[str, Field(max_length=1024)]], Field(min_length=1, max_length=1_000_000)],
    "split": NotRequired[_record("Split", {"val_fraction": NotRequired[Share]}, extra="forbid")], "batch": NotRequired[Annotated[int, Field(ge=1, le=LARGEST_BATCH)]],
}


def _for_each_channel(data: dict[str, Any]) -> dict[str, Any]:
    if {"mean", "std", "input_size"} <= data.keys() and not len(data["mean"]) == len(data["std"]) == data["input_size"][0]:
        raise ValueError("mean and std need an entry for each channel of the input")
    return data


#: Preprocessing and classes; and what of them an exported file holds, which is any part.
Data = Annotated[_record("Data", _DATA), AfterValidator(_for_each_channel)]
Metadata = Annotated[_record("Metadata", _DATA, total=False, extra="forbid"), AfterValidator(_for_each_channel)]
Results = _record("Results", {
    "top1": NotRequired[dict[Annotated[str, Field(max_length=64, pattern=r"^\w+$")], Percent]],
    "files": NotRequired[Annotated[dict[FileName, _record("File", {"difference": Annotated[Finite, Field(ge=0)], "top1": NotRequired[Percent]})],
                                   Field(max_length=1000)]],
    "bytes_before": NotRequired[Count],
})
Plan = _record("Plan", {
    "network": Network,
    "versions": NotRequired[Annotated[dict[Text, Optional[Text]], Field(max_length=100)]],
    "model": NotRequired[Text],
    "input_size": NotRequired[InputSize],
    "macs": NotRequired[_record("Macs", {"full": Count, "pruned": Count, "ratio": Part, "target": Optional[Positive], "min_ratio": Share})],
    "params": NotRequired[_record("Params", {"full": Count, "pruned": Count, "ratio": Part})],
    "budget": NotRequired[Optional[dict[Literal["flops", "params", "latency"], Positive]]],
    "dropped": NotRequired[Names],
    "layers": NotRequired[Annotated[list[Layer], Field(max_length=100_000)]],
    "groups": NotRequired[Annotated[list[Group], Field(max_length=100_000)]],
    "frozen": NotRequired[Annotated[list[Frozen], Field(max_length=100_000)]],
    "kept_indices": NotRequired[dict[LayerName, list[Count]]],
    "data": NotRequired[Data],
    "results": NotRequired[Results],
})

# ---------------------------------------------------------------------------------------------------------------------
# bench.json, latency.json

Timing = _record("Timing", {"low": Positive, "median": Positive, "high": Positive, "blocks": Count})
Row = _record("Row", {"format": Text, "batch": Annotated[int, Field(ge=1, le=INT64)], "network": Text, "timing": NotRequired[Timing], "failed": NotRequired[Text],
                      "share": NotRequired[Optional[Positive]]})
Pair = _record("Pair", {"before": Text, "after": Text, "macs": Positive, "kinds": dict[Text, _pair(Annotated[Finite, Field(ge=0)])], "reasons": list[Text]})
Bench = _record("Bench", {"place": Text, "rows": Annotated[list[Row], Field(max_length=10_000)], "pairs": Annotated[list[Pair], Field(min_length=1, max_length=1000)]})
Latency = _record("Latency", {"nodes": Annotated[list[Text], Field(max_length=100_000)], "nanoseconds": Annotated[list[Annotated[list[Finite], Field(min_length=5, max_length=5)]], Field(max_length=100_000)],
                              "whole": Positive, "least": Positive, "error": Finite})

# ---------------------------------------------------------------------------------------------------------------------
# checkpoints/last

#: What `train.loop.Training.load_state_dict` reads. It holds the parts that are left open here against the model.
State = Annotated[dict[str, Any], Field(max_length=100_000)]
Checkpoint = _record("Checkpoint", {
    "network": State, "method": State, "optimizer": State, "scaler": State, "ema": Optional[State],
    "rows": Annotated[list[dict[Text, Union[Count, Finite]]], Field(max_length=1_000_000)],
    "sums": State, "counts": dict[Text, Annotated[int, Field(ge=1, le=INT64)]], "position": Count,
})


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def check(kind: Any, value: Any, where: str) -> Any:
    """The value as a type of this module, unknown keys left out.

    Raises:
        UserError: it is not of that type.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        refuse(where, first["loc"], first["msg"][:1].lower() + first["msg"][1:])


def refuse(where: str, place: Any, what: str) -> NoReturn:
    """Raises UserError: what is wrong at a place of a file."""
    path = ".".join(map(str, place))
    raise UserError(f"{where}: {shown(path)}: {what}; {DAMAGED}" if path else f"{where}: {what}; {DAMAGED}")


def shown(text: str) -> str:
    """Text of a file in a message: short, without characters that act on a terminal."""
    return printable(text[:200])


@cache
def _adapter(kind: Any) -> TypeAdapter:
    config = None if hasattr(getattr(kind, "__origin__", kind), "__pydantic_config__") else ConfigDict(strict=True)
    return TypeAdapter(kind, config=config)


def setting(kind: Any, value: Any) -> Any:
    """The value of a setting as its annotated type; whole numbers pass for fractions, and YAML's `1e-3`, which it reads as text.

    Raises:
        ValueError: it is of another type, not finite, or too long.
    """
    plain = {int: Annotated[int, Field(ge=-INT64, le=INT64)], float: Finite, str: Text, bool: bool, type(None): None, list[float]: Annotated[list[Finite], Field(max_length=100)],
             list[str]: Annotated[list[Text], Field(max_length=1000)]}
    kinds = getattr(kind, "__args__", ()) if kind not in plain else (kind,)
    if isinstance(value, list) and list[float] in kinds:
        value = [setting(float, item) for item in value]
    elif float in kinds and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    return _adapter(Union[tuple(plain[k] for k in kinds)]).validate_python(value)


def read_json(path: Path) -> Any:
    """JSON of a file: no NaN, no infinity, no key twice.

    Raises:
        UserError: it cannot be read, or is no such JSON.
    """
    return parse_json(read_text(path, LIMITS[".json"]), str(path))


def parse_json(text: str, where: str) -> Any:
    """The same of a text that `where` names in messages."""
    if len(text) > LIMITS[".json"]:
        raise UserError(f"{where}: it is longer than {LIMITS['.json'] // MEGABYTE} MB, more than s2h reads")
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_double)
    except RecursionError:
        raise UserError(f"{where}: not JSON that s2h wrote: lists in lists, too deep; {DAMAGED}") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {shown(why(error))}; {DAMAGED}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _no_double(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


class _Loader(yaml.SafeLoader):
    """Plain data without references: a few lines of them can stand for more than fits in memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError("it uses anchors (&name, *name), which no file of settings needs")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Plain data of a YAML file, without anchors and aliases.

    Raises:
        UserError: it cannot be read, or is no such YAML.
    """
    text = read_text(path, LIMITS[".yaml"])
    try:
        return yaml.load(text, _Loader)
    except (RecursionError, ValueError, yaml.YAMLError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"cannot read '{path}' ({shown(why(error))}); give a file like those that s2h recipes prints") from error
