"""URLs and client libraries: which can be read, what to install, which errors are tried again."""

from __future__ import annotations

import importlib
import sys
import time
import zipfile
from pathlib import Path

import fsspec
import pytest

from colonnade.data import filesystems, retries
from colonnade.data.shards import UnitReader, discover_shards, open_shards
from colonnade.errors import UsageError
from data_helpers import rows_of


def test_urls_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, message in (
        ("https://host/x/*.parquet", "a web server cannot list its files; give each URL"),
        ("nope://x/*.parquet", "Protocol not known: nope"),
    ):
        with pytest.raises(UsageError, match=message):
            discover_shards(url)
    with pytest.raises(UsageError, match="Protocol not known: nope"):
        open_shards(["nope://x/a.parquet"], "text")


def test_wildcards_in_a_chain_of_file_systems(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("d/part_10.jsonl", "d/part_2.jsonl", "d/readme.txt"):
            archive.writestr(name, f'{{"text": "{name}"}}\n')
    memory = fsspec.filesystem("memory")
    memory.pipe("/chain/x.zip", (tmp_path / "x.zip").read_bytes())
    for prefix, suffix in (("", f"{tmp_path}/x.zip"), ("simplecache::", "memory://chain/x.zip")):
        files = discover_shards(f"{prefix}zip://d/*.jsonl::{suffix}")
        assert files == [f"{prefix}zip://d/part_{number}.jsonl::{suffix}" for number in (2, 10)]
        shards = open_shards(files, "text")
        assert [shard.name for shard in shards] == ["part_2.jsonl", "part_10.jsonl"]
        assert [rows_of(UnitReader("text"), shard, 0) for shard in shards] == [["d/part_2.jsonl"], ["d/part_10.jsonl"]]
    memory.store.clear()


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("s3://b/*.parquet", "s3fs", "s3"),
        ("gs://b/a.parquet", "gcsfs", "gs"),
        ("https://b/a.parquet", "aiohttp", "http"),
        ("hf://datasets/a/b/*.parquet", "huggingface_hub", "hf"),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, url: str, package: str, extra: str) -> None:
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(registry._registry, url.partition("://")[0], raising=False)
    with pytest.raises(UsageError, match=rf"pip install 'colonnade\[{extra}\]'"):
        open_shards(discover_shards(url), "text")


def test_hf_urls_reach_the_hub_file_system() -> None:
    from huggingface_hub import HfFileSystem

    filesystem, path = filesystems._filesystem("hf://datasets/owner/name@main/data/a.parquet")
    assert isinstance(filesystem, HfFileSystem)
    assert path == "datasets/owner/name@main/data/a.parquet"


def test_the_hub_offline_is_an_answer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    begin = time.monotonic()
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        discover_shards("hf://datasets/owner/name/*.parquet")
    assert time.monotonic() - begin < 20


def test_each_kind_of_client_error_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "POLICY", retries.RetryPolicy(first_delay=0.001))

    class NoCredentialsError(OSError):
        pass

    class Botocore(OSError):
        response = {"ResponseMetadata": {"HTTPStatusCode": 503}}  # noqa: RUF012

    assert retries.status_of(Botocore()) == 503
    for error, tries, message in (
        (Botocore("slow down"), 6, "after 6 tries"),
        (ConnectionResetError(104, "reset"), 6, "after 6 tries"),
        (TimeoutError(), 6, "TimeoutError"),
        (NoCredentialsError("no credentials"), 1, "check the credentials"),
        (PermissionError("denied"), 1, "check the credentials"),
        (FileNotFoundError("x"), 1, "check the path"),
        (IsADirectoryError("x"), 1, "is a folder"),
    ):
        calls: list[int] = []

        def request(error: OSError = error, calls: list[int] = calls) -> None:
            calls.append(1)
            raise error

        with pytest.raises(retries.UnreachableError, match=message):
            retries.with_retries("it", request)
        assert len(calls) == tries, error
