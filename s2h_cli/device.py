"""The device of `--device`."""

from __future__ import annotations

import torch

from . import distributed
from .errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of `--device`; `auto` takes a GPU where there is one.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.WORLD > 1:
        name = f"cuda:{distributed.LOCAL_RANK}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device; give cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} usable GPUs; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; give cpu, cuda, cuda:1 or auto")
    return device
