"""Memory that runs out on one rank in the middle of a step, and the autotuner inside real runs."""

import json
import shutil

import pytest

import forked_commands
from distributed.launching import losses, make_inputs, run
from faults import inject
from faults.runs import restarting


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return [
        *make_inputs(tmp_path_factory.mktemp("inputs")),
        *("--total-steps", "8", "--checkpoint-interval", "2", "--initial-batch-size", "4"),
    ]


def test_out_of_memory_on_one_rank_ends_all_and_the_same_command_goes_on(flags, tmp_path):
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory)]
    outcomes = forked_commands.start("training", these, ranks=2, prepare=inject.rank_1_runs_out_of_memory)
    assert [outcome.code for outcome in outcomes] == [1, 1], outcomes  # rank 0 did not wait for its peer
    output = "".join(outcome.output + outcome.errors for outcome in outcomes)
    said = [line for line in output.splitlines() if "out of memory" in line]
    assert len(said) == 1
    assert "rank 1: out of memory in step 4 with micro-batch size 4; 2 is recorded in" in said[0]
    assert "Tried to allocate" not in output

    outcomes = forked_commands.start("training", these, ranks=2, prepare=inject.rank_1_runs_out_of_memory)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    output = outcomes[0].output
    assert "going on from" in output
    assert "(step 2)" in output
    assert "micro-batch 2 x accumulation 2 x dp 1" in output
    undisturbed = tmp_path / "undisturbed"
    run("training.py", [*flags, "--checkpoint-dir", str(undisturbed)])
    expected = losses(undisturbed)
    assert len(expected) == 8
    assert losses(directory) == {step: pytest.approx(loss, rel=1e-5) for step, loss in expected.items()}


@pytest.mark.slow
def test_max_restarts_of_torchrun_goes_on_by_itself(flags, tmp_path):
    """The restarted ranks find the smaller size and the last checkpoint."""
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory)]
    output = restarting("training", "rank_1_runs_out_of_memory", these, tmp_path)
    assert "micro-batch 4 x accumulation 1" in output
    assert "micro-batch 2 x accumulation 2" in output
    assert sorted(losses(directory)) == list(range(1, 9))


def test_auto_finds_a_micro_batch_once_and_uses_it_again(flags, tmp_path):
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory), "--initial-batch-size", "auto", "--tokens-per-step", "1024"]
    these[these.index("8")] = "2"
    output = run("training.py", these, ranks=2)
    assert "tuned in" in output
    assert "16 sequences of 64 tokens a step" in output
    record = json.loads((directory / "micro_batch.json").read_text())
    assert "trials" in json.dumps(record)
    shutil.rmtree(directory / "streaming_checkpoint_step_2")  # with it the run would be finished
    again = run("training.py", these, ranks=2)
    assert "tuned in" not in again
    line = next(line for line in output.splitlines() if "micro-batch" in line).split(";")[0]
    assert line in again


def test_a_memory_limit_lowers_a_given_batch_and_keeps_the_global_one(flags, tmp_path):
    """On the CPU the limit is held against measured memory a sequence."""
    import psutil

    flags = [*flags, "--total-steps", "1", "--initial-batch-size", "64"]
    free = run("training.py", [*flags, "--checkpoint-dir", str(tmp_path / "free")])
    assert "micro-batch 64 x accumulation 1" in free
    rows = (tmp_path / "free" / "metrics.jsonl").read_text().splitlines()[1:]  # the first is the start
    used = json.loads(rows[0])["memory_gib"]
    assert used < psutil.virtual_memory().total / 2**30
    # A little above what the process holds before any batch: torch and this model, measured by a run of the smallest.
    small = run("training.py", [*flags[:-1], "1", "--checkpoint-dir", str(tmp_path / "small")])
    assert "micro-batch 1 x" in small
    base = json.loads((tmp_path / "small" / "metrics.jsonl").read_text().splitlines()[1])["memory_gib"]
    limit = base + 0.02
    limited = run(
        "training.py", [*flags, "--checkpoint-dir", str(tmp_path / "limited"), "--memory-limit-gib", str(limit)]
    )
    line = next(line for line in limited.splitlines() if "micro-batch" in line)
    assert line.startswith("64 sequences")
    assert "micro-batch 64 " not in line
