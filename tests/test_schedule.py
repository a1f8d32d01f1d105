"""Learning-rate schedules against transformers' own, where conventions agree, else against hand computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import get_constant_schedule, get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from colonnade.config import check_contradictions, complete_settings, override
from colonnade.errors import UsageError
from colonnade.optim.schedule import schedule_of
from colonnade.run_settings import RunSettings

PEAK, MINIMUM, WARMUP, HORIZON = 0.5, 0.125, 10, 100


def settings(**changes: Any) -> RunSettings:
    common = {"learning_rate": PEAK, "warmup_steps": WARMUP, "total_steps": HORIZON}
    return RunSettings(**{**common, "min_learning_rate": MINIMUM, **changes})


def rates_of(make: Any, steps: int, **arguments: Any) -> list[float]:
    """The rates of a schedule of transformers over an optimizer."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer, **arguments)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_cosine_is_that_of_transformers_after_the_warm_up() -> None:
    expected = rates_of(
        get_cosine_with_min_lr_schedule_with_warmup,
        HORIZON + 1,
        num_warmup_steps=WARMUP,
        num_training_steps=HORIZON,
        min_lr=MINIMUM,
    )
    schedule = schedule_of(settings())
    assert [schedule(step) for step in range(WARMUP, HORIZON + 1)] == pytest.approx(expected[WARMUP:])
    # transformers begins at 0, which is a step for nothing.
    assert [schedule(step) for step in range(WARMUP)] == pytest.approx(
        [PEAK * (step + 1) / WARMUP for step in range(WARMUP)]
    )
    assert schedule(10 * HORIZON) == MINIMUM


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_wsd_is_that_of_transformers_after_the_warm_up(shape: str) -> None:
    expected = rates_of(
        get_wsd_schedule,
        HORIZON + 5,
        num_warmup_steps=WARMUP,
        num_decay_steps=30,
        num_training_steps=HORIZON,
        decay_type=shape,
        min_lr_ratio=MINIMUM / PEAK,
    )
    schedule = schedule_of(settings(schedule="wsd", decay_steps=30, decay_shape=shape))
    assert [schedule(step) for step in range(WARMUP, HORIZON + 5)] == pytest.approx(expected[WARMUP:])


def test_constant_is_that_of_transformers_after_the_warm_up() -> None:
    schedule = schedule_of(settings(schedule="constant", min_learning_rate=None))
    expected = rates_of(get_constant_schedule, 3)
    assert [schedule(step) for step in (WARMUP, HORIZON, 10 * HORIZON)] == expected
    assert schedule(4) == PEAK / 2


def test_wsd_decays_over_a_tenth_unless_told_otherwise() -> None:
    schedule = schedule_of(settings(schedule="wsd", total_steps=400))
    assert schedule(360) == PEAK > schedule(361)
    # A quarter of the way down: 1 - sqrt(1/4) of the difference is left.
    assert schedule(370) == pytest.approx(MINIMUM + (PEAK - MINIMUM) / 2)
    # A warm-up that leaves less leaves what it can.
    short = schedule_of(settings(schedule="wsd", total_steps=12, warmup_steps=12))
    assert [short(11), short(12)] == [PEAK, MINIMUM]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_a_horizon_of_its_own_is_that_of_a_longer_run(kind: str) -> None:
    longer = schedule_of(settings(schedule=kind, total_steps=1000))
    shorter = schedule_of(settings(schedule=kind, total_steps=50, schedule_steps=1000))
    assert [shorter(step) for step in range(1100)] == [longer(step) for step in range(1100)]


def test_wsd_before_its_decay_knows_no_horizon() -> None:
    """So a run may be ended from any of its checkpoints."""
    long, short = (schedule_of(settings(schedule="wsd", total_steps=steps, decay_steps=20)) for steps in (1000, 80))
    assert [long(step) for step in range(60)] == [short(step) for step in range(60)]
    assert long(79) == PEAK > short(79)


@pytest.mark.parametrize(
    "changes",
    [{}, {"schedule": "wsd", "decay_steps": 50}, {"schedule": "constant", "min_learning_rate": None}],
    ids=["cosine", "wsd", "constant"],
)
def test_a_second_warm_up_ends_where_the_schedule_stands(changes: dict[str, Any]) -> None:
    own = schedule_of(settings(**changes))
    again = schedule_of(settings(**changes), rewarmup_start=40, rewarmup_steps=20)
    for step in range(HORIZON):
        part = (step - 39) / 20 if 40 <= step < 60 else 1.0
        assert math.isclose(again(step), own(step) * part, rel_tol=1e-15), step


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"decay_steps": 5},
            "--decay-steps 5 says nothing with --schedule cosine: leave it out, or give --schedule wsd",
        ),
        ({"decay_shape": "linear"}, "--decay-shape linear says nothing with --schedule cosine"),
        ({"schedule": "constant", "schedule_steps": 5}, "--schedule-steps 5 says nothing with --schedule constant: .*"),
        ({"schedule": "constant", "min_learning_rate": 1e-5}, "--min-learning-rate 1e-05 says nothing with"),
        ({"muon_momentum": 0.9}, "--muon-momentum 0.9 says nothing with --optimizer adamw: .* --optimizer muon"),
        (
            {"schedule_steps": 6, "warmup_steps": 6},
            "--schedule-steps 6 ends within --warmup-steps 6, .*: raise the first or lower the second",
        ),
        (
            {"schedule": "wsd", "decay_steps": 91, "total_steps": 100, "warmup_steps": 10},
            "--decay-steps 91 and --warmup-steps 10 are more than the 100 steps of the schedule: lower one of them",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        complete_settings(changes)


def test_another_schedule_leaves_the_settings_of_the_old_one_behind() -> None:
    own = RunSettings(schedule="wsd", decay_steps=50, min_learning_rate=1e-5, optimizer="muon", muon_momentum=0.9)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"schedule": "cosine"}, {"min_learning_rate": 1e-5, "decay_steps": None, "muon_momentum": 0.9}),
        ({"schedule": "constant"}, {"min_learning_rate": None, "decay_steps": None, "muon_momentum": 0.9}),
        ({"optimizer": "adamw"}, {"min_learning_rate": 1e-5, "decay_steps": 50, "muon_momentum": 0.95}),
    ]
    for given, left in cases:
        changed = check_contradictions(RunSettings(**override(own.to_dict(), given)))
        assert {name: getattr(changed, name) for name in left} == left


def test_what_says_nothing_is_no_part_of_what_a_run_is() -> None:
    assert RunSettings().identity().keys() & {"decay_steps", "decay_shape", "muon_momentum"} == set()
    wsd = RunSettings(schedule="wsd", optimizer="muon").identity()
    assert wsd.keys() - RunSettings().identity().keys() == {"decay_steps", "decay_shape", "muon_momentum"}
    constant = RunSettings(schedule="constant").identity()
    assert RunSettings().identity().keys() - constant.keys() == {"min_learning_rate", "schedule_steps"}
