"""Which network failures are worth a retry, and the retries.

A request that fails with a network error is retried with exponential back-off; if that does not help, the run ends. A
network error is never treated as damaged data: a lost mount or an expired token would then silently skip the rest of
the corpus.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from colonnade.errors import RunError, message_line

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Errors of client libraries that do not derive from OSError. Looked up only in modules that are already imported.
_LIBRARY_ERRORS = (
    ("aiohttp", "ClientError"),
    ("asyncio", "TimeoutError"),  # not a TimeoutError before Python 3.11
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("http.client", "HTTPException"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
)
# 4xx responses that a retry can change: request timeout, too early, too many requests.
_PASSING_STATUS = (408, 425, 429)
_DENIED_STATUS = (401, 403)


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long one request is tried.

    Attributes:
        attempts: total number of attempts.
        first_delay, longest_delay: seconds between attempts, doubled each time up to the longest, then multiplied by a
            random factor from 0.5 to 1.5.
        budget: seconds after which no further attempt starts.
        connect_timeout, read_timeout: seconds to wait for a connection, and for the next byte, over http(s). Other
            clients have their own timeouts.
    """

    attempts: int = 6
    first_delay: float = 0.5
    longest_delay: float = 8.0
    budget: float = 60.0
    connect_timeout: float = 10.0
    read_timeout: float = 20.0


# Only tests replace it.
POLICY = RetryPolicy()


class UnreachableError(RunError):
    """A remote file cannot be reached: all attempts failed, or a retry cannot help."""


def with_retries(what: str, request: Callable[[], T], stopped: threading.Event | None = None) -> T:
    """The result of `request()`, retried after transient errors. `what` names the file in messages.

    Raises:
        UnreachableError: at once for a wrong path, missing credentials or a server without range requests; for other
            errors after the last attempt; and before an attempt, or in a delay, once `stopped` is set. Its text is one
        line.
    """
    policy, random_part = POLICY, random.Random()
    begin = time.monotonic()
    stopped = stopped or threading.Event()
    for attempt in range(1, policy.attempts + 1):
        if stopped.is_set():
            raise UnreachableError(f"{what}: reading was stopped")
        try:
            return request()
        except network_errors() as error:
            remedy = _remedy(error)
            if remedy is not None:
                raise UnreachableError(f"{what} cannot be reached ({_reason(error)}); {remedy}") from error
            delay = min(policy.longest_delay, policy.first_delay * 2 ** (attempt - 1)) * random_part.uniform(0.5, 1.5)
            if attempt == policy.attempts or time.monotonic() - begin + delay > policy.budget:
                raise UnreachableError(
                    f"{what} cannot be reached ({_reason(error)}) after {attempt} tries; check the network, then start "
                    "the same command again"
                ) from error
            logger.warning("%s: %s; trying again in %.1f s", what, _reason(error), delay)
            stopped.wait(delay)
    raise AssertionError("the last try returns or raises")


def network_errors() -> tuple[type[BaseException], ...]:
    """Everything a file system client may raise: OSError, the errors of its libraries, and fsspec's ValueErrors."""
    known = [getattr(sys.modules.get(module), name, None) for module, name in _LIBRARY_ERRORS]
    return (OSError, ValueError, NotImplementedError, *(kind for kind in known if isinstance(kind, type)))


def _remedy(error: BaseException) -> str | None:
    """What the user can do about a permanent error; None for one that may be transient."""
    # fsspec's http file system turns every failure to get a file's size into FileNotFoundError.
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, network_errors()):
        return _remedy(error.__cause__)
    status = status_of(error)
    if status in _DENIED_STATUS or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return "check the credentials for it and that they may read it"
    if status == 404 or isinstance(error, FileNotFoundError):
        return "check the path"
    if isinstance(error, IsADirectoryError):
        return "it is a folder: add a pattern such as '/*.parquet'"
    if isinstance(error, ValueError | NotImplementedError):
        return "check the URL, and that the server answers range requests"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "unset HF_HUB_OFFLINE"
    if status is not None and 400 <= status < 500 and status not in _PASSING_STATUS:
        return "check the URL"
    return None


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error, under any of the names that client libraries use; None if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    elif response is not None:
        found = [getattr(response, "status_code", None)]
    else:
        found = [vars(error).get(name) for name in ("status", "code")]
    return next((status for status in found if isinstance(status, int) and 100 <= status < 600), None)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, network_errors()):
        error = error.__cause__
    status = status_of(error)
    text = message_line(error)[:200]
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"HTTP status {status}" if status is not None else (text or type(error).__name__)
