"""Which checkpoints of a run's folder have to stay, as far as the current start knows."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from threading import Lock

from colonnade.checkpoint.discover import CheckpointInfo, find_checkpoints
from colonnade.checkpoint.prune import milestones, prune_checkpoints


class Retention:
    """Decides for one start of a run which checkpoints may be removed. Pruning and uploads share one object.

    Names and sizes do not show whether a checkpoint's content is intact. The start of a run compares hashes, and what
    it finds damaged is neither counted nor removed here, until the step is saved again. The methods may be called on
    any thread.

    Args:
        directory: the run's folder.
        keep: newest checkpoints to keep; 0 keeps all.
        keep_every: as for `milestones`.
        damaged: checkpoints that this start found damaged.
        resumed_from: the checkpoint that this start goes on from. It stays until the first save of this start.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 0,
        keep_every: int = 0,
        damaged: Collection[Path] = (),
        resumed_from: Path | None = None,
    ) -> None:
        self.directory, self._keep, self._keep_every = directory, keep, keep_every
        self._lock = Lock()
        self._damaged = frozenset(path.resolve() for path in damaged)
        # What a restart would need if the process were killed now.
        self._latest = resumed_from

    def committed(self, path: Path) -> None:
        """Note that a checkpoint has been written at `path`, perhaps in place of a damaged one."""
        with self._lock:
            self._damaged -= {path.resolve()}
            self._latest = path

    def prune(self, pending: Collection[Path] = ()) -> list[Path]:
        """Remove the oldest checkpoints; see `prune_checkpoints`. `pending` ones, which wait for upload, stay."""
        damaged, latest = self._state()
        return prune_checkpoints(
            self.directory, self._keep, (*latest, *pending), keep_every=self._keep_every, damaged=damaged
        )

    def intact(self) -> list[CheckpointInfo]:
        """The complete checkpoint folders that are not known to be damaged, newest first. Raises OSError."""
        damaged, _ = self._state()
        return [
            info
            for info in find_checkpoints(self.directory)
            if not info.is_single_file and info.path.resolve() not in damaged
        ]

    def superseded(self) -> list[Path]:
        """The checkpoints that a restart does not need and that are no milestones, newest first. Raises OSError."""
        infos = self.intact()
        _, latest = self._state()
        needed = {path.resolve() for path in latest}
        kept = milestones(infos, self._keep_every)
        return [info.path for info in infos[1:] if info.path not in kept and info.path.resolve() not in needed]

    def _state(self) -> tuple[frozenset[Path], tuple[Path, ...]]:
        with self._lock:
            return self._damaged, () if self._latest is None else (self._latest,)
