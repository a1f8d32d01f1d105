"""Train a short deterministic reference run at several numbers of ranks, and print its fingerprint at each.

    python check_bits.py --output runs/bits

All layouts must print the same values; otherwise the exit code is 1. To verify that a code change does not affect
results, compare with what the code before it printed on the same machine with the same libraries
(`docs/determinism.md`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from colonnade.errors import RunError
from colonnade.flags import OneLineParser
from colonnade.runtime.launch import launch

ROOT = Path(__file__).resolve().parent
# (ranks, tensor-parallel size)
LAYOUTS = ((1, 1), (2, 2), (4, 4), (2, 1))
REFERENCE = (
    *("--preset", "tiny", "--deterministic", "--tensor-slices", "4", "--precision", "fp32", "--seed", "1"),
    *("--total-steps", "4", "--warmup-steps", "2", "--log-interval", "1", "--fingerprint-interval", "4"),
    *("--initial-batch-size", "1", "--tokens-per-step", "512", "--block-size", "128", "--checkpoint-interval", "0"),
)


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(prog="check_bits.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data",
        default="data/sample",
        metavar="DIR",
        help="folder of the sample corpus, created if missing (default data/sample)",
    )
    text = "parent folder for the runs, one subfolder per layout; existing ones are replaced (default runs/bits)"
    parser.add_argument("--output", default="runs/bits", metavar="DIR", help=text)
    given = parser.parse(arguments)

    from colonnade.data.sample_corpus import build_sample_corpus

    corpus = build_sample_corpus(Path(given["data"]))
    data = ("--data-glob", corpus.train_glob, "--tokenizer-path", corpus.tokenizer_path)
    seen = {}
    for ranks, tp in LAYOUTS:
        name = f"tp {tp} dp {ranks // tp}"
        directory = Path(given["output"]) / name.replace(" ", "")
        shutil.rmtree(directory, ignore_errors=True)
        seen[name] = reference_run(directory, ranks, tp, data)
        print(f"{name}  fingerprint {seen[name][0]}  loss {seen[name][1]}  gradient norm {seen[name][2]}", flush=True)
    if len(set(seen.values())) > 1:
        raise RunError("the bits depend on the number of ranks")


def reference_run(directory: Path, ranks: int, tp: int, data: tuple[str, ...]) -> tuple[str, str, str]:
    """Fingerprint, loss and gradient norm, all in hexadecimal, after the last step of the reference run."""
    from colonnade.telemetry.metrics import read_metrics
    from colonnade.telemetry.report import METRICS_NAME

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    flags = [*REFERENCE, *data, "--tensor-parallel-size", str(tp), "--checkpoint-dir", str(directory)]
    done = subprocess.run(
        [*launcher, str(ROOT / "training.py"), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"the reference run at tp {tp} on {ranks} ranks failed:\n{done.stdout}")
    row = read_metrics(directory / METRICS_NAME)[-1]
    return row["fingerprint"], row["loss_bits"], row["grad_norm_bits"]


if __name__ == "__main__":
    launch(main)
