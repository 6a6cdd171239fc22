"""What the queen's routes share. One object an application; nothing here is global."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from rbee_serve.common.audit import AuditLog
from rbee_serve.common.credentials import ClientKeys
from rbee_serve.common.http import deadline_of, while_connected
from rbee_serve.contract.api import InferenceRequest
from rbee_serve.contract.errors import NoWorkerAvailable, OperationNotAllowed, WorkerDraining
from rbee_serve.contract.keys import ClientKey
from rbee_serve.contract.settings import QueenSettings
from rbee_serve.queen.hives import Hives
from rbee_serve.queen.key_limits import KeyLimits
from rbee_serve.queen.metrics import Metrics
from rbee_serve.queen.placement import resolve
from rbee_serve.queen.reattach import Tapes
from rbee_serve.queen.registry import Registry, Worker
from rbee_serve.queen.relay import Api, Relay, Stream

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Queen:
    """The parts of one queen. ``clock`` is monotonic seconds, ``started_at`` seconds since the epoch."""

    settings: QueenSettings
    registry: Registry
    metrics: Metrics
    relay: Relay
    clock: Callable[[], float]
    fleet_token: str | None = None
    client_keys: ClientKeys | None = None
    audit: AuditLog | None = None
    started_at: float = field(default_factory=time.time)
    draining: bool = False
    leave: Callable[[], None] = lambda: None  # ends the process as SIGTERM does
    limits: KeyLimits = field(init=False)
    tapes: Tapes = field(init=False)
    hives: Hives = field(init=False)

    def __post_init__(self) -> None:
        self.limits = KeyLimits(self.clock)
        self.tapes = Tapes(self.settings.reattach_timeout_s)
        self.hives = Hives(self.settings.fleet_file)

    def record(self, event: str, **facts: object) -> None:
        """Write one line of the audit log, where there is one."""
        if self.audit is not None:
            self.audit.write(event, **facts)

    async def open_stream(self, http: Request, request: InferenceRequest, api: Api, correlation_id: str | None) -> Stream:
        """Open the stream while watching the client: one that leaves meanwhile costs no worker anything.

        Where ``request.stream`` is true the stream may still wait (for a slot, for a worker that loads) when this returns:
        ``stream.worker`` is None then, and ``events()`` begins with ``queued`` and ``loading``. Answer the client at once.
        Raises what ``Relay.open`` raises, RequestCanceled when the client has gone and NoWorkerAvailable while draining.
        """
        if self.draining:
            raise NoWorkerAvailable("the queen is shutting down", hint="try again in some seconds", retry_after_s=5)
        key = caller(http)
        deadline = deadline_of(http)
        lease = self.limits.admit(key, request.model) if key is not None else None
        opening: asyncio.Future[Stream] | None = None
        try:
            if key is not None and request.model is None:
                self.limits.check_model(key, resolve(self.registry, None, self.clock(), request.worker_id))
            opening = asyncio.ensure_future(
                self.relay.open(
                    request,
                    api=api,
                    correlation_id=correlation_id,
                    deadline=deadline,
                    key=key.id if key is not None else "",
                    patience_s=self.settings.ping_interval_s,
                )
            )
            stream = await while_connected(http, opening)
            if lease is not None:
                stream.on_close.append(lease.release)
        except BaseException:
            # The stream may have been opened in the very moment in which the client left.
            if opening is not None and opening.done() and not opening.cancelled() and opening.exception() is None:
                await opening.result().aclose()
            if lease is not None:
                lease.release()
            raise
        who = key.name if key is not None else None
        self.metrics.key_requests.labels(key=who or "").inc()
        facts = {"request": stream.id, "key": who, "api": api, "correlation_id": correlation_id}
        self.record("inference.start", **facts, model=stream.model)

        def assigned(worker: Worker) -> None:
            self.record("inference.assign", **facts, worker=worker.id, tokens_so_far=stream.tokens_out)

        if stream.placement is not None and stream.worker is not None:
            assigned(stream.worker)
        stream.on_assigned = assigned
        stream.on_close.append(lambda: self._ended(stream, facts))
        return stream

    def _ended(self, stream: Stream, facts: dict[str, str | None]) -> None:
        end = {
            "worker": stream.worker.id if stream.worker else None,
            "outcome": stream.outcome,
            "prompt_tokens": stream.prompt_tokens,
            "tokens_out": stream.tokens_out,
        }
        self.record("inference.end", **facts, **end)
        tokens = self.metrics.key_tokens
        tokens.labels(key=facts["key"] or "", kind="prompt").inc(stream.prompt_tokens)
        tokens.labels(key=facts["key"] or "", kind="generated").inc(stream.tokens_made)
        line = {"request_id": stream.id, "key": facts["key"], "api": facts["api"], "model": stream.model} | end
        logger.info("request ended", extra=line | {"queued_ms": round(stream.queued_ms), "duration_ms": stream.lasted_ms})

    async def drain(self) -> None:
        """Take nothing new, let running streams end within ``drain_timeout_s`` and tell the rest why they end (SPEC E-09)."""
        self.draining = True
        # While the socket is the next queen's, heartbeats are too.
        self.registry.stale_after_s += self.settings.drain_timeout_s
        with contextlib.suppress(TimeoutError):
            if self.relay.streams:
                await asyncio.wait_for(self.relay.quiet.wait(), self.settings.drain_timeout_s)
        for stream in list(self.relay.streams.values()):
            stream.abort(WorkerDraining("the queen was stopped before the answer was complete", tokens_out=stream.tokens_out))


def require_admin(http: Request, what: str) -> ClientKey | None:
    """Return the request's key; raise OperationNotAllowed where it may use models alone. A queen without keys asks nobody."""
    key = caller(http)
    if key is not None and not key.admin:
        raise OperationNotAllowed(
            f"key {key.name!r} may use models and nothing else: it may not {what}",
            hint="use the key that rbee-ctl uses, or make one: rbee-ctl key create NAME --admin",
        )
    return key


def caller(http: Request) -> ClientKey | None:
    """Return the key with which the request came; None where the queen asks for none."""
    found = getattr(http.state, "caller", None)
    return found if isinstance(found, ClientKey) else None


async def collect(stream: Stream) -> str:
    """Read the stream to its end and return the text; raises the error with which it ended, with the partial text."""
    pieces: list[str] = []
    async with contextlib.aclosing(stream.events()) as batches:
        async for batch in batches:
            pieces += [event["t"] for _, event in batch if event["type"] == "token"]
    text = "".join(pieces)
    if stream.error is not None:
        raise stream.error.with_details(partial_text=text, tokens_out=len(stream.ids))
    return text


class Closing:
    """A response that closes its stream in any case, also when not one byte of it was read."""

    def __init__(self, response: ASGIApp, stream: Stream) -> None:
        self._response = response
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await self._response(scope, receive, send)
        finally:
            await self._stream.aclose()
