"""Input that cannot work: one line from rank 0, exit code 2, before training starts, and nothing lost or left behind.

Every case is a command as a user starts it, in processes of its own (`forked_commands`).
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from colonnade.run_settings import RunSettings
from data_helpers import stdlib_texts, tiny_tokenizer, write_corpus, write_shard
from forked_commands import ROOT, Outcome, start
from model import ModelConfig

MODEL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
TRAINING, RESUME = "training", "resume_pretrain_tensor"
STEPS = 4


# ------------------------------------------------------------------------------------------------------------- helpers


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Flags from setting names; True is a switch, False its opposite, None leaves it out."""
    flags = []
    for name, value in settings.items():
        if value is False:
            flags.append("--no-" + name.replace("_", "-"))
        elif value is not None:
            flags += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return flags


def placed(changes: Mapping[str, Any], inputs: Path) -> dict[str, Any]:
    """`changes` with the folder of inputs in place of {}."""
    return {
        name: value.replace("{}", str(inputs)) if isinstance(value, str) else value for name, value in changes.items()
    }


def require_refusal(outcome: Outcome, script: str, *fragments: str) -> str:
    """One line on stderr, as it should be, and exit code 2; the line."""
    assert outcome.code == 2, outcome
    assert outcome.errors.endswith("\n")
    line = outcome.errors[:-1]
    assert "\n" not in line, outcome.errors
    assert line.startswith(f"{script}.py: usage error: ")
    assert len(line) < 700
    for fragment in fragments:
        assert fragment in line
    return line


def contents(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file inside with its size, modification time and inode: equal only if nothing was touched.

    A folder's own time is left out: the lock of a run's folder is a file in it for a while.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        changed = 0 if path.is_dir() else status.st_mtime_ns
        found[str(path.relative_to(folder))] = (status.st_size, changed, status.st_ino)
    return found


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data, tokenizer and model, and bad ones of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = stdlib_texts(60)
    write_corpus(folder / "good", texts)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    write_shards(folder, texts)
    for name, file, content in (
        ("torn", "tokenizer.json", '{"version": '),
        ("foreign", "tokenizer.json", '{"version": "1.0"}'),
        ("modelless", "tokenizer.json", json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "zork"}})),
        ("misconfigured", "tokenizer_config.json", "[1]"),
    ):
        shutil.copytree(folder / "tokenizer", folder / name)
        (folder / name / file).write_text(content)
    (folder / "nothing").mkdir()
    (folder / "weights").mkdir()
    (folder / "weights" / "config.json").write_text(json.dumps(MODEL))
    (folder / "file").write_text("text")
    (folder / "of_a_checkpoint").mkdir()
    (folder / "of_a_checkpoint" / "MANIFEST.json").touch()
    (folder / "dangling").symlink_to(folder / "nowhere" / "at all")
    for name, changes in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps({**MODEL, **changes}))
    (folder / "torn.json").write_text("{")
    (folder / "list.json").write_text("[]")
    (folder / "empty.json").write_text("{}")
    return folder


MODELS: dict[str, dict[str, Any]] = {
    "model": {},
    "six_heads": {"num_attention_heads": 6},
    "small_vocabulary": {"vocab_size": 100},
    "heads_as_text": {"num_attention_heads": "4"},
    "hidden_as_text": {"hidden_size": "abc", "head_dim": None},
    "no_size": {"hidden_size": 0},
    "minus_layers": {"num_hidden_layers": -1},
    "nan": {"rms_norm_eps": float("nan")},
    "infinite": {"rope_theta": float("inf")},
    "wide": {"hidden_size": 10**8},
    "deep": {"num_hidden_layers": 10**9},
    "too_many": {"vocab_size": 10**30},
    "rope_number": {"rope_parameters": 5},
    "other_family": {"model_type": "gpt2"},
    "uneven": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": None},
    "odd": {"head_dim": 15},
}


