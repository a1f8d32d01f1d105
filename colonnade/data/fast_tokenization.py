"""The encoder of the optional package `fastokens`: the same ids as `tokenizers`, at a small part of the CPU time.

It is used only where `colonnade.data.tokenizer_backend` has shown that the ids are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from colonnade.data.flat_ids import FlatIds

PACKAGE = "fastokens"


class BackendUnavailableError(Exception):
    """The fast encoder cannot be used; the message says why, to stand behind the package's name."""


class FastEncoder:
    """Encodes texts with one `fastokens.Tokenizer`. Threads may share it; each call works on the thread that makes it
    and releases Python's lock.

    Attributes:
        version: of the package.
    """

    def __init__(self, serialized: str) -> None:
        """`serialized` is a tokenizer.json. Raises BackendUnavailableError: not installed, or it is not supported."""
        # Read once a process, at the first encoding. With one thread there is no pool: the number of threads is what
        # was set for this rank, where the library would take up to 32 in each. A user's setting wins.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        try:
            import fastokens
        except ImportError as error:
            raise BackendUnavailableError("is not installed: pip install 'colonnade[fast]'") from error
        self.version = package_version()
        try:
            self._tokenizer: Any = fastokens.Tokenizer.from_json_str(serialized)
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BackendUnavailableError(f"{self.version} cannot use this tokenizer: {reason}") from error

    def __call__(self, texts: list[str]) -> FlatIds:
        """Token ids without special tokens; text that spells one is encoded as text.

        Raises:
            ValueError, RuntimeError: the package could not encode a text.
        """
        ids, offsets = self._tokenizer.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        # Views of the bytes handed over: ids are far below 2**31.
        return FlatIds(np.frombuffer(ids, "<i4"), np.diff(np.frombuffer(offsets, "<i8")))


_shared: dict[str, FastEncoder] = {}


def shared_encoder(digest: str, serialize: Callable[[], str]) -> FastEncoder:
    """The encoder of a tokenizer, kept for the next stream of this process: building one takes seconds where the
    vocabulary is large. Only the last one is kept. Raises BackendUnavailableError."""
    if digest not in _shared:
        _shared.clear()
        _shared[digest] = FastEncoder(serialize())
    return _shared[digest]


def package_version() -> str:
    """The version of the package; empty where it is not installed."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return ""
