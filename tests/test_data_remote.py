"""Shards behind URLs: by range, ahead of time, with retries; and never a skip for a network error."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colonnade.data import filesystems, retries
from colonnade.data.formats import parquet
from colonnade.data.shards import DamagedUnit, UnitReader, Units, discover_shards, open_shards
from colonnade.errors import RunError, UsageError
from data_helpers import plain_blocks, plain_tokens, rows_of, stdlib_texts, tiny_tokenizer, write_shard
from data_processing import streaming_token_generator
from range_server import FAULTS, RangeServer, serving

QUICK = retries.RetryPolicy(first_delay=0.01, longest_delay=0.02, connect_timeout=1.0, read_timeout=0.3)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (retries, filesystems):
        monkeypatch.setattr(module, "POLICY", QUICK)
    monkeypatch.setattr(parquet, "_footers", parquet._Footers())
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def all_rows(paths: list[str], *, ahead: bool = True) -> list[str | None]:
    """All rows of a corpus through one reader."""
    units, reader = Units(open_shards(paths, "text")), UnitReader("text")
    rows = []
    for ordinal in range(len(units)):
        if ahead and ordinal + 1 < len(units):
            reader.expect(*units.locate(ordinal + 1))
        rows += rows_of(reader, *units.locate(ordinal))
    reader.close()
    return rows


def write_layouts(folder: Path, texts: list[str]) -> dict[str, Path]:
    """The same rows in every layout that holds rows."""
    paths = {
        name: write_shard(folder / f"a.{name}", texts, layout=layout)
        for name, layout in (("parquet", "parquet"), ("feather", "arrow-file"), ("arrow", "arrow-stream"))
    }
    lines = "".join(json.dumps({"n": index, "text": text}) + "\n" for index, text in enumerate(texts)).encode()
    paths["jsonl"] = folder / "a.jsonl"
    paths["jsonl"].write_bytes(lines)
    for suffix, codec in (("zst", "zstd"), ("gz", "gzip")):
        paths[f"jsonl.{suffix}"] = folder / f"a.jsonl.{suffix}"
        paths[f"jsonl.{suffix}"].write_bytes(
            pa.compress(lines, codec, asbytes=True) if codec == "zstd" else gzip(lines)
        )
    return paths


def gzip(data: bytes) -> bytes:
    import gzip as module

    return module.compress(data)


# --- every layout, over http and fsspec's memory file system ---------------------------------------------------------


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "on demand"])
@pytest.mark.parametrize("name", ["parquet", "feather", "arrow", "jsonl", "jsonl.zst", "jsonl.gz"])
def test_remote_rows_are_the_local_rows(tmp_path: Path, memory: Any, name: str, ahead: bool) -> None:
    texts = list(stdlib_texts())
    path = write_layouts(tmp_path, texts)[name]
    memory.pipe(f"/corpus/{path.name}", path.read_bytes())
    assert all_rows([str(path)]) == texts
    assert all_rows([f"memory://corpus/{path.name}"], ahead=ahead) == texts
    with serving(RangeServer({path.name: path})) as server:
        assert all_rows([f"{server.url}/{path.name}"], ahead=ahead) == texts


def test_local_and_remote_shards_have_one_manifest(tmp_path: Path, memory: Any) -> None:
    from colonnade.data.shards import Manifest

    for path in write_layouts(tmp_path, list(stdlib_texts())).values():
        memory.pipe(f"/elsewhere/{path.name}", path.read_bytes())
        (local,), (remote,) = (open_shards([each], "text") for each in (str(path), f"memory://elsewhere/{path.name}"))
        assert Manifest.of([local]) == Manifest.of([remote])


def test_text_and_tokens_over_http(tmp_path: Path) -> None:
    text = "\n\n".join(stdlib_texts()) * 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokens = np.arange(3_000_000, dtype=np.uint32) % 50_000
    np.save(tmp_path / "a.npy", tokens.astype(np.uint16))
    with serving(RangeServer({path.name: path for path in tmp_path.iterdir()})) as server:
        assert "".join(row or "" for row in all_rows([f"{server.url}/a.txt"])) == text
        units, reader = Units(open_shards([f"{server.url}/a.npy?signature=x"], "text")), UnitReader("text")
        read = [window for unit in range(len(units)) for window in reader.windows(*units.locate(unit))]
    assert np.array_equal(np.concatenate(read), tokens)


def test_files_are_found_where_the_file_system_can_list(memory: Any) -> None:
    for name in ("corpus/s_10.parquet", "corpus/s_2.parquet", "corpus/deep/s_1.parquet", "corpus/notes.md"):
        memory.pipe("/" + name, b"x")
    urls = [f"memory:///corpus/s_{number}.parquet" for number in (2, 10)]
    assert discover_shards("memory://corpus/*.parquet") == urls
    assert discover_shards("memory://corpus/**/*.parquet,memory://other.parquet") == [
        "memory:///corpus/deep/s_1.parquet",
        *urls,
        "memory://other.parquet",
    ]
    with pytest.raises(UsageError, match=r"'memory://corpus/\*\.arrow' matches no file"):
        discover_shards("memory://corpus/*.arrow")


# --- ranges ----------------------------------------------------------------------------------------------------------


def wide_file(path: Path, rows: int = 4000, groups: int = 4) -> list[str]:
    """A file whose text is a small part of it: twenty columns of incompressible bytes beside."""
    generator = np.random.default_rng(0)
    texts = [f"document {index} " + "word " * 20 for index in range(rows)]
    noise = {f"c{column}": [generator.bytes(100) for _ in range(rows)] for column in range(20)}
    pq.write_table(pa.table({**noise, "text": texts}), path, row_group_size=rows // groups, compression="none")
    return texts


def test_only_the_footer_and_the_text_column_are_requested(tmp_path: Path) -> None:
    texts = wide_file(tmp_path / "wide.parquet")
    size = (tmp_path / "wide.parquet").stat().st_size
    footer = pq.read_metadata(tmp_path / "wide.parquet")
    chunks = sum(footer.row_group(group).column(20).total_compressed_size for group in range(4))
    with serving(RangeServer({"wide.parquet": tmp_path / "wide.parquet"})) as server:
        assert all_rows([f"{server.url}/wide.parquet"]) == texts
        sent = server.bytes_sent["wide.parquet"]
        # The footer's end is asked for once when the file is opened, with what stands before it in 64 KiB.
        assert sent <= chunks + (64 << 10) + 8, f"{sent} of {size} bytes"
        assert sent < size / 5
        # A probe of the first bytes, the tail, and one request a row group.
        assert len([each for each in server.requests if each[0] == "GET"]) == 2 + 4


def test_a_long_column_chunk_is_read_in_blocks_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "HELD_BYTES", 100_000)
    monkeypatch.setattr(filesystems, "_BLOCK_BYTES", 30_000)
    texts = wide_file(tmp_path / "wide.parquet", groups=1)
    footer = pq.read_metadata(tmp_path / "wide.parquet")
    chunk = footer.row_group(0).column(20).total_compressed_size
    with serving(RangeServer({"wide.parquet": tmp_path / "wide.parquet"})) as server:
        assert all_rows([f"{server.url}/wide.parquet"]) == texts
        asked = [re.fullmatch(r"bytes=(\d+)-(\d+)", each[2]) for each in server.requests if each[0] == "GET"]
        lengths = [int(match[2]) - int(match[1]) + 1 for match in asked if match]
        assert sorted(lengths)[-2] == 30_000
        assert sum(lengths) <= chunk + (64 << 10) + 8


def test_the_next_unit_is_fetched_in_the_background(tmp_path: Path) -> None:
    texts = wide_file(tmp_path / "wide.parquet")
    with serving(RangeServer({"wide.parquet": tmp_path / "wide.parquet"})) as server:
        units, reader = Units(open_shards([f"{server.url}/wide.parquet"], "text")), UnitReader("text")
        assert rows_of(reader, *units.locate(0)) == texts[:1000]
        server.forget()
        reader.expect(*units.locate(2))
        reader.expect(*units.locate(2))
        for _ in range(500):
            if server.bytes_sent:
                break
            time.sleep(0.01)
        assert len(server.requests) == 1
        # Another unit comes first; the hint holds.
        assert rows_of(reader, *units.locate(1)) == texts[1000:2000]
        assert rows_of(reader, *units.locate(2)) == texts[2000:3000]
        assert len(server.requests) == 2
        reader.close()


# --- failures that pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parquet", "jsonl", "arrow", "jsonl.zst"])
def test_a_server_that_fails_at_random_changes_nothing(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    texts = list(stdlib_texts()) * 3
    path = write_layouts(tmp_path, texts)[name]
    generator, number = random.Random(1), count()

    def fault(method: str, path: str) -> str | None:
        # Every fault for certain, in the first requests; then at random.
        index = next(number)
        if index % 2 == 0 and index // 2 < len(FAULTS):
            return FAULTS[index // 2]
        return generator.choice(("reset", "500", "503", "short")) if generator.random() < 0.3 else None

    with serving(RangeServer({path.name: path}, fault)) as server:
        urls = [f"{server.url}/{path.name}"]
        assert all_rows(urls) == texts
        while set(server.faults) != set(FAULTS):
            assert all_rows(urls) == texts
    assert "trying again in" in caplog.text


def test_a_token_stream_over_a_failing_server_is_the_local_one(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.parquet", stdlib_texts())
    number = count()
    server = RangeServer({"a.parquet": path}, lambda method, name: "503" if next(number) % 3 == 0 else None)
    with (
        serving(server),
        streaming_token_generator(
            f"{server.url}/a.parquet", tiny_tokenizer(), block_size=32, epochs=2, workers=1
        ) as stream,
    ):
        blocks = [chunk.tokens.tolist() for chunk in stream]
        assert stream.position.skipped == ()
    assert blocks == [block.tolist() for block in plain_blocks(plain_tokens(stdlib_texts()), 32, epochs=2)]
    assert server.faults["503"] > 2


# --- failures that stay ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["reset", "500", "503", "short", "stall"])
def test_a_server_that_stays_broken_ends_the_run_with_the_name_and_never_skips(tmp_path: Path, fault: str) -> None:
    path = write_shard(tmp_path / "a.parquet", stdlib_texts())
    broken = threading.Event()
    server = RangeServer({"a.parquet": path}, lambda method, name: fault if broken.is_set() else None)
    with serving(server):
        url = f"{server.url}/a.parquet"
        units, reader = Units(open_shards([url], "text")), UnitReader("text")
        assert rows_of(reader, *units.locate(0)) == list(stdlib_texts(10))
        broken.set()
        reader.expect(*units.locate(2))
        for unit in (1, 2):  # on demand, and ahead of time
            with pytest.raises(RunError, match=rf"{url} cannot be reached \(.+\) after 6 tries") as caught:
                rows_of(reader, *units.locate(unit))
            assert "\n" not in str(caught.value)
        with pytest.raises(UsageError, match=f"{url} cannot be reached"):
            open_shards([url], "text")
        reader.close()


def test_a_network_error_inside_pyarrow_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that reading happens in callbacks of pyarrow, in the middle of a row group.
    monkeypatch.setattr(filesystems, "HELD_BYTES", 1000)
    monkeypatch.setattr(filesystems, "_BLOCK_BYTES", 5000)
    texts = wide_file(tmp_path / "wide.parquet", groups=1)
    number = count()
    server = RangeServer(
        {"wide.parquet": tmp_path / "wide.parquet"}, lambda method, name: "500" if next(number) > 30 else None
    )
    with serving(server):
        (shard,) = open_shards([f"{server.url}/wide.parquet"], "text")
        with pytest.raises(RunError, match=r"wide\.parquet cannot be reached \(HTTP status 500\)"):
            rows_of(UnitReader("text"), shard, 0)
    assert len(texts) == shard.rows


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        ("401", "check the credentials"),
        ("403", "check the credentials"),
        ("404", "check the path"),
        ("410", "check the URL"),
    ],
)
def test_a_refusal_is_not_tried_again(tmp_path: Path, status: str, remedy: str) -> None:
    path = write_shard(tmp_path / "a.parquet", stdlib_texts())
    refuses = threading.Event()
    server = RangeServer({"a.parquet": path}, lambda method, name: status if refuses.is_set() else None)
    with serving(server):
        units, reader = Units(open_shards([f"{server.url}/a.parquet"], "text")), UnitReader("text")
        rows_of(reader, *units.locate(0))
        refuses.set()
        server.forget()
        with pytest.raises(RunError, match=f"a.parquet cannot be reached .*{remedy}"):
            rows_of(reader, *units.locate(1))
        assert len(server.requests) == 1
        server.forget()
        with pytest.raises(UsageError, match=f"a.parquet cannot be reached .*{remedy}"):
            open_shards([f"{server.url}/a.parquet"], "text")
        assert len(server.requests) == 2  # HEAD, then GET: fsspec's two ways to learn a size


@pytest.mark.parametrize("announced", [True, False])
def test_a_server_without_ranges_is_refused(tmp_path: Path, announced: bool) -> None:
    wide_file(tmp_path / "wide.parquet")
    server = RangeServer({"wide.parquet": tmp_path / "wide.parquet"}, ranges=False, announces_no_ranges=announced)
    with serving(server), pytest.raises(UsageError, match=r"wide\.parquet cannot be .*range requests"):
        open_shards([f"{server.url}/wide.parquet"], "text")


def test_a_file_that_shrank_is_no_damage(memory: Any, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.parquet", stdlib_texts())
    memory.pipe("/a.parquet", path.read_bytes())
    (shard,) = open_shards(["memory://a.parquet"], "text")
    memory.pipe("/a.parquet", path.read_bytes()[:500])
    with pytest.raises(RunError, match="bytes came for"):
        rows_of(UnitReader("text"), shard, 5)
    memory.rm("/a.parquet")
    with pytest.raises(RunError, match=r"memory://a\.parquet cannot be reached \(no such file\); check the path"):
        rows_of(UnitReader("text"), shard, 5)


def test_damage_in_a_remote_file_is_damage(memory: Any, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.parquet", [f"document {index}" for index in range(30)], compression="none")
    data = bytearray(path.read_bytes())
    data[pq.read_metadata(path).row_group(1).column(1).data_page_offset + 60] ^= 1
    memory.pipe("/a.parquet", bytes(data))
    (shard,) = open_shards(["memory://a.parquet"], "text")
    reader = UnitReader("text")
    assert rows_of(reader, shard, 0) == [f"document {index}" for index in range(10)]
    with pytest.raises(DamagedUnit, match="CRC"):
        rows_of(reader, shard, 1)
    assert rows_of(reader, shard, 2) == [f"document {index}" for index in range(20, 30)]


def test_stopping_a_reader_ends_the_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = retries.RetryPolicy(first_delay=30.0, longest_delay=30.0)
    monkeypatch.setattr(retries, "POLICY", patient)
    path = write_shard(tmp_path / "a.parquet", stdlib_texts())
    broken = threading.Event()
    server = RangeServer({"a.parquet": path}, lambda method, name: "500" if broken.is_set() else None)
    with serving(server):
        (shard,) = open_shards([f"{server.url}/a.parquet"], "text")
        reader = UnitReader("text")
        broken.set()
        read = filesystems.Background(lambda: rows_of(reader, shard, 0))
        while not server.faults:
            time.sleep(0.01)
        reader.stop()
        with pytest.raises(RunError, match="stopped"):
            read.result()
        with pytest.raises(RunError, match="stopped"):
            rows_of(reader, shard, 0)
        reader.close()
