"""The device of `--device`."""

from __future__ import annotations

import torch

from . import distributed
from .errors import UserError, why


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


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile does not work, before a training that would find out in its middle."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # of compilers, each says so in its own way
        raise UserError(f"--compile does not work here ({why(error)}); install a C++ compiler, and Triton for a GPU, or leave it away") from error
