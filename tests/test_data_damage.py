"""Bad rows, bad row groups and bad files: what is dropped, what is skipped and recorded, what ends the run."""

from __future__ import annotations

import json
import logging
import os
import time
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colonnade.data.formats import jsonl
from colonnade.data.text_filter import REASONS, judge
from colonnade.errors import RunError, UsageError
from colonnade.run_settings import RunSettings
from colonnade.telemetry.data_ledger import data_ledger, data_summary
from data_helpers import (
    BLOCK,
    assert_same_blocks,
    bad_utf8,
    blocks_of,
    flip_bit,
    open_stream,
    plain_blocks,
    plain_tokens,
    stdlib_texts,
    tiny_tokenizer,
    write_shard,
)
from data_processing import Backend, DataPosition, discover_shards, filtered_rows
from run.data import read_validation

GROUP = 6
# Uncompressed, not dictionary-encoded, no statistics: a text's bytes stand in the file once, in its page.
PLAIN: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}


def verdicts(column: pa.Array) -> list[str]:
    return [REASONS.get(int(code), "kept") for code in judge(column).verdicts]


# --- rows ------------------------------------------------------------------------------------------------------------


def letters_and_others(text: str) -> tuple[int, int]:
    """The filter's documented rule, a character at a time."""
    letters = others = 0
    for character in text:
        code = ord(character)
        if character in " \t\n\r\v\f" or 0x80 <= code < 0xC0:
            continue
        symbol = 0x2000 <= code < 0x2C00 or 0x1F000 <= code < 0x20000
        is_letter = (code >= 0xC0 and not symbol) or (code < 0x80 and character.isalpha())
        letters, others = letters + is_letter, others + (not is_letter)
    return letters, others


def test_each_reason_for_dropping_a_row() -> None:
    rows: list[tuple[bytes | None, str]] = [
        (b"An ordinary sentence, with 2 numbers and 100% sense.", "kept"),
        (None, "missing"),
        (b"", "empty"),
        (" \t\n\u3000\u00a0".encode(), "empty"),
        (b"12345 67890 3.14159", "mostly_digits_or_symbols"),
        (b"=-=-=-=-=-= title =-=-=-=-=-=", "mostly_digits_or_symbols"),
        ("┌────┬────┐".encode(), "mostly_digits_or_symbols"),
        ("🎉🎉🎉 ok".encode(), "mostly_digits_or_symbols"),
        (b"\xff\xfe not text", "not_text"),
        (b"half a character \xc3", "not_text"),
        (b"\xa9 the other half", "not_text"),
        ("日本語の文章です。".encode(), "kept"),
        ("Ελληνικό κείμενο και русский текст".encode(), "kept"),
        (b"x", "kept"),
    ]
    values = [value for value, _ in rows]
    expected = [reason for _, reason in rows]
    assert verdicts(bad_utf8(values)) == expected
    assert verdicts(pa.array(values, pa.binary())) == expected
    assert verdicts(pa.array(values, pa.binary()).dictionary_encode()) == expected
    assert verdicts(bad_utf8(values).slice(3, 6)) == expected[3:9]
    assert verdicts(pa.nulls(3)) == ["missing"] * 3


def test_the_vectorised_filter_equals_the_rule_applied_a_character_at_a_time() -> None:
    generator = np.random.default_rng(0)
    alphabet = [*"abcXYZ0189 .,;=-\n\té\u00a0©", "—", "→", "┃", "日", "я", "🎉", "𝔄", "\U0001f1e6", "\u2bff", "\u2c00"]
    texts = ["".join(generator.choice(alphabet, generator.integers(0, 30))) for _ in range(3000)]
    for text, verdict in zip(texts, verdicts(pa.array(texts)), strict=True):
        letters, others = letters_and_others(text)
        expected = "empty" if not text.strip() else "mostly_digits_or_symbols" if others > letters else "kept"
        assert verdict == expected, repr(text)


def test_bad_rows_are_dropped_alone_and_counted(tmp_path: Path) -> None:
    good = stdlib_texts(30)
    values: list[bytes | None] = [text.encode() for text in good]
    for place, value in ((0, b"\xff"), (5, None), (9, b"  "), (14, b"123 456"), (20, b"caf\xc3")):
        values.insert(place, value)
    shard = write_shard(tmp_path / "a.parquet", bad_utf8(values), group=GROUP)
    with open_stream([shard], epochs=1, batch_rows=2) as stream:
        assert_same_blocks([chunk.tokens for chunk in stream], plain_blocks(plain_tokens(good), BLOCK))
        counted = stream.position.totals()["data"]
    assert filtered_rows(counted) == {"not_text": 2, "missing": 1, "empty": 1, "mostly_digits_or_symbols": 1}
    cursor = stream.position.states[0][0].cursor
    assert counted.rows == cursor.unit * GROUP + cursor.row


