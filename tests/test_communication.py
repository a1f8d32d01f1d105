"""Calls and bytes of collectives against those of real ranks, and by hand; the predicted time by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training_step.work import PRECISIONS
from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from colonnade.optim.muon import newton_schulz, newton_schulz_flops
from colonnade.optim.step import optimizer_step
from colonnade.tuning.communication import step_traffic
from colonnade.tuning.cost_model import ParallelConfig, run_flops
from colonnade.tuning.step_time import Machine, interconnect_of, link_of, repeated_flops, step_time
from colonnade.tuning.traffic import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, BROADCAST, REDUCE_SCATTER, Computation, Traffic
from distributed.pool import RankPool
from distributed.workers import build, make_optimizer

CONFIG = ModelConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
NAMES = {
    "allreduce_": ALL_REDUCE,
    "_allgather_base_": ALL_GATHER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
    "alltoall_base_": ALL_TO_ALL,
    "broadcast_": BROADCAST,
}


class Counted(TorchDispatchMode):
    """Of each collective that is called its calls, and the bytes of the largest tensor of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = NAMES.get(function._opname, function._opname)
            self.calls[name] += 1
            self.sizes[name] += max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
        return function(*args, **(kwargs or {}))


def counted(
    config: ModelConfig, parallel: ParallelConfig, micro_batch: int, block: int, accumulation: int
) -> dict[str, tuple[int, int]]:
    """The collectives of a real step."""
    dtype = PRECISIONS[parallel.precision]
    mode, lower = parallel.data_parallel_shard, None if parallel.precision == "fp32" else dtype
    _, model = build(
        config,
        parallel.tp,
        None if mode == "none" else {"mode": mode, "gather_dtype": lower},
        parallel.replicas,
        compute_dtype=dtype,
        activation_checkpointing=parallel.activation_checkpointing,
        sequence_parallel=parallel.sequence_parallel,
        overlap_collectives=parallel.overlap_collectives,
        replicate_embeddings=parallel.replicate_embeddings,
        shares_memory=False,
    )
    is_in_bf16 = parallel.optimizer == "muon" and not parallel.on_cpu
    optimizer = make_optimizer("muon in bf16" if is_in_bf16 else parallel.optimizer, model)
    share = torch.randint(0, config.vocab_size, (micro_batch * accumulation, block + 1))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with Counted() as seen:
        optimizer_step(
            model,
            optimizer,
            scaler,
            share,
            accumulation=accumulation,
            targets=share.numel(),
            max_grad_norm=1.0,
            plain=not parallel.overlaps_gradients,
        )
    return {name: (seen.calls[name], seen.sizes[name]) for name in seen.calls}


def predicted(traffic: list[Traffic]) -> dict[str, tuple[int, int]]:
    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for one in traffic:
        calls[one.collective] += one.calls
        sizes[one.collective] += one.size
    return {name: (calls[name], sizes[name]) for name in calls}


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"tp": 2, "activation_checkpointing": "none"}, {}),
        ({"tp": 2, "precision": "bf16"}, {"num_key_value_heads": 1, "model_type": "qwen3"}),
        ({"tp": 2, "activation_checkpointing": "selective", "overlap_collectives": True}, {}),
        ({"tp": 2, "replicate_embeddings": True}, {}),
        ({"tp": 2, "sequence_parallel": True}, {"attention_bias": True, "mlp_bias": True}),
        ({"tp": 2, "sequence_parallel": True, "overlap_collectives": True}, {}),
        ({"tp": 2, "sequence_parallel": True, "replicate_embeddings": True}, {}),
        ({"dp": 2}, {"vocab_size": 5000}),
        ({"dp": 2, "overlaps_gradients": False}, {"vocab_size": 5000}),
        ({"dp": 2, "data_parallel_shard": "zero2", "precision": "bf16"}, {}),
        ({"dp": 2, "data_parallel_shard": "zero3", "precision": "bf16"}, {}),
        ({"dp": 4, "data_parallel_shard": "zero3", "replicas": 2}, {}),
        ({"dp": 2, "tp": 2, "data_parallel_shard": "zero3", "sequence_parallel": True}, {}),
        (
            # Replicated parameters are gathered in bf16, and their gradients summed over tp in float32.
            {"dp": 2, "tp": 2, "data_parallel_shard": "zero3", "sequence_parallel": True, "precision": "bf16"},
            {"num_key_value_heads": 1, "model_type": "qwen3"},
        ),
        ({"dp": 2, "tp": 2, "optimizer": "muon"}, {}),
        ({"dp": 2, "tp": 2, "optimizer": "muon", "on_cpu": True}, {}),
        ({"tp": 4, "optimizer": "muon"}, {"num_key_value_heads": 1}),
        ({"dp": 3, "data_parallel_shard": "zero2", "optimizer": "muon"}, {}),
        ({"dp": 4, "tp": 2, "data_parallel_shard": "zero3", "replicas": 2, "optimizer": "muon"}, {}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "plain",
)
def test_collectives_are_those_of_real_ranks(
    rank_pool: RankPool, options: dict[str, Any], sizes: dict[str, Any]
) -> None:
    config = dataclasses.replace(CONFIG, **sizes)
    parallel = ParallelConfig(**{"precision": "fp32", **options})
    arguments = (config, parallel, 3, 24, 2)
    found = rank_pool.run(parallel.tp * parallel.dp, counted, *arguments)[0]
    assert predicted(step_traffic(*arguments)) == found


