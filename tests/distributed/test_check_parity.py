"""`check_parity.py`: what it says of a right model, of a broken one, and of one it cannot compare."""

import json
import math

import pytest
import torch

import check_parity
from colonnade.errors import UsageError
from colonnade.flags import parse_parity
from colonnade.telemetry.differences import Difference, Norms, differences, relative, worst_of
from distributed.launching import MODEL, losses, make_inputs
from forked_commands import start
from run.parity import EXACT, NumericsParity, StepParity


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    made = make_inputs(folder)
    (folder / "config.json").write_text(json.dumps({**MODEL, "attention_bias": True, "num_key_value_heads": 1}))
    return [*made, "--initial-batch-size", "2", "--precision", "bf16"]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """The same run's first two steps, as one rank really takes them."""
    directory = tmp_path_factory.mktemp("run")
    (outcome,) = start("training", [*flags, "--total-steps", "2", "--checkpoint-dir", str(directory)])
    assert outcome.code == 0, outcome.errors
    return directory


def test_a_right_model_agrees(flags, trained, tmp_path):
    report = tmp_path / "parity.json"
    outcomes = start("check_parity", [*flags, "--total-steps", "2", "--steps", "2", "--json", str(report)], ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].errors
    assert outcomes[0].output.splitlines()[-1] == "parity: tp 2 x dp 1 and one rank agree in fp32 and bf16"
    told = json.loads(report.read_text())
    fp32, bf16 = told["precisions"]
    assert [each["precision"] for each in told["precisions"]] == ["fp32", "bf16"]
    # The whole side is the run that training.py takes on one rank.
    assert [step["losses"][0] for step in bf16["steps"]] == pytest.approx([*losses(trained).values()], rel=1e-6)
    for step in fp32["steps"]:
        assert 0 < step["gradient"]["value"] < 1e-5
    for step in bf16["steps"]:
        # bf16 has 8 bits: what cutting changes is rounding of the size of what the precision changes.
        assert 1e-4 < step["gradient"]["value"] <= 2 * step["rounding"]["value"] < 0.1


def test_shared_out_parameters_and_replicas_agree_with_one_rank(flags):
    given = [*flags[:-3], "1", "--precision", "fp32", "--steps", "1", "--tensor-parallel-size", "1"]
    shared = ["--data-parallel-shard", "zero3", "--data-parallel-replicate-size", "2"]
    outcomes = start("check_parity", [*given, *shared], ranks=4)
    assert [outcome.code for outcome in outcomes] == [0] * 4, outcomes[0].errors
    assert outcomes[0].output.splitlines()[-1] == "parity: tp 1 x dp 4 and one rank agree in fp32"


def test_float8_is_held_against_fp32_without_it(flags, tmp_path):
    report = tmp_path / "parity.json"
    given = [*flags, "--float8", "--steps", "2", "--json", str(report)]
    outcomes = start("check_parity", given, ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].errors
    assert outcomes[0].output.splitlines()[-1].endswith("one rank agree in fp32 and bf16 with float8")
    fp32, float8 = json.loads(report.read_text())["precisions"]
    for step in fp32["steps"]:
        assert 0 < step["gradient"]["value"] < 1e-5
    for step in float8["steps"]:
        # e4m3 has three bits of mantissa.
        assert 1e-2 < step["gradient"]["value"] <= 2 * step["rounding"]["value"] < 0.5


def test_switches_that_do_nothing_on_these_ranks_are_told(flags):
    given = [*flags[:-1], "fp32", "--steps", "1", "--data-parallel-shard", "zero2"]
    outcomes = start("check_parity", given, ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].errors
    assert "--data-parallel-shard zero2 has nothing to share out: at tp 2 x dp 1" in outcomes[0].output
    assert "tp 2 x dp 1 against one rank" in outcomes[0].output


def test_a_report_that_cannot_be_written_is_refused_before_any_step(flags, tmp_path):
    outcomes = start("check_parity", [*flags, "--json", str(tmp_path / "none" / "x.json")], ranks=2)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "cannot be a file: give one in a folder that exists" in outcomes[0].errors
    assert "against one rank" not in outcomes[0].output