def test_rows_of_symbols_are_kept_without_the_symbol_filter(tmp_path: Path) -> None:
    texts = [*stdlib_texts(10), "1 + 1 = 2\n" * 50, "| 1 | 2 |\n|---|---|", *stdlib_texts(20)[10:]]
    shard = write_shard(tmp_path / "a.parquet", [*texts, "", None], group=GROUP)
    with open_stream([shard], epochs=1, symbol_filter=False) as stream:
        assert_same_blocks([chunk.tokens for chunk in stream], plain_blocks(plain_tokens(texts), BLOCK))
        assert "mostly_digits_or_symbols" not in filtered_rows(stream.position.totals()["data"])


def test_a_row_group_of_nulls_is_passed_over(tmp_path: Path) -> None:
    texts = [*stdlib_texts(GROUP), *[None] * GROUP, *stdlib_texts(20)]
    shard = write_shard(tmp_path / "a.parquet", texts, group=GROUP)
    expected = plain_tokens([text for text in texts if text is not None])
    assert_same_blocks(blocks_of([shard]), plain_blocks(expected, BLOCK))


def test_best_fit_passes_over_portions_without_a_document(tmp_path: Path) -> None:
    """First, in between and last; and a stream that goes on after any of its blocks serves the rest."""
    texts, nulls = stdlib_texts(3 * GROUP), [None] * GROUP
    groups = [texts[begin : begin + GROUP] for begin in range(0, len(texts), GROUP)]
    whole = [write_shard(tmp_path / f"{number}.parquet", group, group=GROUP) for number, group in enumerate(groups)]
    holes = [*nulls, *groups[0], *nulls, *nulls, *groups[1], *groups[2], *nulls]
    holed = write_shard(tmp_path / "holed.parquet", holes, group=GROUP)
    with open_stream([holed], epochs=1, packing="best-fit") as stream:
        served = [(chunk.tokens.tolist(), stream.position) for chunk in stream]
    # The blocks of a row group come in an order of its own.
    expected = [sorted(block.tolist() for block in blocks_of([shard], packing="best-fit")) for shard in whole]
    ends = list(accumulate(map(len, expected), initial=0))
    assert len(served) == ends[-1]
    for (begin, end), group in zip(pairwise(ends), expected, strict=True):
        assert sorted(tokens for tokens, _ in served[begin:end]) == group
    for done, (_, position) in enumerate(served, 1):
        with open_stream([holed], epochs=1, packing="best-fit", position=position) as rest:
            assert [chunk.tokens.tolist() for chunk in rest] == [tokens for tokens, _ in served[done:]]