def write_shards(folder: Path, texts: Sequence[str]) -> None:
    """Shards that are bad, or only look it."""
    write_shard(folder / "no_text.parquet", texts[:5], column="body")
    pq.write_table(pa.table({"text": [1, 2, 3]}), folder / "numbers.parquet")
    whole = write_shard(folder / "cut.parquet", texts).read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.parquet").touch()
    (folder / "prose.parquet").write_text("this is not Parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "no_rows.parquet")
    write_shard(folder / "nulls.parquet", pa.array([None] * 40, pa.string()))
    write_shard(folder / "small.parquet", ["tiny text"])
    write_shard(folder / "half_nulls.parquet", [*texts[:10], *[None] * 10])
    write_shard(folder / "some_nulls.parquet", pa.array([None] * 10 + list(texts), pa.string()))


def base(inputs: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a small run into `folder`; three sequences a step, so that two ranks cannot share them out."""
    return {
        "data_glob": inputs / "good" / "*.parquet",
        "tokenizer_path": inputs / "tokenizer",
        "tokenizer_backend": "hf",  # nothing to compare, and to tell of, in a user's first start
        "model_config": inputs / "model.json",
        "block_size": 32,
        "initial_batch_size": 3,
        "total_steps": STEPS,
        "log_interval": 1,
        "checkpoint_interval": 2,
        "warmup_steps": 1,
        "checkpoint_dir": folder,
        **changes,
    }


# --------------------------------------------------------------------------------------------------- a start that fails

REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    # Data
    ({"data_glob": "{}/none*.parquet"}, ("--data-glob", "none*.parquet' matches no file", "check the path")),
    ({"data_glob": ""}, ("--data-glob is ''",)),
    ({"data_glob": " , "}, ("' , ' is empty", "data/*.parquet")),
    ({"data_glob": "{}/good"}, ("is a folder", "good/*.parquet")),
    ({"data_glob": "{}/good/*.parquet,{}/none*"}, ("none*' matches no file",)),
    ({"data_glob": "{}/no_text.parquet"}, ("no_text.parquet has no column 'text' (it has id, body)",)),
    ({"data_glob": "{}/numbers.parquet"}, ("of type int64, not text", "convert it")),
    ({"data_glob": "{}/cut.parquet"}, ("cut.parquet cannot be read", "replace or remove it")),
    ({"data_glob": "{}/empty.parquet"}, ("empty.parquet cannot be read", "0 bytes")),
    ({"data_glob": "{}/prose.parquet"}, ("prose.parquet cannot be read",)),
    ({"data_glob": "{}/file"}, ("neither Parquet nor Arrow",)),
    ({"data_glob": "{}/no_rows.parquet"}, ("no_rows.parquet has 0 rows",)),
    ({"data_glob": "{}/nulls.parquet"}, ("holds 0 tokens, one block needs 33", "40 missing", "give more data")),
    ({"data_glob": "{}/small.parquet"}, ("one block needs 33", "1 kept", "smaller block size")),
    ({"data_glob": "a={}/good/*:0.99,b={}/small.parquet:0.01"}, ("corpus b holds 4 tokens, one block needs 33",)),
    ({"data_glob": "a\nb"}, ("--data-glob",)),
    ({"validation_glob": "{}/none*"}, ("--validation-glob", "matches no file")),
    ({"validation_glob": "{}/small.parquet"}, ("--validation-glob", "one block needs 33")),
    ({"validation_glob": "{}/no_text.parquet"}, ("--validation-glob", "no column 'text'")),
    # Tokenizer
    ({"tokenizer_path": None}, ("--tokenizer-path is missing", "folder or hub name")),
    ({"tokenizer_path": ""}, ("--tokenizer-path is ''",)),
    ({"tokenizer_path": "{}/nothing"}, ("nothing' is not a tokenizer", "give --tokenizer-path a folder")),
    ({"tokenizer_path": "{}/nowhere"}, ("does not exist", "give a folder")),
    ({"tokenizer_path": "{}/file"}, ("is not a folder",)),
    (
        {"tokenizer_path": "{}/tokenizer/tokenizer.json"},
        (
            "is not a folder; give its folder",
            "/tokenizer' with",
        ),
    ),
    ({"tokenizer_path": "{}/torn"}, ("torn' is not a tokenizer", "line 1 column 13")),
    ({"tokenizer_path": "{}/foreign"}, ("foreign' is not a tokenizer", "lacks 'added_tokens'")),
    ({"tokenizer_path": "{}/modelless"}, ("modelless' is not a tokenizer", "give --tokenizer-path a folder")),
    ({"tokenizer_path": "{}/misconfigured"}, ("misconfigured' is not a tokenizer",)),
    ({"tokenizer_path": "nobody/nothing"}, ("'nobody/nothing' is not a tokenizer",)),
    # Model
    ({"model_config": "{}/small_vocabulary.json"}, ("ids up to 399", "vocabulary 100 entries", "larger vocab_size")),
    ({"model_config": "{}/heads_as_text.json"}, ("heads_as_text.json", "num_attention_heads is '4'", "type int")),
    ({"model_config": "{}/hidden_as_text.json"}, ("hidden_size is 'abc'", "type int")),
    ({"model_config": "{}/no_size.json"}, ("hidden_size is 0", "above 0")),
    ({"model_config": "{}/minus_layers.json"}, ("num_hidden_layers is -1", "above 0")),
    ({"model_config": "{}/nan.json"}, ("rms_norm_eps is nan",)),
    ({"model_config": "{}/infinite.json"}, ("rope_theta is inf",)),
    ({"model_config": "{}/wide.json"}, ("parameters take", "GiB at tp 1", "smaller model")),
    ({"model_config": "{}/deep.json"}, ("parameters take", "GiB at tp 1", "smaller model")),
    ({"model_config": "{}/too_many.json"}, ("vocab_size is 1e+30", "below 2147483648")),
    ({"model_config": "{}/rope_number.json"}, ("rope_parameters is 5", "mapping")),
    ({"model_config": "{}/other_family.json"}, ("model_type 'gpt2' is not supported",)),
    ({"model_config": "{}/uneven.json"}, ("hidden_size 64 is not a multiple of 5", "give head_dim")),
    ({"model_config": "{}/odd.json"}, ("head_dim 15 is odd",)),
    ({"model_config": "{}/torn.json"}, ("--model-config", "not JSON")),
    ({"model_config": "{}/list.json"}, ("no JSON object",)),
    ({"model_config": "{}/empty.json"}, ("hidden_size", "missing")),
    ({"model_config": "{}/none.json"}, ("No such file",)),
    ({"model_config": None, "preset": "tinny"}, ("--preset 'tinny' does not exist; there are aixsim-1.1b",)),
    ({"preset": "tiny"}, ("--preset tiny and --model-config", "give one of them")),
    ({"memory_limit_gib": "1e-5"}, ("parameters take 0.00", "and --memory-limit-gib 1e-05 allows 1e-05 GiB")),
    # Sizes that do not go together
    ({"block_size": 65}, ("--block-size 65 is above the model's context of 64", "at most")),
    ({"tokens_per_step": 33}, ("--tokens-per-step 33 is no multiple of --block-size 32", "32 or 64")),
    ({"tokens_per_step": 31}, ("nearest: 32",)),
    ({"tokens_per_step": 64, "gradient_accumulation_steps": 2}, ("--tokens-per-step 64", "give one of them")),
    ({"gradient_accumulation_steps": 2**27}, ("tokens a step; at most 268,435,456", "lower one of them")),
    (
        {"initial_batch_size": "auto", "deterministic": True},
        ("--deterministic fixes the micro-batch", "give --initial-batch-size N"),
    ),
    ({"initial_batch_size": "auto", "gradient_accumulation_steps": 2**27}, ("tokens a step; at most 268,435,456",)),
    ({"tensor_parallel_size": 2}, ("--tensor-parallel-size 2 does not divide the 1 ranks", "sizes that do: 1")),
    ({"tensor_slices": 3}, ("--tensor-slices 3 is not a power of two", "give 1, 2, 4, 8")),
    (
        {"tensor_slices": 16},
        ("--tensor-slices 16: 4 attention heads cannot be cut into 16", "sizes that work: 1, 2, 4"),
    ),
    ({"learning_rate": "1e-4", "min_learning_rate": "1e-3"}, ("--min-learning-rate 0.001 is above", "0.0001")),
    ({"decay_steps": 2}, ("--decay-steps 2 says nothing with --schedule cosine", "give --schedule wsd")),
    ({"total_steps": "9" * 30}, ("--total-steps is 999", "at most 1000000000")),
    ({"compile": True, "disable_compile": True}, ("--compile and --disable-compile", "give one of them")),
    ({"plain_step": True, "overlap_collectives": True}, ("--plain-step and --overlap-collectives", "give one of")),
    (
        {"disable_gradient_checkpointing": True, "activation_checkpointing": "full"},
        ("--disable-gradient-checkpointing and --activation-checkpointing full", "give one of them"),
    ),
    ({"cuda_graphs": True}, ("--cuda-graphs replays compiled segments", "there is no GPU", "leave it out")),
    ({"z_loss": 2}, ("--z-loss", "2", "1.0")),
    # Flags and folders
    ({"blok_size": 3}, ("unknown flag --blok-size", "nearest known one is --block-size")),
    ({"total": 3}, ("unknown flag --total;", "--total-steps")),
    ({"config": "{}/nowhere.yaml"}, ("--config", "No such file")),
    ({"checkpoint_dir": "{}/streaming_checkpoint_step_7"}, ("is a checkpoint of another run", "give a run's folder")),
    ({"checkpoint_dir": "{}/of_a_checkpoint/."}, ("is a checkpoint of another run", "pruned with all that is in it")),
    ({"checkpoint_dir": "{}/file"}, ("--checkpoint-dir", "file cannot be written", "give a folder")),
    ({"checkpoint_dir": "{}/file/below"}, ("file/below cannot be written", "Not a directory")),
    ({"checkpoint_dir": "{}/dangling"}, ("dangling cannot be written",)),
    ({"checkpoint_dir": "{}/file/a\nb"}, ("file/a b cannot be written",)),
    ({"checkpoint_dir": "x" * 300}, ("cannot be written (File name too long)",)),
]


@pytest.mark.parametrize(
    ("changes", "fragments"), REFUSED, ids=[" ".join(map(str, changes.items()))[:60] for changes, _ in REFUSED]
)
def test_refused(changes: dict[str, Any], fragments: tuple[str, ...], inputs: Path, tmp_path: Path) -> None:
    before = contents(inputs)
    named = placed(changes, inputs)
    (outcome,) = start(TRAINING, flags_of(base(inputs, tmp_path / "new" / "run", **named)))
    require_refusal(outcome, TRAINING, *fragments)
    assert outcome.output == ""
    assert list(tmp_path.iterdir()) == []
    assert contents(inputs) == before


@pytest.mark.parametrize(
    ("variable", "value", "fragment"),
    [
        ("RESUME_TOKENIZER_BATCH_ROWS", "0", "from 1 to 65536"),
        ("RESUME_TOKENIZER_BATCH_ROWS", "many", "from 1 to 65536"),
        ("RESUME_TOKENIZER_WORKERS", "-1", "from 1 to 256"),
        ("RESUME_TOKENIZER_WORKERS", "1.5", "from 1 to 256"),
        ("LOCAL_WORLD_SIZE", "x", "torchrun"),
        ("RANK", "0", "torchrun"),
        ("RANK", "x", "torchrun"),
    ],
)
def test_environment_refused(variable: str, value: str, fragment: str, inputs: Path, tmp_path: Path) -> None:
    (outcome,) = start(TRAINING, flags_of(base(inputs, tmp_path / "run")), environment={variable: value})
    require_refusal(outcome, TRAINING, variable, fragment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(inputs: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    (outcome,) = start(TRAINING, flags_of(base(inputs, tmp_path / "run")))
    tmp_path.chmod(0o700)
    require_refusal(outcome, TRAINING, "cannot be written (Permission denied)")


def test_what_only_looks_bad_is_accepted(inputs: Path, tmp_path: Path) -> None:
    """A row group of nulls, a name with blanks and accents, numbers that YAML takes for text."""
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nwarmup_steps: 0\n")
    folder = tmp_path / "Läufe mit 'Namen'" / "日本"
    changed = base(inputs, folder, data_glob=inputs / "some_nulls.parquet", warmup_steps=None, total_steps=1)
    changed["shuffle"] = False
    (outcome,) = start(TRAINING, [*flags_of(changed), "--config", str(tmp_path / "c.yaml")])
    assert outcome.code == 0, outcome
    assert "filtered: 10 missing" in outcome.output
    assert yaml.safe_load((folder / "run.yaml").read_text())["learning_rate"] == 1e-3
    assert list(losses(folder)) == [1]


def test_parameters_are_counted_as_transformers_does() -> None:
    """The count that a model's memory is judged by."""
    for changes in (
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 8, "head_dim": 12},
    ):
        config = ModelConfig.from_dict({**MODEL, **changes}, vocab_size=400)
        with torch.device("meta"):
            twin = LlamaForCausalLM(LlamaConfig(**config.to_dict()))
        assert config.num_parameters == sum(parameter.numel() for parameter in twin.parameters())


# ---------------------------------------------------------------------------------------------------- several ranks


@pytest.mark.parametrize(
    ("ranks", "changes", "fragments"),
    [
        (3, {}, ("--tensor-parallel-size 3: 4 attention heads cannot be cut into 3", "sizes that work: 1, 2, 4")),
        (3, {"tensor_parallel_size": 2}, ("2 does not divide the 3 ranks", "sizes that do: 1, 3")),
        (2, {"tensor_parallel_size": 1, "tokens_per_step": 96}, ("2 data-parallel ranks", "3 sequences", "1, 3")),
        # The second rank alone reads lane 1.
        (
            2,
            {"tensor_parallel_size": 1, "data_glob": "{}/half_nulls.parquet", "data_lanes": 2},
            ("lane 1 of 2 of the data holds 0 tokens", "one block needs 33", "fewer --data-lanes"),
        ),
        (2, {"data_glob": "{}/nulls.parquet"}, ("one block needs 33",)),
        (2, {"validation_glob": "{}/small.parquet"}, ("--validation-glob",)),
        (2, {"tensor_slices": 1}, ("--tensor-slices 1 cannot be shared out over 2", "a multiple of 2")),
        (2, {"blok_size": 1}, ("nearest known one is --block-size",)),
    ],
    ids=lambda value: str(value)[:50],
)
def test_all_ranks_leave_and_the_first_one_says_why(
    ranks: int, changes: dict[str, Any], fragments: tuple[str, ...], inputs: Path, tmp_path: Path
) -> None:
    named = placed(changes, inputs)
    outcomes = start(TRAINING, flags_of(base(inputs, tmp_path / "run", **named)), ranks=ranks)
    require_refusal(outcomes[0], TRAINING, *fragments)
    assert outcomes[1:] == [Outcome(2, "", "")] * (ranks - 1)
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_the_line_comes_once(inputs: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = flags_of(base(inputs, tmp_path / "run", learnin_rate=1))
    done = subprocess.run([*launcher, str(ROOT / "training.py"), *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    ours = [line for line in lines if "training.py: " in line]
    assert ours == ["training.py: usage error: unknown flag --learnin-rate; the nearest known one is --learning-rate"]
    assert "exitcode  : 2" in done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert "ChildFailedError" in done.stderr


# ------------------------------------------------------------------------------------------------- starting it again


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at its end, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    (outcome,) = start(TRAINING, flags_of(base(inputs, folder)))
    assert outcome.code == 0, outcome
    return folder


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The run as it was at step 2."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "streaming_checkpoint_step_4")
    return tmp_path / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


IDENTITY: dict[str, tuple[Any, str]] = {
    "add_document_boundary_tokens": (True, "add_document_boundary_tokens False -> True"),
    "text_column": ("body", "text_column text -> body"),
    "symbol_filter": (False, "symbol_filter True -> False"),
    "shuffle": (False, "shuffle True -> False"),
    "packing": ("best-fit", "packing concat -> best-fit"),
    "document_mask": (True, "document_mask False -> True"),
    "block_size": (16, "block_size 32 -> 16"),
    "total_steps": (6, "total_steps 4 -> 6"),
    "learning_rate": (1e-4, "learning_rate 0.0003 -> 0.0001"),
    "min_learning_rate": (1e-6, "min_learning_rate 2.9999999999999997e-05 -> 1e-06"),
    "schedule": ("wsd", "schedule cosine -> wsd"),
    "init_from": ("{}/weights", "init_from None -> "),
    "schedule_steps": (9, "schedule_steps None -> 9"),
    "optimizer": ("muon", "optimizer adamw -> muon"),
    "warmup_steps": (3, "warmup_steps 1 -> 3"),
    "weight_decay": (0.2, "weight_decay 0.1 -> 0.2"),
    "adam_beta1": (0.8, "adam_beta1 0.9 -> 0.8"),
    "adam_beta2": (0.9, "adam_beta2 0.95 -> 0.9"),
    "max_grad_norm": (2, "max_grad_norm 1.0 -> 2.0"),
    "seed": (5, "seed 1337 -> 5"),
    "precision": ("bf16", "precision fp32 -> bf16"),
    "tensor_slices": (1, "tensor_slices None -> 1"),
    "deterministic": (True, "deterministic False -> True"),
    "float8": (True, "float8 False -> True"),
    "z_loss": (1e-4, "z_loss 0.0 -> 0.0001"),
}
OTHER_RUNS: dict[str, tuple[Any, str]] = {
    **IDENTITY,
    "initial_batch_size": (4, "sequences a step 3 -> 4"),
    "gradient_accumulation_steps": (2, "sequences a step 3 -> 6"),
    "tokens_per_step": (32, "sequences a step 3 -> 1"),
    "model_config": ("{}/six_heads.json", "num_attention_heads 4 -> 6"),
}


def test_every_identity_setting_is_tried() -> None:
    assert IDENTITY.keys() == RunSettings().identity().keys()


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_run_is_not_gone_on_with_under_other_settings(name: str, inputs: Path, stopped: Path) -> None:
    value, says = OTHER_RUNS[name]
    if isinstance(value, str):
        value = value.replace("{}", str(inputs))
    # What a save in progress looks like from outside: another process may be writing it.
    (stopped / ".tmp-streaming_checkpoint_step_4-0000").mkdir()
    before = contents(stopped)
    (outcome,) = start(TRAINING, flags_of(base(inputs, stopped, **{name: value})))
    require_refusal(outcome, TRAINING, says, "where only --checkpoint-dir is given", "another --checkpoint-dir")
    told = outcome.errors.partition("other settings: ")[2].partition(". Give")[0]
    for part in told.split("; "):
        old, _, new = part.partition(" -> ")
        assert not old.endswith(f" {new}"), part
    assert contents(stopped) == before


def test_a_run_is_not_gone_on_with_on_other_data(inputs: Path, stopped: Path) -> None:
    before = contents(stopped)
    (outcome,) = start(TRAINING, flags_of(base(inputs, stopped, data_glob=inputs / "some_nulls.parquet")))
    require_refusal(outcome, TRAINING, "data 3 files with 60 rows", "1 files with 70 rows")
    assert contents(stopped) == before


@pytest.mark.parametrize(
    "changes",
    [
        {
            "checkpoint_interval": 3,
            "keep_checkpoints": 1,
            "validation_glob": "{}/some_nulls.parquet",
            "validation_interval": 1,
            "validation_chunks": 3,
            "strict_data": True,
            "trust_remote_code": True,
            "memory_limit_gib": 1000,
            "replicate_embeddings": True,
            "disable_gradient_checkpointing": True,
            "disable_compile": True,
            "plain_step": True,
            "sequence_parallel": True,
            "tensor_parallel_size": 1,
            "tokenizer_path": "{}/tokenizer/../tokenizer",
            "data_glob": "{}/good/part_0.parquet, {}/good/part_[12].parquet",
        },
        {"initial_batch_size": 1, "gradient_accumulation_steps": 3},
        {"initial_batch_size": "auto"},
        {"tokens_per_step": 96},
    ],
    ids=["everything at once", "smaller micro-batch", "auto", "tokens instead"],
)
def test_it_is_gone_on_with_under_other_quiet_settings(changes: dict[str, Any], inputs: Path, stopped: Path) -> None:
    expected = losses(stopped)
    named = placed(changes, inputs)
    (outcome,) = start(TRAINING, flags_of(base(inputs, stopped, **named)))
    assert outcome.code == 0, outcome
    assert "(step 2), exactly as it stopped" in outcome.output
    assert losses(stopped) == pytest.approx(expected, rel=1e-5)
    assert (stopped / "streaming_checkpoint_step_4").is_dir()


def test_going_on_in_the_deterministic_mode_keeps_the_micro_batch(copied: Path) -> None:
    given = {"checkpoint_path": copied, "total_steps": STEPS + 1, "deterministic": True, "initial_batch_size": "auto"}
    (outcome,) = start(RESUME, flags_of(given))
    assert outcome.code == 0, outcome
    assert "micro-batch 3 x accumulation 1 x dp 1" in outcome.output


def test_another_number_of_ranks_that_cannot_share_a_step(inputs: Path, stopped: Path) -> None:
    before = contents(stopped)
    outcomes = start(TRAINING, flags_of(base(inputs, stopped, tensor_parallel_size=1)), ranks=2)
    require_refusal(outcomes[0], TRAINING, "2 data-parallel ranks cannot share out the 3 sequences", "can: 1, 3")
    assert outcomes[1] == Outcome(2, "", "")
    assert contents(stopped) == before


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script", [TRAINING, RESUME])
def test_a_finished_run_says_so_and_stays(script: str, ranks: int, inputs: Path, copied: Path) -> None:
    before = contents(copied)
    flags = flags_of(base(inputs, copied))
    if script == RESUME:
        flags = ["--checkpoint-path", str(copied), "--keep-optimizer"]
    outcomes = start(script, flags, ranks=ranks)
    assert [outcome.code for outcome in outcomes] == [0] * ranks
    assert [outcome.errors for outcome in outcomes] == [""] * ranks
    assert outcomes[0].output.count("\n") == 1
    assert "is at the last of 4 steps: the run is finished" in outcomes[0].output
    assert [outcome.output for outcome in outcomes[1:]] == [""] * (ranks - 1)
    assert contents(copied) == before


def test_a_folder_of_unusable_checkpoints_is_not_started_over(inputs: Path, tmp_path: Path) -> None:
    for name in ("streaming_checkpoint_step_2", "streaming_checkpoint_step_9.pth"):
        folder = tmp_path / f"run{len(name)}"
        folder.mkdir()
        if name.endswith(".pth"):
            (folder / name).touch()
        else:
            (folder / name).mkdir()
        before = contents(folder)
        (outcome,) = start(TRAINING, flags_of(base(inputs, folder)))
        require_refusal(outcome, TRAINING, "none is usable")
        assert contents(folder) == before


# --------------------------------------------------------------------------------------------- settings given back


def test_settings_given_back_go_on_with_the_run(stopped: Path) -> None:
    expected, saved = losses(stopped), yaml.safe_load((stopped / "run.yaml").read_text())
    flags = ["--config", str(stopped / "run.yaml"), "--checkpoint-dir", str(stopped)]
    (outcome,) = start(TRAINING, flags)
    assert outcome.code == 0, outcome
    assert losses(stopped) == expected
    assert yaml.safe_load((stopped / "run.yaml").read_text()) == {**saved, "checkpoint_dir": str(stopped)}


def test_a_folder_by_itself_goes_on_with_its_own_settings(stopped: Path) -> None:
    expected, saved = losses(stopped), yaml.safe_load((stopped / "run.yaml").read_text())
    outcomes = start(TRAINING, ["--checkpoint-dir", str(stopped)], ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert "going on from" in outcomes[0].output
    assert losses(stopped) == pytest.approx(expected, rel=1e-5)
    assert yaml.safe_load((stopped / "run.yaml").read_text()) == {**saved, "checkpoint_dir": str(stopped)}


def test_settings_of_a_resumed_run_given_back(copied: Path, tmp_path: Path) -> None:
    flags = [
        "--checkpoint-path",
        str(copied),
        "--total-steps",
        "6",
        "--rewarmup-steps",
        "1",
        "--checkpoint-interval",
        "1",
    ]
    (outcome,) = start(RESUME, [*flags, "--gradient-accumulation-steps", "2", "--learning-rate", "1e-4"])
    assert outcome.code == 0, outcome
    assert "sequences a step 3 -> 6" in outcome.output
    saved, expected = yaml.safe_load((copied / "run.yaml").read_text()), losses(copied)
    assert (saved["total_steps"], saved["learning_rate"], saved["gradient_accumulation_steps"]) == (6, 1e-4, 2)
    shutil.rmtree(copied / "streaming_checkpoint_step_6")
    for script in (TRAINING, RESUME):
        folder = tmp_path / script
        shutil.copytree(copied, folder)
        flags = ["--config", str(folder / "run.yaml"), "--checkpoint-dir", str(folder)]
        if script == RESUME:
            flags += ["--checkpoint-path", str(folder), "--keep-optimizer"]
        (outcome,) = start(script, flags)
        assert outcome.code == 0, outcome
        assert losses(folder) == expected
        assert yaml.safe_load((folder / "run.yaml").read_text()) == {**saved, "checkpoint_dir": str(folder)}


# ----------------------------------------------------------------------------------------------------------- resuming

RESUME_REFUSED: list[tuple[list[str], tuple[str, ...]]] = [
    ([], ("--checkpoint-path is missing",)),
    (["--checkpoint-path", "{run}/none"], ("none does not exist", "give a run folder or a checkpoint")),
    (["--checkpoint-path", "{inputs}/good"], ("good holds no checkpoint", "streaming_checkpoint_step_N")),
    (["--checkpoint-path", "{inputs}/weights"], ("weights holds no checkpoint", "training.py --init-from")),
    (["--checkpoint-path", "{inputs}/file"], ("file is not a checkpoint", ".pth was expected")),
    (["--checkpoint-path", "x" * 300], ("cannot be read (File name too long)",)),
    (["--checkpoint-path", "{run}"], ("--total-steps 4 leaves nothing to do", "is at step 4", "give more")),
    (["--checkpoint-path", "{run}", "--total-steps", "3"], ("--total-steps 3 leaves nothing", "is at step 4")),
    (["--checkpoint-path", "{run}", "--total-steps", "3", "--keep-optimizer"], ("leaves nothing to do",)),
    (["{more}", "--rewarmup-steps", "5", "--keep-optimizer"], ("leave out --rewarmup-steps 5",)),
    (["{more}", "--preset", "tiny"], ("preset tiny", "an architecture of its own", "leave it out")),
    (["{more}", "--model-config", "{inputs}/six_heads.json"], ("an architecture of its own",)),
    (["{more}", "--config", "{run}/../seed.yaml"], ("seed 4", "weights of its own (seed 1337)")),
    (["{more}", "--block-size", "65"], ("--block-size 65 is above the model's context of 64",)),
    (["{more}", "--block-size", "16"], ("block_size 32 -> 16",)),
    (["{more}", "--data-glob", "{inputs}/none*"], ("--data-glob", "matches no file")),
    (["{more}", "--data-glob", "{inputs}/some_nulls.parquet"], ("data 3 files with 60 rows",)),
    (["{more}", "--tokenizer-path", "{inputs}/nothing"], ("is not a tokenizer",)),
    (["{more}", "--tokens-per-step", "33"], ("--tokens-per-step 33 is no multiple of --block-size 32",)),
    (["{more}", "--tensor-slices", "16"], ("cannot be cut into 16",)),
    (["{more}", "--checkpoint-dir", "{inputs}/file"], ("file cannot be written",)),
    (["{more}", "--checkpoint-dir", "{run}/streaming_checkpoint_step_2"], ("is a checkpoint of another run",)),
    (["{more}", "--checkpoint-dir", "{run}/streaming_checkpoint_step_2/x/y"], ("is inside a checkpoint",)),
    (["{more}", "--checkpoint-dir", "{other}"], ("holds streaming_checkpoint_step_4, which does not come from",)),
    (
        ["--checkpoint-path", "{run}/streaming_checkpoint_step_2", "--total-steps", "6"],
        ("holds streaming_checkpoint_step_4, which does not come from", "another --checkpoint-dir"),
    ),
]


@pytest.mark.parametrize(("flags", "fragments"), RESUME_REFUSED, ids=lambda value: " ".join(value)[:60])
def test_resume_refused(
    flags: list[str], fragments: tuple[str, ...], inputs: Path, finished: Path, copied: Path, tmp_path: Path
) -> None:
    (tmp_path / "seed.yaml").write_text("seed: 4")
    before, before_inputs, before_other = contents(tmp_path), contents(inputs), contents(finished)
    more = f"--checkpoint-path={copied}|--total-steps=6"
    names = {"{run}": str(copied), "{inputs}": str(inputs), "{other}": str(finished), "{more}": more}
    for name, meaning in names.items():
        flags = [flag.replace(name, meaning) for flag in flags]
    (outcome,) = start(RESUME, [part for flag in flags for part in flag.split("|")])
    require_refusal(outcome, RESUME, *fragments)
    assert (contents(tmp_path), contents(inputs), contents(finished)) == (before, before_inputs, before_other)


def test_resume_into_another_folder_and_from_an_earlier_checkpoint(copied: Path, tmp_path: Path) -> None:
    before = contents(copied)
    flags = [
        "--checkpoint-path",
        str(copied / "streaming_checkpoint_step_2"),
        "--checkpoint-dir",
        str(tmp_path / "fork"),
    ]
    (outcome,) = start(RESUME, [*flags, "--keep-optimizer"])
    assert outcome.code == 0, outcome
    assert contents(copied) == before
    assert losses(tmp_path / "fork") == {step: loss for step, loss in losses(copied).items() if step > 2}


def one_launch() -> None:
    """As if torchrun had repeated the command."""
    for module in ("run.start", "run.assembly"):
        setattr(importlib.import_module(module), "launchers", lambda: ["one launch"])  # noqa: B010


def one_launch_in(folder: Path) -> None:
    one_launch()
    os.chdir(folder)


def test_a_second_attempt_goes_on_from_a_checkpoint_of_another_name(copied: Path, tmp_path: Path) -> None:
    """The run's folder is the one the checkpoint lies in, however it is named; and nothing is reset twice."""
    directory, base = tmp_path / "moved", tmp_path / "moved" / "base"
    directory.mkdir()
    (copied / "streaming_checkpoint_step_2").rename(base)
    before = contents(base)
    flags = ["--total-steps", "6", "--rewarmup-steps", "3", "--allow-data-change", "--checkpoint-path"]
    (outcome,) = start(RESUME, [*flags, "."], prepare=partial(one_launch_in, base))
    assert outcome.code == 0, outcome
    assert "optimizer state reset" in outcome.output
    expected = losses(directory)
    assert sorted(expected) == [3, 4, 5, 6]
    shutil.rmtree(directory / "streaming_checkpoint_step_6")
    (outcome,) = start(RESUME, [*flags, str(base)], prepare=one_launch)
    assert outcome.code == 0, outcome
    assert f"resuming from {directory / 'streaming_checkpoint_step_4'}" in outcome.output
    assert "optimizer state reset" not in outcome.output
    assert "--rewarmup-steps" not in outcome.output
    assert losses(directory) == expected
    assert contents(base) == before
    run = json.loads((directory / "streaming_checkpoint_step_6" / "MANIFEST.json").read_text())["run"]
    assert run["began_at"] == 2


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "MANIFEST.json"
    content = json.loads(file.read_text())
    change(content)
    content.pop("sha256", None)
    file.write_text(json.dumps(content))


def forget_hashes(folder: Path) -> None:
    """As if it had been saved with --no-checkpoint-hash."""
    edit_manifest(folder, lambda content: [facts.pop("sha256") for facts in content["files"].values()])


def in_run(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda content: content["run"].update({name: value}))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda content: content["run"].pop(name))


def inside(section: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda content: content["run"][section].update(values))


def overwrite(name: str, at: int, count: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at : at + count] = bytes(byte ^ 0xFF for byte in data[at : at + count])
        (folder / name).write_bytes(bytes(data))

    return change


def standing_at(*cursor: int) -> list[Any]:
    """The states of a position with one corpus and one lane."""
    return [[[list(cursor), [0] * 9]]]


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda folder: (folder / "MANIFEST.json").unlink(), "has no MANIFEST.json"),
    "another manifest": (lambda folder: (folder / "MANIFEST.json").write_text("[]"), "not a checkpoint manifest"),
    "torn manifest": (lambda folder: (folder / "MANIFEST.json").write_text("{"), "MANIFEST.json is damaged"),
    "another step": (lambda folder: edit_manifest(folder, lambda content: content.update(step=3)), "is of step 3"),
    "no run": (lambda folder: edit_manifest(folder, lambda content: content.update(run={})), "run.settings is missing"),
    "short file": (lambda folder: (folder / "__0_0.distcp").write_bytes(b"x"), "has 1 bytes, its manifest says"),
    "no file": (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp cannot be read"),
    "a bit of a file": (overwrite("__0_0.distcp", 40_000, 1), "damaged: __0_0.distcp has SHA-256"),
    "bits of a file without hashes": (
        lambda folder: [damage(folder) for damage in (forget_hashes, overwrite("__0_0.distcp", 0, 64))],
        "could not be read: rank 0: a file of tensors is damaged",
    ),
    "bits of the metadata": (overwrite(".metadata", 0, 16), ".metadata is refused: it is damaged"),
    "a hash as number": (
        lambda folder: edit_manifest(folder, lambda content: content["files"][".metadata"].update(sha256=7)),
        "the SHA-256 of '.metadata' is 7",
    ),
    **{
        f"no {name}": (without(name), f"run.{name} is missing; use another checkpoint")
        for name in (
            "settings",
            "model_config",
            "schedule",
            "rng",
            "global_batch",
            "tokens_seen",
            "dp",
            "data_position",
        )
    },
    **{
        f"{name} as text": (in_run(name, "x"), f"run.{name} is 'x'; use another checkpoint")
        for name in ("settings", "model_config", "rng", "global_batch", "loss", "scaler", "data_position")
    },
    "no batch": (in_run("global_batch", 0), "run.global_batch is 0"),
    "huge batch": (in_run("global_batch", 10**15), "run.global_batch is 1000000000000000"),
    "unknown setting": (inside("settings", zork=1), "unknown key 'zork'"),
    "wrong setting": (inside("settings", seed="x"), "run.settings: seed is 'x'"),
    "wrong model": (inside("model_config", hidden_size="x"), "hidden_size is 'x'"),
    "another model": (inside("model_config", hidden_size=128), "shape (512, 64) in"),
    "wrong schedule": (inside("schedule", rewarmup_start="x"), "run.schedule.rewarmup_start is 'x'"),
    "wrong random state": (inside("rng", cpu="AAAA"), "random state is damaged"),
    "no text random state": (inside("rng", cpu=4), "random state is damaged"),
    "another position": (in_run("data_position", {}), "data position has format None"),
    "no lanes": (inside("data_position", states=[]), "data position is damaged"),
    "cursor past the end": (inside("data_position", states=standing_at(0, 999, 0, 0)), "unit 999 of 6"),
    "cursor past a document": (
        inside("data_position", states=standing_at(0, 0, 0, 99999)),
        "has no token 99999 in row 0",
    ),
    "skipped steps as text": (in_run("skipped_steps", "x"), "run.skipped_steps is 'x'"),
    "more in a row than in all": (
        lambda folder: edit_manifest(folder, lambda content: content["run"].update(skipped_steps=1, skipped_in_row=2)),
        "run.skipped_in_row is '2 of 1 skipped steps'",
    ),
    "more skipped than taken": (in_run("skipped_steps", 5), "run.skipped_in_row is '0 of 5 skipped steps'"),
    "losses as a number": (in_run("loss_window", 3), "run.loss_window is 3"),
    "a loss as text": (in_run("loss_window", [3.5, "x"]), """run.loss_window is "a list with 'x'\""""),
    "a loss that is none": (in_run("loss_window", [float("nan")]), "run.loss_window is 'a list with nan'"),
    "code as text": (in_run("code", "x"), "run.code is 'x'"),
    "version as number": (in_run("code", {"version": 5}), "run.code.version is 5"),
    "head as number": (inside("data_position", head=5), "data position is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_named_by_its_path(name: str, copied: Path) -> None:
    damage, says = DAMAGE[name]
    newest = copied / "streaming_checkpoint_step_4"
    damage(newest)
    before = contents(copied)
    flags = ["--checkpoint-path", str(newest), "--total-steps", "6", "--keep-optimizer"]
    (outcome,) = start(RESUME, flags)
    require_refusal(outcome, RESUME, says)
    assert contents(copied) == before


# ------------------------------------------------------------------------------------------------------- single files


class Malicious:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def weights(inputs: Path) -> dict[str, torch.Tensor]:
    config = ModelConfig.from_json(inputs / "model.json", vocab_size=400)
    twin = LlamaForCausalLM(LlamaConfig(**config.to_dict()))
    return {name: tensor.clone() for name, tensor in twin.state_dict().items()}


NORM = "model.norm.weight"
SINGLE_FILES: dict[str, tuple[Callable[[dict[str, torch.Tensor], Path], Any], str]] = {
    "malicious": (lambda whole, trap: {"model_state_dict": whole, "x": Malicious(trap)}, "mkdir, which could run code"),
    "bare": (lambda whole, _: whole, "has no 'model_state_dict'"),
    "a list": (lambda *_: [1], "holds a list"),
    "other shape": (lambda whole, _: {"model_state_dict": {**whole, NORM: torch.ones(7)}}, "has shape (7,) in"),
    "one less": (
        lambda whole, _: {"model_state_dict": {name: tensor for name, tensor in whole.items() if name != NORM}},
        "has no parameter 'model.norm.weight'",
    ),
    "one more": (lambda whole, _: {"model_state_dict": {**whole, "zork": torch.ones(7)}}, "'zork' with shape (7,)"),
    "no tensor": (lambda whole, _: {"model_state_dict": {**whole, NORM: "x"}}, "is a str, not a tensor"),
    "complex": (
        lambda whole, _: {"model_state_dict": {**whole, NORM: torch.ones(64, dtype=torch.complex64)}},
        "not of plain numbers",
    ),
    "sparse": (lambda whole, _: {"model_state_dict": {**whole, NORM: torch.ones(64).to_sparse()}}, "torch.sparse_coo"),
    "far ahead": (lambda whole, _: {"model_state_dict": whole, "step": 10**9}, "is at step 1000000000; give more"),
    "before the start": (lambda whole, _: {"model_state_dict": whole, "step": -3}, "at step -3"),
}


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_single_files_refused(name: str, inputs: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    make, says = SINGLE_FILES[name]
    torch.save(make(weights, tmp_path / "trap"), tmp_path / "weights.pth")
    settings = base(inputs, tmp_path / "run", checkpoint_path=tmp_path / "weights.pth")
    (outcome,) = start(RESUME, flags_of(settings))
    require_refusal(outcome, RESUME, "weights.pth", says)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pth"]


def test_single_files_that_are_none(inputs: Path, tmp_path: Path) -> None:
    for content in (b"", b"text", b"PK\x03\x04"):
        (tmp_path / "weights.pth").write_bytes(content)
        settings = base(inputs, tmp_path / "run", checkpoint_path=tmp_path / "weights.pth")
        (outcome,) = start(RESUME, flags_of(settings))
        require_refusal(outcome, RESUME, "weights.pth is damaged, or was not written by torch.save")
        assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pth"]


def test_a_single_file_has_no_optimizer_and_no_run(
    inputs: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "streaming_checkpoint_step_1.pth"
    torch.save({"model_state_dict": weights}, file)
    settings = base(inputs, tmp_path)
    (outcome,) = start(RESUME, flags_of({**settings, "checkpoint_path": file, "keep_optimizer": True}))
    require_refusal(outcome, RESUME, "holds no optimizer state", "leave the flag out")
    (outcome,) = start(RESUME, flags_of({**settings, "checkpoint_path": file, "model_config": None}))
    require_refusal(outcome, RESUME, "give the --preset or --model-config these weights belong to")
    (outcome,) = start(TRAINING, flags_of(settings))
    require_refusal(outcome, TRAINING, "resume_pretrain_tensor.py --checkpoint-path")
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]
    (outcome,) = start(RESUME, flags_of({**settings, "checkpoint_path": file}))
    assert outcome.code == 0, outcome
    assert list(losses(tmp_path)) == [2, 3, 4]


# --------------------------------------------------------------------------------------------------------- generating


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--checkpoint-path", "{}/none"], "none does not exist"),
        (["--promt", "x"], "unknown flag --promt; the nearest known one is --prompt"),
        (["--prompt", ""], "--prompt '' has no tokens"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--max-new-tokens", "few"], "'few'"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "1e-45"], "--temperature 1e-45 must be 0 or at least 0.0001"),
        (["--prompt", "d\udcff"], "--prompt 'd\\udcff' is not UTF-8 text (character 1)"),
        (["--seed", "9" * 20], "64 bits at most"),
        (["--tokenizer-path", "{}/none"], "none' does not exist"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_generate_refused(flags: list[str], fragment: str, finished: Path) -> None:
    before = contents(finished)
    placed_flags = [flag.replace("{}", str(finished)) for flag in flags]
    (outcome,) = start("generate", ["--checkpoint-path", str(finished), "--prompt", "def", *placed_flags])
    require_refusal(outcome, "generate", fragment)
    assert outcome.output == ""
    assert contents(finished) == before
