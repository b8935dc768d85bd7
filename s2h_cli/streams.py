"""Standard streams that cannot end a run: a reader that goes away (`s2h … | head`), a full disk or a closed terminal loses output, not work."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import Any, Iterator, TextIO


class Stream:
    """A text stream that keeps its first error and drops what comes after it."""

    def __init__(self, stream: TextIO):
        self.stream, self.error = stream, None
        if hasattr(stream, "reconfigure"):  # a name that the terminal has no letters for must not end a run
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                self.stream.write(text)
            except OSError as error:
                self.error = error
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def steady() -> Iterator[Stream]:
    """Makes standard output and error such streams while the block runs, and gives standard output."""
    for number in range(3):  # one that is closed would become the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = (Stream(stream or open(os.devnull, "w")) for stream in before)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        for stream, number in ((out, 1), (err, 2)):
            stream.flush()
            if stream.error is not None:  # what Python would write at its end goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        sys.stdout, sys.stderr = before
