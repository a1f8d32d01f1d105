"""Prefetching: a thread that keeps the next few items of an iterator ready."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

# How long `close` waits for an iterator that is producing an item.
_JOIN_SECONDS = 10.0


class Prefetcher(Generic[Item]):
    """Iterator over the items of `iterator`, up to `depth` of which a daemon thread produces in advance.

    If the iterator raises, `get` raises that exception once the earlier items have been taken, and so does every later
    `get`. The iterator itself is not closed: it belongs to the caller, who closes it after the prefetcher.
    """

    def __init__(self, iterator: Iterator[Item], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}, it must be at least 1")
        self._iterator = iterator
        self._depth = depth
        self._ready: deque[Item] = deque()
        self._end: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._produce, name="prefetch", daemon=True)
        self._thread.start()
        # A daemon thread that is inside native code during interpreter shutdown can abort the process.
        atexit.register(self.close)

    def get(self) -> Item:
        """The next item. Raises StopIteration at the end, the iterator's exception if it failed, and ValueError after
        `close`."""
        with self._changed:
            if not self._ready and self._end is None and not self._closed:
                self._changed.wait_for(lambda: self._ready or self._end is not None or self._closed)
            if self._closed:
                raise ValueError("the prefetcher is closed")
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            assert self._end is not None
            raise self._end

    def close(self) -> None:
        """Stop the thread and discard its items. Waits at most `_JOIN_SECONDS` for an item that is being produced."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)

    def _produce(self) -> None:
        end: BaseException
        try:
            for item in self._iterator:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                    if self._closed:
                        return
                    self._ready.append(item)
                    self._changed.notify_all()
            end = StopIteration()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the consumer
            end = error
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        return self.get()

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
