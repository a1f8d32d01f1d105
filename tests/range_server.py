"""A web server on a thread that serves byte ranges of files, counts requests and fails on demand."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Faults that a request can meet. "stall" waits STALL_SECONDS and then closes the connection without an answer.
FAULTS = ("reset", "500", "503", "short", "stall")
STALL_SECONDS = 2.0


@dataclass
class RangeServer:
    """Files to serve by name, and statistics about them.

    Attributes:
        fault: called with the method and path of each request; returns one of `FAULTS`, a status code, or None.
        ranges: whether range requests are honoured; otherwise the whole file is sent.
        announces_no_ranges: whether responses say that ranges are not supported (`Accept-Ranges: none`).
    """

    files: dict[str, Path]
    fault: Callable[[str, str], str | None] = lambda method, path: None
    ranges: bool = True
    announces_no_ranges: bool = False
    url: str = ""
    bytes_sent: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    faults: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forget(self) -> None:
        self.bytes_sent.clear()
        self.requests.clear()


@contextmanager
def serving(server: RangeServer) -> Iterator[RangeServer]:
    """Serve during the block; `server.url` is set to the address, without a trailing slash."""

    class Handler(_Handler):
        state = server

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: RangeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        state, name = self.state, self.path.partition("?")[0].lstrip("/")
        asked = self.headers.get("Range", "")
        with state.lock:
            state.requests.append((self.command, name, asked))
            fault = state.fault(self.command, name)
            if fault:
                state.faults[fault] = state.faults.get(fault, 0) + 1
        if fault == "reset":
            # Makes close() send a TCP reset instead of shutting down in order.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault == "stall":
            time.sleep(STALL_SECONDS)
            self.close_connection = True
            return
        if fault and fault.isdecimal():
            self._send(int(fault), b"")
            return
        if name not in state.files:
            self._send(404, b"")
            return
        data = state.files[name].read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if match and state.ranges:
            start, end = int(match[1]), min(int(match[2]), len(data) - 1)
            part = data[start : end + 1]
            self._send(206, part, short=fault == "short", total=len(data), start=start)
        else:
            self._send(200, data, short=fault == "short")

    def _send(self, status: int, body: bytes, *, short: bool = False, total: int = 0, start: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.state.announces_no_ranges:
            self.send_header("Accept-Ranges", "none")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if short:
            body = body[: len(body) // 2]
            self.close_connection = True
        name = self.path.partition("?")[0].lstrip("/")
        with self.state.lock:
            self.state.bytes_sent[name] = self.state.bytes_sent.get(name, 0) + len(body)
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:
            self.close_connection = True
