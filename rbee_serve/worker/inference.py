"""One request at the worker: from validated message to events, with its deadline, its slot and its end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from rbee_serve.contract import events
from rbee_serve.contract.api import InferenceRequest, StopReason
from rbee_serve.contract.errors import InvalidRequest, RbeeError, RequestCanceled, RequestTimeout, WorkerCrashed
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker import chat
from rbee_serve.worker.engine.protocol import Engine, EngineEvent, Finished, GenerateRequest, Started, TokenOut
from rbee_serve.worker.metrics import WorkerMetrics
from rbee_serve.worker.state import WorkerStatus

logger = logging.getLogger(__name__)


@dataclass
class Running:
    """A request that DELETE can reach."""

    request_id: str
    cancelled: asyncio.Event


class Inference:
    """Turns requests into streams of contract events; remembers the running ones by id."""

    def __init__(self, settings: WorkerSettings, engine: Engine, status: WorkerStatus, metrics: WorkerMetrics) -> None:
        self._settings, self._engine, self._status, self._metrics = settings, engine, status, metrics
        self._running: dict[str, Running] = {}

    @property
    def running(self) -> int:
        """Requests that have been accepted and not ended."""
        return len(self._running)

    def cancel(self, request_id: str) -> None:
        """End a request; unknown and ended ids are fine (SPEC S-63)."""
        if running := self._running.get(request_id):
            running.cancelled.set()

    def prepare(self, wanted: InferenceRequest, request_id: str) -> GenerateRequest:
        """Check what only this worker can check and build the engine's request.

        Raises InvalidRequest (with both numbers) and what refuses new work now.
        """
        self._status.refuse_unless_ready()
        limit = self._settings.max_tokens_limit
        if wanted.max_tokens > limit:
            raise InvalidRequest(
                f"max_tokens: {wanted.max_tokens} asked for, this worker gives at most {limit}", field="max_tokens", limit=limit
            )
        if request_id in self._running:
            raise InvalidRequest(f"request id {request_id} is already running", field="X-Request-Id")
        info = self._engine.info
        if info is None:
            raise WorkerCrashed("the engine has no model loaded")
        if wanted.messages is not None:
            text = chat.render(wanted.messages, template=info.chat_template, bos_token=info.bos_token, eos_token=info.eos_token)
            special, bos = True, not (info.bos_token and text.startswith(info.bos_token))
        else:
            text, special, bos = wanted.prompt or "", False, True
        params = wanted if wanted.seed is not None else wanted.model_copy(update={"seed": secrets.randbits(32)})
        ids = wanted.continue_from.generated_ids if wanted.continue_from else []
        return GenerateRequest(request_id, text, special, bos, params, list(ids))

    async def stream(self, request: GenerateRequest, deadline: float | None) -> AsyncGenerator[events.Event, None]:
        """Yield started, token*, end. ``deadline``: seconds since the epoch.

        Raises RbeeErrors at any point: before the first event they are the answer's status, later an error event.
        Closing the generator cancels the request.
        """
        running = self._running[request.request_id] = Running(request.request_id, asyncio.Event())
        began, outcome = time.monotonic(), "cancelled"
        try:
            source = self._engine.generate(request)
            async with aclosing(_interruptible(source, running.cancelled, deadline)) as produced:
                async for event in produced:
                    if isinstance(event, Started):
                        self._status.notice()
                        self._metrics.tokens_in.inc(event.prompt_tokens)
                        self._metrics.tokens_cached.inc(event.cached_tokens)
                        prompt_tokens = event.prompt_tokens
                        yield events.started(
                            request.request_id,
                            self._settings.model_id,
                            seed=request.params.seed or 0,
                            prompt_tokens=event.prompt_tokens,
                            cached_tokens=event.cached_tokens,
                            worker_id=self._settings.worker_id,
                        )
                    elif isinstance(event, TokenOut):
                        self._metrics.tokens_out.inc()
                        yield events.token(event.text, event.index, event.token_id)
                    else:
                        outcome = event.stop_reason.lower()
                        yield events.end(
                            event.tokens_out,
                            event.stop_reason,
                            prompt_ms=event.prompt_ms,
                            decode_ms=event.decode_ms,
                            prompt_tokens=prompt_tokens,
                        )
        except RbeeError as e:
            outcome = e.code.lower()
            raise
        finally:
            self._running.pop(request.request_id, None)
            self._metrics.requests.labels(outcome=outcome).inc()
            self._metrics.duration.observe((time.monotonic() - began) * 1000)
            self._status.notice()
            logger.info("request %s ended: %s after %.2f s", request.request_id, outcome, time.monotonic() - began)

    async def collect(self, stream: AsyncGenerator[events.Event, None]) -> dict[str, Any]:
        """Read a stream to its end and return the one JSON of ``stream: false``."""
        text: list[str] = []
        ids: list[int] = []
        answer: dict[str, Any] = {}
        async with aclosing(stream) as produced:
            async for event in produced:
                if event["type"] == "started":
                    answer |= {k: event[k] for k in ("request_id", "model", "seed", "cached_tokens", "worker_id")}
                elif event["type"] == "token":
                    text.append(event["t"])
                    ids.append(event["id"])
                else:
                    answer |= {
                        k: event[k] for k in ("tokens_out", "prompt_tokens", "stop_reason", "prompt_time_ms", "decode_time_ms")
                    }
        if answer.get("stop_reason") == StopReason.CANCELLED:
            raise RequestCanceled("the request was cancelled", partial_text="".join(text), tokens_out=len(ids))
        duration = answer.get("prompt_time_ms", 0.0) + answer.get("decode_time_ms", 0.0)
        return answer | {"text": "".join(text), "token_ids": ids, "tokens_generated": len(ids), "duration_ms": round(duration, 1)}


async def _interruptible(source: Any, cancelled: asyncio.Event, deadline: float | None) -> AsyncGenerator[EngineEvent, None]:
    """Pass events on until DELETE or the deadline: then close the source, which frees the slot.

    DELETE ends the stream in an orderly way, with a Finished that says so; the deadline raises RequestTimeout.
    """
    stop = asyncio.ensure_future(cancelled.wait())
    count = 0
    began = time.monotonic()
    try:
        async with aclosing(source) as produced:
            while True:
                step = asyncio.ensure_future(anext(produced, None))
                timeout = None if deadline is None else max(0.0, deadline - time.time())
                done, _ = await asyncio.wait((step, stop), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if step not in done:
                    step.cancel()
                    await asyncio.wait((step,))
                    if stop in done:
                        yield Finished(StopReason.CANCELLED, count, 0.0, (time.monotonic() - began) * 1000)
                        return
                    raise RequestTimeout("the request's deadline passed", hint="send a larger timeout_s", tokens_out=count)
                event = step.result()
                if event is None:
                    return
                count += isinstance(event, TokenOut)
                yield event
    finally:
        stop.cancel()
