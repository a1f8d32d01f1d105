"""Dictionary-encoded text: the rows are those of plain text, at its cost, and a bad row is dropped alone."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from colonnade.data.filesystems import LocalSource
from colonnade.data.formats import OPEN, arrow
from colonnade.data.shards import DamagedUnit, Shard, UnitReader, open_shards
from data_helpers import bad_utf8, open_stream, rows_of, stdlib_texts, windows_of, write_shard
from data_processing import filtered_rows

LAYOUTS = ["parquet", "arrow-file", "arrow-stream"]


def opened(path: Path) -> Shard:
    (shard,) = open_shards([path], "text")
    return shard


def pieces_of(path: Path) -> list[list[pa.Array]]:
    """The pieces of each unit, in order."""
    shard = opened(path)
    file = OPEN[shard.layout](LocalSource(str(path)), shard, "text")
    pieces = [list(file.pieces(number)) for number in range(shard.units)]
    file.close()
    return pieces


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.string_view()])
def test_the_rows_are_those_of_plain_text(tmp_path: Path, layout: str, kind: pa.DataType) -> None:
    if layout == "parquet" and kind == pa.string_view():
        pytest.skip("pyarrow does not write it")
    hole = "no null" if layout == "parquet" else None  # pyarrow does not write it either
    values = pa.array(["zwölf", "b" * 500, hole, "", "e"]).cast(kind)
    generator = random.Random(0)
    indices = pa.array([generator.choice([0, 1, 2, 3, 4, None]) for _ in range(5000)], pa.int16())
    column = pa.DictionaryArray.from_arrays(indices, values)
    path = write_shard(tmp_path / "a", column, group=1500, layout=layout)
    shard, reader = opened(path), UnitReader("text")
    expected = [None if index is None else values.to_pylist()[index] for index in indices.to_pylist()]
    if kind == pa.binary():
        expected = [row if row is None else row.decode() for row in expected]
    for number in (2, 0, 1, 3, 3):
        assert rows_of(reader, shard, number) == expected[1500 * number :][:1500]
    reader.close()


@pytest.mark.parametrize("deltas", [True, False])
def test_a_stream_whose_dictionary_grows_or_is_replaced(tmp_path: Path, deltas: bool) -> None:
    schema = pa.schema({"text": pa.dictionary(pa.int32(), pa.string())})
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=deltas)
    values = [f"value {index}" for index in range(4)] if deltas else ["one", "two", "three", "four"]
    with pa.OSFile(str(tmp_path / "a"), "wb") as sink, pa.ipc.new_stream(sink, schema, options=options) as writer:
        for end in range(1, 5):
            dictionary = pa.array(values[:end] if deltas else values[-end:])
            batch = pa.DictionaryArray.from_arrays(pa.array([end - 1, 0], pa.int32()), dictionary)
            writer.write_batch(pa.record_batch([batch], schema=schema))
    with pa.OSFile(str(tmp_path / "a")) as file:
        expected = [batch["text"].to_pylist() for batch in pa.ipc.open_stream(file)]
    shard, reader = opened(tmp_path / "a"), UnitReader("text")
    for number in (1, 3, 0, 2, 2):
        assert rows_of(reader, shard, number) == expected[number]
    reader.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_that_is_not_utf8_is_dropped_alone(tmp_path: Path, layout: str) -> None:
    values: list[bytes | None] = [text.encode() for text in stdlib_texts(20)]
    values.insert(9, b"caf\xe9 is not text")
    column = pa.DictionaryArray.from_arrays(pa.array(range(21), pa.int32()), bad_utf8(values))
    path = write_shard(tmp_path / "a", column, group=7, layout=layout)
    shard, reader = opened(path), UnitReader("text")
    windows = [window for number in range(3) for window in windows_of(reader, shard, number)]
    assert [row for window in windows for row in window.cast(pa.large_binary()).to_pylist()] == values
    with open_stream([path], epochs=1) as stream:
        assert len(list(stream)) > 10
        assert filtered_rows(stream.position.totals()["data"]) == {"not_text": 1}
        assert not stream.position.skipped


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dictionary_is_read_and_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Each value once, so a piece that came with all values would be larger than all text of its unit."""
    texts = [f"{index} " + "lorem ipsum " * 80 for index in range(3000)]
    path = write_shard(tmp_path / "a", pa.array(texts).dictionary_encode(), group=500, layout=layout)
    checked: list[int] = []
    read: list[int] = []
    check, read_at = arrow.checked, LocalSource.read_at

    def counted_check(column: pa.Array) -> pa.Array:
        checked.append(len(column))
        return check(column)

    def counted_read(source: LocalSource, start: int, size: int) -> bytes:
        read.append(size)
        return read_at(source, start, size)

    monkeypatch.setattr(arrow, "checked", counted_check)
    monkeypatch.setattr(LocalSource, "read_at", counted_read)
    units = pieces_of(path)
    size = sum(len(text) for text in texts)
    assert sum(piece.nbytes for pieces in units for piece in pieces) < 1.1 * size
    assert [len(row) for pieces in units for piece in pieces for row in piece.to_pylist()] == list(map(len, texts))
    assert checked == ([] if layout == "parquet" else [3000])
    # The file once to fingerprint it, and once to read it; in few requests, as it may be remote.
    assert sum(read) < 2.1 * path.stat().st_size
    if layout == "arrow-stream":
        messages = 1 + 1 + 6
        assert len(read) < 2 * messages + 2 * messages + 5


