"""`benchmarks/gpu_step.py` as far as it can be held to something without a GPU."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_step import ratios_of, variants_of
from benchmarks.training_step.gpu import DTYPE, Plan, our_shard
from benchmarks.training_step.ours import our_contender, our_optimizer
from benchmarks.training_step.work import Work, step_flops
from colonnade.errors import UsageError
from test_training_step_benchmark import CONFIG


def test_a_shard_without_its_peers_computes_its_share() -> None:
    plan = Plan(CONFIG, 32, [3], 1, 1, "cpu", None)
    model = our_shard(plan, {}, 2)
    try:
        step = our_contender(model, our_optimizer(model), Work(CONFIG, 3, 32, DTYPE)).step
        # The unfused kernel: torch sees each product of it, forward and backward, over all pairs of tokens.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step()
    finally:
        dist.destroy_process_group()
    assert counter.get_total_flops() * 2 == step_flops(CONFIG, 3, 32, causal=False)


def test_a_variant_is_a_name_and_arguments_of_the_model() -> None:
    found = variants_of(["eager:compiled=false,slices=4", "plain", "c:attention=cudnn,z_loss=1"], "cpu")
    assert found == {"eager": {"compiled": False, "slices": 4}, "plain": {}, "c": {"attention": "cudnn", "z_loss": 1.0}}
    for text in (
        "eager:compile=true",
        ":compiled=true",
        "transformers:compiled=true",
        "eager:compiled",
        "c:attention=best",
        "a:compiled=maybe",
        "a:activation_checkpointing=bogus",
        "a:z_loss=abc",
        "a:cuda_graphs=true",
    ):
        with pytest.raises(UsageError, match="--variant"):
            variants_of([text], "cpu")
    with pytest.raises(UsageError, match="one of that name already"):
        variants_of(["a:compiled=true", "a:overlap_collectives=true"], "cpu")


def test_ratios_are_of_what_was_measured() -> None:
    speeds = {"ours": 30, "eager": 24, "transformers": 20, "ours/shard_of_8": 192}
    found = {
        name: {"best": {"tokens_per_second": speed, "fraction_of_matmul_rate": speed / 100}}
        for name, speed in speeds.items()
    }
    assert ratios_of(found, ["ours", "eager"], "tiny", 8) == {
        "fraction_of_matmul_rate/tiny/ours": 0.3,
        "fraction_of_matmul_rate/tiny/eager": 0.24,
        "fraction_of_matmul_rate/tiny/transformers": 0.2,
        "fraction_of_matmul_rate/tiny/ours/shard_of_8": 1.92,
        "ours_over_transformers/tiny": 1.5,
        "eager_over_ours/tiny": 0.8,
        "ours/shard_of_8_compute_scaling/tiny": 0.8,
    }
