"""HTTP/1.1 towards workers: POST a request, read the answer's bytes as they come. The relay's hot path.

Not httpx: reading there costs several times what parsing the events does, and a read that is interrupted closes the
connection. Here waiting can be interrupted (``Answer.wake``) and nothing that has arrived is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

import httptools

#: Bytes of an answer that may wait to be read before the worker is slowed down (a slow client, SPEC E-39).
_HIGH_WATER = 65_536
#: Seconds that an idle connection is kept: shorter than the workers' keep-alive (75 s), so that we are who lets go first.
_KEEP_S = 30.0
_KEEP_MAX = 64  # idle connections kept for one address


class BrokenError(Exception):
    """The connection could not be made or broke; the text says how. ``stale``: it was a kept one and nothing had come yet."""

    def __init__(self, what: str, *, stale: bool = False) -> None:
        super().__init__(what)
        self.stale = stale


class WokenError(Exception):
    """``Answer.wake`` was called."""


class Answer:
    """One answer: ``head`` first, then ``read`` until it returns nothing, ``close`` in any case.

    Filled by ``on_head``, ``on_data``, ``on_end`` and ``on_broken``. Times are of the running loop's clock.
    """

    def __init__(
        self,
        on_close: Callable[[bool], None] = lambda complete: None,
        throttle: Callable[[bool], None] = lambda stop: None,
    ) -> None:
        """``on_close(complete)`` is called once; ``throttle(True)`` asks to hold back data, ``throttle(False)`` to go on."""
        self.status = 0
        self._on_close, self._throttle = on_close, throttle
        self._chunks: list[bytes] = []
        self._size = 0
        self._held = False
        self._ended = False
        self._broken: BrokenError | None = None
        self._woken = False
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._until = 0.0  # how long whoever waits does so
        # One timer for many waits: an event that comes in time leaves it as it is, and it looks again when it fires.
        self._timer: asyncio.TimerHandle | None = None
        self._armed = 0.0

    def on_head(self, status: int) -> None:
        """Status line and headers are here."""
        self.status = status
        self._notify()

    def on_data(self, data: bytes) -> None:
        """A piece of the body."""
        self._chunks.append(data)
        self._size += len(data)
        if self._size > _HIGH_WATER and not self._held:
            self._held = True
            self._throttle(True)
        self._notify()

    def on_end(self) -> None:
        """The body is complete."""
        self._ended = True
        self._notify()

    def on_broken(self, error: BrokenError) -> None:
        """Nothing more will come."""
        if not self._ended and self._broken is None:
            self._broken = error
            self._notify()

    async def head(self, until: float) -> int:
        """Return the status. Raises TimeoutError, BrokenError, WokenError."""
        while not self.status:
            await self._wait(until)
        return self.status

    async def read(self, until: float) -> bytes:
        """Return what has arrived, at least one byte; nothing at the end. Raises TimeoutError, BrokenError, WokenError.

        What arrived before the connection broke comes first.
        """
        while not self._chunks:
            if self._ended:
                return b""
            await self._wait(until)
        if self._woken:
            self._woken = False
            raise WokenError
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        if self._held:
            self._held = False
            self._throttle(False)
        return data

    def wake(self) -> None:
        """Make whoever waits, or waits next, get WokenError once."""
        self._woken = True
        self._notify()

    def close(self) -> None:
        """Give the connection back: for further use when the answer is complete, else closed. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._closed:
            self._closed = True
            self._on_close(self._ended)

    async def _wait(self, until: float) -> None:
        if self._woken:
            self._woken = False
            raise WokenError
        if self._broken is not None:
            raise self._broken
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        self._until = until
        if self._timer is None or until < self._armed:
            self._arm(loop)
        try:
            await waiter
        finally:
            self._waiter = None

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed = self._until
        self._timer = loop.call_at(self._until, self._time_out, loop)

    def _time_out(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        # Not asked of the clock: a timer may be early by less than the clock can tell.
        if self._until > self._armed:
            self._arm(loop)
        else:
            self._waiter.set_exception(TimeoutError())

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Client(Protocol):
    """What the relay needs of a client; tests have one that answers from a script."""

    async def send(self, method: str, url: str, body: bytes, headers: Mapping[str, str], *, fresh: bool = False) -> Answer:
        """Send a request and return its answer, to be filled. Raises BrokenError. ``fresh``: over a new connection."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Close all connections."""


class PooledClient:
    """Keeps idle connections. ``connect_s``: time to connect; ``dead_peer_s``: silence of the machine itself (not of the
    program on it) after which the connection counts as cut."""

    def __init__(self, connect_s: float = 5.0, dead_peer_s: float = 5.0) -> None:
        self._connect_s, self._dead_peer_s = connect_s, dead_peer_s
        self._idle: dict[tuple[str, str], list[tuple[_Connection, float]]] = {}
        self._open: set[_Connection] = set()
        self._closed = False

    async def send(self, method: str, url: str, body: bytes, headers: Mapping[str, str], *, fresh: bool = False) -> Answer:
        """Send a request over a kept connection or, with ``fresh`` or where none is kept, a new one. Raises BrokenError."""
        parts = urlsplit(url)
        request = _encode(method, parts, body, headers)
        key = (parts.scheme, parts.netloc)
        connection = (None if fresh else self._take(key)) or await self._connect(parts)
        return connection.send(request, lambda: self._keep(key, connection))

    async def aclose(self) -> None:
        """Close all connections, those in use as well."""
        self._closed = True
        for connection in list(self._open):
            connection.abort()
        self._idle.clear()

    def _take(self, key: tuple[str, str]) -> _Connection | None:
        now = asyncio.get_running_loop().time()
        idle = self._idle.get(key, [])
        while idle:
            connection, since = idle.pop()
            if connection.usable and now - since < _KEEP_S:
                return connection
            connection.abort()
        self._idle.pop(key, None)
        return None

    def _keep(self, key: tuple[str, str], connection: _Connection) -> None:
        idle = self._idle.setdefault(key, [])
        if self._closed or len(idle) >= _KEEP_MAX:
            connection.abort()
        else:
            idle.append((connection, asyncio.get_running_loop().time()))

    async def _connect(self, parts: SplitResult) -> _Connection:
        loop = asyncio.get_running_loop()
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._open),
                    parts.hostname or "",
                    port,
                    ssl=tls,
                    server_hostname=parts.hostname if tls else None,
                )
        except TimeoutError as e:
            raise BrokenError(f"no connection within {self._connect_s:g} s") from e
        except OSError as e:
            raise BrokenError(f"no connection: {e.strerror or e}") from e
        connection.keep_alive(self._dead_peer_s)
        return connection


