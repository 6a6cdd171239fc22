"""Requests that wait for a slot: bounded for each model, fair between clients' keys, nobody overtaken (SPEC E-45).

A slot that becomes free is taken, in the same moment, for the request that is next in line: nobody who just arrives can
snatch it and nobody is woken in vain. Order: streams that lost their worker; then the key with the fewest requests running
on this model, keys in equal case in turn; within a key the greater priority, then who came first. A priority is thus worth
something against one's own requests only, and no key can crowd out another by asking for more or shouting louder.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from rbee_serve.contract.errors import AllSlotsBusy
from rbee_serve.queen.placement import Choice, Wanted, pick
from rbee_serve.queen.registry import Registry, Worker

#: Seconds between two looks at workers that are full by their own word: other clients may have left them since.
_PROBE_S = 0.25
#: Bounds of the time that a refused client is asked to wait, seconds.
_RETRY_AFTER_S = (1, 60)


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in the queue. ``granted`` gets the choice, whose slot is taken already."""

    model: str
    wanted: Wanted
    key: str
    priority: int
    number: int
    since: float  # of the first ticket of this request
    entered: float
    granted: asyncio.Future[Choice]
    exclude: Collection[Worker] = ()
    affinity: Callable[[], dict[Worker, int]] = dict
    front: bool = False


@dataclass(slots=True)
class _Line:
    """Those who wait for one model."""

    waiting: dict[Ticket, None] = field(default_factory=dict)
    order: list[Ticket] | None = None  # None: to be found anew


