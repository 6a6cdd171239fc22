"""A worker that answers at once and computes nothing: what is left is the queen's own cost. ``stand_in_worker.py PORT``.

``max_tokens`` tokens come as fast as the socket takes them; a prompt ``hold`` gets one and then silence, a prompt ``paced``
fifty a second, each alone. On ``/v1/chat/completions`` the same comes as OpenAI's chunks, for proxies that know no other.
"""

from __future__ import annotations

import asyncio
import json
import sys

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nx-request-id: bench\r\n\r\n"


PACE_S = 0.02


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _event(value: dict[str, object]) -> bytes:
    return _chunk(f"event: {value['type']}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n".encode())


def _openai(delta: dict[str, str], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    value = {"id": "bench", "object": "chat.completion.chunk", "created": 1, "model": "bench", "choices": [choice]}
    return _chunk(f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode())


async def _tokens(writer: asyncio.StreamWriter, count: int, *, chat: bool, paced: bool) -> None:
    started = {"type": "started", "request_id": "bench", "model": "bench", "seed": 1, "prompt_tokens": 8}
    first = _openai({"role": "assistant"}) if chat else _event(started | {"cached_tokens": 0, "worker_id": "bench-cpu0"})
    writer.write(HEAD + first)
    for i in range(count):
        text = f" word{i}"
        writer.write(_openai({"content": text}) if chat else _event({"type": "token", "t": text, "i": i, "id": 1000 + i % 1000}))
        if paced:
            await asyncio.sleep(PACE_S)
        elif i % 16 == 15:
            await writer.drain()
            await asyncio.sleep(0)  # the turn of the other streams: events come interleaved, as from a batch


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode("latin-1").lower().split("\r\n")
            length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
            body = await reader.readexactly(length) if length else b"{}"
            if not lines[0].startswith(("post /v1/inference", "post /v1/chat/completions")):
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
                continue
            asked = json.loads(body)
            prompt = asked.get("prompt") or asked["messages"][-1]["content"]
            count = 1 if prompt == "hold" else int(asked["max_tokens"])
            chat = "/chat/" in lines[0]
            await _tokens(writer, count, chat=chat, paced=prompt == "paced")
            if prompt == "hold":
                await writer.drain()
                await reader.read()
                return
            end = {"type": "end", "tokens_out": count, "prompt_tokens": 8, "stop_reason": "MAX_TOKENS"}
            writer.write(_openai({}, "length") if chat else _event(end | {"prompt_time_ms": 0.1, "decode_time_ms": 0.1}))
            writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def main(port: int) -> None:
    """Serve for ever."""
    async with await asyncio.start_server(_answer, "127.0.0.1", port, backlog=1024) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
