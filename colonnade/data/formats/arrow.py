"""Arrow IPC, file and stream: a unit is a record batch.

A stream has no footer, and a file's footer does not give the number of rows. Both are found by walking the message
headers, whose few fields are parsed here directly: pyarrow would read every message body, even over the network.
Format: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc

A record batch is held in memory as a whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from colonnade.data.corpus import DamagedUnit, Layout, Shard
from colonnade.data.filesystems import Source, fingerprint
from colonnade.data.formats.base import ShardFile, check_text_column, checked
from colonnade.data.windows import PIECE_ROWS

if TYPE_CHECKING:
    import pyarrow as pa

_RECORD_BATCH = 3  # MessageHeader in Arrow's Message.fbs
_CONTINUATION = 0xFFFFFFFF
# Limit for the metadata of one message. A larger length is damaged.
_MAX_METADATA = 256 << 20


class _Message(NamedTuple):
    start: int
    end: int
    rows: int | None  # None if the message is not a record batch


def describe(source: Source, path: str, layout: Layout, text_column: str) -> Shard:
    """Rows and record batches, from the message headers.

    Raises:
        UsageError: the file has no text column of that name.
        pyarrow.ArrowException, OSError, EOFError: the file is damaged.
    """
    import pyarrow as pa

    digest = fingerprint(source)
    prologue: list[tuple[int, int]] = []
    batches: list[tuple[int, int, int]] = []
    rows = 0
    for message in _messages(source, begin=8 if layout == "arrow-file" else 0):
        if message.rows is None:
            prologue.append((message.start, message.end))
        else:
            batches.append((message.start, message.end, len(prologue)))
            rows += message.rows
    if not prologue:
        raise EOFError("it holds no schema")
    begin, end = prologue[0]
    schema = pa.ipc.open_stream(source.read_at(begin, end - begin)).schema
    if layout == "arrow-file":
        with source.arrow() as file:
            if pa.ipc.open_file(file).num_record_batches != len(batches):
                raise EOFError("its footer and its messages disagree")
    check_text_column(path, schema, text_column)
    sizes = tuple(end - begin for begin, end, _ in batches)
    return Shard(path, layout, source.size, rows, sizes, digest, prologue=tuple(prologue), batches=tuple(batches))


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
            body, rows = _header(source.read_at(at, length))
        except (struct.error, IndexError) as error:
            raise EOFError(f"the message at byte {start} is damaged") from error
        end = at + length + body
        if body < 0 or end > source.size or (rows or 0) < 0:
            raise EOFError(f"the message at byte {start} is cut short")
        yield _Message(start, end, rows)
        start = end


def _header(metadata: bytes) -> tuple[int, int | None]:
    """From a flatbuffer `Message`: length of the body, and rows if it is a record batch (else None)."""
    root = struct.unpack_from("<I", metadata, 0)[0]
    kind = _field(metadata, root, 1)
    body = _field(metadata, root, 3)
    length = struct.unpack_from("<q", metadata, body)[0] if body else 0
    if not kind or metadata[kind] != _RECORD_BATCH:
        return length, None
    header = _field(metadata, root, 2)
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    rows = _field(metadata, batch, 0)
    return length, struct.unpack_from("<q", metadata, rows)[0] if rows else 0


def _field(data: bytes, table: int, number: int) -> int:
    """Offset of field `number` of the flatbuffer table at `table`; 0 if the field has its default value."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise IndexError(vtable)
    if 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset: int = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return table + offset if offset else 0


class ArrowFile(ShardFile):
    """An open Arrow file or stream."""

    def byte_range(self, number: int) -> tuple[int, int]:
        return self.shard.batches[number][:2]

    def pieces(self, number: int) -> Iterator[pa.Array]:
        import pyarrow as pa

        if self.shard.layout == "arrow-file":
            # With `included_fields` set, only the buffers of the text column are read.
            with self.source.arrow() as file:
                reader = pa.ipc.open_file(file)
                if number >= reader.num_record_batches:
                    raise DamagedUnit(f"the file has {reader.num_record_batches} record batches now")
                batch = pa.ipc.open_file(file, options=self._only_text(reader.schema)).get_batch(number)
        else:
            begin, end, messages = self.shard.batches[number]
            parts = (*self.shard.prologue[:messages], (begin, end))
            data = b"".join(self.source.read_at(start, stop - start) for start, stop in parts)
            if len(data) < sum(stop - start for start, stop in parts):
                raise DamagedUnit("the file was cut short")
            options = self._only_text(pa.ipc.open_stream(data).schema)
            batch = pa.ipc.open_stream(data, options=options).read_next_batch()
            del data
        column = checked(batch.column(self._text_column))
        for start in range(0, len(column), PIECE_ROWS):
            yield column.slice(start, PIECE_ROWS)

    def _only_text(self, schema: pa.Schema) -> pa.ipc.IpcReadOptions:
        import pyarrow as pa

        index = schema.get_field_index(self._text_column)
        if index < 0:
            raise DamagedUnit(f"the file has no column {self._text_column!r} now")
        return pa.ipc.IpcReadOptions(included_fields=[index])
