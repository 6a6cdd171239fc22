"""One request from acceptance to its last event, over as many workers as it takes (SPEC X-14).

Before the first token another worker takes over silently. After it the next one is sent the token ids so far and goes
on: no token is lost, none comes twice, the numbering has no gap. The seed is fixed here, so that both draw the same.
A request that finds no free slot waits in the queue, also a running one that has lost its worker.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any, Literal

import orjson

from rbee_serve.contract.api import CORRELATION_HEADER, DEADLINE_HEADER, REQUEST_ID_HEADER, InferenceRequest, StopReason
from rbee_serve.contract.errors import (
    AllSlotsBusy,
    MalformedResponse,
    RbeeError,
    RequestError,
    RequestTimeout,
    WorkerCrashed,
    WorkerDraining,
    WorkerLoading,
)
from rbee_serve.contract.events import Event, encode, end, error
from rbee_serve.queen.hold import Hold
from rbee_serve.queen.http_client import WokenError
from rbee_serve.queen.moves import Moves
from rbee_serve.queen.parts import Parts
from rbee_serve.queen.placement import Choice, continues_exactly, pick
from rbee_serve.queen.prefix import Expectation
from rbee_serve.queen.queue import Ticket
from rbee_serve.queen.registry import Worker
from rbee_serve.queen.search import LOOK_S, Search, late
from rbee_serve.queen.upstream import Attempt, Batch, TryFailedError, error_of

#: Codes of an ``error`` event with which a worker gives a running stream back: another worker can go on with it.
_HANDED_BACK = frozenset({WorkerCrashed.code, WorkerDraining.code})
#: Routing and transport fields that a worker has no use for.
_QUEENS_OWN = frozenset(
    {"model", "node", "backend", "device", "worker_id", "labels", "priority", "failover"}
    | {"stream", "continue_from", "timeout_s", "queue_timeout_s"}
)

Api = Literal["native", "openai", "ollama", "anthropic"]


class CancelledByRequestError(Exception):
    """``Stream.cancel`` was called."""


class Stream:
    """The client's one stream. Read ``events()`` once; ``cancel()`` from anywhere; ``aclose()`` always."""

    def __init__(
        self,
        parts: Parts,
        request: InferenceRequest,
        model: str,
        correlation_id: str | None,
        deadline: float | None,
        key: str,
    ) -> None:
        self.id = str(uuid.uuid4())
        self.request = request
        self.model = model  # id of the model that answers
        self.correlation_id = correlation_id
        self.key = key
        self.seed = request.seed if request.seed is not None else secrets.randbits(32)
        self.ids: list[int] = list(request.continue_from.generated_ids) if request.continue_from else []
        self.prompt_tokens = 0
        self.cached_tokens: int | None = None  # of the prompt, at the first worker; None: not known (yet)
        self.placement: str | None = None  # why that worker was chosen; None: none was yet
        self.outcome = "disconnected"
        self.stop_sequence: str | None = None  # the one of the client's that has come
        self.error: RbeeError | None = None  # why the stream ended, if it failed
        self.aborted: RbeeError | None = None  # why it was ended from outside, if it was
        self.on_close: list[Callable[[], None]] = []  # called once, when the stream is closed
        self.on_assigned: Callable[[Worker], None] = lambda _: None  # called whenever a worker has taken it

        self._parts = parts
        self._given = len(self.ids)  # ids that the client brought itself
        self._started = False
        self._ended = False
        self._cancelled = False
        self._complete = False  # all tokens have come, and the worker went away before it said why that was the end
        self._leaving = False  # the worker drains: go elsewhere when that is possible
        self._closed = False
        self._began = time.perf_counter()
        self._body = request.model_dump(mode="json", exclude=set(_QUEENS_OWN), exclude_none=True) | {"seed": self.seed}

        limit = request.timeout_s if request.timeout_s is not None else parts.request_timeout_s
        remaining = limit if deadline is None else min(limit, deadline - time.time())
        self._deadline = asyncio.get_running_loop().time() + remaining
        # Only a deadline that somebody asked for is told to the worker: the default one is kept here, where no
        # difference between two machines' clocks can cut it short (SPEC E-31).
        asked = deadline is not None or request.timeout_s is not None
        self._deadline_header = f"{time.time() + remaining:.3f}" if asked else None

        self._prompt = Expectation(parts.prefixes, request)
        self._hold = Hold(parts, model, key, self._deadline)
        self._search = Search(parts, request, model, key, self._deadline, self._hold, self._prompt)
        self._moves = Moves(parts.metrics, self.id, self.ids, self._given)
        # Of the prompt that a worker made from messages, as its ``started`` told it last.
        self._prompt_digest: str | None = None
        given_at = request.continue_from.rendered_at if request.continue_from else None
        self._rendered_at = given_at.isoformat() if given_at is not None else None
        # Whom the stream has lost: (worker, why), until another one has started. None while it looks for its first one.
        self._lost_to: tuple[Worker, RbeeError] | None = None
        self._placing: asyncio.Task[None] | None = asyncio.ensure_future(self._place(None))

    @property
    def worker(self) -> Worker | None:
        """The worker that has the stream, or had it last."""
        return self._hold.worker

    @property
    def queued_ms(self) -> float:
        """How long the request had to wait for slots."""
        return self._search.queued_ms

    @property
    def tokens_out(self) -> int:
        """Tokens so far; those that the client brought itself count, as they do in ``max_tokens`` and in the numbering."""
        return len(self.ids)

    @property
    def tokens_made(self) -> int:
        """Tokens so far that workers have made for this request."""
        return len(self.ids) - self._given

    @property
    def lasted_ms(self) -> float:
        """Time since the request was accepted."""
        return round((time.perf_counter() - self._began) * 1000, 1)

    async def opened(self, patience_s: float | None) -> None:
        """Return when a worker has taken the request; with ``patience_s`` (seconds) also when it waits or that is over.

        Raises why nobody has taken it.
        """
        placing = self._placing
        if placing is None:
            return
        if patience_s is None:
            await asyncio.wait((placing,))
        else:
            await asyncio.wait((placing, self._search.waits()), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if placing.done():
            self._placed(placing)

    def _placed(self, placing: asyncio.Task[None]) -> None:
        self._placing = None
        if placing.cancelled():
            raise CancelledByRequestError
        placing.result()

    # --- a worker ---------------------------------------------------------------------------------------------------

    async def _place(self, failure: RbeeError | None) -> None:
        """Open the stream at a worker, trying others until one takes it; ``failure`` is raised when none does."""
        previous = self._lost_to[0] if self._lost_to is not None else None
        wanted = self._search.wanted(previous if self.ids else None)
        tried = self._search.tried
        ticket: Ticket | None = None
        while True:
            if asyncio.get_running_loop().time() >= self._deadline:
                raise late()
            moving = self._lost_to is not None
            choice, ticket = await self._search.find(wanted, ticket, failure, moving=moving, waits=not self._complete)
            attempt = self._hold.take(choice.worker)
            try:
                await self._open(attempt)
            except TryFailedError as e:
                self._hold.give_up(e)
                if not isinstance(e.error, AllSlotsBusy | WorkerLoading):
                    tried.add(choice.worker)
                    failure = failure or e.error
                self._moves.refused(choice.worker, e.error)
            except RequestTimeout:
                raise
            except RequestError as e:
                # Another worker has accepted this very request, so it is this one that can not (a smaller context, say).
                if previous is None:
                    raise
                self._hold.give_up(TryFailedError(e, broken=False))
                tried.add(choice.worker)
                self._moves.refused(choice.worker, e)
            else:
                self._taken(choice, attempt.first)
                return

    async def _open(self, attempt: Attempt) -> None:
        """Open the stream at a worker. One that has not been upgraded yet refuses the time of the prompt, and is asked to go on
        without it: its ``started`` has no digest, so nobody takes that for exact."""
        try:
            await attempt.open(self._encoded(), self._headers())
        except RequestError as e:
            if self._rendered_at is None or e.details.get("field") != "continue_from.rendered_at":
                raise
            await attempt.open(self._encoded(timed=False), self._headers())

    def _taken(self, choice: Choice, first: Batch) -> None:
        metrics = self._parts.metrics
        metrics.dispatches.labels(result="ok").inc()
        if self._lost_to is None:
            self.placement = choice.reason
            metrics.queue_wait_ms.observe(self.queued_ms)
        self._prompt.sent(choice.worker)
        self.on_assigned(choice.worker)
        for _, event in first:
            self._note_started(event)

    def _headers(self) -> dict[str, str]:
        # One name at most of this request at any worker: the one that broke may have it still.
        tries = self._hold.tries
        headers = {REQUEST_ID_HEADER: self.id if tries == 1 else f"{self.id}.{tries - 1}"}
        if self.correlation_id is not None:
            headers[CORRELATION_HEADER] = self.correlation_id
        if self._deadline_header is not None:
            headers[DEADLINE_HEADER] = self._deadline_header
        return headers

    def _encoded(self, *, timed: bool = True) -> bytes:
        body: dict[str, Any] = self._body | {"stream": True}
        known = {"generated_ids": self.ids, "rendered_at": self._rendered_at if timed else None}
        if told := {name: value for name, value in known.items() if value}:
            body["continue_from"] = told
        if self._complete:
            body["max_tokens"] = len(self.ids)  # also where a larger context would take more
        return orjson.dumps(body)

    # --- events -----------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[Batch]:
        """Yield batches of (frame, event): ``queued`` and ``loading`` while it waits, ``started``, ``token``*, perhaps
        ``resumed``, and last ``end`` or ``error``.

        Never raises RbeeError: a failure is the last event.
        """
        try:
            while not self._ended:
                if self._placing is not None:
                    async for waiting in self._while_placing(self._placing):
                        yield [waiting]
                    continue
                if self._cancelled:
                    raise CancelledByRequestError
                if self._leaving:
                    await self._hand_over()
                passed, failed = await self._read()
                if passed:
                    yield passed
                if failed is not None and not self._ended:
                    self._fail_over(failed)
        except CancelledByRequestError:
            if self.aborted is not None:
                self._failed(self.aborted)
                yield [_pair(error(self.aborted, self.correlation_id) | {"tokens_out": self.tokens_out})]
                return
            yield [self._end_here(StopReason.CANCELLED)]
        except RbeeError as e:
            if self._complete:  # and nobody says which end it was
                yield [self._end_here(StopReason.MAX_TOKENS)]
                return
            self._failed(e)
            yield [_pair(error(e, self.correlation_id) | {"tokens_out": self.tokens_out})]
        finally:
            await self.aclose()

    async def _while_placing(self, placing: asyncio.Task[None]) -> AsyncGenerator[tuple[bytes, Event]]:
        """Yield what there is to tell until a worker has taken the stream; raises why none has."""
        while not placing.done():
            if (event := self._search.news()) is not None:
                yield _pair(event)
            await asyncio.wait((placing,), timeout=LOOK_S)
        self._placed(placing)

    async def _read(self) -> tuple[Batch, TryFailedError | None]:
        """Return what the client gets next, perhaps nothing, and why the worker is to be left, if it is."""
        attempt = self._hold.attempt
        assert attempt is not None  # noqa: S101 -- a worker has taken it
        try:
            batch = await attempt.batch()
        except WokenError:
            return [], None
        except TryFailedError as e:
            return [], e
        if batch is None:
            return [], TryFailedError(self._broke_off(), broken=True)
        return self._accept(batch)

    def _accept(self, batch: Batch) -> tuple[Batch, TryFailedError | None]:
        passed: Batch = []
        failed: TryFailedError | None = None
        ids = self.ids
        before = len(ids)
        for pair in batch:
            event = pair[1]
            kind = event["type"]
            if kind == "token":
                token_id = event.get("id")
                if event.get("i") != len(ids) or not isinstance(token_id, int):
                    failed = self._malformed(f"sent token {event.get('i')!r} where {len(ids)} was due")
                    break
                ids.append(token_id)
                passed.append(pair)
            elif kind == "started":
                self._note_started(event)
                if not self._started:
                    self._started = True
                    facts = {"request_id": self.id, "placement": self.placement, "queued_ms": round(self.queued_ms)}
                    passed.append(_pair(event | facts))
                if (resumed := self._resumed(event)) is not None:
                    passed.append(_pair(resumed))
            elif kind == "end":
                self._ended, self.outcome = True, str(event.get("stop_reason", "EOS"))
                self.stop_sequence = event.get("stop_sequence")
                passed.append(_pair(event | {"tokens_out": self.tokens_out}))
                break
            elif kind == "error":
                cause = error_of(500, orjson.dumps({"error": event}), self._worker_id)
                if cause.code in _HANDED_BACK or isinstance(cause, MalformedResponse) or self._complete:
                    failed = TryFailedError(cause, broken=cause.code != WorkerDraining.code)
                    break
                self._failed(cause)
                passed.append(_pair(event | {"tokens_out": self.tokens_out}))
                break
            else:
                passed.append(pair)
        if made := len(ids) - before:
            self._made(made, first=before == self._given)
        return passed, failed

    def _made(self, tokens: int, *, first: bool) -> None:
        metrics = self._parts.metrics
        if first:
            metrics.first_token_ms.observe((time.perf_counter() - self._began) * 1000)
        metrics.tokens_relayed.inc(tokens)
        if self._search.tried:  # whoever failed before this token may be well again before the next failure
            self._search.tried.clear()

    def _note_started(self, event: Event) -> None:
        if event.get("type") != "started" or self.cached_tokens is not None or self.worker is None:
            return
        self.prompt_tokens = event.get("prompt_tokens", 0)
        self.cached_tokens = cached = event.get("cached_tokens", 0)
        hit = self._prompt.told(self.worker, cached)
        if hit is not None:
            self._parts.metrics.prefix.labels(result="hit" if hit else "miss").inc()

    # --- fail-over --------------------------------------------------------------------------------------------------

    def _fail_over(self, failed: TryFailedError) -> None:
        """Leave the worker and look for another; one that died between its last token and the end has left nothing to go on
        with, and another is asked which end that was. Raises the failure itself where nobody else may go on.
        """
        before = self.worker
        assert before is not None  # noqa: S101
        self._hold.give_up(failed)
        self._leaving = False
        context = before.record.context_tokens
        if len(self.ids) >= self.request.max_tokens or (context and self.prompt_tokens + len(self.ids) > context):
            self._complete = True  # and stays so, whatever context the next one has
        if not self._complete and self.request.failover == "off" and len(self.ids) > self._given:
            self._moves.unwanted(failed.error)
            raise failed.error
        self._search.tried.add(before)
        self._search.begin_anew()
        if self._lost_to is None:
            self._lost_to = (before, failed.error)
        else:  # it had not started: the client has heard nothing of it
            self._moves.refused(before, failed.error)
        self._placing = asyncio.ensure_future(self._place(failed.error))

    def _resumed(self, started: Event) -> Event | None:
        """A worker has started: where it has taken the stream over, return what the client is told, if it has tokens already."""
        same_prompt = not self._differs(started)
        self._prompt_digest = started.get("prompt_digest")
        self._rendered_at = started.get("rendered_at", self._rendered_at)
        if self._lost_to is None or self.worker is None:
            return None
        before, cause = self._lost_to
        self._lost_to = None
        if self._complete:
            return None
        return self._moves.moved(before, self.worker, cause, self._length, same_prompt=same_prompt)

    def _differs(self, started: Event) -> bool:
        """Whether a worker has another prompt than the one before, or does not say. It makes one of messages alone."""
        digest = started.get("prompt_digest")
        return self.request.messages is not None and (digest is None or digest != self._prompt_digest)

    @property
    def _length(self) -> int:
        """Tokens that the context will hold at the end, at most."""
        return self.prompt_tokens + self.request.max_tokens

    def hand_over(self) -> None:
        """The worker drains: go on elsewhere as soon as possible, if somebody has room and continues exactly."""
        if self.request.failover != "off" or len(self.ids) == self._given:
            self._leaving = True
            self._wake()

    async def _hand_over(self) -> None:
        """Move the running stream; the worker that drains is left only when another one has it."""
        parts, before = self._parts, self.worker
        assert before is not None  # noqa: S101
        self._leaving = False
        if len(self.ids) >= self.request.max_tokens or self.request.worker_id is not None:
            return
        wanted = self._search.wanted(before if self.ids else None, exact=bool(self.ids))
        choice = pick(parts.registry, wanted, parts.clock(), exclude={before})
        if choice is None or choice.reason == "probe":
            return
        if self.ids and not continues_exactly(before, choice.worker, self._length):
            return  # it may end where it is; if the time does not suffice, an approximate continuation comes then
        self._hold.acquire(choice.worker)
        new = self._hold.new_attempt(choice.worker)
        try:
            await new.open(self._encoded(), self._headers())
            if self.ids and any(event["type"] == "started" and self._differs(event) for _, event in new.first):
                raise TryFailedError(RbeeError(f"worker {choice.worker.id} makes another prompt of the messages"), broken=False)
        except BaseException as e:
            new.close()
            self._hold.release(choice.worker, 0.0)
            if not isinstance(e, TryFailedError | RbeeError):
                raise
            if isinstance(e, TryFailedError) and e.broken:
                parts.registry.mark_failed(choice.worker, parts.clock())
            self._moves.stays(e)
            return
        self._hold.exchange(new)
        self.on_assigned(choice.worker)
        parts.metrics.dispatches.labels(result="ok").inc()
        if self._lost_to is None:
            self._lost_to = (before, WorkerDraining(f"worker {before.id} drains", worker_id=before.id))

    # --- the end ----------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End the stream with ``stop_reason`` CANCELLED; the worker's slot is freed by closing its connection."""
        self._cancelled = True
        if self._placing is not None:
            self._placing.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._placing is None and self._hold.attempt is not None:
            self._hold.attempt.wake()

    def abort(self, cause: RbeeError) -> None:
        """End the stream with an ``error`` event."""
        self.aborted = cause
        self.cancel()

    async def aclose(self) -> None:
        """Close the worker's stream and settle the books. Idempotent; must be called also when nothing was read."""
        if self._closed:
            return
        self._closed = True
        for called in self.on_close:
            called()
        placing, self._placing = self._placing, None
        if placing is not None and not placing.done():
            placing.cancel()
            await asyncio.wait((placing,))
        if placing is not None and not placing.cancelled():
            placing.exception()  # seen
        self._hold.leave()

    def _end_here(self, reason: StopReason) -> tuple[bytes, Event]:
        self._ended, self.outcome = True, reason.value
        return _pair(end(self.tokens_out, self.outcome, prompt_ms=0, decode_ms=0, prompt_tokens=self.prompt_tokens))

    def _failed(self, cause: RbeeError) -> None:
        self._ended, self.outcome, self.error = True, cause.code, cause
        if self.request.stream:  # else it is raised, and counted where it is answered
            self._parts.metrics.errors.labels(code=cause.code).inc()
        if self._lost_to is not None:
            self._moves.impossible(*self._lost_to)

    @property
    def _worker_id(self) -> str:
        return self.worker.id if self.worker else "?"

    def _broke_off(self) -> WorkerCrashed:
        what = f"worker {self._worker_id} closed the stream before its end"
        return WorkerCrashed(what, worker_id=self._worker_id, tokens_out=len(self.ids))

    def _malformed(self, what: str) -> TryFailedError:
        return TryFailedError(MalformedResponse(f"worker {self._worker_id} {what}", worker_id=self._worker_id), broken=True)


def _pair(event: Event) -> tuple[bytes, Event]:
    return encode(event), event
