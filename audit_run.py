"""Retrain a range of steps of a deterministic run, on any number of ranks, and compare the bits with those it recorded.

    python audit_run.py --run pretrained --from-step 700 --to-step 750
    torchrun --nproc_per_node=2 audit_run.py --checkpoint-dir pretrained --from-step 700 --to-step 750

torchrun takes `--run`, anywhere on its command line, as an abbreviation of a flag of its own; `--checkpoint-dir` is an
alias of `--run` here.

1. Restore the run's newest checkpoint at or before --from-step (or its initial state), and compare the fingerprints of
   the restored tensors with those recorded when they were saved.
2. Retrain up to the first logged step at or after --to-step. After each step, compare the bits of loss and gradient
   norm, and the fingerprints, with the rows of `metrics.jsonl`.
3. At the first difference, continue to the next recorded fingerprint, and report the first tensor that differs.

The exit code is 0 if everything requested was compared and is identical, 1 if something differs, and 2 if the steps
cannot be compared. Nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from colonnade.errors import UsageError
from colonnade.flags import OneLineParser
from colonnade.runtime.launch import launch


@dataclass(frozen=True)
class Stretch:
    """The steps to audit: after `first` up to `last` (None: the last logged one) of the run in `directory`.

    Attributes:
        data_glob, tokenizer_path: current locations of the run's data and tokenizer; None if they have not moved.
        trust_remote_code: run code shipped with the tokenizer.
    """

    directory: Path
    first: int
    last: int | None
    tensor_parallel_size: int | None
    data_glob: str | None
    tokenizer_path: str | None
    trust_remote_code: bool


def parse_audit(arguments: list[str] | None = None) -> Stretch:
    """Parse the command line into the range of steps to audit. Raises `UsageError`."""
    parser = OneLineParser(
        prog="audit_run.py",
        description="Retrain a range of steps of a deterministic run and compare the bits with those it recorded.",
    )
    # torchrun rejects --run even after the script's name: it reads it as an abbreviation of its own --run-path.
    parser.add_argument("--run", "--checkpoint-dir", metavar="DIR", help="the run's folder; required")
    for flag, default, unit, text in (
        ("--from-step", "0", "STEP", "audit the steps after this one (default 0, the beginning)"),
        (
            "--to-step",
            None,
            "STEP",
            "audit up to this step, or the first logged one after it (default the last logged step)",
        ),
        ("--tensor-parallel-size", None, "RANKS", "ranks that the model is sharded over (default all)"),
        ("--data-glob", None, "GLOB", "where the run's training data is now, if it has moved"),
        ("--tokenizer-path", None, "PATH", "where the run's tokenizer is now, if it has moved"),
    ):
        parser.add_argument(flag, default=default, metavar=unit, help=text)
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code shipped with the tokenizer")
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
    # Importing torch takes seconds, so it waits until the flags have been validated.
    from colonnade.parallel.mesh import init_parallel
    from colonnade.runtime.vote import on_first_rank
    from run.audit import audit, check_start, last_step, read_recorded
    from run.start import replay_run
    from run.state import close_data

    layout = init_parallel(stretch.tensor_parallel_size)
    end = on_first_rank(lambda: last_step(stretch.directory, stretch.first, stretch.last))
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
        close_data(run)
    if run.layout.is_main:
        print(verdict)


if __name__ == "__main__":
    launch(main)
