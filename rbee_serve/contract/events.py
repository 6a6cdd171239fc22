"""Server-sent events of the native API (SPEC 3.5, X-12): builders, the one encoder and an incremental parser.

A stream is ``started``, ``token``*, then ``end`` or ``error``, and always ``data: [DONE]`` exactly once, last.
Events are plain dicts; every one has ``type``, which is also the SSE ``event:`` name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rbee_serve.contract.errors import RbeeError

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

#: Widths of a narration line's first two columns (SPEC 3.5).
ACTOR_WIDTH, ACTION_WIDTH = 10, 15

#: json.dumps makes an encoder anew for each call that is not of the usual form, which costs as much as the encoding.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

Event = dict[str, Any]
Logprobs = dict[str, Any]


def started(
    request_id: str,
    model: str,
    *,
    seed: int,
    prompt_tokens: int,
    cached_tokens: int,
    worker_id: str,
    prompt: Mapping[str, str] | None = None,
) -> Event:
    """First event: the request has a slot and its prompt is being evaluated. ``seed`` is the one in use.

    ``prompt``: what there is to say of a prompt that the worker made from messages. ``prompt_digest`` of its text;
    ``rendered_at``, where the chat template has asked for the time: when it was (ISO 8601), for ``continue_from``;
    ``tool_format``, where tools were offered: how the text will write calls (contract.tools).
    """
    event = {
        "type": "started",
        "request_id": request_id,
        "model": model,
        "seed": seed,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached_tokens,
        "worker_id": worker_id,
    }
    return event if prompt is None else event | dict(prompt)


def token(text: str, index: int, token_id: int, logprobs: Logprobs | None = None) -> Event:
    """One generated token. ``i`` counts from 0 without gaps; ``t`` may be empty while a character or a possible stop
    string is incomplete; the concatenation of all ``t`` is the text. ``lp``, where it was asked for:
    ``{"piece": str, "logprob": float, "bytes": [int], "top": [{"id", "piece", "logprob", "bytes"}]}``, natural logarithms
    of the probabilities before sampling; ``piece`` is this one token's text, with U+FFFD for bytes of a split character."""
    event: Event = {"type": "token", "t": text, "i": index, "id": token_id}
    if logprobs is not None:
        event["lp"] = logprobs
    return event


def queued(position: int, waited_ms: float) -> Event:
    """The request waits at the queen; ``position`` counts from 1 among those of its model."""
    return {"type": "queued", "position": position, "waited_ms": round(waited_ms)}


def end(
    tokens_out: int,
    stop_reason: str,
    *,
    prompt_ms: float,
    decode_ms: float,
    prompt_tokens: int,
    stop_sequence: str | None = None,
) -> Event:
    """Last event of a stream that ended well. Times in milliseconds, as measured by the worker.

    ``stop_sequence``: the stop string that has come; the event has it with ``stop_reason`` STOP_SEQUENCE alone.
    """
    event: Event = {
        "type": "end",
        "tokens_out": tokens_out,
        "prompt_tokens": prompt_tokens,
        "stop_reason": stop_reason,
        "prompt_time_ms": round(prompt_ms, 1),
        "decode_time_ms": round(decode_ms, 1),
    }
    return event if stop_sequence is None else event | {"stop_sequence": stop_sequence}


def error(err: RbeeError, correlation_id: str | None = None) -> Event:
    """Last event of a stream that failed after it began: the envelope's fields, flat."""
    return {"type": "error", **err.envelope(correlation_id)["error"]}


def narration(actor: str, action: str, human: str) -> Event:
    """What is happening, for a person."""
    return {"type": "narration", "actor": actor, "action": action, "human": human}


def narration_line(actor: str, action: str, text: str) -> str:
    """Return ``[actor     ] action         : text`` (SPEC 3.5); what is too long is cut."""
    return f"[{actor[:ACTOR_WIDTH]:<{ACTOR_WIDTH}}] {action[:ACTION_WIDTH]:<{ACTION_WIDTH}}: {text}"


def loading(stage: str, **figures: Any) -> Event:
    """One line of loading progress: stage ``loading_to_vram``, ``ready`` or ``failed``."""
    return {"type": "loading", "stage": stage, **figures}


def encode(event: Event) -> bytes:
    """Return the event as SSE bytes. JSON never holds a raw newline, so one ``data:`` line suffices."""
    return f"event: {event['type']}\ndata: {_to_json(event)}\n\n".encode()


def comment(event: Event) -> bytes:
    """Return an event (``queued``, ``loading``) as an SSE comment, which the clients of every API skip."""
    figures = " ".join(f"{name}={value}" for name, value in event.items() if name not in ("type", "message"))
    return f": {event['type']} {' '.join(figures.split())}\n\n".encode()


class SseParser:
    """Incremental parser of an SSE byte stream: feed bytes, get the ``data`` payloads.

    A payload is the text after ``data:`` (several lines joined); comments and other fields are skipped. ``[DONE]`` is
    returned as the payload it is: text inside JSON that looks like it can not be taken for it.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Yield each payload completed by ``chunk``."""
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data).decode("utf-8", "replace")
                self._data = []
