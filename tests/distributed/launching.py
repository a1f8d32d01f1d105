"""Runs the commands as a user would: in separate processes, under torchrun if there are several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import forked_commands
from data_helpers import stdlib_texts, tiny_tokenizer, write_corpus

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def make_inputs(folder: Path) -> list[str]:
    """Write a small corpus, its tokenizer and a model config; return the flags of `training.py` that use them."""
    write_corpus(folder / "corpus", stdlib_texts(120))
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return [
        *("--data-glob", str(folder / "corpus" / "*.parquet"), "--tokenizer-path", str(folder / "tokenizer")),
        *("--model-config", str(folder / "config.json"), "--block-size", "64", "--log-interval", "1"),
        *("--learning-rate", "1e-3", "--warmup-steps", "2"),
    ]


def command(script: str, flags: Sequence[str], ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable, str(ROOT / script), *flags]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, str(ROOT / script), *flags]


def start(
    script: str, flags: Sequence[str], ranks: int = 1, command_line: Sequence[str] | None = None
) -> subprocess.Popen[str]:
    """Start a command, or the given command line, with output and errors merged into one stream."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)
    return subprocess.Popen(
        command_line or command(script, flags, ranks),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str], code: int = 0, timeout: float = forked_commands.PATIENCE) -> str:
    """Wait for a command to end, assert its exit code, and return its output."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, output
    return output


def run(script: str, flags: Sequence[str], ranks: int = 1, code: int = 0, *, draws: bool = False) -> str:
    """Run a command, forked rather than under torchrun; return what rank 0 printed, with its errors last."""
    outcomes = forked_commands.start(script.removesuffix(".py"), flags, ranks=ranks, draws=draws)
    assert outcomes[0].code == code, outcomes
    return outcomes[0].output + outcomes[0].errors


def kill_after(step: int, flags: Sequence[str], directory: Path) -> None:
    """Train on two ranks, and kill both with SIGKILL once the run's metrics have reached `step`."""
    running = forked_commands.begin("training", [*flags, "--checkpoint-dir", str(directory)], ranks=2)
    deadline = time.monotonic() + forked_commands.PATIENCE
    while time.monotonic() < deadline and running.is_alive():
        if (directory / "metrics.jsonl").exists() and max(losses(directory), default=0) >= step:
            break
        time.sleep(0.005)
    running.signal(signal.SIGKILL)
    running.finish()


def losses(directory: Path) -> dict[int, float]:
    """Loss by step, from the metrics file."""
    rows: list[Mapping[str, Any]] = [
        json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines() if line.endswith("}")
    ]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def position(directory: Path, step: int) -> dict[str, Any]:
    """The data position in the checkpoint of `step`."""
    manifest = json.loads((directory / f"streaming_checkpoint_step_{step}" / "MANIFEST.json").read_text())
    found: dict[str, Any] = manifest["run"]["data_position"]
    return found
