"""An asyncio SSE client that notes when each token came. One for all servers, so that its cost is the same for all."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field


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
    def gaps(self) -> list[float]:
        """Seconds between consecutive tokens."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


def _text_of(event: dict[str, object]) -> str | None:
    """Return the text of a token event of any of the servers; None for events that are no token."""
    if event.get("type") == "token":
        return str(event["t"])
    choices = event.get("choices")
    if isinstance(choices, list) and choices and choices[0].get("finish_reason") is None:
        return str(choices[0].get("text", ""))
    return None


async def stream(host: str, port: int, path: str, body: dict[str, object], token: str | None = None) -> Stream:
    """POST ``body`` and read the event stream to its end."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    if token:
        head += f"Authorization: Bearer {token}\r\n"
    result = Stream(sent=time.monotonic())
    try:
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + payload)
        await writer.drain()
        status = (await reader.readline()).decode("latin-1")
        if " 200 " not in status:
            result.error = status.strip() + " " + (await reader.read(600)).decode("utf-8", "replace")
            return result
        while line := await reader.readline():
            # Chunk sizes and headers never begin with "data: {", so the chunked framing need not be parsed.
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
