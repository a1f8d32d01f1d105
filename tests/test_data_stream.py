"""The packed token stream against documents encoded one by one, and its position against every place it can be cut."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from colonnade.data.tokenization import EncoderPool
from colonnade.errors import RunError, UsageError
from data_helpers import (
    BLOCK,
    EOS,
    assert_same_blocks,
    blocks_of,
    open_stream,
    plain_blocks,
    plain_tokens,
    stdlib_texts,
    tiny_tokenizer,
    trained_backend,
    write_corpus,
    write_shard,
)
from data_processing import DataPosition, boundary_tokens, streaming_token_generator


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_corpus(tmp_path_factory.mktemp("corpus"), stdlib_texts())


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("batch_rows", [1, 3, 1000])
def test_blocks_equal_documents_encoded_one_by_one(corpus: list[Path], block_size: int, batch_rows: int) -> None:
    expected = plain_blocks(plain_tokens(stdlib_texts()), block_size)
    assert_same_blocks(blocks_of(corpus, block_size=block_size, batch_rows=batch_rows), expected)


def test_boundary_tokens_surround_every_document(corpus: list[Path]) -> None:
    tokenizer = tiny_tokenizer(bos_token="<|startoftext|>", eos_token=EOS)
    expected = plain_tokens(stdlib_texts(), bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
    with streaming_token_generator(
        corpus, tokenizer, block_size=BLOCK, epochs=1, add_document_boundary_tokens=True
    ) as stream:
        assert_same_blocks([chunk.tokens for chunk in stream], plain_blocks(expected, BLOCK))
        totals = stream.position.totals()["data"]
        assert totals.tokens_delivered == len(expected) // BLOCK * BLOCK - (len(expected) % BLOCK == 0) * BLOCK


def test_boundary_tokens_are_put_around_text_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Token shards do not say where documents begin: alone they are refused, beside text a line names them."""
    write_shard(tmp_path / "text.parquet", stdlib_texts(10))
    ids = np.arange(1000, dtype=np.uint16) % 300 + 2
    bos, eos = boundary_tokens(tiny_tokenizer())
    np.save(tmp_path / "ids.npy", ids)
    refused = r"--add-document-boundary-tokens cannot be used with .*ids\.npy"
    with pytest.raises(UsageError, match=refused):
        open_stream([tmp_path / "ids.npy"], add_document_boundary_tokens=True)
    with open_stream([tmp_path / "ids.npy"]) as stream:
        position = next(stream).position
    position = replace(
        position, head=replace(position.head, bos=bos, eos=eos)
    )  # of a run begun with the flag: it may go on
    with open_stream([tmp_path / "ids.npy"], add_document_boundary_tokens=True, position=position) as stream:
        assert next(stream).tokens.tolist() == ids[BLOCK : 2 * BLOCK + 1].tolist()
    caplog.clear()
    both = [tmp_path / "ids.npy", tmp_path / "text.parquet"]
    blocks = blocks_of(both, add_document_boundary_tokens=True)
    tokens = [*ids.tolist(), *plain_tokens(stdlib_texts(10), bos=bos, eos=eos)]
    assert_same_blocks(blocks, plain_blocks(tokens, BLOCK))
    (line,) = caplog.messages
    assert "adds none to token shards (1 files" in line
    assert "ids.npy" in line


@pytest.mark.parametrize("layout", ["parquet", "arrow-file", "arrow-stream"])
@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "dictionary"])
def test_every_layout_and_type_of_text_gives_the_same_stream(tmp_path: Path, layout: str, kind: str) -> None:
    array = pa.array(stdlib_texts())
    array = array.dictionary_encode() if kind == "dictionary" else array.cast(getattr(pa, kind)())
    shard = write_shard(tmp_path / "shard.bin", array, layout=layout)
    assert_same_blocks(blocks_of([shard]), plain_blocks(plain_tokens(stdlib_texts()), BLOCK))


@pytest.mark.parametrize("layout", ["arrow-file", "arrow-stream"])
def test_compressed_arrow(tmp_path: Path, layout: str) -> None:
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    shard = write_shard(tmp_path / "shard.arrow", pa.array(stdlib_texts()), layout=layout, options=options)
    assert_same_blocks(blocks_of([shard]), plain_blocks(plain_tokens(stdlib_texts()), BLOCK))


def test_epochs_begin_again_at_the_first_row(corpus: list[Path]) -> None:
    one = plain_blocks(plain_tokens(stdlib_texts()), BLOCK)
    with open_stream(corpus) as stream:
        chunks = list(islice(stream, 2 * len(one) + 3))
    assert_same_blocks([chunk.tokens for chunk in chunks], (one * 3)[: len(chunks)])
    assert [chunk.epoch for chunk in chunks] == [0] * len(one) + [1] * len(one) + [2] * 3
    assert [chunk.position.chunk for chunk in chunks] == list(range(1, len(chunks) + 1))


