"""How a rank that must leave in the middle of a step tells the others, without a collective.

A failing rank cannot vote: its peers stand in a collective that it will never reach, and a vote of its own would pair
with theirs. So it leaves a key in the store of the rendezvous, which a thread of every rank looks at once a second.
"""

from __future__ import annotations

import os
import sys
import threading

import torch.distributed as dist

_KEY = "colonnade/peer_failed"
POLL_SECONDS = 1.0


def is_connection_lost(error: BaseException) -> bool:
    """Whether an error of a collective says that a peer is gone, rather than that something is wrong here."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


class PeerWatch:
    """Ends this process when another rank announces that it has failed.

    Args:
        enabled: False for a single rank, which has nobody to wait for.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._store = dist.distributed_c10d._get_default_store() if enabled else None
        self._done = threading.Event()
        if enabled:
            threading.Thread(target=self._watch, name="peer-watch", daemon=True).start()

    def announce_failure(self) -> None:
        """Tell all ranks that this one is leaving; call it before the exception that ends it."""
        self._done.set()
        if self._store is not None:
            self._store.set(_KEY, str(dist.get_rank()))

    def close(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        assert self._store is not None
        while not self._done.wait(POLL_SECONDS):
            try:
                failed = self._store.check([_KEY])
            except dist.DistError:  # the store is gone: the launcher is taking the run down
                return
            if failed and not self._done.is_set():
                # The main thread may stand in a collective for good; nothing here is worth an orderly exit.
                sys.stdout.flush()
                os._exit(1)
