"""Peak memory of an export relative to the size of the weights.

    python benchmarks/export.py --json export.json

1. A one-step run makes a checkpoint of a Llama of about 200 million parameters, and another one of a tiny model.
2. `export_hf.py` exports each in its own process, whose anonymous memory is sampled: what the process holds, excluding
   memory-mapped files, whose pages the system can drop.
3. The ratio is the peak, less that of the tiny model, over the bytes of the weights in float32. Holding the model twice
   would give 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from colonnade.data.sample_corpus import build_sample_corpus
from colonnade.files import require_place
from colonnade.flags import OneLineParser
from colonnade.model_config import ModelConfig
from colonnade.runtime.launch import launch

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
LARGE = ModelConfig(32000, 1024, 2816, 12, 16, 8, 64, 256)
SMALL = ModelConfig(4096, 64, 128, 2, 4, 2, 16, 256)


def main() -> None:
    parser = OneLineParser(description="Peak memory of export_hf.py over the bytes of the weights.")
    parser.add_argument("--json", metavar="PATH", help='write {"ratios": {name: value}} to this file')
    given = parser.parse_args()
    require_place("--json", given.json)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: trained(Path(folder), name, config) for name, config in (("large", LARGE), ("small", SMALL))}
        ratios = {}
        for kind in ("float32", "bfloat16", "pth"):
            peaks = {name: exported(run, kind) for name, run in runs.items()}
            ratios[f"export_peak_over_weights/{kind}"] = (peaks["large"] - peaks["small"]) / (4 * LARGE.num_parameters)
            print(
                f"{kind:10s} peak {peaks['large'] / 1e9:.2f} GB, of a tiny model {peaks['small'] / 1e9:.2f} GB, ",
                end="",
            )
            print(f"over the weights {ratios[f'export_peak_over_weights/{kind}']:.2f}")
    if given.json:
        Path(given.json).write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


def trained(folder: Path, name: str, config: ModelConfig) -> Path:
    """Train a model for one step; return the run's folder."""
    corpus = build_sample_corpus(SAMPLE)
    (folder / f"{name}.json").write_text(json.dumps(config.to_dict()))
    flags = ["--model-config", folder / f"{name}.json", "--data-glob", corpus.train_glob, "--total-steps", "1"]
    flags += ["--tokenizer-path", corpus.tokenizer_path, "--checkpoint-dir", folder / name, "--block-size", "64"]
    flags += ["--initial-batch-size", "1", "--tokenizer-backend", "hf", "--no-checkpoint-hash"]
    command = [sys.executable, ROOT / "training.py", *flags]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / name


def exported(run: Path, kind: str) -> int:
    """Export a run; return the peak anonymous memory of the process in bytes."""
    output = run.parent / f"{run.name}-{kind}{'.pth' if kind == 'pth' else ''}"
    flags = ["--checkpoint-path", run, "--output", output, "--dtype", "float32" if kind == "pth" else kind]
    command = [str(part) for part in (sys.executable, ROOT / "export_hf.py", *flags)]
    child = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        try:
            memory = child.memory_info()
            peak = max(peak, memory.rss - memory.shared)
        except psutil.Error:  # it has just ended
            break
        time.sleep(0.005)
    if child.wait() != 0:
        sys.exit(f"error: the export of {run} failed")
    return peak


if __name__ == "__main__":
    launch(main)
