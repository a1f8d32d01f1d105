"""`DataPosition`: where a token stream stands, exactly, in a few hundred bytes.

A position names the first token of the *next* block of each lane, so no left-over tokens are stored, and it says what
the stream is a function of (its head), so that going on with something else is refused instead of silently different.
Nothing in it depends on batch rows, worker threads, or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from colonnade.data.shards import Manifest
from colonnade.errors import UsageError

POSITION_FORMAT = 1


class LaneCursor(NamedTuple):
    """First token of a lane's next block: token `token` of the encoded row `row` (counted before filtering, boundary
    tokens included) of unit number `unit`, in epoch `epoch`; all from 0."""

    epoch: int
    unit: int
    row: int
    token: int


class SkippedUnit(NamedTuple):
    """A unit that could not be decoded. It stays skipped for the rest of the run, even if it becomes readable."""

    unit: int
    reason: str


@dataclass(frozen=True, slots=True)
class StreamHead:
    """Everything besides the cursor that the stream is a function of."""

    manifest: str  # digest over ordered file names, sizes, rows, row groups
    files: int
    rows: int
    tokenizer: str  # digest over the serialised tokenizer
    bos: int | None  # boundary token ids; None where none is added
    eos: int | None
    block_size: int
    lanes: int
    seed: int
    filter_version: int
    text_column: str

    @classmethod
    def create(cls, manifest: Manifest, **others: Any) -> StreamHead:
        """Head for a corpus; `others` are the remaining fields."""
        return cls(manifest=manifest.digest, files=manifest.files, rows=manifest.rows, **others)

    def differences(self, other: StreamHead) -> list[str]:
        """What differs in `other`, as `name old -> new`."""
        lines = []
        if self.manifest != other.manifest:
            old = f"{self.files} files with {self.rows} rows ({self.manifest[:8]})"
            lines.append(f"data {old} -> {other.files} files with {other.rows} rows ({other.manifest[:8]})")
        for field in fields(self):
            old, new = getattr(self, field.name), getattr(other, field.name)
            if field.name not in ("manifest", "files", "rows") and old != new:
                if field.name == "tokenizer":
                    old, new = old[:8], new[:8]
                lines.append(f"{field.name} {old} -> {new}")
        return lines


@dataclass(frozen=True, slots=True)
class DataPosition:
    """State of a token stream after chunk number `chunk - 1`.

    Attributes:
        head: what the stream is a function of.
        chunk: global number of the next chunk, from 0. Lane `chunk % lanes` delivers it.
        cursors: one for each lane.
        skipped: damaged units passed so far.
    """

    head: StreamHead
    chunk: int
    cursors: tuple[LaneCursor, ...]
    skipped: tuple[SkippedUnit, ...] = ()

    @classmethod
    def start(cls, head: StreamHead) -> DataPosition:
        """The position before the first chunk."""
        return cls(head=head, chunk=0, cursors=(LaneCursor(0, 0, 0, 0),) * head.lanes)

    @property
    def epoch(self) -> int:
        """Epoch of the next chunk (before a possible wrap, which happens when that chunk is asked for)."""
        return self.cursors[self.chunk % self.head.lanes].epoch

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {
            "format": POSITION_FORMAT,
            "head": asdict(self.head),
            "chunk": self.chunk,
            "cursors": [list(cursor) for cursor in self.cursors],
            "skipped": [list(skip) for skip in self.skipped],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> DataPosition:
        """The position that `to_dict` described. Raises UsageError where `state` is not one."""
        if state.get("format") != POSITION_FORMAT:
            raise UsageError(
                f"data position has format {state.get('format')!r}, this program reads {POSITION_FORMAT}; "
                "go on with the program version that wrote it"
            )
        try:
            position = cls(
                head=StreamHead(**state["head"]),
                chunk=int(state["chunk"]),
                cursors=tuple(LaneCursor(*(int(number) for number in cursor)) for cursor in state["cursors"]),
                skipped=tuple(SkippedUnit(int(unit), str(reason)) for unit, reason in state["skipped"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"data position is damaged ({error!r}); use another checkpoint") from error
        numbers = [position.chunk, *(number for cursor in position.cursors for number in cursor)]
        if len(position.cursors) != position.head.lanes or not position.cursors or min(numbers) < 0:
            raise UsageError(
                f"data position is damaged (chunk {position.chunk}, cursors {position.cursors}); use another checkpoint"
            )
        return position

    def require(self, head: StreamHead, units: int) -> None:
        """Check that a stream with `head` over `units` units may go on from here.

        Raises:
            UsageError: naming every difference with its old and new value.
        """
        differences = self.head.differences(head)
        if differences:
            raise UsageError(
                f"the data position does not fit this run: {'; '.join(differences)}; restore these or start a new run"
            )
        beyond = [cursor.unit for cursor in self.cursors if cursor.unit >= units]
        if beyond:
            raise UsageError(f"data position is damaged (unit {beyond[0]} of {units}); use another checkpoint")

    def advanced(self, cursor: LaneCursor, skipped: tuple[SkippedUnit, ...]) -> DataPosition:
        """The position one chunk later, whose lane then stands at `cursor`."""
        lane = self.chunk % self.head.lanes
        cursors = (*self.cursors[:lane], cursor, *self.cursors[lane + 1 :])
        return replace(self, chunk=self.chunk + 1, cursors=cursors, skipped=skipped)
