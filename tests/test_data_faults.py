"""What a file may do to a reader, in every layout: each fault is damage to a unit, or a file that cannot be reached."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from colonnade.data.corpus import WINDOW_BYTES
from colonnade.data.formats import jsonl, text, tokens
from colonnade.data.shards import DamagedUnit, Shard, UnitReader, open_shards
from colonnade.errors import RunError, UsageError
from data_helpers import bad_utf8, rows_of, windows_of, write_shard

TEXTS = [f"document {index} " + "word " * 60 for index in range(1000)]


def write_json_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    lines = "".join(json.dumps({"n": 1, key: each}) + "\n" for each in texts).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def write_layout(path: Path, layout: str, texts: list[str] = TEXTS, key: str = "text") -> Path:
    if layout == "text":
        path.write_text("\n\n".join(texts))
    elif layout == "tokens":
        np.arange(200_000, dtype=np.uint16).tofile(path)
    elif layout.startswith("jsonl"):
        write_json_lines(path, texts, key)
    else:
        write_shard(path, texts, group=100, layout=layout, column=key)
    return path


NAMES = {
    "parquet": "a.parquet",
    "arrow-file": "a.feather",
    "arrow-stream": "a.arrow",
    "jsonl": "a.jsonl",
    "jsonl-gz": "a.jsonl.gz",
    "text": "a.txt",
    "tokens": "a.bin",
}


@pytest.fixture(params=list(NAMES))
def shard(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shard:
    """A shard of several units (compressed lines: one) that was fine when it was opened."""
    for module in (jsonl, text):
        monkeypatch.setattr(module, "UNIT_BYTES", 100_000)
    monkeypatch.setattr(tokens, "UNIT_TOKENS", 50_000)
    (found,) = open_shards([write_layout(tmp_path / NAMES[request.param], request.param)], "text")
    assert found.layout == request.param
    assert found.units > 1 or request.param == "jsonl-gz"
    return found


def read_last(shard: Shard) -> list[Any]:
    return list(UnitReader("text").windows(shard, shard.units - 1))


def test_a_file_that_vanished_cannot_be_reached(shard: Shard) -> None:
    assert read_last(shard)
    os.unlink(shard.path)
    with pytest.raises(RunError, match=r"data shard .*a\..* cannot be reached.*No such file"):
        read_last(shard)


def test_a_folder_in_its_place_cannot_be_reached(shard: Shard) -> None:
    os.unlink(shard.path)
    os.mkdir(shard.path)
    with pytest.raises(RunError, match=r"cannot be reached.*Is a directory"):
        read_last(shard)


@pytest.mark.parametrize("keep", [0.5, 0.0], ids=["truncated", "emptied"])
@pytest.mark.parametrize("is_open", [True, False], ids=["open", "not open"])
def test_a_file_cut_short_is_damage(shard: Shard, keep: float, is_open: bool) -> None:
    reader = UnitReader("text")
    if is_open:
        assert list(reader.windows(shard, 0))
    os.truncate(shard.path, int(shard.size * keep))
    with pytest.raises(DamagedUnit):
        list(reader.windows(shard, shard.units - 1))


@pytest.mark.parametrize("keep", [0.5, 0.0], ids=["truncated", "emptied"])
def test_a_file_cut_short_before_the_run_is_refused_where_it_can_be_told(shard: Shard, keep: float) -> None:
    os.truncate(shard.path, int(shard.size * keep))
    if keep and shard.layout in ("jsonl", "text", "tokens"):
        # Their beginning is a whole file of the same kind, or looks like one.
        (shorter,) = open_shards([shard.path], "text")
        assert shorter.fingerprint != shard.fingerprint
    else:
        with pytest.raises(UsageError, match=r"a\..*(cannot be read|0 rows|0 tokens|not compressed)"):
            open_shards([shard.path], "text")


def test_a_foreign_file_in_its_place_is_damage_or_shows_as_bad_rows(shard: Shard) -> None:
    Path(shard.path).write_bytes((b"\xfe\xed\n" * shard.size)[: shard.size])
    if shard.layout in ("text", "tokens"):
        # Any bytes are text that is not UTF-8, or ids: the filter, and the check against the vocabulary, tell.
        assert read_last(shard)
    else:
        with pytest.raises(DamagedUnit):
            read_last(shard)


@pytest.mark.parametrize("layout", ["parquet", "arrow-file", "arrow-stream", "jsonl"])
def test_a_shard_with_another_schema(tmp_path: Path, layout: str) -> None:
    path = tmp_path / NAMES[layout]
    (shard,) = open_shards([write_layout(path, layout)], "text")
    write_layout(path, layout, key="body")
    assert path.stat().st_size == shard.size
    with pytest.raises(UsageError, match=rf"{path.name} has no .* 'text' .*--text-column"):
        open_shards([path], "text")
    if layout == "jsonl":  # every object has its own keys: rows without text
        assert set(rows_of(UnitReader("text"), shard, 0)) == {None}
        return
    with pytest.raises(DamagedUnit, match="no column 'text' now"):
        rows_of(UnitReader("text"), shard, 0)


def test_a_column_of_another_type_in_its_place_is_damage(tmp_path: Path) -> None:
    (shard,) = open_shards([write_shard(tmp_path / "a.parquet", TEXTS)], "text")
    write_shard(tmp_path / "a.parquet", pa.array(range(1000)))
    with pytest.raises(DamagedUnit):
        rows_of(UnitReader("text"), shard, 0)


@pytest.mark.parametrize("layout", ["parquet", "arrow-file", "arrow-stream"])
def test_invalid_utf8_in_one_row_costs_no_other(tmp_path: Path, layout: str) -> None:
    values = [b"one", b"\xff\xfe", b"caf\xc3", None, b"five"]
    (shard,) = open_shards([write_shard(tmp_path / "a", bad_utf8(values), layout=layout)], "text")
    (window,) = windows_of(UnitReader("text"), shard, 0)
    assert window.cast(pa.large_binary()).to_pylist() == values


@pytest.mark.parametrize("layout", ["parquet", "arrow-stream", "jsonl", "jsonl-gz"])
def test_a_document_of_50_megabytes_is_a_window_of_its_own(tmp_path: Path, layout: str) -> None:
    long = "0123456789 abcdef" * 3_000_000
    path = write_layout(tmp_path / NAMES[layout], layout, ["before", long, "after"])
    (shard,) = open_shards([path], "text")
    windows = [window for number in range(shard.units) for window in windows_of(UnitReader("text"), shard, number)]
    assert [len(window) for window in windows] == [1, 1, 1]
    assert windows[1].nbytes > WINDOW_BYTES
    assert [window[0].as_py() for window in windows] == ["before", long, "after"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) - 1],
        lambda data: data[:-4] + b"\xff\xff\xff\x7f",
        lambda data: bytes(len(data)),
        lambda data: data[:8] + bytes(len(data) - 8),
        lambda data: data[:20] + data[40:],
    ],
)
@pytest.mark.parametrize("layout", ["parquet", "arrow-file", "arrow-stream"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, layout: str, damage: Callable[[bytes], bytes]) -> None:
    path = write_layout(tmp_path / NAMES[layout], layout, TEXTS[:50])
    path.write_bytes(damage(path.read_bytes()))

    def open_and_read() -> None:
        (shard,) = open_shards([path], "text")
        rows_of(UnitReader("text"), shard, 0)

    with pytest.raises((UsageError, DamagedUnit)) as caught:
        open_and_read()
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value) or caught.type is DamagedUnit


@pytest.mark.parametrize("layout", ["parquet", "arrow-file", "arrow-stream", "jsonl", "jsonl-gz"])
def test_flipped_bits_never_end_in_anything_but_rows_damage_or_refusal(tmp_path: Path, layout: str) -> None:
    path = write_layout(tmp_path / NAMES[layout], layout, TEXTS[:50])
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    outcomes = {"rows": 0, "damage": 0, "refused": 0}
    for _ in range(150):
        flipped = bytearray(data)
        flipped[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        path.write_bytes(bytes(flipped))
        try:
            (shard,) = open_shards([path], "text")
            for number in range(shard.units):
                for window in windows_of(UnitReader("text"), shard, number):
                    window.cast(pa.large_binary()).to_pylist()
            outcomes["rows"] += 1
        except UsageError:
            outcomes["refused"] += 1
        except DamagedUnit:
            outcomes["damage"] += 1
    assert outcomes["damage"] + outcomes["refused"] > 0 or layout == "jsonl", outcomes
