"""Which workers live, from their heartbeats alone (SPEC 3.5, E-01, E-02, E-05, E-08, E-09). Pure: the clock is an argument.

``now`` is the queen's monotonic clock in seconds. A worker's own clock only orders the beats of that worker, so skew
between machines does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rbee_serve.contract.api import ROUTABLE_STATES, Heartbeat, WorkerRecord, WorkerState
from rbee_serve.contract.errors import WorkerAlreadyRegistered, WorkerNotFound

#: (started_at, seq, timestamp): by these the beats of one worker id are ordered.
BeatOrder = tuple[float, int, float]


#: Seconds for which a worker's refusal as busy is believed; its next beat may correct it earlier.
_FULL_FOR_S = 0.25
#: A failure counts half as much after so many seconds.
_FAILURE_HALF_LIFE_S = 60.0


class BeatOutcome(StrEnum):
    """What a heartbeat did."""

    REGISTERED = "registered"  # first beat of this process
    UPDATED = "updated"
    OUTDATED = "outdated"  # older than what is known: ignored
    REMOVED = "removed"  # the worker says that it stops


@dataclass(slots=True, eq=False)
class Worker:
    """One process of one worker. A restarted worker is a new object, so what is counted here never mixes two lives."""

    record: WorkerRecord
    order: BeatOrder
    seen_at: float
    in_flight: int = 0  # requests that this queen has with it now
    foreign: int = 0  # slots taken by others, as far as the last beat tells
    failed: bool = False  # broke a stream or a connection since its last beat
    suspect_until: float = 0.0  # until then others are preferred
    full_until: float = 0.0  # it has just refused a request as busy: not asked again until then
    failures: float = 0.0  # decaying count of failures, as of ``failures_at``; outlives the process
    failures_at: float = 0.0
    last_used: int = 0  # ordinal of the last request given to it: makes ties go round
    # Out of the record, for the one loop in which every nanosecond counts a thousand times (placement).
    model_id: str = ""
    slots_total: int = 0
    takes: bool = False  # is in a state in which it takes requests
    retired: bool = False  # this process gets no more requests, whatever it says (SPEC OP-27)

    def __post_init__(self) -> None:
        self.describe(self.record)

    def describe(self, record: WorkerRecord) -> None:
        """Take over what the worker says of itself."""
        self.record, self.model_id, self.slots_total = record, record.model_id, record.slots_total
        self.takes = record.status in ROUTABLE_STATES and not self.retired

    def penalty(self, now: float) -> float:
        """How much worse than its load says the worker is to be judged, in shares of its slots (SPEC CAP-92, error rate).

        One failure is an accident, which ``suspect_until`` covers; those that follow it soon are a habit.
        """
        return max(0.0, self.failing(now) - 1) / 2 if self.failures else 0.0

    def failing(self, now: float) -> float:
        """Failures of late: each counts half as much after a minute."""
        return float(self.failures * 0.5 ** ((now - self.failures_at) / _FAILURE_HALF_LIFE_S))

    @property
    def id(self) -> str:
        """Fleet-wide worker id."""
        return self.record.id

    @property
    def busy(self) -> int:
        """Slots taken, by this queen (exact) and by others (as of the last beat)."""
        return self.in_flight + self.foreign

    @property
    def slots_free(self) -> int:
        """Slots that nobody has now; the record's own figure is as old as the last beat."""
        return max(0, self.record.slots_total - self.busy)

    @property
    def state(self) -> WorkerState:
        """State to show: what it says, or ``failed`` when it broke and has not been heard of since.

        Between two beats idle and busy follow the slots that this queen itself takes and gives back.
        """
        if self.failed:
            return WorkerState.FAILED
        if self.retired:
            return WorkerState.RETIRING
        if self.takes:
            return WorkerState.IDLE if self.slots_free else WorkerState.BUSY
        return self.record.status


