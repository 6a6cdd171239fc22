"""An asyncio SSE client that notes when each token came. One for all servers, so that its cost is the same for all."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Protocol


class Target(Protocol):
    """A server as the client needs it (servers.Server)."""

    name: str
    port: int
    path: str
    token: str | None

    def body(self, prompt: str, max_tokens: int) -> dict[str, object]:
        """Return the request."""


@dataclass
class Stream:
    """One streamed answer: seconds (monotonic) of the request and of each token, and the text."""

    sent: float
    tokens: list[float] = field(default_factory=list)
    text: str = ""
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds from request to first token."""
        return self.tokens[0] - self.sent

    @property
    def ended(self) -> float:
        """When the last token came."""
        return self.tokens[-1]

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive tokens."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


def _text_of(event: dict[str, object]) -> str | None:
    """Return the text of a token event of any of the servers; None for events that are no token."""
    if event.get("type") == "token":
        return str(event["t"])
    choices = event.get("choices")
    if isinstance(choices, list) and choices and choices[0].get("finish_reason") is None:
        delta = choices[0].get("delta")
        if delta is None:
            return str(choices[0].get("text", ""))
        return delta.get("content") or None  # the first chunk of a chat names the role alone
    return None


async def stream(
    host: str, port: int, path: str, body: dict[str, object], token: str | None = None, into: list[Stream] | None = None
) -> Stream:
    """POST ``body`` and read the event stream to its end; the growing result is put into ``into`` at once."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    if token:
        head += f"Authorization: Bearer {token}\r\n"
    result = Stream(sent=time.monotonic())
    if into is not None:
        into.append(result)
    try:
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + payload)
        await writer.drain()
        status = (await reader.readline()).decode("latin-1")
        if " 200 " not in status:
            result.error = status.strip() + " " + (await reader.read(600)).decode("utf-8", "replace")
            return result
        while line := await reader.readline():
            # Chunk sizes and headers never begin with "data: {", so the chunked framing need not be parsed.
            if line.startswith(b"data: [DONE]"):
                break
            if not line.startswith(b"data: {"):
                continue
            now = time.monotonic()
            text = _text_of(json.loads(line[6:]))
            if text is not None:
                result.tokens.append(now)
                result.text += text
        return result
    finally:
        writer.close()


async def at_once(server: Target, prompts: list[str], max_tokens: int) -> list[Stream]:
    """Send all requests at the same moment and return their streams; raises RuntimeError when one is not whole."""
    asked = (stream("127.0.0.1", server.port, server.path, server.body(p, max_tokens), server.token) for p in prompts)
    streams = list(await asyncio.gather(*asked))
    for one in streams:
        if one.error or len(one.tokens) < max_tokens - 1:  # llama.cpp's server says the last token with the reason
            raise RuntimeError(f"{server.name}: {one.error or f'{len(one.tokens)} tokens of {max_tokens}'}")
    return streams
