"""Samples of the model's text, taken during training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colonnade.data.prompts import prompts_in
from colonnade.errors import UsageError
from colonnade.run_settings import RunSettings
from run.text_generation import PromptEncoder, Sampling, check_length, generate_tokens, tokens_of_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model import TensorParallelModel

MAX_PROMPTS = 16


@dataclass(frozen=True)
class SamplePrompts:
    """A run's sample prompts, as text and as token ids, and the token that ends a continuation (None for none)."""

    texts: list[str]
    tokens: list[list[int]]
    end: int | None


def read_sample_prompts(settings: RunSettings, tokenizer: PreTrainedTokenizerBase, context: int) -> SamplePrompts:
    """Read the prompts of `--sample-prompts`, at most `MAX_PROMPTS`.

    Raises:
        UsageError: there are none or too many, or one is too long for the model's context with --sample-tokens added.
    """
    texts = prompts_in(Path(settings.sample_prompts or ""), "--sample-prompts")
    if len(texts) > MAX_PROMPTS:
        raise UsageError(
            f"--sample-prompts {settings.sample_prompts} holds {len(texts)} prompts; give at most {MAX_PROMPTS}"
        )
    encoder = PromptEncoder(tokenizer, add_document_boundary_tokens=settings.add_document_boundary_tokens)
    tokens = [encoder.encode(text, f"--sample-prompts {settings.sample_prompts}:") for text in texts]
    check_length(tokens, settings.sample_tokens, context, "--sample-tokens")
    return SamplePrompts(texts, tokens, encoder.end)


def samples_are_due(step: int, interval: int) -> bool:
    """Whether samples are taken after this step: after `interval`, 2 `interval`, 4 `interval`, ... steps."""
    times, rest = divmod(step, interval) if interval > 0 else (0, 0)
    return times > 0 and rest == 0 and times & (times - 1) == 0


def sampled_tokens(model: TensorParallelModel, prompts: SamplePrompts, settings: RunSettings) -> list[list[int]]:
    """The tokens that the model adds to each prompt. Collective.

    Sampling uses its own random generators, so it does not affect training.
    """
    sampling = Sampling(temperature=settings.sample_temperature, seed=settings.seed)
    steps = generate_tokens(model, prompts.tokens, settings.sample_tokens, sampling, {prompts.end})
    return tokens_of_rows(steps, len(prompts.tokens))


def samples_row(
    prompts: SamplePrompts, rows: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, str]]:
    """The samples as they appear in the metrics: `prompt` and `text` of each."""
    return [{"prompt": text, "text": str(tokenizer.decode(row))} for text, row in zip(prompts.texts, rows, strict=True)]
