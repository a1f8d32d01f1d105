"""The ranks that run the contenders of `benchmarks/step.py` in turns, and the measurements of each contender."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.profiler import profile

from benchmarks.training_step.ours import ours
from benchmarks.training_step.peers import Contender, llama, predecessor, torch_plan
from benchmarks.training_step.work import Work, most_above
from colonnade.parallel.mesh import first_rank_alone, init_parallel, shutdown_parallel
from colonnade.runtime.launch import quiet_libraries
from colonnade.telemetry.profiling import activities, kernel_table

MATMUL = "matmul"
# Rows, inner size, columns: a rank's gate and up product, its head, and a square product that any library does well.
PRODUCTS = ((2048, 512, 1376), (2048, 512, 16_000), (2048, 2048, 2048))
# FLOPs of one turn of a bare product: half a second on a CPU core, a twentieth of a second on a GPU.
PRODUCT_FLOPS = {"cpu": 4e10, "cuda": 4e13}
PROFILED_STEPS = 2


def on_ranks(ranks: int, measure: Callable[..., Any], *args: Any) -> Any:
    """Call `measure(*args)` on `ranks` new processes with one thread each; return what it returns on rank 0."""
    barrier = multiprocessing.get_context("spawn").Barrier(ranks)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's log lines
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer")
        multiprocessing.spawn(_rank, args=(ranks, _free_port(), answer, barrier, measure, args), nprocs=ranks)
        return pickle.loads(answer.read_bytes())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank(
    rank: int, ranks: int, port: int, answer: Path, barrier: Any, measure: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    quiet_libraries()
    _Turns.barrier = barrier
    value = measure(*args)
    if rank == 0:
        answer.write_bytes(pickle.dumps(value))
    shutdown_parallel()


class _Turns:
    """The barrier at which ranks wait for each other: it sleeps, which `torch.distributed`'s may not do."""

    barrier: Any = None


# -------------------------------------------------------------------------------------------------------- one case


@dataclass(frozen=True)
class Measured:
    """The time and memory of a contender.

    Attributes:
        seconds: of each round.
        memory: bytes on the first rank: parameters and moments, plus the peak of what a step allocates above them
            (gradients, activations, the optimizer's temporary tensors); 0 for a bare product.
        loss: of the first step.
    """

    seconds: list[float]
    memory: int
    loss: float


