"""Random access to the bytes of a shard, which is a local file or a URL that fsspec can open.

Both kinds of `Source` read at a given offset. A remote one fetches exactly the ranges requested and retries after
network errors (`colonnade/data/retries.py`). `focus` tells it which range is read next: a small range is then held in
memory as a whole, a larger one is read in blocks with one block of read-ahead. It holds about 8 MiB at any time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import stat
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from colonnade.data.retries import POLICY, UnreachableError, with_retries
from colonnade.errors import UsageError, message_line

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

# How much of a file's end is fingerprinted. pyarrow requests the same size when it looks for a Parquet footer.
TAIL_BYTES = 64 << 10
# A file of up to this size is fingerprinted as a whole.
WHOLE_BYTES = 8 << 20
# A range of up to this size is fetched as a whole; those of the current and the next unit may be in memory together.
HELD_BYTES = (8 << 20) + (256 << 10)
# Block size for longer ranges: the block being read and the next one are in memory.
_BLOCK_BYTES = 4 << 20
# How many open files a reading process allows itself. Some programs that it may start look at every possible one.
_OPEN_FILES = 1 << 16

_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")
_memory_lock = threading.Lock()


def allow_many_files() -> None:
    """Raise this process's own limit on open files, as servers do: every lane of every corpus keeps two open."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # then it stays as it is, and may be enough
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_remote(path: str) -> bool:
    """Whether `path` is a URL that is not `file://`."""
    return _URL.match(path) is not None and not path.startswith("file://")


def local_path(path: str) -> str:
    """A local path, without `file://`."""
    return path.removeprefix("file://")


