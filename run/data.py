"""What a run reads: locating its corpora and tokenizer, opening the training stream, reading held-out blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from colonnade.data.blocks import unpack_blocks
from colonnade.data.filesystems import allow_many_files
from colonnade.data.mixture import are_same_shares, normalized, parse_data_glob
from colonnade.data.position import DataPosition
from colonnade.data.shards import BadShardError, Shard, Units, open_shard
from colonnade.data.tokenizer_backend import Backend, open_encoder, read_first_rows
from colonnade.errors import RunError, UsageError
from colonnade.model_config import VOCAB_MULTIPLE
from colonnade.parallel.head_loss import IGNORE_INDEX
from colonnade.parallel.mesh import ParallelLayout
from colonnade.run_settings import RunSettings
from colonnade.runtime.vote import one_line
from data_processing import (
    DEFAULT_GLOBS,
    TokenChunk,
    TokenStream,
    default_data_glob,
    discover_shards,
    load_tokenizer,
    streaming_token_generator,
    vocabulary_size,
)
from model import ModelConfig
from run.state import Validation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_FOLDER = Path("data/sample")
# The tokenizer backend is verified on the first rows of this many usable shards; opening all of them twice takes long.
_SAMPLED_SHARDS = 4
_SAMPLED_TEXTS = 64


# ------------------------------------------------------------------------------------------------------- the inputs


def resolve_data(settings: RunSettings, notes: list[str]) -> RunSettings:
    """Locate text and tokenizer: as given, in the default folders, or else the sample corpus. Raises UsageError."""
    if settings.init_from is not None and not Path(settings.init_from, "config.json").is_file():
        problem = "holds no config.json; give a Hugging Face folder"
        if not Path(settings.init_from).exists():
            problem = (
                "is no folder here, and names on the hub are not fetched: hf download NAME --local-dir FOLDER, then "
                "--init-from FOLDER"
            )
        raise UsageError(f"--init-from {settings.init_from} {problem}")
    for flag, source in (("--model-config", settings.model_config), ("--init-from", settings.init_from)):
        if source is not None:  # reject a bad model before creating the sample corpus
            ModelConfig.from_json(source, vocab_size=VOCAB_MULTIPLE, flag=flag)
    if settings.data_glob is not None:
        _require_shards("--data-glob", settings.data_glob)
    elif pattern := default_data_glob():
        settings = settings.replace(data_glob=pattern)
        notes.append(f"no --data-glob: using {pattern} ({len(discover_shards(pattern))} files)")
    else:
        settings = _with_sample_corpus(settings)
    if settings.tokenizer_path is None and settings.init_from is not None:
        settings = settings.replace(tokenizer_path=settings.init_from)
    if settings.tokenizer_path is None:
        raise UsageError("--tokenizer-path is missing: give a tokenizer's folder or hub name")
    if settings.validation_glob is not None:
        _require_shards("--validation-glob", settings.validation_glob)
    return settings


def _with_sample_corpus(settings: RunSettings) -> RunSettings:
    """The settings with the sample corpus as data, which only the tiny preset by itself falls back to.

    Where data, a tokenizer or a larger model were named, --data-glob was forgotten, and the run would train on the
    wrong text to its end.
    """
    from colonnade.data.sample_corpus import build_sample_corpus

    nothing = f"no --data-glob, and nothing in {', '.join(DEFAULT_GLOBS)}"
    if settings.preset != "tiny" or settings.tokenizer_path is not None or settings.validation_glob is not None:
        raise UsageError(
            f"{nothing}: give --data-glob 'FOLDER/*.parquet' (the sample corpus is for --preset tiny without "
            "--tokenizer-path and --validation-glob)"
        )
    print(f"{nothing}: using the sample corpus", flush=True)
    try:
        corpus = build_sample_corpus(SAMPLE_FOLDER)
    except UsageError as error:
        problem = one_line(error).rpartition(": ")[0]
        raise UsageError(f"{problem}; move it away, or give --data-glob and --tokenizer-path") from error
    except (OSError, RunError) as error:
        raise UsageError(
            f"{one_line(error)}; give --data-glob and --tokenizer-path, or start in a folder that can be written"
        ) from error
    return settings.replace(
        data_glob=corpus.train_glob, validation_glob=corpus.validation_glob, tokenizer_path=corpus.tokenizer_path
    )


def _require_shards(flag: str, pattern: str) -> None:
    try:
        for corpus in parse_data_glob(pattern):
            discover_shards(corpus.pattern)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from error


def weight_changes(record: Mapping[str, Any], settings: RunSettings) -> list[str]:
    """Changes of the corpora's weights since the checkpoint. Changed corpora are left to the data position's checks."""
    corpora = parse_data_glob(settings.data_glob or "")
    position = DataPosition.from_dict(record["data_position"])
    weights = normalized([corpus.weight for corpus in corpora])
    if are_same_shares(weights, position.weights) or [corpus.name for corpus in position.head.corpora] != [
        c.name for c in corpora
    ]:
        return []
    for digits in range(4, 18):  # as many as it takes to tell them apart
        old, new = (", ".join(f"{share:.{digits}g}" for share in shares) for shares in (position.weights, weights))
        if old != new:
            break
    return [f"weights of {', '.join(corpus.name for corpus in corpora)} {old} -> {new}"]


def require_vocabulary(settings: RunSettings, entries: int, config: ModelConfig) -> None:
    """Raise UsageError if the tokenizer has more ids (`entries`) than the model's vocabulary."""
    if entries > config.vocab_size:
        raise UsageError(
            f"the tokenizer {settings.tokenizer_path} has ids up to {entries - 1}, the model's vocabulary "
            f"{config.vocab_size} entries; use the model's own tokenizer or a larger vocab_size"
        )


