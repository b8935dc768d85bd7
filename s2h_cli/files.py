"""Files that are whole or not there: each is written in a folder aside, then moved to its place in one step."""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from .errors import UserError, why

#: What the folders aside are called, before the number of the process that writes: this machine's are told from those of others on one file system.
ASIDE = f".writing-{platform.node()}-"


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, made if need be; what is in it at the end replaces the files of the same names.

    Raises:
        UserError: a file cannot be written; those that were there before stay as they were.
    """
    aside = folder / f"{ASIDE}{os.getpid()}"
    try:
        with written(folder):
            for left in folder.glob(f"{ASIDE}*"):  # by a process that was killed, perhaps with the number of this one
                number = left.name.removeprefix(ASIDE)
                if left == aside or number.isdecimal() and not _runs(int(number)):
                    shutil.rmtree(left, ignore_errors=True)
            aside.mkdir(parents=True)
            yield aside
            for file in sorted(aside.iterdir()):
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Raises UserError where something cannot be written into the folder."""
    try:
        yield
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to '{folder}' ({why(error)}); free some space or choose another folder with -o")


def _runs(process: int) -> bool:
    """Whether there is a process of this number; on systems where that cannot be asked, yes."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True
