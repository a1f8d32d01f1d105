"""Arrow IPC, file and stream: a unit is a record batch.

A stream has no footer, and a file's footer does not give the number of rows. Both are found by walking the message
headers, whose few fields are parsed here directly: pyarrow would read every message body, even over the network.
Format: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc

A record batch is held in memory as a whole, and with it the dictionary if the text column is dictionary-encoded.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from colonnade.data.corpus import DamagedUnit, Layout, Shard
from colonnade.data.filesystems import Source, fingerprint
from colonnade.data.formats.base import ShardFile, as_bytes, check_text_column, checked
from colonnade.data.windows import PIECE_ROWS

if TYPE_CHECKING:
    import pyarrow as pa

# MessageHeader in Arrow's Message.fbs.
_DICTIONARY_BATCH = 2
_RECORD_BATCH = 3
_CONTINUATION = 0xFFFFFFFF
# Limit for the metadata of one message. A larger length is damaged.
_MAX_METADATA = 256 << 20
# Read at once at the beginning of a message.
_HEADER_BYTES = 64 << 10
# Text decoded from a dictionary at a time, unless a single document is larger.
_DECODED_BYTES = 1 << 20


class _Message(NamedTuple):
    """Byte range of a message; `rows` of a record batch; id and number of values of a dictionary batch."""

    start: int
    end: int
    rows: int | None = None
    dictionary: int | None = None
    values: int = 0


def describe(source: Source, path: str, layout: Layout, text_column: str) -> Shard:
    """Rows and record batches, from the message headers.

    Raises:
        UsageError: the file has no text column of that name.
        pyarrow.ArrowException, OSError, EOFError: the file is damaged.
    """
    import pyarrow as pa

    digest = fingerprint(source)
    messages = list(_messages(source, begin=8 if layout == "arrow-file" else 0))
    prologue = [message for message in messages if message.rows is None]
    batches: list[tuple[int, int, int]] = []
    before = 0
    for message in messages:
        if message.rows is None:
            before += 1
        else:
            batches.append((message.start, message.end, before))
    if not prologue:
        raise EOFError("it holds no schema")
    begin, end = prologue[0][:2]
    header = source.read_at(begin, end - begin)
    schema = pa.ipc.open_stream(header).schema
    if layout == "arrow-file":
        with source.arrow() as file:
            if pa.ipc.open_file(file).num_record_batches != len(batches):
                raise EOFError("its footer and its messages disagree")
    check_text_column(path, schema, text_column)
    return Shard(
        path,
        layout,
        source.size,
        sum(message.rows or 0 for message in messages),
        _text_sizes(messages, _dictionary_id(header, schema.get_field_index(text_column))),
        digest,
        prologue=tuple(message[:2] for message in prologue),
        batches=tuple(batches),
    )


def _text_sizes(messages: list[_Message], dictionary: int | None) -> tuple[int, ...]:
    """For each record batch its size; for a dictionary-encoded text column, whose batches hold indices only, the mean
    size of a value in the file's dictionaries times the rows, in addition."""
    parts = [message for message in messages if dictionary is not None and message.dictionary == dictionary]
    mean = sum(part.end - part.start for part in parts) / max(1, sum(part.values for part in parts))
    return tuple(
        message.end - message.start + round(message.rows * mean) for message in messages if message.rows is not None
    )


def _messages(source: Source, begin: int) -> Iterator[_Message]:
    """The messages from byte `begin` to the end-of-stream marker or the end of the file. Raises EOFError."""
    start = begin
    while start < source.size:
        prefix = source.read_at(start, 8)
        if len(prefix) < 8:
            # Streams before Arrow 0.15 end with four zero bytes.
            if prefix == b"\0\0\0\0":
                return
            raise EOFError(f"the message at byte {start} is cut short")
        mark, length = struct.unpack("<II", prefix)
        at = start + 8
        if mark != _CONTINUATION:  # written before Arrow 0.15
            length, at = mark, start + 4
        if length == 0:
            return
        if length > _MAX_METADATA or at + length > source.size:
            raise EOFError(f"the message at byte {start} is cut short")
        try:
            header = _header(source.read_at(at, length))
        except (struct.error, IndexError) as error:
            raise EOFError(f"the message at byte {start} is damaged") from error
        end = at + length + header.end
        if min(header.end, header.rows or 0, header.values) < 0 or end > source.size:
            raise EOFError(f"the message at byte {start} is cut short")
        yield header._replace(start=start, end=end)
        start = end


