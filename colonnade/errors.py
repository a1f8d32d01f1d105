"""The two errors a user sees: wrong input before a run, and a failure during one.

Both carry a one-line message that names the value, the limit and what to do. Entry points print it on rank 0
and exit with the error's exit code; any other exception is a bug and keeps its traceback.
"""


class ColonnadeError(Exception):
    """Base of the errors whose message is shown to the user verbatim."""

    exit_code = 1


class UsageError(ColonnadeError):
    """Input that cannot work, found before training starts (exit code 2)."""

    exit_code = 2


class RunError(ColonnadeError):
    """A run that cannot continue, or cannot continue with its present settings (exit code 1)."""

    exit_code = 1


class LocalRunError(RunError):
    """A failure that only this rank has seen: it prints the message itself, even if it is not rank 0."""


class PeerError(RunError):
    """Another rank failed and has reported why; this one exits silently."""


def message_line(error: BaseException) -> str:
    """The message of an error, such as a library's, on one line."""
    return " ".join(str(error).split())