def test_any_cut_goes_on_bit_for_bit_with_other_workers_and_batches(corpus: list[Path]) -> None:
    generator = random.Random(1)
    expected = plain_blocks(plain_tokens(stdlib_texts()), BLOCK, epochs=3)
    served: list[np.ndarray] = []
    position = None
    while len(served) < len(expected):
        settings = {"batch_rows": generator.choice([1, 4, 16, 300]), "workers": generator.choice([1, 2, 5])}
        with open_stream(corpus, position=position, **settings) as stream:
            chunks = list(islice(stream, generator.randint(1, 40)))
        served += [chunk.tokens for chunk in chunks]
        position = DataPosition.from_dict(json.loads(json.dumps(chunks[-1].position.to_dict())))
    assert_same_blocks(served[: len(expected)], expected)


def test_every_position_names_the_next_block_whatever_the_batches(corpus: list[Path]) -> None:
    with open_stream(corpus, batch_rows=1, workers=1) as one, open_stream(corpus, batch_rows=50, workers=4) as other:
        length = len(plain_blocks(plain_tokens(stdlib_texts()), BLOCK)) + 5
        positions = [chunk.position for chunk in islice(one, length)]
        assert positions == [chunk.position for chunk in islice(other, length)]


def test_a_limited_stream_resumes_to_its_end_and_no_further(corpus: list[Path]) -> None:
    expected = plain_blocks(plain_tokens(stdlib_texts()), BLOCK)
    with open_stream(corpus, epochs=1) as stream:
        chunks = list(stream)
    with open_stream(corpus, epochs=1, position=chunks[-3].position) as stream:
        assert_same_blocks([chunk.tokens for chunk in stream], expected[-2:])
    with open_stream(corpus, epochs=1, position=chunks[-1].position) as stream:
        assert list(stream) == []
    with open_stream(corpus, epochs=2, position=chunks[-1].position) as stream:
        assert_same_blocks([chunk.tokens for chunk in stream], expected)


def test_a_cut_deep_inside_a_long_row_group(tmp_path: Path) -> None:
    texts = [None if index % 7 == 3 else f"Row {index} says{' word' * (index % 9)}" for index in range(2100)]
    shard = write_shard(tmp_path / "a.parquet", texts, group=2000)
    expected = plain_blocks(plain_tokens([text for text in texts if text is not None]), BLOCK)
    with open_stream([shard], epochs=1, batch_rows=50) as stream:
        chunks = list(stream)
    assert_same_blocks([chunk.tokens for chunk in chunks], expected)
    for cut in (3, len(chunks) // 2, len(chunks) - 2):
        with open_stream([shard], epochs=1, batch_rows=700, position=chunks[cut].position) as stream:
            assert_same_blocks([chunk.tokens for chunk in stream], expected[cut + 1 :])


def test_a_resume_encodes_at_most_one_row_group_before_its_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_corpus(tmp_path, stdlib_texts(), shards=2, group=15)
    encoded: list[tuple[int, int]] = []
    encode = EncoderPool._encode

    def counting(self: EncoderPool, batch: Any) -> Any:
        encoded.extend((batch.unit, int(row)) for row in batch.rows)
        return encode(self, batch)

    with open_stream(shards, epochs=1) as stream:
        positions = [chunk.position for chunk in stream]
    monkeypatch.setattr(EncoderPool, "_encode", counting)
    for position in positions[:-1:5]:
        encoded.clear()
        # One row a batch, so that what is encoded before the first block is what it needs, and a bounded look-ahead.
        with open_stream(shards, position=position, batch_rows=1, workers=1) as stream:
            next(stream)
        cursor = position.states[0][0].cursor
        assert min(encoded) == (cursor.unit, cursor.row)
        assert len(encoded) <= 15


def test_positions_are_small_and_share_their_head(corpus: list[Path]) -> None:
    with open_stream(corpus) as stream:
        first, second = next(stream).position, next(stream).position
    assert first.head is second.head
    assert len(json.dumps(second.to_dict())) < 1024


def test_a_moved_corpus_is_the_same_corpus(tmp_path: Path) -> None:
    shards = write_corpus(tmp_path / "here", stdlib_texts())
    expected = blocks_of(shards)
    with open_stream(shards) as stream:
        position = list(islice(stream, 5))[-1].position
    moved = shutil.move(tmp_path / "here", tmp_path / "there")
    assert_same_blocks(blocks_of(sorted(Path(moved).iterdir()), position=position), expected[5:])


def test_a_position_of_something_else_is_refused_naming_old_and_new(corpus: list[Path], tmp_path: Path) -> None:
    with open_stream(corpus) as stream:
        position = next(stream).position
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"block_size 64 -> 32", {"block_size": 32}),
        (r"seed 0 -> 7", {"seed": 7}),
        (r"symbol_filter True -> False", {"symbol_filter": False}),
        (r"eos None -> 0", {"add_document_boundary_tokens": True}),
    ]
    for message, settings in cases:
        with pytest.raises(UsageError, match=message):
            open_stream(corpus, position=position, **settings)
    with pytest.raises(UsageError, match=r"data 3 files with 60 rows \(\w+\) -> 2 files with 40 rows"):
        open_stream(corpus[:2], position=position)
    with pytest.raises(UsageError, match=r"data 3 files .* -> 3 files"):
        open_stream(corpus[::-1], position=position)
    backend = Tokenizer.from_str(trained_backend())
    backend.add_tokens(["another"])
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    with pytest.raises(UsageError, match=r"tokenizer \w{8} -> \w{8}"):
        streaming_token_generator(corpus, other, block_size=BLOCK, position=position)


