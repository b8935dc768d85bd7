"""Signals that end the program. Ctrl-C, SIGTERM and SIGHUP all raise KeyboardInterrupt, so that what was done is kept; a second one ends at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import Any, Iterator

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
#: Seconds in which further signals count as the first one: `timeout`, torchrun and a closed terminal send several at once.
SAME = 1.0


class _State:
    first: float | None = None  #: when the first signal came, on the monotonic clock
    held: int = 0  #: blocks that must not be interrupted
    waiting: bool = False  #: whether a signal came during such a block


def asked() -> bool:
    """Whether a signal has asked the program to end."""
    return _State.first is not None


@contextmanager
def listening() -> Iterator[None]:
    """Handles the signals while the block runs. A signal that is ignored, as under nohup, stays ignored."""
    before: dict[int, Any] = {}
    _State.first, _State.held, _State.waiting = None, 0, False
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, _stop) for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """A first signal waits until the block is done: for C++ code that cannot take an exception, and for steps that belong together."""
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
    if _State.waiting and not _State.held:
        _State.waiting = False
        raise KeyboardInterrupt


def _stop(number: int, frame: Any) -> None:
    now = time.monotonic()
    if _State.first is None:
        _State.first = now
        if _State.held:
            _State.waiting = True
            return
        raise KeyboardInterrupt
    # A terminal that closes sends SIGHUP more than once, and nobody is there to ask twice.
    if now - _State.first > SAME and number != getattr(signal, "SIGHUP", None):
        for child in multiprocessing.active_children():
            child.kill()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
