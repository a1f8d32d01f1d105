"""Mixtures: several corpora in one stream, each with a share of its tokens.

Which corpus a chunk comes from is a pure function of the chunk's number: the golden-ratio sequence, a low-discrepancy
sequence (Weyl), is looked up in the cumulative weights. Any interval of the stream then matches the corpora's shares to
within a few chunks, and there is no random state to save. All chunks have the same size, so shares of chunks are shares
of tokens.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from colonnade.errors import UsageError

ONLY_CORPUS = "data"
"""Name of the corpus if `--data-glob` gives no names."""

MAX_CORPORA = 64
_NAMED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)=(?P<glob>.+):(?P<weight>[^:/]+)")
_RANGE = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio


@dataclass(frozen=True, slots=True)
class CorpusPattern:
    """One corpus of `--data-glob`: its name, the pattern of its files, and its weight relative to the others."""

    name: str
    pattern: str
    weight: float


def parse_data_glob(text: str) -> tuple[CorpusPattern, ...]:
    """Parse `name=glob:weight,...`, or comma-separated patterns without names, which make up one corpus.

    A repeated name adds files to its corpus; it must have the same weight.

    Raises:
        UsageError: only some patterns have names, a weight is not a positive number or differs from the one given
            before, or there are too many corpora.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    matches = [_NAMED.fullmatch(part) for part in parts]
    if not any(matches):
        return (CorpusPattern(ONLY_CORPUS, text, 1.0),)
    corpora: dict[str, CorpusPattern] = {}
    for part, match in zip(parts, matches, strict=True):
        if match is None:
            raise UsageError(
                f"data pattern {part!r} has no name and weight, others have: write name=glob:weight (commas separate "
                "patterns; for a comma in a path write ?)"
            )
        name, pattern, weight = match["name"], match["glob"], _weight(match["weight"], part)
        if name in corpora:
            if corpora[name].weight != weight:
                raise UsageError(f"corpus {name} has weights {corpora[name].weight:g} and {weight:g}; give it one")
            pattern = f"{corpora[name].pattern},{pattern}"
        corpora[name] = CorpusPattern(name, pattern, weight)
    if len(corpora) > MAX_CORPORA:
        raise UsageError(f"{len(corpora)} corpora are given; at most {MAX_CORPORA} can be mixed: join some")
    return tuple(corpora.values())


def _weight(text: str, part: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UsageError(f"data pattern {part!r}: weight {text!r} must be a number above 0")
    return weight


class WeightChange(NamedTuple):
    """From chunk number `chunk` on, the corpora have these `weights`, which sum to 1."""

    chunk: int
    weights: tuple[float, ...]


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights that sum to 1."""
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def are_same_shares(weights: Sequence[float], others: Sequence[float]) -> bool:
    """Whether normalized weights are the same but for rounding: 1:4 and 0.01:0.04 are."""
    return len(weights) == len(others) and all(map(math.isclose, weights, others))


class Mixture:
    """Assigns each chunk a corpus, from a schedule of weights ordered by chunk number."""

    def __init__(self, schedule: Sequence[WeightChange]) -> None:
        self._starts = [change.chunk for change in schedule]
        self._weights = [change.weights for change in schedule]
        self._limits = [_limits(weights) for weights in self._weights]

    def corpus_of(self, chunk: int, ended: Collection[int] = ()) -> int:
        """Index of the corpus that chunk number `chunk` comes from.

        Args:
            ended: indices of corpora that have no chunk left, not all of them. Their chunks come from the other
                corpora, in the shares that these have of each other.
        """
        stage = bisect_right(self._starts, chunk) - 1
        place, limits = chunk * _GOLDEN % _RANGE, self._limits[stage]
        left = [*range(len(limits))]
        while left[index := bisect_right(limits, place)] in ended:
            # Where the place lies in the share of the ended corpus, as a place among the others.
            low, high = ([0, *limits][index], limits[index])
            place = (place - low) * _RANGE // (high - low)
            del left[index]
            limits = _limits(normalized([self._weights[stage][corpus] for corpus in left]))
        return left[index]


def _limits(weights: Sequence[float]) -> list[int]:
    """Where each corpus's share ends. The last limit is exact, so that rounding cannot leave a place without one."""
    return [*(round(limit * _RANGE) for limit in list(accumulate(weights))[:-1]), _RANGE]
