"""Speed and memory of our training step and of others', all measured in the same processes.

    python benchmarks/step.py
    python benchmarks/step.py --json step.json --rounds 9 --vocabularies 32k --precisions fp32

1. Start two tensor-parallel ranks: gloo and one thread each on the CPU, a GPU each with `--device cuda`.
2. The contenders keep their models in memory and take turns step by step, so that other load on the machine affects
   all of them. Every other round runs in reverse order.
3. A ratio is the median of the rounds' ratios, so a few disturbed rounds do not affect it.

A step is a complete optimizer step: forward and backward of one micro-batch, gradient norm, clipping and fused AdamW,
with float32 parameters. Ratios are of speeds:

    ours_over_torch_tp        ours at tp 2 over the same decoder under torch's `parallelize_module` and `loss_parallel`
    ours_over_predecessor     ours at tp 2 over the scheme of this project's predecessor
    tp2_over_tp1              ours at tp 2 over ours in one process that has the threads of both ranks
    ours_over_transformers    ours in one process over `LlamaForCausalLM` in one process
    fraction_of_matmul_rate   the FLOP rate of our step's matrix products and attention (`step_flops`) over that of bare
                              products on the same ranks, in the shape that is fastest on this machine
    NAME_over_ours            a variant of ours (--variant) over ours: compiled:compiled=true;
                              sockets:shares_memory=false; or other arguments of the model
    deterministic_over_default   the deterministic mode (V = 4 slices at tp 2) over the default one: smaller sizes, CPU

Keys end in precision and vocabulary, as in `ours_over_torch_tp/fp32/32k`. With one GPU there is one rank, and only the
ratios that need a single rank. All run eagerly; with --compile all are compiled, which on the CPU needs a C++ compiler
and minutes. The contenders form two groups, which are not in memory at the same time (it would not
suffice for a vocabulary of 152k); ours is in both.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flag_checks import make_folder, names, require_at_least_one
from colonnade.decoder.compilation import require_compiler
from colonnade.errors import UsageError
from colonnade.files import require_place
from colonnade.flags import OneLineParser
from colonnade.runtime.launch import launch

if TYPE_CHECKING:
    from benchmarks.training_step.ranks import Measured
    from benchmarks.training_step.work import Work

RANKS = 2
FEWEST_ROUNDS = 5
PRECISIONS = ("fp32", "bf16")
MODES = "deterministic"
# The names that --only takes, and the ratio each one asks for: (name, numerator, denominator).
RATIOS = {
    "torch_tp": ("ours_over_torch_tp", "ours", "torch_tp"),
    "predecessor": ("ours_over_predecessor", "ours", "predecessor"),
    "matmul": ("fraction_of_matmul_rate", "ours", "matmul"),
    "ours_tp1": ("tp2_over_tp1", "ours", "ours_tp1"),
    "transformers": ("ours_over_transformers", "ours_tp1", "transformers"),
}
GROUPS = (("ours", "torch_tp", "predecessor", "matmul"), ("ours", "ours_tp1", "transformers"))
# With one rank: the ratios that need only one.
ONE_RANK_RATIOS = {
    "matmul": ("fraction_of_matmul_rate", "ours_tp1", "matmul"),
    "transformers": RATIOS["transformers"],
}
ONE_RANK_GROUPS = (("ours_tp1", "transformers", "matmul"),)


def main() -> None:
    given = parsed()
    vocabularies = names("--vocabularies", given.vocabularies, ("32k", "152k"))
    asked = names("--precisions", given.precisions, PRECISIONS) if given.precisions else None
    for flag, value in (("--rounds", given.rounds), ("--mode-rounds", given.mode_rounds)):
        require_at_least_one(flag, value)
    require_place("--json", given.json)
    if given.rounds < FEWEST_ROUNDS:
        print(f"note: the median of {given.rounds} rounds says little; give --rounds {FEWEST_ROUNDS}", file=sys.stderr)
    cases, modes_too = asked_for(given)
    precisions = asked or default_precisions(cases.device_type)
    report: dict[str, Any] = {
        "ratios": {},
        "cases": {},
        "machine": machine(cases.device_type, cases.ranks),
        "compiled": cases.compiled,
    }
    if cases.wanted:
        for precision in precisions:
            for vocabulary in vocabularies:
                case = measured_case(precision, vocabulary, cases)
                report["cases"][f"{precision}/{vocabulary}"] = case
                report["ratios"] |= case.pop("ratios")
                write(report, given.json)
    if modes_too:
        modes = deterministic_over_default(precisions, given.mode_rounds)
        report["ratios"] |= modes
        print_ratios(modes)
    write(report, given.json)


@dataclass(frozen=True)
class Cases:
    """The measurements to make for every precision and vocabulary.

    Attributes:
        wanted: (ratio, numerator, denominator) of each ratio.
        compiled: whether every contender is compiled.
        variants: options of our model, by name of the contender.
        profile_folder: where to write the tables of kernels; None for no profile.
    """

    wanted: list[tuple[str, str, str]]
    compiled: bool
    variants: dict[str, dict[str, Any]]
    rounds: int
    device_type: str
    ranks: int
    profile_folder: Path | None

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The groups of contenders that are in memory together, reduced to those that a wanted ratio needs."""
        groups = []
        first, *others = GROUPS if self.ranks > 1 else ONE_RANK_GROUPS
        for group in (first, *((*other, *self.variants) for other in others)):
            needed = {name for _, *pair in self.wanted if set(pair) <= set(group) for name in pair}
            if needed:
                groups.append(tuple(name for name in group if name in needed))
        return groups


