"""The encoder of the optional package `fastokens`: the same ids as `tokenizers` in a fraction of the CPU time.

It is used only after `colonnade.data.tokenizer_backend` has checked that the ids are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from colonnade.data.flat_ids import FlatIds
from colonnade.errors import message_line

PACKAGE = "fastokens"


class BackendUnavailableError(Exception):
    """The fast encoder cannot be used; the message says why and is printed after the package's name."""


class FastEncoder:
    """Encodes texts with one `fastokens.Tokenizer`. It is thread-safe; each call encodes on the calling thread and
    releases the GIL.

    Attributes:
        version: version of the package.
    """

    def __init__(self, serialized: str) -> None:
        """`serialized` is the text of a tokenizer.json. Raises BackendUnavailableError: the package is not installed,
        or does not support this tokenizer."""
        # The library reads this variable once per process, at the first encoding. With one thread it creates no pool,
        # so each rank uses exactly the threads set for it instead of up to 32 of the library's. A user's setting wins.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        try:
            import fastokens
        except ImportError as error:
            raise BackendUnavailableError("is not installed: pip install 'colonnade[fast]'") from error
        self.version = package_version()
        try:
            self._tokenizer: Any = fastokens.Tokenizer.from_json_str(serialized)
        except (ValueError, RuntimeError) as error:
            reason = message_line(error)[:200]
            raise BackendUnavailableError(f"{self.version} cannot use this tokenizer: {reason}") from error

    def __call__(self, texts: list[str]) -> FlatIds:
        """Token ids without special tokens; text that spells a special token is encoded as plain text.

        Raises:
            ValueError, RuntimeError: the package could not encode a text.
        """
        ids, offsets = self._tokenizer.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        # Views of the returned bytes, no copy. Reading ids as int32 is safe: they are far below 2**31.
        return FlatIds(np.frombuffer(ids, "<i4"), np.diff(np.frombuffer(offsets, "<i8")))


_shared: dict[str, FastEncoder] = {}


def shared_encoder(digest: str, serialize: Callable[[], str]) -> FastEncoder:
    """The encoder for a tokenizer, cached for later streams of this process, because building one takes seconds for a
    large vocabulary. Only the last one is cached. Raises BackendUnavailableError."""
    if digest not in _shared:
        _shared.clear()
        _shared[digest] = FastEncoder(serialize())
    return _shared[digest]


def package_version() -> str:
    """The version of the package; empty if it is not installed."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return ""
