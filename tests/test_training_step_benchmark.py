"""What `benchmarks/step.py` compares with computes the same loss and gradients, and its counts are right."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step as benchmark
from benchmarks.training_step.peers import (
    Contender,
    PlainDecoder,
    dense_loss,
    llama_loss,
    llama_model,
    parallelized,
    plan_loss,
    predecessor_model,
)
from benchmarks.training_step.ranks import step_memory
from benchmarks.training_step.work import Work, step_flops
from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from dense_reference import relative_error
from distributed.pool import RankPool
from distributed.workers import build, whole

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=32,
)
WORK = Work(CONFIG, micro_batch=3, block=32, dtype=torch.float32)


def ours_and(tp: int) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """Layout, whole weights and loss of our model; its gradients are left in place as "gradient of NAME"."""
    layout, model = build(CONFIG, tp)
    share = WORK.share(CPU)
    loss = model(share[:, :-1], share[:, 1:]) / WORK.tokens
    loss.backward()
    gradients = {f"gradient of {name}": value for name, value in whole(model, gradients=True).items()}
    return layout, whole(model) | gradients, loss.detach()


def plain_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): value for name, value in weights.items() if " " not in name}


def worst_gradient(model: torch.nn.Module, weights: dict[str, torch.Tensor], prefix: str = "model.") -> float:
    """The largest relative difference between a gradient of `model` and ours."""
    errors = []
    for name, parameter in model.named_parameters():
        own = weights[f"gradient of {name if name.startswith('lm_head') else prefix + name}"]
        gradient = parameter.grad
        assert gradient is not None, name
        whole_gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        errors.append(relative_error(whole_gradient, own))
    return max(errors)


def of_the_plan() -> tuple[float, float, float]:
    layout, weights, loss = ours_and(2)
    model = PlainDecoder(CONFIG)
    model.load_state_dict(plain_names(weights))
    theirs = plan_loss(parallelized(model, layout.tp_mesh), WORK, CPU)()
    return float(loss), float(theirs), worst_gradient(model, weights)


def test_the_decoder_under_torchs_plan_is_ours(rank_pool: RankPool) -> None:
    for ours, theirs, gradient in rank_pool.run(2, of_the_plan):
        assert theirs == pytest.approx(ours, rel=1e-5)
        assert gradient < 1e-5


def of_the_predecessor() -> tuple[float, float, float]:
    layout, weights, loss = ours_and(2)
    model = predecessor_model(CONFIG, 2)
    cuts = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0, "o_proj": 1, "down_proj": 1}
    local = {
        name: value.chunk(2, cuts[name.split(".")[-2]])[layout.tp_rank] if name.split(".")[-2] in cuts else value
        for name, value in plain_names(weights).items()
    }
    model.load_state_dict(local)
    theirs = dense_loss(model, WORK, CPU)()
    gradient = model.embed_tokens.weight.grad
    assert gradient is not None
    return float(loss), float(theirs), relative_error(gradient, weights["gradient of model.embed_tokens.weight"])


def test_the_predecessor_has_the_loss_and_not_the_gradients(rank_pool: RankPool) -> None:
    for ours, theirs, gradient in rank_pool.run(2, of_the_predecessor):
        assert theirs == pytest.approx(ours, rel=1e-5)
        assert gradient > 1e-2


def test_transformers_and_the_plain_decoder_are_ours(single_rank: None) -> None:
    _, weights, loss = ours_and(1)
    theirs = llama_model(CONFIG)
    theirs.load_state_dict({name: value for name, value in weights.items() if " " not in name})
    plain = PlainDecoder(CONFIG)
    plain.load_state_dict(plain_names(weights))
    assert float(llama_loss(theirs, WORK, CPU)()) == pytest.approx(float(loss), rel=1e-5)
    assert float(dense_loss(plain, WORK, CPU)()) == pytest.approx(float(loss), rel=1e-5)
    assert worst_gradient(theirs, weights, prefix="") < 1e-5
    assert worst_gradient(plain, weights) < 1e-5


def test_transformers_compiled_needs_no_mask() -> None:
    """With one, torch could not take its fastest kernel, and the comparison would flatter ours."""
    found: list[torch.fx.Node] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        found.extend(node for node in graph.graph.nodes if node.target is F.scaled_dot_product_attention)
        return graph

    model = llama_model(CONFIG)
    model.compile(backend=backend, dynamic=False)
    eager = llama_loss(model.eval(), WORK, CPU)
    assert float(eager()) > 0
    assert len(found) == CONFIG.num_hidden_layers
    for node in found:
        assert node.kwargs["attn_mask"] is None
        assert node.kwargs["is_causal"] is True


def test_operations_are_those_that_torch_counts() -> None:
    # The unfused kernel: torch sees each product of it, forward and backward, over all pairs of tokens.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        dense_loss(PlainDecoder(CONFIG), WORK, CPU)()
    assert counter.get_total_flops() == step_flops(CONFIG, WORK.micro_batch, WORK.block, causal=False)
    skipped = WORK.micro_batch * CONFIG.num_hidden_layers * 12 * 64 * WORK.block * (WORK.block - 1) // 2
    assert step_flops(CONFIG, WORK.micro_batch, WORK.block) == counter.get_total_flops() - skipped


def test_memory_is_what_is_held_and_the_most_above_it() -> None:
    def step() -> torch.Tensor:
        first = torch.empty(2**20, dtype=torch.uint8)
        del first
        second, third = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**19, dtype=torch.uint8)
        del second, third
        return torch.zeros(())

    held = [torch.empty(1000, dtype=torch.uint8)]
    assert 0 <= step_memory(Contender(step, lambda: held), CPU) - 1000 - 2**20 - 2**19 < 1000


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--vocabularies", "64k"], "'64k'"),
        (["--precisions", "fp8"], "'fp8'"),
        (["--only", "megatron"], "'megatron'"),
        (["--rounds", "0"], "at least 1"),
        (["--json", "no/such/folder/step.json"], "no folder"),
    ],
)
def test_a_bad_value_is_named(flags: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", *flags])
    with pytest.raises(UsageError, match=told):
        benchmark.main()
