"""A training step of a whole preset on one GPU, ours and that of `transformers`, and our step of one shard of eight.

    python benchmarks/gpu_step.py --json gpu.json --profile profiles
    python benchmarks/gpu_step.py --variant eager:compiled=false --variant compiled:compiled=true
    python benchmarks/gpu_step.py --smoke

1. Measure the rate of bare matrix products, the best of a few shapes, before and after each contender.
2. Run each contender in its own process, at growing micro-batch sizes until memory runs out; its fastest size counts.
   Times are the median of several windows of steps, with one device synchronization at the end of each window.
3. Do the same for one rank of `--shards`: its actual part of the parameters and of the computation, with torch's fake
   process group in place of the other ranks. Collectives take no time and deliver nothing, so this measures compute
   alone, and the loss is meaningless.

A step is a complete optimizer step: forward and backward, gradient norm, clipping and fused AdamW, with float32
parameters; products are in bf16 (ours by its own casts, `transformers` with scaled dot-product attention under
torch.autocast and torch.compile). Activations are kept, unless a variant says otherwise. FLOPs are counted as in
`benchmarks/step.py` (`step_flops`): recomputation counts as 0, and a shard's FLOPs are those of the whole model divided
by the number of shards.

A variant is a name with keyword arguments of `TensorParallelModel`; it may also name the attention kernel:
`cudnn:compiled=true,attention=cudnn` (flash, cudnn, efficient or math; by default torch chooses). The first variant is
compared with `transformers`, the others with the first, so that one run shows what each option gains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flag_checks import counts, make_folder, require_at_least_one
from colonnade.errors import RunError, UsageError
from colonnade.files import require_place
from colonnade.flags import OneLineParser
from colonnade.runtime.launch import launch

if TYPE_CHECKING:
    from benchmarks.training_step.gpu import Plan

TRANSFORMERS = "transformers"
ATTENTION = ("flash", "cudnn", "efficient", "math")
# Sizes that take a CPU only seconds, to try the command itself.
SMOKE: dict[str, Any] = {
    "preset": "tiny",
    "vocab_size": 512,
    "block": 64,
    "micro_batches": "1,2",
    "shards": 2,
    "windows": 2,
    "window_steps": 1,
}


def main() -> None:
    given = parsed()
    plan, variants = plan_of(given)
    from benchmarks.training_step.gpu import DOES_NOT_FIT, measure_ours, measure_transformers

    turns: dict[str, tuple[Any, ...]] = {name: (measure_ours, options, 1) for name, options in variants.items()}
    if not given.skip_transformers:
        turns[TRANSFORMERS] = (measure_transformers, given.peer_compile)
    if given.shards > 1:
        for name, options in variants.items():
            turns[shard_name(name, given.shards)] = (measure_ours, options, given.shards)
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    ratios: dict[str, float] = {}
    for name, (measure, *arguments) in turns.items():
        take_turn(found, failed, plan, name, measure, arguments)
        if name in found and (last := found[name]["failed"]) is not None and last["reason"] != DOES_NOT_FIT:
            failed[name] = f"micro-batch {last['micro_batch']}: {last['reason']}"
        ratios = ratios_of(found, list(variants), given.preset, given.shards)
        if given.json:  # written after each contender, since the next one may crash the machine
            report = {"ratios": ratios, "contenders": found, "failed": failed, "plan": plan.described()}
            Path(given.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_table(found, ratios)
    if failed:
        raise RunError("not measured: " + "; ".join(f"{name}: {message}" for name, message in failed.items()))


def take_turn(
    found: dict[str, dict[str, Any]], failed: dict[str, str], plan: Plan, name: str, measure: Any, arguments: list[Any]
) -> None:
    """Measure one contender in its own process, so that its failure does not affect the others."""
    from torch.multiprocessing.spawn import ProcessException

    from benchmarks.training_step.ranks import on_ranks

    print(f"{name}: {arguments}", file=sys.stderr, flush=True)
    try:
        found[name] = on_ranks(1, measure, plan, name, *arguments)
    except ProcessException as error:
        print(error, file=sys.stderr, flush=True)
        failed[name] = str(error).strip().splitlines()[-1]


def parsed() -> argparse.Namespace:
    parser = OneLineParser(description="Speed and memory of a preset's training step on one GPU.")
    parser.add_argument("--preset", default="argonne-2b", metavar="NAME", help="sizes of the model (argonne-2b)")
    parser.add_argument("--vocab-size", type=int, default=151_936, metavar="N", help="where a preset has none (151936)")
    parser.add_argument("--block", type=int, default=4096, metavar="T", help="tokens a sequence (4096)")
    parser.add_argument(
        "--micro-batches", default="2,4,8,16", metavar="N,N", help="tried in turn until one does not fit"
    )
    parser.add_argument("--windows", type=int, default=3, metavar="N", help="windows of steps, of which the median (3)")
    parser.add_argument("--window-steps", type=int, default=3, metavar="N", help="steps of a window (3)")
    parser.add_argument(
        "--variant",
        action="append",
        metavar="NAME:KEY=VALUE,...",
        help="ours with these keyword arguments of TensorParallelModel; may be given again (ours:compiled=true)",
    )
    parser.add_argument(
        "--shards", type=int, default=8, metavar="N", help="one rank of so many as well; 1 for none (8)"
    )
    parser.add_argument("--skip-transformers", action="store_true", help="measure ours alone")
    parser.add_argument(
        "--peer-compile", action=argparse.BooleanOptionalAction, default=None, help="transformers compiled (on a GPU)"
    )
    parser.add_argument("--profile", metavar="FOLDER", help="write each contender's most expensive kernels there")
    parser.add_argument("--json", metavar="PATH", help='write {"ratios": {name: value}, ...} to this file')
    parser.add_argument("--smoke", action="store_true", help="tiny sizes as defaults; also where there is no GPU")
    if parser.parse_args().smoke:
        parser.set_defaults(**SMOKE)
    return parser.parse_args()


def plan_of(given: argparse.Namespace) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """The plan of the measurements, and the options of each variant. Raises UsageError."""
    for flag in ("block", "vocab_size", "windows", "window_steps", "shards"):
        require_at_least_one(f"--{flag.replace('_', '-')}", getattr(given, flag))
    ladder = sorted(counts("--micro-batches", given.micro_batches))
    require_place("--json", given.json)
    import torch

    from benchmarks.training_step.gpu import Plan
    from colonnade.config import load_preset
    from colonnade.model_config import ModelConfig
    from colonnade.parallel.sharding import check_slices

    if not torch.cuda.is_available() and not given.smoke:
        raise UsageError("torch sees no GPU; --smoke tries the command at tiny sizes")
    on_gpu = torch.cuda.is_available()
    if given.peer_compile is None:
        given.peer_compile = on_gpu
    config = ModelConfig.from_dict(load_preset(given.preset)[0], vocab_size=given.vocab_size)
    if config.max_position_embeddings < given.block:
        config = dataclasses.replace(config, max_position_embeddings=given.block)
    check_slices(config, given.shards, None)
    device = "cuda" if on_gpu else "cpu"
    variants = variants_of(given.variant or [f"ours:compiled={str(on_gpu).lower()}"], device)
    make_folder("--profile", given.profile)
    return Plan(config, given.block, ladder, given.windows, given.window_steps, device, given.profile), variants


def variants_of(texts: list[str], device_type: str) -> dict[str, dict[str, Any]]:
    """The model's keyword arguments for each variant, including its attention kernel as `attention`.

    Raises UsageError.
    """
    from benchmarks.training_step.variants import parsed_variants

    variants = parsed_variants(texts, (TRANSFORMERS,), ("attention",), device_type=device_type)
    for name, options in variants.items():
        if options.get("attention", ATTENTION[0]) not in ATTENTION:
            raise UsageError(
                f"--variant {name}: attention is {options['attention']!r}; it is one of {', '.join(ATTENTION)}"
            )
    return variants


def shard_name(variant: str, shards: int) -> str:
    return f"{variant}/shard_of_{shards}"


def ratios_of(found: dict[str, dict[str, Any]], variants: list[str], preset: str, shards: int) -> dict[str, float]:
    """Ratios of tokens per second, and fractions of the rate of bare products."""
    first, *others = variants
    speed = {name: one["best"]["tokens_per_second"] for name, one in found.items()}
    ratios = {
        f"fraction_of_matmul_rate/{preset}/{name}": one["best"]["fraction_of_matmul_rate"]
        for name, one in found.items()
    }
    pairs = {f"{first}_over_{TRANSFORMERS}/{preset}": (first, TRANSFORMERS, 1)}
    pairs |= {f"{name}_over_{first}/{preset}": (name, first, 1) for name in others}
    # This is 1 if one rank of eight takes an eighth of the time of a rank with the whole model.
    pairs |= {
        f"{shard_name(name, shards)}_compute_scaling/{preset}": (shard_name(name, shards), name, shards)
        for name in variants
    }
    ratios |= {
        ratio: speed[above] / speed[below] / parts
        for ratio, (above, below, parts) in pairs.items()
        if above in speed and below in speed
    }
    return ratios


def print_table(found: dict[str, dict[str, Any]], ratios: dict[str, float]) -> None:
    print(f"{'':28s}{'micro-batch':>12s}{'tokens/s':>12s}{'TFLOP/s':>10s}{'of matmul rate':>16s}{'peak GiB':>10s}")
    for name, one in found.items():
        for tried in one["tried"]:
            mark = "*" if tried == one["best"] else " "
            print(
                f"{name:27s}{mark}{tried['micro_batch']:12d}{tried['tokens_per_second']:12.0f}"
                f"{tried['flops_per_second'] / 1e12:10.2f}{tried['fraction_of_matmul_rate']:16.3f}"
                f"{tried['peak_bytes'] / 2**30:10.2f}"
            )
        if one["failed"] is not None:
            print(f"{name:28s}{one['failed']['micro_batch']:12d}  {one['failed']['reason']}")
    rates = [rate for one in found.values() for rate in one["matmul_flops_per_second"]]
    if rates:
        print(f"bare products: {statistics.median(rates) / 1e12:.3f} TFLOP/s, median of {len(rates)}")
    for name, ratio in ratios.items():
        print(f"{name:60s}{ratio:8.3f}")


if __name__ == "__main__":
    launch(main)
