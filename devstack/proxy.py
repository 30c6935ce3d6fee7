"""A TCP proxy before Postgres that acts at exact points of the lease protocol.

It reads what clients send (startup packet, then a type byte and a length for each message; Parse gives a statement the
name by which Bind runs it later) and knows these points by their SQL (`schema/leases.py`):

    copy      the second piece of a COPY: the server has the first
    fence     the UPDATE that moves a step's cursor
    commit    COMMIT of a transaction that passed a fence
    renew     the UPDATE that renews a lease

A `Trigger` holds, delays or cuts a connection there. Everything else passes as it is, TLS excepted: it is declined.
Source: PostgreSQL documentation, "Frontend/Backend Protocol", "Message Formats".
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Self
from urllib.parse import urlsplit, urlunsplit

HAND = "bulk-submit hand"
KEEPER = "bulk-submit keeper"
CHUNK = 65536
CONNECT_SECONDS = 5.0

_SSL_REQUEST, _GSS_REQUEST, _CANCEL_REQUEST = 80877103, 80877104, 80877102
_FENCE_SQL = "SET cursor_bytes ="
_RENEW_SQL = "SET lease_expires_at = clock_timestamp()"


class Point(Enum):
    """Where a trigger acts: before the message that is named."""

    COPY = "copy"
    FENCE = "fence"
    COMMIT = "commit"
    RENEW = "renew"


class Act(Enum):
    """What a trigger does.

    HOLD: the message waits, and so does whatever the server sends or does, until the trigger's `release` is set.
    DELAY: the message waits for `seconds`.
    CUT_BEFORE: both ends see the connection end; the message reaches nobody.
    CUT_AFTER: the message reaches the server; the connection ends when the answer comes, and the answer is dropped.
    """

    HOLD = "hold"
    DELAY = "delay"
    CUT_BEFORE = "cut before"
    CUT_AFTER = "cut after"


@dataclass(frozen=True, slots=True)
class Fired:
    """A trigger acted: on the connection of that application name, at that wall-clock time."""

    application: str
    at: float

    @property
    def worker_id(self) -> str:
        """The `worker_id` of the hand or keeper."""
        return self.application.removeprefix(HAND).removeprefix(KEEPER).strip()


@dataclass(eq=False)
class Trigger:
    """Acts on connections whose application name begins with `application`, at `point`.

    It lets `skip` of them pass, then acts `times` (None: always). `fired` lists what it acted on, once it did.
    """

    point: Point
    act: Act
    times: int | None = 1
    skip: int = 0
    seconds: float = 0.0
    application: str = HAND
    release: threading.Event = field(default_factory=threading.Event, kw_only=True)
    fired: list[Fired] = field(default_factory=list, init=False)
    _seen: int = field(default=0, init=False)

    def takes(self, point: Point, application: str) -> bool:
        """Whether it acts now; counts."""
        if point is not self.point or not application.startswith(self.application):
            return False
        self._seen += 1
        return self._seen > self.skip and (self.times is None or self._seen <= self.skip + self.times)


class PostgresProxy:
    """Listens on a free port of 127.0.0.1 from `with` to its end; `url` leads through it to `database_url`."""

    def __init__(self, database_url: str) -> None:
        self._target = urlsplit(database_url)
        self._lock = threading.Lock()
        self._triggers: list[Trigger] = []
        self._links: set[_Link] = set()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        user, at, _ = self._target.netloc.rpartition("@")
        place = f"{user}{at}127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = urlunsplit(self._target._replace(netloc=place))
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.clear()
        with self._lock:
            links = list(self._links)
        for link in links:
            link.end()

    def add(self, trigger: Trigger) -> Trigger:
        """Let the trigger hold from the next message on; returns it."""
        with self._lock:
            self._triggers.append(trigger)
        return trigger

    def clear(self) -> None:
        """Remove every trigger; what they hold goes on."""
        with self._lock:
            triggers, self._triggers = self._triggers, []
        for trigger in triggers:
            trigger.release.set()

    def take(self, point: Point, application: str) -> Trigger | None:
        """The first trigger that acts on this message."""
        with self._lock:
            return next((trigger for trigger in self._triggers if trigger.takes(point, application)), None)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, EOFError):
            startup, application = _startup(client)
            address = (self._target.hostname or "127.0.0.1", self._target.port or 5432)
            with socket.create_connection(address, timeout=CONNECT_SECONDS) as server:
                server.settimeout(None)
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server.sendall(startup)
                link = _Link(self, client, server, application)
                with self._lock:
                    self._links.add(link)
                try:
                    link.run()
                finally:
                    with self._lock:
                        self._links.discard(link)


class Session:
    """What a client has said so far: enough to tell where in the lease protocol it is."""

    def __init__(self) -> None:
        self._statements: dict[bytes, str] = {}
        self._pieces = 0
        self._fenced = False

    def point_of(self, kind: bytes, body: bytes) -> Point | None:
        """The point before this message, if it is one; takes note of the message."""
        if kind == b"d":
            self._pieces += 1
            return Point.COPY if self._pieces == 2 else None
        if kind == b"Q":
            return self._statement(body.rstrip(b"\0").decode(errors="replace"))
        if kind == b"P":
            name, _, rest = body.partition(b"\0")
            self._statements[name] = rest.partition(b"\0")[0].decode(errors="replace")
        elif kind == b"B":
            name = body.split(b"\0", 2)[1]
            return self._statement(self._statements.get(name, ""))
        return None

    def _statement(self, sql: str) -> Point | None:
        word = sql.lstrip()[:8].upper()
        if word.startswith("COPY"):
            self._pieces = 0
        elif word.startswith(("BEGIN", "ROLLBACK")):
            self._fenced = False
        elif word.startswith("COMMIT"):
            fenced, self._fenced = self._fenced, False
            return Point.COMMIT if fenced else None
        elif _FENCE_SQL in sql:
            self._fenced = True
            return Point.FENCE
        elif _RENEW_SQL in sql:
            return Point.RENEW
        return None


class _Link:
    """One client's connection and ours to the server, with a thread for each direction."""

    def __init__(self, proxy: PostgresProxy, client: socket.socket, server: socket.socket, application: str) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._application = application
        self._session = Session()
        self._unheld = threading.Event()
        self._unheld.set()
        self._drop_answer: Trigger | None = None

    def run(self) -> None:
        """Pass messages on until either end is gone."""
        answers = threading.Thread(target=self._pass_answers, daemon=True)
        answers.start()
        try:
            self._pass_messages()
        finally:
            self._unheld.set()
            self.end()
            answers.join()

    def end(self) -> None:
        """Let both ends see that the connection has ended."""
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _pass_messages(self) -> None:
        with contextlib.suppress(OSError):
            buffer = bytearray()
            while data := self._client.recv(CHUNK):
                buffer += data
                passed = end = 0
                for start, end in _messages(buffer):
                    point = self._session.point_of(bytes(buffer[start : start + 1]), bytes(buffer[start + 5 : end]))
                    trigger = None if point is None else self._proxy.take(point, self._application)
                    if trigger is not None:
                        self._server.sendall(buffer[passed:start])
                        passed = start
                        if not self._go_on(trigger):
                            return
                self._server.sendall(buffer[passed:end])
                del buffer[:end]

    def _go_on(self, trigger: Trigger) -> bool:
        """Do what the trigger says; whether the message is to be sent."""
        fired = Fired(self._application, time.time())
        if trigger.act is Act.CUT_AFTER:
            self._drop_answer = trigger
            return True
        if trigger.act is Act.CUT_BEFORE:
            trigger.fired.append(fired)
            self.end()
            return False
        self._unheld.clear()
        trigger.fired.append(fired)
        trigger.release.wait(trigger.seconds if trigger.act is Act.DELAY else None)
        self._unheld.set()
        return True

    def _pass_answers(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._server.recv(CHUNK):
                self._unheld.wait()
                if self._drop_answer is not None:
                    self._drop_answer.fired.append(Fired(self._application, time.time()))
                    self.end()
                    return
                self._client.sendall(data)
        self._unheld.wait()
        self.end()


def _messages(buffer: bytearray) -> Iterator[tuple[int, int]]:
    """Where the whole messages in the buffer begin and end."""
    start = 0
    while len(buffer) >= start + 5:
        end = start + 1 + int.from_bytes(buffer[start + 1 : start + 5], "big")
        if len(buffer) < end:
            return
        yield start, end
        start = end


def _startup(client: socket.socket) -> tuple[bytes, str]:
    """The client's first packet and its application name; encryption is declined. Raises EOFError."""
    while True:
        head = _exactly(client, 8)
        size, code = struct.unpack(">ii", head)
        packet = head + _exactly(client, size - 8)
        if code in (_SSL_REQUEST, _GSS_REQUEST):
            client.sendall(b"N")
            continue
        if code == _CANCEL_REQUEST:
            return packet, ""
        words = packet[8:].split(b"\0")
        parameters = dict(zip(words[::2], words[1::2], strict=False))
        return packet, parameters.get(b"application_name", b"").decode(errors="replace")


def _exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = client.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
