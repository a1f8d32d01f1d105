"""The predicted time of a step: matrix products and collectives at a fraction of the devices' and links' peak.

    seconds = FLOPs / (ranks x peak x utilisation) + sum over collectives of
        (sent / (bandwidth x link utilisation) + latency) - hidden

FLOPs are those of the model, of activation recomputation and of Muon's iterations. `sent` is what a rank sends in a
ring (Thakur et al., 2005, doi:10.1177/1094342005051521; `Traffic.sent`). `hidden` is the communication time that
overlaps with computation (`Traffic.behind`), at most the duration of that computation:

    tp    with --overlap-collectives, the layers' collectives hide behind all computation; without it, only the backward
          sums of f do, behind the products for the column-parallel weights' gradients
    dp    unsharded gradients hide behind the last micro-batch's backward pass; zero2 behind the first forward and the
          last backward pass; zero3 behind all computation

Kernel overheads, the optimizer's element-wise update, data loading and ranks waiting for each other are covered by
`utilisation` or not at all.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from colonnade.tuning.cost_model import ParallelConfig, run_flops
from colonnade.tuning.flops import device_memory
from colonnade.tuning.orthogonalisation import orthogonalisation_flops
from colonnade.tuning.traffic import Computation, Traffic

# GB/s (10^9 bytes) that a GPU sends in one direction, from the vendors' data sheets. For NVLink these give the sum of
# both directions: 600 (A100), 900 (H100, H200), 1800 (B200). PCIe with 16 lanes; networks with one port per GPU.
LINKS: dict[str, float] = {
    "nvlink3": 300.0,
    "nvlink4": 450.0,
    "nvlink5": 900.0,
    "pcie4": 32.0,
    "pcie5": 64.0,
    "infiniband-hdr": 25.0,
    "infiniband-ndr": 50.0,
    "ethernet-400g": 50.0,
    "ethernet-100g": 12.5,
}
_OF_DEVICES = (
    (r"\bB200\b", "nvlink5"),
    (r"\bG?H[12]00\b(?!.*(PCIe|NVL))", "nvlink4"),
    (r"\bA100\b(?!.*PCIe)", "nvlink3"),
)
WITHOUT_NVLINK = "pcie4"
LATENCY_IN_NODE, LATENCY_ACROSS = 10e-6, 30e-6
"""Seconds per call regardless of its size: guesses, which matter if there are many small calls."""


@dataclass(frozen=True)
class Link:
    """`bandwidth` in bytes per second that a GPU sends in one direction; `latency` in seconds per call."""

    name: str
    bandwidth: float
    latency: float


def link_of(flag: str, value: str, latency: float) -> Link:
    """A link, given by its name in `LINKS` or as a number of GB/s.

    Raises:
        UsageError: `value` is neither.
    """
    rate = LINKS.get(value)
    if rate is None:
        try:
            rate = float(value)
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise UsageError(
                f"{flag} {value!r:.80} is no link that is known; give one of {', '.join(LINKS)}, or GB/s as a number "
                "above 0"
            )
    return Link(value, rate * 1e9, latency)


def interconnect_of(gpu: str) -> str | None:
    """The link within a node that a device is usually sold with; None for an unknown device."""
    for pattern, name in _OF_DEVICES:
        if re.search(pattern, gpu, re.IGNORECASE):
            return name
    return None if device_memory(gpu) is None else WITHOUT_NVLINK


@dataclass(frozen=True)
class Machine:
    """The devices and the links between them.

    Attributes:
        peak: FLOP/s of one device in the precision of matrix products.
        utilisation: the fraction of the peak that computation reaches.
        link_utilisation: the fraction of a link's bandwidth that collectives reach.
        gpus_per_node: number of neighbouring ranks connected by `interconnect`; others communicate over `network`.
        bf16_peak: FLOP/s of one device in bfloat16, in which Muon iterates on accelerators in any precision; None if it
            is `peak` or unknown.
    """

    peak: float
    utilisation: float
    link_utilisation: float
    gpus_per_node: int
    interconnect: Link
    network: Link
    bf16_peak: float | None = None

    def link(self, traffic: Traffic, parallel: ParallelConfig) -> tuple[Link, float]:
        """The slowest link that a group's rings cross, and the bytes per second that a rank sends over all of them.

        Rank order: tp innermost, then shards, then replicas. Across nodes, what a group sends is divided into one ring
        for each of its ranks in a node, as in NCCL, and each ring leaves the node through another rank's port.
        """
        stride = {"tp": 1, "dp": parallel.tp, "replicas": parallel.tp * parallel.shards}[traffic.group]
        if stride * traffic.ranks <= self.gpus_per_node:
            return self.interconnect, self.interconnect.bandwidth
        rings = max(1, self.gpus_per_node // stride)
        return self.network, min(rings * self.network.bandwidth, self.interconnect.bandwidth)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        compute: time of matrix products.
        communication: time of all collectives, hidden or not.
        hidden: the part of `communication` that overlaps with computation.
    """

    compute: float
    communication: float
    hidden: float

    @property
    def seconds(self) -> float:
        return self.compute + self.communication - self.hidden

    @property
    def unhidden(self) -> float:
        """Seconds of the step if no communication overlapped with computation."""
        return self.compute + self.communication

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "seconds": self.seconds}


