"""What is printed may go nowhere: a full disk below `> log`, or a reader such as `head` that has left."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def surviving(stream: TextIO) -> Iterator[None]:
    """Run a block that prints to `stream`. If that fails, say so once on stderr, and drop what follows on `stream`."""
    try:
        yield
        stream.flush()
    except (OSError, UnicodeEncodeError) as error:
        discard(stream)
        reason = getattr(error, "strerror", None) or error
        try:
            print(f"warning: the output cannot be written ({reason}); it is dropped from here on", file=sys.stderr)
            sys.stderr.flush()
        except OSError:  # both go to the same file or pipe
            discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Lead `stream` to nowhere, with the text that waits in its buffer: a later flush would fail on it again."""
    with contextlib.suppress(OSError, ValueError):  # one without a descriptor, as tests and notebooks have
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
