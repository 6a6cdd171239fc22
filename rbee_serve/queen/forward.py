"""Requests that are answered at once and whole, asked of a worker of the model: embeddings, counts of tokens."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from http import HTTPStatus
from typing import Any

import orjson
from starlette.requests import Request

from rbee_serve.common.http import correlation_id, while_connected
from rbee_serve.contract.api import CORRELATION_HEADER, WorkerState
from rbee_serve.contract.errors import (
    AllSlotsBusy,
    ConnectionTimeout,
    MalformedResponse,
    NoWorkerAvailable,
    RbeeError,
    RequestError,
    WorkerDraining,
    WorkerLoading,
)
from rbee_serve.queen.http_client import BrokenError, Client, WokenError
from rbee_serve.queen.placement import Wanted, awaited, serves, why_nobody, worth_waiting_for
from rbee_serve.queen.registry import Worker
from rbee_serve.queen.state import Queen, caller
from rbee_serve.queen.upstream import error_of

logger = logging.getLogger(__name__)

_turn = itertools.count()
#: How often a request looks whether the worker has reported that it waits for, seconds.
_LOOK_S = 0.2


async def ask(queen: Queen, http: Request, model: str, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], Worker]:
    """Return a worker's answer and who it was, while watching the client.

    Nothing is lost by asking again, so a worker that can not answer is followed by the next one. Raises what
    ``placement.why_nobody`` does, the worker's own 4xx, RequestCanceled, or the last worker's failure.
    """
    if queen.draining:
        raise NoWorkerAvailable("the queen is shutting down", hint="try again in some seconds", retry_after_s=5)
    key = caller(http)
    lease = queen.limits.admit(key, model) if key is not None else None
    try:
        answer = await while_connected(http, _ask_any(queen, model, path, orjson.dumps(body)))
    finally:
        if lease is not None:
            lease.release()
    who = key.name if key is not None else None
    logger.info("answered", extra={"key": who, "path": path, "model": model, "worker": answer[1].id})
    queen.metrics.key_requests.labels(key=who or "").inc()
    return answer


async def _ask_any(queen: Queen, model: str, path: str, body: bytes) -> tuple[dict[str, Any], Worker]:
    relay, registry = queen.relay, queen.registry
    tried: set[Worker] = set()
    failure: RbeeError | None = None
    until = asyncio.get_running_loop().time() + queen.settings.request_timeout_s
    while True:
        worker = _next(queen, model, tried)
        if worker is None:
            if await _woken(queen, model, tried, until):
                continue
            raise failure or why_nobody(registry, Wanted(model=model), relay.clock(), tried)
        tried.add(worker)
        try:
            return await _ask(queen, worker, path, body, until), worker
        except RequestError:
            raise
        except RbeeError as e:
            failure = e
            if isinstance(e, WorkerLoading):
                registry.mark_state(worker, WorkerState.LOADING)
            elif isinstance(e, WorkerDraining):
                registry.mark_state(worker, WorkerState.DRAINING)
            elif not isinstance(e, AllSlotsBusy):
                registry.mark_failed(worker, relay.clock())


def _next(queen: Queen, model: str, tried: set[Worker]) -> Worker | None:
    """Return the most reliable, then least busy worker that is up; equals go round. What is asked here takes no slot."""
    registry, now = queen.registry, queen.relay.clock()
    up = [w for w in registry if w not in tried and serves(w, model) and registry.routable(w, now)]
    if not up:
        return None

    def cost(worker: Worker) -> tuple[float, float]:
        return worker.penalty(now), worker.busy / max(1, worker.record.slots_total)

    best = min(map(cost, up))
    equals = sorted((w for w in up if cost(w) == best), key=lambda w: w.id)
    return equals[next(_turn) % len(equals)]


async def _woken(queen: Queen, model: str, tried: set[Worker], until: float) -> bool:
    """Wait for a worker that loads, that can be woken, or that has yet to report to a new queen; say whether one came up."""
    relay, wanted, loop = queen.relay, Wanted(model=model), asyncio.get_running_loop()
    while not (hope := worth_waiting_for(queen.registry, wanted, relay.clock(), tried)):
        if not awaited(queen.registry, wanted, relay.clock()) or loop.time() >= until:
            return False
        await asyncio.sleep(_LOOK_S)
    waking = relay.waker.follow(hope)
    if waking is not None and waking.task is not None:
        await asyncio.wait((waking.task,))
        if waking.error is not None:
            raise waking.error
    return _next(queen, model, tried) is not None


async def _ask(queen: Queen, worker: Worker, path: str, body: bytes, until: float) -> dict[str, Any]:
    relay = queen.relay
    headers = {"content-type": "application/json"}
    if relay.token is not None:
        headers["authorization"] = f"Bearer {relay.token}"
    if (ident := correlation_id()) is not None:
        headers[CORRELATION_HEADER] = ident
    url = f"{worker.record.url.rstrip('/')}{path}"
    try:
        status, data = await _exchange(relay.client, url, body, headers, until)
    except (BrokenError, WokenError, TimeoutError) as e:
        raise ConnectionTimeout(f"worker {worker.id} did not answer ({e or 'in time'})", worker_id=worker.id) from e
    if status != HTTPStatus.OK:
        raise error_of(status, data, worker.id)
    found: Any = None
    with contextlib.suppress(orjson.JSONDecodeError):
        found = orjson.loads(data)
    if not isinstance(found, dict):
        raise MalformedResponse(f"worker {worker.id} sent an answer that cannot be read", worker_id=worker.id)
    return found


async def _exchange(client: Client, url: str, body: bytes, headers: dict[str, str], until: float) -> tuple[int, bytes]:
    for fresh in (False, True):
        async with asyncio.timeout_at(until):
            answer = await client.send("POST", url, body, headers, fresh=fresh)
        try:
            status = await answer.head(until)
            pieces = []
            while piece := await answer.read(until):
                pieces.append(piece)
            return status, b"".join(pieces)
        except BrokenError as e:
            if fresh or not e.stale:
                raise
        finally:
            answer.close()
    raise BrokenError("no answer")