def test_bytes_by_hand() -> None:
    """Two layers, hidden 64, three sequences of 24 tokens in fp32, two micro-batches."""
    activation = 3 * 24 * 64 * 4
    traffic = step_traffic(CONFIG, ParallelConfig(tp=2, precision="fp32", activation_checkpointing="none"), 3, 24, 2)
    found = {one.what: one for one in traffic if one.what.startswith("layers")}
    # Forward the sums of attention and feed-forward, backward those of each.
    assert {what: (one.calls, one.size) for what, one in found.items()} == {
        "layers": (2 * 2 * 2, 2 * 2 * 2 * activation),
        "layers, backward: attention": (2 * 2, 2 * 2 * activation),
        "layers, backward: feed-forward": (2 * 2, 2 * 2 * activation),
    }
    assert all(one.sent == one.size for one in found.values())  # 2 (G - 1) / G at two ranks
    (gradients,) = step_traffic(CONFIG, ParallelConfig(dp=4, precision="fp32"), 3, 24, 2)
    padding = (1024 - 1000) * 64 * 2
    assert gradients.size == 4 * (CONFIG.num_parameters + padding) + 4
    assert gradients.sent == 1.5 * gradients.size


MACHINE = Machine(1e12, 0.5, 1.0, 8, link_of("--interconnect", "100", 1e-3), link_of("--network", "10", 2e-3))


def time_of(parallel: ParallelConfig, *traffic: Traffic) -> Any:
    return step_time(CONFIG, parallel, MACHINE, traffic, tokens=10**6, block=64, accumulation=2)


def test_time_is_computation_and_what_is_not_hidden() -> None:
    model = run_flops(CONFIG, 10**6, 64) / (2 * 0.5e12)
    parallel = ParallelConfig(tp=2, activation_checkpointing="none")
    # 10^11 bytes at 10^11 a second, and three calls.
    plain = time_of(parallel, Traffic("tp", "layers", ALL_GATHER, 2, 3, 2 * 10**11))
    assert plain.compute == pytest.approx(model)
    assert (plain.communication, plain.hidden) == (pytest.approx(1.003), 0)
    assert plain.seconds == pytest.approx(model + 1.003)
    # More than the computation cannot be hidden.
    overlapped = time_of(parallel, Traffic("tp", "layers", ALL_GATHER, 2, 3, 2 * 10**11, "step"))
    assert overlapped.hidden == pytest.approx(model)
    assert overlapped.seconds == pytest.approx(1.003)
    # Gradients hide in the last of two backward passes, each two thirds of its forward and backward pass.
    gradients = Traffic("dp", "gradients", ALL_REDUCE, 2, 1, 10**11, "last backward pass")
    replicated = time_of(ParallelConfig(dp=2, activation_checkpointing="none"), gradients)
    assert replicated.hidden == pytest.approx(model * 2 / 3 / 2)


