"""One HTTP exchange with an ASGI application, message by message: what a client library would smooth over stays visible."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message

from rbee_serve.contract.events import SseParser


class Exchange:
    """Begin with ``start``; ``leave`` is what the server sees when the client closes its connection."""

    def __init__(
        self,
        app: ASGIApp,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: list[bytes] | None = None,
        more_body: bool = False,
    ) -> None:
        """``more_body``: the client says that more comes, and sends nothing."""
        raw = [(k.lower().encode(), v.encode("latin-1")) for k, v in (headers or {}).items()]
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": raw,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self._app, self._body, self._more_body = app, body or [b""], more_body
        self._left = asyncio.Event()
        self.sent: list[Message] = []
        self.task: asyncio.Task[None] | None = None

    def start(self) -> Exchange:
        self.task = asyncio.ensure_future(self._app(self._scope, self._receive, self._send))  # type: ignore[arg-type]
        return self

    def leave(self) -> None:
        self._left.set()

    async def finish(self, limit_s: float = 10.0) -> Exchange:
        if self.task is None:
            self.start()
        assert self.task is not None
        await asyncio.wait_for(self.task, limit_s)
        return self

    async def _receive(self) -> Message:
        if self._body:
            piece = self._body.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._body) or self._more_body}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode("latin-1") for k, v in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent[1:])

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """Return the envelope's content, having checked that it carries the id that the header carries."""
        error: dict[str, Any] = self.json()["error"]
        assert error["correlation_id"] == self.headers["x-correlation-id"]
        return error

    def events(self) -> list[Any]:
        """Return the stream's payloads, decoded; ``[DONE]`` as it is."""
        return [p if p == "[DONE]" else json.loads(p) for p in SseParser().feed(self.body)]
