"""``POST /v1/inference`` and ``DELETE /v1/inference/{id}`` (SPEC 3.4, 3.5)."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rbee_serve.common.http import JsonResponse, correlation_id, deadline_of, read_json, sse, while_connected
from rbee_serve.common.openapi import takes
from rbee_serve.contract import events
from rbee_serve.contract.api import (
    REQUEST_ID_HEADER,
    WORKER_HEADER,
    InferenceRequest,
    SamplingParams,
    parse,
)
from rbee_serve.contract.errors import InvalidRequest, RbeeError, RequestCanceled
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.contract.tools import LLAMA3
from rbee_serve.worker.engine.protocol import EngineInfo, Finished, GenerateRequest, Started, TokenOut
from rbee_serve.worker.generation import Generation
from rbee_serve.worker.state import Worker

logger = logging.getLogger(__name__)

#: One below llama.cpp's "choose one yourself".
_SEED_MAX = 2**32 - 2
#: A step of the engine may take so long, seconds, before pings stop. The queen bears with silence for a while longer.
_STEP_S = 5.0
_REQUEST_ID_RE = re.compile(r"[A-Za-z0-9._-]{1,128}")


class InferenceApi:
    """The two endpoints."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._numbers = itertools.count(1)

    @takes(InferenceRequest, streams="text/event-stream")
    async def infer(self, request: Request) -> Response | _Closing:
        """Generate, streamed or whole. An error before the first event has its own status; a later one is an event."""
        wanted = parse(InferenceRequest, await read_json(request))
        generation = await self.open(request, wanted, self._request_id(request))
        headers = self.headers(generation)
        if wanted.stream:
            body = self._stream(generation, correlation_id())
            ping_s = self._worker.settings.ping_interval_s
            return _Closing(sse(body, ping_interval_s=ping_s, headers=headers, alive=self._moves), generation)
        try:
            answer = await while_connected(request, self._whole(generation))
        finally:
            await generation.aclose()
        return JsonResponse(answer, headers=headers)

    async def open(self, http: Request, wanted: InferenceRequest, request_id: str) -> Generation:
        """Submit the request and wait until the engine has taken it, while watching the client; raises RbeeError.

        A stream's headers go out then, also where it has to wait for a slot or for a prefix that another request evaluates:
        pings cover the wait. An answer that is not streamed is waited for up to its slot.
        """
        self._check_limits(wanted)
        deadline = self._deadline(http, wanted)
        info = self._worker.admit()
        # A name of its own at the engine: an id may be used again while the request that had it is still being ended there.
        request, prompt = self._to_engine(wanted, info, f"{request_id}#{next(self._numbers)}")
        generation = Generation(self._worker, request, deadline, request_id)
        generation.prompt = prompt
        try:
            await while_connected(http, generation.open(started=not wanted.stream))
        except BaseException:
            await generation.aclose()
            raise
        return generation

    def headers(self, generation: Generation) -> dict[str, str]:
        """Return the headers that go with an answer."""
        return {REQUEST_ID_HEADER: generation.id, WORKER_HEADER: self._worker.settings.worker_id}

    def _moves(self) -> bool:
        """Whether the engine works: a front that lives must not hide from the queen an engine that hangs."""
        return self._worker.engine.step_age_s < max(_STEP_S, self._worker.settings.ping_interval_s)

    async def cancel(self, request: Request) -> Response:
        """End a running request; 204 also when it has ended or never was."""
        generation = self._worker.running(request.path_params["request_id"])
        if generation is not None:
            generation.end(RequestCanceled("the request was cancelled"))
        return Response(status_code=204)

    def _request_id(self, request: Request) -> str:
        """Return the id that the caller chose, so that it can cancel before the answer's headers arrive, or a new one."""
        given = request.headers.get(REQUEST_ID_HEADER)
        if given is None:
            return new_request_id()
        if not _REQUEST_ID_RE.fullmatch(given):
            raise InvalidRequest(f"{REQUEST_ID_HEADER}: 1 to 128 of A-Z a-z 0-9 . _ - expected", field=REQUEST_ID_HEADER)
        if self._worker.running(given) is not None:
            raise InvalidRequest(f"{REQUEST_ID_HEADER}: a request of this id is running", field=REQUEST_ID_HEADER)
        return given

    def _check_limits(self, wanted: InferenceRequest) -> None:
        limit = self._worker.settings.max_tokens_limit
        if wanted.max_tokens > limit:
            raise InvalidRequest(
                f"max_tokens: {wanted.max_tokens} is over the limit of {limit}",
                field="max_tokens",
                got=wanted.max_tokens,
                limit=limit,
            )

    def _deadline(self, request: Request, wanted: InferenceRequest) -> float | None:
        """Return the earlier of header and ``timeout_s``: neither can lengthen the other (SPEC E-31)."""
        limits = []
        if (deadline := deadline_of(request)) is not None:
            limits.append(deadline)
        if wanted.timeout_s is not None:
            limits.append(self._worker.wall() + wanted.timeout_s)
        return min(limits, default=None)

    def _to_engine(self, wanted: InferenceRequest, info: EngineInfo, name: str) -> tuple[GenerateRequest, dict[str, str]]:
        """Return what the engine gets, and what ``started`` says of the prompt."""
        values = {name: getattr(wanted, name) for name in SamplingParams.model_fields}
        if wanted.seed is None:
            values["seed"] = secrets.randbelow(_SEED_MAX + 1)
        text, chat, bos, said = wanted.prompt or "", wanted.messages is not None, True, dict[str, str]()
        if wanted.messages is not None:
            template = self._worker.chat(info)
            from rbee_serve.worker.chat import Clock, forced_call  # jinja2: not for a start

            clock = Clock(wanted.continue_from.rendered_at if wanted.continue_from else None)
            tools = wanted.tools if wanted.tool_choice != "none" else None
            text = template.render(wanted.messages, tools, clock)
            bos = not template.begins_with_bos(text)
            said["prompt_digest"] = _digest(text)
            if clock.was_read:
                said["rendered_at"] = clock.at.isoformat()
            if tools:
                said["tool_format"] = template.tool_format
                if (forced := forced_call(tools, wanted.tool_choice)) is not None:
                    values["json_schema"], said["tool_format"] = forced, LLAMA3
        ids = wanted.continue_from.generated_ids if wanted.continue_from else []
        if ids and max(ids) >= info.vocab_size:
            raise InvalidRequest(
                f"continue_from.generated_ids: no token id reaches {info.vocab_size} in this model",
                field="continue_from.generated_ids",
                vocab_size=info.vocab_size,
            )
        params = SamplingParams.model_construct(**values)
        return GenerateRequest(name, text, chat, bos, params, ids, wanted.prompt_ids), said

    async def _stream(self, generation: Generation, ident: str | None) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.events(generation, ident)) as found:
            async for batch in found:
                yield b"".join(map(events.encode, batch))
        yield events.DONE

    async def events(self, generation: Generation, ident: str | None) -> AsyncGenerator[list[events.Event], None]:
        """Yield the events of an opened request, ``end`` or ``error`` last; each time all that has come since.

        ``ident``: its correlation id.
        """
        if generation.seed is None:
            raise RuntimeError("a request without a seed was opened")
        try:
            async for batch in generation.events():
                yield [_event(event, generation, self._worker.settings) for event in batch]
        except RbeeError as e:
            logger.warning("stream failed", extra={"request_id": generation.id, "code": e.code, "reason": e.message})
            yield [events.error(e, ident)]
        except Exception:
            logger.exception("stream failed", extra={"request_id": generation.id})
            yield [events.error(RbeeError("internal error; the worker's log has the details"), ident)]

    async def _whole(self, generation: Generation) -> dict[str, object]:
        began = time.perf_counter()
        pieces: list[str] = []
        ids: list[int] = []
        logprobs: list[dict[str, Any]] = []
        last: Finished | None = None
        try:
            async for batch in generation.events():
                for event in batch:
                    if isinstance(event, TokenOut):
                        pieces.append(event.text)
                        ids.append(event.token_id)
                        if event.logprobs is not None:
                            logprobs.append(event.logprobs)
                    elif isinstance(event, Finished):
                        last = event
        except RbeeError as e:
            raise e.with_details(partial_text="".join(pieces), tokens_out=generation.tokens_out) from e
        started = generation.started
        answer: dict[str, object] = {
            "request_id": generation.id,
            "model": self._worker.settings.model_id,
            "worker_id": self._worker.settings.worker_id,
            "text": "".join(pieces),
            "tokens_generated": generation.tokens_out,
            "token_ids": ids,
            "prompt_tokens": started.prompt_tokens if started else 0,
            "cached_tokens": started.cached_tokens if started else 0,
            "seed": generation.seed,
            "stop_reason": last.stop_reason if last else generation.outcome,
            "prompt_time_ms": round(last.prompt_ms, 1) if last else None,
            "decode_time_ms": round(last.decode_ms, 1) if last else None,
            "duration_ms": round((time.perf_counter() - began) * 1000, 1),
        }
        if logprobs:
            answer["logprobs"] = logprobs
        if last is not None and last.stop_sequence is not None:
            answer["stop_sequence"] = last.stop_sequence
        return answer