def test_other_rows_under_the_same_manifest_are_noticed_where_the_cursor_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows between the parts of a large file that are digested, in a file of the same size."""
    monkeypatch.setattr("colonnade.data.filesystems.WHOLE_BYTES", 1000)
    monkeypatch.setattr("colonnade.data.filesystems.TAIL_BYTES", 1000)
    filler = ["filler " * 1000] * 20
    shard = write_shard(tmp_path / "a.arrow", [*filler, *stdlib_texts(), *filler], layout="arrow-stream")
    with open_stream([shard]) as stream:
        positions = (chunk.position for chunk in stream)
        position = next(each for each in positions if each.states[0][0].cursor > (0, 2, 3, 0))
    size = shard.stat().st_size
    texts = ["1" * len(text.encode()) for text in stdlib_texts()]
    write_shard(shard, [*filler, *texts, *filler], layout="arrow-stream")
    assert shard.stat().st_size == size, "the test needs a file of the same size"
    with open_stream([shard], position=position) as stream, pytest.raises(UsageError, match="data changed"):
        next(stream)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"format": 2},
        {"format": 2, "head": {}, "chunk": 0, "states": [], "schedule": [], "skipped": [], "changes": []},
        {"format": 99},
    ],
)
def test_what_is_not_a_position_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="data position"):
        DataPosition.from_dict(state)


def test_too_little_data_says_how_much_there_is(tmp_path: Path) -> None:
    texts = ["hello there", None, "  ", "good bye"]
    shard = write_shard(tmp_path / "a.parquet", texts)
    found = len(plain_tokens(["hello there", "good bye"]))
    for epochs in (1, None):
        with open_stream([shard], epochs=epochs) as stream, pytest.raises(UsageError) as caught:
            next(stream)
        assert f"the data holds {found} tokens, one block needs 65" in str(caught.value)
        assert "1 missing, 1 empty" in str(caught.value)


def test_a_corpus_of_nulls_ends_with_an_error(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.parquet", pa.nulls(1000), group=10)
    with open_stream([shard]) as stream:
        with pytest.raises(UsageError, match=r"holds 0 tokens.*1000 missing"):
            next(stream)
        with pytest.raises(UsageError, match="holds 0 tokens"):
            next(stream)


def test_counts_depend_on_the_place_in_the_stream_and_nothing_else(corpus: list[Path]) -> None:
    """Rows are those before the next block, whatever the threads have read, in one go or in two."""
    blocks, tokens = len(blocks_of(corpus)), len(plain_tokens(stdlib_texts()))

    def after(count: int, position: DataPosition | None = None, **settings: Any) -> DataPosition:
        with open_stream(corpus, position=position, **settings) as stream:
            return list(islice(stream, count))[-1].position

    end = after(blocks + 1, batch_rows=1, workers=1)
    counts = end.totals()["data"]
    assert counts.tokens_delivered == (blocks + 1) * BLOCK
    assert counts.tokens_repeated == BLOCK
    assert counts.tokens_dropped == tokens - blocks * BLOCK
    assert counts.rows == len(stdlib_texts()) + end.states[0][0].cursor.row
    for cut in (1, blocks // 2, blocks):
        assert after(blocks + 1 - cut, after(cut, workers=5), batch_rows=300) == end


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path) -> None:
    text = f"before {EOS} after, {EOS}{EOS} and <|startoftext|> " * 20
    tokenizer = tiny_tokenizer()
    tokens = np.concatenate([block[:-1] for block in blocks_of([write_shard(tmp_path / "a.parquet", [text])])])
    assert not set(tokens.tolist()) & {0, 1}
    assert tokenizer.decode(tokens) == text[: len(tokenizer.decode(tokens))]
    # The tokenizer that was handed in still knows its special token.
    assert tokenizer(EOS)["input_ids"] == [0]


@pytest.mark.parametrize("model", ["word-level", "unigram"])
def test_special_tokens_inside_the_ordinary_vocabulary_do_not_leak(tmp_path: Path, model: str) -> None:
    words = ["<eos>", "<unk>", "<", "eos>", "a", "b"]
    if model == "word-level":
        backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend = Tokenizer(models.Unigram([(word, 0.0 if word == "<eos>" else -1.0) for word in words], unk_id=1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    shard = write_shard(tmp_path / "a.parquet", ["a <eos> b"] * 20)
    with streaming_token_generator([shard], tokenizer, block_size=8, epochs=1) as stream:
        tokens = [token for chunk in stream for token in chunk.tokens.tolist()]
    assert 0 not in tokens
    assert {2, 3, 4, 5} <= set(tokens)


def test_a_closed_stream_does_not_look_like_one_that_ended(corpus: list[Path]) -> None:
    stream = open_stream(corpus)
    position = next(stream).position
    stream.close()
    stream.close()
    assert stream.position == position
    with pytest.raises(RunError, match="closed"):
        next(stream)


@pytest.mark.parametrize("workers", [1, 16])
def test_the_blocks_before_a_bad_unit_leave_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """However far ahead is read: a second range of tokens with ids that the tokenizer has not."""
    monkeypatch.setattr("colonnade.data.formats.tokens.UNIT_TOKENS", 1000)
    ids = (np.arange(2000) % 300).astype(np.uint16)
    good = plain_blocks(ids[:1000].astype(np.int32).tolist(), BLOCK)
    ids[1000:] = 9999
    np.save(tmp_path / "ids.npy", ids)
    with open_stream([tmp_path / "ids.npy"], workers=workers) as stream:
        assert_same_blocks([chunk.tokens for chunk in islice(stream, len(good))], good)
        with pytest.raises(UsageError, match="token id 9999"):
            next(stream)


def test_no_error_looks_like_the_end(corpus: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that nobody foresaw, in the thread that reads ahead or in one that encodes."""
    for place in ("colonnade.data.lane_reader.judge", "colonnade.data.tokenization.flatten"):
        with open_stream(corpus, epochs=1, batch_rows=1) as stream, monkeypatch.context() as patch:
            next(stream)

            def fail(*_: Any, **__: Any) -> Any:
                raise MemoryError("no room")

            patch.setattr(place, fail)
            with pytest.raises(MemoryError):
                list(stream)
            with pytest.raises(MemoryError):
                next(stream)