def _header(metadata: bytes) -> _Message:
    """What a flatbuffer `Message` says, as if the message were its body alone: `end` is the length of the body."""
    root = struct.unpack_from("<I", metadata, 0)[0]
    kind = _field(metadata, root, 1)
    length = _int64(metadata, _field(metadata, root, 3))
    kind = metadata[kind] if kind else 0
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return _Message(0, length)
    header = _table(metadata, _field(metadata, root, 2))
    if kind == _RECORD_BATCH:
        return _Message(0, length, rows=_int64(metadata, _field(metadata, header, 0)))
    values = _int64(metadata, _field(metadata, _table(metadata, _field(metadata, header, 1)), 0))
    return _Message(0, length, dictionary=_int64(metadata, _field(metadata, header, 0)), values=values)


def _dictionary_id(message: bytes, column: int) -> int | None:
    """From the schema message: the id of the dictionary of a top-level column; None if the column has none."""
    metadata = message[8 if message.startswith(b"\xff\xff\xff\xff") else 4 :]
    schema = _table(metadata, _field(metadata, struct.unpack_from("<I", metadata, 0)[0], 2))
    fields = _table(metadata, _field(metadata, schema, 1))
    field = _table(metadata, fields + 4 + 4 * column)
    encoding = _field(metadata, field, 4)
    return _int64(metadata, _field(metadata, _table(metadata, encoding), 0)) if encoding else None


def _table(data: bytes, at: int) -> int:
    """Offset of the flatbuffer table or vector that the reference at offset `at` points to."""
    offset: int = struct.unpack_from("<I", data, at)[0]
    return at + offset


def _int64(data: bytes, at: int) -> int:
    """The flatbuffer int64 at offset `at`; 0, its default value, if `at` is 0."""
    value: int = struct.unpack_from("<q", data, at)[0] if at else 0
    return value