def test_links_reach_a_part_of_their_rate() -> None:
    """Twice 10^11 bytes at a quarter of 10^11 a second, and what is hidden grows with it; latency does not."""
    parallel = ParallelConfig(tp=2, activation_checkpointing="none")
    slower = dataclasses.replace(MACHINE, link_utilisation=0.25)
    layers = Traffic("tp", "layers", ALL_REDUCE, 2, 3, 2 * 10**9, "step")
    statistics = Traffic("tp", "statistics", ALL_REDUCE, 2, 3, 2 * 10**11)
    found = step_time(CONFIG, parallel, slower, (layers, statistics), tokens=10**6, block=64, accumulation=2)
    assert found.communication == pytest.approx(0.08 + 0.003 + 8 + 0.003)
    assert found.hidden == pytest.approx(0.08 + 0.003)
    assert found.seconds == pytest.approx(found.compute + 8.003)
    assert found.unhidden == pytest.approx(found.compute + 8.086)


@pytest.mark.parametrize(
    ("parallel", "group", "port", "rate"),
    [
        (ParallelConfig(dp=16), "dp", 10, 80),  # eight ranks of the group in each node, a port for each
        (ParallelConfig(tp=2, dp=8), "dp", 10, 40),
        (ParallelConfig(tp=8, dp=2), "dp", 10, 10),
        (ParallelConfig(tp=16), "tp", 10, 80),
        (ParallelConfig(dp=16), "dp", 20, 100),  # no faster than within a node
        (ParallelConfig(dp=8), "dp", 10, 100),  # within a node
        (ParallelConfig(dp=16, data_parallel_shard="zero3", replicas=2), "dp", 10, 100),
        (ParallelConfig(dp=16, data_parallel_shard="zero3", replicas=2), "replicas", 10, 10),
        (ParallelConfig(tp=2, dp=8, data_parallel_shard="zero3", replicas=2), "replicas", 10, 10),
        (ParallelConfig(tp=2, dp=16, data_parallel_shard="zero3", replicas=8), "replicas", 10, 20),
    ],
)
def test_groups_across_nodes_use_the_ports_of_all_their_ranks(
    parallel: ParallelConfig, group: str, port: int, rate: int
) -> None:
    machine = dataclasses.replace(MACHINE, network=link_of("--network", str(port), 0))
    ranks = {"tp": parallel.tp, "dp": parallel.shards if parallel.replicas > 1 else parallel.dp}
    traffic = Traffic(group, "", ALL_REDUCE, ranks.get(group, parallel.replicas), 0, 10**12)
    found = step_time(CONFIG, parallel, machine, (traffic,), tokens=10**6, block=64, accumulation=1)
    assert found.communication == pytest.approx(traffic.sent / (rate * 1e9))


def test_groups_that_share_a_link_take_turns() -> None:
    """Alone each would be hidden; a step cannot be shorter than all that its link sends."""
    parallel = ParallelConfig(tp=2, dp=2, activation_checkpointing="none")
    compute = run_flops(CONFIG, 10**6, 64) / (4 * 0.5e12)
    sent = int(0.8 * compute * 1e11)
    layers = Traffic("tp", "layers", ALL_GATHER, 2, 0, 2 * sent, "step")
    blocks = Traffic("dp", "blocks", ALL_GATHER, 2, 0, 2 * sent, "step")
    assert time_of(parallel, layers).seconds == pytest.approx(compute)
    assert time_of(parallel, blocks).seconds == pytest.approx(compute)
    assert time_of(parallel, layers, blocks).seconds == pytest.approx(1.6 * compute)


def test_sums_of_f_hide_behind_gradients_of_column_parallel_weights() -> None:
    parallel = ParallelConfig(tp=2, activation_checkpointing="none")
    # Two layers, hidden 64, 4 + 2 * 2 heads of 16, 2 * 96 channels; two FLOPs an element and token, on two ranks.
    weights: dict[Computation, int] = {"gradients of q, k, v": 8 * 16, "gradients of gate, up": 2 * 96}
    for name, channels in weights.items():
        products = 2 * 10**6 * 2 * 64 * channels / (2 * 0.5e12)
        long = Traffic("tp", "layers", ALL_REDUCE, 2, 0, 10**11, name)
        short = Traffic("tp", "layers", ALL_REDUCE, 2, 0, 10**8, name)
        assert time_of(parallel, long).hidden == pytest.approx(products)
        assert time_of(parallel, short).hidden == pytest.approx(1e-3)
        assert 1e-3 < products < 1


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_what_goes_on_behind_each_sum_of_the_layers(sequence_parallel: bool) -> None:
    def behind(**options: Any) -> dict[str, str | None]:
        parallel = ParallelConfig(tp=2, sequence_parallel=sequence_parallel, activation_checkpointing="none", **options)
        traffic = step_traffic(CONFIG, parallel, 2, 24, 1)
        return {one.what: one.behind for one in traffic if one.what.startswith("layers")}

    own = {
        "layers": None,
        "layers, backward: attention": "gradients of q, k, v",
        "layers, backward: feed-forward": "gradients of gate, up",
    }
    assert behind() == own
    assert behind(overlap_weight_gradients=False) == dict.fromkeys(own)
    assert behind(overlap_collectives=True) == dict.fromkeys(own, "step")