def _encode(method: str, parts: SplitResult, body: bytes, headers: Mapping[str, str]) -> bytes:
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [f"{method} {path} HTTP/1.1", f"host: {parts.netloc}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


class _Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self, every: set[_Connection]) -> None:
        self._every = every
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer: Answer | None = None
        self._used = False  # has served a request
        self._heard = False  # something of the present answer has come
        self._reusable = True

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def keep_alive(self, dead_peer_s: float) -> None:
        """Let the kernel ask whether the other machine is there: a cut network tells nobody."""
        assert self._transport is not None  # noqa: S101
        sock = self._transport.get_extra_info("socket")
        if sock is None or sock.family == socket.AF_UNIX:
            return
        idle = max(1, round(dead_peer_s * 0.4))
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, round(dead_peer_s) - idle))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(dead_peer_s * 1000))

    def send(self, request: bytes, keep: Callable[[], None]) -> Answer:
        """Write the request; ``keep`` is called when the connection may serve another one."""
        assert self._transport is not None  # noqa: S101
        transport = self._transport

        def closed(complete: bool) -> None:
            self._answer = None
            if complete and self._reusable and self.usable:
                throttle(False)
                keep()
            else:
                self.abort()

        def throttle(stop: bool) -> None:
            if not transport.is_closing():
                transport.pause_reading() if stop else transport.resume_reading()

        self._answer = Answer(closed, throttle)
        self._parser = httptools.HttpResponseParser(self)
        self._heard = False
        transport.write(request)
        return self._answer

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._every.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._every.discard(self)
        if self._answer is not None:
            what = f"{type(exc).__name__}" if exc is not None else "closed before the answer was complete"
            self._answer.on_broken(BrokenError(what, stale=self._used and not self._heard))

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._answer is None or self._parser is None:  # nobody has asked anything
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as e:
            self._answer.on_broken(BrokenError(f"not HTTP: {e}"))
            self.abort()

    # --- httptools

    def on_headers_complete(self) -> None:
        if self._answer is not None and self._parser is not None:
            self._answer.on_head(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._answer.on_data(body)

    def on_message_complete(self) -> None:
        self._used = True
        if self._answer is not None and self._parser is not None:
            self._reusable = self._parser.should_keep_alive()
            self._answer.on_end()
