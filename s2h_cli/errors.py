"""The one error that a user can cause, and how causes are put in one line."""


class UserError(Exception):
    """A mistake of the user's: one line that tells what is wrong and what to do.

    The command line prints the message and exits with status 2.
    """


def why(error: BaseException) -> str:
    """Puts a caught error in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
