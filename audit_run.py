"""Train a stretch of a deterministic run again, on whatever ranks there are, and compare bits with what it recorded.

    python audit_run.py --run pretrained --from-step 700 --to-step 750
    torchrun --nproc_per_node=2 audit_run.py --checkpoint-dir pretrained --from-step 700 --to-step 750

torchrun takes `--run` for a flag of its own, abbreviated, wherever it stands; `--checkpoint-dir` is the same here.

1. Restore the run at its newest checkpoint up to --from-step (or at its beginning).
2. Take its steps again up to --to-step; after each, compare the loss's and the norm's bits, and the fingerprint, with
   the rows of `metrics.jsonl`.
3. At the first difference go on to the next recorded fingerprint, and name the first tensor that differs.

The exit code is 0 when all that was recorded is the same, and 1 when something differs. Nothing is written.
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
    from training_utils import Run

COMPARED = ("loss_bits", "grad_norm_bits", "fingerprint")


@dataclass(frozen=True)
class Stretch:
    """What is audited: the steps after `first` up to `last` of the run in `directory`."""

    directory: Path
    first: int
    last: int | None
    tensor_parallel_size: int | None


def parse_audit(arguments: list[str] | None = None) -> Stretch:
    """The stretch to audit, from the command line. Raises `UsageError`."""
    parser = OneLineParser(
        prog="audit_run.py", description="Train a stretch of a deterministic run again, and compare bits."
    )
    # torchrun refuses --run, also behind the script's name: it reads it as the beginning of its --run-path.
    parser.add_argument("--run", "--checkpoint-dir", metavar="DIR", help="the run's folder; required")
    for flag, default, text in (
        ("--from-step", "0", "audit the steps after this one (default 0: from the beginning)"),
        ("--to-step", None, "and up to this one (default the last on record)"),
        ("--tensor-parallel-size", None, "ranks the model is cut over (default all)"),
    ):
        parser.add_argument(flag, default=default, metavar="RANKS" if "parallel" in flag else "STEP", help=text)
    given = parser.parse(arguments)
    if not given["run"]:
        raise UsageError("--run is missing: give the folder of a run that was trained with --deterministic")
    first = _whole_number("--from-step", given["from_step"])
    last = _whole_number("--to-step", given["to_step"])
    assert first is not None
    if last is not None and last <= first:
        raise UsageError(f"--to-step {last} is not after --from-step {first}: there is no step between them")
    return Stretch(
        Path(given["run"]), first, last, _whole_number("--tensor-parallel-size", given["tensor_parallel_size"])
    )


def _whole_number(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UsageError(f"{flag} is {text[:100]!r}; it must be a whole number of at least 0")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    stretch = parse_audit(arguments)
    # torch takes seconds to import: not before the flags have been found right.
    from run_setup import replay_run

    run = replay_run(stretch.directory, stretch.first, stretch.last, stretch.tensor_parallel_size)
    try:
        verdict = audit(run, stretch.last)
    finally:
        run.feed.close()
        if run.stream is not None:
            run.stream.close()
    if run.layout.is_main:
        print(verdict)


def audit(run: Run, last: int | None) -> str:
    """Take the run's steps again up to `last` (None: the last one on record) and compare. Collective.

    Returns:
        One line that says how much was compared.

    Raises:
        UsageError: the run recorded nothing in this stretch.
        RunError: something differs: names the first step, and the first tensor where fingerprints can tell.
    """
    from colonnade.parallel.vote import on_first_rank
    from colonnade.telemetry.fingerprint import combined, tensor_fingerprints

    begin = run.step
    rows, fingerprints = on_first_rank(lambda: _recorded(run.directory, begin, last))
    end = max(rows)
    difference: str | None = None
    while run.step < end:
        found = _take_step(run)
        step = run.step
        recorded = rows.get(step, {})
        tensors: dict[str, str] = {}
        if "fingerprint" in recorded:
            tensors = tensor_fingerprints(run.model)
            found["fingerprint"] = combined(tensors)
        difference = difference or _difference(step, recorded, found)
        if difference is not None and (tensors or not any(later > step for later in fingerprints)):
            raise RunError(f"{difference}; {_first_tensor(step, fingerprints.get(step, {}), tensors)}")
    with_fingerprint = sum("fingerprint" in row for row in rows.values())
    return (
        f"steps {begin + 1} to {end} are the same to the bit: {len(rows)} losses and gradient norms, "
        f"{with_fingerprint} fingerprint{'' if with_fingerprint == 1 else 's'}"
    )


def _take_step(run: Run) -> dict[str, str]:
    """One step again; the bits of its loss and norm."""
    from colonnade.telemetry.fingerprint import float32_bits
    from training_utils import mean_loss, train_step

    batch = run.feed.take()
    loss, norm = train_step(run, batch, run.schedule(run.step))
    run.step += 1
    return {"loss_bits": float32_bits(float(mean_loss(run, loss))), "grad_norm_bits": float32_bits(float(norm))}


def _recorded(directory: Path, begin: int, last: int | None) -> tuple[dict[int, Any], dict[int, dict[str, str]]]:
    """By step, the rows to compare with, and the fingerprints of all tensors."""
    from colonnade.telemetry.metrics import read_metrics
    from training_utils import FINGERPRINTS_NAME, METRICS_NAME

    def within(step: int) -> bool:
        return begin < step and (last is None or step <= last)

    rows = {
        row["step"]: row for row in read_metrics(directory / METRICS_NAME) if "loss_bits" in row and within(row["step"])
    }
    if not rows:
        raise UsageError(
            f"{directory / METRICS_NAME} records no bits of the steps {begin + 1} to {last or 'the last'}: "
            "there is nothing to compare"
        )
    path = directory / FINGERPRINTS_NAME
    told = read_metrics(path) if path.exists() else []
    return rows, {row["step"]: row["tensors"] for row in told if row["step"] in rows}


def _difference(step: int, recorded: Mapping[str, Any], found: Mapping[str, str]) -> str | None:
    """One line on the first thing that is not as recorded; None where all is."""
    for key in COMPARED:
        if key in recorded and key in found and recorded[key] != found[key]:
            return f"step {step} differs: {key} was {recorded[key]} and is {found[key]} here"
    return None


def _first_tensor(step: int, recorded: Mapping[str, str], found: Mapping[str, str]) -> str:
    differing = [name for name, value in found.items() if recorded.get(name) != value]
    if not found:
        return "no fingerprint was recorded from there on that could name a tensor (--fingerprint-interval)"
    if not differing:
        return f"the parameters after step {step} are the same"
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"the first tensor that differs after step {step}: {differing[0]}{more}"


if __name__ == "__main__":
    launch(main)
