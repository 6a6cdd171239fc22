"""One request from acceptance to its last event, over as many workers as it takes (SPEC X-14).

Before the first token another worker takes over silently. After it the next one is sent the token ids so far and goes
on: no token is lost, none comes twice, the numbering has no gap. The seed is fixed here, so that both draw the same.
A request that finds no free slot waits in the queue, also a running one that has lost its worker.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

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
    ConnectionTimeout,
    LoadingTimeout,
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
from rbee_serve.contract.events import Event, encode, end, error, queued
from rbee_serve.queen.http_client import BrokenError, Client, WokenError
from rbee_serve.queen.metrics import Metrics
from rbee_serve.queen.placement import (
    Choice,
    Wanted,
    continues_exactly,
    pick,
    resolve,
    why_nobody,
    worth_waiting_for,
)
from rbee_serve.queen.prefix import PrefixIndex, chain
from rbee_serve.queen.queue import Queue, Ticket
from rbee_serve.queen.registry import Registry, Worker
from rbee_serve.queen.upstream import Attempt, Batch, Limits, TryFailedError, error_of
from rbee_serve.queen.waking import Waker, Waking

logger = logging.getLogger(__name__)

#: Codes of an ``error`` event with which a worker gives a running stream back: another worker can go on with it.
_HANDED_BACK = frozenset({WorkerCrashed.code, WorkerDraining.code})
#: Routing and transport fields that a worker has no use for.
_QUEENS_OWN = frozenset(
    {"model", "node", "backend", "device", "worker_id", "labels", "priority", "failover"}
    | {"stream", "continue_from", "timeout_s", "queue_timeout_s"}
)
#: States of a worker that wants to be rid of its streams.
_LEAVING = frozenset({WorkerState.DRAINING, WorkerState.RETIRING})
#: How often one who waits looks what has become of the workers it waits for, seconds.
_LOOK_S = 0.5
#: How long a request that waits in the queue bears with there being nobody at all: systemd restarts a worker in seconds.
_HOPELESS_S = 5.0
#: Requests that may wait for a worker to be woken where no queue is wanted (queue_max 0).
_COLD_MAX = 64

Api = Literal["native", "openai", "ollama", "anthropic"]


class CancelledByRequestError(Exception):
    """``Stream.cancel`` was called."""


@dataclass(slots=True)
class Relay:
    """What all streams share; ``clock`` is the registry's monotonic clock, times are seconds."""

    registry: Registry
    client: Client
    token: str | None
    limits: Limits
    metrics: Metrics
    request_timeout_s: float
    clock: Callable[[], float]
    queue_max: int = 0
    queue_timeout_s: float = 60.0
    load_timeout_s: float = 300.0
    streams: dict[str, Stream] = field(default_factory=dict)  # running ones, by request id
    quiet: asyncio.Event = field(default_factory=asyncio.Event)  # set when the last of them has ended
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    queue: Queue = field(init=False)
    waker: Waker = field(init=False)

    def __post_init__(self) -> None:
        self.queue = Queue(self.registry, self.clock, self.queue_max)
        self.waker = Waker(self.registry, self.client, lambda: self.token, self.clock, self.load_timeout_s)

    async def open(
        self,
        request: InferenceRequest,
        *,
        api: Api,
        correlation_id: str | None,
        deadline: float | None = None,
        key: str = "",
        patience_s: float = 5.0,
    ) -> Stream:
        """Return the stream of a request; close it with ``aclose`` in any case.

        A streamed request returns as soon as a worker has taken it or it has to wait (in the queue, for a worker that
        loads, or longer than ``patience_s`` for an answer): what fails from then on is an event. One that is not streamed
        returns when a worker has taken it. ``deadline``: seconds since the epoch, from the client; a ``timeout_s`` beside
        it can only shorten it. ``key``: whose request it is, for fairness in the queue. Raises what ``placement.choose``
        raises, the worker's own 4xx, RequestTimeout, or the last worker's failure.
        """
        model = resolve(self.registry, request.model, request.worker_id)
        stream = Stream(self, request, model, api, correlation_id, deadline, key)
        try:
            await stream.opened(patience_s if request.stream else None)
        except RbeeError as e:
            stream.outcome = e.code
            await stream.aclose()
            raise
        except CancelledByRequestError as e:
            stream.outcome = StopReason.CANCELLED.value
            await stream.aclose()
            raise stream.aborted or RequestCanceled("the request was cancelled", request_id=stream.id) from e
        except BaseException:
            await stream.aclose()
            raise
        return stream

    def heard_of(self, worker: Worker) -> None:
        """After a beat: a worker that drains has its streams moved to others that continue them exactly, at once."""
        if worker.state in _LEAVING:
            for stream in list(self.streams.values()):
                if stream.worker is worker:
                    stream.hand_over()

    async def tell(self, worker: Worker, path: str) -> bool:
        """POST to a path of the worker; returns whether it has accepted."""
        headers = {"authorization": f"Bearer {self.token}"} if self.token is not None else {}
        until = asyncio.get_running_loop().time() + self.limits.connect_s
        try:
            async with asyncio.timeout_at(until):
                answer = await self.client.send("POST", worker.record.url.rstrip("/") + path, b"", headers, fresh=True)
            try:
                return await answer.head(until) == 202
            finally:
                answer.close()
        except (BrokenError, TimeoutError) as e:
            logger.warning("a worker could not be told", extra={"worker_id": worker.id, "path": path, "reason": str(e)})
            return False

    async def aclose(self) -> None:
        """Stop what goes on beside the streams."""
        await self.waker.aclose()
        await self.client.aclose()


