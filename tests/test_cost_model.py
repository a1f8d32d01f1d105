"""Parameters against the real model and transformers; memory against the bytes that torch allocates on the CPU."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.training_step.allocated import allocated
from colonnade.model_config import ModelConfig, layer_shapes, outer_shapes
from colonnade.tuning.cost_model import ParallelConfig, state_memory, step_memory
from colonnade.tuning.flops import device_memory
from distributed.pool import RankPool
from distributed.workers import build

CONFIG = ModelConfig(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=256,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"num_key_value_heads": 1, "head_dim": 24},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_are_those_of_the_model_and_of_transformers(name: str, single_rank: None) -> None:
    config = dataclasses.replace(CONFIG, **VARIANTS[name])
    shapes = outer_shapes(config) | {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in layer_shapes(config).items()
    }
    _, model = build(config, 1)
    padded: dict[tuple[int, ...], tuple[int, ...]] = {
        (config.padded_vocab_size, config.hidden_size): (config.vocab_size, config.hidden_size)
    }
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: padded.get(shape, shape) for name, shape in own.items()} == shapes
    with torch.device("meta"):
        twin = LlamaForCausalLM(LlamaConfig(**config.to_dict()))
    assert {name: tuple(parameter.shape) for name, parameter in twin.named_parameters()} == shapes
    assert config.num_parameters == sum(map(math.prod, shapes.values())) == model.num_parameters()
    assert config.num_parameters_without_embeddings == model.num_parameters(embeddings=False)


PARALLEL_CONFIGS: dict[str, dict[str, Any]] = {
    "kept": {"activation_checkpointing": "none"},
    "feed-forward again": {"activation_checkpointing": "selective"},
    "blocks again": {},
    "two ranks": {"tp": 2, "activation_checkpointing": "none", "optimizer": "muon"},
    "two ranks, blocks again": {"tp": 2},
    "sequence parallel": {"tp": 2, "activation_checkpointing": "none", "sequence_parallel": True},
    "sequence parallel, overlapped": {"tp": 2, "sequence_parallel": True, "overlap_collectives": True},
    "zero2": {"dp": 2, "data_parallel_shard": "zero2", "activation_checkpointing": "none"},
    "zero2, eight ranks, blocks again": {"dp": 8, "data_parallel_shard": "zero2", "optimizer": "muon"},
    "zero3": {"dp": 2, "data_parallel_shard": "zero3", "activation_checkpointing": "none"},
    "zero3, two ranks, blocks again": {"dp": 2, "tp": 2, "data_parallel_shard": "zero3"},
}


def compare(
    rank_pool: RankPool, config: ModelConfig, parallel: ParallelConfig, accumulation: int = 2, micro_batch: int = 4
) -> None:
    found = rank_pool.run(1, allocated, config, parallel, micro_batch, 128, accumulation)[0]
    memory = step_memory(config, parallel, micro_batch, 128, accumulation)
    assert (memory.parameters, memory.optimizer) == (found.parameters, found.moments)
    assert memory.total - memory.parameters - memory.optimizer == pytest.approx(found.step, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PARALLEL_CONFIGS)
def test_memory_is_what_torch_allocates(rank_pool: RankPool, name: str, precision: str) -> None:
    """With a small vocabulary a layer decides, or the end of the step."""
    compare(rank_pool, CONFIG, ParallelConfig(precision=precision, on_cpu=True, **PARALLEL_CONFIGS[name]))


@pytest.mark.parametrize(
    ("options", "accumulation"),
    [
        ({"activation_checkpointing": "none"}, 4),
        ({"tp": 2}, 6),  # as many levels of the tree as with 8
        ({"dp": 2, "data_parallel_shard": "zero2"}, 4),
        ({"dp": 8, "data_parallel_shard": "zero3"}, 4),
    ],
    ids=["kept", "two ranks", "zero2", "zero3"],
)
def test_gradients_wait_in_the_tree_of_the_deterministic_mode(
    rank_pool: RankPool, options: dict[str, Any], accumulation: int
) -> None:
    for precision in ("fp32", "bf16"):
        parallel = ParallelConfig(precision=precision, deterministic=True, on_cpu=True, **options)
        compare(rank_pool, CONFIG, parallel, accumulation, 1)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("shard", ["none", "zero2", "zero3"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_memory_where_the_embedding_decides(rank_pool: RankPool, is_tied: bool, shard: str, accumulation: int) -> None:
    """Few tokens and a large table: its gradient comes last, and a tied head's waits for it."""
    config = dataclasses.replace(CONFIG, vocab_size=12_000, num_hidden_layers=2, tie_word_embeddings=is_tied)
    sharing: dict[str, Any] = {} if shard == "none" else {"dp": 8, "data_parallel_shard": shard}
    for precision in ("fp32", "bf16"):
        compare(rank_pool, config, ParallelConfig(precision=precision, on_cpu=True, **sharing), accumulation, 1)


