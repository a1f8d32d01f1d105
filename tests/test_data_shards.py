"""Finding shards: patterns, natural order, the usual places; and what identifies a corpus."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from colonnade.data.shards import Manifest, UnitReader, Units, open_shards
from colonnade.errors import UsageError
from data_helpers import rows_of, stdlib_texts, write_corpus, write_shard
from data_processing import discover_shards, find_default_shards


def names_of(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_natural_order(tmp_path: Path) -> None:
    names = ["shard_1.parquet", "shard_2.parquet", "shard_9b.parquet", "shard_10.parquet", "shard_100.parquet"]
    shuffled = names.copy()
    random.Random(0).shuffle(shuffled)
    touch(tmp_path, *shuffled)
    assert names_of(discover_shards(str(tmp_path / "*.parquet"))) == names


def test_folders_sort_naturally_too_and_globs_may_be_recursive(tmp_path: Path) -> None:
    names = ["2/b-1.parquet", "2/b-3.parquet", "10/b-2.parquet"]
    touch(tmp_path, *names)
    assert discover_shards(str(tmp_path / "**" / "*.parquet")) == [str(tmp_path / name) for name in names]


def test_patterns_separated_by_commas_keep_their_order_and_name_a_file_once(tmp_path: Path) -> None:
    touch(tmp_path, "a1.parquet", "a2.parquet", "b1.arrow")
    pattern = f"{tmp_path}/b*.arrow, {tmp_path}/a2.parquet,{tmp_path}/*.parquet"
    assert names_of(discover_shards(pattern)) == ["b1.arrow", "a2.parquet", "a1.parquet"]
    assert names_of(discover_shards(f"file://{tmp_path}/a*.parquet")) == ["a1.parquet", "a2.parquet"]


def test_a_pattern_without_files_is_refused_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "folder/a.parquet")
    with pytest.raises(UsageError, match=r"nothing-\*\.parquet"):
        discover_shards(f"{tmp_path}/folder/a.parquet,{tmp_path}/nothing-*.parquet")
    with pytest.raises(UsageError, match=r"is a folder: write '.*folder/\*\.parquet'"):
        discover_shards(f"{tmp_path}/folder")
    for empty in ("", " , "):
        with pytest.raises(UsageError, match="empty"):
            discover_shards(empty)


def test_the_usual_places_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert find_default_shards() == []
    touch(tmp_path, "data/x.parquet")
    assert find_default_shards() == ["../data/x.parquet"]
    touch(tmp_path, "run/data/2.arrow", "run/data/10.arrow")
    assert find_default_shards() == ["data/2.arrow", "data/10.arrow"]
    touch(tmp_path, "run/data/y.parquet")
    assert find_default_shards() == ["data/y.parquet"]


@pytest.mark.parametrize(
    ("names", "suffix"),
    [
        (("a.jsonl", "b.jsonl", "README.txt"), ".jsonl"),
        (("a.jsonl.gz", "LICENSE"), ".jsonl.gz"),
        (("a.parquet", "b.parquet", "c.json"), ".parquet"),
        (("LICENSE", ".hidden.jsonl"), ".parquet"),
    ],
)
def test_the_advice_for_a_folder_is_the_suffix_of_its_files(
    names: tuple[str, ...], suffix: str, tmp_path: Path
) -> None:
    touch(tmp_path, *(f"web/{name}" for name in names))
    with pytest.raises(UsageError) as caught:
        discover_shards(str(tmp_path / "web"))
    assert str(caught.value).endswith(f"write '{tmp_path}/web/*{suffix}'")


def test_the_manifest_knows_names_order_sizes_and_rows_but_no_folder(tmp_path: Path) -> None:
    def digest(paths: list[Path]) -> str:
        return Manifest.of(open_shards(paths, "text")).digest

    here, there = write_corpus(tmp_path / "here", stdlib_texts()), write_corpus(tmp_path / "there", stdlib_texts())
    assert digest(here) == digest(there)
    renamed = here[2].rename(here[2].with_name("other.parquet"))
    regrouped = write_corpus(tmp_path / "regrouped", stdlib_texts(), group=5)
    others = [here[:2], [here[1], here[0], there[2]], [*here[:2], renamed], regrouped]
    assert len({digest(there), *map(digest, others)}) == 5


@pytest.mark.parametrize("layout", ["parquet", "arrow-file", "arrow-stream"])
def test_units_are_read_in_any_order(tmp_path: Path, layout: str) -> None:
    texts = [f"row {index}" for index in range(25)]
    paths = [write_shard(tmp_path / f"{name}", texts, group=10, layout=layout) for name in "ab"]
    units = Units(open_shards(paths, "text"))
    assert len(units) == 6
    reader = UnitReader("text")
    for ordinal in (4, 0, 5, 3, 1):
        shard, number = units.locate(ordinal)
        assert shard.path == str(paths[ordinal // 3])
        values = rows_of(reader, shard, number)
        assert values == texts[10 * (ordinal % 3) :][:10]
    reader.close()


def test_an_arrow_stream_with_dictionaries_in_other_columns(tmp_path: Path) -> None:
    table = pa.table({"kind": pa.array(["x", "y"] * 10).dictionary_encode(), "text": [f"row {i}" for i in range(20)]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=6)
    (shard,) = open_shards([tmp_path / "a.arrow"], "text")
    assert (shard.rows, shard.units) == (20, 4)
    read = [rows_of(UnitReader("text"), shard, number) for number in (3, 1)]
    assert read == [table["text"].to_pylist()[18:], table["text"].to_pylist()[6:12]]
