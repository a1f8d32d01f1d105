"""A model's loss on held-out text: windows are distributed over ranks, and losses summed in a fixed order."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy.typing as npt
import torch
import torch.distributed as dist

from colonnade.command_settings import EvaluationSettings
from colonnade.data.blocks import unpack_blocks
from colonnade.data.discovery import discover_shards
from colonnade.data.held_out import Tally, batches_of, cut_windows, encoded, limited, texts_of
from colonnade.data.mixture import CorpusPattern, parse_data_glob
from colonnade.data.shards import Shard, open_shards
from colonnade.data.tokenization import Encoder, boundary_tokens
from colonnade.errors import RunError, UsageError
from colonnade.parallel.head_loss import IGNORE_INDEX
from colonnade.runtime.vote import on_first_rank
from colonnade.telemetry.metrics import perplexity_of
from model import TensorParallelModel
from run.trained_model import TrainedModel

# A name and a pattern without a weight, that is, without a number after the last colon.
_NAME_ONLY = re.compile(r"[A-Za-z0-9_.-]+=(?!.+:[0-9.eE+-]+$).+")

_Batches = list[tuple[npt.NDArray[Any], list[int]]]


@dataclass(frozen=True)
class Plan:
    """How text is scored, with all defaults resolved. See `EvaluationSettings`.

    Attributes:
        prefix: the token put before each document; None for none.
    """

    text_column: str
    concatenate: bool
    prefix: int | None
    block_size: int
    stride: int
    batch_size: int
    max_documents: int | None
    max_tokens: int | None


@dataclass(frozen=True)
class Score:
    """The result for a corpus.

    Attributes:
        loss: nats per token.
        bits_per_byte: loss in bits per UTF-8 byte of the scored text.
        tokens: scored tokens; prefixes, and first tokens without a prefix before them, are not scored.
        left_out: number of rows left out, by reason.
    """

    name: str
    loss: float
    tokens: int
    bytes: int
    documents: int
    left_out: dict[str, int]
    seconds: float

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.bytes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def plan_of(settings: EvaluationSettings, trained: TrainedModel) -> Plan:
    """Resolve how text is scored: as given, otherwise as the run was trained.

    Raises:
        UsageError: the block size or stride is invalid, or the tokenizer has no token for the prefix.
    """
    context = trained.config.max_position_embeddings
    block = settings.block_size or trained.settings.block_size or context
    if block > context:
        raise UsageError(f"--block-size {block} is above the model's context of {context}; give at most that")
    stride = settings.stride or max(1, block // 2)
    if stride > block:
        raise UsageError(f"--stride {stride} is above the block of {block} tokens, and would leave some out")
    wanted = settings.document_prefix
    has_prefix = wanted == "token" or (wanted == "trained" and trained.settings.add_document_boundary_tokens)
    prefix = None
    if has_prefix:
        begin, end = boundary_tokens(trained.tokenizer)
        prefix = end if begin is None else begin
    return Plan(
        settings.text_column or trained.settings.text_column,
        settings.concatenate,
        prefix,
        block,
        stride,
        settings.batch_size,
        settings.max_documents,
        settings.max_tokens,
    )


def corpora_of(data_glob: str) -> tuple[CorpusPattern, ...]:
    """Parse a --data-glob as for training, except that weights, which have no effect here, may be omitted."""
    parts = [part.strip() for part in data_glob.split(",")]
    return parse_data_glob(",".join(f"{part}:1" if _NAME_ONLY.fullmatch(part) else part for part in parts))


def open_corpora(corpora: Sequence[CorpusPattern], plan: Plan) -> list[list[Shard]]:
    """Find the files of each corpus and read their footers; done before the model is loaded.

    Raises:
        UsageError: there is no such file, or one lacks the text column or holds token ids.
        RunError: a file is damaged.
    """
    found = []
    for corpus in corpora:
        found.append(open_shards(discover_shards(corpus.pattern), plan.text_column))
        for shard in found[-1]:
            if shard.layout == "tokens":
                raise UsageError(f"{shard.path} holds token ids: bits a byte need text; give the text they come from")
    return found


def score(
    model: TensorParallelModel, trained: TrainedModel, corpus: CorpusPattern, shards: Sequence[Shard], plan: Plan
) -> Score:
    """Score a model on a corpus, whose files are `shards`. Collective; bit-identical at every data-parallel size.

    Raises:
        UsageError: the corpus has no token that can be scored.
        RunError: a file is damaged or cannot be reached, or the loss is not finite.
    """
    begin = time.perf_counter()
    tally = Tally()
    rounds: Iterator[_Batches] = iter(())
    if model.layout.is_main:
        rounds = _rounds(trained, shards, plan, tally)
    nats, tokens = 0.0, 0
    while (batches := on_first_rank(lambda: next(rounds, None))) is not None:
        nats += score_batches(model, batches)
        tokens += sum(int((wire[:, 1:] >= 0).sum()) - sum(first) + len(first) for wire, first in batches)
    tally = on_first_rank(lambda: tally)
    if tokens == 0 or tally.bytes == 0:
        raise UsageError(f"--data-glob {corpus.pattern}: no document has a token to score; give other text")
    if not math.isfinite(nats):
        raise RunError(f"the loss on {corpus.pattern} is {nats}: the model's weights, or --precision, are not good")
    seconds = time.perf_counter() - begin
    return Score(
        corpus.name, nats / tokens, tokens, tally.bytes, tally.documents, dict(sorted(tally.left_out.items())), seconds
    )


def _rounds(trained: TrainedModel, shards: Sequence[Shard], plan: Plan, tally: Tally) -> Iterator[_Batches]:
    """Rounds of batches. Only the first rank reads, since reading is a small part of the work, and broadcasts them."""
    texts = texts_of(shards, plan.text_column, concatenate=plan.concatenate, tally=tally)
    pieces = encoded(texts, Encoder(trained.tokenizer), plan.prefix, tally)
    windows = cut_windows(limited(pieces, plan.max_documents, plan.max_tokens, tally), plan.block_size, plan.stride)
    yield from batches_of(windows, plan.batch_size)


@torch.no_grad()
def score_batches(model: TensorParallelModel, batches: _Batches) -> float:
    """Sum of the losses, in nats, of the tokens that the windows score. Collective.

    Args:
        batches: from `colonnade.data.held_out.batches_of`.
    """
    layout = model.layout
    totals = torch.zeros(len(batches), dtype=torch.float64, device=layout.device)
    for index in range(layout.dp_rank, len(batches), layout.dp):
        wire, first = batches[index]
        blocks = unpack_blocks(torch.from_numpy(wire).to(layout.device), document_mask=False)
        columns = torch.arange(1, wire.shape[1], device=layout.device)
        scored_before = columns < torch.tensor(first, device=layout.device)[:, None]
        labels = blocks.labels.masked_fill(scored_before, IGNORE_INDEX)
        totals[index] = model(blocks.input_ids, labels).double()
    # Each batch's loss comes from one rank and the others add zeros, so the sum is exact in any order.
    dist.all_reduce(totals, group=layout.dp_group)
    return float(totals.sum())
