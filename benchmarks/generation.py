"""Greedy generation: ours, with one slice and with slices summed in a fixed order, against `transformers`' generate.

    python benchmarks/generation.py --json generation.json

1. `transformers` makes a Llama with random weights and saves it; ours reads it from that folder.
2. In turns, each contender continues the same prompt by the same number of tokens, with a key/value cache, on one rank.
   All must produce the same tokens, or the benchmark stops with an error.
3. Print tokens per second, as the median of the rounds, and ratios to `transformers`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flag_checks import require_at_least_one
from colonnade.checkpoint.hugging_face import load_hugging_face
from colonnade.files import require_place
from colonnade.flags import OneLineParser
from colonnade.parallel.mesh import init_parallel
from colonnade.runtime.launch import launch
from model import ModelConfig, TensorParallelModel
from run.text_generation import Sampling, generate_tokens

SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}


def main() -> None:
    parser = OneLineParser(description="Tokens a second of greedy generation, ours and transformers'.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each (default 1)")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    require_at_least_one("--rounds", given.rounds)
    require_place("--json", given.json)
    layout = init_parallel(1)
    torch.set_num_threads(given.threads)
    prompt = torch.randint(0, 32000, (given.prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    ways = made(layout, given.new_tokens, prompt)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[int]] = {}
    for number in range(given.rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            tokens[name] = way()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    if len({tuple(found) for found in tokens.values()}) > 1:
        sys.exit("error: the ways do not give the same tokens")
    speed = {name: given.new_tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = {f"{name}_over_transformers": speed[name] / speed["transformers"] for name in ("one_slice", "fixed_order")}
    print(f"torch {torch.__version__}, {layout.device}, {given.threads} threads, {given.rounds} rounds")
    for name, value in speed.items():
        print(f"{name:14s}{value:8.1f} tokens/s{value / speed['transformers']:8.2f}")
    if given.json:
        Path(given.json).write_text(json.dumps({"ratios": ratios, "tokens_per_second": speed}, indent=2) + "\n")


def made(layout: Any, count: int, prompt: list[int]) -> dict[str, Callable[[], list[int]]]:
    """The contenders by name, all with the same model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs: Any = LlamaForCausalLM(LlamaConfig(**SIZES)).to(layout.device).eval()
    ids = torch.tensor([prompt], device=layout.device)

    def by_transformers() -> list[int]:
        options: Any = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return [int(token) for token in found[0, len(prompt) :]]

    def by_ours(model: TensorParallelModel) -> list[int]:
        steps = generate_tokens(model, [prompt], count, Sampling(temperature=0), ())
        return [token for (token,) in steps if token is not None]

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        config = ModelConfig.from_json(folder)
        models = [TensorParallelModel(config, layout, slices=slices) for slices in (None, 4)]
        for model in models:
            load_hugging_face(Path(folder), model=model, vocabulary_size=config.vocab_size)
    return {
        "transformers": by_transformers,
        "one_slice": lambda: by_ours(models[0]),
        "fixed_order": lambda: by_ours(models[1]),
    }


if __name__ == "__main__":
    launch(main)
