"""What makes a step faster or smaller changes nothing of it: steps with a switch against steps without."""

import dataclasses
from typing import Any

import pytest
import torch

from colonnade.decoder.float8 import check_float8_sizes
from colonnade.errors import UsageError
from dense_reference import relative_error
from distributed.pool import RankPool
from distributed.test_parity import CONFIG, dense_step
from distributed.workers import loss_and_gradients, outcome_of_steps

# Every size of a product is a multiple of 16 at tp 2.
FLOAT8 = dataclasses.replace(CONFIG, head_dim=16)


@pytest.mark.parametrize("tp", [1, 2])
def test_weights_kept_over_micro_batches_change_nothing(rank_pool: RankPool, tp: int) -> None:
    """In bf16, two micro-batches, data-parallel where there is one tensor-parallel rank."""
    options = {"compute_dtype": torch.bfloat16, "seed": 5}
    plain = rank_pool.run(2, outcome_of_steps, CONFIG, tp, plain=True, **options)
    kept = rank_pool.run(2, outcome_of_steps, CONFIG, tp, plain=False, **options)
    assert plain[0]["losses"] != plain[0]["losses"][:1] * len(plain[0]["losses"]), "training stands still"
    for expected, actual in zip(plain, kept, strict=True):
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    for name, value in plain[0]["parameters"].items():
        assert relative_error(kept[0]["parameters"][name], value) < 1e-4, name


@pytest.mark.parametrize("options", [{}, {"sequence_parallel": True, "activation_checkpointing": "full"}], ids=str)
@pytest.mark.parametrize("tp", [1, 2])
def test_float8_is_near_the_dense_model(rank_pool: RankPool, tp: int, options: dict[str, Any]) -> None:
    """e4m3 has three bits of mantissa: a relative rounding of up to 2 ** -4 for each factor."""
    result = rank_pool.run(tp, loss_and_gradients, FLOAT8, tp, seed=5, float8=True, **options)[0]
    exact = rank_pool.run(tp, loss_and_gradients, FLOAT8, tp, seed=5, **options)[0]
    loss, leaves = dense_step(FLOAT8, result["parameters"], torch.float32)
    assert float(result["loss"]) == pytest.approx(float(loss), rel=2e-3)
    assert not torch.equal(result["loss"], exact["loss"]), "nothing was rounded"
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert relative_error(result["gradients"][name][: len(leaf)], leaf.grad) < 0.1, name


def test_sizes_that_float8_cannot_take_are_refused() -> None:
    for changes, block, slices, fixed, message in (
        ({}, 61, 1, False, "--block-size 61 is no multiple of 16; use 48 or 64, or leave it out"),
        ({}, 7, 1, False, "--block-size 7 is no multiple of 16; use 16, or leave it out"),
        ({"intermediate_size": 96}, 64, 4, False, "with 4 slices the feed-forward is 24, .*smaller --tensor-parallel-"),
        ({"intermediate_size": 96}, 64, 4, True, "with 4 slices the feed-forward is 24, .*smaller --tensor-slices, or"),
        (
            {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8},
            64,
            1,
            False,
            "8, .*use another model, or",
        ),
        ({"hidden_size": 72}, 64, 2, True, "with 2 slices the hidden size is 72, .* 16; use another model, or leave"),
    ):
        config = dataclasses.replace(FLOAT8, **changes)
        with pytest.raises(UsageError, match=message):
            check_float8_sizes(config, block, slices, fixed_slices=fixed)
    check_float8_sizes(FLOAT8, 64, 2, fixed_slices=False)
