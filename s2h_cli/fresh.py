"""A function called in a Python that has done nothing else. Whoever measures a time wants that: what a process did before, above all how
its memory has come to lie, makes a network slower by as much as a twentieth, a small one more than the whole one (docs/performance.md)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable

import torch

from .errors import UserError


def call(function: Callable, *args: Any) -> Any:
    """`function(*args)`, in a process of its own with as many threads as this one.

    Args:
        function, args: what can be pickled.

    Raises:
        UserError: the function raised it, or the process broke off.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.pt"
        torch.save((torch.get_num_threads(), function, args), job)
        done = subprocess.run([sys.executable, "-m", __name__, str(job)], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise UserError(f"a process that was to measure broke off ({said[-1]}); it may need more memory")
        returned, error = torch.load(job, weights_only=False)
    if error:
        raise error
    return returned


def _answer(job: str) -> None:
    """Does what `call` wrote into a file, and writes what comes of it in its place."""
    threads, function, args = torch.load(job, weights_only=False)
    torch.set_num_threads(threads)
    returned = error = None
    try:
        returned = function(*args)
    except UserError as raised:
        error = raised
    torch.save((returned, error), job)


if __name__ == "__main__":
    _answer(sys.argv[1])
