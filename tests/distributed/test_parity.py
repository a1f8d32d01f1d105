"""Tensor and data parallelism against the dense model: losses, every merged gradient, norms, trajectories, bits."""

import dataclasses

import pytest
import torch

from colonnade.errors import UsageError
from colonnade.parallel.sharding import check_slices
from dense_reference import assert_gradients_equal, dense_logits, dense_loss, relative_error
from distributed.step_workers import every_token, optimizer_steps
from distributed.workers import loss_and_gradients, tokens_for
from model import ModelConfig

CONFIG = ModelConfig(
    vocab_size=257,  # divisible by no tensor-parallel size; the last ranks of eight hold nothing but padding
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=12,
    max_position_embeddings=64,
)
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one key/value head": {"num_key_value_heads": 1},
}


def dense_step(config, weights, dtype):
    """Loss and gradients of the dense reference from the same weights."""
    leaves = {name: value[: config.vocab_size] if is_vocabulary(name) else value for name, value in weights.items()}
    leaves = {name: value.to(dtype).clone().requires_grad_() for name, value in leaves.items()}
    ids, labels = tokens_for(config, 3)
    loss = dense_loss(leaves, config.to_dict(), ids, labels)
    loss.backward()
    return loss.detach(), leaves


def is_vocabulary(name):
    return "embed_tokens" in name or "lm_head" in name


def assert_step_equals_dense(config, results, dtype):
    loss_limit, gradient_limit = (1e-10, 1e-10) if dtype == torch.float64 else (1e-6, 1e-5)
    main = results[0]
    loss, leaves = dense_step(config, main["parameters"], dtype)
    for rank, result in enumerate(results):
        assert float(result["loss"]) == pytest.approx(float(loss), rel=loss_limit), f"rank {rank}"
    assert_gradients_equal(main["gradients"], {name: leaf.grad for name, leaf in leaves.items()}, gradient_limit)
    norm = torch.nn.utils.clip_grad_norm_(list(leaves.values()), 1.0)
    for result in results:
        assert float(result["norm"]) == pytest.approx(float(norm), rel=gradient_limit)
    ids, _ = tokens_for(config, 3)
    with torch.no_grad():
        assert relative_error(main["logits"], dense_logits(leaves, config.to_dict(), ids)) <= gradient_limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_step_equals_dense(rank_pool, tp, variant, dtype):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    results = rank_pool.run(tp, loss_and_gradients, config, tp, param_dtype=dtype, seed=5)
    assert_step_equals_dense(config, results, dtype)


@pytest.mark.parametrize("tp", [3, 5])
def test_step_equals_dense_where_the_vocabulary_does_not_divide(rank_pool, tp):
    """512 padded rows and an odd number of ranks: the last one holds fewer."""
    heads = {"num_attention_heads": 15, "num_key_value_heads": 15, "head_dim": 4, "intermediate_size": 90}
    config = dataclasses.replace(CONFIG, **heads, vocab_size=500)
    assert config.padded_vocab_size % tp
    assert_step_equals_dense(config, rank_pool.run(tp, loss_and_gradients, config, tp, seed=5), torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"replicate_embeddings": True},
        {"slices": 8},
        {"sequence_parallel": True},
        {"sequence_parallel": True, "slices": 8, "activation_checkpointing": "full"},
        {"sequence_parallel": True, "replicate_embeddings": True, "activation_checkpointing": "selective"},
        {"overlap_collectives": True},
        {"overlap_collectives": True, "slices": 8, "activation_checkpointing": "full"},
        {"overlap_collectives": True, "sequence_parallel": True, "activation_checkpointing": "selective"},
    ],
    ids=lambda options: "+".join(options),
)
# At 8 ranks slices share key/value heads, some hold nothing but padding, and 72 tokens are 9 for each.
@pytest.mark.parametrize("tp", [2, 8])
def test_step_equals_dense_with_options(rank_pool, tp, options):
    results = rank_pool.run(tp, loss_and_gradients, CONFIG, tp, seed=5, **options)
    assert_step_equals_dense(CONFIG, results, torch.float32)


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": "full", "slices": 8}])
def test_compiled_step_equals_dense(rank_pool, options):
    results = rank_pool.run(2, loss_and_gradients, CONFIG, 2, seed=5, compiled=True, **options)
    assert_step_equals_dense(CONFIG, results, torch.float32)


