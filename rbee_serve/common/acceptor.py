"""Accepting connections, with an end that loses nobody.

asyncio accepts by itself and hands over protocols some turns of its loop later; once its server is closed nobody can tell
whether a connection is still on that way. A worker that leaves its socket to systemd has to know: whoever was accepted is
served by this process, whoever was not waits in the socket and starts the next one.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import ssl
import struct
import termios
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

#: Connections taken in one turn of the loop, so that a storm of them does not keep the loop from its other work.
_AT_ONCE = 64
#: Pause after the process has run out of descriptors or memory for sockets.
_SHORTAGE_S = 1.0


class Acceptor:
    """Takes connections of ``sockets`` from ``resume`` to ``pause``. Belongs to one event loop."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        make_protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._sockets, self._make_protocol, self._tls = sockets, make_protocol, tls
        self._loop = asyncio.get_running_loop()
        self._arriving: set[asyncio.Task[None]] = set()
        self._accepting = False
        for s in sockets:
            s.setblocking(False)

    def resume(self) -> None:
        """Accept connections (idempotent)."""
        if not self._accepting:
            self._accepting = True
            for s in self._sockets:
                self._loop.add_reader(s, self._accept, s)

    def pause(self) -> None:
        """Accept nothing from this moment on (idempotent): who comes now waits in the socket."""
        if self._accepting:
            self._accepting = False
            for s in self._sockets:
                self._loop.remove_reader(s)

    async def settled(self) -> None:
        """Return when every accepted connection has its protocol."""
        while self._arriving:
            await asyncio.wait(self._arriving)

    def close(self) -> None:
        """Give the sockets up; connections that wait in them are reset unless somebody else holds them too."""
        self.pause()
        for s in self._sockets:
            s.close()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as e:  # out of descriptors or memory: the connection stays where it is
                logger.warning("no connection can be accepted for a moment", extra={"reason": str(e)})
                self._loop.remove_reader(listener)
                self._loop.call_later(_SHORTAGE_S, self._retry, listener)
                return
            connection.setblocking(False)
            if listener.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._loop.create_task(self._hand_over(connection))
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)

    def _retry(self, listener: socket.socket) -> None:
        if self._accepting:
            self._loop.add_reader(listener, self._accept, listener)

    async def _hand_over(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection, ssl=self._tls)
        except OSError as e:  # gone before it was here, or it speaks no TLS
            connection.close()
            logger.debug("a connection ended at once", extra={"reason": str(e)})


def unread_bytes(transport: asyncio.BaseTransport) -> int:
    """Return how many bytes the peer has sent that nobody has read; 0 for a transport that is closed."""
    connection = transport.get_extra_info("socket")
    if connection is None or connection.fileno() < 0:
        return 0
    (count,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.FIONREAD, b"\0\0\0\0"))
    return int(count)
