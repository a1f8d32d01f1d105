"""Train a stretch of a deterministic run again, on whatever ranks there are, and compare bits with what it recorded.

    python audit_run.py --run pretrained --from-step 700 --to-step 750
    torchrun --nproc_per_node=2 audit_run.py --checkpoint-dir pretrained --from-step 700 --to-step 750

torchrun takes `--run` for a flag of its own, abbreviated, wherever it stands; `--checkpoint-dir` is the same here.

1. Restore the run at its newest checkpoint up to --from-step (or at its beginning), and compare the fingerprints of
   what was restored with those recorded when it was saved.
2. Take its steps again up to the first logged one from --to-step on; after each, compare the loss's and the norm's
   bits, and the fingerprints, with the rows of `metrics.jsonl`.
3. At the first difference go on to the next recorded fingerprint, and name the first tensor that differs.

The exit code is 0 when all that was asked for was compared and is the same, 1 when something differs, and 2 when it
cannot be compared. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colonnade.errors import RunError, UsageError
from colonnade.flags import OneLineParser
from colonnade.parallel.launch import launch

if TYPE_CHECKING:
    from colonnade.telemetry.fingerprint import Fingerprint
    from run.state import Run

COMPARED = ("loss_bits", "grad_norm_bits", "fingerprint", "moments_fingerprint")


@dataclass(frozen=True)
class Stretch:
    """What is audited: the steps after `first` up to `last` (None: the last on record) of the run in `directory`.

    Attributes:
        data_glob, tokenizer_path: where the run's data are now; None where they have not moved.
        trust_remote_code: run code that comes with the tokenizer.
    """

    directory: Path
    first: int
    last: int | None
    tensor_parallel_size: int | None
    data_glob: str | None
    tokenizer_path: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class Recorded:
    """What a run recorded of a stretch.

    Attributes:
        rows: of `metrics.jsonl`, by step.
        tensors: the fingerprint of each parameter and moment, by name, by step; that of the start as well.
    """

    rows: dict[int, dict[str, Any]]
    tensors: dict[int, dict[str, str]]


def parse_audit(arguments: list[str] | None = None) -> Stretch:
    """The stretch to audit, from the command line. Raises `UsageError`."""
    parser = OneLineParser(
        prog="audit_run.py", description="Train a stretch of a deterministic run again, and compare bits."
    )
    # torchrun refuses --run, also behind the script's name: it reads it as the beginning of its --run-path.
    parser.add_argument("--run", "--checkpoint-dir", metavar="DIR", help="the run's folder; required")
    for flag, default, unit, text in (
        ("--from-step", "0", "STEP", "audit the steps after this one (default 0: from the beginning)"),
        ("--to-step", None, "STEP", "and up to this one (default the last on record)"),
        ("--tensor-parallel-size", None, "RANKS", "ranks the model is cut over (default all)"),
        ("--data-glob", None, "GLOB", "where the run's training data are now, if they have moved"),
        ("--tokenizer-path", None, "PATH", "where its tokenizer is now, if it has moved"),
    ):
        parser.add_argument(flag, default=default, metavar=unit, help=text)
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")
    given = parser.parse(arguments)
    if not given["run"]:
        raise UsageError("--run is missing: give the folder of a run that was trained with --deterministic")
    first = _whole_number("--from-step", given["from_step"])
    last = _whole_number("--to-step", given["to_step"])
    assert first is not None
    if last is not None and last <= first:
        raise UsageError(f"--to-step {last} is not after --from-step {first}: there is no step between them")
    ranks = _whole_number("--tensor-parallel-size", given["tensor_parallel_size"])
    place = given["data_glob"], given["tokenizer_path"], given["trust_remote_code"]
    return Stretch(Path(given["run"]), first, last, ranks, *place)


def _whole_number(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UsageError(f"{flag} is {text[:100]!r}; it must be a whole number of at least 0")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    stretch = parse_audit(arguments)
    # torch takes seconds to import: not before the flags have been found right.
    from colonnade.parallel.mesh import init_parallel
    from colonnade.parallel.vote import on_first_rank
    from run.start import replay_run

    layout = init_parallel(stretch.tensor_parallel_size)
    end = on_first_rank(lambda: last_step(stretch))
    run = replay_run(
        layout,
        stretch.directory,
        stretch.first,
        end,
        data_glob=stretch.data_glob,
        tokenizer_path=stretch.tokenizer_path,
        trust_remote_code=stretch.trust_remote_code,
    )
    try:
        recorded = on_first_rank(lambda: read_recorded(stretch.directory, run.step, end))
        check_start(run, recorded)
        verdict = audit(run, recorded, end)
    finally:
        run.feed.close()
        if run.stream is not None:
            run.stream.close()
    if run.layout.is_main:
        print(verdict)


# ------------------------------------------------------------------------------------------------ what is on record


def _logged_rows(directory: Path) -> dict[int, dict[str, Any]]:
    from colonnade.telemetry.metrics import read_metrics
    from colonnade.telemetry.report import METRICS_NAME

    path = directory / METRICS_NAME
    if not path.exists():
        raise UsageError(f"--run {directory} holds no {METRICS_NAME}; give a run's folder")
    rows = {row["step"]: row for row in read_metrics(path) if "loss_bits" in row and type(row.get("step")) is int}
    if not rows:
        raise UsageError(f"--run {directory} records no bits to compare with: it was not trained with --deterministic")
    return rows


def last_step(stretch: Stretch) -> int:
    """The step to audit up to: the first from --to-step on that was logged, since only such a one can be compared.

    Raises:
        UsageError: the log does not reach as far as was asked.
    """
    rows = _logged_rows(stretch.directory)
    known = f"the last step on record in {stretch.directory} is {max(rows)}"
    if stretch.first >= max(rows):
        raise UsageError(f"--from-step {stretch.first} leaves nothing to audit: {known}; give a step before it")
    if stretch.last is None:
        return max(rows)
    if stretch.last > max(rows):
        raise UsageError(f"--to-step {stretch.last}: {known}; give at most that")
    return min(step for step in rows if step >= stretch.last)


def read_recorded(directory: Path, begin: int, end: int) -> Recorded:
    """What the run recorded of the steps after `begin` up to `end`.

    Raises:
        UsageError: something that the run has logged of them is missing.
    """
    from colonnade.telemetry.metrics import read_metrics
    from colonnade.telemetry.report import METRICS_NAME
    from training_utils import FINGERPRINTS_NAME

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
    """Compare what was restored with the fingerprints of its manifest, else of the log. Collective.

    Raises:
        RunError: they differ, or ranks hold different copies: names the first tensor where the log can tell.
    """
    from colonnade.checkpoint.manifest import read_manifest
    from colonnade.parallel.vote import on_first_rank
    from colonnade.telemetry.fingerprint import FINGERPRINT_KEYS, combined, fingerprint_of

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
    """Take the run's steps again up to `end` and compare. Collective.

    Returns:
        One line that says how much was compared.

    Raises:
        RunError: something differs: names the first step, and the first tensor where fingerprints can tell; or ranks
            hold different copies of a tensor.
    """
    from colonnade.telemetry.fingerprint import FINGERPRINT_KEYS, fingerprint_of

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
    """One step again; the bits of its loss and norm."""
    from colonnade.telemetry.fingerprint import float32_bits
    from training_utils import train_step

    batch = run.feed.take()
    outcome = train_step(run, batch, run.schedule(run.step))
    run.step += 1
    loss, norm = float(outcome.loss), float(outcome.grad_norm)
    return {"loss_bits": float32_bits(loss), "grad_norm_bits": float32_bits(norm)}


def _difference(step: int, recorded: Mapping[str, Any], found: Mapping[str, str]) -> str | None:
    """One line on the first thing that is not as recorded; None where all is."""
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


if __name__ == "__main__":
    launch(main)
