"""Writing files whose SHA-256 is computed while `fsync` waits for the disk."""

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
    """A file open for writing whose bytes a thread hashes while they are made durable.

    The writer asks for the descriptor when everything is written, in order to `fsync`. From then on the disk is busy
    and the CPU is not: the thread reads the file back from the page cache, and hashlib releases the GIL. Hashing each
    write as it is made would instead compete with writing for the CPU.

    Attributes:
        failure: why a write failed; None if none did.
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
        """Flush the bytes written so far, start hashing them, and return the file descriptor."""
        self._begin_hashing()
        return self._stream.fileno()

    def _begin_hashing(self) -> None:
        self._stream.flush()
        size = self._stream.tell()
        if self._begun is None or self._begun[0] != size:
            self._begun = (size, self._thread.submit(file_sha256, self._path))

    def close(self) -> None:
        """Close the file after waiting for the hash."""
        if not self._stream.closed:
            self._begin_hashing()
            self._thread.shutdown()
            self._stream.close()

    def hexdigest(self) -> str:
        """SHA-256 of the closed file. Raises an OSError of the hashing thread."""
        assert self._begun is not None
        return self._begun[1].result()

    def abandon(self) -> None:
        """Close the file in its current state after an error, without raising errors that would hide the first one."""
        self._thread.shutdown(cancel_futures=True)
        with suppress(OSError):
            self._stream.close()


class HashingFileSystem(FileSystem):
    """DCP's local file system; `sha256` maps the name of each file written to its hash."""

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
                # torch.save reports only a position in its archive, not the reason.
                raise file.failure from error
            raise
        self.sha256[Path(path).name] = file.hexdigest()


@contextmanager
def crc32_left_out() -> Iterator[None]:
    """Make `torch.save` skip its CRC-32 within the block; computing it takes half as long as the SHA-256.

    Nothing is lost for files that have a SHA-256: torch does not check the CRC-32 when it reads (2.13).
    """
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