def _field(data: bytes, table: int, number: int) -> int:
    """Offset of field `number` of the flatbuffer table at `table`; 0 if the field has its default value."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise IndexError(vtable)
    if 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset: int = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return table + offset if offset else 0


class _Messages(io.RawIOBase):
    """The messages given so far, one after the other, as a file. They are read from the shard when needed."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._left: list[tuple[int, int]] = []

    def add(self, ranges: list[tuple[int, int]]) -> None:
        """Append messages, given as byte ranges of the shard."""
        self._left += ranges

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises DamagedUnit if the shard was truncated."""
        if not self._left:
            return 0
        start, stop = self._left.pop(0)
        end = min(stop, start + len(buffer))
        data = self._source.read_at(start, end - start)
        if len(data) < end - start:
            raise DamagedUnit("the file was cut short")
        if end < stop:
            self._left.insert(0, (end, stop))
        buffer[: len(data)] = data
        return len(data)


class ArrowFile(ShardFile):
    """An open Arrow file or stream. The dictionaries read so far are kept until it is closed."""

    def __init__(self, source: Source, shard: Shard, text_column: str) -> None:
        super().__init__(source, shard, text_column)
        self._opened: pa.NativeFile | None = None
        self._reader: Any = None
        self._messages = _Messages(source)
        self._prologue_read = 0
        self._dictionary: tuple[pa.Array, pa.Array, int] | None = None

    def byte_range(self, number: int) -> tuple[int, int]:
        return self.shard.batches[number][:2]

    def pieces(self, number: int) -> Iterator[pa.Array]:
        import pyarrow as pa

        try:
            batch = self._from_file(number) if self.shard.layout == "arrow-file" else self._from_stream(number)
        except BaseException:
            # A reader that failed may be in the middle of a message.
            self._drop_reader()
            raise
        column = batch.column(self._text_column)
        if pa.types.is_dictionary(column.type):
            yield from self._decoded(column)
            return
        column = checked(column)
        for start in range(0, len(column), PIECE_ROWS):
            yield column.slice(start, PIECE_ROWS)

    def _from_file(self, number: int) -> pa.RecordBatch:
        import pyarrow as pa

        if self._reader is None:
            self._opened = self.source.arrow()
            schema = pa.ipc.open_file(self._opened).schema
            # With `included_fields` set, only the buffers of the text column are read.
            self._reader = pa.ipc.open_file(self._opened, options=self._only_text(schema))
        if number >= self._reader.num_record_batches:
            raise DamagedUnit(f"the file has {self._reader.num_record_batches} record batches now")
        return self._reader.get_batch(number)

    def _from_stream(self, number: int) -> pa.RecordBatch:
        """The reader is given only the messages needed: those before the first batch, then the batches asked for, each
        after the dictionaries that precede it in the stream."""
        import pyarrow as pa

        begin, end, before = self.shard.batches[number]
        if before < self._prologue_read:  # the reader has a later dictionary
            self._drop_reader()
        if self._reader is None:
            (start, stop), *_ = self.shard.prologue
            options = self._only_text(pa.ipc.open_stream(self.source.read_at(start, stop - start)).schema)
            self._messages.add([(start, stop)])
            self._prologue_read = 1
            # pyarrow reads the length of a message, its header and its body one by one.
            file = io.BufferedReader(self._messages, _HEADER_BYTES)
            self._reader = pa.ipc.open_stream(pa.PythonFile(file, mode="r"), options=options)
        self._messages.add([*self.shard.prologue[self._prologue_read : before], (begin, end)])
        self._prologue_read = before
        return self._reader.read_next_batch()

    def _decoded(self, column: pa.Array) -> Iterator[pa.Array]:
        """Bytes of a dictionary-encoded column. Raises pyarrow.ArrowException for wrong offsets and indices."""
        column.indices.validate(full=True)
        values, longest = self._values(column.dictionary)
        rows = max(1, min(PIECE_ROWS, _DECODED_BYTES // max(1, longest)))
        for start in range(0, len(column), rows):
            yield values.take(column.indices.slice(start, rows))

    def _values(self, dictionary: pa.Array) -> tuple[pa.Array, int]:
        """The values of a dictionary as bytes, checked, and the size of the longest one. The batches of a file share
        the dictionary in memory, and it is checked once."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self._dictionary is None or not _same_memory(self._dictionary[0], dictionary):
            values = as_bytes(checked(dictionary))
            if pa.types.is_binary_view(values.type):
                values = values.cast(pa.large_binary())  # there is no `take` for views
            longest = 0 if pa.types.is_null(values.type) else pc.max(pc.binary_length(values)).as_py()
            self._dictionary = (dictionary, values, longest or 0)
        return self._dictionary[1:]

    def _only_text(self, schema: pa.Schema) -> pa.ipc.IpcReadOptions:
        import pyarrow as pa

        index = schema.get_field_index(self._text_column)
        if index < 0:
            raise DamagedUnit(f"the file has no column {self._text_column!r} now")
        return pa.ipc.IpcReadOptions(included_fields=[index])

    def _drop_reader(self) -> None:
        self._reader, self._dictionary, self._prologue_read = None, None, 0
        self._messages = _Messages(self.source)
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    def close(self) -> None:
        self._drop_reader()
        super().close()


def _same_memory(one: pa.Array, other: pa.Array) -> bool:
    """Whether two arrays are the same values at the same addresses. Both are alive, so no address was used again."""
    return (one.type, one.offset, len(one)) == (other.type, other.offset, len(other)) and [
        buffer and (buffer.address, buffer.size) for buffer in one.buffers()
    ] == [buffer and (buffer.address, buffer.size) for buffer in other.buffers()]
