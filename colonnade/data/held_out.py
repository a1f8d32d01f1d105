"""Held-out text for scoring: every row of a corpus in order, encoded and cut into windows that score each token once.

Unlike the training stream, it does not filter rows by their content. Rows without usable text are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from colonnade.data.blocks import PADDING
from colonnade.data.corpus import DamagedUnit, Shard
from colonnade.data.flat_ids import to_lists
from colonnade.data.text_filter import judge
from colonnade.data.tokenization import DEFAULT_BATCH_ROWS, Encoder
from colonnade.data.unit_reader import UnitReader
from colonnade.errors import RunError

# Lines of one document are encoded together in pieces of about this size: tokens that would span two pieces are rare.
PIECE_BYTES = 1 << 16
# Windows are sorted by length within groups of this many batches, so that a batch holds windows of similar length.
ROUND_BATCHES = 16


class Text(NamedTuple):
    """A piece of a document; `begins` and `ends` say whether it is the first and the last one."""

    text: str
    begins: bool
    ends: bool


class Piece(NamedTuple):
    """An encoded piece: `tokens` int32, with the prefix if the document begins here; `scored_bytes`: UTF-8 bytes of
    the text of all tokens that have a token before them to be predicted from."""

    tokens: npt.NDArray[np.int32]
    scored_bytes: int
    ends: bool


class Window(NamedTuple):
    """`tokens` int32 [n + 1], n at most the block size; tokens from index `first` (at least 1) on are scored."""

    tokens: npt.NDArray[np.int32]
    first: int


@dataclass
class Tally:
    """Counts of what was processed: documents, bytes of scored text, and rows left out, by reason."""

    documents: int = 0
    bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


# --- text ------------------------------------------------------------------------------------------------------------


def texts_of(shards: Sequence[Shard], text_column: str, *, concatenate: bool, tally: Tally) -> Iterator[Text]:
    """The documents of the shards: each row, or with `concatenate` each file, whose rows are taken as lines.

    A line that does not end in a newline is given one, even an empty line. The rows of text files are used unchanged.

    Raises:
        RunError: a shard is damaged; the remaining text would not be what was to be measured.
    """
    reader = UnitReader(text_column)
    try:
        for shard in shards:
            rows = _rows(reader, shard, keep_empty=concatenate, tally=tally)
            if concatenate:
                yield from _joined(rows if shard.layout == "text" else map(_as_line, rows))
            else:
                yield from (Text(row, True, True) for row in rows)
    finally:
        reader.close()


def _rows(reader: UnitReader, shard: Shard, *, keep_empty: bool, tally: Tally) -> Iterator[str]:
    for number in range(shard.units):
        try:
            for window in reader.windows(shard, number):
                judged = judge(window)
                for text, verdict in zip(judged.texts.to_pylist(), judged.verdicts.tolist(), strict=True):
                    reason = {1: "missing", 2: "not UTF-8"}.get(verdict)
                    if reason is None and not text and not keep_empty:
                        reason = "empty"
                    if reason is None:
                        yield text
                    else:
                        tally.left_out[reason] += 1
        except DamagedUnit as damage:
            raise RunError(f"data shard {shard.path} is damaged ({damage}); restore it, or leave it out") from damage


def _as_line(row: str) -> str:
    return row if row.endswith("\n") else row + "\n"


def _joined(lines: Iterable[str]) -> Iterator[Text]:
    """One document in pieces of whole lines, about `PIECE_BYTES` each."""
    held: list[str] = []
    size, begins = 0, True
    for line in lines:
        if size >= PIECE_BYTES:
            yield Text("".join(held), begins, False)
            held, size, begins = [], 0, False
        held.append(line)
        size += len(line.encode())
    if held:
        yield Text("".join(held), begins, True)


# --- tokens ----------------------------------------------------------------------------------------------------------


def encoded(texts: Iterator[Text], encoder: Encoder, prefix: int | None, tally: Tally) -> Iterator[Piece]:
    """Encode pieces of documents. Without a `prefix`, the first token of a document and its bytes are not scored."""
    for batch in _batches(texts):
        ids = to_lists(encoder.flat([each.text for each in batch]))
        beginning = [index for index, each in enumerate(batch) if each.begins]
        skipped = dict.fromkeys(beginning, 0)
        if prefix is None and beginning:
            skipped = dict(
                zip(beginning, encoder.first_token_bytes([batch[index].text for index in beginning]), strict=True)
            )
        for index, each in enumerate(batch):
            if each.begins and each.ends and not ids[index]:
                tally.left_out["without a token"] += 1
                continue
            head = [prefix] if each.begins and prefix is not None else []
            tokens = np.array([*head, *ids[index]], np.int32)
            yield Piece(tokens, len(each.text.encode()) - skipped.get(index, 0), each.ends)


def _batches(texts: Iterator[Text]) -> Iterator[list[Text]]:
    held: list[Text] = []
    for text in texts:
        held.append(text)
        if len(held) == DEFAULT_BATCH_ROWS:
            yield held
            held = []
    if held:
        yield held


def limited(
    pieces: Iterator[Piece], max_documents: int | None, max_tokens: int | None, tally: Tally
) -> Iterator[Piece]:
    """The pieces up to a number of documents or tokens, counted in `tally`; the last piece is marked as an end."""
    tokens = 0
    for piece in pieces:
        tokens += len(piece.tokens)
        tally.bytes += piece.scored_bytes
        enough = max_tokens is not None and tokens >= max_tokens
        tally.documents += piece.ends or enough
        enough |= max_documents is not None and tally.documents >= max_documents
        yield piece._replace(ends=piece.ends or enough)
        if enough:
            return


# --- windows ---------------------------------------------------------------------------------------------------------


def cut_windows(pieces: Iterator[Piece], block: int, stride: int) -> Iterator[Window]:
    """Windows over each document's tokens x[0] to x[N-1] that score each of x[1] to x[N-1] once.

    The input of window k is at most `block` tokens from x[k * stride] on; the window predicts the token after each. It
    scores the tokens that no earlier window has scored. So each scored token is predicted from at least
    `block - stride + 1` tokens, or from all tokens before it if there are fewer.
    """
    held = np.zeros(0, np.int32)
    first = 1
    for piece in pieces:
        held = np.concatenate([held, piece.tokens])
        while len(held) > block:
            yield Window(held[: block + 1], first)
            held, first = held[stride:], block + 1 - stride
        if piece.ends:
            if len(held) > first:
                yield Window(held, first)
            held, first = np.zeros(0, np.int32), 1


def batches_of(windows: Iterator[Window], size: int) -> Iterator[list[tuple[npt.NDArray[np.int32], list[int]]]]:
    """Groups of at most `ROUND_BATCHES` batches, sorted by length. A batch is (tokens int32 [size, longest + 1] in the
    wire format of `blocks.py`, each row's `first`)."""
    while round_ := list(islice(windows, ROUND_BATCHES * size)):
        round_.sort(key=lambda window: -len(window.tokens))
        batches = []
        for start in range(0, len(round_), size):
            batch = round_[start : start + size]
            wire = np.full((len(batch), len(batch[0].tokens)), PADDING, np.int32)
            for row, window in zip(wire, batch, strict=True):
                row[: len(window.tokens)] = window.tokens
            batches.append((wire, [window.first for window in batch]))
        yield batches