def test_what_is_computed_again_counts() -> None:
    # Of a token and layer: q, k, v, o; scores and their sum; gate and up. The last product is not needed again.
    feed_forward = 2 * 2 * 64 * 96
    attention = 2 * 64 * (64 + 32 + 32 + 64) + 4 * 64 * 64
    assert repeated_flops(CONFIG, "full", 10, 64) == 10 * 2 * (feed_forward + attention)
    assert repeated_flops(CONFIG, "selective", 10, 64) == 10 * 2 * feed_forward
    assert repeated_flops(CONFIG, "none", 10, 64) == 0


def test_links() -> None:
    assert link_of("--network", "ethernet-100g", 0).bandwidth == 100e9 / 8
    assert link_of("--network", "2.5", 0).bandwidth == 2.5e9
    devices = ("NVIDIA H200", "H100", "NVIDIA H100 PCIe", "A100 80GB", "NVIDIA A100-PCIE-40GB", "L4", "B200")
    pcie = ("NVIDIA A100 80GB PCIe", "NVIDIA H200 NVL")
    assert [interconnect_of(gpu) for gpu in pcie] == ["pcie4", "pcie4"]
    assert [interconnect_of(gpu) for gpu in devices] == [
        "nvlink4",
        "nvlink4",
        "pcie4",
        "nvlink3",
        "pcie4",
        "pcie4",
        "nvlink5",
    ]
    for value in ("fast", "0", "nan", "-1"):
        with pytest.raises(UsageError, match=r"--network .* is no link that is known; give one of nvlink3"):
            link_of("--network", value, 0)


@pytest.mark.parametrize(
    ("collective", "share"),
    [(ALL_REDUCE, 1.5), (ALL_GATHER, 0.75), (REDUCE_SCATTER, 0.75), (ALL_TO_ALL, 0.75), (BROADCAST, 1.0)],
)
def test_what_a_link_carries(collective: str, share: float) -> None:
    assert Traffic("dp", "something", collective, 4, 1, 1000).sent == 1000 * share


def test_muon_adds_its_iterations() -> None:
    """The matrices of two layers over four ranks, the largest first: six of feed-forward, q and o, k and v."""
    parallel = ParallelConfig(tp=2, dp=2, activation_checkpointing="none")
    operations = 0
    for longer, shorter in [(96, 64), (96, 64), (64, 64), (64, 32)]:  # the first matrix of each round of four
        # Five times [m, n] [n, m], [m, m] [m, m] and [m, m] [m, n], two operations a product and sum.
        operations += 5 * 2 * (shorter * longer * shorter + shorter**3 + shorter * shorter * longer)
    plain, muon = (time_of(dataclasses.replace(parallel, optimizer=name)).compute for name in ("adamw", "muon"))
    assert muon - plain == pytest.approx(operations / 0.5e12, rel=1e-6)
    lower = dataclasses.replace(MACHINE, bf16_peak=4e12)
    parallel = dataclasses.replace(parallel, optimizer="muon")
    faster = step_time(CONFIG, parallel, lower, (), tokens=10**6, block=64, accumulation=2).compute
    assert faster - plain == pytest.approx(operations / 2e12, rel=1e-6)


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)])
def test_operations_of_the_iterations_are_those_that_torch_counts(shape: tuple[int, int]) -> None:
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.ones(shape), torch.float32)
    assert newton_schulz_flops(shape) == counter.get_total_flops()
