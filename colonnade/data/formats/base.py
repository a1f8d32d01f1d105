"""What the formats have in common: the interface of an open shard, and the checks of a text column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from colonnade.data.corpus import Shard
from colonnade.data.filesystems import Source
from colonnade.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa


class ShardFile:
    """An open shard. Subclasses read one format.

    Attributes:
        source: the file's bytes.
        shard: the result of the format's `describe`.
    """

    def __init__(self, source: Source, shard: Shard, text_column: str) -> None:
        self.source = source
        self.shard = shard
        self._text_column = text_column

    def byte_range(self, number: int) -> tuple[int, int]:
        """The byte range of the file that `pieces` reads for unit `number`."""
        raise NotImplementedError

    def pieces(self, number: int) -> Iterator[pa.Array | npt.NDArray[np.unsignedinteger]]:
        """The rows of unit `number`, checked, in pieces much smaller than a window; a token shard's unit is one array.

        Raises:
            DamagedUnit, pyarrow.ArrowException, OSError without errno, EOFError: the bytes are wrong.
            OSError with errno, RunError: the bytes cannot be read.
        """
        raise NotImplementedError

    def close(self) -> None:
        self.source.close()


def ranges(size: int, step: int) -> int:
    """Number of ranges of length `step` needed to cover `size`."""
    return -(-size // step)


def check_text_column(path: str, schema: pa.Schema, text_column: str) -> None:
    """Raises UsageError unless the schema has exactly one column of that name, and it is text."""
    if schema.names.count(text_column) > 1:
        raise UsageError(
            f"data shard {path} has {schema.names.count(text_column)} columns {text_column!r}; rename all but one"
        )
    if schema.get_field_index(text_column) < 0:
        raise UsageError(
            f"data shard {path} has no column {text_column!r} (it has {', '.join(schema.names) or 'none'}); "
            "every shard needs a column of text: name it with --text-column"
        )
    kind = schema.field(text_column).type
    if not _holds_text(kind):
        raise UsageError(
            f"column {text_column!r} of data shard {path} is of type {kind}, not text; convert it to string"
        )


def _holds_text(kind: pa.DataType) -> bool:
    """Whether a column type may hold text: strings; bytes, since many writers leave out the string annotation; and
    `null`, where every row is missing."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(check(kind) for check in (*checks, types.is_binary_view, types.is_null))


def checked(column: pa.Array) -> pa.Array:
    """The array, after a check that its offsets stay inside its data. Arrow IPC has no checksums, and a wrong offset
    would cause an out-of-bounds read. UTF-8 is not checked here: the text filter drops single bad rows."""
    as_bytes(column).validate(full=True)
    return column


def as_bytes(column: pa.Array) -> pa.Array:
    """A column of strings as bytes in the same memory; other columns unchanged."""
    import pyarrow as pa
    import pyarrow.types as types

    for is_string, same_as_bytes in (
        (types.is_string, pa.binary()),
        (types.is_large_string, pa.large_binary()),
        (types.is_string_view, pa.binary_view()),
    ):
        if is_string(column.type):
            return column.view(same_as_bytes)
    return column
