"""The two errors a user meets: wrong input before a run, and a failure inside one.

Both carry one line that names the value, the limit and what to do. Entry points print that line on rank 0
and leave with the exit code; any other exception is a bug and keeps its traceback.
"""


class ColonnadeError(Exception):
    """Base of the errors whose message is meant for the user as it stands."""

    exit_code = 1


class UsageError(ColonnadeError):
    """Input that cannot work, found before training starts (exit code 2)."""

    exit_code = 2


class RunError(ColonnadeError):
    """A run that cannot go on, or cannot go on as it is (exit code 1)."""

    exit_code = 1


class LocalRunError(RunError):
    """A failure that only this rank has seen: it prints the line itself, whatever its number."""


class PeerError(RunError):
    """Another rank failed and has said why; this one leaves without a word."""
