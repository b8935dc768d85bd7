"""Files that are whole or not there: each is written in a folder aside, then moved to its place in one step."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from .errors import UserError, why


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, made if need be; what is in it at the end replaces the files of the same names.

    Raises:
        UserError: a file cannot be written; those that were there before stay as they were.
    """
    aside = folder / ".writing"
    try:
        shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed
        aside.mkdir(parents=True)
        yield aside
        for file in sorted(aside.iterdir()):
            os.replace(file, folder / file.name)
    except OSError as error:
        raise UserError(f"cannot write to '{folder}' ({why(error)}); free some space or choose another folder with -o") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
