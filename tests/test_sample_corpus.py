"""The sample corpus against pyarrow, transformers and the standard library itself."""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colonnade.data.sample_corpus import SampleCorpus, build_sample_corpus
from colonnade.data.standard_library import cut_text, read_modules, split_modules
from colonnade.errors import UsageError
from colonnade.run_settings import RunSettings
from run.data import resolve_data

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = {"vocab_size": 512, "max_files": 40}
SMALL_FLAGS = ["--vocab-size", "512", "--max-files", "40"]


def command(output: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "colonnade.data.sample_corpus", "--output", str(output), *flags]


def fingerprint(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(pattern: str) -> list[dict[str, Any]]:
    return [row for path in sorted(glob.glob(pattern)) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SampleCorpus:
    return build_sample_corpus(tmp_path_factory.mktemp("corpus") / "sample [1]", report=lambda line: None, **SMALL)


def test_documents_join_to_the_modules_python_runs(corpus: SampleCorpus) -> None:
    texts: dict[str, str] = {}
    for row in rows(corpus.train_glob) + rows(corpus.validation_glob):
        texts[row["file_path"]] = texts.get(row["file_path"], "") + row["text"]
    assert len(texts) == SMALL["max_files"]
    for file_path, text in texts.items():
        source = Path(sysconfig.get_path("stdlib"), file_path.removeprefix("Lib/"))
        # The parser decodes the file in its own way; the joined text must mean the same program.
        assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(source.read_bytes()))


def test_shards_have_finewebs_columns_and_several_row_groups(corpus: SampleCorpus) -> None:
    train = sorted(glob.glob(corpus.train_glob))
    assert len(train) > 1
    assert len(glob.glob(corpus.validation_glob)) == 1
    for path in train:
        schema = pq.read_schema(path)
        assert {"text", "id", "dump", "url", "file_path", "language", "token_count"} == set(schema.names)
    identifiers = [row["id"] for row in rows(corpus.train_glob) + rows(corpus.validation_glob)]
    assert len(set(identifiers)) == len(identifiers)


def test_page_checksums_reveal_a_flipped_bit(corpus: SampleCorpus, tmp_path: Path) -> None:
    source = sorted(glob.glob(corpus.train_glob))[0]
    content = bytearray(Path(source).read_bytes())
    column = pq.ParquetFile(source).metadata.row_group(0).column(0)
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(content)
    pq.read_table(source, page_checksum_verification=True)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        pq.read_table(damaged, page_checksum_verification=True)


def test_splits_share_no_module(corpus: SampleCorpus) -> None:
    train = {row["url"] for row in rows(corpus.train_glob)}
    validation = {row["url"] for row in rows(corpus.validation_glob)}
    assert train
    assert validation
    assert not train & validation


def test_transformers_reads_the_tokenizer_and_counts_the_same_tokens(corpus: SampleCorpus) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_path)
    assert tokenizer.is_fast
    assert len(tokenizer) == SMALL["vocab_size"]
    assert tokenizer.convert_tokens_to_ids(["<|bos|>", "<|eos|>", "<|pad|>"]) == [
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ]
    for split, total in ((corpus.train_glob, corpus.train_tokens), (corpus.validation_glob, corpus.validation_tokens)):
        documents = rows(split)
        encoded = tokenizer([row["text"] for row in documents], add_special_tokens=False)["input_ids"]
        assert [row["token_count"] for row in documents] == [len(ids) for ids in encoded]
        assert sum(len(ids) for ids in encoded) == total
        assert tokenizer.decode(encoded[0]) == documents[0]["text"]
    unseen = "naïve 🏛 – \x00\t\r\n"
    assert tokenizer.decode(tokenizer.encode(unseen, add_special_tokens=False)) == unseen


def test_another_process_builds_the_same_bytes(corpus: SampleCorpus, tmp_path: Path) -> None:
    output = tmp_path / "elsewhere" / "again"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "true"}
    subprocess.run(
        command(output, *SMALL_FLAGS), cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL
    )
    assert fingerprint(output) == fingerprint(Path(corpus.tokenizer_path).parent)


