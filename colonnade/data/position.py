"""`DataPosition`: the exact state of a token stream, in a few hundred bytes per lane.

A position names the first token of the *next* block of each lane, so no left-over tokens are stored. It also records
everything the stream is a function of (its head), so that resuming with different inputs is refused instead of silently
giving a different stream. Nothing in it depends on batch rows, worker threads, or the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from colonnade.data.mixture import ONLY_CORPUS, WeightChange, are_same_shares
from colonnade.data.order import deal_units, unit_order
from colonnade.data.shards import Manifest, Units
from colonnade.errors import LocalRunError, UsageError

POSITION_FORMAT = 2


class LaneCursor(NamedTuple):
    """First token of a lane's next block. All numbers count from 0: `epoch`; `unit`, an index into the lane's order of
    units in that epoch; `row`, counted in reading order and before filtering; `token`, an index into the encoded row
    including boundary tokens. With best-fit packing `row` is a portion of the unit and `token` the number of one of the
    blocks packed from it."""

    epoch: int
    unit: int
    row: int
    token: int


class LaneCounts(NamedTuple):
    """What a lane has read since the run began, up to its cursor."""

    rows: int = 0
    rows_missing: int = 0
    rows_not_text: int = 0
    rows_empty: int = 0
    rows_mostly_digits_or_symbols: int = 0
    tokens_delivered: int = 0
    tokens_repeated: int = 0  # delivered after the first epoch; not those that a change of the data delivers anew
    tokens_dropped: int = 0  # tails of epochs
    padding: int = 0  # positions in blocks without a token

    def plus(self, other: LaneCounts) -> LaneCounts:
        """The sum, field by field."""
        return LaneCounts.sum((self, other))

    @classmethod
    def sum(cls, parts: Iterable[LaneCounts]) -> LaneCounts:
        """The sum of any number of counts, field by field."""
        return cls(*map(sum, zip(cls(), *parts, strict=True)))


class LaneState(NamedTuple):
    """State of one lane of one corpus, between two blocks."""

    cursor: LaneCursor = LaneCursor(0, 0, 0, 0)
    counts: LaneCounts = LaneCounts()


class SkippedUnit(NamedTuple):
    """A unit that could not be decoded. It stays skipped for the rest of the run, even if it becomes readable."""

    corpus: int
    unit: int
    reason: str


class DataChange(NamedTuple):
    """A permitted change of the data: `what` describes it, and it applies from chunk number `chunk` on."""

    chunk: int
    what: str


@dataclass(frozen=True, slots=True)
class CorpusHead:
    """One corpus of a stream. `shards` holds eight hexadecimal digits per file, to tell which files changed;
    `skipped_files` names the files that cannot be used."""

    name: str
    manifest: str  # `Manifest.digest`: over file names, sizes, rows, fingerprints and units, in order
    files: int
    rows: int
    shards: str
    skipped_files: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, units: Units, skipped_files: Sequence[str] = ()) -> CorpusHead:
        manifest = Manifest.of(units.shards, skipped_files)
        shards = "".join(manifest.shard_digests)
        return cls(name, manifest.digest, manifest.files, manifest.rows, shards, tuple(skipped_files))

    def difference(self, other: CorpusHead, names: Sequence[str] = ()) -> str:
        """How `other` differs, as one line; `names` are the names of its files."""
        known = {self.shards[start : start + 8] for start in range(0, len(self.shards), 8)}
        digests = [other.shards[start : start + 8] for start in range(0, len(other.shards), 8)]
        unknown = [name for name, digest in zip(names, digests, strict=False) if digest not in known]
        shown = f"; changed or new: {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}" if unknown else ""
        return f"{self._counted()} ({self.manifest[:8]}) -> {other._counted()} ({other.manifest[:8]}){shown}"

    def _counted(self) -> str:
        # The rows of JSON lines and text are not counted before they are read.
        return f"{self.files} files" + (f" with {self.rows} rows" if self.rows else "")


@dataclass(frozen=True, slots=True)
class StreamHead:
    """Everything that the stream is a function of, besides cursors and weights."""

    corpora: tuple[CorpusHead, ...]
    tokenizer: str  # `Encoder.digest`
    bos: int | None  # boundary token ids; None if none is added
    eos: int | None
    block_size: int
    lanes: int
    seed: int
    shuffle: bool
    packing: str
    filter_version: int
    text_column: str
    symbol_filter: bool = True  # the filter drops rows of mostly digits and symbols

    @property
    def by_portion(self) -> bool:
        """Whether cursors count portions of a unit that are packed together, instead of rows."""
        return self.packing == "best-fit"

    def unit_at(self, corpus: str, units: Units, lane: int, cursor: LaneCursor) -> int:
        """The unit of `corpus`, one of its `units`, that a lane's cursor stands in."""
        dealt = deal_units(units.unit_bytes, self.lanes, self.seed, corpus, shuffled=self.shuffle)[lane]
        return int(unit_order(dealt, self.seed, corpus, cursor.epoch, shuffled=self.shuffle)[cursor.unit])

    def has_same(self, other: StreamHead, *names: str) -> bool:
        """Whether the fields `names` are equal."""
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def differences(self, other: StreamHead, names: Mapping[str, Sequence[str]] | None = None) -> list[str]:
        """What differs in `other`, as `name old -> new`; `names` are the file names of each corpus."""
        mine, theirs = ({corpus.name: corpus for corpus in head.corpora} for head in (self, other))
        lines = [f"corpus {name} is gone" for name in mine if name not in theirs]
        lines += [f"corpus {name} is new" for name in theirs if name not in mine]
        for name in [name for name in mine if name in theirs]:
            if mine[name].manifest != theirs[name].manifest:
                title = "data" if name == ONLY_CORPUS else f"corpus {name}"
                lines.append(f"{title} {mine[name].difference(theirs[name], (names or {}).get(name, ()))}")
        if not lines and [*mine] != [*theirs]:
            lines.append(f"order of the corpora {', '.join(mine)} -> {', '.join(theirs)}")
        for field in fields(self):
            old, new = getattr(self, field.name), getattr(other, field.name)
            if field.name != "corpora" and old != new:
                if field.name == "tokenizer":
                    old, new = old[:8], new[:8]
                lines.append(f"{field.name} {old} -> {new}")
        return lines


