"""Ollama's API over a backend. Streams are JSON lines, errors ``{"error": text}``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_serve import __version__
from rbee_serve.common.apis.anthropic_api import as_object
from rbee_serve.common.apis.embeddings import answer_with, as_floats, as_list, check_dimensions
from rbee_serve.common.apis.ollama_messages import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
    chat_inference,
    generate_inference,
    refuse_unsupported,
    sampling,
)
from rbee_serve.common.apis.streams import Answer, Backend, Closing, End, Failed, Generations, Model, Reading, opened
from rbee_serve.common.apis.tool_calls import Arguments, Call, Text
from rbee_serve.common.http import ErrorShape, JsonResponse, correlation_id, ndjson, read_json, while_connected
from rbee_serve.common.openapi import takes
from rbee_serve.contract.api import InferenceRequest, StopReason, parse
from rbee_serve.contract.errors import InvalidRequest, ModelNotFound, RbeeError

_DONE_REASONS = {StopReason.MAX_TOKENS: "length"}


def error_body(error: RbeeError, correlation_id: str | None) -> dict[str, Any]:
    """Return Ollama's error: its text. Code and correlation id stand beside it."""
    body: dict[str, Any] = {"error": error.message, "code": error.code, "details": error.details}
    return body if correlation_id is None else body | {"correlation_id": correlation_id}


ERROR_SHAPES: dict[str, ErrorShape] = {"/api": error_body}


def routes(backend: Backend) -> list[Route]:
    """Return Ollama's routes."""
    api = OllamaApi(backend)
    return [
        Route("/api/version", api.version),
        Route("/api/tags", api.tags),
        Route("/api/ps", api.ps),
        Route("/api/show", api.show, methods=["POST"]),
        Route("/api/chat", api.chat, methods=["POST"]),
        Route("/api/generate", api.generate, methods=["POST"]),
        Route("/api/embed", api.embed, methods=["POST"]),
        Route("/api/embeddings", api.embeddings, methods=["POST"]),
    ]


#: (text, calls) -> what a line says beside model, time and done
Line = Callable[[str, list[dict[str, Any]]], dict[str, Any]]


