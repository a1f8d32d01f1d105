"""The prefetching thread: order, bounded depth, errors, prompt ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from colonnade.data import prefetch
from colonnade.data.prefetch import Prefetcher
from colonnade.data.unit_reader import UnitReader
from colonnade.errors import RunError
from data_helpers import open_stream, stdlib_texts, write_corpus


def test_items_come_in_order_and_then_the_end() -> None:
    with Prefetcher(iter(range(100)), depth=3) as prefetcher:
        assert list(prefetcher) == list(range(100))
        for _ in range(2):
            with pytest.raises(StopIteration):
                prefetcher.get()


def test_no_more_than_depth_items_wait() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in count():
            made.append(number)
            yield number

    with Prefetcher(items(), depth=4) as prefetcher:
        assert prefetcher.get() == 0
        time.sleep(0.1)
        assert len(made) == 1 + 4 + 1  # taken, ready, and the one in the thread's hand


def test_an_exception_arrives_after_the_items_before_it_and_again() -> None:
    class Failure(BaseException):
        pass

    failure = Failure("gone")

    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise failure

    with Prefetcher(items(), depth=5) as prefetcher:
        assert [prefetcher.get(), prefetcher.get()] == [1, 2]
        for _ in range(2):
            with pytest.raises(Failure) as caught:
                prefetcher.get()
            assert caught.value is failure


def test_close_with_a_full_queue_is_prompt_and_ends_the_thread() -> None:
    before = threading.active_count()
    prefetcher = Prefetcher(count(), depth=1)
    prefetcher.get()
    begin = time.perf_counter()
    prefetcher.close()
    prefetcher.close()
    assert time.perf_counter() - begin < 1
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        prefetcher.get()


def test_close_wakes_a_consumer_that_waits() -> None:
    release = threading.Event()

    def items() -> Iterator[int]:
        release.wait(10)
        yield 1

    prefetcher = Prefetcher(items(), depth=1)
    errors: list[BaseException] = []

    def consume() -> None:
        try:
            prefetcher.get()
        except ValueError as error:
            errors.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.05)
    closer = threading.Thread(target=prefetcher.close)
    closer.start()
    consumer.join(5)
    assert len(errors) == 1
    release.set()
    closer.join(5)
    assert not closer.is_alive()


def test_a_stream_that_is_closed_inside_a_slow_read_is_closed_once_that_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither close raises or waits for the read. The thread that reads then closes the files as it leaves."""
    monkeypatch.setattr(prefetch, "_JOIN_SECONDS", 0.2)
    inside, over = threading.Event(), threading.Event()
    real = UnitReader._first_window

    def slow(reader: UnitReader, *args: Any) -> Any:
        window = real(reader, *args)
        if threading.current_thread().name == "prefetch":
            inside.set()
            over.wait(20)
        return window

    def descriptors() -> int:
        return sum(str(tmp_path) in os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())

    stream = open_stream(write_corpus(tmp_path, stdlib_texts()))
    next(stream)
    monkeypatch.setattr(UnitReader, "_first_window", slow)
    prefetcher = Prefetcher(stream, depth=100)
    assert inside.wait(10)
    begin = time.perf_counter()
    stream.stop()
    prefetcher.close()
    stream.close()
    assert time.perf_counter() - begin < 5
    assert descriptors() > 0
    over.set()
    prefetcher._thread.join(10)
    assert not prefetcher._thread.is_alive()
    assert descriptors() == 0
    with pytest.raises(RunError, match="the token stream is closed"):
        next(stream)


def test_depth_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="depth is 0"):
        Prefetcher(iter([]), depth=0)


def test_a_program_that_does_not_close_still_ends_cleanly(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path[:0] = ['.', 'tests']\n"
        "from pathlib import Path\n"
        "from data_helpers import stdlib_texts, tiny_tokenizer, write_corpus\n"
        "from data_processing import Prefetcher, streaming_token_generator\n"
        f"shards = write_corpus(Path({str(tmp_path)!r}), stdlib_texts())\n"
        "stream = streaming_token_generator(shards, tiny_tokenizer(), block_size=16, workers=2)\n"
        "prefetcher = Prefetcher(stream, 4)\n"
        "print(len(prefetcher.get().tokens))\n"
    )
    root = Path(__file__).resolve().parents[1]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "17\n", "")
