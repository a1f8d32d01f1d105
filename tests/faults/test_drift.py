"""Before a save, and on the way: parameters are finite, and the ranks that hold copies of one hold the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import colonnade.telemetry.fingerprint as fingerprint
import forked_commands
from colonnade.errors import RunError
from colonnade.telemetry.fingerprint import require_equal_parameters
from distributed.launching import make_inputs
from distributed.pool import RankPool
from distributed.test_parity import CONFIG
from distributed.workers import build
from faults.test_skipped_steps import poisoned, rows_of, steps_of
from forked_commands import Outcome

NORM, CUT = "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *make_inputs(tmp_path_factory.mktemp("inputs")),
        *("--total-steps", "8", "--checkpoint-interval", "4", "--initial-batch-size", "2"),
    ]


def spoiled(flags: list[str], directory: Path, tensor: str, step: int, add: str, rank: int = 1) -> list[Outcome]:
    """A run on two ranks, `add` added to an element of a rank's part of `tensor` after the update of `step`."""
    poison = {"poison_kind": "parameter", "poison_tensor": tensor, "poison_add": add, "poison_rank": rank}
    return poisoned(flags, directory, ranks=2, poison_steps=step, **poison)


def require_line(outcomes: list[Outcome], says: str) -> None:
    assert [outcome.code for outcome in outcomes] == [1, 1], outcomes
    (line,) = (line for line in outcomes[0].errors.splitlines() if "error" in line)
    assert says in line
    assert outcomes[1].errors == ""


@pytest.mark.parametrize(
    ("tensor", "tensor_parallel_size"), [(NORM, 2), (CUT, 1)], ids=["a norm at tp 2", "a matrix at dp 2"]
)
def test_a_copy_that_drifted_by_1e_7_stops_the_run_before_the_save(
    flags: list[str], tmp_path: Path, tensor: str, tensor_parallel_size: int
) -> None:
    """Drifted after step 6; the checkpoint of step 4 stays the last."""
    these = [*flags, "--tensor-parallel-size", str(tensor_parallel_size)]
    outcomes = spoiled(these, tmp_path / "run", tensor, step=6, add="1e-7")
    require_line(
        outcomes, f"ranks hold different copies of {tensor} after step 8: ranks 0 and 1 differ, and no majority"
    )
    assert steps_of(tmp_path / "run") == [4]
    assert max(rows_of(tmp_path / "run")) == 8


@pytest.mark.parametrize(
    "deterministic", [[], ["--deterministic", "--fingerprint-interval", "0"]], ids=["", "to the bit"]
)
def test_a_drift_check_interval_finds_it_earlier(flags: list[str], tmp_path: Path, deterministic: list[str]) -> None:
    these = [*flags, *deterministic, "--drift-check-interval", "3"]
    require_line(
        spoiled(these, tmp_path / "run", NORM, step=5, add="1e-7"),
        f"ranks hold different copies of {NORM} after step 6: ranks 0 and 1 differ",
    )
    assert max(rows_of(tmp_path / "run")) == 6


def test_what_no_other_rank_holds_is_nobodys_copy(flags: list[str], tmp_path: Path) -> None:
    outcomes = spoiled([*flags, "--drift-check-interval", "1"], tmp_path / "run", CUT, step=5, add="1e-7")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert steps_of(tmp_path / "run") == [4, 8]


@pytest.mark.parametrize(("tensor", "value"), [(CUT, "nan"), (NORM, "inf")])
def test_parameters_that_are_not_finite_are_not_saved(
    flags: list[str], tmp_path: Path, tensor: str, value: str
) -> None:
    """Spoiled by the update that is saved next: no loss has seen it."""
    outcomes = spoiled(flags, tmp_path / "run", tensor, step=8, add=value)
    require_line(outcomes, f"rank 1: {tensor} is not finite after step 8; nothing was saved, and the last checkpoint")
    assert steps_of(tmp_path / "run") == [4]
    loss = json.loads((tmp_path / "run" / "streaming_checkpoint_step_4" / "MANIFEST.json").read_text())["run"]["loss"]
    assert loss == rows_of(tmp_path / "run")[4]["loss"]


def compared(tp: int, changed: str, rank: int) -> tuple[str | None, list[str]]:
    """What ranks are told after a change of `changed` on one of them, and the names of what was hashed."""
    _, model = build(CONFIG, tp)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hashed: list[str] = []
    local_sums = fingerprint._local_sums

    def counting(tensor: Any) -> torch.Tensor:
        hashed.append(names[id(tensor)])
        return local_sums(tensor)

    fingerprint._local_sums = counting
    try:
        require_equal_parameters(model, 3)
        hashed.clear()
        if torch.distributed.get_rank() == rank:
            model.get_parameter(changed).to_local().detach().view(-1)[0] += 1e-7
        require_equal_parameters(model, 4)
    except RunError as error:
        return str(error).partition(";")[0], hashed
    finally:
        fingerprint._local_sums = local_sums
    return None, hashed


def test_only_what_has_copies_is_compared(rank_pool: RankPool) -> None:
    _, hashed = rank_pool.run(1, compared, 1, NORM, 0)[0]
    assert hashed == []
    told = rank_pool.run(4, compared, 4, NORM, 2)
    for line, hashed in told:
        assert line == f"ranks hold different copies of {NORM} after step 4: rank 2 differs from the 3 others"
        assert NORM in hashed
        assert CUT not in hashed
    both = f"ranks hold different copies of {CUT} after step 4: ranks 1 and 3 differ, and no majority tells"
    for line, hashed in rank_pool.run(4, compared, 2, CUT, 3):
        assert str(line).startswith(both)
        assert NORM in hashed
    for line, hashed in rank_pool.run(4, compared, 2, NORM, 3):
        assert line == f"ranks hold different copies of {NORM} after step 4: rank 3 differs from the 3 others"
        assert CUT in hashed


def test_a_good_run_is_compared_and_goes_on(flags: list[str], tmp_path: Path) -> None:
    """Each step, at dp 2: where the library's sums are the same on all ranks, copies stay equal."""
    these = [*flags, "--drift-check-interval", "1", "--tensor-parallel-size", "1"]
    outcomes = forked_commands.start("training", [*these, "--checkpoint-dir", str(tmp_path / "run")], ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert steps_of(tmp_path / "run") == [4, 8]
