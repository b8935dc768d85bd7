"""Files that are whole or not there: each is written in a folder aside, then moved to its place in one step. And files that are read: regular
ones, of a size that is known before."""

from __future__ import annotations

import os
import platform
import shutil
import stat
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


def check_regular(path: Path) -> int:
    """The size of a file in bytes. A pipe or a device, whose end nobody knows, is never opened.

    Raises:
        UserError: it is not there, or no regular file.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        raise UserError(f"{path}: cannot be read ({why(error)}); check the name and the permissions") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: this is no regular file (a folder, a pipe or a device); give a file")
    return found.st_size


def read_regular(path: Path, limit: int) -> bytes:
    """What is in a regular file of at most `limit` bytes.

    Raises:
        UserError: it cannot be read, is no regular file, or is larger.
    """
    check_regular(path)
    try:
        # Without blocking, and asked again: the file may have been replaced since.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path}: this is no regular file (a folder, a pipe or a device); give a file")
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({why(error)}); check the permissions") from error
    if len(content) > limit:
        raise UserError(f"{path}: it is larger than {limit / 2**20:g} MB, more than such a file can have; it is damaged, or no file of s2h")
    return content


def read_text(path: Path, limit: int) -> str:
    """The same as text, in UTF-8.

    Raises:
        UserError: it cannot be read, is no regular file, is larger, or is no text.
    """
    try:
        return read_regular(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({why(error)}); it is no text in UTF-8") from error
