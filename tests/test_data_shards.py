"""Finding shards: patterns, natural order, the usual places; and what identifies a corpus."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colonnade.data.shards import Manifest, UnitReader, Units, open_shards
from colonnade.errors import UsageError
from colonnade.run_settings import RunSettings
from data_helpers import rows_of, stdlib_texts, write_corpus, write_shard
from data_processing import default_data_glob, discover_shards
from run.data import resolve_data


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


def test_a_file_in_several_spellings_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.parquet", "b.parquet")
    (tmp_path / "c.parquet").symlink_to("a.parquet")
    (tmp_path / "d.parquet").hardlink_to(tmp_path / "b.parquet")
    monkeypatch.chdir(tmp_path)
    assert discover_shards(f"./b.parquet,b.parquet,a.parquet,{tmp_path}/*.parquet,file://{tmp_path}/a.parquet") == [
        "./b.parquet",
        "a.parquet",
        f"{tmp_path}/d.parquet",
    ]


def test_a_pattern_that_was_meant_otherwise_is_told_how_to_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "lit[1].parquet", "big.parquet", "a,b/x.parquet")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"for this path itself write 'lit\[\[\]1\]\.parquet'"):
        discover_shards("lit[1].parquet")
    assert discover_shards("lit[[]1].parquet") == ["lit[1].parquet"]
    with pytest.raises(UsageError, match="write name=glob:weight"):
        discover_shards("web=big.parquet")
    with pytest.raises(UsageError, match=r"'a' matches no file; .*for a comma in a path write \?"):
        discover_shards("a,b/*.parquet")
    assert discover_shards("a?b/*.parquet") == ["a,b/x.parquet"]


def test_a_pattern_without_files_is_refused_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "folder/a.parquet")
    with pytest.raises(UsageError, match=r"nothing-\*\.parquet"):
        discover_shards(f"{tmp_path}/folder/a.parquet,{tmp_path}/nothing-*.parquet")
    with pytest.raises(UsageError, match=r"is a folder: write '.*folder/\*\.parquet'"):
        discover_shards(f"{tmp_path}/folder")
    touch(tmp_path, "a,b.parquet")
    with pytest.raises(UsageError, match=r"'.*/a' matches no file.*for a comma in a path write"):
        discover_shards(f"{tmp_path}/a,b.parquet")
    assert names_of(discover_shards(f"{tmp_path}/a?b.parquet")) == ["a,b.parquet"]
    for empty in ("", " , "):
        with pytest.raises(UsageError, match="empty"):
            discover_shards(empty)


def test_a_dangling_link_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "data/a.parquet", "elsewhere/b.parquet")
    (tmp_path / "data/b.parquet").symlink_to(tmp_path / "elsewhere/b.parquet")
    assert names_of(discover_shards(f"{tmp_path}/data/*.parquet")) == ["a.parquet", "b.parquet"]
    (tmp_path / "elsewhere/b.parquet").unlink()
    monkeypatch.chdir(tmp_path)
    for pattern in (f"{tmp_path}/data/*", "data/a.parquet,data/b.parquet"):
        with pytest.raises(UsageError, match=r"data/b\.parquet', a symbolic link to '.*elsewhere/b\.parquet'"):
            discover_shards(pattern)
    (tmp_path / "data/a.parquet").unlink()
    with pytest.raises(UsageError, match="a symbolic link"):
        discover_shards(default_data_glob() or "")


def test_the_usual_places_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert default_data_glob() is None
    touch(tmp_path, "data/x.parquet")
    assert default_data_glob() == "../data/*.parquet"
    touch(tmp_path, "run/data/2.arrow", "run/data/10.arrow")
    assert default_data_glob() == "data/*.arrow"
    touch(tmp_path, "run/data/y.parquet")
    assert default_data_glob() == "data/*.parquet"


@pytest.mark.parametrize("name", ["part[1].parquet", "a,b.parquet", "part*.parquet"])
def test_a_run_without_a_pattern_reads_each_file_that_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, f"data/{name}", "data/part1.parquet")
    notes: list[str] = []
    settings = resolve_data(RunSettings(tokenizer_path="any"), notes)
    assert settings.data_glob is not None
    assert sorted(names_of(discover_shards(settings.data_glob))) == sorted(os.listdir(tmp_path / "data"))
    assert notes == ["no --data-glob: using data/*.parquet (2 files)"]


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


@pytest.mark.parametrize("first", ["struct", "column"])
@pytest.mark.parametrize("layout", ["parquet", "arrow-file"])
def test_a_column_named_like_a_field_of_a_struct(tmp_path: Path, layout: str, first: str) -> None:
    columns = {"a": pa.array([{"b": f"field {i}"} for i in range(20)]), "a.b": [f"column {i} " * 9 for i in range(20)]}
    table = pa.table(columns if first == "struct" else dict(reversed(columns.items())))
    if layout == "parquet":
        pq.write_table(table, tmp_path / "a", row_group_size=10, use_dictionary=False)
    else:
        with pa.OSFile(str(tmp_path / "a"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    (shard,) = open_shards([tmp_path / "a"], "a.b")
    assert rows_of(UnitReader("a.b"), shard, 1) == columns["a.b"][10:]
    if layout == "parquet":
        index = 1 if first == "struct" else 0
        footer = pq.read_metadata(tmp_path / "a")
        assert shard.unit_bytes[1] == footer.row_group(1).column(index).total_uncompressed_size


@pytest.mark.parametrize("layout", ["parquet", "arrow-file", "arrow-stream"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, layout: str) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array([1]), pa.array(["y"])], names=["text", "id", "text"])
    make = {"arrow-file": pa.ipc.new_file, "arrow-stream": pa.ipc.new_stream}.get(layout)
    if make is None:
        pq.write_table(table, tmp_path / "a")
    else:
        with pa.OSFile(str(tmp_path / "a"), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UsageError, match="has 2 columns 'text'; rename all but one"):
        open_shards([tmp_path / "a"], "text")
