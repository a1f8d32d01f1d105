"""Every format a shard may have: what is read from it, how it is cut into units and windows, what is refused."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colonnade.data.filesystems import LocalSource
from colonnade.data.formats import arrow, jsonl, text, tokens
from colonnade.data.position import CorpusHead
from colonnade.data.shards import DamagedUnit, Shard, UnitReader, Units, open_shards
from colonnade.errors import UsageError
from data_helpers import rows_of, stdlib_texts, windows_of, write_shard


def opened(path: Path, column: str = "text") -> Shard:
    (shard,) = open_shards([path], column)
    return shard


def units_of(path: Path, column: str = "text") -> list[list[str | None]]:
    """Rows of each unit; units are read in another order than they stand in."""
    shard, reader = opened(path, column), UnitReader(column)
    order = list(range(shard.units))
    random.Random(0).shuffle(order)
    read = {number: rows_of(reader, shard, number) for number in order}
    reader.close()
    return [read[number] for number in range(shard.units)]


def raw_rows(path: Path) -> list[bytes | None]:
    """All rows as bytes, for rows that are no UTF-8."""
    shard, reader = opened(path), UnitReader("text")
    windows = [window for number in range(shard.units) for window in windows_of(reader, shard, number)]
    return [row for window in windows for row in window.cast(pa.large_binary()).to_pylist()]


# --- units and what is known of them beforehand ----------------------------------------------------------------------


def test_bytes_of_units(tmp_path: Path) -> None:
    parquet = write_shard(tmp_path / "a.parquet", stdlib_texts(), group=25)
    footer = pq.read_metadata(parquet)
    sizes = [footer.row_group(group).column(1).total_uncompressed_size for group in range(3)]
    (tmp_path / "b.jsonl").write_bytes(b'{"text":"word"}\n' * 1_000_000)
    (tmp_path / "c.bin").write_bytes(bytes(2 * (tokens.UNIT_TOKENS + 10)))
    units = Units(open_shards([parquet, tmp_path / "b.jsonl", tmp_path / "c.bin"], "text"))
    found = units.unit_bytes
    assert found == [*sizes, 8 << 20, 16_000_000 - (8 << 20), 4 * tokens.UNIT_TOKENS, 40]
    assert [shard.rows for shard in units.shards] == [60, 0, 2]
    assert units.describe(2) == f"row group 2 of {parquet}"
    assert units.describe(6) == f"token range 1 of {tmp_path / 'c.bin'}"


@pytest.mark.parametrize("layout", ["arrow-file", "arrow-stream"])
@pytest.mark.parametrize("options", [None, pa.ipc.IpcWriteOptions(compression="zstd")])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_arrow_messages_are_found_as_pyarrow_finds_them(tmp_path: Path, layout: str, options: Any, size: int) -> None:
    table = pa.table({"kind": pa.array([f"k{i % 3}" for i in range(size)]).dictionary_encode(), "text": ["x"] * size})
    make = {"arrow-file": pa.ipc.new_file, "arrow-stream": pa.ipc.new_stream}[layout]
    path = tmp_path / "a"
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=300)
    found = list(arrow._messages(LocalSource(str(path)), 8 if layout == "arrow-file" else 0))
    data = path.read_bytes()[8 if layout == "arrow-file" else 0 :]
    reader, expected = pa.BufferReader(data), []
    while True:
        start = reader.tell()
        try:
            message = pa.ipc.read_message(reader)
        except EOFError:
            break
        expected.append((start, reader.tell(), message.type))
        if message.type == "record batch" and len(expected) > 2000:
            break
    shift = len(path.read_bytes()) - len(data)
    assert [(each.start - shift, each.end - shift) for each in found] == [each[:2] for each in expected]
    assert [each.rows is not None for each in found] == [each[2] == "record batch" for each in expected]
    assert sum(each.rows or 0 for each in found) == size


# --- JSON lines ------------------------------------------------------------------------------------------------------


def write_lines(path: Path, lines: list[bytes]) -> Path:
    data = b"\n".join(lines)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return path


def test_a_change_of_files_tells_no_number_of_rows_where_none_is_known(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "word"}\n' * 7)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "other"}\n' * 9)
    table = write_shard(tmp_path / "c.parquet", stdlib_texts(12))
    a, b, c = (CorpusHead.of("data", Units(open_shards([path], "text"))) for path in (*tmp_path.glob("*.jsonl"), table))
    assert re.fullmatch(r"1 files \(\w{8}\) -> 1 files \(\w{8}\)", a.difference(b))
    assert re.fullmatch(r"1 files \(\w{8}\) -> 1 files with 12 rows \(\w{8}\)", a.difference(c))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.ndjson", "a.json.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    not_text = "not UTF-8"
    lines: list[tuple[bytes, bytes | str | None]] = [
        (b'{"text": "first", "n": [1, {"a": null}]}', b"first"),
        ('{"text": "zwölf 日本 \\u00e9 \\ud83d\\ude00"}'.encode(), "zwölf 日本 é 😀".encode()),
        (b'{"n": 1}', None),
        (b'{"text": 5}', None),
        (b'{"text": null}', None),
        (b'{"text": ["a"]}', None),
        (b"null", None),
        (b"[1]", None),
        (b'"text"', None),
        (b'{"text": "cut', None),
        (b"garbage \x00\xff", None),
        (b"[" * 100_000, None),
        (b'{"text": "bad \xff byte"}', not_text),
        (b'{"text": "half \\ud83d pair"}', not_text),
        (b'{"text": "escaped bytes \\udcc3\\udca9"}', not_text),
        (b'{"text": "a byte and an escape \xc3\\udca9"}', not_text),
        (b'{"text": "bad \xff elsewhere", "n": "\xff", "text": "ok"}', b"ok"),
        (b'{"text": "long integer", "n": ' + b"9" * 5000 + b"}", b"long integer"),
        (b'{"text": ""}', b""),
        (b'{"text": "a\\nb"}\r', b"a\nb"),
        (b'{"text": "last"}', b"last"),
    ]
    path = write_lines(tmp_path / name, [b"", *(line for line, _ in lines), b"", b"  "])
    for row, (line, expected) in zip(raw_rows(path), lines, strict=True):
        if expected == not_text:
            with pytest.raises(UnicodeDecodeError):
                (row or b"").decode()
        else:
            assert row == expected, line


@pytest.mark.parametrize("ending", [b"\n", b"", b"\r\n"])
def test_lines_belong_to_the_unit_they_begin_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: bytes) -> None:
    monkeypatch.setattr(jsonl, "_CHUNK_BYTES", 7)
    generator = random.Random(0)
    texts = [f"{index} " + "x" * generator.choice([0, 3, 30, 300]) for index in range(200)]
    lines = [json.dumps({"text": each}).encode() for each in texts]
    newline = ending or b"\n"
    data = newline.join(lines) + ending
    (tmp_path / "a.jsonl").write_bytes(data)
    starts = np.cumsum([0] + [len(line) + len(newline) for line in lines])[:-1]
    for unit_bytes in (1, 50, int(starts[7]), int(starts[7]) - 1, int(starts[7]) + 1, 5000, len(data), len(data) + 1):
        monkeypatch.setattr(jsonl, "UNIT_BYTES", unit_bytes)
        units = units_of(tmp_path / "a.jsonl")
        expected = [[text for text, start in zip(texts, starts, strict=True) if start // unit_bytes == unit]
                    for unit in range(len(units))]  # fmt: skip
        assert units == expected, unit_bytes


def test_a_unit_without_any_object_is_damaged_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "UNIT_BYTES", 100)
    good = b'{"text": "0123456789"}'.ljust(49)
    path = write_lines(tmp_path / "a.jsonl", [good, good, b"x" * 49, b"y" * 49, good, b"z" * 49])
    shard, reader = opened(path), UnitReader("text")
    assert rows_of(reader, shard, 0) == ["0123456789"] * 2
    with pytest.raises(DamagedUnit, match="none of its 2 lines is a JSON object"):
        rows_of(reader, shard, 1)
    assert rows_of(reader, shard, 2) == ["0123456789", None]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_that_is_too_long_is_one_missing_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 3 << 20)
    sizes = [10, (3 << 20) + 100, 20, (3 << 20) - 100, 9 << 20, 30, (2 << 20), 5 << 20]
    lines = [json.dumps({"text": "x" * size}).encode() for size in sizes]
    path = write_lines(tmp_path / name, lines)
    rows = [row for unit in units_of(path) for row in unit]
    assert [row and len(row) for row in rows] == [size if size < 3 << 20 else None for size in sizes]
    held = jsonl._lines(b"x" * 1000 for _ in range(100_000))
    assert list(held) == [None]


@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_compressed_lines_cut_short_or_flipped_are_damage(tmp_path: Path, suffix: str) -> None:
    generator = random.Random(0)
    lines = [json.dumps({"text": f"{generator.random()} " * 20}).encode() for _ in range(3000)]
    path = write_lines(tmp_path / f"a.jsonl.{suffix}", lines)
    whole = path.read_bytes()
    shard, reader = opened(path), UnitReader("text")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedUnit):
        rows_of(reader, shard, 0)
    reader.close()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    path.write_bytes(bytes(flipped))
    if suffix == "gz":  # zstd has a checksum only where the writer was asked for one
        with pytest.raises(DamagedUnit):
            rows_of(UnitReader("text"), shard, 0)
    path.write_bytes(whole)
    assert len(rows_of(UnitReader("text"), shard, 0)) == 3000


@pytest.mark.parametrize("zeros", [1, 512, 100_000])
def test_zeros_behind_a_gzip_file_are_ignored(tmp_path: Path, zeros: int) -> None:
    members = gzip.compress(b'{"text": "one"}\n') + gzip.compress(b"") + gzip.compress(b'{"text": "two"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(members + bytes(zeros))
    assert units_of(tmp_path / "a.jsonl.gz") == [["one", "two"]]
    (tmp_path / "a.jsonl.gz").write_bytes(members + bytes(zeros) + b"x")
    with pytest.raises(UsageError, match="cannot be read"):
        opened(tmp_path / "a.jsonl.gz")


def test_zstd_written_by_the_zstandard_package_in_several_frames(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    frames = [compressor.compress(b'{"text": "%d"}\n' % index * 1000) for index in range(3)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert units_of(tmp_path / "a.jsonl.zst") == [[str(index) for index in range(3) for _ in range(1000)]]
    shard = opened(tmp_path / "a.jsonl.zst")
    flipped = bytearray(b"".join(frames))
    flipped[-2] ^= 1
    (tmp_path / "a.jsonl.zst").write_bytes(bytes(flipped))
    with pytest.raises(DamagedUnit, match="checksum"):
        rows_of(UnitReader("text"), shard, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "0 rows"),
        ("a.jsonl", b"\n \n", "0 rows"),
        ("a.jsonl", b'[{"text": "a"}]', "JSON array"),
        ("a.jsonl", b"not json at all\nneither", "not JSON lines"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', r"no key 'text' \(its first line has body, id\)"),
        ("a.jsonl.zst", b'{"text": "a"}\n', "not compressed"),
        ("a.zst", b"\x28\xb5\x2f\xfd rest", "does not end like .jsonl.zst"),
        ("a.tar.gz", b"\x1f\x8b rest", "does not end like .jsonl.zst"),
        ("a.jsonl.gz", b"\x1f\x8b rest", "cannot be read"),
    ],
)
def test_files_that_are_no_json_lines_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name} .*{message}"):
        open_shards([tmp_path / name], "text")


def test_another_column(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [b'{"body": "b", "text": "t"}'])
    assert units_of(path, "body") == [["b"]]


# --- text ------------------------------------------------------------------------------------------------------------


def texts_to_cut() -> dict[str, str]:
    generator = random.Random(0)
    words = [generator.choice(["alpha", "βeta", "日本", "x" * 50]) for _ in range(60_000)]
    return {
        "paragraphs": "".join(word + generator.choice([" ", " ", "\n", "\n\n"]) for word in words),
        "windows": "".join(word + generator.choice([" ", "\r\n", "\r\n\r\n"]) for word in words),
        "lines": "".join(word + generator.choice([" ", "\n"]) for word in words),
        "one line": "日本語é😀" * 30_000,
        "short": "only this",
    }


@pytest.mark.parametrize("name", list(texts_to_cut()))
@pytest.mark.parametrize("unit_bytes", [100_000, 8 << 20])
def test_text_is_cut_at_blank_lines_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, unit_bytes: int
) -> None:
    monkeypatch.setattr(text, "UNIT_BYTES", unit_bytes)
    whole = texts_to_cut()[name]
    path = tmp_path / "a.txt"
    path.write_bytes(whole.encode())
    units = units_of(path)
    assert len(units) == -(-len(whole.encode()) // unit_bytes)
    rows = [row or "" for unit in units for row in unit]
    assert "".join(rows) == whole
    assert max(len(row.encode()) for row in rows) <= text.ROW_BYTES
    ending = {"paragraphs": "\n\n", "windows": "\r\n\r\n", "lines": "\n", "one line": "", "short": ""}[name]
    inner = [row for unit in units for row in unit[:-1]]
    assert all(row is not None and row.endswith(ending) for row in [*inner, *[unit[-1] for unit in units[:-1]]])
    if name != "short" and unit_bytes > 100_000:
        assert min(len((row or "").encode()) for row in inner) > text.ROW_BYTES // 2


def test_a_cut_does_not_depend_on_what_comes_long_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "UNIT_BYTES", 100_000)
    whole = texts_to_cut()["paragraphs"].encode()
    (tmp_path / "a.txt").write_bytes(whole)
    changed = bytearray(whole)
    changed[10:90_000] = b"z" * 89_990
    (tmp_path / "b.txt").write_bytes(bytes(changed))
    assert units_of(tmp_path / "a.txt")[2:] == units_of(tmp_path / "b.txt")[2:]


def test_text_that_is_no_utf8_keeps_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "UNIT_BYTES", 70_001)
    data = np.random.default_rng(0).integers(128, 256, 400_000, np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(data)
    assert b"".join(row or b"" for row in raw_rows(tmp_path / "a.txt")) == data


@pytest.mark.parametrize("content", ["text".encode("utf-16"), b"\x7fELF\0\0\0", b""])
def test_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.txt (is not UTF-8 text|has 0 rows)"):
        open_shards([tmp_path / "a.txt"], "text")
