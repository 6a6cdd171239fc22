"""OpenAI's Responses over a backend: whole, and as the events that the official client reads. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_serve.common.apis.openai_messages import refuse
from rbee_serve.common.apis.openai_shapes import error_body
from rbee_serve.common.apis.responses_messages import UNSUPPORTED, ResponsesRequest, to_inference
from rbee_serve.common.apis.streams import Backend, Began, Closing, End, Failed, Generations, Part, Reading, Waiting, opened
from rbee_serve.common.apis.tool_calls import Arguments, Call, Text
from rbee_serve.common.http import ErrorShape, JsonResponse, correlation_id, read_json, sse, while_connected
from rbee_serve.common.openapi import takes
from rbee_serve.contract.api import StopReason, parse
from rbee_serve.contract.events import comment

ERROR_SHAPES: dict[str, ErrorShape] = {"/v1/responses": error_body}


def routes(backend: Backend) -> list[Route]:
    """Return the route."""
    return [Route("/v1/responses", ResponsesApi(backend).responses, methods=["POST"])]


class ResponsesApi:
    """The endpoint."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @takes(ResponsesRequest, streams="text/event-stream")
    async def responses(self, request: Request) -> Response | Closing:
        """Answer an input of text, messages, calls and their results."""
        body = await read_json(request)
        refuse(body, UNSUPPORTED)
        wanted = parse(ResponsesRequest, body)
        inference = to_inference(wanted, fits=self._backend.fits(wanted.model))
        generations, first = await opened(
            self._backend, request, [inference], "openai", parallel_calls=wanted.parallel_tool_calls is not False
        )
        shape = ResponseShape(first.id, first.model, wanted, time.time())
        headers = self._backend.headers(first)
        if wanted.stream:
            events = _events(generations, shape)
            return Closing(sse(events, ping_interval_s=self._backend.ping_interval_s, headers=headers), generations)
        try:
            (answer,) = await while_connected(request, generations.collect())
        finally:
            await generations.aclose()
        shape.text(answer.text)
        for n, call in enumerate(answer.calls):
            shape.call(Call(n, call["id"], call["name"]))
            shape.arguments(Arguments(n, call["arguments"]))
        shape.finish(answer.reading, answer.stop_reason)
        return JsonResponse(shape.response(), headers=headers)


class ResponseShape:
    """The response as it grows; each step returns the events that tell of it."""

    def __init__(self, request_id: str, model: str, request: ResponsesRequest, created: float) -> None:
        self._id, self._number = request_id, 0
        self._output: list[dict[str, Any]] = []
        self._open = False
        self._reading: Reading | None = None
        self._body: dict[str, Any] = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": model,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": (request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {})
            or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice if isinstance(request.tool_choice, str) else "auto",
            "tools": [tool.model_dump() | {"strict": bool(tool.strict)} for tool in request.tools or ()],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "user": request.user,
        }
        if request.tool_choice is not None and not isinstance(request.tool_choice, str):
            self._body["tool_choice"] = request.tool_choice.model_dump()

    def response(self) -> dict[str, Any]:
        """Return the response as it is now."""
        return self._body | {"output": self._output, "usage": None if self._reading is None else _usage(self._reading)}

    def begin(self) -> bytes:
        """The generation has begun."""
        return self._event("response.created", response=self.response()) + self._event(
            "response.in_progress", response=self.response()
        )

    def text(self, text: str) -> bytes:
        """A piece of text has come."""
        if not text:
            return b""
        out = b""
        if not self._open or self._output[-1]["type"] != "message":
            out = self._close()
            item = {"type": "message", "id": f"msg_{self._id}_{len(self._output)}", "status": "in_progress", "role": "assistant"}
            out += self._add(item | {"content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            out += self._event("response.content_part.added", **self._at_part(), part=part)
            self._output[-1]["content"].append(part)
        self._output[-1]["content"][0]["text"] += text
        return out + self._event("response.output_text.delta", **self._at_part(), delta=text, logprobs=[])

    def call(self, call: Call) -> bytes:
        """A call has begun."""
        item = {"type": "function_call", "id": f"fc_{self._id}_{len(self._output)}", "status": "in_progress"}
        return self._close() + self._add(item | {"call_id": call.id, "name": call.name, "arguments": ""})

    def arguments(self, piece: Arguments) -> bytes:
        """A piece of the open call's arguments has come."""
        self._output[-1]["arguments"] += piece.text
        return self._event("response.function_call_arguments.delta", **self._at(), delta=piece.text)

    def finish(self, reading: Reading, stop_reason: str) -> bytes:
        """The generation has ended."""
        self._reading = reading
        cut = stop_reason == StopReason.MAX_TOKENS
        out = self._close("incomplete" if cut else "completed")
        self._body["status"] = "incomplete" if cut else "completed"
        if cut:
            self._body["incomplete_details"] = {"reason": "max_output_tokens"}
        return out + self._event(f"response.{self._body['status']}", response=self.response())

    def fail(self, part: Failed) -> bytes:
        """The generation has failed."""
        error = error_body(part.error, correlation_id())["error"]
        self._body["status"], self._body["error"] = "failed", {"code": "server_error", "message": error["message"]}
        return self._event("error", code=error["code"], message=error["message"], param=error["param"]) + self._event(
            "response.failed", response=self.response()
        )

    def _add(self, item: dict[str, Any]) -> bytes:
        self._output.append(item)
        self._open = True
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _close(self, status: str = "completed") -> bytes:
        if not self._open:
            return b""
        self._open = False
        item = self._output[-1]
        if item["type"] == "message":
            part = item["content"][0]
            out = self._event("response.output_text.done", **self._at_part(), text=part["text"], logprobs=[])
            out += self._event("response.content_part.done", **self._at_part(), part=part)
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            out = self._event("response.function_call_arguments.done", **self._at(), **done)
        item["status"] = status
        return out + self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _at_part(self) -> dict[str, Any]:
        return self._at() | {"content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = orjson.dumps({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + body + b"\n\n"

    def part(self, part: Part, reading: Reading | None) -> bytes:
        """Return the events of one part of the generation."""
        if isinstance(part, Text):
            return self.text(part.text)
        if isinstance(part, Call):
            return self.call(part)
        if isinstance(part, Arguments):
            return self.arguments(part)
        if isinstance(part, Began):
            return self.begin()
        if isinstance(part, Waiting):
            return comment(part.event)
        if isinstance(part, Failed):
            return self.fail(part)
        if isinstance(part, End) and reading is not None:
            return self.finish(reading, part.stop_reason)
        return b""


def _usage(reading: Reading) -> dict[str, Any]:
    return {
        "input_tokens": reading.prompt_tokens,
        "input_tokens_details": {"cached_tokens": reading.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": reading.tokens_out,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": reading.prompt_tokens + reading.tokens_out,
    }


async def _events(generations: Generations, shape: ResponseShape) -> AsyncGenerator[bytes]:
    async with aclosing(generations.parts()) as batches:
        async for n, parts in batches:
            reading = generations.readings.get(n)
            if out := b"".join([shape.part(part, reading) for part in parts]):
                yield out