def test_initial_weights_are_equal_to_the_bit(rank_pool):
    expected = rank_pool.run(1, loss_and_gradients, CONFIG, 1, seed=11)[0]["parameters"]
    for world_size, tp in [(2, 2), (4, 4), (8, 8), (4, 2), (2, 1)]:
        actual = rank_pool.run(world_size, loss_and_gradients, CONFIG, tp, seed=11)[0]["parameters"]
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(actual[name], value), f"{name} at tp {tp}"
    other = rank_pool.run(1, loss_and_gradients, CONFIG, 1, seed=12)[0]["parameters"]
    assert not torch.equal(other["lm_head.weight"], expected["lm_head.weight"])


def dense_trajectory(config, weights, dtype, steps):
    """The dense model under torch's own AdamW and clip_grad_norm_."""
    leaves = {name: value[: config.vocab_size] if is_vocabulary(name) else value for name, value in weights.items()}
    leaves = {name: value.to(dtype).clone().requires_grad_() for name, value in leaves.items()}
    decaying = [leaf for leaf in leaves.values() if leaf.ndim > 1]
    others = [leaf for leaf in leaves.values() if leaf.ndim == 1]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    ids, labels = every_token(config, 8)
    losses = []
    for _ in range(steps):
        loss = dense_loss(leaves, config.to_dict(), ids, labels) / (labels != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, {name: leaf.detach() for name, leaf in leaves.items()}


@pytest.mark.parametrize(("world_size", "tp"), [(1, 1), (2, 2), (4, 4), (8, 8), (4, 2), (2, 1)])
def test_ten_steps_equal_dense(rank_pool, world_size, tp):
    for dtype in (torch.float64, torch.float32):
        results = rank_pool.run(world_size, optimizer_steps, CONFIG, tp, 10, param_dtype=dtype, seed=5)
        losses, parameters = dense_trajectory(CONFIG, results[0]["initial"], dtype, 10)
        for result in results:
            torch.testing.assert_close(
                result["losses"], losses, rtol=1e-10 if dtype == torch.float64 else 2e-5, atol=0.0
            )
            for name, value in result["copies"].items():
                assert torch.equal(value, results[0]["copies"][name]), f"{name} differs between ranks"
        if dtype == torch.float64:
            for name, value in parameters.items():
                error = float((results[0]["parameters"][name][: value.shape[0]] - value).abs().max())
                assert error <= 1e-9, name
        assert float(losses[-1]) < float(losses[0])


@pytest.mark.parametrize(
    ("changes", "tp", "slices", "message"),
    [
        ({}, 3, None, "8 attention heads cannot be cut into 3; sizes that work: 1, 2, 4, 8"),
        ({"intermediate_size": 100}, 8, None, "feed-forward of 100 cannot be cut into 8; sizes that work: 1, 2, 4"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, None, "6 key/value heads are neither .* of 4"),
        ({}, 4, 2, "--tensor-slices 2 cannot be shared out over 4"),
        ({}, 1, 6, "--tensor-slices 6 is not a power of two"),
        ({}, 1, 16, "--tensor-slices 16: 8 attention heads cannot be cut into 16; sizes that work: 1, 2, 4, 8"),
    ],
)
def test_sizes_that_cannot_be_cut_are_refused(changes, tp, slices, message):
    with pytest.raises(UsageError, match=message):
        check_slices(dataclasses.replace(CONFIG, **changes), tp, slices)
