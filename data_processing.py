"""From files to blocks of token ids: everything that happens to a token before it leaves the reader.

1. Shards are found (`discover_shards`), opened and checked (`colonnade/data/shards.py`).
2. The tokenizer is loaded (`load_tokenizer`), its boundary tokens chosen (`boundary_tokens`).
3. Each corpus's units (row groups) are dealt to V lanes and ordered (`colonnade/data/order.py`).
4. A lane reads its units one after the other, the text column only. A damaged unit is skipped as a whole and recorded;
   rows that are not documents are dropped (`colonnade/data/lane_reader.py`, `text_filter.py`).
5. Threads encode batches of rows; results keep their order (`colonnade/data/tokenization.py`).
6. Documents are packed into blocks of `block_size + 1` tokens (`colonnade/data/lane.py`, `packing.py`).
7. Chunk g is the next block of lane g mod V of the corpus that the mixture assigns to g (`colonnade/data/mixture.py`).
   It is delivered together with the position that resumes after it (`colonnade/data/position.py`).

The stream is a pure function of (files, tokenizer, stream settings, seed). Batch rows, worker threads and the number of
ranks do not change it, and neither does stopping and resuming. With several data-parallel ranks, each rank reads the
lanes that hold its chunks, and only those if the number of ranks divides the number of lanes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from colonnade.data.corpus import Shard, file_name
from colonnade.data.lane import after_skip, filtered_rows
from colonnade.data.mixture import ONLY_CORPUS, normalized, parse_data_glob
from colonnade.data.order import default_lanes
from colonnade.data.packing import PACKINGS
from colonnade.data.position import CorpusHead, DataPosition, StreamHead
from colonnade.data.prefetch import Prefetcher
from colonnade.data.shards import (
    DEFAULT_GLOBS,
    Units,
    default_data_glob,
    discover_shards,
    open_usable_shards,
)
from colonnade.data.stream import Corpus, TokenChunk, TokenStream
from colonnade.data.text_filter import FILTER_VERSION
from colonnade.data.tokenization import (
    BoundaryTokens,
    EncoderPool,
    batch_rows_setting,
    boundary_tokens,
    load_tokenizer,
    vocabulary_size,
    workers_setting,
)
from colonnade.data.tokenizer_backend import Backend, open_encoder, read_first_rows
from colonnade.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_GLOBS",
    "Backend",
    "BoundaryTokens",
    "DataPosition",
    "Prefetcher",
    "TokenChunk",
    "TokenStream",
    "boundary_tokens",
    "default_data_glob",
    "discover_shards",
    "filtered_rows",
    "load_tokenizer",
    "streaming_token_generator",
    "vocabulary_size",
]

MAX_LANES = 4096

logger = logging.getLogger(__name__)


def streaming_token_generator(
    shards: Sequence[str | Path] | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    add_document_boundary_tokens: bool = False,
    text_column: str = "text",
    symbol_filter: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    lanes: int | None = None,
    packing: str = "concat",
    mark_documents: bool = False,
    position: DataPosition | None = None,
    allow_data_change: bool = False,
    strict: bool = False,
    epochs: int | None = None,
    reader: int = 0,
    readers: int = 1,
    batch_rows: int | None = None,
    workers: int | None = None,
    backend: str | Backend = "auto",
) -> TokenStream:
    """Stream a corpus, or a mixture of them, as packed blocks of token ids.

    Args:
        shards: files in stream order, or a pattern: globs separated by commas, or `name=glob:weight,...`.
        tokenizer: as returned by `load_tokenizer`. Text is encoded without special tokens.
        block_size: sequence length of the model; each block holds one token more.
        add_document_boundary_tokens: put `boundary_tokens(tokenizer)` around each document. The ids of token shards
            stay as they are.
        text_column: name of the text column.
        symbol_filter: drop rows that have more digits and symbols than letters.
        shuffle: read the units of a lane, and the rows in each window of a unit, in a seeded order that changes every
            epoch.
        seed: seed of all orders.
        lanes: V, the number of independent streams that chunks are taken from. The default is that of `position`; for
            a new stream, 1 if `epochs` is given, else as many as the data supports (`default_lanes`).
        packing: one of `PACKINGS`.
        mark_documents: mark in the chunks where documents begin.
        position: resume from here instead of starting at the beginning.
        allow_data_change: resume from `position` even if the data or these settings have changed; the change is
            recorded in all later positions.
        strict: refuse a file that cannot be used, and end the run (RunError) at a damaged unit, instead of skipping
            and recording it.
        epochs: passes over each corpus, counted from the beginning of the run; None means endless. At the end of each
            epoch a lane drops its tail, which is less than a block. A corpus that has ended leaves its chunks to the
            others; the stream ends at the first chunk whose lane has ended in every corpus.
        reader, readers: yield only the chunks of the lanes that reader number `reader` of `readers` needs. It serves
            the chunks g with (g - first) mod readers == reader, where `first` is the stream's first chunk number.
        batch_rows: rows encoded in one call; default RESUME_TOKENIZER_BATCH_ROWS, else 64.
        workers: encoding threads; default RESUME_TOKENIZER_WORKERS, else this rank's share of the cores.
        backend: the library that encodes, as for `open_encoder`; all of them produce the same ids.

    Raises:
        UsageError: a setting is out of range, a shard cannot be used, or `position` was made with other data or
            settings. Raised by the first `next` if the data does not fill one block.
    """
    for name, value in (("block_size", block_size), ("epochs", 1 if epochs is None else epochs)):
        if value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    if packing not in PACKINGS:
        raise UsageError(f"packing is {packing!r}; it must be one of {', '.join(PACKINGS)}")
    settings = batch_rows_setting(batch_rows), workers_setting(workers)
    corpora = _open_corpora(shards, text_column, strict=strict, endless=epochs is None)
    _require_documents(corpora, packing, mark_documents)
    if add_document_boundary_tokens:
        _require_text(corpora, goes_on=position is not None)
    boundaries = boundary_tokens(tokenizer) if add_document_boundary_tokens else None
    first_rows = read_first_rows(corpora[0].units, text_column)
    encoder, _ = open_encoder(tokenizer, backend, first_rows)
    if lanes is None:
        lanes = position.head.lanes if position is not None else 1 if epochs is not None else None
    digest = encoder.digest
    if position is not None and position.head.tokenizer == encoder.earlier_digest:
        digest = position.head.tokenizer
    head = StreamHead(
        corpora=tuple(CorpusHead.of(corpus.name, corpus.units, corpus.skipped_files) for corpus in corpora),
        tokenizer=digest,
        bos=boundaries.bos if boundaries else None,
        eos=boundaries.eos if boundaries else None,
        block_size=block_size,
        lanes=default_lanes([corpus.units.unit_bytes for corpus in corpora], block_size) if lanes is None else lanes,
        seed=seed,
        shuffle=shuffle,
        packing=packing,
        filter_version=FILTER_VERSION,
        text_column=text_column,
        symbol_filter=symbol_filter,
    )
    _require_lanes(corpora, head.lanes)
    position = _position_in(head, corpora, position, allow_data_change=allow_data_change)
    pool = EncoderPool(encoder, boundaries, workers=settings[1])
    return TokenStream(
        corpora,
        pool,
        position,
        batch_rows=settings[0],
        workers=settings[1],
        vocabulary_size=vocabulary_size(tokenizer),
        marked=mark_documents or packing == "best-fit",
        epochs=epochs,
        strict=strict,
        reader=reader,
        readers=readers,
    )


def _open_corpora(shards: Sequence[str | Path] | str, text_column: str, *, strict: bool, endless: bool) -> list[Corpus]:
    if isinstance(shards, str):
        found = [(corpus.name, corpus.weight, discover_shards(corpus.pattern)) for corpus in parse_data_glob(shards)]
    else:
        found = [(ONLY_CORPUS, 1.0, [str(shard) for shard in shards])]
    corpora = []
    for name, weight, paths in found:
        usable, bad = open_usable_shards(paths, text_column, strict=strict)
        for error in bad:
            logger.warning("skipping a file: %s; %s", error, after_skip(endless=endless))
        corpora.append(Corpus(name, weight, Units(usable), tuple(file_name(error.path) for error in bad)))
    return corpora


def _require_documents(corpora: Sequence[Corpus], packing: str, mark_documents: bool) -> None:
    if packing == "concat" and not mark_documents:
        return
    tokens = _token_shards(corpora)
    if tokens:
        asked = "--document-mask" if mark_documents else f"--packing {packing}"
        raise UsageError(
            f"{asked} cannot be used with {tokens[0].path}: a shard of tokens does not say where documents begin; "
            "leave it out, or give the text"
        )


def _require_text(corpora: Sequence[Corpus], *, goes_on: bool) -> None:
    """Refuse boundary tokens for a new stream of nothing but token shards. One that goes on keeps its ids, and beside
    text they may be meant for the text alone: then a line says where none are put."""
    tokens = _token_shards(corpora)
    if len(tokens) == sum(len(corpus.units.shards) for corpus in corpora) and not goes_on:
        raise UsageError(
            f"--add-document-boundary-tokens cannot be used with {tokens[0].path}: a shard of tokens does not say "
            "where documents begin; leave the flag out, or give the text"
        )
    if tokens:
        logger.warning(
            "--add-document-boundary-tokens adds none to token shards (%d files, the first %s): their ids are used as "
            "they are",
            len(tokens),
            tokens[0].path,
        )


def _token_shards(corpora: Sequence[Corpus]) -> list[Shard]:
    return [shard for corpus in corpora for shard in corpus.units.shards if shard.layout == "tokens"]


def _require_lanes(corpora: Sequence[Corpus], lanes: int) -> None:
    if not 1 <= lanes <= MAX_LANES:
        raise UsageError(f"--data-lanes is {lanes}; it must be from 1 to {MAX_LANES}")
    for corpus in corpora:
        if len(corpus.units) < lanes:
            raise UsageError(
                f"--data-lanes {lanes} is more than the {len(corpus.units)} units (row groups, or parts of a file) of "
                f"corpus {corpus.name}; give fewer lanes, or write the data with smaller row groups"
            )


def _position_in(
    head: StreamHead, corpora: Sequence[Corpus], position: DataPosition | None, *, allow_data_change: bool
) -> DataPosition:
    """The position the stream starts at: `position`, after a check that it fits, with the weights now in force."""
    weights = normalized([corpus.weight for corpus in corpora])
    if position is None:
        return DataPosition.start(head, weights)
    if allow_data_change:
        position = position.with_changed_data(head, weights, {corpus.name: corpus.units for corpus in corpora})
    else:
        position.require(head, {corpus.name: corpus.file_names for corpus in corpora})
    return position.with_weights(weights)
