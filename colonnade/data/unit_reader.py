"""Reading one unit at a time, in windows; the next unit of a remote file is fetched in the background."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from colonnade.data.corpus import WINDOW_BYTES, DamagedUnit, Shard
from colonnade.data.filesystems import Background, is_remote, open_source
from colonnade.data.formats import OPEN, ShardFile
from colonnade.data.windows import cut_windows
from colonnade.errors import RunError, message_line

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Expected:
    """A unit that is being fetched in the background."""

    shard: Shard
    number: int
    fetch: Background[ShardFile]

    def is_for(self, shard: Shard, number: int) -> bool:
        return self.number == number and self.shard == shard


class UnitReader:
    """Reads the text of one unit at a time and keeps the file of the last unit open.

    One reader is used from one thread; several readers may exist at once. Besides the window it has yielded, it holds
    another window being assembled and, for a remote file, at most two ranges of 8 MiB: about 64 MiB in all, as long as
    no document, page or Arrow batch is larger than a window.
    """

    def __init__(self, text_column: str) -> None:
        _use_system_allocator()
        self._text_column = text_column
        self._file: ShardFile | None = None
        self._expected: list[_Expected] = []
        self._stopped = threading.Event()

    def windows(self, shard: Shard, number: int) -> Iterator[pa.Array | npt.NDArray[np.unsignedinteger]]:
        """Unit `number` of `shard` in windows of about `WINDOW_BYTES` of text.

        A window is a `large_string` array of whole rows. Window boundaries depend only on the file: a unit no larger
        than a window is one window, a unit without rows has none. Rows are not checked for UTF-8. A token shard's
        window is an array uint16 or uint32 [T], one row of ids, not checked against any vocabulary.

        The whole unit is read and checked before its first window is yielded. A unit larger than a window is read
        twice, the first time only to check it. So a unit that is bad near its end is never delivered in part, and
        memory stays bounded.

        Raises:
            DamagedUnit: only before the first window: the bytes can be read but are wrong (checksum, encoding,
                truncation).
            RunError: the file cannot be reached (missing, no permission, I/O or network error), it changed between the
                two reads, or it grew since the run began; or the reader was stopped. Such a unit is never skipped: a
                lost mount, or a program that appends to the file, would silently cost the rest of the corpus.
        """
        first, more = self._guarded(shard, lambda: self._first_window(shard, number))
        file = self._file
        assert file is not None
        if not more:
            file.source.release()
            if first is not None:
                yield first
            return
        del first
        windows = cut_windows(file.pieces(number), WINDOW_BYTES)
        while True:
            try:
                window = self._guarded(shard, lambda: next(windows, None))
            except DamagedUnit as damage:
                raise _changed(shard, str(damage)) from damage
            if window is None:
                file.source.release()
                return
            yield window
            del window  # else two windows would be in memory besides the consumer's

    def expect(self, shard: Shard, number: int) -> None:
        """A hint that unit `number` of `shard` is read next. If it is remote, it is fetched in the background.

        It may be called before or after the current unit's windows are requested. The last two hints that were not yet
        used are kept.
        """
        if not is_remote(shard.path) or any(each.is_for(shard, number) for each in self._expected):
            return
        while len(self._expected) > 1:
            self._expected.pop(0).fetch.then(_close)
        self._expected.append(_Expected(shard, number, Background(lambda: self._open(shard, number))))

    def stop(self) -> None:
        """Make a read that is in progress on another thread end soon, with RunError: it is not tried again. What comes
        later ends like that as well."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, and close what is open. A request in flight is left to its thread."""
        self.stop()
        while self._expected:
            self._expected.pop().fetch.then(_close)
        if self._file is not None:
            self._file.close()
        self._file = None

    def _first_window(
        self, shard: Shard, number: int
    ) -> tuple[pa.Array | npt.NDArray[np.unsignedinteger] | None, bool]:
        """Read the whole unit. Returns (its window, False) if it has at most one window, else (None, True)."""
        self._require_going_on(shard)
        file = self._ready(shard, number)
        if shard.layout == "tokens":
            return next(file.pieces(number), None), False
        windows = cut_windows(file.pieces(number), WINDOW_BYTES)
        first, more = next(windows, None), False
        for _ in windows:
            self._require_going_on(shard)
            first, more = None, True
        return first, more

    def _require_going_on(self, shard: Shard) -> None:
        if self._stopped.is_set():
            raise RunError(f"data shard {shard.path}: reading was stopped")

    def _ready(self, shard: Shard, number: int) -> ShardFile:
        """The open file, with the unit's bytes available or being fetched."""
        for expected in self._expected:
            if expected.is_for(shard, number):
                self._expected.remove(expected)
                fetched = expected.fetch.result()
                if self._file is not None:
                    self._file.close()
                self._file = fetched
                return fetched
        if self._file is None or self._file.shard != shard:
            if self._file is not None:
                self._file.close()
            self._file = None
            self._file = self._open(shard, None)
        self._focus(self._file, number)
        return self._file

    def _open(self, shard: Shard, number: int | None) -> ShardFile:
        source = open_source(shard.path, shard.size, self._stopped)
        try:
            if source.size > shard.size:
                raise _changed(shard, f"it has {source.size} bytes now and had {shard.size}")
            if source.size < shard.size:
                raise DamagedUnit(f"the file has {source.size} bytes now and had {shard.size}")
            file = OPEN[shard.layout](source, shard, self._text_column)
            if number is not None:
                self._focus(file, number)
        except BaseException as error:
            failure = source.failure
            source.close()
            if failure is not None:
                raise failure from error
            raise
        return file

    @staticmethod
    def _focus(file: ShardFile, number: int) -> None:
        if is_remote(file.shard.path):
            file.source.focus(*file.byte_range(number))

    def _guarded(self, shard: Shard, call: Callable[[], T]) -> T:
        """`call()`, with library errors classified: DamagedUnit for damage, RunError for an unreachable file."""
        import pyarrow as pa

        try:
            return call()
        except (DamagedUnit, OSError, EOFError, pa.ArrowException) as error:
            failure = self._file.source.failure if self._file is not None else None
            if failure is not None:
                raise failure from error
            if isinstance(error, DamagedUnit):
                raise
            reason = message_line(error)
            # pyarrow raises OSError for bad data as well; only errors from the system carry an errno.
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise RunError(
                    f"data shard {shard.path} cannot be opened: {reason}; every lane of every corpus keeps two files "
                    "open: raise ulimit -n, or give fewer --data-lanes"
                ) from error
            if isinstance(error, OSError) and error.errno is not None:
                raise RunError(f"data shard {shard.path} cannot be reached: {reason}") from error
            raise DamagedUnit(reason) from error


def _changed(shard: Shard, how: str) -> RunError:
    return RunError(
        f"data shard {shard.path} changed while it was read ({how}); restore it and start the same command again"
    )


def _use_system_allocator() -> None:
    """Make pyarrow use malloc: its own allocators keep freed memory, tens of MiB per process, so that the memory of a
    lane could not be bounded."""
    import pyarrow as pa

    if "ARROW_DEFAULT_MEMORY_POOL" not in os.environ and pa.default_memory_pool().backend_name != "system":
        pa.set_memory_pool(pa.system_memory_pool())


def _close(file: ShardFile) -> None:
    file.close()
