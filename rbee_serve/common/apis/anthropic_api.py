"""Anthropic's messages over a backend: whole and streamed, tools, token counts. Errors have Anthropic's shape there."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_serve.common.apis.openai_messages import refuse
from rbee_serve.common.apis.streams import (
    Answer,
    Backend,
    Began,
    Closing,
    End,
    Failed,
    Generations,
    Part,
    Reading,
    Waiting,
    opened,
)
from rbee_serve.common.apis.tool_calls import Arguments, Call, Text
from rbee_serve.common.http import ErrorShape, JsonResponse, correlation_id, read_json, sse, while_connected
from rbee_serve.common.openapi import takes
from rbee_serve.contract.api import InferenceRequest, StopReason, StopStrings, TolerantMessage, parse
from rbee_serve.contract.errors import InvalidRequest, RbeeError
from rbee_serve.contract.events import comment

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "thinking": ({"type": "disabled"},),
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
    "output_format": (),
    "speed": ("standard",),
}

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

_STOP_REASONS = {
    StopReason.EOS: "end_turn",
    StopReason.MAX_TOKENS: "max_tokens",
    StopReason.STOP_SEQUENCE: "stop_sequence",
}


def error_body(error: RbeeError, correlation_id: str | None) -> dict[str, Any]:
    """Return Anthropic's error object; code, details and correlation id are as on all other routes."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {
        "type": "error",
        "error": error.envelope(correlation_id)["error"] | {"type": kind},
        "request_id": correlation_id,
    }


ERROR_SHAPES: dict[str, ErrorShape] = {"/v1/messages": error_body}


class AnthropicTool(TolerantMessage):
    """A tool of the client's own."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]


class AnthropicToolChoice(TolerantMessage):
    """Whether, and which, tool is to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class AnthropicMessage(TolerantMessage):
    """One turn; blocks are text, tool_use or tool_result."""

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class CountTokensRequest(TolerantMessage):
    """``POST /v1/messages/count_tokens``."""

    model: str = Field(min_length=1, max_length=200)
    messages: list[AnthropicMessage] = Field(min_length=1, max_length=1024)
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = Field(None, max_length=128)
    tool_choice: AnthropicToolChoice | None = None


class AnthropicFormat(TolerantMessage):
    """A schema that the text must follow."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class AnthropicOutput(TolerantMessage):
    """Anthropic's ``output_config``; there is no effort to choose here."""

    format: AnthropicFormat | None = None
    effort: None = None


class MessagesRequest(CountTokensRequest):
    """``POST /v1/messages``."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool = False
    stop_sequences: StopStrings | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    output_config: AnthropicOutput | None = None


def to_inference(request: CountTokensRequest) -> InferenceRequest:
    """Return the native request, with Anthropic's defaults (temperature 1) for what is absent."""
    messages = [m for turn in request.messages for m in _turns(turn)]
    if request.messages[-1].role == "assistant":
        raise InvalidRequest(
            "messages: the last one must be the user's; an answer can not be begun for the model", field="messages"
        )
    if request.system:
        messages.insert(0, {"role": "system", "content": _text(request.system, "system")})
    values: dict[str, Any] = {"messages": messages, "model": request.model, "temperature": 1.0, "top_p": 1.0}
    if request.tools:
        values["tools"] = [
            {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.input_schema}}
            for t in request.tools
        ]
    if request.tool_choice is not None:
        values["tool_choice"] = _choice(request.tool_choice)
    if isinstance(request, MessagesRequest):
        values |= {"max_tokens": request.max_tokens, "stream": request.stream, "stop": request.stop_sequences or []}
        if request.output_config is not None and request.output_config.format is not None:
            if request.tools:
                raise InvalidRequest("output_config: not together with tools", field="output_config")
            values["json_schema"] = request.output_config.format.schema_
        given = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k")}
        values |= {name: value for name, value in given.items() if value is not None}
    return parse(InferenceRequest, values)


