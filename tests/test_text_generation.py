"""Generation with a cache of keys and values, against `transformers`' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from colonnade.decoder.key_value_cache import KeyValueCache
from colonnade.errors import UsageError
from colonnade.parallel.mesh import init_parallel
from distributed.workers import generated
from foreign_models import save_foreign_model
from run import text_generation
from run.text_generation import Sampling, check_length, generate_tokens

PROMPTS = [[5, 9, 77], [3, 1, 4, 1, 5, 9, 2, 6, 5], [120]]
COUNT = 20


@pytest.mark.parametrize("family", ["llama-biases-tied", "llama3-scaling", "qwen2", "qwen3", "ernie4_5", "smollm3"])
def test_greedy_tokens_are_those_of_transformers(rank_pool: Any, tmp_path: Path, family: str) -> None:
    theirs = save_foreign_model(tmp_path, family)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = theirs.generate(ids, max_new_tokens=COUNT, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected.append(whole[0, len(prompt) :].tolist())
    for tp in (1, 2):
        together = rank_pool.run(tp, generated, tmp_path, tp, PROMPTS, COUNT, Sampling(temperature=0))[0]
        assert together == expected, f"a batch padded on the left, tp {tp}"
    alone = rank_pool.run(1, generated, tmp_path, 1, PROMPTS[1:2], COUNT, Sampling(temperature=0))[0]
    assert alone == expected[1:2]


def test_ranks_that_share_out_parameters_do_not_keep_them(rank_pool: Any, tmp_path: Path) -> None:
    save_foreign_model(tmp_path, "llama")
    arguments = (tmp_path, 1, PROMPTS, COUNT, Sampling(temperature=0))
    alone = rank_pool.run(1, generated_and_kept, *arguments)[0]
    shared = rank_pool.run(2, generated_and_kept, *arguments, shard={"mode": "zero3"})
    assert [tokens for tokens, _ in shared] == [alone[0]] * 2
    assert alone[1] > 0
    assert [kept for _, kept in shared] == [0, 0]


def generated_and_kept(*arguments: Any, **options: Any) -> tuple[list[list[int]], int]:
    """What `generated` returns, and the parts of the model whose weights the cache held."""
    caches: list[KeyValueCache] = []

    def recorded(*given: Any, **more: Any) -> KeyValueCache:
        caches.append(KeyValueCache(*given, **more))
        return caches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_generation, "KeyValueCache", recorded)
        tokens = generated(*arguments, **options)
    (cache,) = caches
    return tokens, len(cache._weights)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_seed_draws_the_same_tokens_at_every_tp(
    rank_pool: Any, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    save_foreign_model(tmp_path, family)
    sampling = Sampling(temperature=1.3, top_k=50, top_p=0.95, seed=11)
    options = {"slices": 4, "compute_dtype": dtype}
    expected = rank_pool.run(1, generated, tmp_path, 1, PROMPTS, COUNT, sampling, **options)[0]
    assert expected[0] != expected[1]
    for tp in (2, 4):
        assert rank_pool.run(tp, generated, tmp_path, tp, PROMPTS, COUNT, sampling, **options)[0] == expected, tp
    other = Sampling(temperature=1.3, top_k=50, top_p=0.95, seed=12)
    assert rank_pool.run(1, generated, tmp_path, 1, PROMPTS, COUNT, other, **options)[0] != expected


class FixedLogits:
    """A model whose next token does not depend on what came before."""

    def __init__(self, logits: torch.Tensor, layout: Any) -> None:
        self.logits, self.layout, self.shards = logits, layout, None

    def next_logits(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        return self.logits.expand(len(ids), -1)


@pytest.fixture
def layout(single_rank: None) -> Any:
    return init_parallel(1, torch.device("cpu"))


def drawn(model: Any, count: int, sampling: Sampling, rows: int = 1) -> torch.Tensor:
    steps = generate_tokens(model, [[0]] * rows, count, sampling, ())
    return torch.tensor([[-1 if token is None else token for token in step] for step in steps])


def test_draws_have_the_probabilities_of_the_temperature(layout: Any) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    tokens = drawn(FixedLogits(logits, layout), 2000, Sampling(temperature=2.0), rows=4)
    expected = (logits / 2).softmax(0)
    # Of 8,000 draws a share's standard deviation is below 0.006.
    found = tokens.flatten().bincount(minlength=4) / tokens.numel()
    assert torch.allclose(found, expected, atol=0.03), found


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.6), {0}),
        (Sampling(temperature=1.0, top_p=0.8), {0, 1}),
        (Sampling(temperature=0.0, top_k=3), {0}),
    ],
)
def test_only_the_likeliest_tokens_are_drawn(layout: Any, sampling: Sampling, possible: set[int]) -> None:
    # Probabilities 0.644, 0.237, 0.087, 0.032.
    tokens = drawn(FixedLogits(torch.tensor([2.0, 1.0, 0.0, -1.0]), layout), 200, sampling)
    assert set(tokens.flatten().tolist()) == possible


def test_a_row_draws_the_same_whoever_is_beside_it(layout: Any) -> None:
    model = FixedLogits(torch.randn(50, generator=torch.Generator().manual_seed(0)), layout)
    sampling = Sampling(temperature=1.0, seed=4)
    together = drawn(model, 30, sampling, rows=3)
    steps = list(generate_tokens(model, [[0]], 30, sampling, (), first_row=2))  # type: ignore[arg-type]
    assert [token for (token,) in steps] == together[:, 2].tolist()


def test_a_row_ends_at_its_end_token_and_the_others_go_on(layout: Any) -> None:
    class Counting(FixedLogits):
        def next_logits(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
            return torch.nn.functional.one_hot((ids[:, -1] + 1) % 50, 50).float()

    model: Any = Counting(torch.zeros(50), layout)
    steps = list(generate_tokens(model, [[40], [46]], 30, Sampling(temperature=0), {49}))
    assert [a for a, _ in steps] == [41, 42, 43, 44, 45, 46, 47, 48]
    assert [b for _, b in steps] == [47, 48, *[None] * 6]


def test_more_than_the_context_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--max-new-tokens 60: with a prompt of 9 tokens .* give at most 55"):
        check_length(PROMPTS, 60, 64, "--max-new-tokens")
    with pytest.raises(UsageError, match="give a shorter prompt"):
        check_length(PROMPTS, 1, 9, "--max-new-tokens")
    check_length(PROMPTS, 55, 64, "--max-new-tokens")
