"""Asking the queen's own routes without a connection: jobs get what a client would get, by the same code.

Requests made here have passed the gate already: they carry the caller whose key began the job.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.routing import Router
from starlette.types import Message

from rbee_serve.contract.errors import from_envelope
from rbee_serve.contract.events import SseParser

#: Pieces of a stream that wait for whoever reads them.
_AHEAD = 64


class Internal:
    """The routes of one application. ``state``: what the gate knows of the caller (``request.state``)."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def call(self, method: str, path: str, *, query: str = "", state: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the decoded answer; raises what the route raises."""
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        await self._router(_scope(method, path, query, state), _Body(b"").receive, send)
        body = b"".join(m.get("body", b"") for m in sent)
        found = json.loads(body) if body else {}
        if sent[0]["status"] >= 400:
            raise from_envelope(found, fallback=f"{method} {path} answered {sent[0]['status']}")
        return found if isinstance(found, dict) else {}

    async def stream(
        self, path: str, body: Mapping[str, Any], *, state: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[dict[str, Any]]:
        """Post ``body`` and yield the events of the answer; closing the generator is what a client's leaving is.

        Raises what the route raises, and for an ``error`` event what it tells.
        """
        chunks: asyncio.Queue[bytes | None] = asyncio.Queue(_AHEAD)
        request = _Body(json.dumps(body).encode())

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body" and message.get("body"):
                await chunks.put(message["body"])

        async def run() -> None:
            try:
                await self._router(_scope("POST", path, "", state), request.receive, send)
            finally:
                while chunks.full():  # nobody may be reading any more
                    chunks.get_nowait()
                chunks.put_nowait(None)

        task = asyncio.ensure_future(run())
        parser = SseParser()
        try:
            while (chunk := await chunks.get()) is not None:
                for payload in parser.feed(chunk):
                    if payload == "[DONE]":
                        continue
                    event = json.loads(payload)
                    if event.get("type") == "error":
                        raise from_envelope({"error": event}, fallback="the stream ended in an error")
                    yield event
            await task
        finally:
            request.leave()
            while not task.done():
                while not chunks.empty():
                    chunks.get_nowait()
                await asyncio.wait((task,), timeout=0.05)
            if not task.cancelled():
                task.exception()  # seen: who closed the stream early does not ask for it


class _Body:
    """What a client would send: the body, and later its leaving."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._left = asyncio.Event()

    def leave(self) -> None:
        """Close the connection that there is not."""
        self._left.set()

    async def receive(self) -> Message:
        """Return the next message of the client."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}


def _scope(method: str, path: str, query: str, state: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(b"content-type", b"application/json")],
        "server": ("queen", 0),
        "client": None,
        "state": dict(state or {}),
    }
