"""Which folders count as checkpoints, which one is chosen, and what pruning and clearing up remove."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from colonnade.checkpoint import prune as prune_module
from colonnade.checkpoint.discover import CheckpointInfo, find_checkpoints, survey
from colonnade.checkpoint.manifest import Manifest, checkpoint_name, read_manifest, write_manifest
from colonnade.checkpoint.prune import collect_leftovers, prune_checkpoints
from colonnade.checkpoint.retention import Retention
from colonnade.checkpoint.verify import newest_verified, verified
from colonnade.errors import UsageError

METADATA = pickle.dumps(Metadata({}, storage_data={}))
pytestmark = pytest.mark.usefixtures("single_rank")


def make(directory: Path, step: int, name: str | None = None) -> Path:
    folder = directory / (name or checkpoint_name(step))
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"x" * 100)
    (folder / ".metadata").write_bytes(METADATA)
    sizes = {"__0_0.distcp": 100, ".metadata": len(METADATA)}
    write_manifest(folder, Manifest(step, sizes, None, {}, {"loss": 1.5}))
    return folder


def resolve_checkpoint(path: Path) -> CheckpointInfo:
    return verified(path)[0]


def latest_checkpoint(directory: Path) -> CheckpointInfo | None:
    return newest_verified(directory)[0]


def make_file(directory: Path, step: int) -> Path:
    path = directory / f"{checkpoint_name(step)}.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")
    return path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "MANIFEST.json").read_text())
    content.pop("sha256", None)
    change(content)
    (folder / "MANIFEST.json").write_text(json.dumps(content))


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def steps(directory: Path) -> list[int | None]:
    return [info.step for info in find_checkpoints(directory)]


def test_newest_first_by_number_not_by_text(tmp_path: Path) -> None:
    for step in (9, 100, 20, 0):
        make(tmp_path, step)
    make_file(tmp_path, 50)
    make_file(tmp_path, 20)
    found = find_checkpoints(tmp_path)
    assert [(info.step, info.is_single_file) for info in found] == [
        (100, False),
        (50, True),
        (20, False),
        (20, True),
        (9, False),
        (0, False),
    ]
    assert found[0].manifest is not None
    assert found[0].manifest.run == {"loss": 1.5}
    assert survey(tmp_path)[1] == []


@pytest.mark.parametrize(
    "name",
    [
        "streaming_checkpoint_step_",
        "streaming_checkpoint_step_03",
        "streaming_checkpoint_step_3_old",
        "streaming_checkpoint_step_-3",
        "streaming_checkpoint_step_3 ",
        "streaming_checkpoint_step_3\n",
        "streaming_checkpoint_step_٣",
        "streaming_checkpoint_step_3.pth",  # a folder
        "my_streaming_checkpoint_step_3",
        ".tmp-streaming_checkpoint_step_3-0a1b2c3d",
        ".trash-streaming_checkpoint_step_3-0a1b2c3d",
    ],
)
def test_foreign_names_are_not_checkpoints(tmp_path: Path, name: str) -> None:
    make(tmp_path, 3, name)
    assert find_checkpoints(tmp_path) == []
    assert survey(tmp_path)[1] == []
    assert latest_checkpoint(tmp_path) is None


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "MANIFEST.json").unlink(), "has no MANIFEST.json"),
    "cut manifest": (lambda f: os.truncate(f / "MANIFEST.json", 40), "MANIFEST.json is damaged"),
    "manifest not text": (lambda f: (f / "MANIFEST.json").write_bytes(b"\xff\xfe\x00"), "MANIFEST.json is damaged"),
    "manifest a list": (lambda f: (f / "MANIFEST.json").write_text("[]"), "not a checkpoint manifest"),
    "deep manifest": (lambda f: (f / "MANIFEST.json").write_text("[" * 100_000), "MANIFEST.json is damaged"),
    "later format": (lambda f: rewrite(f, lambda c: c.update(format_version=2)), "format version 2"),
    "no files": (lambda f: rewrite(f, lambda c: c.update(files={})), "lists no files"),
    "size is text": (lambda f: rewrite(f, lambda c: c["files"].update(a={"bytes": "7"})), "the size of 'a' is '7'"),
    "step is true": (lambda f: rewrite(f, lambda c: c.update(step=True)), "step is True"),
    "other step": (lambda f: rewrite(f, lambda c: c.update(step=4)), "its manifest is of step 4"),
    "missing shard": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp cannot be read"),
    "truncated shard": (lambda f: os.truncate(f / "__0_0.distcp", 99), "has 99 bytes, its manifest says 100"),
    "longer shard": (lambda f: os.truncate(f / "__0_0.distcp", 101), "has 101 bytes, its manifest says 100"),
    "shard a folder": (lambda f: turn_into_folder(f / "__0_0.distcp"), "__0_0.distcp is not a regular file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_falls_back_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2)
    newest = make(tmp_path, 3)
    change, reason = DAMAGE[damage]
    change(newest)
    with caplog.at_level(logging.WARNING):
        chosen = resolve_checkpoint(tmp_path)
    assert chosen.step == 2
    assert chosen == latest_checkpoint(tmp_path)
    message = caplog.messages[0]
    assert "\n" not in message
    assert str(newest) in message
    assert reason in message
    assert message.endswith("; going back to step 2, 1 step lost")
    assert [item.path for item in survey(tmp_path)[1]] == [newest]
    with pytest.raises(UsageError, match=reason):  # asked for by name: no fallback
        resolve_checkpoint(newest)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (7, "7"),
        (None, "None"),
        ("", "''"),
        ("A" * 64, "'AAAAAAAAAAAAA"),
        ("0" * 63, "'0000000000"),
        ("0" * 64 + "\n", "'0000000000"),
        (["0" * 64], r"\['000000000"),
        ("x" * 10**6, "'xxxxxxxxxx"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_hash_that_is_none_is_refused(tmp_path: Path, value: Any, shown: str) -> None:
    folder = make(tmp_path, 3)
    rewrite(folder, lambda content: [facts.update(sha256="0" * 64) for facts in content["files"].values()])
    assert read_manifest(folder).sha256 == dict.fromkeys(("__0_0.distcp", ".metadata"), "0" * 64)
    rewrite(folder, lambda content: content["files"][".metadata"].update(sha256=value))
    with pytest.raises(UsageError, match=rf"MANIFEST.json is damaged: the SHA-256 of '.metadata' is {shown}") as caught:
        resolve_checkpoint(folder)
    assert len(str(caught.value)) < 500
    rewrite(folder, lambda content: content["files"][".metadata"].pop("sha256"))
    with pytest.raises(UsageError, match=r"MANIFEST.json is damaged: the SHA-256 of '.metadata' is missing"):
        resolve_checkpoint(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "sub/file", "a\\b", "", "a\0b"])
def test_a_manifest_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path, 3)
    (tmp_path / "outside").write_bytes(b"x" * 5)
    rewrite(folder, lambda content: content["files"].update({name: {"bytes": 5}}))
    with pytest.raises(UsageError, match="not the name of a file inside the checkpoint"):
        read_manifest(folder)
    assert find_checkpoints(tmp_path) == []


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, 3)
    (folder / "__0_0.distcp").rename(tmp_path / "outside")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="not a regular file"):
        resolve_checkpoint(folder)


def test_resolve_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere does not exist"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no checkpoint: looked for folders streaming_checkpoint_step_N and"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"notes.txt is not a checkpoint"):
        resolve_checkpoint(tmp_path / "notes.txt")
    for step in (1, 2):
        os.truncate(make(tmp_path, step) / ".metadata", 3)
    with pytest.raises(
        UsageError, match=r"holds 2 checkpoint\(s\) and none is usable; the newest: .*step_2 is damaged"
    ):
        resolve_checkpoint(tmp_path)
    # Starting afresh over damaged checkpoints would be worse than stopping.
    with pytest.raises(UsageError, match="none is usable"):
        latest_checkpoint(tmp_path)


def test_resolve_takes_a_checkpoint_itself(tmp_path: Path) -> None:
    folder, file = make(tmp_path, 3), make_file(tmp_path, 5)
    assert resolve_checkpoint(folder).step == 3
    assert resolve_checkpoint(file).step == 5
    assert resolve_checkpoint(tmp_path).path == file
    copied = Path(shutil.copytree(folder, tmp_path / "best"))
    assert resolve_checkpoint(copied).step == 3
    renamed = file.rename(tmp_path / "weights.pth")
    assert resolve_checkpoint(renamed).step is None
    os.truncate(renamed, renamed.stat().st_size - 4)
    with pytest.raises(UsageError, match=r"weights.pth is damaged"):
        resolve_checkpoint(renamed)


def test_prune_counts_complete_ones_only(tmp_path: Path) -> None:
    for step in range(1, 8):
        make(tmp_path, step)
    os.truncate(tmp_path / checkpoint_name(7) / ".metadata", 3)
    make_file(tmp_path, 9)
    removed = prune_checkpoints(tmp_path, 2, protect=[tmp_path / "." / checkpoint_name(1)])
    assert [path.name for path in removed] == [checkpoint_name(step) for step in (4, 3, 2)]
    assert steps(tmp_path) == [9, 6, 5, 1]
    assert (tmp_path / checkpoint_name(7)).is_dir()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".trash-")]


def test_prune_keeps_all_or_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    assert prune_checkpoints(tmp_path, 0) == []
    assert steps(tmp_path) == [3, 2, 1]
    prune_checkpoints(tmp_path, 1)
    prune_checkpoints(tmp_path, 1)
    assert steps(tmp_path) == [3]
    with pytest.raises(UsageError, match="cannot keep -1"):
        prune_checkpoints(tmp_path, -1)


def test_milestones_stay_and_do_not_count(tmp_path: Path) -> None:
    for step in (50, 100, 150, 200, 250, 300, 350):
        make(tmp_path, step)
    removed = prune_checkpoints(tmp_path, 2, keep_every=100)
    assert [path.name for path in removed] == [checkpoint_name(step) for step in (150, 50)]
    assert steps(tmp_path) == [350, 300, 250, 200, 100]
    assert prune_checkpoints(tmp_path, 1, keep_every=50) == []
    # What is known to be damaged takes no other's place, whatever its sizes say, and is left alone.
    removed = prune_checkpoints(tmp_path, 1, damaged=[tmp_path / "." / checkpoint_name(350)])
    assert steps(tmp_path) == [350, 300]
    assert len(removed) == 3
    with pytest.raises(UsageError, match="cannot keep every -1th step"):
        prune_checkpoints(tmp_path, 1, keep_every=-1)


@pytest.mark.parametrize(("interval", "skipped"), [(35, ()), (50, (100, 300)), (100, ()), (250, (250,))])
def test_each_window_of_steps_leaves_one_checkpoint(tmp_path: Path, interval: int, skipped: tuple[int, ...]) -> None:
    """A save due at a skipped step comes one step later; pruning after each save keeps the first from each 100th on."""
    saved = [step + (step in skipped) for step in range(interval, 801, interval)]
    for step in saved:
        make(tmp_path, step)
        prune_checkpoints(tmp_path, 2, keep_every=100)
    first = {min([step for step in saved if start <= step < start + 100], default=0) for start in range(100, 801, 100)}
    newest = [step for step in saved if step not in first][-2:]
    assert steps(tmp_path) == sorted({*first, *newest} - {0}, reverse=True)


def test_a_checkpoint_that_replaced_a_damaged_one_counts(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    retention = Retention(tmp_path, keep=1, damaged=[tmp_path / checkpoint_name(step) for step in (2, 3)])
    assert retention.prune() == []
    retention.committed(tmp_path / checkpoint_name(2))
    assert retention.prune() == [tmp_path / checkpoint_name(1)]
    retention.committed(tmp_path / checkpoint_name(3))
    retention.prune()
    assert steps(tmp_path) == [3]


def test_a_failed_prune_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    real_rename = os.rename

    def rename(source: Path, target: Path) -> None:
        if source.name == checkpoint_name(2):
            raise PermissionError(13, "Permission denied", str(source))
        real_rename(source, target)

    monkeypatch.setattr(prune_module.os, "rename", rename)
    assert prune_checkpoints(tmp_path, 1) == [tmp_path / checkpoint_name(1)]
    assert steps(tmp_path) == [3, 2]
    assert len(caplog.messages) == 1
    assert checkpoint_name(2) in caplog.messages[0]
    assert "was not pruned" in caplog.messages[0]


def test_leftovers_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 3)
    make(tmp_path, 3, ".trash-streaming_checkpoint_step_3-00000000")
    unfinished = make(tmp_path, 4, ".tmp-streaming_checkpoint_step_4-00000000")
    (unfinished / "MANIFEST.json").unlink()
    half_deleted = make(tmp_path, 2, ".trash-streaming_checkpoint_step_2-00000000")
    (half_deleted / "__0_0.distcp").unlink()
    foreign = [make(tmp_path, 5, name) for name in (".tmp-mine", ".trash-notes-1", "data")]
    collect_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([checkpoint_name(3), *(path.name for path in foreign)])
    assert collect_leftovers(tmp_path / "nowhere") == []


def test_a_commit_cut_short_is_finished(tmp_path: Path) -> None:
    # Killed between the two renames that replace step 3: both are complete, neither has the name.
    new = make(tmp_path, 3, ".tmp-streaming_checkpoint_step_3-00000000")
    rewrite(new, lambda content: content["run"].update(loss=0.5))
    make(tmp_path, 3, ".trash-streaming_checkpoint_step_3-ffffffff")
    # Killed between the two renames of a replacement whose new folder is damaged: the old one comes back.
    os.truncate(make(tmp_path, 2, ".tmp-streaming_checkpoint_step_2-00000000") / ".metadata", 3)
    make(tmp_path, 2, ".trash-streaming_checkpoint_step_2-ffffffff")
    collect_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [checkpoint_name(2), checkpoint_name(3)]
    assert read_manifest(tmp_path / checkpoint_name(3)).run == {"loss": 0.5}
    assert steps(tmp_path) == [3, 2]


def test_finding_checkpoints_does_not_import_torch() -> None:
    code = "import sys, colonnade.checkpoint.discover, colonnade.checkpoint.prune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_flipped_bit_of_a_manifest_is_seen_or_says_the_same(tmp_path: Path) -> None:
    folder = make(tmp_path, 3)
    file = folder / "MANIFEST.json"
    content = file.read_bytes()
    meant = json.loads(content)
    dice = random.Random(0)
    refused = 0
    for _ in range(400):
        flipped = bytearray(content)
        flipped[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        file.write_bytes(flipped)
        try:
            read_manifest(folder)
        except UsageError:
            refused += 1
        else:
            assert json.loads(flipped) == meant
    assert refused > 300
