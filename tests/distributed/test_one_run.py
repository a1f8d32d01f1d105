"""Stopped, killed, and gone on with at another number of ranks, it is one run."""

import json
import shutil
import time

import psutil
import pytest

from colonnade.optim.schedule import Schedule
from distributed.launching import finish, kill_after, losses, make_inputs, position, run, start
from forked_commands import PATIENCE

STEPS = 24


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return [
        *make_inputs(tmp_path_factory.mktemp("inputs")),
        *("--total-steps", str(STEPS), "--checkpoint-interval", "6"),
        *("--initial-batch-size", "8", "--gradient-accumulation-steps", "4"),
    ]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """The whole run at tp 2."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    run("training.py", [*flags, "--checkpoint-dir", str(directory)], ranks=2)
    return directory


@pytest.fixture(scope="module")
def killed(flags, tmp_path_factory):
    """The same run at tp 2, all its processes killed after step 8: between two checkpoints."""
    directory = tmp_path_factory.mktemp("killed")
    kill_after(8, flags, directory)
    done = losses(directory)
    assert 8 <= max(done) < STEPS, f"the run was to be killed in its middle, not after step {max(done)}"
    return directory


@pytest.mark.parametrize(
    ("ranks", "parallel", "says"),
    [(1, [], "tp 1 x dp 1"), (2, ["--tensor-parallel-size", "1"], "tp 1 x dp 2")],
    ids=["tp 1", "dp 2"],
)
def test_killed_and_gone_on_elsewhere_it_is_the_same_run(flags, uninterrupted, killed, tmp_path, ranks, parallel, says):
    directory = tmp_path / "run"
    shutil.copytree(killed, directory)
    output = run("training.py", [*flags, *parallel, "--checkpoint-dir", str(directory)], ranks=ranks)
    assert "going on from" in output
    assert says in output

    expected, actual = losses(uninterrupted), losses(directory)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert actual.keys() == expected.keys()
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-5), f"step {step}"
    assert expected[STEPS] < expected[1]
    # Equal positions after each checkpoint, in a stream that is a pure function of them: the same chunks in one order.
    for step in range(6, STEPS + 1, 6):
        assert position(directory, step) == position(uninterrupted, step), f"step {step}"


def test_each_script_goes_on_from_the_other(flags, uninterrupted, tmp_path):
    """resume_pretrain_tensor.py --keep-optimizer is exact as well, and training.py takes its checkpoints back."""
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    for step in (18, 24):
        shutil.rmtree(directory / f"streaming_checkpoint_step_{step}")
    output = run("resume_pretrain_tensor.py", ["--checkpoint-path", str(directory), "--keep-optimizer"])
    assert "tp 2 -> 1" in output
    shutil.rmtree(directory / "streaming_checkpoint_step_24")
    keep = ["--keep-checkpoints", "1", "--keep-every", "12"]
    output = run("training.py", [*flags, "--checkpoint-dir", str(directory), *keep])
    assert "step 18" in output
    # The newest that is no milestone, and the milestones.
    assert {path.name.rpartition("_")[2] for path in directory.glob("streaming_*")} == {"12", "18", "24"}
    expected, actual = losses(uninterrupted), losses(directory)
    assert {step: pytest.approx(loss, rel=1e-5) for step, loss in expected.items()} == actual


def test_resuming_by_default_resets_the_optimizer_and_warms_up_again(uninterrupted, tmp_path):
    directory = tmp_path / "run"
    flags = ["--checkpoint-path", str(uninterrupted), "--checkpoint-dir", str(directory)]
    output = run("resume_pretrain_tensor.py", [*flags, "--total-steps", str(STEPS + 4), "--rewarmup-steps", "4"])
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert rows.pop(0)["started"]
    assert [row["step"] for row in rows] == [STEPS + 1, STEPS + 2, STEPS + 3, STEPS + 4]
    rates = [row["learning_rate"] for row in rows]
    own = Schedule(peak=1e-3, minimum=1e-4, warmup_steps=2, horizon=STEPS + 4)
    assert rates == pytest.approx([own(STEPS + since) * (since + 1) / 4 for since in range(4)])
    assert "optimizer state reset; learning rate warmed up again over 4 steps" in output
    manifest = json.loads((directory / f"streaming_checkpoint_step_{STEPS + 4}" / "MANIFEST.json").read_text())
    assert manifest["run"]["schedule"]["rewarmup_start"] == STEPS
    assert manifest["run"]["tokens_seen"] == (STEPS + 4) * 32 * 64


def test_a_rank_that_dies_takes_the_run_down_promptly(flags, tmp_path):
    """Nobody waits for a dead rank, and what is on disk serves the next start."""
    directory = tmp_path / "run"
    process = start("training.py", [*flags, "--checkpoint-dir", str(directory), "--total-steps", "4000"], ranks=2)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not (directory / "streaming_checkpoint_step_6" / "MANIFEST.json").exists():
        time.sleep(0.02)
    ranks = [child for child in psutil.Process(process.pid).children() if "training.py" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    begin = time.monotonic()
    finish(process, code=1, timeout=60)
    assert time.monotonic() - begin < 45
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    flags = ["--checkpoint-path", str(directory), "--prompt", "def", "--max-new-tokens", "3"]
    assert run("generate.py", flags).startswith("def")
