"""A lock that admits one job at a time to a run's folder.

The lock belongs to the process and is released however it exits, so a killed job leaves no lock to remove.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from colonnade.errors import UsageError
from colonnade.files import replace_file

logger = logging.getLogger(__name__)

LOCK_NAME = "run.lock"
OWNER_NAME = "run.owner.json"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# A job that is restarted at once may find the previous one still exiting.
_PATIENCE_SECONDS = 3.0


class RunLock:
    """The lock of a run's folder, for one rank. It is held as long as this object and the process exist.

    Args:
        directory: the run's folder.

    Attributes:
        is_held: whether this job holds the lock, so that no other job can be in the folder.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.is_held = False
        self._lock: FileLock | None = None
        self._made_folder = False

    def take(self, *, create: bool = False) -> None:
        """Take the lock, unless it is already taken.

        If the file system has no locks, this only logs a one-line warning, and `is_held` stays False.

        Args:
            create: create the folder if it does not exist. If False, a missing folder is not locked.

        Raises:
            UsageError: another job, named by host and process id, has the lock; or the folder cannot be locked or
                written.
            OSError: the folder cannot be created.
        """
        if self._lock is not None:
            return
        if create and not self.directory.is_dir():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._made_folder = True
        if not self.directory.is_dir():
            return
        # filelock's fallback for file systems without locks is a plain file, which would outlive a killed job.
        lock = FileLock(self.directory / LOCK_NAME, fallback_to_soft=False)
        try:
            lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=0.1)
        except Timeout:
            raise UsageError(
                f"--checkpoint-dir {self.directory} is in use by {self._owner()}; wait for that job, end it, or give "
                "another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UsageError(
                    f"--checkpoint-dir {self.directory} cannot be locked ({error.strerror}); give a folder that can"
                ) from error
            (self.directory / LOCK_NAME).unlink(missing_ok=True)
            logger.warning(
                "%s is on a file system without locks: nothing keeps a second job out of it", self.directory.absolute()
            )
        else:
            self.is_held = True
        self._lock = lock
        if self.is_held:
            self._say_who()

    def release(self) -> None:
        """Release the lock and remove its files, and the folder if `take` created it and it is empty."""
        if not self.is_held or self._lock is None:
            return
        # Remove the file before releasing the lock: a job that has opened it meanwhile finds it gone and retries.
        for name in (OWNER_NAME, LOCK_NAME):
            (self.directory / name).unlink(missing_ok=True)
        self._lock.release()
        self.is_held = False
        self._lock = None
        if self._made_folder:
            with suppress(OSError):  # not empty
                self.directory.rmdir()

    def _say_who(self) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        try:
            replace_file(self.directory / OWNER_NAME, json.dumps(owner) + "\n")
        except OSError as error:
            raise UsageError(
                f"--checkpoint-dir {self.directory} cannot be written ({error.strerror}); give a folder that can"
            ) from error

    def _owner(self) -> str:
        """The holder of the lock, as far as the owner file tells."""
        try:
            owner = json.loads((self.directory / OWNER_NAME).read_text(encoding="utf-8"))
            job = f" (job {owner['job']})" if owner["job"] else ""
            return f"process {int(owner['pid'])} on host {owner['host']}{job}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another job"
