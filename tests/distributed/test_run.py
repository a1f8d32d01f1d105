"""One run as its user sees it: metrics, validation, precision, checkpoints, and how commands end."""

import gzip
import json
import math

import pytest
import torch
import yaml

import forked_commands
from data_processing import load_tokenizer, streaming_token_generator
from dense_reference import dense_loss
from distributed.launching import MODEL, losses, make_inputs, run
from model import ModelConfig

ROW_KEYS = {
    *("step", "loss", "perplexity", "learning_rate", "grad_norm", "tokens_seen", "tokens_per_second"),
    *("model_flops_utilization", "memory_gib", "data_wait_fraction", "epoch"),
    "time",
    *("data_tokens_read", "data_tokens_repeated", "data_rows_read", "data_rows_filtered", "skipped_steps"),
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return [*make_inputs(tmp_path_factory.mktemp("inputs")), "--initial-batch-size", "4"]


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def flag(flags, name):
    return flags[flags.index(name) + 1]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """Twelve steps at dp 2, validated in the middle and at the end, three checkpoints of which two are kept."""
    directory = tmp_path_factory.mktemp("run")
    output = run(
        "training.py",
        [
            *(*flags, "--checkpoint-dir", str(directory), "--total-steps", "12", "--tensor-parallel-size", "1"),
            *("--validation-glob", flag(flags, "--data-glob"), "--validation-interval", "6"),
            *("--validation-chunks", "10", "--checkpoint-interval", "4", "--keep-checkpoints", "2"),
            *("--profile-start", "11", "--profile-steps", "5"),
        ],
        ranks=2,
        draws=True,
    )
    return directory, output


def test_metrics_rows_have_their_keys(finished):
    directory, _ = finished
    rows = rows_of(directory)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 13))
    for row in training:
        assert row.keys() == ROW_KEYS
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["tokens_seen"] == row["step"] * 2 * 4 * 64
        assert row["tokens_per_second"] > 0
        assert 0 <= row["data_wait_fraction"] <= 1
        assert row["data_tokens_read"] == row["tokens_seen"]
    assert [row["step"] for row in rows if "validation_loss" in row] == [6, 12]


def test_validation_loss_is_the_dense_models(flags, finished):
    directory, _ = finished
    tokenizer = load_tokenizer(flag(flags, "--tokenizer-path"))
    with streaming_token_generator(flag(flags, "--data-glob"), tokenizer, block_size=64, lanes=1) as stream:
        blocks = torch.stack([torch.from_numpy(next(stream).tokens).long() for _ in range(10)])
    weights = load_weights(directory / "streaming_checkpoint_step_12")
    config = ModelConfig.from_dict(MODEL, vocab_size=len(tokenizer))
    weights = {
        name: value[: config.vocab_size] if "embed" in name or "lm_head" in name else value
        for name, value in weights.items()
    }
    loss = dense_loss(weights, config.to_dict(), blocks[:, :-1], blocks[:, 1:]) / blocks[:, 1:].numel()
    row = rows_of(directory)[-1]
    assert row["validation_loss"] == pytest.approx(float(loss), rel=1e-6)


def load_weights(checkpoint):
    """The model's tensors of a checkpoint, through torch's own converter to one file."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    single = checkpoint.parent.parent / f"{checkpoint.name}-whole.pt"
    dcp_to_torch_save(checkpoint, single)
    content = torch.load(single, weights_only=True)
    return {name.removeprefix("model."): value for name, value in content.items() if name.startswith("model.")}


def test_the_run_leaves_what_it_says(finished):
    directory, output = finished
    kept = sorted(path.name for path in directory.iterdir() if path.name.startswith("streaming"))
    assert kept == ["streaming_checkpoint_step_12", "streaming_checkpoint_step_8"]
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == [".launch.json"]
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "knowing the token frequencies alone" in output
    assert str(directory / "streaming_checkpoint_step_12") in output
    assert yaml.safe_load((directory / "run.yaml").read_text())["total_steps"] == 12
    manifest = json.loads((directory / "streaming_checkpoint_step_12" / "MANIFEST.json").read_text())
    assert manifest["run"]["tokenizer_backend"].split()[0] in ("hf", "fastokens")
    assert f"tokenizer backend: {manifest['run']['tokenizer_backend']}" in output


def test_profiled_steps_are_recorded_by_every_rank(finished):
    """Two of the five steps asked for: the run ends with step 12."""
    directory, output = finished
    assert f"profile: {directory / 'profile' / 'steps_11-12_rank_0.txt'} and .json.gz" in output
    for rank in range(2):
        with gzip.open(directory / "profile" / f"steps_11-12_rank_{rank}.json.gz") as file:
            events = json.load(file)["traceEvents"]
        labels = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert [label for label in labels if label.startswith("step ")] == ["step 11", "step 12"]
        assert sum(event["name"] == "Optimizer.step#AdamW.step" for event in events) == 2
        assert "aten::mm" in (directory / "profile" / f"steps_11-12_rank_{rank}.txt").read_text()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_learn_like_fp32(flags, tmp_path, precision):
    these = [*flags, "--total-steps", "8", "--tensor-parallel-size", "2"]
    run("training.py", [*these, "--precision", precision, "--checkpoint-dir", str(tmp_path / precision)], ranks=2)
    otherwise = ["--checkpoint-mode", "sync", "--no-checkpoint-hash"]
    run("training.py", [*these, *otherwise, "--checkpoint-dir", str(tmp_path / "fp32")], ranks=2)
    expected, actual = losses(tmp_path / "fp32"), losses(tmp_path / precision)
    assert expected[8] < expected[1]
    assert actual == {step: pytest.approx(loss, rel=5e-3) for step, loss in expected.items()}
    plain = json.loads((tmp_path / "fp32" / "streaming_checkpoint_step_8" / "MANIFEST.json").read_text())
    assert {key for facts in plain["files"].values() for key in facts} == {"bytes"}
    manifest = json.loads((tmp_path / precision / "streaming_checkpoint_step_8" / "MANIFEST.json").read_text())
    assert all(facts.keys() == {"bytes", "sha256"} for facts in manifest["files"].values())
    scaler = manifest["run"]["scaler"]
    assert (scaler is not None and scaler["scale"] > 0) == (precision == "fp16")


@pytest.mark.parametrize("launches", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_every_launch_ends_with_code_0_and_silence(flags, tmp_path, launches):
    for number in range(launches):
        directory = tmp_path / str(number)
        these = [*flags, "--total-steps", "1", "--checkpoint-dir", str(directory)]
        outcomes = forked_commands.start("training", these, ranks=1 + number % 2)
        assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes
        for outcome in outcomes:
            assert "terminate called" not in outcome.errors
            assert "Traceback" not in outcome.errors
        assert "finished at step 1" in outcomes[0].output