@pytest.mark.parametrize(("name", "value"), [("block_size", 0), ("epochs", -1), ("batch_rows", 0), ("workers", 10**6)])
def test_sizes_out_of_range_are_refused(corpus: list[Path], name: str, value: int) -> None:
    with pytest.raises(UsageError, match=name):
        open_stream(corpus, **{name: value})


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("lanes", [1, 3])
def test_the_place_of_a_chunk_is_where_its_text_is(tmp_path: Path, lanes: int, shuffle: bool) -> None:
    """Against the shards read by pyarrow: the chunk's first tokens are in the row that is named (or its row group)."""
    shards = write_corpus(tmp_path, stdlib_texts(), group=4)
    seen, tails = set(), 0
    with open_stream(shards, lanes=lanes, shuffle=shuffle, seed=3) as stream:
        while stream.position.chunk < 400:
            place = stream.describe(stream.position, 1)
            chunk = next(stream)
            found = re.fullmatch(
                rf"chunks {chunk.number} to {chunk.number} of the data: row group (\d+) of (.+) from row (\d+)"
                rf"( of its shuffled order)? on, epoch (\d+)",
                place,
            )
            assert found is not None, place
            group, path, row, shuffled, epoch = found.groups()
            assert bool(shuffled) is shuffle
            if chunk.epoch != int(epoch):  # what is named is an epoch's tail, less than a block, which is dropped
                tails += 1
                continue
            texts = pq.ParquetFile(path).read_row_group(int(group)).column("text").to_pylist()
            named = texts if shuffle else [texts[int(row)]]
            tokens = [plain_tokens([text]) for text in named]
            first = chunk.tokens.tolist()[:8]
            # A row's last tokens may be fewer than those looked for; the next row's follow them.
            assert any(
                first[: len(document) - start] == document[start : start + 8]
                for document in tokens
                for start in range(len(document))
            ), place
            seen.add((path, group, epoch))
    assert len({path for path, _, _ in seen}) == 3
    assert {epoch for _, _, epoch in seen} >= {"0", "1"}
    assert tails <= 2 * lanes


def test_of_a_long_batch_three_places_are_told(tmp_path: Path) -> None:
    with open_stream(write_corpus(tmp_path, stdlib_texts(), group=2), lanes=5) as stream:
        line = stream.describe(stream.position, 12)
    assert line.startswith("chunks 0 to 11 of the data: ")
    assert line.count("row group ") == 3
    assert line.endswith("; and 2 more lanes")