def _choice(choice: AnthropicToolChoice) -> Any:
    if choice.type != "tool":
        return {"any": "required"}.get(choice.type, choice.type)
    if not choice.name:
        raise InvalidRequest("tool_choice.name: required with the type tool", field="tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _text(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise InvalidRequest(f"{field}: only text blocks are supported here", field=field)
    return "".join(block["text"] for block in content)


def _turns(turn: AnthropicMessage) -> list[dict[str, Any]]:
    """Return the turn as OpenAI's messages: results of tools are messages of their own there."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    texts: list[str] = []
    for block in turn.content:
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "tool_use" and turn.role == "assistant" and isinstance(block.get("name"), str):
            function = {"name": block["name"], "arguments": json.dumps(block.get("input", {}), ensure_ascii=False)}
            calls.append({"id": str(block.get("id")), "type": "function", "function": function})
        elif kind == "tool_result" and turn.role == "user":
            content = _text(block.get("content") or "", "messages.content")
            results.append({"role": "tool", "content": content, "tool_call_id": str(block.get("tool_use_id"))})
        elif kind in ("thinking", "redacted_thinking") and turn.role == "assistant":
            continue  # another model's: Anthropic too leaves those of earlier turns out
        else:
            raise InvalidRequest(f"messages.content: a block of type {kind!r} is not supported here", field="messages")
    turns = results
    if texts or calls or not results:
        turns.append({"role": turn.role, "content": "".join(texts)} | ({"tool_calls": calls} if calls else {}))
    return turns


def routes(backend: Backend) -> list[Route]:
    """Return Anthropic's routes."""
    api = AnthropicApi(backend)
    return [
        Route("/v1/messages", api.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", api.count_tokens, methods=["POST"]),
    ]


class AnthropicApi:
    """Endpoints."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @takes(MessagesRequest, streams="text/event-stream")
    async def messages(self, request: Request) -> Response | Closing:
        """Answer a conversation."""
        body = await read_json(request)
        refuse(body, _UNSUPPORTED)
        wanted = parse(MessagesRequest, body)
        inference = to_inference(wanted)
        one_call = wanted.tool_choice is not None and wanted.tool_choice.disable_parallel_tool_use
        generations, first = await opened(self._backend, request, [inference], "anthropic", parallel_calls=not one_call)
        shape = MessageShape(first.id, first.model)
        headers = self._backend.headers(first)
        if wanted.stream:
            body_ = _events(generations, shape)
            return Closing(sse(body_, ping_interval_s=self._backend.ping_interval_s, headers=headers), generations)
        try:
            (answer,) = await while_connected(request, generations.collect())
        finally:
            await generations.aclose()
        return JsonResponse(shape.whole(answer), headers=headers)

    @takes(CountTokensRequest)
    async def count_tokens(self, request: Request) -> Response:
        """Count the tokens of a conversation as the model's own template renders it."""
        wanted = parse(CountTokensRequest, await read_json(request))
        return JsonResponse({"input_tokens": await self._backend.count(request, to_inference(wanted))})


class MessageShape:
    """Answers of one request, whole or as events."""

    def __init__(self, request_id: str, model: str) -> None:
        self._head = {"id": f"msg_{request_id}", "type": "message", "role": "assistant", "model": model}
        self._block = -1
        self._open: str | None = None  # type of the block that is open

    @staticmethod
    def _stop(reason: str, sequence: str | None, *, called: bool) -> dict[str, Any]:
        stop_reason = _STOP_REASONS.get(StopReason(reason), "end_turn")
        if called and stop_reason != "max_tokens":
            stop_reason = "tool_use"
        return {"stop_reason": stop_reason, "stop_sequence": sequence if stop_reason == "stop_sequence" else None}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the answer of a request that was not streamed."""
        content: list[dict[str, Any]] = [{"type": "text", "text": answer.text}] if answer.text or not answer.calls else []
        for call in answer.calls:
            content.append({"type": "tool_use", "id": call["id"], "name": call["name"], "input": as_object(call["arguments"])})
        stop = self._stop(answer.stop_reason, answer.stop_sequence, called=bool(answer.calls))
        return self._head | {"content": content} | stop | {"usage": _usage(answer.reading)}

    def part(self, part: Part, reading: Reading | None) -> bytes:
        """Return the events of one part."""
        if isinstance(part, Text):
            return self._begin("text", {"type": "text", "text": ""}) + self._delta({"type": "text_delta", "text": part.text})
        if isinstance(part, Arguments):
            return self._delta({"type": "input_json_delta", "partial_json": part.text})
        if isinstance(part, Call):
            return self._end() + self._begin("tool_use", {"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
        if isinstance(part, Failed):
            return _event("error", error_body(part.error, correlation_id()))
        if isinstance(part, Waiting):
            return comment(part.event)
        if reading is None:
            return b""
        if isinstance(part, Began):
            empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(reading)}
            return _event("message_start", {"type": "message_start", "message": self._head | empty})
        if isinstance(part, End):
            delta = self._stop(part.stop_reason, part.stop_sequence, called=reading.called)
            last = {"type": "message_delta", "delta": delta, "usage": _usage(reading)}
            return self._end() + _event("message_delta", last) + _event("message_stop", {"type": "message_stop"})
        return b""

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        if self._open == kind == "text":
            return b""
        closed = self._end()
        self._block += 1
        self._open = kind
        return closed + _event(
            "content_block_start", {"type": "content_block_start", "index": self._block, "content_block": block}
        )

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", {"type": "content_block_delta", "index": self._block, "delta": delta})

    def _end(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", {"type": "content_block_stop", "index": self._block})


def as_object(arguments: str) -> dict[str, Any]:
    """Return a call's arguments as an object, empty where the answer was cut in the middle of them."""
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(reading: Reading) -> dict[str, int]:
    """Return Anthropic's usage: what came from the cache does not count as input there."""
    return {
        "input_tokens": reading.prompt_tokens - reading.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": reading.cached_tokens,
        "output_tokens": reading.tokens_out,
    }


def _event(name: str, body: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(body) + b"\n\n"


async def _events(generations: Generations, shape: MessageShape) -> AsyncGenerator[bytes]:
    async with aclosing(generations.parts()) as batches:
        async for n, parts in batches:
            reading = generations.readings.get(n)
            if out := b"".join([shape.part(part, reading) for part in parts]):
                yield out
