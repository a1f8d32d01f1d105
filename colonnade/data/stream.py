"""The token stream: chunks taken from the lanes of the corpora, each with the position that resumes after it."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from colonnade.data.blocks import pack_blocks
from colonnade.data.lane import Lane
from colonnade.data.lane_reader import LaneReader
from colonnade.data.mixture import Mixture
from colonnade.data.order import deal_units
from colonnade.data.packing import Block
from colonnade.data.position import DataPosition, LaneState, StreamHead
from colonnade.data.shards import Units
from colonnade.data.tokenization import EncoderPool
from colonnade.errors import RunError, UsageError

# Number of lanes whose place in the data `TokenStream.describe` gives.
_PLACES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """One block and the state of the stream after it.

    Attributes:
        tokens: int32 [block_size + 1]; inputs are `tokens[:-1]`, targets `tokens[1:]`. If documents are marked or
            blocks padded, in the wire format of `colonnade/data/blocks.py`.
        position: the position that resumes with the next chunk.
        epoch: the epoch its tokens come from, from 0.
        number: number of the chunk in the whole stream, from 0.
    """

    tokens: npt.NDArray[np.int32]
    position: DataPosition
    epoch: int
    number: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """One corpus of a stream: its name, its weight relative to the other corpora, and its units."""

    name: str
    weight: float
    units: Units
    skipped_files: tuple[str, ...] = ()  # names of files that cannot be used

    @property
    def file_names(self) -> list[str]:
        return [shard.name for shard in self.units.shards]


class TokenStream:
    """Iterator of `TokenChunk`s, made by `streaming_token_generator`. Close it, or use it in a `with` statement.

    Attributes:
        position: state after the last chunk delivered.
        start: state before the first chunk.
        units: the units of each corpus.
        lanes: numbers of the lanes that this reader reads.
        apart: distance between the chunks of this reader: it reads one of every `apart` consecutive chunks.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        pool: EncoderPool,
        position: DataPosition,
        *,
        batch_rows: int,
        workers: int,
        vocabulary_size: int,
        marked: bool,
        epochs: int | None,
        strict: bool,
        reader: int,
        readers: int,
    ) -> None:
        self.position = position
        self.start = position
        self.apart = math.gcd(position.head.lanes, readers)
        self._pool = pool
        self._marked = marked
        self._failure: BaseException | None = None
        # Held inside `next`. A stream is closed by whoever comes last: `close`, or a `next` that it found in progress.
        self._in_use = threading.Lock()
        self._is_closed = False
        self._mixture = Mixture(position.schedule)
        self._next = position.chunk + reader % self.apart
        head = position.head
        self.units = [corpus.units for corpus in corpora]
        self.lanes = [*range(self._next % self.apart, head.lanes, self.apart)]
        # Enough to keep every worker busy, with one finished result for each while a lane fetches its next row group.
        ahead = max(1, 2 * workers // (len(self.lanes) * len(corpora)))
        self._lanes: list[dict[int, Lane]] = []
        for index, corpus in enumerate(corpora):
            dealt = deal_units(corpus.units.unit_bytes, head.lanes, head.seed, corpus.name, shuffled=head.shuffle)
            self._lanes.append({})
            for lane in self.lanes:
                _require_place(position.states[index][lane], len(dealt[lane]))
                lane_reader = LaneReader(
                    index,
                    corpus.name,
                    corpus.units,
                    dealt[lane],
                    text_column=head.text_column,
                    seed=head.seed,
                    shuffle=head.shuffle,
                    batch_rows=batch_rows,
                    vocabulary_size=vocabulary_size,
                    by_portion=head.by_portion,
                    drop_symbols=head.symbol_filter,
                )
                self._lanes[index][lane] = Lane(
                    lane_reader,
                    pool,
                    position.states[index][lane],
                    [skip for skip in position.skipped if skip.corpus == index],
                    title=_title(head, corpus.name, lane),
                    block_size=head.block_size,
                    packing=head.packing,
                    ahead=ahead,
                    epochs=epochs,
                    strict=strict,
                )
        self._is_begun = False

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenChunk:
        """The next chunk.

        Raises:
            StopIteration: after the last epoch.
            UsageError: the data does not fill one block, or differs from what the position was made with.
            RunError: a shard cannot be reached; or, with `strict`, a unit is damaged; or the stream is closed.
        """
        if self._failure is not None:
            raise self._failure
        try:
            with self._in_use:
                return self._chunk()
        except StopIteration:
            raise
        except BaseException as error:
            # Whatever it is: a stream that failed must not look like one that ended, which its lanes now do.
            self._failure = self._failure or error
            raise
        finally:
            if self._is_closed:
                self._close_unless_in_use()

    def _chunk(self) -> TokenChunk:
        if not self._is_begun:
            self._is_begun = True
            self._begin()
        number = self._next
        corpus, lane, block = self._next_block(number)
        skipped = self.position.skipped
        if found := lane.take_skipped():  # all of them are new: no other lane has these units
            skipped = tuple(sorted((*skipped, *found)))
        self._next += self.apart
        self.position = self.position.after(number, corpus, lane.state, skipped)
        tokens = block.tokens
        if self._marked:
            padding = np.arange(len(tokens)) >= block.filled
            tokens = pack_blocks(tokens, block.starts, padding)
        return TokenChunk(tokens, self.position, block.epoch, number)

    def _begin(self) -> None:
        """Read every lane up to its first block, which waits there for its turn: a corpus or lane without one is found
        at the start, however seldom its turn comes."""
        lanes = [lane for lanes in self._lanes for lane in lanes.values()]
        for lane in lanes:
            lane.fill()
        for lane in lanes:
            lane.has_block()

    def _next_block(self, number: int) -> tuple[int, Lane, Block]:
        """Chunk `number`, its corpus and its lane. A corpus whose lane has ended leaves its chunks to the others."""
        ended: set[int] = set()
        while len(ended) < len(self._lanes):
            corpus = self._mixture.corpus_of(number, ended)
            lane = self._lanes[corpus][number % self.position.head.lanes]
            block = lane.next_block()
            if block is not None:
                return corpus, lane, block
            ended.add(corpus)
        raise StopIteration

    def describe(self, position: DataPosition, count: int) -> str:
        """Describe the `count` chunks after `position` and where the text of each lane's first chunk begins.

        At the end of an epoch that place may be in the epoch's tail, which is dropped, so that the text really begins
        with the next epoch. At most `_PLACES_SHOWN` lanes are described.

        Args:
            position: a position of this stream over all readers (`DataPosition.merged`).
        """
        head, mixture, first = position.head, Mixture(position.schedule), position.chunk
        lanes = dict.fromkeys((mixture.corpus_of(chunk), chunk % head.lanes) for chunk in range(first, first + count))
        places = []
        for corpus, lane in [*lanes][:_PLACES_SHOWN]:
            units, name = self.units[corpus], head.corpora[corpus].name
            cursor = position.states[corpus][lane].cursor
            where = units.describe(head.unit_at(name, units, lane, cursor))
            part = "portion" if head.packing == "best-fit" else "row"
            shuffled = " of its shuffled order" if head.shuffle and part == "row" else ""
            places.append(f"{where} from {part} {cursor.row}{shuffled} on, epoch {cursor.epoch}")
        more = f"; and {len(lanes) - len(places)} more lanes" if len(lanes) > len(places) else ""
        return f"chunks {first} to {first + count - 1} of the data: {'; '.join(places)}{more}"

    def stop(self) -> None:
        """Make a `next` that is in progress on another thread end soon, and refuse later ones (RunError)."""
        self._failure = self._failure or RunError("the token stream is closed")
        for lanes in self._lanes:
            for lane in lanes.values():
                lane.stop()

    def close(self) -> None:
        """Stop the threads and close the files. `position` stays readable.

        If another thread is inside `next`, where a slow read may hold it, that thread closes the stream as it leaves.
        """
        self.stop()
        self._is_closed = True
        self._close_unless_in_use()

    def _close_unless_in_use(self) -> None:
        if not self._in_use.acquire(blocking=False):
            return
        try:
            self._pool.close()
            for lanes in self._lanes:
                for lane in lanes.values():
                    lane.close()
        finally:
            self._in_use.release()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require_place(state: LaneState, units: int) -> None:
    if state.cursor.unit >= units:
        raise UsageError(f"data position is damaged (unit {state.cursor.unit} of {units}); use another checkpoint")


def _title(head: StreamHead, corpus: str, lane: int) -> str:
    """How error messages name the text of a lane."""
    text = "the data" if len(head.corpora) == 1 else f"corpus {corpus}"
    return text if head.lanes == 1 else f"lane {lane} of {head.lanes} of {text}"
