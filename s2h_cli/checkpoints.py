"""Reads the weights out of a file that some training wrote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import torch

from .errors import UserError, why

State = dict[str, torch.Tensor]

#: Parts of a checkpoint that may hold the weights, best first: averaged ones come before others, as in timm.
PARTS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model", "state_dict", "model", "model_state_dict",
         "model_state", "net", "network", "weights", "params")
DEPTH = 3  # levels of a checkpoint in which weights are looked for
PREFIXES = 4  # dots in the longest prefix that is taken off
#: What wrappers put into the names of the weights inside them.
WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel; is no weight
SHARD = re.compile(r"-\d+-of-\d+$")
SHOWN = 3
ADVICE = "save it with torch.save(model.state_dict(), FILE)"


class Inert:
    """Stands for an object of any class in a checkpoint. The class itself is neither imported nor run."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def _class_names(path: Path) -> list[str]:
    """Classes and functions that a file of torch.save names, beside those of plain weights; none of old files."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch.load tells what is wrong with the file
        return []


def read_weights(path: Path, own: State) -> tuple[State, list[str]]:
    """Reads the weights of a model from a file.

    Args:
        path: A ``.safetensors`` file, or one of ``torch.save`` without pickled code.
        own: The model's state dict.

    Returns:
        The weights by the names of the model, as far as they fit, and notes on which part of the file they are.

    Raises:
        UserError: The file cannot be read, holds no weights, or holds some that cannot be used.
    """
    path = path.expanduser()
    if path.name.endswith(".index.json") or SHARD.search(path.stem):
        raise UserError(f"'{path}' is one file of a checkpoint in several; load them together, and {ADVICE}")
    if not path.is_file():
        raise UserError(f"no weights file '{path}'; give a .safetensors, .pth, .pt or .bin file")
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([(Inert, name) for name in _class_names(path)]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(f"'{path}' holds Python objects, which s2h does not run, not plain weights; {ADVICE}") from error
    except Exception as error:
        raise UserError(f"cannot read '{path}' as plain weights ({why(error)}); {ADVICE}") from error
    found = [(name, *_fitted(state, own)) for name, state in _states(content, "", DEPTH)]
    if not found:
        raise UserError(f"'{path}' holds no state dict; {ADVICE}")
    name, state, prefix, aside = max(found, key=lambda part: len(part[1].keys() & own.keys()))  # of equals the first
    _check(path, state, own)
    notes = [f"the weights are those under '{name}' in '{path}'"] if name else []
    if aside:
        notes.append(f"of '{path}' the names that begin with '{prefix}' are used, and {len(aside)} others are not: "
                     + ", ".join(aside[:SHOWN]) + (", ..." if len(aside) > SHOWN else ""))
    return state, notes


def _states(part: object, name: str, depth: int) -> Iterator[tuple[str, State]]:
    """The mappings of names to tensors in a checkpoint, each with where it is, in the order of PARTS."""
    if not isinstance(part, Mapping) or depth < 0:
        return
    inner = {key: value for key, value in part.items() if isinstance(key, str)}
    for key in sorted(inner, key=lambda key: PARTS.index(key) if key in PARTS else len(PARTS)):
        yield from _states(inner[key], f"{name}.{key}" if name else key, depth - 1)
    if tensors := {key: value for key, value in inner.items() if isinstance(value, torch.Tensor)}:
        yield name, tensors


def _fitted(state: State, own: State) -> tuple[State, str, list[str]]:
    """Renames weights as the model does.

    Returns:
        The state, the prefix that was taken off, and the names without it, which are left out.
    """
    state = {key if key in own else WRAPPED.sub("", key): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key in own or key.rpartition(".")[2] != COUNTER}
    matches = Counter({"": sum(key in own for key in state)})
    for key in state:
        parts = key.split(".")
        for i in range(1, min(len(parts), PREFIXES + 1)):
            if ".".join(parts[i:]) in own:
                matches[".".join(parts[:i]) + "."] += 1
    prefix = max(matches, key=matches.get)
    if matches[prefix] == matches[""]:
        prefix = ""
    aside = [key for key in state if not key.startswith(prefix)]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, prefix, aside


def _check(path: Path, state: State, own: State) -> None:
    """Raises UserError where weights are of a kind that cannot be used, or are not finite."""
    for key in state.keys() & own.keys():
        mine, value = own[key], state[key]
        if mine.is_floating_point() and not value.is_floating_point():
            raise UserError(f"'{path}' has '{key}' as {value.dtype}, not as floating-point numbers; {ADVICE} before the "
                            "model is quantized")
        if mine.is_floating_point() and mine.isfinite().all() and not value.to(mine.dtype).isfinite().all():
            raise UserError(f"'{path}' has numbers in '{key}' that are not finite (NaN or infinity); give weights of a "
                            "training that went well")
