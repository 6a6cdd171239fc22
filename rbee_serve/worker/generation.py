"""One request at the engine: deadline, cancellation, figures. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from typing import cast

from rbee_serve.contract.api import StopReason
from rbee_serve.contract.errors import MalformedResponse, RbeeError, RequestCanceled, RequestTimeout
from rbee_serve.worker.engine.protocol import EngineEvent, Finished, GenerateRequest, Queued, Started, TokenOut
from rbee_serve.worker.state import Worker

logger = logging.getLogger(__name__)


class Generation:
    """A request from submission to its last event. ``aclose`` in any case: it frees the slot."""

    def __init__(self, worker: Worker, request: GenerateRequest, deadline: float | None, request_id: str) -> None:
        """``deadline``: seconds since the epoch (of ``worker.wall``), None: no limit; ``request_id``: as the client knows it."""
        self.id = request_id
        self.engine_name = request.request_id
        self.seed = request.params.seed
        self.started: Started | None = None
        self.tokens_out = len(request.generated_ids)
        self.outcome: str | None = None
        self.prompt: dict[str, str] = {}  # what ``started`` says of a prompt that was made from messages
        self._worker = worker
        self._deadline = None
        if deadline is not None:
            self._deadline = asyncio.get_running_loop().time() + deadline - worker.wall()
        self._events = cast("AsyncGenerator[Sequence[EngineEvent], None]", worker.engine.generate(request))
        self._ahead: Sequence[EngineEvent] = ()  # came while the request was opened
        self._ending: RbeeError | None = None
        self._timer: asyncio.Timeout | None = None
        self._began = time.perf_counter()
        self._first_token: float | None = None
        self._last_token = self._began
        self._closed = False
        worker.add(self)  # from the admission on, without a pause between: a drain that begins now waits for it

    async def open(self, *, started: bool) -> None:
        """Return when the engine has taken the request, and with ``started`` when it has a slot.

        Raises what the engine raises (AllSlotsBusy, PromptTooLong, ...), RequestTimeout, or why it was ended meanwhile.
        """
        batch = await self._next()
        while started and isinstance(batch[-1], Queued):
            batch = await self._next()
        if not isinstance(batch[0], Queued | Started):
            raise MalformedResponse(f"the engine began with {type(batch[0]).__name__}")
        for event in batch:
            if isinstance(event, Started):
                self._note(event)
        self._ahead = [event for event in batch if not isinstance(event, Queued | Started)]

    def _note(self, event: Started) -> None:
        self.started = event
        self._worker.changed.set()
        metrics = self._worker.metrics
        metrics.tokens_in.inc(event.prompt_tokens)
        metrics.tokens_cached.inc(event.cached_tokens)
        if event.cached_tokens and event.cached_from:
            metrics.prefix_hits.labels(source=event.cached_from).inc()

    async def events(self) -> AsyncIterator[list[Started | TokenOut | Finished]]:
        """Yield Started, tokens and, last, Finished: also when the client cancelled, then perhaps alone. Each time all that has
        come since.

        Raises RequestTimeout, WorkerDraining, WorkerCrashed, InferenceFailed.
        """
        if self.started is not None:
            yield [self.started]
        while self.outcome is None:
            try:
                batch = await self._next()
            except RequestCanceled:
                batch = [self._cancelled()]
            if events := self._counted(batch):
                yield events

    def _counted(self, batch: Sequence[EngineEvent]) -> list[Started | TokenOut | Finished]:
        """Return the events that others get to see, after taking their figures."""
        events: list[Started | TokenOut | Finished] = []
        tokens = 0
        for event in batch:
            if isinstance(event, TokenOut):
                tokens += 1
            elif isinstance(event, Finished):
                self.outcome = event.stop_reason
            elif isinstance(event, Started):
                self._note(event)
            else:
                continue
            events.append(event)
        if tokens:
            metrics = self._worker.metrics
            self._last_token = time.perf_counter()
            if self._first_token is None:
                self._first_token = self._last_token
                metrics.first_token_ms.observe(self._ms(self._began, self._first_token))
            self.tokens_out += tokens
            metrics.tokens_generated.inc(tokens)
        return events

    @property
    def is_ending(self) -> bool:
        """Whether it was ended from outside."""
        return self._ending is not None

    def end(self, why: RbeeError) -> None:
        """End it from outside: whoever waits for the engine gets ``why`` at once. Later calls change nothing."""
        if self._ending is None:
            self._ending = why
            if self._timer is not None:
                with suppress(RuntimeError):  # the deadline has just passed: the next wait looks at _ending
                    self._timer.reschedule(0.0)

    async def aclose(self) -> None:
        """Cancel what still runs, free the slot, count. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._events.aclose()
        finally:
            self._worker.remove(self)
            metrics = self._worker.metrics
            outcome, lasted_ms = self.outcome or RequestCanceled.code, self._ms(self._began, time.perf_counter())
            metrics.requests.labels(outcome=outcome).inc()
            facts: dict[str, object] = {"request_id": self.id, "outcome": outcome, "tokens_out": self.tokens_out}
            if self.started is not None:
                metrics.duration_ms.observe(lasted_ms)
                facts |= {"prompt_tokens": self.started.prompt_tokens, "cached_tokens": self.started.cached_tokens}
            logger.info("request ended", extra=facts | {"duration_ms": round(lasted_ms, 1)})

    async def _next(self) -> Sequence[EngineEvent]:
        if self._ending is not None:
            raise self._failed(self._ending)
        # A timeout interrupts a wait; an event that is there already would slip past it.
        if self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline:
            raise self._failed(self._late())
        if self._ahead:
            batch, self._ahead = self._ahead, ()
            return batch
        self._timer = asyncio.timeout_at(self._deadline)
        try:
            async with self._timer:
                return await anext(self._events)
        except TimeoutError as e:
            raise self._failed(self._ending or self._late()) from e
        except RbeeError as e:
            raise self._failed(e) from None
        except StopAsyncIteration as e:
            raise self._failed(MalformedResponse("the engine ended the stream without a last event")) from e
        finally:
            self._timer = None

    def _failed(self, error: RbeeError) -> RbeeError:
        self.outcome = error.code
        return error

    def _late(self) -> RbeeError:
        return RequestTimeout(
            f"the deadline of the request has passed after {self.tokens_out} tokens",
            hint="ask for fewer tokens or a longer timeout_s",
            tokens_out=self.tokens_out,
        )

    def _cancelled(self) -> Finished:
        first = self._first_token or time.perf_counter()
        return Finished(
            StopReason.CANCELLED, self.tokens_out, self._ms(self._began, first), self._ms(first, max(first, self._last_token))
        )

    @staticmethod
    def _ms(since: float, until: float) -> float:
        return (until - since) * 1000
