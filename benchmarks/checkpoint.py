"""What saving a checkpoint costs: how long training is blocked, and a whole save compared with torch's own ways.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --parameters 100 --rounds 7 --json checkpoint.json

1. Start two ranks (gloo on the CPU, one thread each), each with half a model and its AdamW moments in float32.
2. Four ways of saving take turns; each writes the same state to the same disk, which is synced and idle beforehand:
   `async`: the default of a run, timed until training may continue: all of `CheckpointSaver.save`;
   `sync`: the same save, with hashes, until it is durable;
   `dcp`: a plain `torch.distributed.checkpoint.save`, which fsyncs as well but neither hashes nor commits;
   `torch`: the state gathered on the first rank, one `torch.save`, one fsync.
3. A time is that of the slowest rank, as the median of the rounds; a ratio is the median of the rounds' ratios.

`async_stall_over_sync`, `sync_over_dcp` and `sync_over_torch_save` are ratios of times: the lower, the better.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flag_checks import require_at_least_one
from colonnade.files import require_place
from colonnade.flags import OneLineParser
from colonnade.runtime.launch import launch

RANKS = 2
WAYS = ("async", "sync", "dcp", "torch")


def main() -> None:
    parser = OneLineParser(description="Time to save a checkpoint; the lower a ratio, the better.")
    parser.add_argument("--json", metavar="PATH", help='write {"ratios": {name: value}} to this file')
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="saves of each way (5)")
    parser.add_argument("--parameters", type=int, default=75, metavar="MILLIONS", help="size of the model (75)")
    parser.add_argument("--directory", metavar="DIR", help="where to write (a new folder in this one)")
    given = parser.parse_args()
    require_at_least_one("--rounds", given.rounds)
    require_place("--json", given.json)
    from benchmarks.training_step.ranks import on_ranks

    with tempfile.TemporaryDirectory(prefix=".checkpoint-benchmark-", dir=given.directory or ".") as folder:
        measured, size = on_ranks(RANKS, _measure, Path(folder), given.parameters, given.rounds)
    print(f"{size / 1e6:.0f} MB from {RANKS} ranks, {given.rounds} rounds")
    for way in (*WAYS, "async, until durable"):
        seconds = statistics.median(row[way] for row in measured)
        speed = f"{size / seconds / 1e6:8.0f} MB/s" if way != "async" else "   (stall)"
        print(f"{way:22}{seconds:8.3f} s{speed}")
    ratios = {
        "async_stall_over_sync": statistics.median(row["async"] / row["sync"] for row in measured),
        "sync_over_dcp": statistics.median(row["sync"] / row["dcp"] for row in measured),
        "sync_over_torch_save": statistics.median(row["sync"] / row["torch"] for row in measured),
    }
    for name, ratio in ratios.items():
        print(f"{name}  {ratio:.3f}")
    if given.json:
        Path(given.json).write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


def _measure(folder: Path, millions: int, rounds: int) -> tuple[list[dict[str, float]], int]:
    """Seconds of each way in each round, and the bytes of the state over all ranks."""
    import torch
    import torch.distributed as dist

    ways, wait, size = _ways(folder, millions)

    def seconds(begin: float) -> float:
        slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    def measured(way: str) -> dict[str, float]:
        if dist.get_rank() == 0:
            for path in folder.iterdir():
                shutil.rmtree(path)
        dist.barrier()
        _touch_page_cache(folder / f"{dist.get_rank()}.touch", size // RANKS)
        dist.barrier()
        if dist.get_rank() == 0:
            os.sync()
        dist.barrier()
        begin = time.perf_counter()
        ways[way]()
        found = {way: seconds(begin)}
        if way == "async":
            wait()
            found["async, until durable"] = seconds(begin)
        return found

    for way in WAYS:
        measured(way)  # warm-up: the allocator's and the page cache's first touch
    rows = []
    order = list(WAYS)
    chance = random.Random(0)
    for _ in range(rounds):
        # Random order, since each way affects the free memory and the disk that the next one finds.
        chance.shuffle(order)
        row: dict[str, float] = {}
        for way in order:
            row |= measured(way)
        rows.append(row)
    return rows, size


def _touch_page_cache(path: Path, size: int) -> None:
    """Write and remove a file as large as what is written next.

    On a virtual machine, memory that has been free for a while is fetched from the host page by page when it is used
    again. This can take longer than everything else, and would hit whichever way comes first.
    """
    block = bytes(1 << 20)
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
    path.unlink()


def _ways(folder: Path, millions: int) -> tuple[dict[str, Callable[[], None]], Callable[[], None], int]:
    """A save function for each way, a function that waits for the asynchronous save, and the bytes of the state."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor

    from colonnade.checkpoint.manifest import JSON
    from colonnade.checkpoint.saver import CheckpointSaver
    from colonnade.checkpoint.state import model_tensors, optimizer_tensors
    from colonnade.optim.optimizer import allocate_state, create_adamw
    from colonnade.parallel.mesh import init_parallel
    from model import ModelConfig, TensorParallelModel

    # A layer of width h has 12 h^2 parameters; the layers make up what embedding and head leave of the total.
    width, vocabulary = 768, 16384
    layers = max(1, round((millions * 1e6 - 2 * vocabulary * width) / (12 * width**2)))
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        max_position_embeddings=256,
    )
    model = TensorParallelModel(config, init_parallel(RANKS, torch.device("cpu")))
    optimizer = create_adamw(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    allocate_state(optimizer)
    savers = {mode: CheckpointSaver(folder, asynchronous=mode == "async", hashes=True) for mode in ("async", "sync")}
    savers["async"].reserve(model, optimizer)
    manifest: dict[str, JSON] = {"settings": {}, "loss": 2.5}

    def save(mode: str) -> None:
        savers[mode].save(1, model=model, optimizer=optimizer, manifest=manifest)

    def state() -> dict[str, torch.Tensor]:
        return {**model_tensors(model), **optimizer_tensors(model, optimizer)}

    def save_with_dcp() -> None:
        dcp.save(dict(state()), storage_writer=dcp.FileSystemWriter(folder / "dcp"))

    def save_with_torch() -> None:
        whole = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state().items()
        }
        if dist.get_rank() == 0:
            (folder / "torch").mkdir()
            with (folder / "torch" / "whole.pt").open("wb") as file:
                torch.save(whole, file)
                file.flush()
                os.fsync(file.fileno())
        dist.barrier()

    size = sum(tensor.nbytes for tensor in state().values())
    ways = {"async": lambda: save("async"), "sync": lambda: save("sync"), "dcp": save_with_dcp}
    return {**ways, "torch": save_with_torch}, savers["async"].wait, size


if __name__ == "__main__":
    launch(main)
