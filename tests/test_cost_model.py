"""Parameters against the real model and transformers; memory against the bytes that torch allocates on the CPU."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from colonnade.model_config import ModelConfig, parameter_shapes
from colonnade.optim.optimizer import allocate_state
from colonnade.tuning.cost_model import Placement, state_memory, step_memory
from colonnade.tuning.flops import device_memory
from distributed.pool import RankPool
from distributed.workers import build, make_optimizer

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
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_are_those_of_the_model_and_of_transformers(name: str, single_rank: None) -> None:
    config = dataclasses.replace(CONFIG, **VARIANTS[name])
    shapes = parameter_shapes(config)
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


def bytes_of(tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def measured(config: ModelConfig, tp: int, micro_batch: int, block: int, kind: str, **options: Any) -> tuple[int, ...]:
    """Bytes of a rank's parameters, gradients and moments, and the most that a step allocates above these."""
    layout, model = build(config, tp, **options)
    optimizer = make_optimizer(kind, model, layout)
    allocate_state(optimizer)
    tokens = torch.randint(0, config.vocab_size, (micro_batch, block), generator=torch.Generator().manual_seed(0))
    model(tokens, tokens).backward()  # in all micro-batches but the first, gradients are there already
    gradients = bytes_of(parameter.grad for parameter in model.parameters())
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model(tokens, tokens).backward()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return bytes_of(model.parameters()), gradients, bytes_of(moments), most


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("vocabulary", [1000, 20_000])
def test_memory_is_what_torch_allocates(
    rank_pool: RankPool, vocabulary: int, precision: str, is_checkpointed: bool
) -> None:
    """With a small vocabulary a layer decides, with a large one the logits."""
    config = dataclasses.replace(CONFIG, vocab_size=vocabulary)
    options = {"compute_dtype": DTYPES[precision], "gradient_checkpointing": is_checkpointed}
    for tp, kind in ((1, "adamw"), (2, "muon")):
        *state, most = rank_pool.run(tp, measured, config, tp, 4, 128, kind, **options)[0]
        placement = Placement(
            tp=tp,
            precision=precision,
            optimizer=kind,
            gradient_checkpointing=is_checkpointed,
            repeats_heads=True,
        )
        memory = step_memory(config, placement, 4, 128)
        assert [memory.parameters, memory.gradients, memory.moments] == state
        assert memory.activations + memory.peak == pytest.approx(most, rel=0.08), f"tp {tp}"


def test_fewer_key_value_heads_than_ranks_are_held_whole(rank_pool: RankPool) -> None:
    config = dataclasses.replace(CONFIG, num_key_value_heads=1)
    *state, _ = rank_pool.run(2, measured, config, 2, 1, 8, "adamw")[0]
    memory = state_memory(config, Placement(tp=2))
    assert [memory.parameters, memory.gradients, memory.moments] == state


def test_memory_of_devices() -> None:
    assert device_memory("NVIDIA H100 80GB HBM3") == device_memory("H100") == 80 * 2**30
    assert device_memory("NVIDIA A100-SXM4-80GB") == device_memory("a100 80gb") == 80 * 2**30
    assert device_memory("NVIDIA A100-PCIE-40GB") == device_memory("A100") == 40 * 2**30
    for unknown in ("cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G"):
        assert device_memory(unknown) is None