def new_request_id() -> str:
    """Return an id for a request whose client gave none."""
    return f"req-{uuid.uuid4()}"


def _digest(text: str) -> str:
    """Return what tells prompts apart: workers of one continuation class make the same tokens of the same text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _event(event: Started | TokenOut | Finished, generation: Generation, settings: WorkerSettings) -> events.Event:
    if isinstance(event, TokenOut):
        return events.token(event.text, event.index, event.token_id, event.logprobs)
    if isinstance(event, Finished):
        return _end(event, generation.started.prompt_tokens if generation.started else 0)
    return events.started(
        generation.id,
        settings.model_id,
        seed=cast("int", generation.seed),
        prompt_tokens=event.prompt_tokens,
        cached_tokens=event.cached_tokens,
        worker_id=settings.worker_id,
        prompt=generation.prompt,
    )


def _end(event: Finished, prompt_tokens: int) -> events.Event:
    return events.end(
        event.tokens_out,
        event.stop_reason,
        prompt_ms=event.prompt_ms,
        decode_ms=event.decode_ms,
        prompt_tokens=prompt_tokens,
        stop_sequence=event.stop_sequence,
    )


class _Closing:
    """A response that closes its generation in any case, also when not one byte of it was read."""

    def __init__(self, response: ASGIApp, generation: Generation) -> None:
        self._response, self._generation = response, generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._response(scope, receive, send)
        finally:
            await self._generation.aclose()
