"""Sampling from a model, for `generate.py` and for samples during training.

All ranks compute the same logits and draw the same tokens; each row of a batch has its own random generator. With a
model that sums in a fixed order, the tokens are the same at every number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from colonnade.decoder.key_value_cache import KeyValueCache
from colonnade.errors import UsageError
from data_processing import boundary_tokens

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedTokenizerBase

    from model import TensorParallelModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divisor of the logits; 0 for greedy decoding.
        top_k: sample from this many of the most likely tokens; 0 for all.
        top_p: sample from the most likely tokens whose total probability reaches this (arXiv:1904.09751); 1 for all.
        seed: together with a row's number, the seed of the row's draws.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def warpers(self) -> LogitsProcessorList:
        """Processors that turn logits [B, V] into those to sample from, in the order of `transformers`' `generate`."""
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        chosen = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            chosen.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k > 0:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(self.top_p))
        return chosen


class PromptEncoder:
    """Encodes prompts the way documents were encoded in training; `end` is the token that ends a document."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, add_document_boundary_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._begin, self.end = None, tokenizer.eos_token_id
        if add_document_boundary_tokens:
            self._begin, self.end = boundary_tokens(tokenizer)

    def encode(self, prompt: str, source: str) -> list[int]:
        """Token ids of a prompt. Raises UsageError, naming `source`, if there are none or the prompt is not text."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # a byte of the command line that is not UTF-8, or half a pair in JSON
            raise UsageError(f"{source} {prompt!r} is not UTF-8 text (character {error.start}): give text") from error
        tokens = self._tokenizer.encode(prompt, add_special_tokens=False)
        if self._begin is not None:
            tokens = [self._begin, *tokens]
        if not tokens:
            raise UsageError(
                f"{source} {prompt!r} has no tokens, and this run was trained without a token to begin with: give text"
            )
        return list(tokens)


def check_length(prompts: Sequence[Sequence[int]], count: int, context: int, flag: str) -> None:
    """Raise UsageError if prompt and `count` new tokens exceed the context; `flag` is the flag that set `count`."""
    longest = max(map(len, prompts))
    if longest + count > context:
        remedy = f"give at most {context - longest}" if longest < context else "give a shorter prompt"
        raise UsageError(
            f"{flag} {count}: with a prompt of {longest} tokens that is more than the model's context of {context}; "
            f"{remedy}"
        )


@torch.no_grad()
def generate_tokens(
    model: TensorParallelModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling,
    end: Collection[int | None],
    *,
    first_row: int = 0,
) -> Iterator[list[int | None]]:
    """Yield one new token per row, up to `count` times; None for a row that has ended. Collective.

    Args:
        prompts: token ids, at least one per row; their length plus `count` must fit into the model's context.
        end: tokens that end a row; they are not yielded.
        first_row: number of the first row, if a list of prompts is processed in batches.
    """
    device = model.layout.device
    rows, longest = len(prompts), max(map(len, prompts))
    ids = torch.zeros((rows, longest), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    cache = KeyValueCache(longest + count, padding.to(device), keeps_weights=model.shards is None)
    # One generator per row, so that a row's draws do not depend on the other rows.
    generators = [torch.Generator().manual_seed(_row_seed(sampling.seed, first_row + row)) for row in range(rows)]
    draw = partial(_draw, warpers=sampling.warpers(), generators=generators, greedy=sampling.temperature == 0)
    ended = [False] * rows
    new = ids.to(device)
    for _ in range(count):
        logits = model.next_logits(new, cache).float().cpu()
        drawn = draw(ids, logits)
        ids = torch.cat((ids, drawn.unsqueeze(1)), dim=1)
        ended = [done or token in end for done, token in zip(ended, drawn.tolist(), strict=True)]
        if all(ended):
            return
        yield [None if done else token for done, token in zip(ended, drawn.tolist(), strict=True)]
        new = drawn.unsqueeze(1).to(device)


def tokens_of_rows(steps: Iterable[list[int | None]], rows: int) -> list[list[int]]:
    """Collect the tokens that `generate_tokens` yields for each of its `rows` prompts."""
    taken = list(steps)
    return [[token for step in taken if (token := step[row]) is not None] for row in range(rows)]


def _draw(
    ids: Tensor,
    logits: Tensor,
    *,
    warpers: Callable[[Any, Any], Tensor],
    generators: Sequence[torch.Generator],
    greedy: bool,
) -> Tensor:
    """The next token of each row: int64 [B], from logits [B, V]."""
    if greedy:
        return logits.argmax(dim=-1)
    probabilities = warpers(ids, logits).softmax(dim=-1)
    return torch.stack(
        [torch.multinomial(row, 1, generator=own)[0] for row, own in zip(probabilities, generators, strict=True)]
    )


def _row_seed(seed: int, row: int) -> int:
    """The seed itself for row 0; far apart for other rows, so that neighbouring seeds do not share rows."""
    return (seed + row * 0x9E3779B97F4A7C15) % 2**63