def measure_case(
    work: Work,
    groups: Iterable[tuple[str, ...]],
    rounds: int,
    device_type: str,
    compiled: bool,
    variants: Mapping[str, dict[str, Any]],
    profiles: str | None = None,
) -> list[dict[str, Measured]]:
    """Seconds and memory of the contenders of each group, which stay in memory together and take turns. Collective.

    A round is one step of each; every other round runs in reverse order. Before the rounds, a first step warms up and a
    second one is measured for its memory.

    Args:
        compiled: compile every contender; a variant may say otherwise of itself.
        variants: options of our model, by name of the contender.
        profiles: path prefix of the files that get the tables of the first rank's kernels; None for no profile.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    layout = init_parallel(ranks, device)
    makers: dict[str, Callable[[], Contender]] = {
        "ours": lambda: ours(work, layout, compiled=compiled),
        "torch_tp": lambda: torch_plan(work, layout.tp_mesh, device, compiled=compiled),
        "predecessor": lambda: predecessor(work, ranks, device, compiled=compiled),
    }
    for name, options in variants.items():
        makers[name] = partial(ours, work, layout, **{"compiled": compiled, **options})
    alone = first_rank_alone(device)
    if rank == 0:
        makers["ours_tp1"] = lambda: ours(work, alone, alone=True, compiled=compiled)
        makers["transformers"] = lambda: llama(work, device, compiled=compiled)
    found = []
    for group in groups:
        torch.manual_seed(0)
        contenders = {name: makers.get(name, _absent)() for name in group if name != MATMUL}
        if MATMUL in group:
            for shape in PRODUCTS:
                repeats = product_repeats(shape, device.type)
                contenders[product_name(shape)] = bare_product(shape, work.dtype, device, repeats)
        found.append(_take_turns(contenders, rounds, device))
        for name, contender in contenders.items() if profiles is not None else ():
            if not name.startswith(MATMUL):
                table = kernels(partial(_step, contender), device)
                if rank == 0:
                    Path(f"{profiles}{name}.txt").write_text(table + "\n", encoding="utf-8")
        contenders.clear()
        gc.collect()
    return found


def _absent() -> Contender:
    """A placeholder for a contender that runs on another rank only."""
    return Contender(lambda: torch.zeros(()), list, alone=True)


def _take_turns(contenders: dict[str, Contender], rounds: int, device: torch.device) -> dict[str, Measured]:
    losses = {name: float(_step(contender)) for name, contender in contenders.items()}
    memory = {name: 0 if name.startswith(MATMUL) else step_memory(one, device) for name, one in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            seconds[name].append(_seconds(contenders[name], device))
        if os.environ["RANK"] == "0":
            taken = "  ".join(f"{name} {times[-1]:.2f}" for name, times in seconds.items())
            print(f"  round {number + 1} of {rounds}, seconds: {taken}", file=sys.stderr, flush=True)
    return {name: Measured(seconds[name], memory[name], losses[name]) for name in contenders}


def _step(contender: Contender) -> Tensor:
    """Take a step on all ranks, or, for a contender that runs alone, on the first rank with all threads."""
    if not contender.alone:
        return contender.step()
    ranks, is_first = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0"
    if is_first:
        torch.set_num_threads(ranks)
    loss = contender.step()
    torch.set_num_threads(1)
    _Turns.barrier.wait()
    return loss


def _seconds(contender: Contender, device: torch.device) -> float:
    _await_all(device)
    began = time.perf_counter()
    _step(contender)
    _await_all(device)
    return time.perf_counter() - began


def _await_all(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    _Turns.barrier.wait()


def step_memory(contender: Contender, device: torch.device) -> int:
    """Bytes that torch allocates on this rank: those held between steps, plus the peak of one step above them."""
    return sum(tensor.nbytes for tensor in contender.held()) + most_above(lambda: _step(contender), device)


def kernels(step: Callable[[], object], device: torch.device) -> str:
    """A table of the kernels that take the most time on this rank in `PROFILED_STEPS` steps."""
    on_cuda = device.type == "cuda"
    step()
    with profile(activities=activities(on_cuda=on_cuda)) as recorded:
        for _ in range(PROFILED_STEPS):
            step()
        if on_cuda:
            torch.cuda.synchronize(device)
    return kernel_table(recorded, on_cuda=on_cuda)


# ---------------------------------------------------------------------------------------------------- bare products


def product_name(shape: tuple[int, int, int]) -> str:
    """The contender name of a bare product."""
    return f"{MATMUL} {'x'.join(map(str, shape))}"


def product_flops(shape: tuple[int, int, int]) -> int:
    """FLOPs of one product of this shape."""
    rows, inner, columns = shape
    return 2 * rows * inner * columns


def product_repeats(shape: tuple[int, int, int], device_type: str) -> int:
    """Number of products in one turn."""
    return max(1, round(PRODUCT_FLOPS[device_type] / product_flops(shape)))


def bare_product(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, repeats: int) -> Contender:
    """Matrix products x W^T of one shape into a preallocated output, on every rank at the same time."""
    rows, inner, columns = shape
    x, weight = (torch.randn(count, inner, device=device).to(dtype) for count in (rows, columns))
    out = torch.empty(rows, columns, dtype=dtype, device=device)

    def step() -> Tensor:
        for _ in range(repeats):
            torch.mm(x, weight.t(), out=out)
        return torch.zeros(())

    return Contender(step, list)