@pytest.mark.parametrize(
    ("sizes", "accumulation", "micro_batch"),
    [
        ({"vocab_size": 12_000}, 2, 4),  # the head decides
        ({"vocab_size": 5000, "tie_word_embeddings": True}, 2, 4),
        ({}, 1, 4),  # gradients come while activations go
        ({}, 2, 1),  # gradients are handed to the parameters
        ({"num_key_value_heads": 1, "model_type": "qwen3"}, 2, 4),
    ],
    ids=["large vocabulary", "tied", "one micro-batch", "few tokens", "norms of heads"],
)
def test_memory_of_other_sizes(rank_pool: RankPool, sizes: dict[str, Any], accumulation: int, micro_batch: int) -> None:
    config = dataclasses.replace(CONFIG, **sizes)
    parallel = ParallelConfig(precision="bf16", on_cpu=True, activation_checkpointing="none")
    compare(rank_pool, config, parallel, accumulation, micro_batch)


def test_fewer_key_value_heads_than_ranks_are_held_whole(rank_pool: RankPool) -> None:
    config = dataclasses.replace(CONFIG, num_key_value_heads=1)
    found = rank_pool.run(1, allocated, config, ParallelConfig(tp=2), 1, 8)[0]
    parameters, gradients, moments = state_memory(config, ParallelConfig(tp=2))
    assert (parameters, moments) == (found.parameters, found.moments)
    assert gradients == parameters


@pytest.mark.parametrize(
    ("name", "quoted"),
    [
        # "has a total capacity of ... GiB", in out-of-memory errors of torch.
        ("NVIDIA H200", (139.80, 139.81)),
        ("NVIDIA H100 80GB HBM3", (79.11,)),
        ("NVIDIA H100 NVL", (93.00,)),
        ("NVIDIA A100-SXM4-80GB", (79.15, 79.25)),
        ("NVIDIA A100-PCIE-40GB", (39.50,)),
        ("NVIDIA L40S", (44.42, 44.53)),
        ("NVIDIA L4", (22.03,)),
        ("NVIDIA GeForce RTX 4090", (23.52, 23.68)),
        ("Tesla V100-SXM2-32GB", (31.74, 31.75)),
        ("Tesla T4", (14.75, 14.76)),
    ],
)
def test_memory_of_devices_is_what_torch_reports(name: str, quoted: tuple[float, ...]) -> None:
    memory = device_memory(name)
    assert memory is not None
    assert all(0.99 * gib <= memory / 2**30 <= gib for gib in quoted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_this_device() -> None:
    memory = device_memory(torch.cuda.get_device_name())
    if memory is None:
        pytest.skip("a device that is not listed")
    assert memory == pytest.approx(torch.cuda.get_device_properties(0).total_memory, rel=0.02)


def test_names_of_devices() -> None:
    assert device_memory("NVIDIA H100 80GB HBM3") == device_memory("H100")
    assert device_memory("NVIDIA A100-SXM4-80GB") == device_memory("a100 80gb") != device_memory("A100")
    assert device_memory("NVIDIA A100-PCIE-40GB") == device_memory("A100")
    # The number in the name is that of the CPU's memory.
    assert device_memory("NVIDIA GH200 480GB") == 96 * 2**30
    for unknown in ("cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G"):
        assert device_memory(unknown) is None
