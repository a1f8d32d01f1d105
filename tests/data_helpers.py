"""Small corpora and tokenizers for the data tests, and a simple reference implementation of the token stream."""

from __future__ import annotations

import os
import random
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from colonnade.data.shards import Shard, UnitReader
from data_processing import TokenStream, streaming_token_generator

EOS = "<|endoftext|>"
BOS = "<|startoftext|>"
BLOCK = 64


@cache
def all_stdlib_texts() -> tuple[str, ...]:
    """Sixty short documents of various lengths: standard library source, and three that contain other text.

    Two of those three are not ASCII; the third contains the special tokens.
    """
    import argparse
    import textwrap as module

    source = Path(argparse.__file__).read_text() + Path(module.__file__).read_text()
    generator = random.Random(0)
    texts: list[str] = []
    start = 0
    while len(texts) < 60:
        length = generator.choice([30, 120, 400, 1500])
        texts.append(source[start : start + length].strip() or "blank")
        start += length
    texts[3] = "Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich — façade, naïve."
    texts[7] = "日本語の文章です。漢字とかな。" * 4
    texts[11] = f"The marker {EOS} ends a document; {BOS} begins one."
    return tuple(texts)


def stdlib_texts(count: int = 60) -> tuple[str, ...]:
    """The first `count` of `all_stdlib_texts`."""
    return all_stdlib_texts()[:count]


def trained_bpe(
    texts: Iterable[str],
    size: int,
    *,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    normalizer: normalizers.Normalizer | None = None,
) -> str:
    """A serialised byte-level BPE of `size` entries with two special tokens; pre-tokenizes like GPT-2 by default."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


@cache
def trained_backend() -> str:
    """A `trained_bpe` of 400 entries."""
    return trained_bpe([Path(textwrap.__file__).read_text()], 400, normalizer=normalizers.NFC())


def tiny_tokenizer(**roles: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `trained_backend`, with special tokens in the given roles (default: `EOS` as eos_token)."""
    backend = Tokenizer.from_str(trained_backend())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(roles or {"eos_token": EOS}))


def write_shard(
    path: Path, texts: Sequence[Any], *, group: int = 10, layout: str = "parquet", column: str = "text", **options: Any
) -> Path:
    """Write one shard with `group` rows per unit and a second column; `texts` may be an Arrow array."""
    array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())
    table = pa.table({"id": pa.array(range(len(array))), column: array})
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "parquet":
        pq.write_table(table, path, row_group_size=group, write_page_checksum=True, **options)
        return path
    make = {"arrow-file": pa.ipc.new_file, "arrow-stream": pa.ipc.new_stream}[layout]
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=group)
    return path


def open_stream(shards: Sequence[Path], **settings: Any) -> TokenStream:
    """The stream of `shards` with `tiny_tokenizer`; by default with blocks of `BLOCK` tokens and one lane."""
    return streaming_token_generator(
        shards, tiny_tokenizer(), **{"block_size": BLOCK, "lanes": 1, "workers": 2, **settings}
    )


def blocks_of(shards: Sequence[Path], **settings: Any) -> list[npt.NDArray[np.int32]]:
    """All blocks of one epoch of `open_stream`."""
    with open_stream(shards, **{"epochs": 1, **settings}) as stream:
        return [chunk.tokens for chunk in stream]


def windows_of(reader: UnitReader, shard: Shard, number: int) -> list[Any]:
    """All windows of one unit."""
    return list(reader.windows(shard, number))


def rows_of(reader: UnitReader, shard: Shard, number: int) -> list[str | None]:
    """All rows of one unit."""
    return [text for window in windows_of(reader, shard, number) for text in window.to_pylist()]


def write_corpus(folder: Path, texts: Sequence[str], *, shards: int = 3, group: int = 10) -> list[Path]:
    """Write `texts` to Parquet shards, in order, as contiguous parts."""
    per_shard = -(-len(texts) // shards)
    return [
        write_shard(folder / f"part_{index}.parquet", texts[index * per_shard : (index + 1) * per_shard], group=group)
        for index in range(shards)
    ]


def plain_tokens(
    texts: Iterable[str], *, backend: str | None = None, bos: int | None = None, eos: int | None = None
) -> list[int]:
    """The concatenated tokens of all documents, each encoded alone by the `tokenizers` API, with boundary tokens."""
    tokenizer = Tokenizer.from_str(backend or trained_backend())
    tokenizer.encode_special_tokens = True
    tokens: list[int] = []
    for text in texts:
        tokens += [bos] if bos is not None else []
        tokens += tokenizer.encode(text, add_special_tokens=False).ids
        tokens += [eos] if eos is not None else []
    return tokens


def plain_blocks(tokens: Sequence[int], block_size: int, epochs: int = 1) -> list[npt.NDArray[np.int32]]:
    """Blocks of `block_size + 1` tokens with stride `block_size`, starting over in each epoch."""
    starts = range(0, len(tokens) - block_size, block_size)
    return [np.array(tokens[start : start + block_size + 1], np.int32) for _ in range(epochs) for start in starts]


def assert_same_blocks(got: Iterable[npt.NDArray[np.int32]], expected: Sequence[npt.NDArray[np.int32]]) -> None:
    """Assert that there are equally many blocks, and that each is equal, including its dtype."""
    blocks = list(got)
    assert len(blocks) == len(expected)
    for number, (block, reference) in enumerate(zip(blocks, expected, strict=True)):
        assert block.dtype == np.int32
        assert block.tolist() == reference.tolist(), f"block {number}"


def qwen_tokenizer_folder() -> str:
    """The folder of a real chat tokenizer without BOS; skips the test if it is absent."""
    beside = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "qwen-tokenizer"
    folder = Path(os.environ.get("COLONNADE_QWEN_TOKENIZER", beside))
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer at {folder}; set COLONNADE_QWEN_TOKENIZER")
    return str(folder)


def flip_bit(path: Path, needle: bytes) -> None:
    """Flip one bit of the first byte of `needle`, which must occur exactly once in the file."""
    data = bytearray(path.read_bytes())
    assert data.count(needle) == 1
    at = data.index(needle)
    data[at] ^= 1
    path.write_bytes(bytes(data))


def bad_utf8(values: Sequence[bytes | None]) -> pa.Array:
    """An Arrow string array of these bytes, even if they are not valid UTF-8."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