@dataclass(slots=True)
class Queue:
    """All waiting requests. ``clock``: monotonic seconds; belongs to the event loop."""

    registry: Registry
    clock: Callable[[], float]
    queue_max: int
    _lines: dict[str, _Line] = field(default_factory=dict)
    _running: dict[str, Counter[str]] = field(default_factory=dict)  # model -> key -> slots held
    _service_s: dict[str, float] = field(default_factory=dict)  # model -> how long a request holds a slot, lately
    _served: dict[tuple[str, str], int] = field(default_factory=dict)  # (model, key) -> ordinal of its last turn
    _numbers: int = 0
    _turns: int = 0
    _probe: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.registry.on_room = self.pump

    # --- slots

    def started(self, model: str, key: str) -> None:
        """A request of this key holds a slot now; ``ended`` must follow."""
        self._running.setdefault(model, Counter())[key] += 1
        self._turns += 1
        self._served[model, key] = self._turns

    def ended(self, model: str, key: str, held_s: float) -> None:
        """It has given the slot back after ``held_s`` seconds. To be called before the registry is told."""
        running = self._running[model]
        running[key] -= 1
        if not running[key]:
            del running[key]
            if not running:
                del self._running[model]
        before = self._service_s.get(model, held_s)
        self._service_s[model] = before + 0.2 * (held_s - before)
        if (line := self._lines.get(model)) is not None:
            line.order = None
        if len(self._served) > 10_000:  # turns of long ago decide nothing
            for old in sorted(self._served, key=self._served.__getitem__)[:5_000]:
                del self._served[old]

    # --- waiting

    def may_go_ahead(self, model: str) -> bool:
        """Say whether a request may take a free slot without queueing: nobody waits for the model."""
        line = self._lines.get(model)
        return line is None or not line.waiting

    def enter(
        self,
        model: str,
        wanted: Wanted,
        *,
        key: str,
        priority: int,
        exclude: Collection[Worker] = (),
        affinity: Callable[[], dict[Worker, int]] = dict,
        front: bool = False,
        limit: int | None = None,
        before: Ticket | None = None,
    ) -> Ticket:
        """Line up and return the ticket, which may be granted already; ``leave`` in any case.

        ``limit`` instead of ``queue_max``; neither holds for ``front``. ``before``, an earlier ticket of the request, gives
        its place back. Raises AllSlotsBusy when the queue is full.
        """
        line = self._lines.setdefault(model, _Line())
        if not front and before is None and len(line.waiting) >= (self.queue_max if limit is None else limit):
            raise self._full(model, line, wanted)
        now = self.clock()
        if before is None:
            self._numbers += 1
        number, since = (before.number, before.since) if before is not None else (self._numbers, now)
        future: asyncio.Future[Choice] = asyncio.get_running_loop().create_future()
        ticket = Ticket(model, wanted, key, priority, number, since, now, future, exclude, affinity, front)
        line.waiting[ticket] = None
        line.order = None
        self._pump_line(model, line)
        self._arm()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give the place up. A slot that was granted and is not used goes to the next in line. Idempotent."""
        line = self._lines.get(ticket.model)
        if line is not None and line.waiting.pop(ticket, 0) is None:
            line.order = None
            if not line.waiting:
                del self._lines[ticket.model]

    def position(self, ticket: Ticket) -> int:
        """Return the place in line, from 1, as it is now."""
        line = self._lines.get(ticket.model)
        if line is None or ticket not in line.waiting:
            return 1
        return self._order(ticket.model, line).index(ticket) + 1

    def depth(self) -> dict[str, int]:
        """Return how many wait for each model."""
        return {model: len(line.waiting) for model, line in self._lines.items()}

    def pump(self) -> None:
        """Give free slots to those who are next in line; the registry calls it whenever there may be room."""
        for model, line in list(self._lines.items()):
            self._pump_line(model, line)

    # --- how

    def _pump_line(self, model: str, line: _Line) -> None:
        now = self.clock()
        in_vain: set[tuple[Wanted, tuple[Worker, ...]]] = set()
        progress = True
        while progress and line.waiting:
            progress = False
            for ticket in self._order(model, line):
                case = (ticket.wanted, tuple(ticket.exclude))
                if case in in_vain:
                    continue
                choice = pick(self.registry, ticket.wanted, now, exclude=ticket.exclude, affinity=ticket.affinity())
                if choice is None:
                    in_vain.add(case)
                    continue
                self.registry.acquire(choice.worker)
                self.started(model, ticket.key)
                self.leave(ticket)
                ticket.granted.set_result(choice)
                progress = True  # whose turn it is has changed
                break

    def _order(self, model: str, line: _Line) -> list[Ticket]:
        if line.order is None:
            line.order = self._in_order(model, line)
        return line.order

    def _in_order(self, model: str, line: _Line) -> list[Ticket]:
        """Return the tickets as they would be served if slots became free one by one and none of those served ended."""
        front = sorted((t for t in line.waiting if t.front), key=lambda t: t.number)
        by_key: dict[str, list[Ticket]] = {}
        for ticket in line.waiting:
            if not ticket.front:
                by_key.setdefault(ticket.key, []).append(ticket)
        running = self._running.get(model, Counter())
        turns = self._turns
        heap: list[tuple[int, int, str]] = []
        for key, tickets in by_key.items():
            tickets.sort(key=lambda t: (t.priority, -t.number))  # the next is the last: pop() is cheap
            heap.append((running[key], self._served.get((model, key), 0), key))
        heapq.heapify(heap)
        order = front
        while heap:
            held, _, key = heapq.heappop(heap)
            order.append(by_key[key].pop())
            if by_key[key]:
                turns += 1
                heapq.heappush(heap, (held + 1, turns, key))
        return order

    def _arm(self) -> None:
        """While somebody waits, look again from time to time: not every slot that becomes free is told at once."""
        if self._probe is None and self._lines:
            self._probe = asyncio.get_running_loop().call_later(_PROBE_S, self._probed)

    def _probed(self) -> None:
        self._probe = None
        self.pump()
        self._arm()

    def _full(self, model: str, line: _Line, wanted: Wanted) -> AllSlotsBusy:
        now = self.clock()
        up = [w for w in self.registry if w.model_id == model and wanted.admits(w) and self.registry.routable(w, now)]
        total, waiting = sum(w.slots_total for w in up), len(line.waiting)
        seconds = math.ceil(self._service_s.get(model, 1.0) * (waiting + 1) / max(1, total)) if waiting else 1
        if not waiting:
            self._lines.pop(model, None)
        queued = f", and {waiting} request(s) wait already" if waiting else ""
        return AllSlotsBusy(
            f"all {total} slots of {len(up)} worker(s) are busy{queued}",
            hint="try again later, or start another worker: rbee-ctl worker start --node NODE --model MODEL",
            slots_total=total,
            slots_busy=sum(min(w.busy, w.slots_total) for w in up),
            retry_after_s=min(max(seconds, _RETRY_AFTER_S[0]), _RETRY_AFTER_S[1]),
            **({"queued": waiting} if waiting else {}),
        )