def repeated_flops(config: ModelConfig, checkpointing: str, tokens: int, block: int) -> int:
    """FLOPs of activation recomputation for `tokens` tokens. It stops before the last product (down_proj)."""
    product = 2 * config.hidden_size * config.intermediate_size
    if checkpointing == "none":
        return 0
    again = 2 * product
    if checkpointing == "full":
        width = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        again += 2 * config.hidden_size * (2 * width + 2 * shared) + 4 * width * block
    return tokens * config.num_hidden_layers * again


def _column_weights(config: ModelConfig) -> dict[Computation, int]:
    """Elements of all layers' column-parallel weights, keyed by the computation of their gradients."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    of_channel = config.num_hidden_layers * config.hidden_size
    return {
        "gradients of q, k, v": of_channel * heads * config.head_dim,
        "gradients of gate, up": of_channel * 2 * config.intermediate_size,
    }


def step_time(
    config: ModelConfig,
    parallel: ParallelConfig,
    machine: Machine,
    traffic: Sequence[Traffic],
    *,
    tokens: int,
    block: int,
    accumulation: int,
) -> StepTime:
    """The predicted time of a step of `tokens` tokens over all ranks, in sequences of `block` tokens."""
    rate = parallel.tp * parallel.dp * machine.peak * machine.utilisation
    model = run_flops(config, tokens, block) / rate
    again = repeated_flops(config, parallel.activation_checkpointing, tokens, block) / rate
    compute, forward = model + again, model / 3
    lasting: dict[Computation, float] = {
        "step": compute,
        "micro-batch": compute / accumulation,
        "last backward pass": (compute - forward) / accumulation,
    }
    lasting |= {name: 2 * tokens * elements / rate for name, elements in _column_weights(config).items()}
    total = 0.0
    behind: dict[tuple[Link, str, Computation], float] = defaultdict(float)
    for one in traffic:
        link, bandwidth = machine.link(one, parallel)
        seconds = one.sent / (bandwidth * machine.link_utilisation) + one.calls * link.latency
        total += seconds
        if one.behind is not None:
            behind[link, one.group, one.behind] += seconds
    # Groups that share a link take turns on it: in total they hide no more than the time of all computation.
    hidden: dict[Link, float] = defaultdict(float)
    for (link, _, computation), seconds in behind.items():
        hidden[link] += min(seconds, lasting[computation])
    covered = sum(min(seconds, compute) for seconds in hidden.values())
    if parallel.optimizer == "muon":  # runs after the overlap above; each rank works on one whole matrix at a time
        peak = machine.bf16_peak or machine.peak
        compute += orthogonalisation_flops(config, parallel) / (peak * machine.utilisation)
    return StepTime(compute, total, covered)
