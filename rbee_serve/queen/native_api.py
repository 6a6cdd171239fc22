"""The queen's own routes (SPEC 3.2): inference, workers, hives, status, heartbeats, metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_serve import __version__
from rbee_serve.common.credentials import same
from rbee_serve.common.http import JsonResponse, bearer_token, correlation_id, read_json, sse, while_connected
from rbee_serve.common.openapi import takes
from rbee_serve.contract.api import (
    API_VERSION,
    CACHED_HEADER,
    PLACEMENT_HEADER,
    QUEUED_HEADER,
    REATTACH_HEADER,
    REQUEST_ID_HEADER,
    SERVICE_NAME,
    WORKER_HEADER,
    Heartbeat,
    InferenceRequest,
    WorkerState,
    parse,
)
from rbee_serve.contract.errors import InvalidApiKey, InvalidRequest, OperationNotAllowed
from rbee_serve.contract.events import DONE
from rbee_serve.contract.hives import node_not_found
from rbee_serve.queen.hives import slots
from rbee_serve.queen.metrics import CONTENT_TYPE
from rbee_serve.queen.reattach import Attached, Tape
from rbee_serve.queen.registry import BeatOutcome, Worker
from rbee_serve.queen.relay import Stream
from rbee_serve.queen.state import Closing, Queen, caller, collect, require_admin

logger = logging.getLogger(__name__)

HEARTBEAT_PATH = "/v1/worker-heartbeat"
_WORKER_FILTERS = ("node", "model", "state")


def routes(queen: Queen) -> list[Route]:
    """Return the native routes."""
    api = NativeApi(queen)
    return [
        Route("/health", api.health),
        Route("/v1/health", api.health),
        Route("/v1/info", api.info),
        Route("/v1/status", api.status),
        Route("/v1/hives", api.hives),
        Route("/v1/workers", api.workers),
        Route("/v1/hives/{node}", api.hive),
        Route("/v1/workers/{worker_id}", api.worker),
        Route("/v1/workers/{worker_id}", api.remove, methods=["DELETE"]),
        Route("/v1/workers/{worker_id}/retire", api.retire, methods=["POST"]),
        Route(HEARTBEAT_PATH, api.heartbeat, methods=["POST"]),
        Route("/v1/shutdown", api.shutdown, methods=["POST"]),
        Route("/v1/inference", api.inference, methods=["POST"]),
        Route("/v1/inference/{request_id}", api.cancel, methods=["DELETE"]),
        Route("/v1/inference/{request_id}/stream", api.resume),
        Route("/metrics", api.metrics),
    ]


def stream_headers(stream: Stream) -> dict[str, str]:
    """Return the headers by which the queen says what it did: which worker and why, how long the request had to wait, how
    many tokens of the prompt the worker had in its cache. A stream that still waits has no worker yet."""
    headers = {REQUEST_ID_HEADER: stream.id}
    if stream.worker is None or stream.placement is None:
        return headers | {PLACEMENT_HEADER: "queued"}
    headers |= {WORKER_HEADER: stream.worker.id, PLACEMENT_HEADER: stream.placement, QUEUED_HEADER: f"{stream.queued_ms:.0f}"}
    if stream.cached_tokens is not None:
        headers[CACHED_HEADER] = str(stream.cached_tokens)
    return headers


async def _native_body(stream: Stream) -> AsyncGenerator[bytes]:
    async with aclosing(stream.events()) as batches:
        async for batch in batches:
            yield b"".join([frame for frame, _ in batch])  # the worker's own frames go through as they came
    yield DONE


class NativeApi:
    """Endpoints; everything but inference is answered from memory."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    async def health(self, _: Request) -> Response:
        """Say that the process lives; the one route without a key."""
        return JsonResponse({"status": "alive", "version": __version__, "api_version": API_VERSION})

    async def info(self, request: Request) -> Response:
        """Say what this is and where."""
        base_url = str(request.base_url).rstrip("/")
        return JsonResponse(
            {
                "name": SERVICE_NAME,
                "role": "queen",
                "version": __version__,
                "api_version": API_VERSION,
                "base_url": base_url,
                "openai_base_url": f"{base_url}/v1",
                "started_at": self._queen.started_at,
            }
        )

    @takes(InferenceRequest, streams="text/event-stream")
    async def inference(self, request: Request) -> Response | Closing | Attached:
        """Relay one generation, streamed or whole."""
        queen = self._queen
        wanted = parse(InferenceRequest, await read_json(request))
        keep_s = queen.tapes.wanted_s(request.headers.get(REATTACH_HEADER)) if wanted.stream else None
        stream = await queen.open_stream(request, wanted, "native", correlation_id())
        headers = stream_headers(stream)
        if keep_s is not None and (tape := queen.tapes.record(stream, keep_s)) is not None:
            return self._attached(tape, 0, headers)
        if wanted.stream:
            body = sse(_native_body(stream), ping_interval_s=queen.settings.ping_interval_s, headers=headers)
            return Closing(body, stream)
        began = time.perf_counter()
        try:
            text = await while_connected(request, collect(stream))
        finally:
            await stream.aclose()
        stopped = {"stop_sequence": stream.stop_sequence} if stream.stop_sequence is not None else {}
        return JsonResponse(
            {
                "request_id": stream.id,
                "model": stream.model,
                "worker_id": stream.worker.id if stream.worker else None,
                "text": text,
                "tokens_generated": stream.tokens_out,
                "prompt_tokens": stream.prompt_tokens,
                "cached_tokens": stream.cached_tokens,
                "queued_ms": round(stream.queued_ms),
                "token_ids": stream.ids,
                "seed": stream.seed,
                "stop_reason": stream.outcome,
                "duration_ms": round((time.perf_counter() - began) * 1000, 1),
                **stopped,
            },
            headers=headers,
        )

    async def resume(self, request: Request) -> Attached:
        """Send the rest of a stream that was asked for with ``X-Rbee-Reattach``, after the event that the client had last."""
        key = caller(request)
        tape = self._queen.tapes.find(request.path_params["request_id"], key.id if key is not None else "")
        last = request.headers.get("last-event-id", "-1")
        if not last.lstrip("-").isdecimal():
            raise InvalidRequest("Last-Event-ID: the number of an event's `id:` line expected", field="Last-Event-ID")
        return self._attached(tape, max(0, int(last) + 1), stream_headers(tape.stream))

    def _attached(self, tape: Tape, first: int, headers: dict[str, str]) -> Attached:
        headers = headers | {REATTACH_HEADER: f"{tape.keep_s:g}"}
        body = sse(tape.read(first), ping_interval_s=self._queen.settings.ping_interval_s, headers=headers)
        return Attached(body, tape)

    async def cancel(self, request: Request) -> Response:
        """End a running request: 204, also when it has ended or never was (SPEC 3.4)."""
        stream = self._queen.relay.streams.get(request.path_params["request_id"])
        if stream is not None:
            stream.cancel()
        return Response(status_code=204)

    @takes(Heartbeat)
    async def heartbeat(self, request: Request) -> Response:
        """Take a worker's heartbeat; its key is the fleet token."""
        queen = self._queen
        # Checked here and not at the gate: where clients need no key, workers still need theirs.
        if queen.fleet_token is not None and not same(bearer_token(_authorization(request)), queen.fleet_token):
            queen.record("auth.refused", path=HEARTBEAT_PATH)
            raise InvalidApiKey(
                "not the fleet token of this queen", hint="run site.yml again: it brings queen and workers in line"
            )
        beat = parse(Heartbeat, await read_json(request))
        outcome = queen.registry.beat(beat, queen.clock())
        queen.metrics.heartbeats.labels(outcome=outcome.value).inc()
        if (known := queen.registry.known(beat.worker.id)) is not None:
            queen.relay.heard_of(known)
        if outcome in (BeatOutcome.REGISTERED, BeatOutcome.REMOVED):
            worker = beat.worker
            facts = {"worker_id": worker.id, "model": worker.model_id, "url": worker.url, "state": worker.status.value}
            logger.info("worker %s", outcome.value, extra=facts)
            queen.record(f"worker.{outcome.value}", **facts)
        return JsonResponse({"status": "ok", "message": outcome.value})

    @takes(query=_WORKER_FILTERS)
    async def workers(self, request: Request) -> Response:
        """List live workers, filtered by ``node``, ``model`` and ``state``."""
        query = dict(request.query_params)
        if unknown := sorted(query.keys() - set(_WORKER_FILTERS)):
            raise InvalidRequest(f"{unknown[0]}: unknown filter; known: {', '.join(_WORKER_FILTERS)}", field=unknown[0])
        state = query.get("state")
        if state is not None and state not in set(WorkerState):
            raise InvalidRequest(f"state: unknown; known: {', '.join(WorkerState)}", field="state")
        now = self._queen.clock()
        found = [
            self._record(w, now)
            for w in self._queen.registry.live(now)
            if query.get("node") in (None, w.record.hive_id)
            and query.get("model") in (None, w.record.model_id, w.record.model_ref)
            and state in (None, w.state)
        ]
        return JsonResponse({"workers": found})

    async def worker(self, request: Request) -> Response:
        """Show one live worker."""
        now = self._queen.clock()
        return JsonResponse(self._record(self._queen.registry.get(request.path_params["worker_id"], now), now))

    async def retire(self, request: Request) -> Response:
        """Give a worker no more requests, move those it has, let it end (SPEC OP-27). Holds over restarts of the queen."""
        worker = await self._retire(request, "/v1/admin/drain")
        return JsonResponse(self._record(worker, self._queen.clock()))

    async def remove(self, request: Request) -> Response:
        """As ``retire``, but it ends as by SIGTERM and is forgotten here at once."""
        worker = await self._retire(request, "/v1/admin/shutdown")
        self._queen.registry.remove(worker)
        return Response(status_code=204)

    async def shutdown(self, request: Request) -> Response:
        """End the fleet's processes: every worker that is awake as by SIGTERM, then the queen itself (SPEC 3.2, X-07).

        What a machine's systemd would start again (at its next boot, by a connection to a sleeping worker's socket) is the
        machine's own business: ``rbee-ctl queen stop`` stops the units.
        """
        queen, key = self._queen, require_admin(request, "shut the fleet down")
        if key is None:  # any page in a browser on this machine could send it
            raise OperationNotAllowed(
                "this queen asks for no key, so nobody may end it over HTTP", hint="give it client keys, or send it SIGTERM"
            )
        awake = [w for w in queen.registry.live(queen.clock()) if w.record.status is not WorkerState.DORMANT]
        for worker in awake:
            queen.registry.retire(worker)
        told = await asyncio.gather(*(queen.relay.tell(w, "/v1/admin/shutdown") for w in awake))
        answers = {w.id: "told" if heard else "not reached" for w, heard in zip(awake, told, strict=True)}
        logger.warning("shutting down by request", extra={"workers": answers})
        queen.record("queen.shutdown", workers=answers, key=key.name)
        queen.leave()
        return JsonResponse({"state": "draining", "workers": answers}, status_code=202)

    async def _retire(self, request: Request, path: str) -> Worker:
        queen, key = self._queen, require_admin(request, "retire workers")
        worker = queen.registry.get(request.path_params["worker_id"], queen.clock())
        asleep = worker.record.status is WorkerState.DORMANT
        queen.registry.retire(worker)
        queen.relay.heard_of(worker)
        # Nobody wakes a worker to send it away.
        told = not asleep and await queen.relay.tell(worker, path)
        logger.info("worker retired", extra={"worker_id": worker.id, "told": told})
        queen.record("worker.retired", worker_id=worker.id, key=key.name if key is not None else None)
        return worker

    async def hive(self, request: Request) -> Response:
        """Show one machine with the records of its workers."""
        name, now = request.path_params["node"], self._queen.clock()
        hives = {h["name"]: h for h in self._hives()}
        if name not in hives:
            raise node_not_found(name, list(hives))
        workers = [self._record(w, now) for w in self._queen.registry.live(now) if w.record.hive_id == name]
        return JsonResponse(hives[name] | {"workers": workers})

    async def hives(self, _: Request) -> Response:
        """List the machines that the inventory declares or live workers run on."""
        return JsonResponse({"hives": self._hives()})

    async def status(self, _: Request) -> Response:
        """Show queen, hives and workers at one glance (SPEC CAP-94)."""
        queen, now = self._queen, self._queen.clock()
        live = queen.registry.live(now)
        routable = [w for w in live if queen.registry.routable(w, now)]
        return JsonResponse(
            {
                "queen": {
                    "version": __version__,
                    "started_at": queen.started_at,
                    "uptime_s": round(time.time() - queen.started_at, 1),
                    "requests_in_progress": len(queen.relay.streams),
                    "requests_waiting": queen.relay.queue.depth(),
                },
                "hives": self._hives(),
                "workers": [self._record(w, now) for w in live],
                "states": Counter(w.state.value for w in live),
                "models": sorted({w.record.model_id for w in routable}),
                "slots": slots(routable),
            }
        )

    async def metrics(self, _: Request) -> Response:
        """Answer Prometheus."""
        queen = self._queen
        return Response(queen.metrics.render(queen.registry, queen.relay.queue.depth(), queen.clock()), media_type=CONTENT_TYPE)

    def _record(self, worker: Worker, now: float) -> dict[str, Any]:
        """Return the record of SPEC 3.6 plus what the queen knows of it."""
        return worker.record.model_dump(mode="json") | {
            "status": worker.state.value,
            "slots_available": worker.slots_free,
            "available": self._queen.registry.routable(worker, now) and worker.slots_free > 0,
            "in_flight": worker.in_flight,
            "failures": round(worker.failing(now), 2),
            "last_heartbeat_age_s": round(now - worker.seen_at, 1),
        }

    def _hives(self) -> list[dict[str, Any]]:
        return self._queen.hives.views(self._queen.registry.live(self._queen.clock()))


def _authorization(request: Request) -> bytes | None:
    value = request.headers.get("authorization")
    return None if value is None else value.encode("latin-1")