def asked_for(given: argparse.Namespace) -> tuple[Cases, bool]:
    """What to measure, and whether to measure the deterministic mode as well. Raises UsageError."""
    from benchmarks.training_step.variants import parsed_variants

    usual = (*RATIOS, MODES)
    device_type, ranks = device_and_ranks(given.device)
    variants = parsed_variants(given.variant, ("ours", *RATIOS), device_type=device_type)
    chosen = names("--only", given.only, usual) if given.only else [] if variants else list(usual)
    if device_type == "cpu" and (given.compile or any(options.get("compiled") for options in variants.values())):
        require_compiler()
    if variants and ranks < RANKS:
        raise UsageError(f"--variant needs {RANKS} ranks; on one GPU it is benchmarks/gpu_step.py that takes variants")
    table = RATIOS if ranks > 1 else ONE_RANK_RATIOS
    wanted = [table[name] for name in chosen if name in table]
    wanted += [(f"{name}_over_ours", name, "ours") for name in variants]
    if not wanted and MODES not in chosen:
        raise UsageError(f"--only {given.only} needs two ranks; on one GPU there are {', '.join(ONE_RANK_RATIOS)}")
    folder = None if given.profile is None else Path(given.profile)
    make_folder("--profile", folder)
    return Cases(wanted, given.compile, variants, given.rounds, device_type, ranks, folder), MODES in chosen


def parsed() -> argparse.Namespace:
    usual = ",".join((*RATIOS, MODES))
    parser = OneLineParser(description="Speed of a training step; the higher a ratio, the better.")
    parser.add_argument("--json", metavar="PATH", help='write {"ratios": {name: value}, ...} to this file')
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="steps of each contender (5)")
    parser.add_argument("--vocabularies", default="32k,152k", metavar="NAMES", help="32k,152k")
    parser.add_argument(
        "--precisions", metavar="NAMES", help="fp32,bf16; without bf16 where its products are slower than those of fp32"
    )
    parser.add_argument("--only", metavar="NAMES", help=f"compare with: {usual} (all, or with --variant none)")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="compare with ours with these keyword arguments of TensorParallelModel; may be given again",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile every contender (not the two modes), each in its usual way"
    )
    parser.add_argument("--profile", metavar="FOLDER", help="write each contender's most expensive kernels there")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, else cpu")
    parser.add_argument("--mode-rounds", type=int, default=11, metavar="N", help="of deterministic_over_default (11)")
    return parser.parse_args()


def device_and_ranks(asked: str | None) -> tuple[str, int]:
    """The device type to measure on, and the number of ranks."""
    import torch

    count = torch.cuda.device_count() if asked != "cpu" else 0
    if asked == "cuda" and not count:
        raise UsageError("--device cuda: torch sees no GPU; use --device cpu")
    return ("cuda", min(RANKS, count)) if count else ("cpu", RANKS)


def default_precisions(device_type: str) -> list[str]:
    """Both, unless this is a CPU without bf16 instructions, which emulates them at a tenth of fp32's speed."""
    import torch

    if device_type == "cuda":
        return list(PRECISIONS)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(512, 512).to(dtype)
        torch.mm(x, x)
        began = time.perf_counter()
        torch.mm(x, x)
        seconds[dtype] = time.perf_counter() - began
    if seconds[torch.bfloat16] < 2 * seconds[torch.float32]:
        return list(PRECISIONS)
    print(
        "bf16 is left out: this processor only emulates its products; --precisions fp32,bf16 measures it all the same"
    )
    return ["fp32"]


def machine(device_type: str, ranks: int) -> dict[str, Any]:
    """The hardware and software that the numbers depend on."""
    import torch

    name = torch.cuda.get_device_name() if device_type == "cuda" else processor()
    return {"device": name, "ranks": ranks, "torch": torch.__version__, "python": platform.python_version()}


