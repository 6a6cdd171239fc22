"""The slot that a stream holds at a worker: taken, used, given back, and what was learnt of the worker on the way."""

from __future__ import annotations

from rbee_serve.contract.api import WorkerState
from rbee_serve.contract.errors import AllSlotsBusy, WorkerDraining, WorkerLoading
from rbee_serve.queen.parts import Parts
from rbee_serve.queen.registry import Worker
from rbee_serve.queen.upstream import Attempt, TryFailedError


class Hold:
    """At most one slot at a time, for a request of ``key`` on ``model``. ``deadline``: of the running loop's clock."""

    def __init__(self, parts: Parts, model: str, key: str, deadline: float) -> None:
        self.worker: Worker | None = None  # the present one, or the last one when there is none
        self.attempt: Attempt | None = None
        self.tries = 0
        self._parts, self._model, self._key, self._deadline = parts, model, key, deadline
        self._since = 0.0

    def acquire(self, worker: Worker) -> None:
        """Book a slot at the worker; ``take`` or ``release`` must follow."""
        self._parts.registry.acquire(worker)
        self._parts.queue.started(self._model, self._key)

    def take(self, worker: Worker) -> Attempt:
        """Use a slot that the books of registry and queue say is ours; returns the attempt, not opened yet."""
        self.attempt = self.new_attempt(worker)
        self.worker, self._since = worker, self._parts.clock()
        return self.attempt

    def new_attempt(self, worker: Worker) -> Attempt:
        """Return one more attempt, beside the present one."""
        self.tries += 1
        parts = self._parts
        return Attempt(parts.client, parts.token, parts.limits, worker, self._deadline)

    def exchange(self, attempt: Attempt) -> None:
        """Leave the present worker for one whose slot is booked and whose stream is open."""
        self.leave()
        self.attempt, self.worker, self._since = attempt, attempt.worker, self._parts.clock()

    def give_up(self, failed: TryFailedError) -> None:
        """Let go of the worker and tell the registry what was learnt."""
        registry, clock, worker = self._parts.registry, self._parts.clock, self.worker
        assert worker is not None  # noqa: S101
        self._parts.metrics.dispatches.labels(result="failed" if failed.broken else "refused").inc()
        # First what was learnt, then the slot: what becomes free is given to the next in line at once.
        if failed.broken:
            registry.mark_failed(worker, clock())
        elif isinstance(failed.error, WorkerLoading):
            registry.mark_state(worker, WorkerState.LOADING)
        elif isinstance(failed.error, WorkerDraining):
            registry.mark_state(worker, WorkerState.DRAINING)
        elif isinstance(failed.error, AllSlotsBusy):
            registry.mark_full(worker, clock())
        self.leave()

    def leave(self) -> None:
        """Close the worker's stream and give its slot back. Idempotent."""
        attempt, self.attempt = self.attempt, None
        if attempt is not None:
            attempt.close()
            self.release(attempt.worker, self._parts.clock() - self._since)

    def release(self, worker: Worker, held_s: float) -> None:
        """Give a booked slot back."""
        self._parts.queue.ended(self._model, self._key, held_s)
        self._parts.registry.release(worker)
