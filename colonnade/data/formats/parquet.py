"""Parquet: a unit is a row group; only the text column's chunk is read, in small batches.

Page checksums are verified if present. Pages are decoded one at a time, so a row group of several GB takes no more
memory than a small one. A single page or document larger than a window is held in memory as a whole.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from colonnade.data.corpus import DamagedUnit, Layout, Shard
from colonnade.data.filesystems import RemoteSource, Source, fingerprint
from colonnade.data.formats.base import ShardFile, check_text_column, checked
from colonnade.data.windows import PIECE_ROWS
from colonnade.errors import message_line

if TYPE_CHECKING:
    import pyarrow as pa

# Text decoded at a time. The allocations for it are a few times larger.
_PIECE_BYTES = 256 << 10
# How much of the file is read at a time, unless a page is larger.
_BUFFER_BYTES = 256 << 10


class _Footers:
    """LRU cache of the footers of remote files. Reading one costs requests, and in a shuffled corpus a lane returns to
    the same file again and again.

    Shared by all readers of the process, which only read the parsed footers. Bounded by their serialised size.
    """

    _LIMIT = 16 << 20

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def get(self, shard: Shard) -> Any:
        with self._lock:
            key = (shard.path, shard.fingerprint)
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def keep(self, shard: Shard, footer: Any) -> None:
        with self._lock:
            self._kept[shard.path, shard.fingerprint] = footer
            while len(self._kept) > 1 and sum(each.serialized_size for each in self._kept.values()) > self._LIMIT:
                self._kept.popitem(last=False)


_footers = _Footers()


def describe(source: Source, path: str, layout: Layout, text_column: str) -> Shard:
    """Rows and row groups, from the footer. Raises UsageError, or what pyarrow raises for a damaged file."""
    import pyarrow.parquet as pq

    digest = fingerprint(source, footer_only=True)
    with source.arrow() as opened, pq.ParquetFile(opened) as file:
        schema, footer = file.schema_arrow, _without_dictionary(file.metadata, text_column)
    check_text_column(path, schema, text_column)
    column = _leaf(footer, text_column)
    sizes = [footer.row_group(index).column(column).total_uncompressed_size for index in range(footer.num_row_groups)]
    shard = Shard(path, layout, source.size, footer.num_rows, tuple(sizes), digest)
    if isinstance(source, RemoteSource):
        _footers.keep(shard, footer)
    return shard


def _leaf(footer: Any, text_column: str) -> int:
    """Index of the text column among the file's leaf columns (nested fields count separately). The field `b` of a
    struct `a` has the path `a.b`, which may also be the name of a column."""
    leaves = [footer.schema.column(index) for index in range(footer.num_columns)]
    return next(index for index, leaf in enumerate(leaves) if leaf.name == leaf.path == text_column)


def _without_dictionary(footer: Any, text_column: str) -> Any:
    """The footer; if its stored Arrow schema says that the text column is dictionary-encoded, without that schema.

    pyarrow would otherwise attach the dictionary of the whole row group to every batch: copying it makes the time
    quadratic in the size of the row group. Without the stored schema, it decodes the column to plain strings page by
    page. pyarrow has no option for that, so the schema's key is renamed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = footer.schema.to_arrow_schema()
    index = schema.get_field_index(text_column)
    if index < 0 or not pa.types.is_dictionary(schema.field(index).type):
        return footer
    file = io.BytesIO()
    footer.write_metadata_file(file)
    return pq.read_metadata(io.BytesIO(file.getvalue().replace(b"ARROW:schema", b"other:schema")))


class ParquetFile(ShardFile):
    """An open Parquet file."""

    def __init__(self, source: Source, shard: Shard, text_column: str) -> None:
        import pyarrow.parquet as pq

        super().__init__(source, shard, text_column)
        remote = isinstance(source, RemoteSource)
        footer = _footers.get(shard) if remote else None
        self._opened = source.arrow()
        if footer is None:
            footer = _without_dictionary(pq.ParquetFile(self._opened).metadata, text_column)
            if remote:
                _footers.keep(shard, footer)
        self._footer = footer
        self._file = pq.ParquetFile(
            self._opened,
            metadata=footer,
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )

    def byte_range(self, number: int) -> tuple[int, int]:
        group = self._footer.row_group(number)
        chunk = group.column(_leaf(self._footer, self._text_column))
        start = min(offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset)
        return start, start + chunk.total_compressed_size

    def pieces(self, number: int) -> Iterator[pa.Array]:
        if number >= self._footer.num_row_groups:
            raise DamagedUnit(f"the file has {self._footer.num_row_groups} row groups now")
        if self._file.schema_arrow.get_field_index(self._text_column) < 0:
            raise DamagedUnit(f"the file has no column {self._text_column!r} now")
        expected = self._footer.row_group(number).num_rows
        rows = 0
        try:
            # pyarrow parallelises over columns, and only one is read.
            for batch in self._file.iter_batches(
                batch_size=self._batch_rows(number, expected),
                row_groups=[number],
                columns=[self._text_column],
                use_threads=False,
            ):
                rows += batch.num_rows
                # A field of a struct can have the same path and is read as well.
                yield checked(batch.column(self._text_column))
        except OSError as error:
            if error.errno is not None:
                raise
            raise DamagedUnit(message_line(error)) from error
        if rows != expected:
            raise DamagedUnit(f"{rows} rows where the footer promises {expected}")

    def _batch_rows(self, number: int, rows: int) -> int:
        size = max(self.shard.unit_bytes[number] if number < self.shard.units else 0, 1)
        return max(1, min(PIECE_ROWS, rows * _PIECE_BYTES // size))

    def close(self) -> None:
        self._file.close()
        self._opened.close()
        super().close()