@pytest.mark.parametrize("layout", ["arrow-file", "arrow-stream"])
def test_the_size_of_a_unit_is_that_of_its_text_not_of_its_indices(tmp_path: Path, layout: str) -> None:
    texts = [f"{index} " + "lorem ipsum " * 80 for index in range(600)]
    kind, column = pa.array(["x", "y"] * 300).dictionary_encode(), pa.array(texts).dictionary_encode()
    table = pa.table({"kind": kind, "text": column, "more": kind})
    make = {"arrow-file": pa.ipc.new_file, "arrow-stream": pa.ipc.new_stream}[layout]
    with pa.OSFile(str(tmp_path / "a"), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=200)
    sizes = opened(tmp_path / "a").unit_bytes
    assert [size / sum(map(len, texts)) * 3 for size in sizes] == pytest.approx([1] * 3, abs=0.05)


@pytest.mark.parametrize("layout", ["arrow-file", "arrow-stream"])
def test_a_long_value_in_many_rows_is_not_decoded_all_at_once(tmp_path: Path, layout: str) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 600, pa.int32()), pa.array(["x" * 60_000, "y"]))
    ((*pieces,),) = pieces_of(write_shard(tmp_path / "a", column, group=1200, layout=layout))
    assert sum(len(piece) for piece in pieces) == 1200
    assert max(piece.nbytes for piece in pieces) < 2 << 20


@pytest.mark.parametrize("layout", ["arrow-file", "arrow-stream"])
@pytest.mark.parametrize("what", ["index", "offset"])
def test_wrong_numbers_are_damage_not_a_crash(tmp_path: Path, layout: str, what: str) -> None:
    texts = [f"{index} {'wort ' * 50}" for index in range(40)]
    indices = [33, 1, 17, 2] * 5
    column = pa.DictionaryArray.from_arrays(pa.array([*indices, *range(20)], pa.int32()), pa.array(texts))
    path = write_shard(tmp_path / "a", column, group=20, layout=layout)
    shard, reader = opened(path), UnitReader("text")
    data = bytearray(path.read_bytes())
    ends = [0, *(sum(map(len, texts[:end])) for end in range(1, 41))]
    numbers = b"".join(number.to_bytes(4, "little") for number in (indices if what == "index" else ends))
    at = data.index(numbers) + 8
    data[at : at + 4] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedUnit):
        rows_of(reader, shard, 0)
    if what == "index":
        assert rows_of(reader, shard, 1) == texts[:20]
    reader.close()
