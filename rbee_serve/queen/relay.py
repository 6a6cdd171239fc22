"""One request from acceptance to its last event, over as many workers as it takes (SPEC X-14).

Before the first token another worker takes over silently. After it the next one is sent the token ids so far and goes
on: no token is lost, none comes twice, the numbering has no gap. The seed is fixed here, so that both draw the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import orjson

from rbee_serve.contract.api import (
    CORRELATION_HEADER,
    DEADLINE_HEADER,
    REQUEST_ID_HEADER,
    InferenceRequest,
    StopReason,
    WorkerState,
)
from rbee_serve.contract.errors import (
    AllSlotsBusy,
    MalformedResponse,
    NoWorkerAvailable,
    RbeeError,
    RequestCanceled,
    RequestError,
    RequestTimeout,
    WorkerCrashed,
    WorkerDraining,
    WorkerLoading,
)
from rbee_serve.contract.events import Event, end, error
from rbee_serve.queen.metrics import Metrics
from rbee_serve.queen.placement import RETRY_AFTER_S, Wanted, choose, continues_exactly
from rbee_serve.queen.registry import Registry, Worker
from rbee_serve.queen.upstream import Attempt, Batch, CancelledByRequestError, Limits, TryFailedError, error_of

logger = logging.getLogger(__name__)

#: Codes of an ``error`` event with which a worker gives a running stream back: another worker can go on with it.
_HANDED_BACK = frozenset({WorkerCrashed.code, WorkerDraining.code})
#: Routing and transport fields that a worker has no use for.
_QUEENS_OWN = frozenset(
    {"model", "node", "backend", "device", "worker_id", "labels", "priority", "failover", "stream", "continue_from", "timeout_s"}
)

Api = Literal["native", "openai", "ollama", "anthropic"]


@dataclass(slots=True)
class Relay:
    """What all streams share; ``clock`` is the registry's monotonic clock."""

    registry: Registry
    client: httpx.AsyncClient
    token: str | None
    limits: Limits
    metrics: Metrics
    request_timeout_s: float
    clock: Callable[[], float]
    streams: dict[str, Stream] = field(default_factory=dict)  # running ones, by request id
    quiet: asyncio.Event = field(default_factory=asyncio.Event)  # set when the last of them has ended

    async def open(
        self, request: InferenceRequest, *, api: Api, correlation_id: str | None, deadline: float | None = None
    ) -> Stream:
        """Find a worker that takes the request and return its stream; close it with ``aclose`` in any case.

        ``deadline``: seconds since the epoch, from the client; a ``timeout_s`` beside it can only shorten it. Raises what
        ``placement.choose`` raises, the worker's own 4xx, RequestTimeout, or the last worker's failure.
        """
        stream = Stream(self, request, api, correlation_id, deadline)
        try:
            await stream.next_worker()
        except RbeeError as e:
            stream.outcome = e.code
            await stream.aclose()
            raise
        except CancelledByRequestError as e:
            stream.outcome = StopReason.CANCELLED.value
            await stream.aclose()
            raise RequestCanceled("the request was cancelled", request_id=stream.id) from e
        except BaseException:
            await stream.aclose()
            raise
        return stream


