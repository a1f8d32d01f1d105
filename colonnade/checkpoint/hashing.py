"""Writing a file while its SHA-256 is taken and while the disk already works on what was written.

A checkpoint's file is written once, by one thread that computes checksums of its own and copies into the page cache.
Beside it one thread hashes (hashlib releases the interpreter's lock), and another has the disk write out what is there.
Left to the `fsync` at the end, the disk would wait for the processor first and the processor for the disk after.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem

_CHUNK = 4 << 20
_WRITE_OUT_EVERY = 32 << 20


class HashingStream:
    """A binary file open for writing that knows the SHA-256 of what was written. Use it as a context manager.

    Args:
        stream: the file, buffered; this object closes it.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, "checkpoint-hash")
        self._disk = ThreadPoolExecutor(1, "checkpoint-disk")
        self._writing_out: Future[None] | None = None
        self._since_write_out = 0

    def write(self, data: Any) -> int:
        """Write all of `data`, whose memory may be changed or freed afterwards; the number of bytes."""
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, _CHUNK):
            chunk = view[start : start + _CHUNK]
            if chunk.nbytes < _CHUNK // 8:  # a thread would cost more than it saves
                self._digest.update(chunk)
                self._stream.write(chunk)
            else:
                hashed = self._hasher.submit(self._digest.update, chunk)
                try:
                    self._stream.write(chunk)
                finally:
                    hashed.result()
            self._write_out(chunk.nbytes)
        return view.nbytes

    def _write_out(self, count: int) -> None:
        """Have the disk begin with what is there, without waiting for it."""
        self._since_write_out += count
        if self._since_write_out >= _WRITE_OUT_EVERY and (self._writing_out is None or self._writing_out.done()):
            self._settle()
            self._since_write_out = 0
            self._writing_out = self._disk.submit(os.fdatasync, self._stream.fileno())

    def _settle(self) -> None:
        """Wait for the disk's thread; raises the OSError it met."""
        if self._writing_out is not None:
            writing_out, self._writing_out = self._writing_out, None
            writing_out.result()

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        """The descriptor, for the `fsync` that makes the file durable: called once all is written."""
        # An error of the disk is reported to one call alone: not to the later fsync.
        self._settle()
        return self._stream.fileno()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def close(self) -> None:
        try:
            self._settle()
        finally:
            self._hasher.shutdown()
            self._disk.shutdown()
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
            yield stream
            self.sha256[Path(path).name] = stream.hexdigest()
