"""OpenAI's API on top of the relay: models, chat/completions, completions. Errors have OpenAI's shape on these routes."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_serve.common.http import JsonResponse, correlation_id, error_headers, read_json, sse, while_connected
from rbee_serve.contract.api import ChatCompletionRequest, CompletionRequest, parse
from rbee_serve.contract.errors import ModelNotFound, RbeeError
from rbee_serve.contract.events import DONE
from rbee_serve.queen.native_api import stream_headers
from rbee_serve.queen.openai_shapes import ChatShape, CompletionShape, Shape, error_body, refuse_unsupported, to_inference
from rbee_serve.queen.placement import known_models, serves
from rbee_serve.queen.registry import Worker
from rbee_serve.queen.relay import Stream
from rbee_serve.queen.state import Closing, Queen, collect

#: Largest max_tokens that workers accept by default (SPEC 3.8).
_MAX_TOKENS_LIMIT = 2048

Endpoint = Callable[[Request], Awaitable[Response | Closing]]


def routes(queen: Queen) -> list[Route]:
    """Return OpenAI's routes."""
    api = OpenAIApi(queen)
    return [
        Route("/v1/models", _with_openai_errors(api.models)),
        Route("/v1/models/{model:path}", _with_openai_errors(api.model)),
        Route("/v1/chat/completions", _with_openai_errors(api.chat), methods=["POST"]),
        Route("/v1/completions", _with_openai_errors(api.completions), methods=["POST"]),
    ]


def _with_openai_errors(endpoint: Endpoint) -> Endpoint:
    async def answer(request: Request) -> Response | Closing:
        try:
            return await endpoint(request)
        except RbeeError as e:
            return JsonResponse(error_body(e, correlation_id()), status_code=e.status, headers=error_headers(e))

    return answer


class OpenAIApi:
    """Endpoints."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    async def models(self, _: Request) -> Response:
        """List the models that live workers serve."""
        workers = self._queen.registry.live(self._queen.clock())
        return JsonResponse({"object": "list", "data": [_model(m, workers) for m in known_models(workers)]})

    async def model(self, request: Request) -> Response:
        """Show one model."""
        name = request.path_params["model"]
        workers = self._queen.registry.live(self._queen.clock())
        for worker in workers:
            if serves(worker, name):
                return JsonResponse(_model(worker.record.model_id, workers))
        known = known_models(workers)
        raise ModelNotFound(f"model {name!r} is not served; known: {', '.join(known) or 'none'}", model=name, known=known)

    async def chat(self, request: Request) -> Response | Closing:
        """Chat completions. The worker renders the model's own chat template."""
        body = await read_json(request)
        refuse_unsupported(body)
        return await self._answer(request, parse(ChatCompletionRequest, body), ChatShape)

    async def completions(self, request: Request) -> Response | Closing:
        """Completions of a raw prompt."""
        body = await read_json(request)
        refuse_unsupported(body)
        return await self._answer(request, parse(CompletionRequest, body), CompletionShape)

    async def _answer(
        self, http: Request, request: ChatCompletionRequest | CompletionRequest, shape_of: type[Shape]
    ) -> Response | Closing:
        queen = self._queen
        wanted = to_inference(request, fits=self._fits(request.model))
        stream = await queen.open_stream(http, wanted, "openai", correlation_id())
        usage = request.stream_options is not None and request.stream_options.include_usage
        shape = shape_of(stream.id, stream.model, int(time.time()), include_usage=usage and request.stream)
        headers = stream_headers(stream)
        if request.stream:
            body = sse(_chunks(stream, shape), ping_interval_s=queen.settings.ping_interval_s, headers=headers)
            return Closing(body, stream)
        try:
            text = await while_connected(http, collect(stream))
        finally:
            await stream.aclose()
        return JsonResponse(shape.whole(text, stream.outcome, stream.prompt_tokens, stream.tokens_out), headers=headers)

    def _fits(self, model: str) -> int:
        """Return the tokens to ask for when the client names no limit: what every worker of the model can hold."""
        contexts = [w.record.context_tokens for w in self._queen.registry if serves(w, model)]
        return min([c for c in contexts if c] + [_MAX_TOKENS_LIMIT])


def _model(model_id: str, workers: list[Worker]) -> dict[str, str | int]:
    created = min(int(w.record.started_at) for w in workers if w.record.model_id == model_id)
    return {"id": model_id, "object": "model", "created": created, "owned_by": "rbee"}


async def _chunks(stream: Stream, shape: Shape) -> AsyncGenerator[bytes]:
    """Yield the stream as OpenAI's chunks, one piece of bytes for each piece that came from the worker."""
    opening = shape.opening()
    async with aclosing(stream.events()) as batches:
        async for batch in batches:
            out = b""
            for _, event in batch:
                kind = event["type"]
                if kind == "token":
                    out += shape.token(event["t"])
                elif kind == "started":
                    out += opening
                elif kind == "end":
                    out += shape.closing(event["stop_reason"], stream.prompt_tokens, stream.tokens_out)
                elif kind == "error" and stream.error is not None:
                    out += b"data: " + orjson.dumps(error_body(stream.error, stream.correlation_id)) + b"\n\n"
            if out:
                yield out
    yield DONE
