"""Token shards: files of token ids that another program has written, in the formats of minimal trainers.

- `.npy`: numpy's format, a one-dimensional array of uint16, uint32 or int32.
- `.bin` with a header of 256 int32: 20240520, version 1, count, then uint16 ids (llm.c, modded-nanogpt); or 20240801,
  version 7, count, then uint32 ids (llm.c for Llama 3).
- `.bin` without a header: bare ids, uint16 as nanoGPT writes them. Nothing in the file gives their type, so the name of
  a uint32 file must contain `uint32` or `.u32.`.

A unit is 2**20 tokens. Ids are not checked against a vocabulary here; the consumer, who knows the vocabulary, does
that. A file that is read as the wrong type, or was made with another tokenizer, then shows ids beyond the vocabulary.
"""

from __future__ import annotations

import io
import struct
import tokenize
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from colonnade.data.corpus import DamagedUnit, Layout, Shard, file_name
from colonnade.data.filesystems import Source, fingerprint
from colonnade.data.formats.base import ShardFile, ranges
from colonnade.errors import UsageError, message_line

UNIT_TOKENS = 1 << 20
_HEADER_BYTES = 256 * 4
# First and second number of a header, and the type of the ids after it.
_HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
_MAGIC_NUMBERS = {magic for magic, _ in _HEADERS}
# Used to estimate how many bytes of text the tokens stand for.
_BYTES_PER_TOKEN = 4


def describe(source: Source, path: str, layout: Layout, text_column: str) -> Shard:
    """Type and number of the tokens. Raises UsageError for a file that is truncated or in another format."""
    digest = fingerprint(source)
    start = source.read_at(0, 4096)
    if start.startswith(b"\x93NUMPY"):
        dtype, begin, count = _numpy_header(path, start)
    elif file_name(path).lower().endswith(".npy"):
        raise UsageError(f"data shard {path} is no numpy file; replace or remove it")
    else:
        dtype, begin, count = _bin_header(path, start, source.size)
    width = np.dtype(dtype).itemsize
    if begin + count * width != source.size:
        raise UsageError(
            f"data shard {path} cannot be read ({source.size} bytes where {count} tokens of {width} bytes behind a "
            f"header of {begin} make {begin + count * width}); replace or remove it"
        )
    if count == 0:
        raise UsageError(f"data shard {path} has 0 tokens; remove it from the data pattern")
    units = ranges(count, UNIT_TOKENS)
    sizes = tuple(min(UNIT_TOKENS, count - unit * UNIT_TOKENS) * _BYTES_PER_TOKEN for unit in range(units))
    return Shard(path, layout, source.size, units, sizes, digest, dtype=dtype, data_start=begin)


def _numpy_header(path: str, start: bytes) -> tuple[str, int, int]:
    file = io.BytesIO(start)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except (ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError) as error:
        reason = message_line(error)[:120]
        raise UsageError(f"data shard {path} cannot be read ({reason}); replace or remove it") from error
    if dtype.str not in ("<u2", "<u4", "<i4") or len(shape) != 1:
        raise UsageError(
            f"data shard {path} holds {dtype} of shape {shape}; a token shard is one dimension of "
            "uint16, uint32 or int32"
        )
    # Read int32 as uint32: ids are not negative, and a negative one then shows as an id beyond any vocabulary.
    return dtype.str.replace("i", "u"), file.tell(), shape[0]


def _bin_header(path: str, start: bytes, size: int) -> tuple[str, int, int]:
    numbers = struct.unpack("<3i", start[:12]) if size >= _HEADER_BYTES else (0, 0, 0)
    if numbers[:2] in _HEADERS:
        return _HEADERS[numbers[0], numbers[1]], _HEADER_BYTES, numbers[2]
    if numbers[0] in _MAGIC_NUMBERS:
        raise UsageError(
            f"data shard {path} has a header of version {numbers[1]}; versions read: "
            f"{', '.join(f'{magic} version {version}' for magic, version in _HEADERS)}"
        )
    name = file_name(path).lower()
    dtype = "<u4" if "uint32" in name or ".u32." in name else "<u2"
    width = np.dtype(dtype).itemsize
    if size % width:
        raise UsageError(
            f"data shard {path} cannot be read ({size} bytes are no whole number of {width}-byte ids); replace or "
            "remove it"
        )
    if width == 2 and _looks_like_uint32(np.frombuffer(start[: size // 4 * 4], "<u2")):
        raise UsageError(
            f"data shard {path} is read as uint16, and every second number in it is 0; if its ids are uint32, rename "
            "it to .u32.bin"
        )
    return dtype, 0, size // width


def _looks_like_uint32(numbers: npt.NDArray[np.uint16]) -> bool:
    """Whether these look like four-byte ids below 65,536: every second number is 0."""
    return len(numbers) >= 8 and not numbers[1::2].any() and bool(numbers[::2].any())


class TokenFile(ShardFile):
    """An open token shard."""

    def byte_range(self, number: int) -> tuple[int, int]:
        width = np.dtype(self.shard.dtype).itemsize
        begin = self.shard.data_start + number * UNIT_TOKENS * width
        return begin, min(self.shard.size, begin + UNIT_TOKENS * width)

    def pieces(self, number: int) -> Iterator[npt.NDArray[np.unsignedinteger]]:
        """One array, uint16 or uint32 [T]."""
        begin, end = self.byte_range(number)
        data = self.source.read_at(begin, end - begin)
        if len(data) < end - begin:
            raise DamagedUnit(f"the file ends at byte {begin + len(data)} and had {self.shard.size}")
        yield np.frombuffer(data, self.shard.dtype)