def expand_url(pattern: str) -> list[str]:
    """The files that a URL with wildcards matches; a URL without wildcards is returned unchanged.

    Raises:
        UsageError: the package for its scheme is missing, or the file system cannot list files or be reached.
    """
    over_http = pattern.startswith(("http://", "https://"))
    if not re.search(r"[*\[]" if over_http else r"[*?\[]", pattern):
        return [pattern]
    if over_http:
        raise UsageError(
            f"data pattern {pattern!r}: a web server cannot list its files; give each URL, separated by commas"
        )
    filesystem, path = _filesystem(pattern)
    try:
        names = with_retries(f"data pattern {pattern!r}", lambda: filesystem.glob(path, detail=True))
    except UnreachableError as error:
        raise UsageError(str(error)) from error
    # In a chain of file systems (`simplecache::zip://*.jsonl::s3://bucket/x.zip`), names are those of the first path.
    parts = pattern.split("::")
    first = next(index for index, part in enumerate(parts) if "://" in part)
    return [
        "::".join([*parts[:first], filesystem.unstrip_protocol(name), *parts[first + 1 :]])
        for name, facts in names.items()
        if facts["type"] == "file"
    ]


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path within it. Raises UsageError."""
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0].lower()
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, connect=POLICY.connect_timeout, sock_read=POLICY.read_timeout)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
            # With compression, the server could apply a byte range to the compressed file.
            options["headers"] = {"Accept-Encoding": "identity"}
        filesystem, path = url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        remedy = f"install it: pip install 'colonnade[{extra}]'" if extra else "install that package"
        raise UsageError(f"{url}: a package for {scheme}:// is missing ({message_line(error)}); {remedy}") from error
    except ValueError as error:
        raise UsageError(f"{url}: {message_line(error)}; give a local path or a URL that fsspec can read") from error
    return filesystem, path


def open_source(
    path: str, size: int | None = None, stopped: threading.Event | None = None
) -> LocalSource | RemoteSource:
    """Open the file at `path`. If `size` is given, a remote file's size is not queried. Once `stopped` is set, a remote
    file is not tried again.

    Raises:
        OSError: a local file cannot be opened.
        UnreachableError: a remote file cannot be opened.
        UsageError: the package for its scheme is missing.
    """
    return RemoteSource(path, size, stopped) if is_remote(path) else LocalSource(local_path(path))


class LocalSource:
    """A local file. It is read, never memory-mapped: if it is truncated during a run, the result must be an error and
    not a SIGBUS."""

    failure = None

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        if stat.S_ISDIR(status.st_mode):
            self.close()
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)

    def read_at(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from `start`; fewer only at the end of the file."""
        parts = []
        # One call reads at most 2 GiB, and less if a signal interrupts it.
        while size > 0 and (data := os.pread(self._descriptor, size, start)):
            parts.append(data)
            start, size = start + len(data), size - len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def arrow(self) -> pa.NativeFile:
        """A newly opened file object for pyarrow; the caller closes it."""
        import pyarrow as pa

        # As bytes, because pyarrow encodes text as UTF-8 and a file name need not be UTF-8.
        return pa.OSFile(os.fsencode(self.path))

    def focus(self, start: int, stop: int) -> None:
        """No-op: the operating system reads ahead."""

    def release(self) -> None:
        """No-op: nothing is held."""

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class RemoteSource:
    """A file behind a URL.

    Attributes:
        failure: the first error that ended the retries. It is kept because libraries such as pyarrow may replace it
            with an error of their own.
    """

    def __init__(self, url: str, size: int | None = None, stopped: threading.Event | None = None) -> None:
        self.path = url
        self.failure: UnreachableError | None = None
        self._stopped = stopped
        self._held: list[tuple[int, bytes]] = []
        self._span: tuple[int, int] | None = None  # a range that is read in blocks
        self._block: tuple[int, bytes] = (0, b"")
        self._next_block: tuple[int, Background[bytes]] | None = None
        filesystem, path = _filesystem(url)
        self._filesystem = filesystem  # that of a zip file closes it when it is collected
        # fsspec's memory file system hands every reader the same file object.
        self._lock = _memory_lock if "memory" in _protocols(filesystem) else threading.Lock()
        if size is None:
            size = self._size(filesystem, path)
        self.size = size
        options: dict[str, Any] = {"size": size} if "http" in _protocols(filesystem) else {}
        self._handle = self._try(lambda: filesystem.open(path, "rb", cache_type="none", **options))

    def _size(self, filesystem: Any, path: str) -> int:
        facts = self._try(lambda: filesystem.info(path))
        if facts.get("type") == "directory":
            self._fail(UnreachableError(f"{self._name} is a folder; add a pattern such as '/*.parquet'"))
        if facts.get("size") is None or facts.get("partial") is False:
            self._fail(
                UnreachableError(
                    f"{self._name} cannot be read in parts: its server does not answer range requests; "
                    "download the file, or use another server"
                )
            )
        return int(facts["size"])

    @property
    def _name(self) -> str:
        return f"data shard {self.path}"

    def read_at(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from `start`; fewer only at the end of the file. Raises UnreachableError."""
        stop = min(start + size, self.size)
        if stop <= start:
            return b""
        for begin, data in self._held:
            if begin <= start and stop <= begin + len(data):
                return data[start - begin : stop - begin]
        if self._span is not None and self._span[0] <= start and stop <= self._span[1]:
            return self._from_blocks(self._span, start, stop)
        return self._fetch(start, stop)

    def hold_tail(self) -> None:
        """Fetch the end of the file, where a footer would be, and keep it in memory."""
        start = max(0, self.size - TAIL_BYTES)
        self._held = [(start, self._fetch(start, self.size))]

    def focus(self, start: int, stop: int) -> None:
        """Announce that `[start, stop)` is read next: fetch all of it if it is small, else its beginning, and drop
        everything else that is held."""
        stop = min(stop, self.size)
        if self._span == (start, stop) or any(b <= start and stop <= b + len(data) for b, data in self._held):
            return
        self.release()
        if stop - start <= HELD_BYTES:
            self._held = [(start, self._fetch(start, stop))]
        else:
            self._span = (start, stop)
            self._from_blocks(self._span, start, start + 1)

    def release(self) -> None:
        """Drop what is held in memory."""
        self._held, self._span, self._block, self._next_block = [], None, (0, b""), None

    def arrow(self) -> pa.NativeFile:
        """A file object for pyarrow with its own position; the caller closes it."""
        import pyarrow as pa

        return pa.PythonFile(PositionedFile(self), mode="r")

    def close(self) -> None:
        """Drop what is held in memory. A request in flight on another thread fails at its next attempt."""
        self.release()
        self._handle.close()

    def _from_blocks(self, span: tuple[int, int], start: int, stop: int) -> bytes:
        parts = []
        while start < stop:
            begin = span[0] + (start - span[0]) // _BLOCK_BYTES * _BLOCK_BYTES
            if self._block[0] != begin or not self._block[1]:
                self._block = (0, b"")
                self._block = (begin, self._take_block(span, begin))
            data = self._block[1][start - begin : stop - begin]
            parts.append(data)
            start += len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _take_block(self, span: tuple[int, int], begin: int) -> bytes:
        expected, self._next_block = self._next_block, None
        if expected is not None and expected[0] == begin:
            data = expected[1].result()
        else:
            data = self._fetch(begin, min(begin + _BLOCK_BYTES, span[1]))
        following = begin + _BLOCK_BYTES
        if following < span[1]:
            fetch = Background(lambda: self._fetch(following, min(following + _BLOCK_BYTES, span[1])))
            self._next_block = (following, fetch)
        return data

    def _fetch(self, start: int, stop: int) -> bytes:
        def request() -> bytes:
            with self._lock:
                self._handle.seek(start)
                data: bytes = self._handle.read(stop - start)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came for the {stop - start} from byte {start} on")
            return data

        return self._try(request)

    def _try(self, request: Callable[[], T]) -> T:
        try:
            return with_retries(self._name, request, self._stopped)
        except UnreachableError as error:
            self._fail(error)

    def _fail(self, error: UnreachableError) -> NoReturn:
        self.failure = self.failure or error
        raise error


Source = LocalSource | RemoteSource


def fingerprint(source: Source, footer_only: bool = False) -> str:
    """Digest over a file's size and content: all of the content up to `WHOLE_BYTES`, else the first and last 64 KiB.
    The end of a remote file stays in memory, because the footer is read from it next.

    With `footer_only`, the content is only that part of a Parquet footer that is in the last 64 KiB: sizes and offsets
    of all column chunks, and statistics if the writer made them. So a file whose row group was repaired in place keeps
    its fingerprint.
    """
    if isinstance(source, RemoteSource):
        source.hold_tail()
    tail = source.read_at(max(0, source.size - TAIL_BYTES), TAIL_BYTES)
    if footer_only and tail.endswith(b"PAR1"):
        told = tail[-8 - int.from_bytes(tail[-8:-4], "little") :]
    elif source.size <= WHOLE_BYTES:
        told = source.read_at(0, source.size)
    else:
        told = source.read_at(0, TAIL_BYTES) + tail
    return hashlib.blake2b(source.size.to_bytes(8, "little") + told, digest_size=16).hexdigest()


class Background(Generic[T]):
    """A call on its own thread. It is a daemon thread: a server that stalls must not keep the process alive."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._use: Callable[[T], None] | None = None
        self._handover = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            value = self._call()
        except BaseException as error:  # noqa: BLE001
            self._error = error  # raised again by `result`
            return
        with self._handover:
            use = self._use
            if use is None:
                self._value.append(value)
        if use is not None:
            use(value)

    def result(self) -> T:
        """Wait for the call and return its result, or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value.pop()

    def then(self, use: Callable[[T], None]) -> None:
        """Pass the result to `use`, now or when it is available, instead of returning it from `result`. An error is
        dropped."""
        with self._handover:
            self._use = use
            value = self._value.pop() if self._value else None
        if value is not None:
            use(value)


class PositionedFile(io.RawIOBase):
    """A source as a file object with a position, as pyarrow and gzip need it. Closing it leaves the source open."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        wanted = self._source.size - self._position if size is None or size < 0 else size
        data = self._source.read_at(self._position, wanted)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    names = filesystem.protocol
    return (names,) if isinstance(names, str) else tuple(names)
