"""All streams of the queen: opened, told of workers that leave, counted when they end."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from functools import partial

from rbee_serve.contract.api import InferenceRequest, StopReason, WorkerState
from rbee_serve.contract.errors import RbeeError, RequestCanceled
from rbee_serve.queen.http_client import BrokenError
from rbee_serve.queen.parts import Parts
from rbee_serve.queen.placement import resolve
from rbee_serve.queen.registry import Worker
from rbee_serve.queen.stream import Api, CancelledByRequestError, Stream

__all__ = ["Api", "Relay", "Stream"]

logger = logging.getLogger(__name__)

#: States of a worker that wants to be rid of its streams.
_LEAVING = frozenset({WorkerState.DRAINING, WorkerState.RETIRING})


@dataclass(slots=True)
class Relay(Parts):
    """Opens streams and knows those that run."""

    streams: dict[str, Stream] = field(default_factory=dict)  # running ones, by request id
    quiet: asyncio.Event = field(default_factory=asyncio.Event)  # set when the last of them has ended

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
        model = resolve(self.registry, request.model, self.clock(), request.worker_id)
        stream = Stream(self, request, model, correlation_id, deadline, key)
        self._opened(stream, api)
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

    def _opened(self, stream: Stream, api: Api) -> None:
        self.metrics.connections.inc()
        self.streams[stream.id] = stream
        self.quiet.clear()
        stream.on_close.append(partial(self._closed, stream, api))

    def _closed(self, stream: Stream, api: Api) -> None:
        self.streams.pop(stream.id, None)
        if not self.streams:
            self.quiet.set()
        self.metrics.connections.dec()
        self.metrics.requests.labels(api=api, outcome=stream.outcome).inc()

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
