"""A stream's changes of worker: counted, logged with both workers, and told to the client (SPEC X-14, E-32)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from rbee_serve.contract.errors import (
    AllSlotsBusy,
    ConnectionTimeout,
    MalformedResponse,
    NoWorkerAvailable,
    RbeeError,
    WorkerCrashed,
    WorkerDraining,
    WorkerLoading,
)
from rbee_serve.contract.events import Event
from rbee_serve.queen.metrics import Metrics
from rbee_serve.queen.placement import continues_exactly
from rbee_serve.queen.registry import Worker

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class Moves:
    """Of one stream. ``ids``: its token ids so far, the stream's own list; ``given``: how many the client brought itself."""

    metrics: Metrics
    request_id: str
    ids: list[int]
    given: int

    def moved(self, before: Worker, after: Worker, cause: RbeeError, length: int, *, same_prompt: bool) -> Event | None:
        """``after`` goes on where ``before`` stopped; returns ``resumed``, None where the client has no token yet.

        ``length``: tokens that the context will hold at the end, at most: up to there the two must compute alike.
        ``same_prompt``: whether they go on from the same one.
        """
        facts = {"to_worker": after.id} | self.facts(before, cause)
        if len(self.ids) == self.given:
            self._count(cause, "before_first_token")
            logger.warning("request moved before its first token", extra=facts)
            return None
        mode = "exact" if same_prompt and continues_exactly(before, after, length) else "approximate"
        self._count(cause, mode)
        logger.warning("stream goes on at another worker", extra=facts | {"mode": mode})
        return {"type": "resumed", "mode": mode, "worker_id": after.id, "i": len(self.ids)}

    def unwanted(self, cause: RbeeError) -> None:
        """The client wants no continuation."""
        self._count(cause, "off")

    def impossible(self, before: Worker, cause: RbeeError) -> None:
        """Nobody goes on."""
        self._count(cause, "none")
        logger.error("stream lost: no other worker can go on", extra=self.facts(before, cause))

    def refused(self, worker: Worker, cause: RbeeError) -> None:
        """A worker did not take the request."""
        logger.warning("worker did not take a request", extra=self.facts(worker, cause))

    def stays(self, cause: BaseException) -> None:
        """The move away from a worker that drains came to nothing."""
        logger.info("a stream stays with the worker that drains", extra={"request_id": self.request_id, "reason": str(cause)})

    def facts(self, worker: Worker, cause: RbeeError) -> dict[str, Any]:
        """Return what a line of the log says of a worker that was left."""
        return {
            "from_worker": worker.id,
            "tokens_so_far": len(self.ids),
            "request_id": self.request_id,
            "code": cause.code,
            "reason": cause.message,
        }

    def _count(self, cause: RbeeError, mode: str) -> None:
        self.metrics.failovers.labels(cause=_CAUSES.get(cause.code, "other"), mode=mode).inc()
