"""Jobs: operations that run at the queen, their lines kept for any number of readers (SPEC 3.2, CAP-20..26).

A job runs whether anybody reads or not. Its events are kept, so a reader that comes late or twice sees all of them;
a job's events hold its id and reach no other stream. Memory is bounded: so many events a job, so many finished jobs.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rbee_serve.common.log import correlation
from rbee_serve.contract.errors import JobNotFound, RateLimited, RbeeError, RequestCanceled
from rbee_serve.contract.events import narration_line
from rbee_serve.contract.operations import Operation

logger = logging.getLogger(__name__)

Event = dict[str, Any]
#: Events kept of one job; the oldest go first.
EVENTS_MAX = 20_000
#: Finished jobs kept.
FINISHED_MAX = 200
#: Jobs that run or wait at one time.
UNFINISHED_MAX = 100


class JobState(StrEnum):
    """Life of a job (SPEC CAP-22)."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class Job:
    """One operation under way. Belongs to the event loop. ``caller``: what the gate knew of who began it."""

    operation: Operation
    id: str = field(default_factory=lambda: f"job-{uuid.uuid4()}")
    correlation_id: str | None = None
    caller: Mapping[str, Any] = field(default_factory=dict)
    state: JobState = JobState.QUEUED
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    finished_at: float | None = None
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    _events: list[Event] = field(default_factory=list)
    _dropped: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    ending: bool = False  # somebody has cancelled it

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finished_at is not None

    def publish(self, event: Event) -> None:
        """Add an event; it gets the job's id and the time."""
        stamp = {"job_id": self.id, "emitted_at_ms": int(time.time() * 1000)}
        if self.correlation_id is not None:
            stamp["correlation_id"] = self.correlation_id
        if "actor" in event:
            event = event | {"formatted": narration_line(event["actor"], event["action"], event["human"])}
        self._events.append(event | stamp)
        if len(self._events) > EVENTS_MAX:
            cut = EVENTS_MAX // 10
            del self._events[:cut]
            self._dropped += cut
        self._wake()

    @property
    def progress(self) -> Event | None:
        """The newest event that tells how far it is."""
        return next((event for event in reversed(self._events) if event["type"] == "progress"), None)

    def narrate(self, actor: str, action: str, human: str) -> None:
        """Say what is happening."""
        self.publish({"type": "narration", "actor": actor, "action": action, "human": human})

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def finish(self, state: JobState, error: RbeeError | None = None) -> None:
        """End it, once: its readers get the error, if any, and then the end of their streams."""
        if self.finished:
            return
        self.state = state
        if error is not None:
            self.error = error.envelope(self.correlation_id)["error"]
            self.publish({"type": "error", **self.error})
        self.finished_at = time.time()
        self._wake()

    async def events(self) -> AsyncGenerator[Event]:
        """Yield every event from the first on, until the job ends."""
        index = 0
        while True:
            if index < self._dropped:
                missing = self._dropped - index
                yield {
                    "type": "narration",
                    "actor": "queen",
                    "action": "replay",
                    "human": f"{missing} earlier events are not kept",
                }
                index = self._dropped
            news = self._news
            while index - self._dropped < len(self._events):
                event = self._events[index - self._dropped]
                index += 1
                yield event
                if index < self._dropped:
                    break
            else:
                if self.finished:
                    return
                if news is self._news:
                    await news.wait()

    def summary(self) -> dict[str, Any]:
        """Return the job as ``GET /v1/jobs`` lists it."""
        return {
            "job_id": self.id,
            "operation": self.operation.operation,
            "node": self.operation.node,
            "state": self.state.value,
            "created_at": self.created_at,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "events": self._dropped + len(self._events),
            "error": self.error,
            "sse_url": f"/v1/jobs/{self.id}/stream",
        }


#: Does the work of a job: publishes events and returns the result, or raises the RbeeError that it failed with.
Work = Callable[[Job], Awaitable[dict[str, Any] | None]]


class Jobs:
    """All jobs of one queen. ``lane`` says what an operation has to itself while it runs."""

    def __init__(
        self,
        work: Work,
        lane: Callable[[Operation], str | None],
        ended: Callable[[str, str], None] = lambda operation, state: None,
    ) -> None:
        """``ended`` is told the operation and the state in which a job has ended."""
        self._work, self._lane, self._ended = work, lane, ended
        self._jobs: dict[str, Job] = {}
        self._lanes: dict[str, asyncio.Lock] = {}

    def submit(self, operation: Operation, caller: Mapping[str, Any] | None = None) -> Job:
        """Begin a job; raises RateLimited when too many are under way."""
        running = sum(not job.finished for job in self._jobs.values())
        if running >= UNFINISHED_MAX:
            raise RateLimited(
                f"{running} jobs are under way, {UNFINISHED_MAX} are allowed",
                hint="GET /v1/jobs",
                retry_after_s=5,
                limit=UNFINISHED_MAX,
            )
        job = Job(operation, correlation_id=correlation.get(), caller=caller or {})
        self._jobs[job.id] = job
        self._forget_old()
        job.task = asyncio.create_task(self._run(job), name=job.id)
        return job

    def get(self, job_id: str) -> Job:
        """Return a job; raises JobNotFound."""
        if (job := self._jobs.get(job_id)) is None:
            raise JobNotFound("no such job", hint="GET /v1/jobs lists them")
        return job

    def all(self) -> list[Job]:
        """Return all jobs, newest first."""
        return list(reversed(self._jobs.values()))

    async def cancel(self, job_id: str) -> None:
        """End a job with everything that it started; one that has ended stays as it is. Raises JobNotFound."""
        await _cancelled(self.get(job_id))

    async def close(self) -> None:
        """Cancel all that run."""
        await _cancelled(*self._jobs.values())

    def _forget_old(self) -> None:
        finished = [job.id for job in self._jobs.values() if job.finished]
        for job_id in finished[: max(0, len(finished) - FINISHED_MAX)]:
            del self._jobs[job_id]

    async def _run(self, job: Job) -> None:
        """Run one job to its end, whatever that is."""
        try:
            lane = self._lane(job.operation)
            if lane is None:
                await self._execute(job)
                return
            lock = self._lanes.setdefault(lane, asyncio.Lock())
            if lock.locked():
                job.narrate("queen", "wait", f"another job works on {lane}")
            async with lock:
                await self._execute(job)
        except asyncio.CancelledError:
            job.finish(JobState.CANCELLED, RequestCanceled("the job was cancelled"))
        except RbeeError as e:
            job.finish(JobState.FAILED, e)
        except Exception:
            logger.exception("job failed", extra={"job_id": job.id})
            job.finish(JobState.FAILED, RbeeError("internal error; the queen's log has the details under this job's id"))
        finally:
            self._ended(job.operation.operation, job.state.value)

    async def _execute(self, job: Job) -> None:
        job.state, job.started_at = JobState.RUNNING, time.time()
        job.narrate("queen", "route_job", f"{job.operation.operation}{f' on {job.operation.node}' if job.operation.node else ''}")
        job.result = await self._work(job)
        if job.result is not None:
            job.publish({"type": "result", "data": job.result})
        job.narrate("queen", "done", f"{job.operation.operation} completed")
        job.finish(JobState.COMPLETED)


async def _cancelled(*jobs: Job) -> None:
    """Cancel those that run and return when all have ended. Each once: another time would break off the end that has begun."""
    running = {job.task: job for job in jobs if job.task is not None and not job.task.done()}
    for task, job in running.items():
        if not job.ending:
            job.ending = True
            task.cancel()
    if running:
        await asyncio.wait(running)
