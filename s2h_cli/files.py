"""Files that are whole or not there: each is written in a folder aside, then moved to its place in one step. One program a folder.
And files that are read: regular ones, of a size that is known before."""

from __future__ import annotations

import errno
import io
import os
import platform
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Iterator

from . import stopping
from .errors import UserError, why

#: What the folders aside are called, before the number of the process that writes: this machine's are told from those of others on one file system.
ASIDE = f".writing-{platform.node()}-"
#: Which process works in a folder; it is there only as long as the process works.
LOCK = ".lock"
#: Seconds that children of a process that was killed may take to end: they hold its lock.
ENDING = 10
#: The longest name of a file, in bytes, on all common file systems.
LONGEST_NAME = 255

#: What to do where something cannot be written, by the kind of error.
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "ask for the right to write there",
    errno.EPERM: "ask for the right to write there",
    errno.EROFS: "make it writable",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "move the file that is in the way",
}


class CannotWrite(UserError):
    """A file cannot be written; those that were there before stay as they were. `problem` and `advice` make the message."""

    def __init__(self, problem: str, advice: str):
        super().__init__(f"{problem}; {advice}, or choose another folder with -o")
        self.problem, self.advice = problem, advice


def cannot_write(folder: Path, error: OSError) -> CannotWrite:
    folder = next(place for place in (folder, *folder.parents) if not place.name.startswith(ASIDE))
    return CannotWrite(f"cannot write to '{folder}' ({why(error)})", ADVICE.get(error.errno or 0, "free some space"))


def check_name(folder: Path) -> None:
    """Raises CannotWrite where there is no folder of this name and none can be made."""
    with written(folder):
        for part in folder.parts:
            if len(os.fsencode(part)) > LONGEST_NAME:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        near = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        if not near.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if near != folder and not os.access(near, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Raises CannotWrite where something cannot be written into the folder."""
    try:
        yield
    except OSError as error:
        raise cannot_write(folder, error) from error


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, made if need be; what is in it at the end replaces the files of the same names.

    Raises:
        CannotWrite: a file cannot be written; those that were there before stay as they were.
    """
    aside = folder / f"{ASIDE}{os.getpid()}"
    try:
        with written(folder):
            clear(folder)
            aside.mkdir(parents=True)
            yield aside
            with stopping.held():  # files that belong together come together
                for file in sorted(aside.iterdir()):
                    os.replace(file, folder / file.name)
    finally:
        with stopping.held():
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A new file for writers in C++, which may end the process where a write fails or is interrupted: they see no error, it is raised at the end.

    Raises:
        OSError: the file cannot be written.
    """
    with stopping.held(), open(path, "wb") as file:
        sink = _Sink(file)
        yield sink
        if sink.error:
            raise sink.error


class _Sink(io.RawIOBase):
    """Passes what it is given on to a file; keeps the first error and drops the rest."""

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def seek(self, *place: int) -> int:
        return 0 if self.error else self.file.seek(*place)

    def tell(self) -> int:
        return 0 if self.error else self.file.tell()


def clear(folder: Path) -> None:
    """Removes the folders aside of processes that were killed, or had the number of this one."""
    for left in folder.glob(f"{ASIDE}*"):
        number = left.name.removeprefix(ASIDE)
        if number.isdecimal() and (int(number) == os.getpid() or not _runs(int(number))):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other s2h processes out of a folder, and removes what killed ones left in it. Where the file system has no locks, or the folder
    cannot be written to, nobody is kept out.

    Raises:
        UserError: another process works there.
    """
    from filelock import FileLock, Timeout

    path, lock = folder / LOCK, None
    if folder.is_dir():
        try:
            lock = _acquired(FileLock, path)
        except Timeout:
            raise UserError(f"'{folder}' is in use by {_holder(path)[0]}; wait until it ends, or stop it") from None
        except (OSError, NotImplementedError):
            pass
    if lock is None:
        yield
        return
    try:
        with suppress(OSError):
            path.write_text(f"{os.getpid()} {platform.node()}")
        for place in (folder, *(child for child in folder.iterdir() if child.is_dir())):
            clear(place)
        yield
    finally:
        with stopping.held():
            with suppress(OSError):
                path.unlink()
            lock.release()


def _acquired(kind: Any, path: Path) -> Any:
    """A lock of the class `FileLock` on the file. Raises its Timeout where another process has it."""
    while True:
        lock = kind(path)
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            if _holder(path)[1]:
                raise
            lock.acquire(timeout=ENDING)
        if path.exists():  # else its last holder removed the file just before it let go
            return lock
        lock.release()


def _holder(path: Path) -> tuple[str, bool]:
    """Who holds a lock, in words, and whether it may still run."""
    try:
        number, node = path.read_text().split()
        if node != platform.node():
            return f"process {int(number)} on {node}", True
        return f"process {int(number)}", _runs(int(number))
    except (OSError, ValueError):
        return "another process", True


def _runs(process: int) -> bool:
    """Whether there is a process of this number; on systems where that cannot be asked, yes."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; a number that is none
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