@dataclass(slots=True)
class Registry:
    """All workers heard of lately. Not thread-safe: belongs to the event loop."""

    stale_after_s: float = 30.0
    forget_after_s: float = 120.0
    suspect_for_s: float = 30.0
    on_room: Callable[[], None] = lambda: None  # called whenever a request may find room that did not before
    on_change: Callable[[], None] = lambda: None  # called when ``memory`` has changed
    _workers: dict[str, Worker] = field(default_factory=dict)
    # Ids that said goodbye: a beat that was overtaken on the way must not bring them back.
    _stopped: dict[str, tuple[BeatOrder, float]] = field(default_factory=dict)
    _ordinal: int = 0
    # Retired workers: id -> started_at of the process. A new process of that name was started by somebody: it is welcome.
    _retired: dict[str, float] = field(default_factory=dict)
    # Workers that were up when the queen went down and have not been heard of since: id -> (model id, model reference). Until
    # ``_expected_until`` their models are known, though nobody serves them yet.
    _expected: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    _expected_until: float | None = None

    def beat(self, beat: Heartbeat, now: float) -> BeatOutcome:
        """Take one heartbeat; raises WorkerAlreadyRegistered when a live worker beats by this id from another address."""
        record = beat.worker
        order: BeatOrder = (record.started_at, beat.seq, beat.timestamp)
        self.sweep(now)
        known = self._workers.get(record.id)
        if known is not None and self._trusted(known, now):
            if known.record.url != record.url:
                raise WorkerAlreadyRegistered(
                    f"worker id {record.id!r} is in use by another live worker at another address",
                    hint="give the hives different names in the inventory, or stop the other worker first",
                    worker_id=record.id,
                    hive_id=known.record.hive_id,
                )
            if order <= known.order:
                return BeatOutcome.OUTDATED
        if known is not None and known.record.started_at == record.started_at and order <= known.order:
            return BeatOutcome.OUTDATED  # the same process: its own numbering always holds
        goodbye = self._stopped.get(record.id)
        if goodbye is not None and order <= goodbye[0]:
            return BeatOutcome.OUTDATED

        self._expected.pop(record.id, None)
        if record.status is WorkerState.STOPPED:
            self._workers.pop(record.id, None)
            self._stopped[record.id] = (order, now)
            self.on_change()
            return BeatOutcome.REMOVED
        retired = self._retired.get(record.id)
        if retired is not None and record.status is WorkerState.DORMANT and retired == record.started_at:
            self._workers.pop(record.id, None)  # it has gone to sleep and will not be woken by us
            return BeatOutcome.REMOVED
        sleeps = record.status is WorkerState.DORMANT
        slept = known is not None and known.record.status is WorkerState.DORMANT
        self._stopped.pop(record.id, None)
        if known is None or known.record.started_at != record.started_at:
            worker = Worker(record, order, now, foreign=record.slots_total - record.slots_available)
            if known is not None:  # one that fails again and again is known by its name
                worker.failures, worker.failures_at = known.failures, known.failures_at
            self._workers[record.id] = worker
            if retired is not None:
                if retired == record.started_at:
                    worker.retired = True
                    worker.describe(record)
                else:
                    del self._retired[record.id]
            renamed = known is None or known.record.model_id != record.model_id
            if sleeps or slept or renamed or retired is not None:
                self.on_change()
            self.on_room()
            return BeatOutcome.REGISTERED
        known.describe(record)
        known.order, known.seen_at, known.failed, known.full_until = order, now, False, 0.0
        known.foreign = max(0, record.slots_total - record.slots_available - known.in_flight)
        if sleeps != slept:
            self.on_change()
        self.on_room()
        return BeatOutcome.UPDATED

    def sweep(self, now: float) -> None:
        """Forget what has been silent for too long. Dormant workers are silent by nature and stay (SPEC N-03)."""
        gone = [
            w.id
            for w in self._workers.values()
            if now - w.seen_at > self.forget_after_s and (w.failed or w.record.status is not WorkerState.DORMANT)
        ]
        for worker_id in gone:
            del self._workers[worker_id]
        if gone:
            self.on_change()
        if self._expected_until is not None and now > self._expected_until:
            self._expected.clear()
        # A machine whose clock was set back would be refused for as long as its goodbye is remembered: keep it short.
        for worker_id in [i for i, (_, at) in self._stopped.items() if now - at > self.stale_after_s]:
            del self._stopped[worker_id]

    def fresh(self, worker: Worker, now: float) -> bool:
        """Say whether the worker counts as alive: heard of within ``stale_after_s``, or dormant."""
        return now - worker.seen_at <= self.stale_after_s or worker.record.status is WorkerState.DORMANT

    def routable(self, worker: Worker, now: float) -> bool:
        """Say whether new requests may go to the worker."""
        return worker.takes and not worker.failed and now - worker.seen_at <= self.stale_after_s

    def _trusted(self, worker: Worker, now: float) -> bool:
        """Whether the order of its beats and its address hold. A dormant one has no process that could be confused."""
        return not worker.failed and now - worker.seen_at <= self.stale_after_s

    def __iter__(self) -> Iterator[Worker]:
        """Yield every worker that is not forgotten, silent ones included."""
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def known(self, worker_id: str) -> Worker | None:
        """Return the worker by this id, silent ones included."""
        return self._workers.get(worker_id)

    def live(self, now: float) -> list[Worker]:
        """Return the workers to show, by id: those silent for longer than ``stale_after_s`` are hidden."""
        self.sweep(now)
        return sorted((w for w in self._workers.values() if self.fresh(w, now)), key=lambda w: w.id)

    def get(self, worker_id: str, now: float) -> Worker:
        """Return one live worker or raise WorkerNotFound."""
        worker = self._workers.get(worker_id)
        if worker is None or not self.fresh(worker, now):
            known = [w.id for w in self.live(now)]
            raise WorkerNotFound(
                f"no live worker {worker_id!r}; live: {', '.join(known) or 'none'}",
                hint="rbee-ctl worker list",
                worker_id=worker_id,
                known=known,
            )
        return worker

    def acquire(self, worker: Worker) -> None:
        """Count a request that is about to be sent to the worker; ``release`` must follow."""
        self._ordinal += 1
        worker.last_used = self._ordinal
        worker.in_flight += 1

    def release(self, worker: Worker) -> None:
        """Count a request as ended."""
        worker.in_flight -= 1
        self.on_room()

    def mark_failed(self, worker: Worker, now: float) -> None:
        """Take the worker out of routing: it broke a stream, refused a connection or hung (SPEC E-05).

        Its next beat, or the first one of its successor, brings it back; others are preferred for a while.
        """
        worker.failures, worker.failures_at = worker.failing(now) + 1, now
        worker.failed = True
        worker.suspect_until = now + self.suspect_for_s

    def retire(self, worker: Worker) -> None:
        """Give the worker nothing more, for as long as its process lives and over restarts of the queen (SPEC OP-27)."""
        self._retired[worker.id] = worker.record.started_at
        if worker.record.status is WorkerState.DORMANT:
            self._workers.pop(worker.id, None)
        worker.retired = True
        worker.describe(worker.record)
        self.on_change()

    def remove(self, worker: Worker) -> None:
        """Forget the worker at once; beats of this process no longer bring it back."""
        self._stopped[worker.id] = ((worker.record.started_at, 2**62, float("inf")), worker.seen_at)
        self._workers.pop(worker.id, None)
        self.on_change()

    def memory(self) -> dict[str, Any]:
        """Return what no heartbeat will tell again: who sleeps, who was retired; and whose first beat is worth waiting for."""
        sleeping = [w.record.model_dump(mode="json") for w in self._workers.values() if w.record.status is WorkerState.DORMANT]
        up = {
            w.id: [w.model_id, w.record.model_ref] for w in self._workers.values() if w.record.status is not WorkerState.DORMANT
        }
        expected = {i: list(names) for i, names in self._expected.items()}
        return {"version": 1, "dormant": sleeping, "retired": dict(self._retired), "up": expected | up}

    def restore(self, memory: dict[str, Any], now: float) -> None:
        """Take back what ``memory`` returned before a restart; raises ValueError when it is nothing of the kind.

        A worker that has been heard of since knows better.
        """
        if memory.get("version") != 1:
            raise ValueError(f"version {memory.get('version')!r}, expected 1")
        for entry in memory["dormant"]:
            record = WorkerRecord.model_validate(entry)
            if record.id not in self._workers:
                # Long ago, so that whatever beats by this name is believed; dormant ones do not grow stale.
                self._workers[record.id] = Worker(record, (record.started_at, 0, 0.0), now - self.stale_after_s - 1)
        self._retired |= {str(name): float(at) for name, at in memory["retired"].items()}
        up = memory.get("up", {})  # not written by versions before this
        self._expected = {str(i): (str(model), ref) for i, (model, ref) in up.items() if i not in self._workers}
        self._expected_until = now + self.stale_after_s

    def expected(self, now: float) -> dict[str, tuple[str, str | None]]:
        """Return the workers that were up before the queen was restarted and may yet beat: id -> (model id, reference)."""
        return self._expected if self._expected_until is not None and now <= self._expected_until else {}

    def mark_full(self, worker: Worker, now: float) -> None:
        """Note that the worker has just refused a request as busy, which is still counted; its next beat corrects it."""
        worker.foreign = max(worker.foreign, worker.slots_total - worker.in_flight + 1)
        worker.full_until = now + _FULL_FOR_S

    def mark_state(self, worker: Worker, state: WorkerState) -> None:
        """Note a state that the worker told in an answer instead of a beat."""
        worker.describe(worker.record.model_copy(update={"status": state}))
