"""One request's search for a free slot: taken at once where there is one, else waited for in the queue.

Meanwhile workers are woken, and the client is told what it waits for.
"""

from __future__ import annotations

import asyncio

from rbee_serve.contract.api import InferenceRequest, WorkerState
from rbee_serve.contract.errors import AllSlotsBusy, LoadingTimeout, RbeeError, RequestTimeout
from rbee_serve.contract.events import Event, queued
from rbee_serve.queen.hold import Hold
from rbee_serve.queen.parts import Parts
from rbee_serve.queen.placement import Choice, Wanted, awaited, pick, why_nobody, worth_waiting_for
from rbee_serve.queen.prefix import Expectation
from rbee_serve.queen.queue import Ticket
from rbee_serve.queen.registry import Worker
from rbee_serve.queen.waking import Waking

#: How often one who waits looks what has become of the workers it waits for, seconds.
LOOK_S = 0.5
#: How long a request that waits in the queue bears with there being nobody at all: systemd restarts a worker in seconds.
_HOPELESS_S = 5.0
#: Requests that may wait for a worker to be woken where no queue is wanted (queue_max 0).
_COLD_MAX = 64


def late() -> RequestTimeout:
    """Return the error of a request whose time is up."""
    return RequestTimeout("the deadline of the request has passed", hint="ask for fewer tokens or a longer timeout_s")


