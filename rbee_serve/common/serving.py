"""Running an ASGI application under systemd: the only place that knows uvicorn.

Divergences from plain uvicorn, each with its reason:

1. READY=1 is the application's to send: a worker listens long before its model is loaded.
2. At SIGTERM a hook runs first, while connections are still accepted: the application says that it drains.
3. The listening socket is closed before connections are, and connections whose request has not arrived yet get a
   moment to send it: plain uvicorn closes them and the client gets an empty reply (measured: 8 of 60).
4. The watchdog is fed from the event loop, and only while ``alive()`` says that the work behind it moves.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable

import uvicorn
from starlette.types import ASGIApp

from rbee_serve.common.sdnotify import Notifier, listen_sockets
from rbee_serve.contract.errors import ConfigInvalid

logger = logging.getLogger(__name__)

#: How long an accepted connection may take to send its request once shutdown has begun.
SETTLE_S = 0.5


class Server(uvicorn.Server):
    """uvicorn with the divergences above."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        notifier: Notifier,
        alive: Callable[[], bool],
        on_started: Callable[[], Awaitable[None]] | None = None,
        on_shutdown: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(config)
        self._notifier, self._alive = notifier, alive
        self._on_started, self._on_shutdown = on_started, on_shutdown
        self._fed = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, then tell the application."""
        await super().startup(sockets)
        if self.started and self._on_started is not None:
            await self._on_started()

    async def on_tick(self, counter: int) -> bool:
        """Feed the watchdog; called by uvicorn every 0.1 s."""
        self._feed()
        return await super().on_tick(counter)

    def _feed(self) -> None:
        now, period = time.monotonic(), self._notifier.watchdog_s
        if period and now - self._fed > period / 3 and self._alive():
            self._fed = now
            self._notifier.watchdog()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close."""
        feeding = asyncio.create_task(self._keep_feeding())
        try:
            if self._on_shutdown is not None:
                await self._run_hook(self._on_shutdown)
            for server in self.servers:
                server.close()
            end = time.monotonic() + SETTLE_S
            # Polled: uvicorn tells nobody when a request arrives.
            while time.monotonic() < end and any(getattr(c, "cycle", None) is None for c in self.server_state.connections):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await super().shutdown(sockets)
        finally:
            feeding.cancel()

    async def _run_hook(self, hook: Callable[[], Awaitable[None]]) -> None:
        """Run the hook to its end; a second Ctrl+C (uvicorn's force_exit) does not wait for it."""
        task = asyncio.ensure_future(hook())
        while not task.done() and not self.force_exit:
            await asyncio.wait((task,), timeout=0.1)
        if not task.done():
            task.cancel()
        elif (error := task.exception()) is not None:
            logger.error("the drain failed; closing connections", exc_info=error)

    async def _keep_feeding(self) -> None:
        while True:
            self._feed()
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
) -> None:
    """Serve until SIGTERM or SIGINT (or ``server.should_exit``); returns when everything is closed.

    ``on_started`` runs when connections are accepted. At the end ``on_shutdown`` runs first, with connections still
    accepted; then running responses have ``graceful_timeout_s``.
    ``on_server`` gets the server before it starts, so that the application can end it.
    """
    sockets = listen_sockets() or [bind(host, port)]
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(graceful_timeout_s)),
        timeout_keep_alive=75,
    )
    server = Server(config, notifier=notifier, alive=alive, on_started=on_started, on_shutdown=on_shutdown)
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