# --- files, before the run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["parquet", "arrow-file", "arrow-stream"])
def test_a_truncated_shard_is_refused_by_name_before_the_run(tmp_path: Path, layout: str) -> None:
    good = write_shard(tmp_path / "good.parquet", stdlib_texts())
    bad = write_shard(tmp_path / "bad.data", stdlib_texts(), layout=layout)
    os.truncate(bad, bad.stat().st_size // 2)
    with pytest.raises(UsageError, match=r"bad\.data cannot be read") as caught:
        open_stream([good, bad], strict=True)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used_are_skipped_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Truncated, empty, foreign, and of another schema, beside a good one; alone they are an error."""
    good = write_shard(tmp_path / "good.parquet", stdlib_texts(), group=GROUP)
    cut = write_shard(tmp_path / "cut.parquet", stdlib_texts())
    os.truncate(cut, cut.stat().st_size // 2)
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "foreign.parquet").write_bytes(b"hello, I am a text file")
    other = write_shard(tmp_path / "other.parquet", stdlib_texts(), column="body")
    bad = [cut, tmp_path / "empty.parquet", tmp_path / "foreign.parquet", other]
    with caplog.at_level(logging.WARNING), open_stream([bad[0], good, *bad[1:]], epochs=1) as stream:
        assert_same_blocks([chunk.tokens for chunk in stream], plain_blocks(plain_tokens(stdlib_texts()), BLOCK))
        position = stream.position
    assert position.head.corpora[0].skipped_files == tuple(path.name for path in bad)
    assert [path.name in record.getMessage() for path, record in zip(bad, caplog.records, strict=True)] == [True] * 4
    assert data_ledger(position)["corpora"]["data"]["skipped_files"] == [path.name for path in bad]
    with pytest.raises(UsageError, match=r"cut\.parquet cannot be read"):
        open_stream(bad)
    with pytest.raises(UsageError, match=r"absent\.parquet"):  # a file that is not there is never skipped
        open_stream([good, tmp_path / "absent.parquet"])
    # One that is mended meanwhile is other data.
    write_shard(bad[1], stdlib_texts())
    with pytest.raises(UsageError, match=r"changed or new: empty\.parquet"):
        open_stream([bad[0], good, *bad[1:]], position=position)


@pytest.mark.parametrize("layout", ["parquet", "arrow-file"])
def test_file_names_that_are_not_utf8(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "data_processing")  # pytest-xdist cannot send a warning that holds such a name
    good = write_shard(tmp_path / "good", stdlib_texts(), group=GROUP, layout=layout)
    try:
        good = good.rename(os.fsdecode(os.fsencode(tmp_path) + b"/gut\xe4"))
        (tmp_path / os.fsdecode(b"leer\xe4.jsonl")).touch()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    files = discover_shards(f"{tmp_path}/*")
    assert sorted(map(os.fsencode, files)) == sorted(
        os.fsencode(tmp_path) + name for name in (b"/gut\xe4", b"/leer\xe4.jsonl")
    )
    with open_stream([Path(file) for file in files], epochs=1) as stream:
        assert_same_blocks([chunk.tokens for chunk in stream], plain_blocks(plain_tokens(stdlib_texts()), BLOCK))
        position = stream.position
    assert [os.fsencode(name) for name in position.head.corpora[0].skipped_files] == [b"leer\xe4.jsonl"]
    assert DataPosition.from_dict(json.loads(json.dumps(position.to_dict()))) == position


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.parquet", b"", "cannot be read"),
        ("empty.arrow", b"", "cannot be read"),
        ("notes.md", b"hello, I am a text file", "neither Parquet nor Arrow"),
        ("renamed.parquet", b"hello, I am a text file", "cannot be read"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{name}.*{message}"):
        open_stream([path])


@pytest.mark.parametrize("layout", ["parquet", "arrow-file", "arrow-stream"])
def test_shards_without_text_are_refused(tmp_path: Path, layout: str) -> None:
    other = write_shard(tmp_path / "other", stdlib_texts(), layout=layout, column="body")
    numbers = write_shard(tmp_path / "numbers", pa.array(range(10)), layout=layout)
    lists = write_shard(tmp_path / "lists", pa.array([["a"], ["b"]]), layout=layout)
    nothing = write_shard(tmp_path / "nothing", [], layout=layout)
    for path, message in (
        (other, r"no column 'text' \(it has id, body\)"),
        (numbers, "type int64, not text"),
        (lists, "not text"),
        (nothing, "0 rows"),
        (tmp_path / "absent", "cannot be read.*No such file"),
    ):
        with pytest.raises(UsageError, match=f"{path.name}.*{message}"):
            open_stream([path])
    assert blocks_of([other], text_column="body")


def test_no_shards_at_all() -> None:
    with pytest.raises(UsageError, match="no data shards"):
        open_stream([])


# --- row groups, in the middle of a run ------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[list[Path], list[str]]:
    """Two shards, a bit flipped in the last row of the first one's second row group; and the texts of the rest."""
    texts = [f"{text} (document {index})" for index, text in enumerate(stdlib_texts(30))]
    shards = [
        write_shard(tmp_path / "a.parquet", texts[:20], group=GROUP, **PLAIN),
        write_shard(tmp_path / "b.parquet", texts[20:], group=GROUP, **PLAIN),
    ]
    flip_bit(shards[0], b"(document 11)")
    return shards, texts[:GROUP] + texts[2 * GROUP :]


def test_a_damaged_row_group_is_skipped_whole_recorded_and_warned_once(
    damaged: tuple[list[Path], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    shards, rest = damaged
    expected = plain_blocks(plain_tokens(rest), BLOCK, epochs=2)
    with caplog.at_level(logging.WARNING), open_stream(shards) as stream:
        chunks = list(islice(stream, len(expected)))
        assert_same_blocks([chunk.tokens for chunk in chunks], expected)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1
    assert f"row group 1 of {shards[0]}" in warned[0]
    assert "CRC" in warned[0]
    # Recorded from the first block that reaches past it, not from when a thread came across it.
    before = [chunk.position.states[0][0].cursor.unit > 1 or chunk.epoch > 0 for chunk in chunks]
    assert [[skip.unit for skip in chunk.position.skipped] for chunk in chunks] == [
        [1] if past else [] for past in before
    ]


def test_what_is_skipped_of_held_out_text_is_not_said_to_be_recorded(
    damaged: tuple[list[Path], list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards, _ = damaged
    (tmp_path / "empty.parquet").touch()
    pattern = f"{tmp_path}/*.parquet"
    with open_stream([*shards, tmp_path / "empty.parquet"]) as stream:
        position = list(islice(stream, 100))[-1].position
    trained = [*caplog.messages]
    caplog.clear()
    settings = RunSettings(validation_glob=pattern, validation_chunks=0, block_size=BLOCK)
    read_validation(settings, tiny_tokenizer(), Backend("hf"))
    for lines, recorded in ((trained, True), (caplog.messages, False)):
        assert len(lines) == 2
        assert all(line.startswith("skipping ") for line in lines)
        assert [line.endswith("recorded in the data position") for line in lines] == [recorded] * 2
    (line,) = data_summary(position)
    assert line.endswith("1 damaged units skipped")


def test_a_recorded_skip_holds_when_the_row_group_is_readable_again(damaged: tuple[list[Path], list[str]]) -> None:
    shards, rest = damaged
    expected = plain_blocks(plain_tokens(rest), BLOCK, epochs=2)
    with open_stream(shards) as stream:
        position = next(chunk.position for chunk in islice(stream, 1000) if chunk.position.skipped)
    flip_bit(shards[0], b")document 11)")  # back again
    assert len(blocks_of(shards)) > len(expected) // 2
    position = DataPosition.from_dict(position.to_dict())
    with open_stream(shards, position=position) as stream:
        again = [chunk.tokens for chunk in islice(stream, len(expected) - position.chunk)]
        assert stream.position.skipped == position.skipped
    assert_same_blocks(again, expected[position.chunk :])


def test_strict_ends_the_run_naming_file_and_row_group(damaged: tuple[list[Path], list[str]]) -> None:
    shards, _ = damaged
    with open_stream(shards, strict=True) as stream:
        with pytest.raises(RunError, match=r"row group 1 of .*a\.parquet is damaged \(.*CRC"):
            list(islice(stream, 1000))
        delivered = stream.position.chunk
        assert delivered > 0
        with pytest.raises(RunError, match="row group 1"):
            next(stream)
        assert stream.position.chunk == delivered


def test_the_skipped_row_group_can_be_the_one_the_cursor_stands_in(tmp_path: Path) -> None:
    texts = [f"{text} (document {index})" for index, text in enumerate(stdlib_texts(30))]
    shard = write_shard(tmp_path / "a.parquet", texts, group=GROUP, **PLAIN)
    with open_stream([shard]) as stream:
        position = next(
            chunk.position for chunk in islice(stream, 1000) if chunk.position.states[0][0].cursor.unit == 1
        )
    flip_bit(shard, b"(document 9)")
    with open_stream([shard], epochs=1, position=position) as stream:
        rest = [chunk.tokens for chunk in stream]
    assert_same_blocks(rest, plain_blocks(plain_tokens(texts[2 * GROUP :]), BLOCK))


def test_best_fit_forgets_the_block_it_stood_at_when_that_row_group_is_skipped(tmp_path: Path) -> None:
    """The other row groups come whole: their blocks are those of a shard that holds each of them alone."""
    texts = [f"{text} (document {index})" for index, text in enumerate(stdlib_texts(3 * GROUP))]
    shard = write_shard(tmp_path / "a.parquet", texts, group=GROUP, **PLAIN)
    with open_stream([shard], packing="best-fit") as stream:
        positions = [chunk.position for chunk in islice(stream, 40)]
    begun = [position for position in positions if position.states[0][0].cursor.unit == 0]
    position = begun[-1]  # before the last block of the first row group
    assert position.states[0][0].cursor.token > 1
    flip_bit(shard, b"(document 1)")
    with open_stream([shard], packing="best-fit", epochs=1, position=position) as stream:
        served = [chunk.tokens.tolist() for chunk in stream]
        assert [skip.unit for skip in stream.position.skipped] == [0]
        counts, before = stream.position.totals()["data"], position.totals()["data"]
    for number in (1, 2):
        rest = write_shard(tmp_path / f"{number}.parquet", texts[number * GROUP : (number + 1) * GROUP], group=GROUP)
        expected = sorted(block.tolist() for block in blocks_of([rest], packing="best-fit"))
        here, served = served[: len(expected)], served[len(expected) :]
        assert sorted(here) == expected
    assert not served
    assert counts.rows - before.rows == 2 * GROUP


def test_best_fit_notices_a_portion_that_has_fewer_blocks_than_were_delivered(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.parquet", stdlib_texts(2 * GROUP), group=GROUP)
    first = write_shard(tmp_path / "first.parquet", stdlib_texts(GROUP), group=GROUP)
    bins = len(blocks_of([first], packing="best-fit"))
    with open_stream([shard], packing="best-fit") as stream:
        position = next(stream).position
    state = position.to_dict()
    for token in (bins - 1, bins, bins + 1):
        state["states"][0][0][0] = [0, 0, 0, token]
        with open_stream([shard], packing="best-fit", position=DataPosition.from_dict(state)) as stream:
            if token < bins:
                assert next(stream).position.states[0][0].cursor == (0, 0, 1, 0)
            else:
                with pytest.raises(UsageError, match=rf"row group 0 of .* has no block {token} in portion 0"):
                    next(stream)


def test_a_corpus_that_is_damaged_throughout_ends_with_an_error(tmp_path: Path) -> None:
    filler = "a text long enough to fill more than one block on its own; " * 5
    texts = [f"{filler} number {index}" for index in range(4)]
    shard = write_shard(tmp_path / "a.parquet", texts, group=1, **PLAIN)
    with open_stream([shard]) as stream:
        position = next(stream).position
    for index in range(4):
        flip_bit(shard, f"number {index}".encode())
    with open_stream([shard]) as stream, pytest.raises(UsageError, match="4 damaged units skipped"):
        next(stream)
    with open_stream([shard], position=position) as stream, pytest.raises(RunError, match="4 damaged units"):
        next(stream)


def test_a_shard_cut_short_during_the_run_is_skipped(tmp_path: Path) -> None:
    first, second, third = (
        write_shard(tmp_path / f"{name}.parquet", stdlib_texts(), group=GROUP) for name in ("a", "b", "c")
    )
    with open_stream([first, second, third], epochs=1) as stream:
        os.truncate(second, second.stat().st_size // 2)
        blocks = [chunk.tokens for chunk in stream]
        assert len(stream.position.skipped) == pq.ParquetFile(first).num_row_groups
    assert_same_blocks(blocks, plain_blocks(plain_tokens(stdlib_texts() * 2), BLOCK))


def test_a_file_that_grows_during_the_run_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line more is no damage: skipping the file's other units would cost the most of it."""
    monkeypatch.setattr(jsonl, "UNIT_BYTES", 4000)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in stdlib_texts()))
    with open_stream(paths, shuffle=False) as stream:
        next(stream)
        with paths[1].open("a") as file:
            file.write('{"text": "one more"}\n')
        with pytest.raises(RunError, match=r"b\.jsonl changed while it was read \(it has \d+ bytes now and had \d+\)"):
            list(islice(stream, 10_000))
        assert not stream.position.skipped


@pytest.mark.parametrize("layout", ["arrow-file", "arrow-stream"])
def test_wrong_offsets_in_an_arrow_batch_are_damage_not_a_crash(tmp_path: Path, layout: str) -> None:
    texts = [f"{index} {'wort ' * 50}" for index in range(40)]
    shard = write_shard(tmp_path / "a.arrow", texts, group=20, layout=layout)
    with open_stream([shard]) as stream:
        next(stream)
        data = bytearray(shard.read_bytes())
        ends = np.cumsum([len(text) for text in texts[:4]]).astype(np.int32).tobytes()
        at = data.index(ends)
        data[at + 4 : at + 8] = (1 << 30).to_bytes(4, "little")
        shard.write_bytes(bytes(data))
    with open_stream([shard], epochs=1) as stream:
        blocks = [chunk.tokens for chunk in stream]
        assert [skip.unit for skip in stream.position.skipped] == [0]
    assert_same_blocks(blocks, plain_blocks(plain_tokens(texts[20:]), BLOCK))


def test_a_file_that_vanishes_ends_the_run_and_is_never_skipped(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "a.parquet", stdlib_texts(), group=GROUP)
    second = write_shard(tmp_path / "b.parquet", stdlib_texts(), group=GROUP)
    with open_stream([first, second]) as stream:
        next(stream)
        second.unlink()
        with pytest.raises(RunError, match=r"b\.parquet cannot be reached.*No such file"):
            list(islice(stream, 10_000))


def test_a_very_long_document(tmp_path: Path) -> None:
    long = " ".join(stdlib_texts()) * 20
    shard = write_shard(tmp_path / "a.parquet", ["short one", long, "short two"])
    begin = time.perf_counter()
    assert_same_blocks(blocks_of([shard]), plain_blocks(plain_tokens(["short one", long, "short two"]), BLOCK))
    assert time.perf_counter() - begin < 30