def _chat_line(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    return {"message": message | ({"tool_calls": calls} if calls else {})}


def _generate_line(text: str, _: list[dict[str, Any]]) -> dict[str, Any]:
    return {"response": text}


@dataclass(frozen=True)
class _Shape:
    """Lines of one answer. ``began``: of time.perf_counter, when the request came."""

    model: str
    line: Line
    began: float

    def piece(self, text: str = "", calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return a line of the stream."""
        return self._head() | self.line(text, calls or []) | {"done": False}

    def last(
        self, reading: Reading | None, reason: str, text: str = "", calls: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Return the last line, which is the whole answer where ``text`` is. Durations are nanoseconds."""
        body = self._head() | self.line(text, calls or []) | {"done": True, "done_reason": reason}
        total = round((time.perf_counter() - self.began) * 1e9)
        if reading is None:
            return body
        return body | {
            "total_duration": total,
            "load_duration": 0,
            "prompt_eval_count": reading.prompt_tokens,
            "prompt_eval_duration": round(reading.prompt_ms * 1e6),
            "eval_count": reading.tokens_out,
            "eval_duration": round(reading.decode_ms * 1e6),
        }

    def _head(self) -> dict[str, Any]:
        return {"model": self.model, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}


class OllamaApi:
    """Endpoints."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def version(self, _: Request) -> Response:
        """Tell rbee's version."""
        return JsonResponse({"version": __version__})

    async def tags(self, request: Request) -> Response:
        """List the models that can be asked for."""
        return JsonResponse({"models": [_tag(m) for m in self._backend.models(request)]})

    async def ps(self, request: Request) -> Response:
        """List the models that are loaded."""
        models = [m for m in self._backend.models(request) if m.loaded]
        return JsonResponse({"models": [_tag(m) | _loaded(m) for m in models]})

    @takes(OllamaShowRequest)
    async def show(self, request: Request) -> Response:
        """Show one model."""
        wanted = parse(OllamaShowRequest, await read_json(request))
        name = wanted.model or wanted.name
        if name is None:
            raise InvalidRequest("model: required", field="model")
        model = self._model(name)
        architecture = str(model.info.get("architecture", ""))
        info = {
            "general.architecture": architecture,
            "general.parameter_count": model.info.get("parameters"),
            f"{architecture}.context_length": model.info.get("context_trained"),
        }
        return JsonResponse(
            {
                "modelfile": "",
                "template": "",
                "details": _details(model),
                "model_info": {name: value for name, value in info.items() if value is not None},
                "capabilities": ["completion", "tools"] if model.info.get("chat_template") else ["completion"],
                "modified_at": _time(model),
                "digest": _digest(model),
            }
        )

    @takes(OllamaChatRequest, streams="application/x-ndjson")
    async def chat(self, request: Request) -> Response | Closing:
        """Answer a conversation."""
        began = time.perf_counter()
        body = await read_json(request)
        refuse_unsupported(body)
        wanted = parse(OllamaChatRequest, body)
        model = self._model(wanted.model)
        if not wanted.messages:
            return self._loaded_only(wanted.model, _chat_line, wanted.keep_alive)
        inference = chat_inference(wanted, model.id, self._sampling(wanted.options, model))
        return await self._answer(request, inference, _Shape(wanted.model, _chat_line, began))

    @takes(OllamaGenerateRequest, streams="application/x-ndjson")
    async def generate(self, request: Request) -> Response | Closing:
        """Answer a prompt."""
        began = time.perf_counter()
        body = await read_json(request)
        refuse_unsupported(body)
        wanted = parse(OllamaGenerateRequest, body)
        model = self._model(wanted.model)
        if not wanted.prompt:
            return self._loaded_only(wanted.model, _generate_line, wanted.keep_alive)
        inference = generate_inference(wanted, model.id, self._sampling(wanted.options, model))
        return await self._answer(request, inference, _Shape(wanted.model, _generate_line, began))

    @takes(OllamaEmbedRequest)
    async def embed(self, request: Request) -> Response:
        """Turn texts into vectors of length 1."""
        began = time.perf_counter()
        wanted = parse(OllamaEmbedRequest, await read_json(request))
        found = await self._backend.embed(request, self._model(wanted.model).id, as_list(wanted.input), "ollama")
        check_dimensions(wanted.dimensions, found.vectors)
        frame = {
            "model": wanted.model,
            "total_duration": round((time.perf_counter() - began) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": found.prompt_tokens,
        }
        return answer_with(found.vectors, lambda _, vector: as_floats(vector), frame, "embeddings", found.headers)

    @takes(OllamaEmbeddingsRequest)
    async def embeddings(self, request: Request) -> Response:
        """Turn one text into a vector (the older route)."""
        wanted = parse(OllamaEmbeddingsRequest, await read_json(request))
        found = await self._backend.embed(request, self._model(wanted.model).id, [wanted.prompt], "ollama")
        return JsonResponse({"embedding": as_floats(found.vectors[0])}, headers=dict(found.headers))

    def _model(self, name: str) -> Model:
        """Return the model; a name without a tag is one with the tag ``latest`` at Ollama."""
        try:
            return self._backend.model(name)
        except ModelNotFound:
            plain = name.removesuffix(":latest")
            if plain == name:
                raise
            return self._backend.model(plain)

    def _sampling(self, options: dict[str, Any] | None, model: Model) -> dict[str, Any]:
        return sampling(options, fits=self._backend.fits(model.id), context_tokens=model.context_tokens)

    def _loaded_only(self, model: str, line: Line, keep_alive: float | str | None) -> Response:
        """Answer a request without a prompt, by which clients load and unload. Here it changes nothing."""
        reason = "unload" if keep_alive in (0, "0", "0s") else "load"
        return JsonResponse(_Shape(model, line, time.perf_counter()).last(None, reason))

    async def _answer(self, http: Request, inference: InferenceRequest, shape: _Shape) -> Response | Closing:
        generations, first = await opened(self._backend, http, [inference], "ollama")
        headers = self._backend.headers(first)
        if inference.stream:
            return Closing(ndjson(_lines(generations, shape), headers=headers), generations)
        try:
            (answer,) = await while_connected(http, generations.collect())
        finally:
            await generations.aclose()
        reason = _done_reason(answer.stop_reason)
        return JsonResponse(shape.last(answer.reading, reason, answer.text, _calls(answer)), headers=headers)


def _done_reason(stop_reason: str) -> str:
    return _DONE_REASONS.get(StopReason(stop_reason), "stop")


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [{"function": {"name": c["name"], "arguments": as_object(c["arguments"])}} for c in answer.calls]


async def _lines(generations: Generations, shape: _Shape) -> AsyncGenerator[bytes]:
    """Yield the answer line by line; a call is a line of its own once it is complete, as Ollama has it."""
    answer: Answer | None = None
    given = 0  # calls
    async with aclosing(generations.parts()) as batches:
        async for n, parts in batches:
            out: list[dict[str, Any]] = []
            answer = answer or Answer(generations.readings[n])
            for part in parts:
                if isinstance(part, Failed):
                    out.append(error_body(part.error, correlation_id()))
                    continue
                if isinstance(part, Call | End) and len(answer.calls) > given:
                    out.append(shape.piece(calls=_calls(answer)[given:]))
                    given = len(answer.calls)
                if isinstance(part, Call | Arguments | End):
                    answer.add([part])
                if isinstance(part, Text):
                    out.append(shape.piece(part.text))
                elif isinstance(part, End):
                    out.append(shape.last(answer.reading, _done_reason(part.stop_reason)))
            if out:
                yield b"".join([orjson.dumps(line) + b"\n" for line in out])


def _time(model: Model) -> str:
    return datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")


def _digest(model: Model) -> str:
    """Return the file's SHA-256 from the catalog. Where nobody has told the worker, its own digest of parts of the file: the
    official client shows the first digits and fails without any."""
    return str(model.info.get("sha256") or model.info.get("metadata", {}).get("model_digest", ""))


def _details(model: Model) -> dict[str, Any]:
    family = str(model.info.get("architecture", ""))
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": _human(model.info.get("parameters")),
        "quantization_level": str(model.info.get("quantization", "")),
    }


def _human(parameters: Any) -> str:
    if not isinstance(parameters, int):
        return ""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"


def _tag(model: Model) -> dict[str, Any]:
    return {
        "name": model.id,
        "model": model.id,
        "modified_at": _time(model),
        "size": int(model.info.get("size_bytes", 0)),
        "digest": _digest(model),
        "details": _details(model),
    }


def _loaded(model: Model) -> dict[str, Any]:
    return {"size_vram": model.device_bytes, "context_length": model.context_tokens}