class Stream:
    """The client's one stream. Read ``events()`` once; ``cancel()`` from anywhere; ``aclose()`` always."""

    def __init__(
        self, relay: Relay, request: InferenceRequest, api: Api, correlation_id: str | None, deadline: float | None
    ) -> None:
        self.id = str(uuid.uuid4())
        self.request = request
        self.correlation_id = correlation_id
        self.seed = request.seed if request.seed is not None else secrets.randbits(32)
        self.ids: list[int] = list(request.continue_from.generated_ids) if request.continue_from else []
        self.prompt_tokens = 0
        self.outcome = "disconnected"
        self.error: RbeeError | None = None  # why the stream ended, if it failed
        self.worker: Worker | None = None
        self.on_close: list[Callable[[], None]] = []  # called once, when the stream is closed

        self._relay = relay
        self._api = api
        self._attempt: Attempt | None = None
        self._tried: set[Worker] = set()
        self._given = len(self.ids)  # ids that the client brought itself
        self._started = False
        self._ended = False
        self._cancelled = False
        self._aborted: RbeeError | None = None
        self._closed = False
        self._began = time.perf_counter()
        self._body = request.model_dump(mode="json", exclude=set(_QUEENS_OWN), exclude_none=True) | {"seed": self.seed}

        limit = request.timeout_s if request.timeout_s is not None else relay.request_timeout_s
        remaining = limit if deadline is None else min(limit, deadline - time.time())
        self._deadline = asyncio.get_running_loop().time() + remaining
        # Only a deadline that somebody asked for is told to the worker: the default one is kept here, where no
        # difference between two machines' clocks can cut it short (SPEC E-31).
        asked = deadline is not None or request.timeout_s is not None
        self._deadline_header = f"{time.time() + remaining:.3f}" if asked else None
        relay.metrics.connections.inc()
        relay.streams[self.id] = self
        relay.quiet.clear()

    @property
    def model(self) -> str:
        """Id of the model that answers."""
        return self.worker.record.model_id if self.worker else (self.request.model or "")

    @property
    def tokens_out(self) -> int:
        """Tokens so far; those that the client brought itself count, as they do in ``max_tokens`` and in the numbering."""
        return len(self.ids)

    # --- workers ----------------------------------------------------------------------------------------------------

    async def next_worker(self, failure: RbeeError | None = None) -> None:
        """Open the stream at a worker, trying others until one takes it; ``failure`` is raised when none does."""
        relay, r = self._relay, self.request
        previous = self.worker
        while True:
            if asyncio.get_running_loop().time() >= self._deadline:
                raise RequestTimeout("the deadline of the request has passed", hint="ask for a longer timeout_s")
            wanted = Wanted(
                model=r.model if previous is None else previous.record.model_id,
                node=r.node,
                device=r.device,
                worker_id=r.worker_id,
                continuation_class=previous.record.continuation_class if previous is not None and self.ids else None,
            )
            try:
                with relay.metrics.scheduling_ms.time():
                    worker = choose(relay.registry, wanted, relay.clock(), exclude=self._tried)
            except (NoWorkerAvailable, AllSlotsBusy) as nobody:
                if failure is None:
                    raise
                if isinstance(failure, AllSlotsBusy):
                    raise self._all_busy(failure) from nobody
                raise failure from nobody
            self._tried.add(worker)
            relay.registry.acquire(worker)
            self._attempt = Attempt(relay.client, relay.token, relay.limits, worker, self._deadline)
            self.worker = worker
            try:
                if self._cancelled:
                    raise CancelledByRequestError
                await self._attempt.open(self._encoded(), self._headers())
            except TryFailedError as e:
                await self._give_up(e)
                failure = failure or e.error
                logger.warning("worker did not take a request", extra=self._facts(worker, e.error))
                continue
            except RequestTimeout:
                raise
            except RequestError as e:
                # Another worker has accepted this very request, so it is this one that can not (a smaller context, say).
                if previous is None:
                    raise
                await self._give_up(TryFailedError(e, broken=False))
                logger.warning("worker can not go on with a stream", extra=self._facts(worker, e))
                continue
            relay.metrics.dispatches.labels(result="ok").inc()
            return

    async def _give_up(self, failed: TryFailedError) -> None:
        """Let go of the current worker and tell the registry what was learnt."""
        relay, worker = self._relay, self.worker
        assert worker is not None  # noqa: S101
        await self._leave()
        relay.metrics.dispatches.labels(result="failed" if failed.broken else "refused").inc()
        if failed.broken:
            relay.registry.mark_failed(worker, relay.clock())
        elif isinstance(failed.error, AllSlotsBusy):
            relay.registry.mark_full(worker)
        elif isinstance(failed.error, WorkerLoading):
            relay.registry.mark_state(worker, WorkerState.LOADING)
        elif isinstance(failed.error, WorkerDraining):
            relay.registry.mark_state(worker, WorkerState.DRAINING)

    async def _leave(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            self._relay.registry.release(attempt.worker)
            await attempt.aclose()

    def _headers(self) -> dict[str, str]:
        # One name at most of this request at any worker: the one that broke may have it still.
        ident = self.id if len(self._tried) == 1 else f"{self.id}.{len(self._tried) - 1}"
        headers = {REQUEST_ID_HEADER: ident}
        if self.correlation_id is not None:
            headers[CORRELATION_HEADER] = self.correlation_id
        if self._deadline_header is not None:
            headers[DEADLINE_HEADER] = self._deadline_header
        return headers

    def _encoded(self) -> bytes:
        body: dict[str, Any] = self._body | {"stream": True}
        if self.ids:
            body["continue_from"] = {"generated_ids": self.ids}
        return orjson.dumps(body)

    def _all_busy(self, last: AllSlotsBusy) -> AllSlotsBusy:
        tried = [w.record for w in self._tried]
        total = sum(w.slots_total for w in tried)
        details = last.details | {"slots_total": total, "slots_busy": total, "retry_after_s": RETRY_AFTER_S}
        return AllSlotsBusy(f"all {total} slots of {len(tried)} worker(s) are busy", hint=last.hint, **details)

    # --- events -----------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[Batch]:
        """Yield batches of (payload, event): ``started``, ``token``*, perhaps ``resumed``, and last ``end`` or ``error``.

        Never raises RbeeError: a failure is the last event. An empty batch is a ping of the worker.
        """
        try:
            while not self._ended:
                assert self._attempt is not None  # noqa: S101 -- open() came first
                failed = TryFailedError(self._lost("closed the stream before its end"), broken=True)
                try:
                    async with contextlib.aclosing(self._attempt.batches()) as batches:
                        async for batch in batches:
                            passed, handed_back = self._accept(batch)
                            if passed or not batch:
                                yield passed
                            if self._ended:
                                break
                            if handed_back is not None:
                                failed = handed_back
                                break
                except TryFailedError as e:
                    failed = e
                if not self._ended:
                    resumed = await self._fail_over(failed)
                    if resumed is not None:
                        yield [_pair(resumed)]
        except CancelledByRequestError:
            if self._aborted is not None:
                self._failed(self._aborted)
                yield [_pair(error(self._aborted, self.correlation_id) | {"tokens_out": self.tokens_out})]
                return
            self._ended, self.outcome = True, StopReason.CANCELLED.value
            yield [_pair(end(self.tokens_out, self.outcome, prompt_ms=0, decode_ms=0, prompt_tokens=self.prompt_tokens))]
        except RbeeError as e:
            self._failed(e)
            yield [_pair(error(e, self.correlation_id) | {"tokens_out": self.tokens_out})]
        finally:
            await self.aclose()

    def _accept(self, batch: Batch) -> tuple[Batch, TryFailedError | None]:
        """Return what the client gets of the batch, and why the worker is to be left, if it is."""
        passed: Batch = []
        tokens = 0
        failed: TryFailedError | None = None
        for pair in batch:
            event = pair[1]
            kind = event.get("type")
            if kind == "token":
                if event.get("i") != len(self.ids) or not isinstance(event.get("id"), int):
                    failed = self._malformed(f"sent token {event.get('i')!r} where {len(self.ids)} was due")
                    break
                if len(self.ids) == self._given:
                    self._relay.metrics.first_token_ms.observe((time.perf_counter() - self._began) * 1000)
                self.ids.append(event["id"])
                tokens += 1
                passed.append(pair)
            elif kind == "started":
                self.prompt_tokens = event.get("prompt_tokens", 0)
                if not self._started:
                    self._started = True
                    passed.append(_pair(event | {"request_id": self.id}))
            elif kind == "end":
                self._ended, self.outcome = True, str(event.get("stop_reason", "EOS"))
                passed.append(_pair(event | {"tokens_out": self.tokens_out}))
                break
            elif kind == "error":
                cause = error_of(500, orjson.dumps({"error": event}), self._worker_id)
                if cause.code in _HANDED_BACK or isinstance(cause, MalformedResponse):
                    failed = TryFailedError(cause, broken=cause.code != WorkerDraining.code)
                    break
                self._failed(cause)
                passed.append(_pair(event | {"tokens_out": self.tokens_out}))
                break
            else:
                passed.append(pair)
        if tokens:
            self._relay.metrics.tokens_relayed.inc(tokens)
        return passed, failed

    async def _fail_over(self, failed: TryFailedError) -> Event | None:
        """Move to another worker; returns the ``resumed`` event if the client has tokens already (or ``end``: it has all).

        Raises the failure itself when no other worker can go on.
        """
        before = self.worker
        assert before is not None  # noqa: S101
        await self._give_up(failed)
        if len(self.ids) >= self.request.max_tokens:
            # It died between its last token and the end: there is nothing to go on with.
            self._ended, self.outcome = True, StopReason.MAX_TOKENS.value
            return end(self.tokens_out, self.outcome, prompt_ms=0, decode_ms=0, prompt_tokens=self.prompt_tokens)
        try:
            await self.next_worker(failed.error)
        except RbeeError:
            self._relay.metrics.failovers.labels(kind="none").inc()
            logger.error("stream lost: no other worker can go on", extra=self._facts(before, failed.error))
            raise
        assert self.worker is not None  # noqa: S101
        after = self.worker
        facts = {"to_worker": after.id} | self._facts(before, failed.error)
        if len(self.ids) == self._given:
            self._relay.metrics.failovers.labels(kind="before_first_token").inc()
            logger.warning("request moved before its first token", extra=facts)
            return None
        mode = "exact" if continues_exactly(before, after, self.prompt_tokens + len(self.ids)) else "approximate"
        self._relay.metrics.failovers.labels(kind=mode).inc()
        logger.warning("stream goes on at another worker", extra=facts | {"mode": mode})
        return {"type": "resumed", "mode": mode, "worker_id": after.id, "i": len(self.ids)}

    def cancel(self) -> None:
        """End the stream with ``stop_reason`` CANCELLED; the worker's slot is freed by closing its connection."""
        self._cancelled = True
        if self._attempt is not None:
            self._attempt.cancel()

    def abort(self, cause: RbeeError) -> None:
        """End the stream with an ``error`` event."""
        self._aborted = cause
        self.cancel()

    async def aclose(self) -> None:
        """Close the worker's stream and settle the books. Idempotent; must be called also when nothing was read."""
        if self._closed:
            return
        self._closed = True
        for release in self.on_close:
            release()
        self._relay.streams.pop(self.id, None)
        if not self._relay.streams:
            self._relay.quiet.set()
        self._relay.metrics.connections.dec()
        self._relay.metrics.requests.labels(api=self._api, outcome=self.outcome).inc()
        await self._leave()

    def _failed(self, cause: RbeeError) -> None:
        self._ended, self.outcome, self.error = True, cause.code, cause
        self._relay.metrics.errors.labels(code=cause.code).inc()

    @property
    def _worker_id(self) -> str:
        return self.worker.id if self.worker else "?"

    def _lost(self, what: str) -> WorkerCrashed:
        return WorkerCrashed(f"worker {self._worker_id} {what}", worker_id=self._worker_id, tokens_out=len(self.ids))

    def _malformed(self, what: str) -> TryFailedError:
        return TryFailedError(MalformedResponse(f"worker {self._worker_id} {what}", worker_id=self._worker_id), broken=True)

    def _facts(self, worker: Worker, cause: RbeeError) -> dict[str, Any]:
        return {
            "from_worker": worker.id,
            "tokens_so_far": len(self.ids),
            "request_id": self.id,
            "code": cause.code,
            "reason": cause.message,
        }


def _pair(event: Event) -> tuple[str, dict[str, Any]]:
    return orjson.dumps(event).decode(), event
