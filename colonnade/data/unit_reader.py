"""Reading one unit at a time, in windows, with the next one fetched in the background where it is remote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from colonnade.data.corpus import WINDOW_BYTES, DamagedUnit, Shard
from colonnade.data.filesystems import Background, is_remote, open_source
from colonnade.data.formats import OPEN, ShardFile
from colonnade.data.windows import cut_windows
from colonnade.errors import RunError

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Expected:
    """A unit under way in the background."""

    shard: Shard
    number: int
    fetch: Background[ShardFile]

    def is_for(self, shard: Shard, number: int) -> bool:
        return self.number == number and self.shard == shard


class UnitReader:
    """Reads the text of one unit at a time and keeps the file of the last one open.

    Used from one thread; several may exist at once. Beside the window handed out it holds another one being put
    together, and of a remote file at most two ranges of 8 MiB: about 64 MiB in all, as long as no document, page or
    Arrow batch is larger than a window.
    """

    def __init__(self, text_column: str) -> None:
        _use_system_allocator()
        self._text_column = text_column
        self._file: ShardFile | None = None
        self._expected: list[_Expected] = []

    def windows(self, shard: Shard, number: int) -> Iterator[pa.Array | npt.NDArray[np.unsignedinteger]]:
        """Unit `number` of `shard` in windows of about `WINDOW_BYTES` of text.

        A window is a `large_string` array of whole rows. Boundaries follow from the file alone: one window where the
        unit is no larger, none where it has no rows. Rows are not checked for UTF-8. A token shard's window is an
        array uint16 or uint32 [T], one row of ids, not compared with any vocabulary.

        The whole unit is read and checked before its first window leaves. One that is larger than a window is read
        twice, the first time only to check it: so a unit that is bad near its end is never half delivered, and memory
        stays bounded.

        Raises:
            DamagedUnit: before the first window: the bytes are there and wrong (checksum, encoding, truncation).
            RunError: the file cannot be reached (missing, no permission, I/O or network error), or was changed between
                the two readings. Never a skip: a lost mount would silently skip the rest of the corpus.
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
                raise RunError(
                    f"data shard {shard.path} changed while it was read ({damage}); restore it and start the same "
                    "command again"
                ) from damage
            if window is None:
                file.source.release()
                return
            yield window
            del window  # or two would be in memory beside the consumer's

    def expect(self, shard: Shard, number: int) -> None:
        """A hint: unit `number` of `shard` comes next. A remote one is fetched in the background.

        May be called before the current unit's windows are asked for, or after. Of hints that were not followed, the
        last two are kept.
        """
        if not is_remote(shard.path) or any(each.is_for(shard, number) for each in self._expected):
            return
        while len(self._expected) > 1:
            self._expected.pop(0).fetch.then(_close)
        self._expected.append(_Expected(shard, number, Background(lambda: self._open(shard, number))))

    def close(self) -> None:
        """Close what is open. A request under way is left to its thread."""
        while self._expected:
            self._expected.pop().fetch.then(_close)
        if self._file is not None:
            self._file.close()
        self._file = None

    def _first_window(
        self, shard: Shard, number: int
    ) -> tuple[pa.Array | npt.NDArray[np.unsignedinteger] | None, bool]:
        """The unit's first window after all of it was read; None and True where there are more."""
        file = self._ready(shard, number)
        if shard.layout == "tokens":
            return next(file.pieces(number), None), False
        windows = cut_windows(file.pieces(number), WINDOW_BYTES)
        first, more = next(windows, None), False
        for _ in windows:
            first, more = None, True
        return first, more

    def _ready(self, shard: Shard, number: int) -> ShardFile:
        """The open file, with the unit's bytes at hand or on their way."""
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
        source = open_source(shard.path, shard.size)
        try:
            if source.size != shard.size:
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
        """`call()`, with what libraries raise sorted into damage and unreachable files."""
        import pyarrow as pa

        try:
            return call()
        except (DamagedUnit, OSError, EOFError, pa.ArrowException) as error:
            failure = self._file.source.failure if self._file is not None else None
            if failure is not None:
                raise failure from error
            if isinstance(error, DamagedUnit):
                raise
            reason = " ".join(str(error).split())
            # pyarrow raises OSError for bad data as well; only what the system reports carries an errno.
            if isinstance(error, OSError) and error.errno is not None:
                raise RunError(f"data shard {shard.path} cannot be reached: {reason}") from error
            raise DamagedUnit(reason) from error


def _use_system_allocator() -> None:
    """pyarrow's own allocators keep what was freed, tens of MiB a process, and a lane's memory could not be bounded."""
    import pyarrow as pa

    if "ARROW_DEFAULT_MEMORY_POOL" not in os.environ and pa.default_memory_pool().backend_name != "system":
        pa.set_memory_pool(pa.system_memory_pool())


def _close(file: ShardFile) -> None:
    file.close()
