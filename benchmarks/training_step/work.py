"""The workload of the training-step benchmarks: sizes, tokens, and the FLOPs of such a step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from colonnade.model_config import ModelConfig

VOCABULARIES = {"32k": 32_000, "152k": 151_936}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

# 1376 is Llama's feed-forward width at this hidden size: 8/3 of it, rounded up to a multiple of 32. Two query heads
# share a key/value head, as in Llama's and Qwen's smaller models. Embedding and head are two matrices.
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
BLOCK, MICRO_BATCH = 512, 4
LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Work:
    """One optimizer step of one micro-batch.

    Attributes:
        config: sizes of the decoder.
        micro_batch: number of sequences.
        block: tokens per sequence.
        dtype: of the matrix products; parameters and optimizer state are float32.
    """

    config: ModelConfig
    micro_batch: int
    block: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.block

    def share(self, device: torch.device) -> Tensor:
        """Random token ids [micro-batch, block + 1], the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.micro_batch, self.block + 1)
        return torch.randint(0, self.config.vocab_size, shape, generator=generator).to(device)


def work(vocabulary: int, precision: str) -> Work:
    """The step of `benchmarks/step.py` with a vocabulary of the given size."""
    config = ModelConfig(vocab_size=vocabulary, max_position_embeddings=BLOCK, **SIZES)
    return Work(config, MICRO_BATCH, BLOCK, PRECISIONS[precision])


def step_flops(config: ModelConfig, micro_batch: int, block: int, *, causal: bool = True) -> int:
    """FLOPs of a step's matrix products and attention; everything else, and all recomputation, counts as 0.

    A product with a weight of n elements takes 2 n FLOPs per token forward and 4 n backward (for the gradients of its
    input and of the weight). This includes the head; the embedding is a lookup. Attention is Q K^T and P V forward, and
    twice that backward, over the pairs of a token and one it may attend to: block * (block + 1) / 2 per sequence. A
    kernel that recomputes the scores in its backward pass gets no credit for it.

    Args:
        causal: False counts all block * block pairs, as computed by kernels without a mask.
    """
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * queries + 2 * keys)
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * (attention + feed_forward) + config.hidden_size * config.vocab_size
    pairs = block * (block + 1) // 2 if causal else block * block
    products = 6 * weights * micro_batch * block
    return products + 12 * config.num_hidden_layers * queries * pairs * micro_batch


def most_above(step: Callable[[], object], device: torch.device) -> int:
    """The peak of the bytes that torch has allocated during a step, above what was allocated before it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