def test_a_complete_corpus_is_used_again_and_never_overwritten(corpus: SampleCorpus) -> None:
    folder = Path(corpus.tokenizer_path).parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    lines: list[str] = []
    assert build_sample_corpus(folder, report=lines.append, **SMALL) == corpus
    assert len(lines) == 1
    with pytest.raises(UsageError, match="vocab_size 512, not 600"):
        build_sample_corpus(folder, vocab_size=600, max_files=40)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_two_processes_race_to_one_corpus(corpus: SampleCorpus, tmp_path: Path) -> None:
    output = tmp_path / "sample"
    racers = [
        subprocess.Popen(command(output, *SMALL_FLAGS), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sum("used again" in text for text in printed) == 1
    assert fingerprint(output) == fingerprint(Path(corpus.tokenizer_path).parent)


def test_a_kill_leaves_nothing_half(corpus: SampleCorpus, tmp_path: Path) -> None:
    output = tmp_path / "sample"
    builder = subprocess.Popen(command(output), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    assert builder.stdout.readline().startswith("corpus:")  # the full vocabulary takes seconds more
    builder.send_signal(signal.SIGKILL)
    builder.communicate(timeout=60)
    assert builder.returncode == -signal.SIGKILL
    assert not output.exists()
    assert list(tmp_path.glob(".sample.building-*"))
    build_sample_corpus(output, report=lambda line: None, **SMALL)
    assert fingerprint(output) == fingerprint(Path(corpus.tokenizer_path).parent)
    assert not list(tmp_path.glob(".sample.building-*"))


def test_order_and_split_depend_on_paths_alone(tmp_path: Path) -> None:
    paths = [f"package{i % 7}/module{i}.py" for i in range(400)]
    for root, order in (("a", paths), ("b/deeper", paths[::-1])):
        for path in order:
            file = tmp_path / root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"x = {path!r}\n")
    first, second = read_modules(tmp_path / "a"), read_modules(tmp_path / "b" / "deeper")
    assert first == second
    train, validation = split_modules(first)
    assert sorted([*train, *validation], key=lambda module: module.path) == sorted(first, key=lambda m: m.path)
    # 400 draws at 1/20: mean 20, standard deviation 4.4.
    assert 5 <= len(validation) <= 40
    # A module stays on its side when others come or go.
    fewer_train, fewer_validation = split_modules(first[:200])
    assert set(fewer_train) <= set(train)
    assert set(fewer_validation) <= set(validation)


def test_unreadable_files_and_foreign_folders_are_left_out(tmp_path: Path) -> None:
    good = {"a.py": b"a = 1\n", "sub/b.py": "b = 'é'\n".encode(), "latin.py": b"# coding: latin-1\nc = '\xe9'\n"}
    bad = {
        "undecodable.py": b"c = '\xe9'\n",
        "unknown.py": b"# coding: no-such-codec\n",
        "empty.py": b"",
        "data.txt": b"text",
        "site-packages/d.py": b"d = 1\n",
        "test/e.py": b"e = 1\n",
        "_sysconfigdata__linux.py": b"prefix = '/somewhere'\n",
    }
    for path, content in {**good, **bad}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    modules = {module.path: module.text for module in read_modules(tmp_path)}
    assert modules == {"a.py": "a = 1\n", "sub/b.py": "b = 'é'\n", "latin.py": "# coding: latin-1\nc = 'é'\n"}


@given(
    st.lists(st.sampled_from(["def f():\n", "    x\n", "class A:\n", "\n", "é" * 9])).map("".join), st.integers(2, 40)
)
def test_cut_text_joins_again_within_the_limit(text: str, max_chars: int) -> None:
    pieces = cut_text(text, max_chars)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= max_chars for piece in pieces[:-1])
    assert len(pieces[-1]) <= max_chars


def test_cuts_prefer_the_start_of_a_statement() -> None:
    body = "    pass\n" * 4
    text = f"import os\ndef f():\n{body}class A:\n{body}def g():\n{body}"
    assert cut_text(text, 90)[1].startswith("class A:")


@pytest.mark.parametrize(
    ("flags", "names"),
    [(["--vocab-size", "258"], "vocab size 258 is below 259"), (["--max-files", "1"], "max files 1 is below 2")],
)
def test_impossible_sizes_are_one_line_and_exit_2(flags: list[str], names: str, tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path / "x", *flags), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert names in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_a_python_without_source_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "os.pyc").write_bytes(b"\x00")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    with pytest.raises(UsageError, match=r"no standard-library source \(0 readable .py files"):
        build_sample_corpus(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_contents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        build_sample_corpus(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        build_sample_corpus(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "sample_corpus.json").write_text("{")
    with pytest.raises(UsageError, match=r"sample_corpus.json is damaged .*: remove .*sample, or give another"):
        build_sample_corpus(tmp_path / "sample")
    assert [path.name for path in (tmp_path / "sample").iterdir()] == ["sample_corpus.json"]


def test_building_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import json, sys; from colonnade.data.sample_corpus import build_sample_corpus;"
        f"before = sorted(sys.modules); build_sample_corpus({str(tmp_path / 'x')!r}, vocab_size=300, max_files=2);"
        "print(json.dumps([before, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert not {"torch", "transformers"} & set(after)
    assert not {"pyarrow", "tokenizers"} & set(before)
    assert {"pyarrow", "tokenizers"} <= set(after)


def test_help_is_quick() -> None:
    start = time.monotonic()
    done = subprocess.run([*command(Path("x")), "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "--max-files" in done.stdout
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "tiny", "tokenizer_path": "tok"},
        {"preset": "tiny", "validation_glob": "held_out/*.parquet"},
        {"preset": "argonne-2b"},
        {"preset": "argonne-2b", "tokenizer_path": "tok"},
        {"tokenizer_path": "tok"},
    ],
)
def test_a_run_whose_data_were_forgotten_does_not_train_on_it(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"  # nothing in ../data either
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=r"no --data-glob.*: give --data-glob"):
        resolve_data(RunSettings(**given), [])
    assert list(folder.iterdir()) == []


def test_the_tiny_preset_by_itself_trains_on_it(
    corpus: SampleCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("colonnade.data.sample_corpus.build_sample_corpus", lambda output: corpus)
    taken = resolve_data(RunSettings(preset="tiny"), [])
    assert (taken.data_glob, taken.tokenizer_path) == (corpus.train_glob, corpus.tokenizer_path)
    assert taken.validation_glob == corpus.validation_glob
    assert "using the sample corpus" in capsys.readouterr().out
