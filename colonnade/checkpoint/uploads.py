"""Uploading checkpoints to a remote store, one after the other, on a background thread.

Checkpoints that wait for upload are not pruned. If requested, a local copy is removed once the store has confirmed the
upload, but never one that `Retention` says must stay.
"""

from __future__ import annotations

import json
import logging
import queue
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread

from colonnade.checkpoint.prune import move_aside
from colonnade.checkpoint.retention import Retention
from colonnade.files import replace_file
from colonnade.runtime.vote import one_line

logger = logging.getLogger(__name__)

UPLOADED_NAME = "uploaded.json"
# Most checkpoints that wait for a slow or unavailable store. Each takes up disk space while it waits.
MOST_WAITING = 4


class StoreClosed(Exception):
    """The store accepts nothing until the run is started again; the message says why."""


class CheckpointUploads:
    """Uploads the checkpoints of one run folder; exists on the rank that uploads.

    Args:
        retention: knows the run's folder, and which of its checkpoints must stay.
        store: what identifies the store. Uploads confirmed by another one do not count.
        upload: uploads a checkpoint's folder and returns its name in the store once the upload is confirmed, else
            raises: `StoreClosed` if further uploads are of no use. Called on one thread.
        say: takes a line for the screen.
        drop: remove local copies of confirmed checkpoints that are superseded.
    """

    def __init__(
        self,
        retention: Retention,
        upload: Callable[[Path], str],
        *,
        store: Mapping[str, str | None],
        say: Callable[[str], None],
        drop: bool = False,
    ) -> None:
        self._retention, self._directory, self._upload, self._say = retention, retention.directory, upload, say
        self._drop, self._store = drop, dict(store)
        self._uploaded = uploaded(self._directory, self._store)
        self._queue: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._lock = Lock()
        self._waiting: list[Path] = []
        self._under_way: Path | None = None
        self._is_closed = False
        self._thread = Thread(target=self._live, name="checkpoint uploads", daemon=True)
        self._thread.start()

    def resend(self, step: int) -> None:
        """Queue the newest checkpoints up to `step` that earlier starts have not uploaded, at most `MOST_WAITING`."""
        unsent = [
            info.path
            for info in self._retention.intact()
            if (info.step or 0) <= step and info.path.name not in self._uploaded
        ]
        for path in reversed(unsent[:MOST_WAITING]):
            self.add(path)

    def add(self, path: Path) -> None:
        """Queue a finished checkpoint. If too many wait, the upload of the one that has waited longest is given up."""
        given_up = None
        with self._lock:
            if self._is_closed:
                return
            self._waiting.append(path)
            # If a step is saved again, the store's copy under its name is no longer this checkpoint.
            if self._uploaded.pop(path.name, None) is not None:
                with suppress(OSError):
                    self._record()
            if len(self._waiting) > MOST_WAITING:
                given_up = self._waiting.pop(0)
        if given_up is not None:
            self._say(f"warning: {given_up.name} is not uploaded: {MOST_WAITING} later checkpoints wait already")
        self._queue.put(path)

    @property
    def pending(self) -> tuple[Path, ...]:
        """Checkpoints that wait or are being uploaded; they must not be removed."""
        with self._lock:
            return (*((self._under_way,) if self._under_way is not None else ()), *self._waiting)

    def close(self, seconds: float, tell: Callable[[], None] = lambda: None) -> None:
        """Wait at most `seconds` for pending uploads, and report what is left.

        Args:
            tell: prints the lines passed to `say`; called before the wait.
        """
        self._queue.put(None)
        if self.pending:
            self._say(f"uploading {', '.join(path.name for path in self.pending)}; at most {seconds:.0f} s")
            tell()
        deadline = time.monotonic() + seconds
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            names = ", ".join(path.name for path in self.pending)
            self._say(
                f"warning: not uploaded in time: {names}; the next start in {self._directory} sends what is there"
            )

    def _live(self) -> None:
        while (path := self._queue.get()) is not None:
            with self._lock:
                if path not in self._waiting:
                    continue
                self._waiting.remove(path)
                self._under_way = path
            try:
                name = self._upload(path)
                with self._lock:
                    if path not in self._waiting:  # else it was saved again meanwhile
                        self._uploaded[path.name] = name
                        self._record()
                self._say(f"uploaded {path.name} as {name}")
            except StoreClosed as error:
                with self._lock:
                    self._is_closed, self._under_way = True, None
                    self._waiting.clear()
                self._say(f"warning: checkpoints are not uploaded ({error})")
                return
            except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a client raises, the run continues
                self._say(f"warning: {path.name} is not uploaded ({one_line(error)}); the local copy stays")
            with self._lock:
                self._under_way = None
            if self._drop:
                self._drop_uploaded()

    def _record(self) -> None:
        replace_file(
            self._directory / UPLOADED_NAME, json.dumps({**self._store, "checkpoints": self._uploaded}, indent=2) + "\n"
        )

    def _drop_uploaded(self) -> None:
        """Remove confirmed checkpoints that the run does not need for a restart."""
        try:
            superseded = self._retention.superseded()
        except OSError as error:
            logger.warning("uploaded checkpoints in %s were not dropped: %s", self._directory, error)
            return
        for path in superseded:
            if path.name not in self._uploaded or path in self.pending:
                continue
            try:
                shutil.rmtree(move_aside(path))
            except OSError as error:
                logger.warning("uploaded checkpoint %s was not dropped: %s", path, error)


def uploaded(directory: Path, store: Mapping[str, str | None]) -> dict[str, str]:
    """The checkpoints of a run's folder that this store has confirmed: folder name -> name in the store."""
    try:
        content = json.loads((directory / UPLOADED_NAME).read_text(encoding="utf-8"))
        if all(content[key] == value for key, value in store.items()):
            return {str(key): str(value) for key, value in content["checkpoints"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # missing or unreadable: all checkpoints count as not uploaded
    return {}