# ------------------------------------------------------------------------------------------------------- the stream


def run_tokenizer(settings: RunSettings) -> PreTrainedTokenizerBase:
    """Load a run's tokenizer. This can take seconds: load it once per rank and pass it on. Raises UsageError."""
    assert settings.tokenizer_path is not None
    return load_tokenizer(settings.tokenizer_path, trust_remote_code=settings.trust_remote_code)


def settle_backend(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any], notes: list[str]
) -> Backend:
    """Choose the tokenizer backend for all ranks; verified to give the same ids on the first rows of the data."""
    rows = read_first_rows(Units(_first_usable_shards(settings)), settings.text_column)
    _, backend = open_encoder(tokenizer, settings.tokenizer_backend, rows, tell=partial(print, flush=True))
    before = record.get("tokenizer_backend", backend.label)
    notes.append(f"{backend}" + (f"; {before} until now, the same ids" if before != backend.label else ""))
    return backend


def first_texts(settings: RunSettings) -> list[str]:
    """The first documents of the run's data; empty if it can no longer be read."""
    if settings.data_glob is None:
        return []
    try:
        return list(
            islice(read_first_rows(Units(_first_usable_shards(settings)), settings.text_column), _SAMPLED_TEXTS)
        )
    except (UsageError, RunError):
        return []


def _first_usable_shards(settings: RunSettings) -> list[Shard]:
    """The first `_SAMPLED_SHARDS` usable shards, corpus by corpus, in file order. The stream reports the bad ones.

    Raises:
        UsageError: a file before them is missing or cannot be reached.
        BadShardError: no shard is usable; this is the error of the first.
    """
    assert settings.data_glob is not None
    usable: list[Shard] = []
    first_bad = None
    for path in [path for corpus in parse_data_glob(settings.data_glob) for path in discover_shards(corpus.pattern)]:
        try:
            usable.append(open_shard(path, settings.text_column))
        except BadShardError as error:
            first_bad = first_bad or error
        if len(usable) == _SAMPLED_SHARDS:
            break
    if first_bad is not None and not usable:
        raise first_bad
    return usable


def open_stream(
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    backend: Backend,
    config: ModelConfig,
    layout: ParallelLayout,
    position: DataPosition | None,
    *,
    allow_change: bool,
) -> tuple[TokenStream, Iterator[TokenChunk]]:
    """The endless training stream of a reading rank, and its chunks. Reads one ahead, to check that there are any."""
    assert settings.data_glob is not None
    require_vocabulary(settings, vocabulary_size(tokenizer), config)
    allow_many_files()
    stream = _stream_of(
        settings,
        settings.data_glob,
        tokenizer,
        backend,
        shuffle=settings.shuffle,
        seed=settings.seed,
        lanes=settings.data_lanes,
        position=position,
        allow_data_change=allow_change,
        reader=layout.dp_rank,
        readers=layout.dp,
    )
    return stream, chain([next(stream)], stream)


def _stream_of(
    settings: RunSettings, pattern: str, tokenizer: PreTrainedTokenizerBase, backend: Backend, **more: Any
) -> TokenStream:
    """A stream of blocks from the files of `pattern`, with the run's settings and `more` arguments."""
    return streaming_token_generator(
        pattern,
        tokenizer,
        block_size=settings.block_size or 0,
        add_document_boundary_tokens=settings.add_document_boundary_tokens,
        text_column=settings.text_column,
        symbol_filter=settings.symbol_filter,
        packing=settings.packing,
        mark_documents=settings.document_mask,
        strict=settings.strict_data,
        backend=backend,
        **more,
    )


def stream_notes(stream: TokenStream, position: DataPosition | None) -> list[str]:
    """The lines that a start prints about its data; `position` is where a resumed run continues."""
    start = stream.start
    counts = [f"{corpus.files} file{'' if corpus.files == 1 else 's'}" for corpus in start.head.corpora]
    corpora = counts[0]
    if len(counts) > 1:
        named = zip(start.head.corpora, counts, start.weights, strict=True)
        corpora = ", ".join(f"{corpus.name} {count} ({weight:.1%})" for corpus, count, weight in named)
    lanes = f"{start.head.lanes} lane{'s' if start.head.lanes > 1 else ''}"
    notes = [f"data: {corpora}; {lanes}, {'shuffled' if start.head.shuffle else 'in order'}, {start.head.packing}"]
    if position is not None and len(start.changes) == len(position.changes) and start.weights != position.weights:
        notes.append(f"weights of the corpora from chunk {start.chunk} on: {corpora}")
    return notes


def read_validation(settings: RunSettings, tokenizer: PreTrainedTokenizerBase, backend: Backend) -> Validation | None:
    """Read the first held-out blocks, or every block of every corpus, into memory: 16 kB each with a block of 4096."""
    if settings.validation_glob is None:
        return None
    import numpy as np

    from colonnade.telemetry.metrics import unigram_entropy

    blocks = []
    try:
        with _stream_of(settings, settings.validation_glob, tokenizer, backend, lanes=1, epochs=1) as stream:
            for chunk in stream:
                blocks.append(chunk.tokens)
                if len(blocks) == settings.validation_chunks:
                    break
    except UsageError as error:
        raise UsageError(f"--validation-glob: {error}") from error
    tokens = torch.from_numpy(np.stack(blocks))
    labels = unpack_blocks(tokens, document_mask=settings.document_mask).labels
    counted = labels[labels != IGNORE_INDEX]
    if not len(counted):
        raise UsageError(f"--validation-glob {settings.validation_glob}: no document has two tokens; give other text")
    return Validation(tokens, unigram_entropy(counted.numpy()))
