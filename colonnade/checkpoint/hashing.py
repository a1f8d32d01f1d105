"""Writing files whose SHA-256 is taken while the disk is waited for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem
from torch.serialization import get_crc32_options, set_crc32_options

from colonnade.checkpoint.manifest import file_sha256


class HashedFile:
    """A file open for writing, whose bytes are hashed by a thread while they are made durable.

    Whoever writes asks for the descriptor when all is written, in order to `fsync`. From then on the disk is busy and
    the processor is not: the thread reads the file back from the page cache, and hashlib lets go of the interpreter's
    lock. Hashing what is written piece by piece would take the processor from the writing instead.

    Attributes:
        failure: why a write failed; None where none did.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = cast("IO[bytes]", path.open("wb"))
        self._thread = ThreadPoolExecutor(1, "checkpoint-hash")
        self._begun: tuple[int, Future[str]] | None = None
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self.failure = error
            raise

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        """The descriptor of a file whose bytes so far have left this process, and are being hashed."""
        self._begin_hashing()
        return self._stream.fileno()

    def _begin_hashing(self) -> None:
        self._stream.flush()
        size = self._stream.tell()
        if self._begun is None or self._begun[0] != size:
            self._begun = (size, self._thread.submit(file_sha256, self._path))

    def close(self) -> None:
        """Waits for the thread."""
        if not self._stream.closed:
            self._begin_hashing()
            self._thread.shutdown()
            self._stream.close()

    def hexdigest(self) -> str:
        """SHA-256 of the closed file. Raises the OSError that the thread met."""
        assert self._begun is not None
        return self._begun[1].result()

    def abandon(self) -> None:
        """Close it as it is, after an error that is to be heard instead of what closing it may raise."""
        self._thread.shutdown(cancel_futures=True)
        with suppress(OSError):
            self._stream.close()


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
        file = HashedFile(Path(path))
        try:
            yield file
            file.close()
        except BaseException as error:
            file.abandon()
            if isinstance(error, RuntimeError) and file.failure is not None:
                # torch.save tells of a position in its archive, and keeps the reason to itself.
                raise file.failure from error
            raise
        self.sha256[Path(path).name] = file.hexdigest()


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