class Search:
    """Finds workers for one request, as often as it needs one. ``deadline``: of the running loop's clock."""

    def __init__(
        self, parts: Parts, request: InferenceRequest, model: str, key: str, deadline: float, hold: Hold, prompt: Expectation
    ) -> None:
        self.tried: set[Worker] = set()  # failed the request since its last token
        self.queued_ms = 0.0
        self._has_waited: asyncio.Future[None] | None = None  # made for whoever asks: most requests find a slot at once
        self._parts, self._request, self._model, self._key = parts, request, model, key
        self._deadline, self._hold, self._prompt = deadline, hold, prompt
        asked_s = request.queue_timeout_s
        self._patience_s = parts.queue_timeout_s if asked_s is None else min(asked_s, parts.queue_timeout_s)
        self._ticket: Ticket | None = None
        self._waking: Waking | None = None
        self._told: tuple[object, ...] = ()

    def wanted(self, continues: Worker | None, *, exact: bool = False) -> Wanted:
        """Return what the request asks for; ``continues``: the worker whose tokens are to be continued."""
        r = self._request
        return Wanted(
            model=self._model,
            node=r.node,
            backend=r.backend,
            device=r.device,
            worker_id=r.worker_id,
            labels=tuple(sorted(r.labels.items())),
            continuation_class=continues.record.continuation_class if continues is not None else None,
            exact=exact,
        )

    async def find(
        self, wanted: Wanted, before: Ticket | None, failure: RbeeError | None, *, moving: bool, waits: bool = True
    ) -> tuple[Choice, Ticket | None]:
        """Return a worker whose slot is booked for us, after waiting for it if need be.

        ``before`` keeps the place in line; ``moving``: the request has lost its worker and goes first; not ``waits``: a
        slot that is not free now is of no use to it. Raises ``failure``, or why there is nobody.
        """
        parts = self._parts
        if before is None and (moving or parts.queue.may_go_ahead(self._model)):
            with parts.metrics.scheduling_ms.time():
                choice = pick(parts.registry, wanted, parts.clock(), exclude=self.tried, affinity=self._prompt.affinity())
            if choice is not None:
                self._hold.acquire(choice.worker)
                return choice, None
        if not waits:
            raise failure or why_nobody(parts.registry, wanted, parts.clock(), self.tried)
        ticket = self._line_up(wanted, before, failure, moving=moving)
        try:
            if not ticket.granted.done():
                await self._wait(ticket)
            choice = ticket.granted.result()
        except BaseException:
            parts.queue.leave(ticket)
            if ticket.granted.done() and not ticket.granted.cancelled():
                self._hold.release(ticket.granted.result().worker, 0.0)
            raise
        finally:
            self._ticket = self._waking = None
            self.queued_ms += (parts.clock() - max(ticket.since, ticket.entered)) * 1000
        return choice, ticket

    def _line_up(self, wanted: Wanted, before: Ticket | None, failure: RbeeError | None, *, moving: bool) -> Ticket:
        parts = self._parts
        now = parts.clock()
        hope = worth_waiting_for(parts.registry, wanted, now, self.tried)
        if not hope and (self._patience_s == 0 or not awaited(parts.registry, wanted, now)):
            raise failure or why_nobody(parts.registry, wanted, now, self.tried)
        capacity = any(w.takes for w in hope)
        if self._patience_s == 0 and not moving:
            asleep = [w for w in hope if w.record.status is WorkerState.DORMANT]
            if capacity:
                parts.waker.follow(asleep)
            if capacity or not asleep:
                raise failure or why_nobody(parts.registry, wanted, parts.clock(), self.tried)
        return parts.queue.enter(
            self._model,
            wanted,
            key=self._key,
            priority=self._request.priority,
            exclude=self.tried,
            affinity=self._prompt.affinity,
            front=moving,
            limit=None if capacity else max(parts.queue_max, _COLD_MAX),
            before=before,
        )

    async def _wait(self, ticket: Ticket) -> None:
        """Return when the ticket is granted; wakes workers meanwhile. Raises why it is no use to wait any longer."""
        parts, loop = self._parts, asyncio.get_running_loop()
        self._ticket = ticket
        hopeless_since: float | None = None
        while True:
            now = parts.clock()
            hope = worth_waiting_for(parts.registry, ticket.wanted, now, ticket.exclude)
            if not any(parts.registry.routable(w, now) and w.slots_free for w in hope):
                self._waking = parts.waker.follow(hope) or (self._waking if not hope else None)
            waits = self.waits()
            if not waits.done():
                waits.set_result(None)
            waited = now - ticket.since
            if not hope and not awaited(parts.registry, ticket.wanted, now):
                hopeless_since = now if hopeless_since is None else hopeless_since
                if now - hopeless_since >= _HOPELESS_S or (self._waking is not None and self._waking.error):
                    raise (self._waking and self._waking.error) or why_nobody(parts.registry, ticket.wanted, now, ticket.exclude)
            else:
                hopeless_since = None
            cold = self._waking is not None and not any(w.takes for w in hope)
            limit = parts.load_timeout_s if cold else self._patience_s
            if waited >= limit:
                raise self._in_vain(waited, cold=cold) if hope else why_nobody(parts.registry, ticket.wanted, now, ticket.exclude)
            left = min(LOOK_S, limit - waited, self._deadline - loop.time())
            await asyncio.wait((ticket.granted,), timeout=max(left, 0.001))
            if ticket.granted.done():
                return
            if loop.time() >= self._deadline:
                raise late()

    def _in_vain(self, waited_s: float, *, cold: bool) -> RbeeError:
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

    def waits(self) -> asyncio.Future[None]:
        """Return what is done as soon as the request has had to wait."""
        if self._has_waited is None:
            self._has_waited = asyncio.get_running_loop().create_future()
        return self._has_waited

    def begin_anew(self) -> None:
        """Another search begins, of which the client knows nothing yet."""
        self._told = ()

    def news(self) -> Event | None:
        """Return what the client does not know yet of the waiting: ``queued`` or ``loading``."""
        ticket, waking = self._ticket, self._waking
        if ticket is None:
            return None
        if waking is not None and self._told != (figures := tuple(waking.progress.values())):
            self._told = figures
            return waking.progress | {"worker_id": waking.worker.id}
        if waking is None and self._told != (position := ("queued", self._parts.queue.position(ticket))):
            self._told = position
            return queued(position[1], (self._parts.clock() - ticket.since) * 1000)
        return None
