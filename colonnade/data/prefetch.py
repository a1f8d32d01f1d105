"""Prefetching: a thread that keeps the next few items of an iterator ready."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

# How long `close` waits for an iterator that is in the middle of making an item.
_JOIN_SECONDS = 10.0


class Prefetcher(Generic[Item]):
    """Iterator over the items of `iterator`, up to `depth` of which are made ahead on a daemon thread.

    An exception of the iterator is raised by `get` once the items before it have been taken, and again by every later
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
        # A daemon thread that is inside native code while the interpreter is torn down can abort the process.
        atexit.register(self.close)

    def get(self) -> Item:
        """The next item. Raises StopIteration at the end, the iterator's own exception if it failed, and ValueError
        after `close`."""
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
        """Stop the thread and forget what it made. Returns at once, or when the item being made is done."""
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
