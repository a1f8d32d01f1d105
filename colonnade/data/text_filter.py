"""Which rows are documents: a versioned filter over whole columns of text.

A row is dropped if it is missing, is not text (not valid UTF-8), is empty or blank, or consists mostly of digits and
symbols, i.e. has more of those than letters (number dumps, ruled lines, hexadecimal dumps that are mostly digits).

Letters are recognised by UTF-8 lead bytes, not by Unicode tables: ASCII letters and characters from U+00C0 on are
letters, except U+2000-U+2BFF (punctuation, arrows, mathematics, box drawing, dingbats) and U+1F000-U+1FFFF (emoji and
other pictographs). This counts a few other characters as letters, but it is much faster than a regular expression. It
also does not depend on the Unicode version of a library, which could change the token stream of a run.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

# Stored in every data position. Increase it with any change that could give a row a different verdict.
FILTER_VERSION = 1

KEPT = 0
REASONS = {1: "missing", 2: "not_text", 3: "empty", 4: "mostly_digits_or_symbols"}
_MISSING, _NOT_TEXT, _EMPTY, _SYMBOLS = REASONS


class JudgedText(NamedTuple):
    """A filtered column: `texts` (large_string, N rows, empty strings for rows that are missing or not text) and
    `verdicts` (uint8 [N]), each `KEPT` or a key of `REASONS`."""

    texts: pa.LargeStringArray
    verdicts: npt.NDArray[np.uint8]


def judge(column: pa.Array, *, drop_symbols: bool = True) -> JudgedText:
    """Apply the filter to a column of strings, bytes, dictionary-encoded strings or nulls.

    Temporary memory is about twice the size of the column, so callers slice long columns.

    Args:
        drop_symbols: drop rows of mostly digits and symbols, too.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    raw = column.cast(pa.large_binary())
    missing = raw.is_null().to_numpy(zero_copy_only=False)
    texts = _as_text(raw)
    not_text = texts.is_null().to_numpy(zero_copy_only=False) & ~missing
    # There may be bytes behind a null, and the kernels below would read them.
    texts = texts.fill_null("")

    length = pc.binary_length(texts).to_numpy()
    blank = pc.utf8_is_space(texts).to_numpy(zero_copy_only=False)
    verdicts = np.zeros(len(raw), np.uint8)
    if drop_symbols:
        verdicts[_letter_surplus(texts, length > 0) < 0] = _SYMBOLS
    verdicts[blank | (length == 0)] = _EMPTY
    verdicts[not_text] = _NOT_TEXT
    verdicts[missing] = _MISSING
    return JudgedText(texts, verdicts)


def _as_text(raw: pa.LargeBinaryArray) -> pa.LargeStringArray:
    """`raw` as strings, with null for each row that is not UTF-8."""
    import pyarrow as pa

    try:
        return raw.cast(pa.large_string())
    except pa.ArrowInvalid:
        # Row by row, because the cast does not say which row is bad. This is rare.
        valid = [value is not None and _is_utf8(value) for value in raw.to_pylist()]
        return pa.compute.if_else(pa.array(valid), raw, pa.scalar(None, raw.type)).cast(pa.large_string())


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _letter_surplus(texts: pa.LargeStringArray, rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Number of letters minus digits and symbols, for each row where `rows` is True; 0 elsewhere. Shape [N]."""
    surplus = np.zeros(len(texts), np.int64)
    if not rows.any():
        return surplus
    _, offset_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    data = np.frombuffer(data_buffer, np.uint8, count=last - first, offset=first)
    weights = _byte_weights()[data]
    for lead, limit in ((0xE2, 0xB0), (0xF0, 0xA0)):
        # U+2000-U+2BFF and U+1F000-U+1FFFF: the second byte decides (after 0xF0 it must be exactly 0x9F).
        at = np.flatnonzero(data == lead)
        second = data.take(at + 1, mode="clip")  # "clip" because gaps between rows need not be UTF-8
        weights[at[(second < limit) & (second >= (0x9F if lead == 0xF0 else 0x80))]] = -1
    # reduceat sums from each edge to the next; every second sum covers the (usually empty) gap between two rows.
    edges = np.stack([offsets[:-1][rows], offsets[1:][rows]], axis=1).ravel() - first
    inside = edges[:-1] if edges[-1] == len(data) else edges
    surplus[rows] = np.add.reduceat(weights, inside, dtype=np.int64)[::2]
    return surplus


@cache
def _byte_weights() -> npt.NDArray[np.int8]:
    """+1 for a byte that starts a letter, -1 for a digit, symbol or control character, 0 for white space, for the
    Latin-1 signs (U+0080-U+00BF) and for continuation bytes. Shape [256]."""
    weights = np.zeros(256, np.int8)
    weights[:0x80] = -1
    weights[list(b" \t\n\r\v\f")] = 0
    weights[ord("A") : ord("Z") + 1] = weights[ord("a") : ord("z") + 1] = 1
    weights[0xC3:0xF5] = 1
    return weights
