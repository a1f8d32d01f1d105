"""Windows: how units are cut, that a large one is checked before it leaves, and what it costs in memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from colonnade.data.corpus import WINDOW_BYTES
from colonnade.data.shards import DamagedUnit, Shard, UnitReader, open_shards
from colonnade.data.windows import cut_windows
from data_helpers import bad_utf8, windows_of, write_shard


def opened(path: Path) -> Shard:
    (shard,) = open_shards([path], "text")
    return shard


def reference_windows(rows: list[bytes | None], limit: int) -> list[list[bytes | None]]:
    """The rule, a row at a time."""
    windows: list[list[bytes | None]] = [[]]
    filled = 0
    for row in rows:
        cost = len(row or b"") + 8
        if windows[-1] and filled + cost > limit:
            windows.append([])
            filled = 0
        windows[-1].append(row)
        filled += cost
    return [window for window in windows if window]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()])
def test_windows_do_not_depend_on_the_pieces(kind: pa.DataType) -> None:
    generator = random.Random(0)
    rows: list[bytes | None] = [
        None if generator.random() < 0.1 else b"x" * generator.choice([0, 1, 5, 92, 93, 400]) for _ in range(500)
    ]
    column = pa.array([row if row is None else row.decode() for row in rows], pa.string()).cast(kind)
    expected = reference_windows(rows, 100)
    for step in (1, 7, 500):
        pieces = [column.slice(start, step) for start in range(0, len(column), step)]
        windows = list(cut_windows(pieces, 100))
        assert [window.cast(pa.large_binary()).to_pylist() for window in windows] == expected
        for window in windows:
            assert window.type == pa.large_string()
            window.validate(full=True)


def test_nulls_and_bad_utf8_become_windows() -> None:
    assert [window.to_pylist() for window in cut_windows([pa.nulls(3), pa.nulls(0, pa.string())])] == [[None] * 3]
    (window,) = cut_windows([bad_utf8([b"ok", b"\xff", None])])
    assert window.cast(pa.large_binary()).to_pylist() == [b"ok", b"\xff", None]
    assert list(cut_windows([])) == []


def test_a_row_group_larger_than_a_window_is_cut_by_size(tmp_path: Path) -> None:
    size = 3 << 20
    rows: list[bytes | None] = [f"{index:06d}".encode() + b"x" * size for index in range(13)]
    rows[7] = b"y" * (WINDOW_BYTES + 1)
    path = write_shard(tmp_path / "a.parquet", pa.array(rows, pa.binary()).cast(pa.string()), group=100)
    windows = windows_of(UnitReader("text"), opened(path), 0)
    found = [window.cast(pa.large_binary()).to_pylist() for window in windows]
    assert found == reference_windows(rows, WINDOW_BYTES)
    assert [len(window) for window in windows] == [5, 2, 1, 5]


def test_damage_at_the_end_of_a_large_unit_shows_before_its_first_window(tmp_path: Path) -> None:
    texts = [f"(document {index}) " + "x" * 100_000 for index in range(400)]
    path = write_shard(tmp_path / "a.parquet", texts, group=400, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[data.index(b"(document 399)")] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedUnit, match="CRC"):
        next(UnitReader("text").windows(opened(path), 0))


# --- memory -----------------------------------------------------------------------------------------------------------

_MEASURE = """
import sys, threading, time, psutil
from colonnade.data.shards import UnitReader, open_shards
reader, process = UnitReader("text"), psutil.Process()
small, large = open_shards(sys.argv[1:], "text")
for _ in reader.windows(small, 0):
    pass
start, highest, done = process.memory_info().rss, 0, False
def watch():
    global highest
    while not done:
        highest = max(highest, process.memory_info().rss)
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
size = sum(window.nbytes for number in range(large.units) for window in reader.windows(large, number))
done = True
thread.join()
print(size, highest - start)
"""


@pytest.mark.parametrize("name", ["giant.parquet", "giant.jsonl.zst"])
def test_a_giant_unit_takes_at_most_64_mib(tmp_path: Path, name: str) -> None:
    generator = random.Random(0)
    base = "".join(generator.choices("abcdefgh ", k=4000))
    texts = [f"{index} {base[index % 100 :]}" for index in range(60_000)]
    if name.endswith("parquet"):
        small = write_shard(tmp_path / "small.parquet", texts[:500], group=500)
        large = write_shard(tmp_path / name, texts, group=len(texts), compression="zstd", use_dictionary=False)
    else:
        small, large = tmp_path / "small.jsonl.zst", tmp_path / name
        for path, rows in ((small, texts[:500]), (large, texts)):
            lines = "\n".join(json.dumps({"text": each}) for each in rows).encode()
            path.write_bytes(pa.compress(lines, "zstd", asbytes=True))
    assert opened(large).units == 1
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(small), str(large)],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    size, above = map(int, done.stdout.split())
    assert size > 230_000_000
    assert above < 64 << 20