def processor() -> str:
    """The number and name of the CPU's cores, if the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(found)} x {found[0]}" if found else platform.processor()


def deterministic_over_default(precisions: list[str], rounds: int) -> dict[str, float]:
    """Speed of the deterministic mode over the default one, for each precision and the lowest of these."""
    from benchmarks.training_step.ours import compare_modes
    from benchmarks.training_step.ranks import on_ranks

    print("deterministic mode and default one", file=sys.stderr)
    ratios = {
        f"deterministic_over_default_{precision}": on_ranks(RANKS, compare_modes, precision, rounds)
        for precision in precisions
    }
    return {"deterministic_over_default": min(ratios.values()), **ratios}


# --------------------------------------------------------------------------------------------------------- one case


def measured_case(precision: str, vocabulary: str, cases: Cases) -> dict[str, Any]:
    """Measure ratios, tokens per second and memory for one precision and vocabulary; also print them as a table."""
    from benchmarks.training_step.ranks import measure_case, on_ranks
    from benchmarks.training_step.work import VOCABULARIES, work

    step = work(VOCABULARIES[vocabulary], precision)
    profiles = None if cases.profile_folder is None else str(cases.profile_folder / f"{precision}_{vocabulary}_")
    print(f"{precision}, vocabulary {vocabulary}", file=sys.stderr)
    arguments = (step, cases.groups, cases.rounds, cases.device_type, cases.compiled, cases.variants, profiles)
    case = summary(step, on_ranks(cases.ranks, measure_case, *arguments), cases)
    case["ratios"] = {f"{name}/{precision}/{vocabulary}": value for name, value in case["ratios"].items()}
    print_case(f"{precision}/{vocabulary}", case)
    return case


def summary(step: Work, measured: list[dict[str, Measured]], cases: Cases) -> dict[str, Any]:
    """Medians over the rounds of what the ranks have measured, group by group."""
    from benchmarks.training_step.ranks import MATMUL
    from benchmarks.training_step.work import step_flops

    flops = step_flops(step.config, step.micro_batch, step.block)
    case: dict[str, Any] = {"ratios": {}, "tokens_per_second": {}, "peak_mib": {}, "loss": {}, "seconds": {}}
    for group in measured:
        steps = {name: one for name, one in group.items() if not name.startswith(MATMUL)}
        for name, one in steps.items():
            case["tokens_per_second"].setdefault(name, step.tokens / statistics.median(one.seconds))
            case["peak_mib"].setdefault(name, one.memory / 2**20)
            case["loss"].setdefault(name, one.loss)
            case["seconds"].setdefault(name, one.seconds)
        for ratio, first, second in cases.wanted:
            if first in steps and second in steps:
                pairs = zip(steps[first].seconds, steps[second].seconds, strict=True)
                case["ratios"][ratio] = statistics.median(theirs / own for own, theirs in pairs)
        rates = product_rates(group, cases.device_type, cases.ranks)
        if rates:
            best = max(rates, key=lambda name: statistics.median(rates[name]))
            case["matmul_gflops"] = {name: statistics.median(found) / 1e9 for name, found in rates.items()}
            case["fraction_of_matmul_rate"] = {
                name: statistics.median(flops / s / rate for s, rate in zip(one.seconds, rates[best], strict=True))
                for name, one in steps.items()
            }
    for ratio, first, second in cases.wanted:
        if second == MATMUL:
            case["ratios"][ratio] = case["fraction_of_matmul_rate"][first]
    case["ratios"] = {name: case["ratios"][name] for name, *_ in cases.wanted}
    check_losses(case["loss"], math.log(step.config.vocab_size))
    return case


def product_rates(group: dict[str, Measured], device_type: str, ranks: int) -> dict[str, list[float]]:
    """FLOP/s of each bare product, over all ranks together, in each round."""
    from benchmarks.training_step.ranks import PRODUCTS, product_flops, product_name, product_repeats

    rates = {}
    for shape in PRODUCTS:
        if product_name(shape) in group:
            flops = ranks * product_flops(shape) * product_repeats(shape, device_type)
            rates[product_name(shape)] = [flops / seconds for seconds in group[product_name(shape)].seconds]
    return rates


def check_losses(losses: dict[str, float], expected: float) -> None:
    """Check that each contender's first loss is about ln V, as expected of random weights in the same computation."""
    for name, loss in losses.items():
        if not abs(loss - expected) < 0.5:
            raise AssertionError(f"{name} begins with the loss {loss:.3f}, and not about {expected:.3f}")


def print_case(title: str, case: dict[str, Any]) -> None:
    print(f"\n{title:20s}{'tokens/s':>12s}{'peak MiB':>12s}{'of matmul rate':>16s}")
    shares = case.get("fraction_of_matmul_rate", {})
    for name, speed in case["tokens_per_second"].items():
        share = f"{shares[name]:16.3f}" if name in shares else ""
        print(f"{name:20s}{speed:12.0f}{case['peak_mib'][name]:12.0f}{share}")
    for name, rate in case.get("matmul_gflops", {}).items():
        print(f"{name:32s}{rate:8.1f} GFLOP/s")
    print_ratios(case["ratios"])
    print(flush=True)


def print_ratios(ratios: dict[str, float]) -> None:
    for name, ratio in ratios.items():
        print(f"{name:44s}{ratio:8.3f}")


def write(report: dict[str, Any], path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    launch(main)
