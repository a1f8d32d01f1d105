"""Which failures of a network are worth another try, and the tries.

A network error is tried again with exponential back-off and then ends the run. It is never taken for damaged data: a
lost mount or an expired token would silently skip the rest of the corpus.
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

from colonnade.errors import RunError

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Client libraries raise these without deriving them from OSError. Looked up only in modules that are imported already.
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
# 4xx answers that another try can change: request timeout, too early, too many requests.
_PASSING_STATUS = (408, 425, 429)
_DENIED_STATUS = (401, 403)


@dataclass(frozen=True)
class RetryPolicy:
    """Tries of one request.

    Attributes:
        attempts: tries in all.
        first_delay, longest_delay: seconds between tries; doubled each time, each halved or grown by half at random.
        budget: seconds after which no further try is begun.
        connect_timeout, read_timeout: seconds without a connection, and without a byte, over http(s). Other clients
            have their own.
    """

    attempts: int = 6
    first_delay: float = 0.5
    longest_delay: float = 8.0
    budget: float = 60.0
    connect_timeout: float = 10.0
    read_timeout: float = 20.0


# Tests replace it; nothing else changes it.
POLICY = RetryPolicy()


class UnreachableError(RunError):
    """A remote file cannot be reached: the tries are used up, or no try can help."""


def with_retries(what: str, request: Callable[[], T], stopped: threading.Event | None = None) -> T:
    """The result of `request()`, tried again after errors that may pass. `what` names the file in messages.

    Raises:
        UnreachableError: at once for a wrong path, missing credentials or a server without range requests, and after
            the last try. Its text is one line.
    """
    policy, random_part = POLICY, random.Random()
    begin = time.monotonic()
    for attempt in range(1, policy.attempts + 1):
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
            if (stopped or threading.Event()).wait(delay):
                raise UnreachableError(f"{what}: reading was stopped") from error
    raise AssertionError("the last try returns or raises")


def network_errors() -> tuple[type[BaseException], ...]:
    """Everything a file system's client may raise: OSError, what its libraries add, and fsspec's own ValueErrors."""
    known = [getattr(sys.modules.get(module), name, None) for module, name in _LIBRARY_ERRORS]
    return (OSError, ValueError, NotImplementedError, *(kind for kind in known if isinstance(kind, type)))


def _remedy(error: BaseException) -> str | None:
    """What to do about an error that no further try can change; None for one that may pass."""
    # fsspec's http file system turns every failure to learn a file's size into FileNotFoundError.
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
    """The HTTP status that an error carries, under any of the names client libraries give it."""
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
    text = " ".join(str(error).split())[:200]
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"HTTP status {status}" if status is not None else (text or type(error).__name__)
