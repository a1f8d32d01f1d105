"""Writing files while their SHA-256 is taken: by a thread beside the one that writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem
from torch.serialization import get_crc32_options, set_crc32_options

_WORTH_A_THREAD = 1 << 20


class HashingStream:
    """A binary file open for writing that knows the SHA-256 of what was written. Use it as a context manager.

    Args:
        stream: the file; this object closes it.

    Attributes:
        failure: why the last write that failed did.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, "checkpoint-hash")
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`, whose memory may be changed or freed afterwards; the number of bytes."""
        try:
            return self._write(data)
        except OSError as error:
            self.failure = error
            raise

    def _write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if view.nbytes < _WORTH_A_THREAD:
            self._digest.update(view)
            self._stream.write(view)
        else:
            # Both let go of the interpreter's lock.
            hashed = self._hasher.submit(self._digest.update, view)
            try:
                self._stream.write(view)
            finally:
                hashed.result()
        return view.nbytes

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def close(self) -> None:
        self._hasher.shutdown()
        self._stream.close()

    def __enter__(self) -> HashingStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HashingFileSystem(FileSystem):
    """DCP's local files; `sha256` holds the hash of each that was written, by the name it was written under."""

    def __init__(self) -> None:
        self.sha256: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as plain:
                yield plain
            return
        with HashingStream(cast("IO[bytes]", Path(path).open(mode))) as stream:
            try:
                yield stream
            except RuntimeError as error:
                # Where a write fails, torch.save tells of a position in its archive and keeps the reason to itself.
                raise stream.failure or error from error
            self.sha256[Path(path).name] = stream.hexdigest()


@contextmanager
def crc32_left_out() -> Iterator[None]:
    """In the block `torch.save` leaves out the CRC-32 of what it writes, which takes half as long as SHA-256.

    Nothing is lost where files have a SHA-256: torch does not compare a CRC-32 when it reads (2.13).
    """
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
