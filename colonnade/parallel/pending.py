"""A value in flight: what every collective in this package returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Pending(Generic[T]):
    """A value that a collective in flight has yet to deliver.

    Args:
        value: what `wait` returns if there is no `finish`.
        finish: called once, by the first `wait`; returns the value. On CUDA it makes the stream wait, not the host.
    """

    def __init__(self, value: T | None = None, finish: Callable[[], T] | None = None) -> None:
        self._value, self._finish = value, finish

    def wait(self) -> T:
        if self._finish is not None:
            self._value, self._finish = self._finish(), None
        return self._value  # type: ignore[return-value]