def test_a_deterministic_checkpoint_agrees_to_the_bit(trained, tmp_path):
    report = tmp_path / "parity.json"
    given = [*("--checkpoint-path", str(trained), "--deterministic", "--steps", "1"), "--json", str(report)]
    outcomes = start("check_parity", given, ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].errors
    assert outcomes[0].output.splitlines()[-1].endswith("agree to the bit in fp32 and bf16")
    for precision in json.loads(report.read_text())["precisions"]:
        (step,) = precision["steps"]
        assert (step["losses"][0], step["norms"][0]) == (step["losses"][1], step["norms"][1])
        assert step["gradient"]["value"] == precision["parameters"]["value"] == 0
        assert step["losses"][0] < max(losses(trained).values())  # the checkpoint's weights, not the seed's


def no_sum_in_the_backward_pass():
    """f without its all-reduce: the loss stays right, and gradients lack the other ranks' part."""
    from colonnade.parallel import collectives
    from colonnade.parallel.pending import Pending

    def own_part_alone(ctx, *gradients):
        own = collectives.tree_sum(gradients)
        return own if ctx.in_flight is None else ctx.in_flight.hold(Pending(own), own), None, None

    collectives._FanOut.backward = staticmethod(own_part_alone)


def test_a_broken_collective_is_found(flags):
    given = [*flags[:-1], "fp32", "--steps", "1"]
    outcomes = start("check_parity", given, ranks=2, prepare=no_sum_in_the_backward_pass)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert "tp 2 x dp 1 is not the model of one rank: fp32: the gradient of model." in outcomes[0].errors
    assert "in step 1 differs by" in outcomes[0].errors
    (row,) = [line.split() for line in outcomes[0].output.splitlines() if line.startswith("   1 ")]
    assert float(row[3]) < 1e-6 < 0.1 < float(row[8])  # a right loss, a wrong gradient


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tolerance", "2"], "--tolerance is 2.0; it must be at most 1.0"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--presett", "tiny"], "unknown flag --presett; the nearest known one is --preset"),
        (["--preset", "huge"], "--preset 'huge' does not exist"),
    ],
)
def test_wrong_flags_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        parse_parity(given)


def test_one_rank_is_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="one rank has nothing to be compared with"):
        check_parity.main(["--preset", "tiny"])


def test_differences_are_relative_to_the_tensor():
    expected = {"large": torch.tensor([30.0, 40.0]), "small": torch.tensor([0.1])}
    actual = {"large": torch.tensor([30.0, 41.0]), "small": torch.tensor([0.2])}
    found = differences(actual.items(), expected)
    assert found["large"] == Norms(1.0, 50.0, 2)
    assert worst_of(found) == Difference(pytest.approx(1.0), "small")
    # 0.1 as one of three elements of norm 50 on the whole is measured as 50 / sqrt(3).
    assert worst_of(found, at_least_average=True) == Difference(pytest.approx(1 / 50), "large")
    actual["large"][0] = math.nan
    assert worst_of(differences(actual.items(), expected)).name == "large"
    assert differences([("new", torch.ones(1))], {})["new"].difference == math.inf
    assert differences(actual.items(), None) == {}
    assert (relative(0.0, 0.0), relative(0.0, 1.0), relative(4.0, 5.0)) == (0.0, math.inf, 0.25)


def step(loss=1.0, norm=1.0, gradient=0.0, rounding=None, skipped=(False, False)):
    worst = None if all(skipped) else Difference(gradient, "w")
    return StepParity(1, (1.0, loss), (1.0, norm), skipped, worst, rounding)


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ([step()], None),
        ([step(gradient=0.2)], "the gradient of w in step 1 differs by 2.0e-01, above 1.0e-01"),
        ([step(norm=1.2)], "the gradient norm in step 1 differs"),
        ([step(loss=0.8)], "the loss in step 1 differs"),
        ([step(loss=math.nan)], "the loss in step 1 differs by nan"),
        ([step(gradient=0.2, rounding=Difference(3.0, "w"))], None),
        ([step(gradient=0.2, rounding=Difference(1.0, "w"))], "above 1.0e-01"),
        ([step(skipped=(False, True))], "step 1 is skipped cut alone"),
        ([step(skipped=(True, True)), step()], None),
    ],
)
def test_what_is_above_the_tolerance_is_named(steps, problem):
    parity = NumericsParity(EXACT, 0.1, steps, parameters=Difference(0.0, "w"))
    found = parity.problem()
    assert found is None if problem is None else problem in str(found)


def test_parameters_count_and_steps_that_were_all_skipped_are_no_parity():
    assert "w after the last step differs" in str(NumericsParity(EXACT, 0.1, [step()], Difference(0.2, "w")).problem())
    assert "no step was taken" in str(NumericsParity(EXACT, 0.1, [step(skipped=(True, True))]).problem())
