"""A result on disk, and back.

A run folder holds `model.safetensors` (parameters and buffers) and `plan.json`, whose key `network` is the graph as data (`network_json`):
from these two files alone `load` puts the network together again. `exports` writes it in other formats.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import fx

from . import __version__, schema
from .errors import UserError, why
from .files import check_regular, writing
from .graph import tensors_of
from .network_json import PLAN, WEIGHTS, network_from_json, network_to_json
from .sizes import check_sizes


#: The largest file of weights that is read, in bytes.
LARGEST_WEIGHTS = 16 << 30


def save(folder: str | os.PathLike, small: fx.GraphModule, plan_json: dict) -> None:
    """Writes `model.safetensors` and `plan.json` (with the keys `network` and `versions` added) into a folder.

    Raises:
        UserError: the network contains something that the data cannot hold.
    """
    plan = {**plan_json, "network": network_to_json(small), "versions": _versions()}
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors_of(small).items()}
    with writing(Path(folder)) as aside:
        (aside / PLAN).write_text(json.dumps(plan, indent=1, allow_nan=False))
        (aside / WEIGHTS).write_bytes(save_bytes(weights, {"format": "pt"}))


def record(folder: Path, results: dict[str, Any]) -> None:
    """Adds what was measured of a result to its `plan.json`, under `results`: of its `files` each by its name, the rest by its key."""
    plan = read_plan(folder)
    known = plan.setdefault("results", {})
    files = known.get("files", {}) | results.get("files", {})
    known.update(results)
    known["files"] = files
    with writing(folder) as aside:
        (aside / PLAN).write_text(json.dumps(plan, indent=1, allow_nan=False))


def _versions() -> dict[str, str | None]:
    try:
        timm = importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        timm = None
    return {"s2h": __version__, "torch": str(torch.__version__), "timm": timm}


def read_plan(path: str | os.PathLike, *needs: str) -> dict[str, Any]:
    """What `plan.json` of a run folder holds, as `schema.Plan`; nothing in it is compared with the network (see `computed.checked`).

    Args:
        needs: keys that must be there, beside the network.

    Raises:
        UserError: the folder or the file is missing or broken, or lacks a key.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a finished run")
    parts = sorted(str(file.parent) for file in folder.glob(f"f*/{PLAN}"))  # of a run with several budgets
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} in it; give " + (f"one of its results: {', '.join(parts)}" if parts else "the folder of a finished run"))
    plan = schema.read_json(folder / PLAN)
    if not isinstance(plan, dict) or not isinstance(plan.get("network"), dict):
        raise UserError(f"{folder / PLAN}: it holds no network; give the folder of a finished run")
    plan = schema.check(schema.Plan, plan, str(folder / PLAN))
    sizes = [plan["network"]["meta"]["input_size"], plan.get("input_size"), plan.get("data", {}).get("input_size")]
    if any(size not in (None, sizes[0]) for size in sizes):
        schema.refuse(str(folder / PLAN), ("input_size",), f"the sizes {', '.join(map(str, sizes))} differ")
    if lacks := [key for key in needs if key not in plan]:
        raise UserError(f"{folder / PLAN}: it lacks {', '.join(lacks)}; give the folder of a finished run")
    return plan


class Result(NamedTuple):
    """What a run folder holds: its plan, the network in eval mode, and the shapes of one image in it (see `sizes.check_sizes`)."""

    plan: dict[str, Any]
    network: fx.GraphModule
    shapes: dict[fx.Node, Any]


def load(path: str | os.PathLike, trust: bool = False) -> fx.GraphModule:
    """Loads the small network of a run folder, in eval mode. Reads `plan.json` and `model.safetensors`, nothing else.

    Args:
        path: the folder.
        trust: take operators that s2h does not know as harmless. What a library that you imported does, such a file can make it do.

    Returns:
        A module that takes images (N, C, H, W) and returns logits (N, classes).

    Raises:
        UserError: the folder or a file is missing, broken, or the two do not belong together.
    """
    return read(path, trust).network


def read(path: str | os.PathLike, trust: bool = False, needs: tuple[str, ...] = ()) -> Result:
    """The same as `load`, and all else that is in the folder. `needs`: as of `read_plan`."""
    folder, plan = Path(path), read_plan(path, *needs)
    if check_regular(folder / WEIGHTS) > LARGEST_WEIGHTS:
        raise UserError(f"{folder / WEIGHTS}: it is larger than {LARGEST_WEIGHTS >> 30} GB, more than s2h reads; give the folder of a finished run")
    try:
        # Copies: memory mapped from a file is aligned differently, and then kernels round differently.
        state_dict = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    except Exception as error:  # a damaged file makes the reader raise whatever it likes
        raise UserError(f"{folder / WEIGHTS}: cannot be read: {schema.shown(why(error))}; it may be damaged") from error
    try:
        network = network_from_json(plan["network"], state_dict, trust)
        return Result(plan, network, check_sizes(network, len(plan["data"]["classes"]) if "data" in plan else None))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
