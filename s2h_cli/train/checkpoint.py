"""Files that are whole or not there: each is written under a temporary name, then renamed."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import torch

from ..errors import UserError, why


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what is there at the end replaces `path` in one step.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write '{path}' ({why(error)}); free some space or choose another folder with -o") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint of tensors and plain data.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint; nothing but tensors and plain data is accepted.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"nothing to resume: no checkpoint '{path}'; leave --resume away")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever the unpickler meets
        raise UserError(f"cannot read checkpoint '{path}' ({why(error)}); start again in another folder with -o") from error
