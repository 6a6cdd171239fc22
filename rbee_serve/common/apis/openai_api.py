"""OpenAI's API over a backend: models, chat/completions, completions. Errors have OpenAI's shape on these routes."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_serve.common.apis.openai_messages import ChatCompletionRequest, CompletionRequest, refuse
from rbee_serve.common.apis.openai_shapes import ChatShape, CompletionShape, Shape, error_body, to_inferences, usage_of
from rbee_serve.common.apis.streams import Backend, Began, Closing, End, Failed, Generations, Model, Part, Token, Waiting, opened
from rbee_serve.common.apis.tool_calls import Arguments, Call, Text
from rbee_serve.common.http import ErrorShape, JsonResponse, correlation_id, read_json, sse, while_connected
from rbee_serve.common.openapi import takes
from rbee_serve.contract.api import parse
from rbee_serve.contract.events import DONE, comment

#: Paths on which errors have OpenAI's shape.
ERROR_SHAPES: dict[str, ErrorShape] = {
    "/v1/models": error_body,
    "/v1/chat/completions": error_body,
    "/v1/completions": error_body,
}


def routes(backend: Backend) -> list[Route]:
    """Return OpenAI's routes."""
    api = OpenAIApi(backend)
    return [
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
    ]


class OpenAIApi:
    """Endpoints."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def models(self, request: Request) -> Response:
        """List the models that can be asked for."""
        return JsonResponse({"object": "list", "data": [_model(m) for m in self._backend.models(request)]})

    async def model(self, request: Request) -> Response:
        """Show one model."""
        return JsonResponse(_model(self._backend.model(request.path_params["model"])))

    @takes(ChatCompletionRequest, streams="text/event-stream")
    async def chat(self, request: Request) -> Response | Closing:
        """Chat completions. The worker renders the model's own chat template."""
        body = await read_json(request)
        refuse(body)
        wanted = parse(ChatCompletionRequest, body)
        return await self._answer(request, wanted, ChatShape, parallel_calls=wanted.parallel_tool_calls is not False)

    @takes(CompletionRequest, streams="text/event-stream")
    async def completions(self, request: Request) -> Response | Closing:
        """Completions of raw prompts."""
        body = await read_json(request)
        refuse(body)
        return await self._answer(request, parse(CompletionRequest, body), CompletionShape)

    async def _answer(
        self,
        http: Request,
        request: ChatCompletionRequest | CompletionRequest,
        shape_of: type[Shape],
        *,
        parallel_calls: bool = True,
    ) -> Response | Closing:
        backend = self._backend
        wanted = to_inferences(request, fits=backend.fits(request.model))
        n = request.n or 1
        generations, first = await opened(backend, http, wanted, "openai", parallel_calls=parallel_calls)
        headers = backend.headers(first)
        usage = bool(request.stream) and request.stream_options is not None and request.stream_options.include_usage
        head = (first.id, first.model, int(time.time()))
        shapes = [shape_of(*head, include_usage=usage, index=k) for k in range(len(wanted))]
        if not request.stream:
            try:
                answers = await while_connected(http, generations.collect())
            finally:
                await generations.aclose()
            return JsonResponse(shapes[0].whole(answers, usage_of(generations.readings, n)), headers=headers)
        body = sse(_chunks(generations, shapes, n), ping_interval_s=backend.ping_interval_s, headers=headers)
        return Closing(body, generations)


def _model(model: Model) -> dict[str, str | int]:
    return {"id": model.id, "object": "model", "created": model.created, "owned_by": "rbee"}


async def _chunks(generations: Generations, shapes: list[Shape], n: int) -> AsyncGenerator[bytes]:
    """Yield the answers as OpenAI's chunks, one piece of bytes for each batch that came."""
    failed = False
    async with aclosing(generations.parts()) as batches:
        async for k, parts in batches:
            shape = shapes[k]
            out = b""
            for part in parts:
                failed = failed or isinstance(part, Failed)
                out += _encoded(part, shape, called=k in generations.readings and generations.readings[k].called)
            if out:
                yield out
    if not failed:
        last = shapes[0].final(usage_of(generations.readings, n))
        if last:
            yield last
    yield DONE


def _encoded(part: Part, shape: Shape, *, called: bool) -> bytes:
    if isinstance(part, Text):
        return shape.token(part.text)
    if isinstance(part, Began):
        return shape.opening()
    if isinstance(part, Waiting):
        return comment(part.event)
    if isinstance(part, Token):
        return shape.scored(part.text, part.lp)
    if isinstance(part, Call):
        return shape.call(part)
    if isinstance(part, Arguments):
        return shape.arguments(part)
    if isinstance(part, End):
        return shape.closing(part.stop_reason, called=called)
    return b"data: " + orjson.dumps(error_body(part.error, correlation_id())) + b"\n\n"
