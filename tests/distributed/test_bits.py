"""The deterministic mode: losses, norms, parameters and moments to the bit, whatever the number of ranks."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from colonnade.errors import RunError, UsageError
from colonnade.optim.gradients import halves, leaf_order, sum_over_data_parallel
from colonnade.optim.optimizer import create_adamw, fused_keeps_bits
from colonnade.optim.step import micro_batches_of
from colonnade.parallel.determinism import check_micro_batches
from distributed.pool import RankPool
from distributed.test_parity import CONFIG
from distributed.workers import deterministic_steps, drift_of, fingerprints_of_changes, signed_zeros

BITS_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

MODELS = {
    "untied, odd vocabulary": CONFIG,
    "tied": dataclasses.replace(CONFIG, tie_word_embeddings=True),
    "biases, one key/value head": dataclasses.replace(
        CONFIG, attention_bias=True, mlp_bias=True, num_key_value_heads=1
    ),
    # No width is a multiple of a vector register's, and no slice starts on a cache line.
    "odd sizes": dataclasses.replace(
        CONFIG, hidden_size=50, intermediate_size=88, head_dim=6, num_key_value_heads=2, vocab_size=200
    ),
}
STEPS = 3
# (ranks, tp) and with which model: together every tp and dp, alone each model's own difficulty.
SHAPES = {
    "untied, odd vocabulary": [(2, 2), (8, 8), (4, 1), (8, 4)],
    "tied": [(4, 2)],
    "biases, one key/value head": [(2, 1), (4, 4)],
    "odd sizes": [(2, 2), (4, 2)],
}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """torch.equal takes -0.0 for 0.0 and no NaN for itself; the integers of the same memory know better."""
    kind = BITS_OF[left.element_size()]
    return torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def differing(expected: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    """What is not the same to the bit, by name."""
    found = []
    for rank, result in enumerate(results):
        found += [f"{key} of rank {rank}" for key in ("bits", "fingerprint", "fused") if result[key] != expected[key]]
    actual = results[0]["tensors"]
    assert actual.keys() == expected["tensors"].keys()
    return found + [name for name, value in expected["tensors"].items() if not same_bits(actual[name], value)]


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_number_of_ranks_trains_to_the_same_bits(
    rank_pool: RankPool, name: str, compute_dtype: torch.dtype
) -> None:
    options = {"slices": 8, "compute_dtype": compute_dtype, "seed": 2}
    expected = rank_pool.run(1, deterministic_steps, MODELS[name], 1, STEPS, **options)[0]
    assert len(set(expected["bits"])) == STEPS, "training stands still"
    for world_size, tp in SHAPES[name]:
        results = rank_pool.run(world_size, deterministic_steps, MODELS[name], tp, STEPS, **options)
        assert not differing(expected, results), f"tp {tp}, dp {world_size // tp}"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("untied, odd vocabulary", {"activation_checkpointing": "full"}),
        ("biases, one key/value head", {"activation_checkpointing": "selective", "compute_dtype": torch.bfloat16}),
        ("untied, odd vocabulary", {"compute_dtype": torch.float16}),
        ("odd sizes", {"compute_dtype": torch.float16}),  # a loss scale with the unfused update
        ("biases, one key/value head", {"sequence_parallel": True}),
        ("tied", {"overlap_collectives": True, "compute_dtype": torch.bfloat16}),
        ("untied, odd vocabulary", {"sequence_parallel": True, "overlap_collectives": True}),
        ("untied, odd vocabulary", {"compiled": True}),
        ("biases, one key/value head", {"compiled": True}),
        ("tied", {"compiled": True, "compute_dtype": torch.bfloat16, "activation_checkpointing": "full"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_every_way_to_compute_keeps_its_bits(rank_pool: RankPool, name: str, options: dict[str, Any]) -> None:
    options = {"slices": 4, "seed": 2, **options}
    config = dataclasses.replace(MODELS[name], num_hidden_layers=1 if "compiled" in options else 2)
    # Activations that are computed again are the ones that were thrown away.
    plain = {**options, "activation_checkpointing": "none"}
    expected = rank_pool.run(1, deterministic_steps, config, 1, STEPS, **plain)[0]
    for world_size, tp in [(2, 2)] if "compiled" in options else [(2, 2), (4, 2)]:
        results = rank_pool.run(world_size, deterministic_steps, config, tp, STEPS, **options)
        assert not differing(expected, results), f"tp {tp}, dp {world_size // tp}"
    if options.get("compute_dtype") == torch.float16:
        scales = [scale for _, _, scale in expected["bits"]]
        assert scales[0] == 2.0**20, "no step was taken"
        assert scales[-1] < 2.0**20 or name == "odd sizes", "no step was skipped"


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_ranks_that_add_nothing_keep_the_sign_of_zero(rank_pool: RankPool, tp: int) -> None:
    for hidden, gradient in rank_pool.run(tp, signed_zeros, CONFIG, tp):
        assert same_bits(hidden, torch.full_like(hidden, -0.0))
        assert same_bits(gradient, torch.full_like(gradient, -0.0))


def addends_of(rank: int) -> list[torch.Tensor]:
    """What a rank adds: two gradients with a collective of their own, small ones of three dtypes, one transposed."""
    generator = torch.Generator().manual_seed(rank)
    shapes = [((2**18 + 3,), torch.float32), ((7,), torch.float32), ((512, 515), torch.float32)]
    shapes += [((), torch.float64), ((5, 3), torch.bfloat16), ((11, 13), torch.float32)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape, dtype in shapes]
    return [*drawn[:-1], drawn[-1].T]


def summed_over_ranks() -> list[torch.Tensor]:
    tensors = addends_of(dist.get_rank())
    assert dist.group.WORLD is not None
    sum_over_data_parallel(tensors, dist.group.WORLD, fixed_order=True)
    return tensors


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_gradients_are_summed_over_ranks_in_the_tree(rank_pool: RankPool, ranks: int) -> None:
    leaves = [addends_of(rank) for rank in leaf_order(range(ranks))]
    while len(leaves) > 1:
        pairs = zip(leaves[::2], leaves[1::2], strict=True)
        leaves = [[one + other for one, other in zip(left, right, strict=True)] for left, right in pairs]
    for found in rank_pool.run(ranks, summed_over_ranks):
        assert [same_bits(actual, expected) for actual, expected in zip(found, leaves[0], strict=True)] == [True] * 6


def tree_of(items: list[Any]) -> Any:
    """The tree over a global batch, written out as nested pairs."""
    return items[0] if len(items) == 1 else tuple(tree_of(list(half)) for half in halves(items))


@pytest.mark.parametrize("count", [1, 2, 4, 6, 8, 12, 40])
def test_every_rank_holds_a_subtree_of_the_global_batch(count: int) -> None:
    """With chunks g on rank g mod dp, ranks' own trees joined over the ranks are the tree of one rank."""
    chunks = torch.arange(3 * count)  # micro-batches of three chunks
    whole = tree_of([tuple(batch.tolist()) for batch in micro_batches_of(chunks, count)])
    dp = 1
    while count % dp == 0:
        subtrees = []
        for rank in range(dp):
            mine = micro_batches_of(chunks[rank::dp], count // dp)
            subtrees.append(tree_of([tuple(batch.tolist()) for batch in mine]))
        ordered = [subtrees[rank] for rank in leaf_order(range(dp))]
        while len(ordered) > 1:  # as `tree_sum` joins neighbours
            ordered = [(left, right) for left, right in zip(ordered[::2], ordered[1::2], strict=True)]
        assert ordered[0] == whole, f"dp {dp}"
        check_micro_batches(3 * count, 3, dp)
        dp *= 2
    with pytest.raises(UsageError, match=f"--deterministic: {dp} data-parallel ranks cannot halve the {count} micro-"):
        check_micro_batches(3 * count, 3, dp)


def test_a_fingerprint_sees_every_bit_and_its_place(rank_pool: RankPool) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    before, *flipped, mended, moved = rank_pool.run(1, fingerprints_of_changes, CONFIG, name)[0]
    for after in [*flipped, moved]:
        assert {other for other in before if after[other] != before[other]} == {name}
    assert len({after[name] for after in [before, *flipped]}) == 33
    assert mended == before


def test_copies_that_differ_are_told_with_their_ranks(rank_pool: RankPool) -> None:
    config = MODELS["biases, one key/value head"]  # which at tp 2 both ranks hold whole
    head, cut, moment = (
        f"model.layers.0.{name}"
        for name in ("self_attn.k_proj.weight", "mlp.up_proj.weight", "mlp.up_proj.weight.exp_avg")
    )
    flips = [(head, 3), (cut, 1), (moment, 2)]
    results = rank_pool.run(4, drift_of, config, 2, flips)
    assert results == results[:1] * 4
    before, after = results[0]
    assert before.drifted == {}
    assert after.drifted == {
        head: "rank 3 differs from the 3 others",
        cut: "ranks 1 and 3 differ, and no majority tells which is right",
        moment: "ranks 0 and 2 differ, and no majority tells which is right",
    }
    with pytest.raises(RunError, match=rf"copies of {head} after step 5: rank 3 differs .*\(2 other tensors differ"):
        after.require_equal_copies(5)
    # As one rank alone has it.
    assert rank_pool.run(1, drift_of, config, 1, [])[0][0] == before


def test_adamw_is_fused_where_that_keeps_the_bits_of_a_shard() -> None:
    """The reference is AdamW on the whole parameter; fused, it fails where a shard ends off a vector's border."""
    generator = torch.Generator().manual_seed(0)
    for length, fused in ((96, True), (50, False)):
        whole = torch.randn(8 * length, generator=generator)
        gradient = torch.randn(8 * length, generator=generator)
        assert fused_keeps_bits([torch.nn.Parameter(whole)], [8]) is fused

        def stepped(part: slice, values: torch.Tensor = whole, slopes: torch.Tensor = gradient) -> torch.Tensor:
            holder = torch.nn.Module()
            holder.weight = torch.nn.Parameter(values[part].clone())
            kept = fused_keeps_bits([torch.nn.Parameter(values)], [8])
            optimizer = create_adamw(holder, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=kept)
            for _ in range(3):
                holder.weight.grad = slopes[part].clone()
                optimizer.step()
            state = optimizer.state[holder.weight]
            return torch.stack([holder.weight.detach(), state["exp_avg"], state["exp_avg_sq"]])

        parts = [stepped(slice(start, start + length)) for start in range(0, 8 * length, length)]
        assert same_bits(torch.cat(parts, dim=1), stepped(slice(None)))
