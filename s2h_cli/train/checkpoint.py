"""Checkpoints: all that a run needs to go on, as tensors and plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import schema
from ..errors import UserError, why
from ..files import check_regular, whole, writing


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint; the one before stays until the new one is whole.

    Raises:
        CannotWrite: it cannot be written.
    """
    with writing(path.parent) as folder, whole(folder / path.name) as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint; nothing but tensors and plain data is accepted.

    Raises:
        UserError: it cannot be read, or is no checkpoint.
    """
    check_regular(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever the unpickler meets
        raise UserError(f"cannot read checkpoint '{path}' ({why(error)}); start again in another folder with -o") from error
    return schema.check(schema.Checkpoint, state, str(path))
