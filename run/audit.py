"""Retraining steps of a deterministic run and comparing them with the bits it recorded (`audit_run.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colonnade.checkpoint.manifest import read_manifest
from colonnade.errors import RunError, UsageError
from colonnade.runtime.vote import on_first_rank
from colonnade.telemetry.fingerprint import FINGERPRINT_KEYS, Fingerprint, combined, fingerprint_of, float32_bits
from colonnade.telemetry.metrics import read_metrics
from colonnade.telemetry.report import METRICS_NAME
from run.state import Run
from training_utils import FINGERPRINTS_NAME, train_step

COMPARED = ("loss_bits", "grad_norm_bits", "fingerprint", "moments_fingerprint")


@dataclass(frozen=True)
class Recorded:
    """What a run recorded about a range of steps.

    Attributes:
        rows: the rows of `metrics.jsonl`, by step.
        tensors: by step, the fingerprint of each parameter and moment by name; includes the step before the range.
    """

    rows: dict[int, dict[str, Any]]
    tensors: dict[int, dict[str, str]]


# ------------------------------------------------------------------------------------------------ recorded values


def _logged_rows(directory: Path) -> dict[int, dict[str, Any]]:
    path = directory / METRICS_NAME
    if not path.exists():
        raise UsageError(f"--run {directory} holds no {METRICS_NAME}; give a run's folder")
    rows = {row["step"]: row for row in read_metrics(path) if "loss_bits" in row and type(row.get("step")) is int}
    if not rows:
        raise UsageError(f"--run {directory} records no bits to compare with: it was not trained with --deterministic")
    return rows


def last_step(directory: Path, first: int, last: int | None) -> int:
    """The step to audit up to: the first logged one at or after `last`, since only logged steps can be compared.

    Args:
        directory: the run's folder.
        first: the step after which the audit begins (--from-step).
        last: --to-step; None for the last logged step.

    Raises:
        UsageError: there is no log with recorded bits, or it does not reach the requested steps.
    """
    rows = _logged_rows(directory)
    known = f"the last step on record in {directory} is {max(rows)}"
    if first >= max(rows):
        raise UsageError(f"--from-step {first} leaves nothing to audit: {known}; give a step before it")
    if last is None:
        return max(rows)
    if last > max(rows):
        raise UsageError(f"--to-step {last}: {known}; give at most that")
    return min(step for step in rows if step >= last)


def read_recorded(directory: Path, begin: int, end: int) -> Recorded:
    """Read what the run recorded about the steps after `begin` up to `end`.

    Raises:
        UsageError: a row that the run logged is missing or damaged, or the two logs contradict each other.
    """
    rows = {step: row for step, row in sorted(_logged_rows(directory).items()) if begin < step <= end}
    previous = begin
    for step, row in rows.items():
        before = row.get("logged_after")
        if before != previous:
            missing = f"the row of step {before} is missing" if type(before) is int and before > previous else "damaged"
            raise UsageError(
                f"{directory / METRICS_NAME}: {missing} between steps {previous} and {step}; audit what is before or "
                "after it"
            )
        previous = step
    path = directory / FINGERPRINTS_NAME
    told: dict[Any, dict[str, Any]] = {}
    if path.exists():
        told = {row.get("step"): row for row in read_metrics(path)}
    for step, row in told.items():
        if step in rows and any(rows[step].get(key) != row.get(key) for key in COMPARED if key in row):
            raise UsageError(
                f"{directory / METRICS_NAME} and {path.name} do not record the same fingerprints at step {step}; audit "
                "what is before or after it"
            )
    wanted = {begin, *rows}
    return Recorded(
        rows,
        {step: {**row.get("tensors", {}), **row.get("moments", {})} for step, row in told.items() if step in wanted},
    )


# ------------------------------------------------------------------------------------------------------- comparing


def check_start(run: Run, recorded: Recorded) -> None:
    """Compare the restored tensors with the fingerprints in their manifest, otherwise in the log. Collective.

    Raises:
        RunError: they differ (the message names the first such tensor if the log has its fingerprint), or ranks hold
            different copies of a tensor.
    """
    checkpoint = run.resumed_from
    if checkpoint is None:
        return
    manifest = on_first_rank(lambda: read_manifest(checkpoint)).run
    found = fingerprint_of(run.model, run.optimizer)
    found.require_equal_copies(run.step)
    tensors = recorded.tensors.get(run.step, {})
    for key, part in zip(FINGERPRINT_KEYS, (found.tensors, found.moments), strict=True):
        logged = {name: value for name, value in tensors.items() if name in part}
        wanted = manifest.get(key) or (combined(logged) if logged else None)
        if wanted not in (None, combined(part)):
            raise RunError(
                f"{checkpoint} is not what was saved: {key} was {wanted} and is {combined(part)}; "
                f"{_first_tensor(run.step, logged, part)}"
            )


def audit(run: Run, recorded: Recorded, end: int) -> str:
    """Retrain the run's steps up to `end`, and compare them with the record. Collective.

    Returns:
        One line that says how much was compared.

    Raises:
        RunError: something differs (the message names the first step, and the first tensor if there are fingerprints),
            or ranks hold different copies of a tensor.
    """
    begin, rows = run.step, recorded.rows
    with_fingerprint = [step for step, row in rows.items() if any(key in row for key in FINGERPRINT_KEYS)]
    difference: str | None = None
    while run.step < end:
        found = _take_step(run)
        step = run.step
        taken: Fingerprint | None = None
        if step in with_fingerprint:
            taken = fingerprint_of(run.model, run.optimizer)
            taken.require_equal_copies(step)
            found |= taken.columns()
        difference = difference or _difference(step, rows.get(step, {}), found)
        if difference is not None and (taken is not None or not any(later > step for later in with_fingerprint)):
            raise RunError(f"{difference}; {_named_by(taken, step, recorded)}")
    count = len(with_fingerprint)
    return (
        f"steps {begin + 1} to {end} are the same to the bit: {len(rows)} losses and gradient norms, "
        f"{count} fingerprint{'' if count == 1 else 's'}"
    )


def _take_step(run: Run) -> dict[str, str]:
    """Take one step; return the bits of its loss and gradient norm."""
    batch = run.feed.take()
    outcome = train_step(run, batch, run.schedule(run.step))
    run.step += 1
    loss, norm = float(outcome.loss), float(outcome.grad_norm)
    return {"loss_bits": float32_bits(loss), "grad_norm_bits": float32_bits(norm)}


def _difference(step: int, recorded: Mapping[str, Any], found: Mapping[str, str]) -> str | None:
    """A line about the first value that differs from the record; None if all are equal."""
    for key in COMPARED:
        if key in recorded and key in found and recorded[key] != found[key]:
            return f"step {step} differs: {key} was {recorded[key]} and is {found[key]} here"
    return None


def _named_by(taken: Fingerprint | None, step: int, recorded: Recorded) -> str:
    if taken is None:
        return "no fingerprint was recorded from there on that could name a tensor (--fingerprint-interval)"
    return _first_tensor(step, recorded.tensors.get(step, {}), {**taken.tensors, **taken.moments})


def _first_tensor(step: int, recorded: Mapping[str, str], found: Mapping[str, str]) -> str:
    if not recorded:
        return f"fingerprints.jsonl has no record of step {step} that could name a tensor"
    differing = [name for name, value in found.items() if recorded.get(name) != value]
    if not differing:
        return f"the tensors after step {step} are those of fingerprints.jsonl"
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"the first tensor that differs after step {step}: {differing[0]}{more}"
