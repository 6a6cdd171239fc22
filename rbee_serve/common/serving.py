"""Running an ASGI application under systemd: the only place that knows uvicorn.

Divergences from plain uvicorn, each with its reason:

1. READY=1 is the application's to send: a worker listens long before its model is loaded.
2. At SIGTERM a hook runs first, while connections are still accepted (but see 6): the application says that it drains.
3. The listening socket is closed before connections are, and connections whose request has not arrived yet get a
   moment to send it: plain uvicorn closes them and the client gets an empty reply (measured: 8 of 60).
4. The watchdog is fed from the event loop, and only while ``alive()`` says that the work behind it moves.
5. Connections are accepted here (acceptor.py). A service with nothing to do can leave its socket to systemd, and nobody who
   connects meanwhile is refused or cut off: it stops accepting first, looks once more, goes on if anybody is there.
6. Under ``keep_socket`` the service manager holds the socket while the service restarts: who comes during the drain waits for
   the next process instead of being turned away.
7. A request's head may neither grow nor take its time without end: plain uvicorn would collect it for ever (protocol.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import uvicorn
from starlette.types import ASGIApp

from rbee_serve.common.acceptor import Acceptor, unread_bytes
from rbee_serve.common.http import RequestLimits
from rbee_serve.common.protocol import limited
from rbee_serve.common.sdnotify import Notifier, listen_sockets
from rbee_serve.contract.errors import ConfigInvalid

logger = logging.getLogger(__name__)

#: How long an accepted connection may take to send its request once shutdown has begun.
SETTLE_S = 0.5
#: A connection that has not sent a whole request for this long does not keep an idle service from leaving.
_SILENT_S = 30.0


@dataclass(frozen=True)
class Leave:
    """How a service with nothing to do ends and leaves its socket to systemd, which starts it again for the next caller."""

    #: Whether there has been nothing to do for long enough; asked ten times a second.
    due: Callable[[], bool]
    #: Called once it is certain, before anything is closed.
    begin: Callable[[], None]


class Server(uvicorn.Server):
    """uvicorn with the divergences above."""

    _acceptor: Acceptor

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        notifier: Notifier,
        alive: Callable[[], bool],
        on_started: Callable[[], Awaitable[None]] | None = None,
        on_shutdown: Callable[[], Awaitable[None]] | None = None,
        leave: Leave | None = None,
        kept: bool = False,
        handed_over: bool = False,
        woken: bool = False,
    ) -> None:
        super().__init__(config)
        #: Whether systemd holds the socket, and whether somebody was waiting at it when the process began.
        self.handed_over, self.woken = handed_over, woken
        self._notifier, self._alive, self._leave, self._kept = notifier, alive, leave, kept
        self._on_started, self._on_shutdown = on_started, on_shutdown
        self._fed = 0.0
        self._arrived: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, then tell the application."""
        await super().startup([])
        if self.started:
            self._acceptor = Acceptor(sockets or [], self._protocol, self.config.ssl)
            self._acceptor.resume()
        if self.started and self._on_started is not None:
            await self._on_started()

    async def on_tick(self, counter: int) -> bool:
        """Feed the watchdog, leave when there is nothing to do; called by uvicorn every 0.1 s."""
        self._feed()
        if self._leave is not None and not self.should_exit and self._leave.due() and await self._abandon():
            self._leave.begin()
            self.should_exit = True
        return await super().on_tick(counter)

    def _protocol(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        self._arrived[protocol] = time.monotonic()
        return protocol

    async def _abandon(self) -> bool:
        """Leave the socket to systemd; False, with everything as before, when anybody is here."""
        if any(map(self._occupied, self.server_state.connections)):
            return False
        self._acceptor.pause()
        await self._acceptor.settled()
        # From here to the end no other code runs: what is closed has sent nothing.
        if self._leave is None or not self._leave.due() or any(map(self._occupied, self.server_state.connections)):
            self._acceptor.resume()
            return False
        for connection in list(self.server_state.connections):
            connection.transport.close()
        return True

    def _occupied(self, connection: Any) -> bool:
        """Whether a connection has a request, or may be about to send its first one."""
        cycle = connection.cycle
        if cycle is None:
            waiting = time.monotonic() - self._arrived.get(connection, 0.0) < _SILENT_S
        else:
            waiting = not cycle.response_complete or bool(getattr(connection, "pipeline", ()))
        return waiting or unread_bytes(connection.transport) > 0

    def _feed(self) -> None:
        now, period = time.monotonic(), self._notifier.watchdog_s
        if period and now - self._fed > period / 3 and self._alive():
            self._fed = now
            self._notifier.watchdog()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close."""
        feeding = asyncio.create_task(self._keep_feeding())
        try:
            if self._kept:
                self._acceptor.pause()
                await self._acceptor.settled()
                await self._arrive()
            if self._on_shutdown is not None:
                await self._run_hook(self._on_shutdown)
            self._acceptor.pause()
            await self._acceptor.settled()
            self._acceptor.close()
            await self._arrive()
            await super().shutdown(sockets)
        finally:
            feeding.cancel()

    async def _arrive(self) -> None:
        """Give connections that were accepted a moment to send their request."""
        end = time.monotonic() + SETTLE_S
        # Polled: uvicorn tells nobody when a request arrives.
        while time.monotonic() < end and any(getattr(c, "cycle", None) is None for c in self.server_state.connections):  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    async def _run_hook(self, hook: Callable[[], Awaitable[None]]) -> None:
        """Run the hook to its end; a second Ctrl+C (uvicorn's force_exit) does not wait for it."""
        task = asyncio.ensure_future(hook())
        while not task.done() and not self.force_exit:
            await asyncio.wait((task,), timeout=0.1)
        if not task.done():
            task.cancel()
        elif (error := task.exception()) is not None:
            logger.error("the drain failed; closing connections", exc_info=error)

    def _send_away(self) -> None:
        """Let no connection bring a further request to this process: by a new connection it comes to the next one."""
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            if not self._occupied(connection):
                connection.transport.close()
            elif connection.cycle is not None and not getattr(connection, "pipeline", ()):
                connection.cycle.keep_alive = False

    async def _keep_feeding(self) -> None:
        while True:
            self._feed()
            if self._kept:
                self._send_away()
            await asyncio.sleep(0.1)


def bind(host: str, port: int) -> socket.socket:
    """Return a listening-ready socket; raises ConfigInvalid naming the address when it is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind((host, port))
    except OSError as e:
        s.close()
        raise ConfigInvalid(
            f"cannot listen on {host}:{port}: {e.strerror}",
            hint=f"see who has it: ss -ltnp 'sport = :{port}'",
            host=host,
            port=port,
        ) from e
    s.listen(2048)
    return s


def _is_at(listener: socket.socket, host: str, port: int) -> bool:
    """Whether a socket from before the settings were changed still is where they say."""
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return listener.getsockname()[:2] in [address[:2] for *_, address in found]
    return False


def _listeners(host: str, port: int, notifier: Notifier, *, keep: bool) -> tuple[list[socket.socket], bool]:
    """Return the sockets to serve on, and whether they came from the service manager; raises ConfigInvalid."""
    handed_over = listen_sockets()
    if not keep:
        return handed_over or [bind(host, port)], bool(handed_over)
    usable = [s for s in handed_over if _is_at(s, host, port)]
    if usable and len(handed_over) == 1:
        return usable, True
    for s in handed_over:
        with contextlib.suppress(OSError):
            s.shutdown(socket.SHUT_RDWR)  # the manager's copy listens no longer either: the port may be the same
        s.close()
    if handed_over:
        notifier.forget()
    listener = bind(host, port)
    notifier.keep(listener)
    return [listener], False


def run(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    notifier: Notifier,
    alive: Callable[[], bool] = lambda: True,
    on_started: Callable[[], Awaitable[None]] | None = None,
    on_shutdown: Callable[[], Awaitable[None]] | None = None,
    graceful_timeout_s: float,
    on_server: Callable[[Server], None] | None = None,
    leave: Leave | None = None,
    leave_unwatched: bool = False,
    keep_socket: bool = False,
    limits: RequestLimits,
    tls: tuple[Path, Path] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT (or ``server.should_exit``); returns when everything is closed.

    ``on_started`` runs when connections are accepted. At the end ``on_shutdown`` runs first, with connections still
    accepted unless ``keep_socket``; then running responses have ``graceful_timeout_s``.
    ``on_server`` gets the server before it starts, so that the application can end it.
    ``leave``: end when there is nothing to do, provided that systemd holds the socket and starts the service again, or
    ``leave_unwatched``. ``keep_socket``: systemd holds the socket while the service restarts. ``tls``: certificate chain and
    key (PEM). Raises ConfigInvalid for an address or a certificate that can not be used.
    """
    sockets, handed_over = _listeners(host, port, notifier, keep=keep_socket)
    for s in (s for s in sockets if s.family in (socket.AF_INET, socket.AF_INET6)):
        # Accepted connections inherit it. The kernel alone knows that somebody who is connected reads nothing.
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(limits.unread_timeout_s * 1000))
    if not handed_over and not leave_unwatched:
        leave = None
    config = uvicorn.Config(
        app,
        http=limited(limits.headers_max_bytes, limits.receive_timeout_s),
        ssl_certfile=tls[0] if tls else None,
        ssl_keyfile=tls[1] if tls else None,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(graceful_timeout_s)),
        timeout_keep_alive=75,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as e:
        raise ConfigInvalid(
            f"cannot use the TLS certificate {tls and tls[0]}: {e}", hint="a PEM chain and its key: tls_cert_file, tls_key_file"
        ) from e
    server = Server(
        config,
        notifier=notifier,
        alive=alive,
        on_started=on_started,
        on_shutdown=on_shutdown,
        leave=leave,
        kept=keep_socket and notifier.available,
        handed_over=handed_over,
        woken=handed_over and bool(select.select(sockets, [], [], 0)[0]),
    )
    if on_server is not None:
        on_server(server)
    # uvicorn raises the signal again when it is done, so that a plain program ends by it; a drained service ends with 0.
    # Until uvicorn has its own handlers, a signal asks for the same end.
    previous = {s: signal.signal(s, lambda *_: setattr(server, "should_exit", True)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=sockets)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for s in sockets:
            s.close()
    if not server.started:
        raise ConfigInvalid(f"the service could not start on {host}:{port}; the log above says why")
