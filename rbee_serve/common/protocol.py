"""uvicorn's HTTP protocol with limits on a request's head: plain uvicorn collects it without end in size and time."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"
    b'{"error":{"code":"HEADERS_TOO_LARGE","message":"the request line and headers are too large","details":{}}}'
)


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol with a limit on size and time of a request's head; class attributes are set by ``limited``."""

    head_max_bytes: ClassVar[int]
    head_timeout_s: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is None or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > self.head_max_bytes:
            self._head_arrived()
            self.transport.write(_HEAD_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_arrived()
        super().on_headers_complete()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._late)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        self._head_timer = None
        self.transport.close()


def limited(head_max_bytes: int, head_timeout_s: float) -> type[HttpToolsProtocol]:
    """Return the protocol class for one server: largest head in bytes, time for it in seconds."""
    return type("LimitedProtocol", (_Protocol,), {"head_max_bytes": head_max_bytes, "head_timeout_s": head_timeout_s})
