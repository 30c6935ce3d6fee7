"""The sample Data Provider: an HTTP/1.1 server for a directory, and the ways in which real providers fail.

Serves files with strong validators, single ranges (RFC 9110 sections 13 and 14) and, where `NAME.gz` lies beside
`NAME`, with gzip; keeps connections alive and, where no fault applies, sends bodies from file to socket in the kernel,
so that a benchmark measures the consumer. Listens on 127.0.0.1. `python -m devstack.provider DIRECTORY` prints its URL
and serves until SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import signal
import socket
import socketserver
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import unquote, urlsplit

from requests.structures import CaseInsensitiveDict

CONTENT_TYPES = {".ndjson": "application/fhir+ndjson", ".json": "application/json"}
RANGE = re.compile(r"bytes=(?:(\d+)-(\d*)|-(\d+))")
SLICES_PER_SECOND = 20
DRAIN_SECONDS = 5.0


@dataclass(eq=False, kw_only=True)
class _Effects:
    """What a fault does; several may be set at once."""

    status: int | None = None
    retry_after: str | None = None
    redirect_to: str | None = None
    require_header: tuple[str, str] | None = None
    no_range: bool = False
    change_etag: bool = False
    cut_after: int | None = None
    truncate_to: int | None = None
    stall_after: int | None = None
    bytes_per_second: int | None = None


@dataclass(eq=False)
class Fault(_Effects):
    """A rule: what goes wrong with GET and HEAD of the paths that match, for the first `times` of them or always.

    `path_glob` is matched against the path without its first slash: `Patient*.ndjson`. The effects:

    - `status`, with `retry_after` as `Retry-After`: answer this instead.
    - `redirect_to`: answer 307 to this URL instead.
    - `require_header`: answer 401 to a request without this header and value.
    - `no_range`: ignore Range, send no ETag.
    - `change_etag`: each answer has a validator of its own, as if the file had just changed.
    - `cut_after`: reset the connection after so many bytes of the body.
    - `truncate_to`: end the connection in order after so many bytes, fewer than Content-Length promised.
    - `stall_after`: send nothing more after so many bytes until `release` is set.
    - `bytes_per_second`: send the body no faster; for each response.

    `applied` counts the requests the rule was applied to.
    """

    path_glob: str = "*"
    times: int | None = None
    release: threading.Event = field(default_factory=threading.Event, kw_only=True)
    applied: int = field(default=0, init=False)

    def matches(self, path: str) -> bool:
        """Whether the rule holds for the next request of this path."""
        spent = self.times is not None and self.applied >= self.times
        return not spent and fnmatchcase(path, self.path_glob.lstrip("/"))

    def answers(self, headers: Mapping[str, str]) -> bool:
        """Whether the request is answered by the fault rather than from the file."""
        if self.require_header is not None and headers.get(self.require_header[0]) != self.require_header[1]:
            return True
        return self.status is not None or self.redirect_to is not None


class Faults:
    """Rules in the order in which they were added; safe to change while requests are served."""

    def __init__(self, *rules: Fault) -> None:
        self._lock = threading.Lock()
        self._rules = list(rules)

    def add(self, fault: Fault) -> Fault:
        """Let the rule hold from the next request on; returns it."""
        with self._lock:
            self._rules.append(fault)
        return fault

    def clear(self) -> None:
        """Remove every rule; responses that stall under one go on."""
        with self._lock:
            rules, self._rules = self._rules, []
        for rule in rules:
            rule.release.set()

    def take(self, path: str, headers: Mapping[str, str]) -> list[Fault]:
        """The rules for this request, counted as applied. One that answers it is the last: those after it wait."""
        taken = []
        with self._lock:
            for rule in self._rules:
                if rule.matches(path):
                    rule.applied += 1
                    taken.append(rule)
                    if rule.answers(headers):
                        break
        return taken


@dataclass(frozen=True)
class Request:
    """A request as it was answered. Of an Authorization header only its presence is kept."""

    method: str
    path: str
    headers: Mapping[str, str]
    status: int


class SampleProvider:
    """Serves a directory, from `with` to its end; a file is read anew for each request.

    `port` 0: a free one. `requests` lists what was answered so far.
    """

    def __init__(self, directory: Path, *, faults: Faults | None = None, port: int = 0) -> None:
        self.directory = directory.resolve()
        self.faults = faults or Faults()
        self._port = port
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._changes = 0

    def __enter__(self) -> Self:
        self._server = _Server(self, self._port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections()
        self._server.server_close()

    @property
    def requests(self) -> list[Request]:
        """What was answered so far, in that order."""
        with self._lock:
            return list(self._requests)

    def add(self, fault: Fault) -> Fault:
        """Let a fault hold from the next request on; returns it."""
        return self.faults.add(fault)

    def clear(self) -> None:
        """Remove every fault; responses that stall go on."""
        self.faults.clear()

    def record(self, request: Request) -> None:
        """Note a request that is being answered."""
        with self._lock:
            self._requests.append(request)

    def next_change(self) -> int:
        """A number not given before."""
        with self._lock:
            self._changes += 1
            return self._changes


# Not http.server's own: that looks its name up in DNS when it starts.
class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, provider: SampleProvider, port: int) -> None:
        self.provider = provider
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are recorded, not logged."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        headers: CaseInsensitiveDict[str] = CaseInsensitiveDict(self.headers.items())
        faults = self.server.provider.faults.take(path, headers)
        if faults and faults[-1].answers(headers):
            self._refuse(faults[-1])
            return
        file = self._open(path)
        if file is None:
            self._answer(404, {}, 0)
            return
        with file:
            self._send_file(path, file, faults)

    def _refuse(self, fault: Fault) -> None:
        required = fault.require_header
        if required is not None and self.headers.get(required[0]) != required[1]:
            self._answer(401, {}, 0)
        elif fault.redirect_to is not None:
            self._answer(307, {"Location": fault.redirect_to}, 0)
        else:
            assert fault.status is not None
            retry = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            self._answer(fault.status, retry, 0)

    def _open(self, path: str) -> IO[bytes] | None:
        directory = self.server.provider.directory
        target = (directory / path).resolve()
        if not target.is_relative_to(directory) or not target.is_file():
            return None
        return target.open("rb")

    def _send_file(self, path: str, file: IO[bytes], faults: list[Fault]) -> None:
        headers = {"Content-Type": CONTENT_TYPES.get(Path(path).suffix, "application/octet-stream")}
        packed = self._open(f"{path}.gz")
        if packed is not None:
            headers["Vary"] = "Accept-Encoding"
            with packed:
                if _takes_gzip(self.headers.get("Accept-Encoding", "")):
                    size = os.fstat(packed.fileno()).st_size
                    self._answer(200, {**headers, "Content-Encoding": "gzip"}, size)
                    self._send_body(packed, 0, size, faults)
                    return
        status = os.fstat(file.fileno())
        size, etag = status.st_size, f'"{status.st_size:x}-{status.st_mtime_ns:x}"'
        start, end, code = 0, size, 200
        if not any(fault.no_range for fault in faults):
            if any(fault.change_etag for fault in faults):
                etag = f'{etag[:-1]}-{self.server.provider.next_change()}"'
            headers |= {"ETag": etag, "Accept-Ranges": "bytes"}
            wanted = self.headers.get("Range") if self.headers.get("If-Range", etag) == etag else None
            selected = _range_of(wanted, size) if wanted and self.command == "GET" else None
            if selected is not None:
                start, end = selected
                if start >= end:
                    self._answer(416, {"Content-Range": f"bytes */{size}"}, 0)
                    return
                code = 206
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._answer(code, headers, end - start)
        self._send_body(file, start, end - start, faults)

    def _answer(self, status: int, headers: dict[str, str], length: int) -> None:
        kept: CaseInsensitiveDict[str] = CaseInsensitiveDict(self.headers.items())
        if "Authorization" in kept:
            kept["Authorization"] = "..."
        self.server.provider.record(Request(self.command, self.path, kept, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send_body(self, file: IO[bytes], start: int, length: int, faults: list[Fault]) -> None:
        if self.command == "HEAD":
            return
        cut = min(_given(fault.cut_after for fault in faults), default=length)
        end = min(length, cut, *_given(fault.truncate_to for fault in faults))
        rate = min(_given(fault.bytes_per_second for fault in faults), default=None)
        position = 0
        for fault in faults:
            if fault.stall_after is not None and position <= fault.stall_after < end:
                self._send(file, start + position, fault.stall_after - position, rate)
                position = fault.stall_after
                fault.release.wait()
        self._send(file, start + position, end - position, rate)
        if end < length:
            self.close_connection = True
            if end == cut:
                self._reset()

    def _send(self, file: IO[bytes], start: int, length: int, rate: int | None) -> None:
        step = length if rate is None else max(1, rate // SLICES_PER_SECOND)
        began = time.monotonic()
        for sent in range(0, length, max(1, step)):
            if rate is not None:
                time.sleep(max(0.0, began + sent / rate - time.monotonic()))
            self.connection.sendfile(file, start + sent, min(step, length - sent))

    def _reset(self) -> None:
        """End the connection by RST, once what was sent has arrived: the kernel drops the rest otherwise."""
        ends = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < ends:
            if not any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))):
                break
            time.sleep(0.001)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # A file object made of the socket keeps it open; detached, closing takes effect at once and sends the RST.
        os.close(self.connection.detach())


def _given(values: Iterator[int | None]) -> list[int]:
    return [value for value in values if value is not None]


def _takes_gzip(accepted: str) -> bool:
    offers = (offer.strip().replace(" ", "").lower() for offer in accepted.split(","))
    return any(re.fullmatch(r"gzip(;q=(0\.0*[1-9]\d*|1(\.0*)?))?", offer) for offer in offers)


def _range_of(wanted: str, size: int) -> tuple[int, int] | None:
    """First byte and end of a single range, empty when unsatisfiable; None for what a server ignores."""
    match = RANGE.fullmatch(wanted.strip())
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        return max(0, size - int(suffix)), size
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size


def main(arguments: list[str]) -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m devstack.provider", description="Serve a directory of NDJSON.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--bytes-per-second", type=int, help="send each body no faster")
    parser.add_argument("--require-header", metavar="NAME=VALUE", help="answer 401 to requests without it")
    options = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    name, _, value = (options.require_header or "").partition("=")
    rule = Fault(bytes_per_second=options.bytes_per_second, require_header=(name, value) if name else None)
    with SampleProvider(options.directory, faults=Faults(rule), port=options.port) as provider:
        print(provider.url, flush=True)
        stop.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