class Stream:
    """The client's one stream. Read ``events()`` once; ``cancel()`` from anywhere; ``aclose()`` always."""

    def __init__(
        self,
        relay: Relay,
        request: InferenceRequest,
        model: str,
        api: Api,
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
        self.queued_ms = 0.0
        self.outcome = "disconnected"
        self.error: RbeeError | None = None  # why the stream ended, if it failed
        self.worker: Worker | None = None
        self.on_close: list[Callable[[], None]] = []  # called once, when the stream is closed

        self._relay = relay
        self._api = api
        self._attempt: Attempt | None = None
        self._held_since = 0.0
        self._attempts = 0
        self._tried: set[Worker] = set()  # failed it since the last token
        self._given = len(self.ids)  # ids that the client brought itself
        self._started = False
        self._ended = False
        self._cancelled = False
        self._leaving = False  # the worker drains: go elsewhere when that is possible
        self.aborted: RbeeError | None = None  # why it was ended from outside, if it was
        self._closed = False
        self._began = time.perf_counter()
        self._body = request.model_dump(mode="json", exclude=set(_QUEENS_OWN), exclude_none=True) | {"seed": self.seed}
        self._chain = chain(request)
        self._expected_blocks = 0

        # Of a request that waits.
        asked_s = request.queue_timeout_s
        self._queue_timeout_s = relay.queue_timeout_s if asked_s is None else min(asked_s, relay.queue_timeout_s)
        self._ticket: Ticket | None = None
        self._waking: Waking | None = None
        self._waits = asyncio.Event()
        self._told: tuple[object, ...] = ()

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
        # Whom the stream has lost: (worker, why). None while it looks for its first one.
        self._lost_to: tuple[Worker, RbeeError] | None = None
        self._placing: asyncio.Task[None] | None = asyncio.ensure_future(self._place(None))

    @property
    def tokens_out(self) -> int:
        """Tokens so far; those that the client brought itself count, as they do in ``max_tokens`` and in the numbering."""
        return len(self.ids)

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
            waits = asyncio.ensure_future(self._waits.wait())
            try:
                await asyncio.wait((placing, waits), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waits.cancel()
        if placing.done():
            self._placed(placing)

    def _placed(self, placing: asyncio.Task[None]) -> None:
        self._placing = None
        if placing.cancelled():
            raise CancelledByRequestError
        placing.result()

    # --- workers ----------------------------------------------------------------------------------------------------

    async def _place(self, failure: RbeeError | None) -> None:
        """Open the stream at a worker, trying others until one takes it; ``failure`` is raised when none does."""
        previous = self._lost_to[0] if self._lost_to is not None else None
        wanted = self._wanted(previous)
        ticket: Ticket | None = None
        while True:
            if asyncio.get_running_loop().time() >= self._deadline:
                raise self._late()
            choice, ticket = await self._find(wanted, ticket, failure)
            self._take(choice)
            attempt = self._attempt
            assert attempt is not None  # noqa: S101
            try:
                await attempt.open(self._encoded(), self._headers())
            except TryFailedError as e:
                self._give_up(e)
                if not isinstance(e.error, AllSlotsBusy | WorkerLoading):
                    self._tried.add(choice.worker)
                    failure = failure or e.error
                logger.warning("worker did not take a request", extra=self._facts(choice.worker, e.error))
                continue
            except RequestTimeout:
                raise
            except RequestError as e:
                # Another worker has accepted this very request, so it is this one that can not (a smaller context, say).
                if previous is None:
                    raise
                self._give_up(TryFailedError(e, broken=False))
                self._tried.add(choice.worker)
                logger.warning("worker can not go on with a stream", extra=self._facts(choice.worker, e))
                continue
            self._taken(choice)
            return

    def _wanted(self, previous: Worker | None, *, exact: bool = False) -> Wanted:
        r = self.request
        return Wanted(
            model=self.model,
            node=r.node,
            backend=r.backend,
            device=r.device,
            worker_id=r.worker_id,
            labels=tuple(sorted(r.labels.items())),
            continuation_class=previous.record.continuation_class if previous is not None and self.ids else None,
            exact=exact,
        )

    async def _find(self, wanted: Wanted, before: Ticket | None, failure: RbeeError | None) -> tuple[Choice, Ticket | None]:
        """Return a worker whose slot is taken for us, after waiting for it if need be; ``before`` keeps the place in line."""
        relay = self._relay
        if before is None and (self._lost_to is not None or relay.queue.may_go_ahead(self.model)):
            with relay.metrics.scheduling_ms.time():
                choice = pick(relay.registry, wanted, relay.clock(), exclude=self._tried, affinity=self._affinity())
            if choice is not None:
                relay.registry.acquire(choice.worker)
                relay.queue.started(self.model, self.key)
                return choice, None
        if not (hope := worth_waiting_for(relay.registry, wanted, relay.clock(), self._tried)):
            raise failure or why_nobody(relay.registry, wanted, relay.clock(), self._tried)
        capacity = any(w.takes for w in hope)
        if self._queue_timeout_s == 0 and self._lost_to is None:
            if capacity:
                relay.waker.follow([w for w in hope if w.record.status is WorkerState.DORMANT])
            if capacity or not any(w.record.status is WorkerState.DORMANT for w in hope):
                raise failure or why_nobody(relay.registry, wanted, relay.clock(), self._tried)
        ticket = relay.queue.enter(
            self.model,
            wanted,
            key=self.key,
            priority=self.request.priority,
            exclude=self._tried,
            affinity=self._affinity,
            front=self._lost_to is not None,
            limit=None if capacity else max(relay.queue_max, _COLD_MAX),
            before=before,
        )
        try:
            if not ticket.granted.done():
                await self._wait(ticket)
            choice = ticket.granted.result()
        except BaseException:
            relay.queue.leave(ticket)
            if ticket.granted.done() and not ticket.granted.cancelled():
                self._release(ticket.granted.result().worker, 0.0)
            raise
        finally:
            self._ticket = self._waking = None
            self.queued_ms += (relay.clock() - max(ticket.since, ticket.entered)) * 1000
        return choice, ticket

    async def _wait(self, ticket: Ticket) -> None:
        """Return when the ticket is granted; wakes workers meanwhile. Raises why it is no use to wait any longer."""
        relay, loop = self._relay, asyncio.get_running_loop()
        self._ticket = ticket
        hopeless_since: float | None = None
        while True:
            hope = worth_waiting_for(relay.registry, ticket.wanted, relay.clock(), ticket.exclude)
            if not any(relay.registry.routable(w, relay.clock()) and w.slots_free for w in hope):
                self._waking = relay.waker.follow(hope) or (self._waking if not hope else None)
            self._waits.set()
            waited = relay.clock() - ticket.since
            if not hope:
                hopeless_since = relay.clock() if hopeless_since is None else hopeless_since
                if relay.clock() - hopeless_since >= _HOPELESS_S or (self._waking is not None and self._waking.error):
                    raise (self._waking and self._waking.error) or why_nobody(
                        relay.registry, ticket.wanted, relay.clock(), ticket.exclude
                    )
            else:
                hopeless_since = None
            cold = self._waking is not None and not any(w.takes for w in hope)
            limit = relay.load_timeout_s if cold else self._queue_timeout_s
            if waited >= limit:
                raise self._waited_in_vain(waited, cold=cold)
            left = min(_LOOK_S, limit - waited, self._deadline - loop.time())
            await asyncio.wait((ticket.granted,), timeout=max(left, 0.001))
            if ticket.granted.done():
                return
            if loop.time() >= self._deadline:
                raise self._late()

    def _waited_in_vain(self, waited_s: float, *, cold: bool) -> RbeeError:
        if cold and self._waking is not None:
            figures = {k: v for k, v in self._waking.progress.items() if k.startswith("layers_")}
            worker_id = self._waking.worker.id
            return LoadingTimeout(
                f"worker {worker_id} was not ready after {waited_s:.0f} s", hint=f"rbee-ctl worker get {worker_id}", **figures
            )
        return AllSlotsBusy(
            f"no slot became free within {waited_s:.0f} s",
            hint="try again later, or start another worker: rbee-ctl worker start --node NODE --model MODEL",
            queued_ms=round(waited_s * 1000),
            retry_after_s=1,
        )

    def _affinity(self) -> dict[Worker, int]:
        return self._relay.prefixes.match(self._chain) if self._chain else {}

    def _take(self, choice: Choice) -> None:
        """The slot is ours: the books of registry and queue say so already."""
        relay = self._relay
        self._attempts += 1
        self._attempt = Attempt(relay.client, relay.token, relay.limits, choice.worker, self._deadline)
        self._held_since = relay.clock()
        self.worker = choice.worker

    def _taken(self, choice: Choice) -> None:
        relay = self._relay
        relay.metrics.dispatches.labels(result="ok").inc()
        if self._lost_to is None:
            self.placement = choice.reason
            relay.metrics.queue_wait_ms.observe(self.queued_ms)
        self._expected_blocks = self._affinity().get(choice.worker, 0) if self._chain else 0
        if self._chain:
            relay.prefixes.remember(self._chain, choice.worker)
        for _, event in self._attempt.first if self._attempt is not None else ():
            self._note_started(event)

    def _give_up(self, failed: TryFailedError) -> None:
        """Let go of the current worker and tell the registry what was learnt."""
        relay, worker = self._relay, self.worker
        assert worker is not None  # noqa: S101
        relay.metrics.dispatches.labels(result="failed" if failed.broken else "refused").inc()
        # First what was learnt, then the slot: what becomes free is given to the next in line at once.
        if failed.broken:
            relay.registry.mark_failed(worker, relay.clock())
        elif isinstance(failed.error, WorkerLoading):
            relay.registry.mark_state(worker, WorkerState.LOADING)
        elif isinstance(failed.error, WorkerDraining):
            relay.registry.mark_state(worker, WorkerState.DRAINING)
        elif isinstance(failed.error, AllSlotsBusy):
            relay.registry.mark_full(worker, relay.clock())
        self._leave()

    def _leave(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.close()
            self._release(attempt.worker, self._relay.clock() - self._held_since)

    def _release(self, worker: Worker, held_s: float) -> None:
        self._relay.queue.ended(self.model, self.key, held_s)
        self._relay.registry.release(worker)

    def _headers(self) -> dict[str, str]:
        # One name at most of this request at any worker: the one that broke may have it still.
        ident = self.id if self._attempts == 1 else f"{self.id}.{self._attempts - 1}"
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
                    if (resumed := self._resumed()) is not None:
                        yield [resumed]
                    continue
                if self._cancelled:
                    raise CancelledByRequestError
                if self._leaving and (moved := await self._hand_over()) is not None:
                    yield [moved]
                assert self._attempt is not None  # noqa: S101 -- a worker has taken it
                failed: TryFailedError | None
                try:
                    batch = await self._attempt.batch()
                except WokenError:
                    continue
                except TryFailedError as e:
                    failed = e
                else:
                    if batch is None:
                        failed = TryFailedError(self._lost("closed the stream before its end"), broken=True)
                    else:
                        passed, failed = self._accept(batch)
                        if passed:
                            yield passed
                if failed is not None and not self._ended and (last := self._fail_over(failed)) is not None:
                    yield [last]
        except CancelledByRequestError:
            if self.aborted is not None:
                self._failed(self.aborted)
                yield [_pair(error(self.aborted, self.correlation_id) | {"tokens_out": self.tokens_out})]
                return
            self._ended, self.outcome = True, StopReason.CANCELLED.value
            yield [_pair(end(self.tokens_out, self.outcome, prompt_ms=0, decode_ms=0, prompt_tokens=self.prompt_tokens))]
        except RbeeError as e:
            self._failed(e)
            yield [_pair(error(e, self.correlation_id) | {"tokens_out": self.tokens_out})]
        finally:
            await self.aclose()

    async def _while_placing(self, placing: asyncio.Task[None]) -> AsyncGenerator[tuple[bytes, Event]]:
        """Yield what there is to tell until a worker has taken the stream; raises why none has."""
        while not placing.done():
            if (event := self._news()) is not None:
                yield _pair(event)
            await asyncio.wait((placing,), timeout=_LOOK_S)
        self._placed(placing)

    def _news(self) -> Event | None:
        """Return what the client does not know yet of its waiting."""
        ticket, waking = self._ticket, self._waking
        if ticket is None:
            return None
        if waking is not None and self._told != (figures := tuple(waking.progress.values())):
            self._told = figures
            return waking.progress | {"worker_id": waking.worker.id}
        if waking is None and self._told != (position := ("queued", self._relay.queue.position(ticket))):
            self._told = position
            return queued(position[1], (self._relay.clock() - ticket.since) * 1000)
        return None

    def _accept(self, batch: Batch) -> tuple[Batch, TryFailedError | None]:
        """Return what the client gets of the batch, and why the worker is to be left, if it is."""
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
        if made := len(ids) - before:
            if before == self._given:
                self._relay.metrics.first_token_ms.observe((time.perf_counter() - self._began) * 1000)
            self._relay.metrics.tokens_relayed.inc(made)
            if self._tried:  # whoever failed before this token may be well again before the next failure
                self._tried.clear()
        return passed, failed

    def _note_started(self, event: Event) -> None:
        if event.get("type") != "started" or self.cached_tokens is not None:
            return
        self.prompt_tokens = event.get("prompt_tokens", 0)
        self.cached_tokens = event.get("cached_tokens", 0)
        if self._expected_blocks and self.worker is not None:
            hit = bool(self.cached_tokens)
            self._relay.metrics.prefix.labels(result="hit" if hit else "miss").inc()
            if not hit:
                # Only this prompt is certain to be there soon; what it was thought to have had is gone.
                self._relay.prefixes.forget(self._chain[: self._expected_blocks], self.worker)
                self._relay.prefixes.remember(self._chain, self.worker)

    # --- fail-over --------------------------------------------------------------------------------------------------

    def _fail_over(self, failed: TryFailedError) -> tuple[bytes, Event] | None:
        """Leave the worker and look for another; returns ``end`` when the client has all tokens already.

        Raises the failure itself where nobody else may go on.
        """
        before = self.worker
        assert before is not None  # noqa: S101
        self._give_up(failed)
        self._leaving = False
        if len(self.ids) >= self.request.max_tokens:
            # It died between its last token and the end: there is nothing to go on with.
            self._ended, self.outcome = True, StopReason.MAX_TOKENS.value
            return _pair(end(self.tokens_out, self.outcome, prompt_ms=0, decode_ms=0, prompt_tokens=self.prompt_tokens))
        if self.request.failover == "off" and len(self.ids) > self._given:
            self._count_failover(failed.error, "off")
            raise failed.error
        self._tried.add(before)
        self._lost_to = (before, failed.error)
        self._told = ()
        self._placing = asyncio.ensure_future(self._place(failed.error))
        return None

    def _resumed(self) -> tuple[bytes, Event] | None:
        """A worker has taken the stream over: count it and return what the client is told, if it has tokens already."""
        if self._lost_to is None or self.worker is None:
            return None
        before, cause = self._lost_to
        self._lost_to = None
        return self._moved(before, self.worker, cause)

    def _moved(self, before: Worker, after: Worker, cause: RbeeError) -> tuple[bytes, Event] | None:
        facts = {"to_worker": after.id} | self._facts(before, cause)
        if len(self.ids) == self._given:
            self._count_failover(cause, "before_first_token")
            logger.warning("request moved before its first token", extra=facts)
            return None
        mode = "exact" if continues_exactly(before, after, self._length()) else "approximate"
        self._count_failover(cause, mode)
        logger.warning("stream goes on at another worker", extra=facts | {"mode": mode})
        return _pair({"type": "resumed", "mode": mode, "worker_id": after.id, "i": len(self.ids)})

    def _length(self) -> int:
        """Tokens that the context will hold at the end, at most: up to there the two workers must compute alike."""
        return self.prompt_tokens + self.request.max_tokens

    def hand_over(self) -> None:
        """The worker drains: go on elsewhere as soon as possible, if somebody has room and continues exactly."""
        if self.request.failover != "off" or len(self.ids) == self._given:
            self._leaving = True
            self._wake()

    async def _hand_over(self) -> tuple[bytes, Event] | None:
        """Move the running stream; the worker that drains is left only when another one has it. Returns ``resumed``."""
        relay, before, old = self._relay, self.worker, self._attempt
        assert before is not None  # noqa: S101
        assert old is not None  # noqa: S101
        self._leaving = False
        if len(self.ids) >= self.request.max_tokens or self.request.worker_id is not None:
            return None
        wanted = self._wanted(before, exact=bool(self.ids))
        choice = pick(relay.registry, wanted, relay.clock(), exclude={before})
        if choice is None or choice.reason == "probe":
            return None
        if self.ids and not continues_exactly(before, choice.worker, self._length()):
            return None  # it may end where it is; if the time does not suffice, an approximate continuation comes then
        relay.registry.acquire(choice.worker)
        relay.queue.started(self.model, self.key)
        new = Attempt(relay.client, relay.token, relay.limits, choice.worker, self._deadline)
        self._attempts += 1
        try:
            await new.open(self._encoded(), self._headers())
        except BaseException as e:
            new.close()
            self._release(choice.worker, 0.0)
            if not isinstance(e, TryFailedError | RbeeError):
                raise
            if isinstance(e, TryFailedError) and e.broken:
                relay.registry.mark_failed(choice.worker, relay.clock())
            logger.info("a stream stays with the worker that drains", extra={"request_id": self.id, "reason": str(e)})
            return None
        self._leave()
        self._attempt, self.worker, self._held_since = new, choice.worker, relay.clock()
        relay.metrics.dispatches.labels(result="ok").inc()
        return self._moved(before, choice.worker, WorkerDraining(f"worker {before.id} drains", worker_id=before.id))

    def _count_failover(self, cause: RbeeError, mode: str) -> None:
        self._relay.metrics.failovers.labels(cause=_CAUSES.get(cause.code, "other"), mode=mode).inc()

    # --- the end ----------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End the stream with ``stop_reason`` CANCELLED; the worker's slot is freed by closing its connection."""
        self._cancelled = True
        if self._placing is not None:
            self._placing.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._placing is None and self._attempt is not None:
            self._attempt.wake()

    def abort(self, cause: RbeeError) -> None:
        """End the stream with an ``error`` event."""
        self.aborted = cause
        self.cancel()

    async def aclose(self) -> None:
        """Close the worker's stream and settle the books. Idempotent; must be called also when nothing was read."""
        if self._closed:
            return
        self._closed = True
        for release in self.on_close:
            release()
        relay = self._relay
        relay.streams.pop(self.id, None)
        if not relay.streams:
            relay.quiet.set()
        relay.metrics.connections.dec()
        relay.metrics.requests.labels(api=self._api, outcome=self.outcome).inc()
        placing, self._placing = self._placing, None
        if placing is not None and not placing.done():
            placing.cancel()
            await asyncio.wait((placing,))
        if placing is not None and not placing.cancelled():
            placing.exception()  # seen
        self._leave()

    def _failed(self, cause: RbeeError) -> None:
        self._ended, self.outcome, self.error = True, cause.code, cause
        self._relay.metrics.errors.labels(code=cause.code).inc()
        if self._lost_to is not None:
            before, why = self._lost_to
            self._count_failover(why, "none")
            logger.error("stream lost: no other worker can go on", extra=self._facts(before, why))

    @staticmethod
    def _late() -> RequestTimeout:
        return RequestTimeout("the deadline of the request has passed", hint="ask for fewer tokens or a longer timeout_s")

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


#: Codes of failures -> cause of a fail-over as the metrics name it.
_CAUSES = {
    WorkerCrashed.code: "crash",
    ConnectionTimeout.code: "timeout",
    WorkerDraining.code: "drain",
    MalformedResponse.code: "malformed",
    AllSlotsBusy.code: "refused",
    WorkerLoading.code: "refused",
    NoWorkerAvailable.code: "refused",
}


def _pair(event: Event) -> tuple[bytes, Event]:
    return encode(event), event
