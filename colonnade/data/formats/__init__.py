"""The shard formats: for each a function that describes a file and a class that reads its units."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from typing import TYPE_CHECKING

from colonnade.data.corpus import Layout, Shard, file_name
from colonnade.data.filesystems import Source
from colonnade.data.formats import arrow, jsonl, parquet, text, tokens
from colonnade.data.formats.base import ShardFile
from colonnade.errors import UsageError

if TYPE_CHECKING:
    Describe = Callable[[Source, str, Layout, str], Shard]

__all__ = ["DESCRIBE", "OPEN", "ShardFile", "detect_layout"]

# Describes a file before the run. Arguments: its bytes, its path, its layout, the text column.
DESCRIBE: dict[Layout, Describe] = {
    "parquet": parquet.describe,
    "arrow-file": arrow.describe,
    "arrow-stream": arrow.describe,
    "jsonl": jsonl.describe,
    "jsonl-zst": jsonl.describe_compressed,
    "jsonl-gz": jsonl.describe_compressed,
    "text": text.describe,
    "tokens": tokens.describe,
}
OPEN: dict[Layout, type[ShardFile]] = {
    "parquet": parquet.ParquetFile,
    "arrow-file": arrow.ArrowFile,
    "arrow-stream": arrow.ArrowFile,
    "jsonl": jsonl.JsonLinesFile,
    "jsonl-zst": jsonl.CompressedJsonLinesFile,
    "jsonl-gz": jsonl.CompressedJsonLinesFile,
    "text": text.TextFile,
    "tokens": tokens.TokenFile,
}

_MAGIC: tuple[tuple[bytes, Layout], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow-file"),
    (b"\xff\xff\xff\xff", "arrow-stream"),
    (b"\x93NUMPY", "tokens"),
)
_COMPRESSION: tuple[tuple[bytes, Layout], ...] = ((b"\x28\xb5\x2f\xfd", "jsonl-zst"), (b"\x1f\x8b", "jsonl-gz"))
_SUFFIXES: dict[str, Layout] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".feather": "arrow-file",
    ".arrow": "arrow-stream",
    ".arrows": "arrow-stream",
    ".ipc": "arrow-stream",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".npy": "tokens",
    ".bin": "tokens",
}


def detect_layout(path: str, start: bytes) -> Layout:
    """Layout from the content (`start`: the first bytes), or from the suffix if these are not conclusive.

    Raises:
        UsageError: an unknown format.
    """
    stem, suffix = posixpath.splitext(file_name(path).lower())
    layout = _SUFFIXES.get(suffix)
    for magic, found in _MAGIC:
        if start.startswith(magic):
            return found
    # Headerless token ids may begin with the magic bytes of a compressed file.
    for magic, found in _COMPRESSION:
        if start.startswith(magic) and layout != "tokens":
            inner = stem if suffix in (".zst", ".zstd", ".gz") else stem + suffix
            if _SUFFIXES.get(posixpath.splitext(inner)[1]) == "jsonl":
                return found
            raise UsageError(
                f"data shard {path} is compressed, and its name does not end like .jsonl.zst or .jsonl.gz; "
                "decompress it, or rename it if it holds JSON lines"
            )
    if layout is not None:
        return layout
    if suffix in (".zst", ".zstd", ".gz"):
        raise UsageError(f"data shard {path} is not compressed as its name says; replace or remove it")
    raise UsageError(
        f"data shard {path} is neither Parquet nor Arrow IPC, and no .jsonl, .txt, .npy or .bin by its name; "
        "convert it or narrow the data pattern"
    )
