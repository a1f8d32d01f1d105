"""What a corpus consists of: shards (files), their units, and the manifest that identifies the whole corpus.

A *unit* is read, shuffled and skipped as a whole: a row group (Parquet), a record batch (Arrow), a byte range
(JSON lines, text), a whole file (compressed JSON lines) or a range of tokens (token shards). A damaged page costs one
unit, and a resume rereads at most one unit per lane.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal
from urllib.parse import urlsplit

Layout = Literal["parquet", "arrow-file", "arrow-stream", "jsonl", "jsonl-zst", "jsonl-gz", "text", "tokens"]

# How much text is delivered at a time; a unit of this size or less is one window.
WINDOW_BYTES = 16 << 20

_NOUNS: dict[Layout, str] = {
    "parquet": "row group",
    "arrow-file": "record batch",
    "arrow-stream": "record batch",
    "jsonl": "8 MiB range",
    "jsonl-zst": "part",
    "jsonl-gz": "part",
    "text": "8 MiB range",
    "tokens": "token range",
}


class DamagedUnit(Exception):
    """One unit cannot be decoded; the message says why."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file, as described by its footer, its header or its size.

    Attributes:
        path: local path or URL, as shown in messages.
        size: bytes of the file.
        rows: total rows; 0 if only reading the file would tell (JSON lines, text). A unit of tokens is one row.
        unit_bytes: for each unit an estimate of its decompressed bytes of text, known without reading it: the
            uncompressed size of the column chunk (Parquet), the size of the batch or range (Arrow, JSON lines, text),
            with the mean size of a value for each row if the text is dictionary-encoded (Arrow), the size of the
            compressed file (compressed JSON lines), 4 per token (token shards).
        fingerprint: digest of the file's content (`colonnade.data.filesystems.fingerprint`).
        prologue, batches: byte ranges of an Arrow file's messages: the schema and its dictionaries; and for each record
            batch its range and the number of prologue messages before it.
        dtype, data_start: for a token shard, the numpy type of a token and the byte offset of the first token.
    """

    path: str
    layout: Layout
    size: int
    rows: int
    unit_bytes: tuple[int, ...]
    fingerprint: str
    prologue: tuple[tuple[int, int], ...] = ()
    batches: tuple[tuple[int, int, int], ...] = ()
    dtype: str = ""
    data_start: int = 0

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.unit_bytes)

    @property
    def name(self) -> str:
        """File name without its folder and without a URL's query (which may be a signature that changes)."""
        return file_name(self.path)


def file_name(path: str) -> str:
    """Last part of a path or URL, without a URL's query; of a chain of URLs (`zip://a.jsonl::s3://...`), of the first
    one."""
    if path.startswith(("http://", "https://")):
        path = urlsplit(path).path
    elif "://" in path:
        path = next(part for part in path.split("::") if "://" in part)
    return posixpath.basename(path.rstrip("/"))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What identifies a corpus: its files' names, sizes, rows, fingerprints and units, in order, but not their folder.

    Attributes:
        digest: over all of that and the names of files left out.
        shard_digests: eight hexadecimal digits per file, to tell which files changed.
    """

    digest: str
    files: int
    rows: int
    shard_digests: tuple[str, ...]

    @classmethod
    def of(cls, shards: Sequence[Shard], left_out: Sequence[str] = ()) -> Manifest:
        """Manifest of `shards`, in order; `left_out` names files that could not be used."""
        described = [
            json.dumps([shard.name, shard.size, shard.rows, shard.fingerprint, shard.units]).encode()
            for shard in shards
        ]
        # A file name need not be UTF-8; Python then holds its bytes as lone surrogates.
        names = [name.encode("utf-8", "surrogateescape") for name in left_out]
        return cls(
            digest=hashlib.blake2b(b"\n".join([*described, *names]), digest_size=16).hexdigest(),
            files=len(shards),
            rows=sum(shard.rows for shard in shards),
            shard_digests=tuple(hashlib.blake2b(one, digest_size=4).hexdigest() for one in described),
        )


class Units:
    """All units of a corpus in file order, each addressed by its ordinal."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._ends = list(accumulate(shard.units for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, ordinal: int) -> tuple[Shard, int]:
        """The shard that holds unit `ordinal`, and the unit's number within that shard."""
        index = bisect_right(self._ends, ordinal)
        shard = self.shards[index]
        return shard, ordinal - (self._ends[index] - shard.units)

    def describe(self, ordinal: int) -> str:
        """`row group 3 of /data/shard_2.parquet`, for messages."""
        shard, number = self.locate(ordinal)
        return f"{_NOUNS[shard.layout]} {number} of {shard.path}"

    @property
    def unit_bytes(self) -> list[int]:
        """Estimated bytes of text in each unit (`Shard.unit_bytes`)."""
        return [size for shard in self.shards for size in shard.unit_bytes]