@dataclass(frozen=True, slots=True)
class DataPosition:
    """State of a token stream after chunk number `chunk - 1`.

    Attributes:
        head: what the stream is a function of.
        chunk: global number of the next chunk, from 0. Lane `chunk % lanes` of its corpus delivers it.
        states: for each corpus, the states of its lanes.
        schedule: the corpora's weights, from chunk 0 on.
        skipped: damaged units skipped so far.
        changes: permitted changes of the data.
        retired: what was read from corpora that are no longer part of the data.
    """

    head: StreamHead
    chunk: int
    states: tuple[tuple[LaneState, ...], ...]
    schedule: tuple[WeightChange, ...]
    skipped: tuple[SkippedUnit, ...] = ()
    changes: tuple[DataChange, ...] = ()
    retired: tuple[tuple[str, LaneCounts], ...] = ()

    @classmethod
    def start(cls, head: StreamHead, weights: tuple[float, ...]) -> DataPosition:
        """The position before the first chunk."""
        states = ((LaneState(),) * head.lanes,) * len(head.corpora)
        return cls(head=head, chunk=0, states=states, schedule=(WeightChange(0, weights),))

    @property
    def weights(self) -> tuple[float, ...]:
        """The corpora's weights from here on."""
        return self.schedule[-1].weights

    def totals(self) -> dict[str, LaneCounts]:
        """What has been read of each corpus, summed over all lanes."""
        return {
            corpus.name: LaneCounts.sum(state.counts for state in states)
            for corpus, states in zip(self.head.corpora, self.states, strict=True)
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {
            "format": POSITION_FORMAT,
            "head": asdict(self.head),
            "chunk": self.chunk,
            "states": [[[list(cursor), list(counts)] for cursor, counts in lanes] for lanes in self.states],
            "schedule": [[chunk, list(weights)] for chunk, weights in self.schedule],
            "skipped": [list(skip) for skip in self.skipped],
            "changes": [list(change) for change in self.changes],
            "retired": [[name, list(counts)] for name, counts in self.retired],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> DataPosition:
        """The inverse of `to_dict`. Raises UsageError if `state` is not a valid position."""
        if state.get("format") != POSITION_FORMAT:
            raise UsageError(
                f"data position has format {state.get('format')!r}, this program reads {POSITION_FORMAT}; "
                "go on with the program version that wrote it"
            )
        try:
            position = _parsed(state)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"data position is damaged ({error!r}); use another checkpoint") from error
        position._require_sound()
        return position

    def _require_sound(self) -> None:
        """Raises UsageError if the numbers are inconsistent."""
        corpora, lanes = len(self.head.corpora), self.head.lanes
        numbers = [number for states in self.states for state in states for part in state for number in part]
        sound = (
            corpora > 0
            and lanes > 0
            and len(self.states) == corpora
            and all(len(states) == lanes for states in self.states)
            and min(self.chunk, *numbers) >= 0
            and bool(self.schedule)
            and self.schedule[0].chunk == 0
            and all(len(change.weights) == corpora and min(change.weights) >= 0 for change in self.schedule)
            and all(0 <= skip.corpus < corpora for skip in self.skipped)
        )
        if not sound:
            cursors = [[*state.cursor] for states in self.states for state in states]
            raise UsageError(
                f"data position is damaged (chunk {self.chunk}, cursors {cursors!s:.200}); use another checkpoint"
            )

    # --- resuming ----------------------------------------------------------------------------------------------------

    def require(self, head: StreamHead, names: Mapping[str, Sequence[str]] | None = None) -> None:
        """Check that a stream with `head` may resume from here; `names` are the file names of each corpus.

        Raises:
            UsageError: the heads differ; the message gives every difference with its old and new value.
        """
        differences = self.head.differences(head, names)
        if differences:
            raise UsageError(
                f"the data position does not fit this run: {'; '.join(differences)}; restore these, start a new run, "
                "or go on with resume_pretrain_tensor.py --allow-data-change"
            )

    def with_changed_data(
        self, head: StreamHead, weights: tuple[float, ...], units: Mapping[str, Units]
    ) -> DataPosition:
        """This position transferred to a stream with `head`, with the change recorded. Chunk numbers continue.

        A corpus with the same files resumes if lanes, seed, shuffle, packing, filter version and text column are the
        same. It resumes exactly if its text becomes the same tokens (with best-fit packing, the same blocks). Else it
        resumes with the first row not yet begun, or with best-fit packing at the beginning of the current portion,
        which is packed anew; in a token shard, exactly. Any other corpus starts over. `units` are those of each corpus
        of `head`.
        """
        names = {corpus: [shard.name for shard in its.shards] for corpus, its in units.items()}
        differences = self.head.differences(head, names)
        if not differences:
            return self
        own = {corpus.name: index for index, corpus in enumerate(self.head.corpora)}
        keeps_order = self.head.has_same(
            head, "lanes", "seed", "shuffle", "packing", "filter_version", "text_column", "symbol_filter"
        )
        keeps_tokens = self.head.has_same(head, "tokenizer", "bos", "eos", *["block_size"] * head.by_portion)
        totals, retired = self.totals(), dict(self.retired)
        states: list[tuple[LaneState, ...]] = []
        same_files: dict[int, int] = {}
        for place, corpus in enumerate(head.corpora):
            index = own.get(corpus.name)
            if index is not None and self.head.corpora[index].manifest == corpus.manifest:
                same_files[index] = place
            if index is not None and index in same_files and keeps_order:
                states.append(self.states[index] if keeps_tokens else self._between_rows(index, units[corpus.name]))
            else:
                counted = LaneState(counts=totals.get(corpus.name) or retired.pop(corpus.name, LaneCounts()))
                states.append((counted, *(LaneState(),) * (head.lanes - 1)))
        present = {corpus.name for corpus in head.corpora}
        retired |= {name: counts for name, counts in totals.items() if name not in present}
        return DataPosition(
            head=head,
            chunk=self.chunk,
            states=tuple(states),
            retired=tuple(retired.items()),
            # Corpora may have been added or removed, so past weights no longer mean anything.
            schedule=(WeightChange(0, weights),),
            skipped=tuple(
                SkippedUnit(same_files[skip.corpus], skip.unit, skip.reason)
                for skip in self.skipped
                if skip.corpus in same_files
            ),
            changes=(*self.changes, DataChange(self.chunk, "; ".join(differences))),
        )

    def _between_rows(self, corpus: int, units: Units) -> tuple[LaneState, ...]:
        """The states of a corpus, moved to a place that means the same with other tokens."""
        name = self.head.corpora[corpus].name
        has_ids = any(shard.layout == "tokens" for shard in units.shards)

        def moved(lane: int, state: LaneState) -> LaneState:
            epoch, unit, row, token = state.cursor
            if token and has_ids:
                shard, _ = units.locate(self.head.unit_at(name, units, lane, state.cursor))
                if shard.layout == "tokens":  # its tokens come from no tokenizer
                    return state
            begun = token > 0 and not self.head.by_portion
            return LaneState(LaneCursor(epoch, unit, row + begun, 0), state.counts)

        return tuple(moved(lane, state) for lane, state in enumerate(self.states[corpus]))

    def with_weights(self, weights: tuple[float, ...]) -> DataPosition:
        """This position with `weights` from its chunk on; with its own, to the bit, if they are the same shares."""
        if are_same_shares(weights, self.weights):
            return self
        earlier = tuple(change for change in self.schedule if change.chunk < self.chunk)
        return replace(self, schedule=(*earlier, WeightChange(self.chunk if earlier else 0, weights)))

    def after(self, number: int, corpus: int, state: LaneState, skipped: tuple[SkippedUnit, ...]) -> DataPosition:
        """The position after chunk `number`, which came from corpus number `corpus` and left its lane in `state`."""
        lane, lanes = number % self.head.lanes, self.states[corpus]
        changed = (*lanes[:lane], state, *lanes[lane + 1 :])
        states = (*self.states[:corpus], changed, *self.states[corpus + 1 :])
        return replace(self, chunk=number + 1, states=states, skipped=skipped)

    @staticmethod
    def merged(parts: Sequence[DataPosition], start: int) -> DataPosition:
        """The position of a stream read by several readers, each of which has advanced only its own lanes.

        Args:
            parts: one position per reader, all at the same chunk. Reader r of R reads the lanes l with
                (l - start) mod G == r mod G, where G = gcd(R, lanes).
            start: number of the chunk the readers started with.

        Raises:
            LocalRunError: readers of the same lane disagree on what it holds, so that they trained on different text.
        """
        first = parts[0]
        owners = [parts[owner] for owner in lane_owners(first.head.lanes, len(parts), start)]
        _require_agreement(parts, start)
        states = tuple(
            tuple(owner.states[corpus][lane] for lane, owner in enumerate(owners))
            for corpus in range(len(first.head.corpora))
        )
        skipped = dict.fromkeys(skip for part in parts for skip in part.skipped)
        return replace(first, states=states, skipped=tuple(sorted(skipped)))


def lane_owners(lanes: int, readers: int, start: int) -> list[int]:
    """For each lane the first of `readers` that reads it, if chunk `start` is the first one they divide up."""
    apart = math.gcd(lanes, readers)
    return [(lane - start) % apart for lane in range(lanes)]


def _require_agreement(parts: Sequence[DataPosition], start: int) -> None:
    head = parts[0].head
    apart = math.gcd(head.lanes, len(parts))
    for lane, owner in enumerate(lane_owners(head.lanes, len(parts), start)):
        for reader in range(owner + apart, len(parts), apart):
            for corpus, ours, theirs in zip(head.corpora, parts[owner].states, parts[reader].states, strict=True):
                if ours[lane] != theirs[lane]:
                    # The ranks beside the reader know nothing of positions, and have to be told.
                    raise LocalRunError(
                        f"lane {lane} of corpus {corpus.name} is at {[*ours[lane].cursor]} for data-parallel rank "
                        f"{owner} and at {[*theirs[lane].cursor]} for rank {reader}: they do not see the same files; "
                        "make them the same on all hosts and go on from the last checkpoint"
                    )


def _parsed(state: Mapping[str, Any]) -> DataPosition:
    head = dict(state["head"])
    head["corpora"] = tuple(
        CorpusHead(**{**corpus, "skipped_files": tuple(corpus["skipped_files"])}) for corpus in head["corpora"]
    )
    return DataPosition(
        head=StreamHead(**head),
        chunk=int(state["chunk"]),
        states=tuple(
            tuple(LaneState(LaneCursor(*map(int, cursor)), LaneCounts(*map(int, counts))) for cursor, counts in lanes)
            for lanes in state["states"]
        ),
        schedule=tuple(WeightChange(int(chunk), tuple(map(float, weights))) for chunk, weights in state["schedule"]),
        skipped=tuple(SkippedUnit(int(corpus), int(unit), str(reason)) for corpus, unit, reason in state["skipped"]),
        changes=tuple(DataChange(int(chunk), str(what)) for chunk, what in state["changes"]),
        retired=tuple((str(name), LaneCounts(*map(int, counts))) for name, counts in state["retired"]),
    )
