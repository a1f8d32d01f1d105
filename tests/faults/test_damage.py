"""Checkpoints damaged on disk: an older one is taken and told why, or the start is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.conftest import STEPS
from faults.runs import assert_same_end
from forked_commands import start

NEWEST = "streaming_checkpoint_step_18"


def shard(checkpoint: Path) -> Path:
    return sorted(checkpoint.glob("*.distcp"))[0]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_a_digit(file: Path) -> None:
    content = file.read_text()
    seen = json.loads(content)["run"]["tokens_seen"]
    file.write_text(content.replace(f'"tokens_seen": {seen}', f'"tokens_seen": {seen ^ 8192}'))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit flipped in a shard": (lambda path: flip_a_bit(shard(path)), "SHA-256"),
    "a bit flipped in .metadata": (lambda path: flip_a_bit(path / ".metadata"), ".metadata"),
    "a shard cut short": (lambda path: cut(shard(path)), "its manifest says"),
    "a shard missing": (lambda path: shard(path).unlink(), "cannot be read: No such file"),
    "a manifest cut short": (lambda path: cut(path / "MANIFEST.json"), "is damaged"),
    "a bit flipped in the manifest": (lambda path: flip_a_digit(path / "MANIFEST.json"), "the SHA-256 that it records"),
    "no manifest": (lambda path: (path / "MANIFEST.json").unlink(), "it has no MANIFEST.json"),
}


@pytest.fixture
def unfinished(undisturbed: Path, tmp_path: Path) -> Path:
    """A run whose newest checkpoint is that of step 18."""
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    shutil.rmtree(directory / f"streaming_checkpoint_step_{STEPS}")
    (directory / "COMPLETE.json").unlink()
    return directory


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_costs_its_steps_and_says_so(
    flags: list[str], undisturbed: Path, unfinished: Path, tmp_path: Path, damage: str
) -> None:
    harm, reason = DAMAGE[damage]
    harm(unfinished / NEWEST)
    outcomes = start("training", [*flags, "--checkpoint-dir", str(unfinished)], ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    (line,) = [line for line in outcomes[0].errors.splitlines() if NEWEST in line]
    assert reason in line
    assert "going back to step 12, 6 steps lost" in line
    # Trained again, and saved in place of the damaged one.
    assert_same_end(unfinished, undisturbed, STEPS, tmp_path)
    assert_same_end(unfinished, undisturbed, 18, tmp_path)


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(unfinished: Path, tmp_path: Path) -> None:
    flip_a_bit(shard(unfinished / NEWEST))
    flags = ["--checkpoint-path", str(unfinished / NEWEST), "--checkpoint-dir", str(tmp_path / "other")]
    (outcome,) = start("resume_pretrain_tensor", flags)
    assert outcome.code == 2
    assert "usage error" in outcome.errors
    assert shard(unfinished / NEWEST).name in outcome.errors
    assert not (tmp_path / "other").exists()


def test_nothing_starts_afresh_over_checkpoints_that_are_all_damaged(flags: list[str], unfinished: Path) -> None:
    for checkpoint in unfinished.glob("streaming_*"):
        flip_a_bit(shard(checkpoint))
    before = {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()}
    (outcome,) = start("training", [*flags, "--checkpoint-dir", str(unfinished)])
    assert outcome.code == 2
    assert "holds 3 checkpoint(s) and none is usable" in outcome.errors
    after = {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file() and path in before}
    assert after == before


def test_broken_newer_folders_and_foreign_names_neither_count_nor_go(
    flags: list[str], undisturbed: Path, unfinished: Path, tmp_path: Path
) -> None:
    """Pruning keeps the newest two complete ones, and what it does not know is not its own."""
    (unfinished / "streaming_checkpoint_step_900").mkdir()
    cut(unfinished / NEWEST / "MANIFEST.json")
    foreign = ["streaming_checkpoint_step_6_backup", "checkpoint_step_3", "notes"]
    for name in foreign:
        shutil.copytree(undisturbed / NEWEST, unfinished / name)
    these = [*flags, "--checkpoint-dir", str(unfinished), "--keep-checkpoints", "2", "--checkpoint-interval", "4"]
    (outcome,) = start("training", these)
    assert outcome.code == 0, outcome.errors
    names = {path.name for path in unfinished.iterdir() if path.is_dir()}
    kept = {f"streaming_checkpoint_step_{step}" for step in (20, STEPS)}
    assert names - {"hangs"} == kept | set(foreign) | {"streaming_checkpoint_step_900", NEWEST}


def test_a_checkpoint_cannot_ask_for_code_to_be_run(unfinished: Path, tmp_path: Path) -> None:
    """Its manifest names a tokenizer that brings code, and says that it is trusted."""
    own, ran = tmp_path / "tokenizer", tmp_path / "ran"
    manifest = unfinished / NEWEST / "MANIFEST.json"
    content = json.loads(manifest.read_text())
    shutil.copytree(content["run"]["settings"]["tokenizer_path"], own)
    config = json.loads((own / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    (own / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(ran)!r}).touch()\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    content["run"]["settings"] |= {"trust_remote_code": True, "tokenizer_path": str(own)}
    del content["sha256"]
    manifest.write_text(json.dumps(content))
    for script, flags in (
        ("generate", ["--checkpoint-path", str(unfinished), "--prompt", "def", "--max-new-tokens", "2"]),
        ("resume_pretrain_tensor", ["--checkpoint-path", str(unfinished), "--total-steps", "30"]),
        ("audit_run", ["--run", str(unfinished), "--from-step", "12", "--to-step", "18"]),
    ):
        (outcome,) = start(script, flags)
        assert outcome.code == 2, outcome
        assert "it comes with code of its own" in outcome.errors
        assert not ran.exists()
    asked = ["--checkpoint-path", str(unfinished), "--prompt", "def", "--max-new-tokens", "2", "--trust-remote-code"]
    (outcome,) = start("generate", asked)
    assert outcome.code == 0, outcome.errors
    assert ran.exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "fingerprints.jsonl"])
def test_a_damaged_line_of_the_log_is_named_on_all_ranks(flags: list[str], unfinished: Path, name: str) -> None:
    lines = (unfinished / name).read_text().splitlines()
    damaged = "\n".join([lines[0], lines[1][:-5], *lines[2:]]) + "\n"
    (unfinished / name).write_text(damaged)
    outcomes = start("training", [*flags, "--checkpoint-dir", str(unfinished)], ranks=2)
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    assert f"usage error: line 2 of {unfinished}/{name} is not a JSON object: remove that line" in outcomes[0].errors
    assert (unfinished / name).read_text() == damaged
