"""The worker's HTTP interface (SPEC 3.4)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_serve import __version__
from rbee_serve.common import http
from rbee_serve.common.credentials import same
from rbee_serve.contract import events
from rbee_serve.contract.api import API_VERSION, DEADLINE_HEADER, REQUEST_ID_HEADER, InferenceRequest, parse
from rbee_serve.contract.errors import InvalidRequest, RbeeError, RequestCanceled
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.engine.protocol import Engine
from rbee_serve.worker.heartbeat import Heart
from rbee_serve.worker.inference import Inference
from rbee_serve.worker.metrics import CONTENT_TYPE, WorkerMetrics
from rbee_serve.worker.state import WorkerStatus

logger = logging.getLogger(__name__)

_REQUEST_ID_RE = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Worker:
    """State and endpoints of one worker process."""

    def __init__(self, settings: WorkerSettings, engine: Engine, token: str | None, request_exit: Callable[[], None]) -> None:
        """``request_exit`` asks the server to shut down as SIGTERM would."""
        self.settings, self.engine = settings, engine
        self.status = WorkerStatus(settings, engine)
        self.metrics = WorkerMetrics(engine, settings.slots)
        self.inference = Inference(settings, engine, self.status, self.metrics)
        self.heart = Heart(settings, self.status, token)
        self._token, self._request_exit = token, request_exit

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/health", self.health),
            Route("/v1/health", self.health),
            Route("/v1/ready", self.ready),
            Route("/v1/loading/progress", self.loading_progress),
            Route("/v1/inference", self.infer, methods=["POST"]),
            Route("/v1/inference/{request_id}", self.cancel, methods=["DELETE"]),
            Route("/v1/tokenize", self.tokenize, methods=["POST"]),
            Route("/v1/admin/drain", self.drain, methods=["POST"]),
            Route("/v1/admin/shutdown", self.shutdown, methods=["POST"]),
            Route("/info", self.info),
            Route("/v1/info", self.info),
            Route("/metrics", self.render_metrics),
        ]
        token = self._token
        return http.create_base_app(
            routes,
            authenticate=None if token is None else lambda given, _path: same(given, token),
            body_max_bytes=self.settings.body_max_bytes,
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        await self.engine.start()
        tasks = [asyncio.create_task(self.heart.run()), asyncio.create_task(self._beat_on_progress())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.engine.close()
            await self.heart.last_beat()
            await self.heart.close()

    async def _beat_on_progress(self) -> None:
        """Each change of stage is news for the queen; layers are not."""
        progress = self.engine.progress
        while True:
            stage = progress.stage
            progress = await self.engine.wait_progress(progress)
            if progress.stage != stage:
                self.status.notice()

    async def begin_drain(self) -> None:
        """Refuse new work, tell the queen, and return when running streams have ended or their time is up."""
        self.status.drain()
        end = time.monotonic() + self.settings.drain_timeout_s
        while self.inference.running and time.monotonic() < end:  # noqa: ASYNC110 - the count has no event, and 50 ms are nothing here
            await asyncio.sleep(0.05)
        if self.inference.running:
            logger.warning(
                "%d streams did not end within %g s and are cut", self.inference.running, self.settings.drain_timeout_s
            )

    # --- endpoints ----------------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """Answer that the process lives."""
        return http.JsonResponse({"status": "alive", "version": __version__, "api_version": API_VERSION})

    async def ready(self, _: Request) -> Response:
        """Say whether inference would work now."""
        progress = self.engine.progress
        body: dict[str, Any] = {"ready": False, "state": self.status.state.value}
        if progress.stage == "ready":
            body |= {"ready": not self.status.draining, "model_loaded": True}
        elif progress.stage == "failed":
            body |= {"model_loaded": False, "error": progress.error}
        else:
            body |= {"model_loaded": False, "progress_url": f"{self.settings.public_url}/v1/loading/progress"}
        return http.JsonResponse(body)

    async def loading_progress(self, _: Request) -> Any:
        """Stream loading progress; after loading, its result at once."""

        async def body() -> AsyncGenerator[bytes, None]:
            progress = self.engine.progress
            while True:
                if progress.stage == "failed":
                    yield events.encode(events.loading("failed", code=progress.error_code, message=progress.error))
                    break
                figures = {"layers_loaded": progress.layers_loaded, "layers_total": progress.layers_total}
                info = self.engine.info
                if progress.stage == "ready":
                    yield events.encode(
                        events.loading("ready", **figures, vram_mb=(info.device_memory_bytes >> 20) if info else 0)
                    )
                    break
                if progress.layers_total:
                    yield events.encode(events.loading("loading_to_vram", **figures))
                progress = await self.engine.wait_progress(progress)
            yield events.DONE

        return http.sse(body(), ping_interval_s=self.settings.ping_interval_s)

    async def infer(self, request: Request) -> Any:
        """Generate: an event stream, or one JSON with ``stream: false``."""
        wanted = parse(InferenceRequest, await http.read_json(request))
        given = request.headers.get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID_RE.fullmatch(given) else f"req-{uuid.uuid4()}"
        prepared = self.inference.prepare(wanted, request_id)
        deadline = _deadline(request, wanted)
        headers = {REQUEST_ID_HEADER: request_id}
        stream = self.inference.stream(prepared, deadline)
        if not wanted.stream:
            answer = await _while_connected(request, self.inference.collect(stream))
            return http.JsonResponse(answer, headers=headers)
        try:
            # Refusals (busy, prompt too long) come before the first event and are the answer's status.
            first = await anext(stream)
        except BaseException:
            await stream.aclose()
            raise
        return http.sse(_encoded(first, stream), ping_interval_s=self.settings.ping_interval_s, headers=headers)

    async def cancel(self, request: Request) -> Response:
        """End a request; 204 also when it is unknown or has ended."""
        self.inference.cancel(request.path_params["request_id"])
        return Response(status_code=204)

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a text."""
        body = await http.read_json(request)
        text = body.get("text")
        if not isinstance(text, str):
            raise InvalidRequest("text: a string expected", field="text")
        self.status.refuse_unless_ready()
        ids = await self.engine.tokenize(text, parse_special=bool(body.get("parse_special")), add_bos=bool(body.get("add_bos")))
        return http.JsonResponse({"token_ids": ids, "count": len(ids)})

    async def drain(self, _: Request) -> Response:
        """Take nothing new from now on; running streams go on."""
        self.status.drain()
        return http.JsonResponse({"state": self.status.state.value}, status_code=202)

    async def shutdown(self, _: Request) -> Response:
        """Drain and exit 0."""
        self.status.drain()
        self._request_exit()
        return http.JsonResponse({"state": self.status.state.value}, status_code=202)

    async def info(self, _: Request) -> Response:
        """Return the record that the queen gets, and what llama.cpp loaded."""
        info = self.engine.info
        body = self.status.record().model_dump(mode="json")
        if info is not None:
            body["engine"] = {"devices": info.devices, "threads": info.threads, "layers": info.layers, **info.metadata}
        return http.JsonResponse(body)

    async def render_metrics(self, _: Request) -> Response:
        """Prometheus."""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)


async def _encoded(first: events.Event, stream: AsyncGenerator[events.Event, None]) -> AsyncGenerator[bytes, None]:
    """Yield the stream as SSE bytes; an error on the way is its last event, and ``[DONE]`` always comes."""
    try:
        yield events.encode(first)
        async for event in stream:
            yield events.encode(event)
    except RbeeError as e:
        yield events.encode(events.error(e, http.correlation_id()))
    finally:
        await stream.aclose()
    yield events.DONE


def _deadline(request: Request, wanted: InferenceRequest) -> float | None:
    """Return the earlier of header and timeout_s, seconds since the epoch; the header can not be lengthened."""
    given = request.headers.get(DEADLINE_HEADER)
    deadlines = [time.time() + wanted.timeout_s] if wanted.timeout_s else []
    if given is not None:
        try:
            deadlines.append(float(given))
        except ValueError:
            raise InvalidRequest(f"{DEADLINE_HEADER}: seconds since the epoch expected", field=DEADLINE_HEADER) from None
    return min(deadlines, default=None)


async def _while_connected(request: Request, work: Any) -> Any:
    """Return what ``work`` returns; when the client leaves first, cancel it (which frees the slot)."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestCanceled("the client closed the connection")
        return task.result()
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
