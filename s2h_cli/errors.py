"""The one error that a user can cause, and how causes are put in one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's: one line that tells what is wrong and what to do.

    The command line prints the message and exits with status 2.
    """


#: What libraries say when memory is short: torch, oneDNN, CUDA's libraries, ONNX Runtime, the operating system.
OUT_OF_MEMORY = (
    "out of memory", "allocate memory", "could not create a primitive", "could not create a memory", "bad_alloc",
    "bad allocation", "alloc_failed", "failed to allocate", "unable to allocate", "failed to map", "unable to mmap",
    "unable to write to file </torch", "unable to resize file </torch", "errno 12]", "can't start new thread",
)
MORE_MEMORY = "out of memory; try smaller batches or images, end other programs, or use a machine with more memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory is short."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).lower()
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError" or any(words in text for words in OUT_OF_MEMORY):
            return True
        seen = seen.__cause__
    return False


def why(error: BaseException) -> str:
    """Puts a caught error in one line: its type and the first line of its message, or that memory was short."""
    if is_out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
