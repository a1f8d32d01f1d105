"""The measurements of `benchmarks/gpu_step.py`: each `measure_` function runs in its own process on one device."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.training_step.ours import our_contender, our_optimizer
from benchmarks.training_step.peers import Contender, adamw, contender, llama_loss, llama_model
from benchmarks.training_step.ranks import bare_product, kernels, product_flops, step_memory
from benchmarks.training_step.work import Work, step_flops
from colonnade.errors import message_line
from colonnade.model_config import ModelConfig
from colonnade.parallel.mesh import init_parallel
from colonnade.tuning.memory import is_out_of_memory
from model import TensorParallelModel

# Rows, inner size, columns: a square product that any library does well, and the feed-forward of a large model.
PRODUCTS = {"cuda": ((8192, 8192, 8192), (16_384, 3072, 8192), (16_384, 8192, 3072)), "cpu": ((256, 256, 256),)}
# Total FLOPs per shape: about half a second, long enough for a GPU's clock to drop as it does under load.
PRODUCT_FLOPS = {"cuda": 4e14, "cpu": 1e9}
DTYPE = torch.bfloat16
DOES_NOT_FIT = "does not fit"
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Plan:
    """The sizes and settings that every contender is measured with.

    Attributes:
        config: sizes of the decoder.
        block: tokens per sequence.
        micro_batches: sizes tried in this order until one does not fit, or fails.
        windows: number of timed windows, of which the median counts.
        window_steps: steps per window.
        device_type: cuda or cpu.
        profile_folder: where to write the tables of kernels; None for no profile.
    """

    config: ModelConfig
    block: int
    micro_batches: list[int]
    windows: int
    window_steps: int
    device_type: str
    profile_folder: str | None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.device_type == "cuda" else torch.device("cpu")

    def described(self) -> dict[str, Any]:
        """Everything that the numbers depend on, for JSON."""
        name = torch.cuda.get_device_name() if self.device_type == "cuda" else "cpu"
        return {**asdict(self), "device": name, "torch": torch.__version__}


def measure_ours(plan: Plan, name: str, options: dict[str, Any], shards: int) -> dict[str, Any]:
    """Measure our step with the whole model, or with the first of `shards` shards."""
    arguments = {key: value for key, value in options.items() if key != "attention"}
    model = our_shard(plan, arguments, shards)
    optimizer = our_optimizer(model)
    with sdpa_kernel(KERNELS[options["attention"]]) if "attention" in options else nullcontext():
        return _measure(plan, name, shards, model, lambda work: our_contender(model, optimizer, work))


def our_shard(plan: Plan, options: dict[str, Any], shards: int) -> TensorParallelModel:
    """The model on the first of `shards` tensor-parallel ranks; the other ranks do not exist."""
    if shards > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=shards)
    return TensorParallelModel(plan.config, init_parallel(shards, plan.device), compute_dtype=DTYPE, **options)


def measure_transformers(plan: Plan, name: str, compiled: bool) -> dict[str, Any]:
    """Measure the step of `transformers`' LlamaForCausalLM."""
    with plan.device:
        model = llama_model(plan.config)
    optimizer = adamw(model)
    called = torch.compile(model, dynamic=False) if compiled else model
    return _measure(
        plan, name, 1, model, lambda work: contender(model, optimizer, llama_loss(called, work, plan.device))
    )


def _measure(plan: Plan, name: str, shards: int, model: nn.Module, make: Callable[[Work], Contender]) -> dict[str, Any]:
    """Speed and memory at each micro-batch size up to the first one that fails, and the fastest of them."""
    rates = [matmul_rate(plan.device)]
    tried: list[dict[str, Any]] = []
    failed = None
    for micro_batch in plan.micro_batches:
        work = Work(plan.config, micro_batch, plan.block, DTYPE)
        try:
            tried.append(_tried(make(work), work, plan, shards))
        except RuntimeError as error:
            if not tried:
                raise
            failed = {
                "micro_batch": micro_batch,
                "reason": DOES_NOT_FIT if is_out_of_memory(error) else message_line(error)[:300],
            }
            break
        print(f"  {_described(tried[-1])}", file=sys.stderr, flush=True)
        _release()
    # After another error than this one, the device may be unusable.
    is_usable = failed is None or failed["reason"] == DOES_NOT_FIT
    if is_usable:
        model.zero_grad(set_to_none=True)
        _release()
        rates.append(matmul_rate(plan.device))
    for one in tried:
        one["fraction_of_matmul_rate"] = one["flops_per_second"] / (sum(rates) / len(rates))
    best = max(tried, key=lambda one: one["tokens_per_second"])
    if plan.profile_folder is not None and is_usable:
        work = Work(plan.config, best["micro_batch"], plan.block, DTYPE)
        path = Path(plan.profile_folder, f"{name.replace('/', '_')}.txt")
        try:
            table = kernels(make(work).step, plan.device)
        except RuntimeError as error:  # the measurements stand
            table = f"not profiled: {message_line(error)}"
        path.write_text(f"{table}\n", encoding="utf-8")
    return {"best": best, "tried": tried, "failed": failed, "matmul_flops_per_second": rates}


def _described(found: dict[str, Any]) -> str:
    """One line with all that was measured, which is left if a time limit ends the command."""
    return (
        f"micro-batch {found['micro_batch']}: {found['tokens_per_second']:.0f} tokens/s, "
        f"{found['flops_per_second'] / 1e12:.2f} TFLOP/s, peak {found['peak_bytes'] / 2**30:.2f} GiB, "
        f"first step {found['first_step_seconds']:.1f} s"
    )


def _release() -> None:
    torch.compiler.reset()  # CUDA graphs release their memory only with the compiled code
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tried(one: Contender, work: Work, plan: Plan, shards: int) -> dict[str, Any]:
    began = time.perf_counter()
    one.step()  # compiles, and allocates gradients, moments and the allocator's pools
    _await(plan.device)
    warmed = time.perf_counter() - began
    peak = step_memory(one, plan.device)
    seconds = []
    for _ in range(plan.windows):
        _await(plan.device)
        began = time.perf_counter()
        for _ in range(plan.window_steps):
            one.step()
        _await(plan.device)
        seconds.append((time.perf_counter() - began) / plan.window_steps)
    taken = statistics.median(seconds)
    return {
        "micro_batch": work.micro_batch,
        "tokens_per_second": work.tokens / taken,
        "seconds": seconds,
        "first_step_seconds": warmed,
        "peak_bytes": peak,
        "flops_per_second": step_flops(work.config, work.micro_batch, work.block) / shards / taken,
    }


def _await(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of bare products in the shape that is fastest on the device."""
    rates = []
    for shape in PRODUCTS[device.type]:
        repeats = round(PRODUCT_FLOPS[device.type] / product_flops(shape))
        product = bare_product(shape, DTYPE, device, repeats)
        product.step()
        _await(device)
        began = time.perf_counter()
        product.step()
        _await(device)
        rates.append(repeats * product_flops(shape) / (time.perf_counter() - began))
    _release()
    return max(rates)
