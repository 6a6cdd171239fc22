"""The worker's application: its routes but inference (SPEC 3.4), and who may call them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from rbee_serve import __version__
from rbee_serve.common.apis import embeddings, openai_api
from rbee_serve.common.credentials import same
from rbee_serve.common.http import JsonResponse, RequestLimits, create_base_app, sse
from rbee_serve.common.openapi import takes, with_document
from rbee_serve.common.sdnotify import Notifier
from rbee_serve.contract import events
from rbee_serve.contract.api import API_VERSION, SERVICE_NAME, WorkerState
from rbee_serve.contract.errors import WorkerDraining
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker import text_api
from rbee_serve.worker.backend import WorkerBackend
from rbee_serve.worker.engine.protocol import Engine
from rbee_serve.worker.inference import InferenceApi
from rbee_serve.worker.lifecycle import Lifecycle
from rbee_serve.worker.metrics import CONTENT_TYPE, Metrics
from rbee_serve.worker.state import NO_ROOM, Worker


def create_app(
    settings: WorkerSettings,
    engine: Engine,
    *,
    fleet_token: str | None = None,
    notifier: Notifier | None = None,
    leave: Callable[[], None] = lambda: None,
) -> Starlette:
    """Return the application; ``app.state.worker``, ``.lifecycle`` and ``.heartbeat`` are its parts.

    ``fleet_token`` None asks for no token. ``leave`` makes the server begin its shutdown.
    """
    worker = Worker(settings, engine, Metrics())
    worker.fleet_token = fleet_token
    heartbeat = None
    if settings.queen_url:
        from rbee_serve.worker.heartbeat import HeartbeatSender  # httpx takes 0.1 s of a start: only where it is needed

        heartbeat = HeartbeatSender(worker, settings.queen_url, fleet_token)
    lifecycle = Lifecycle(worker, notifier or Notifier({}), heartbeat, leave)

    def authenticate(token: str, _: str) -> bool:
        return worker.fleet_token is not None and same(token, worker.fleet_token)

    app = create_base_app(
        with_document(_routes(worker, lifecycle), "rbee worker"),
        authenticate=authenticate if fleet_token is not None else None,
        limits=RequestLimits.of(settings),
        lifespan=lambda _: lifecycle.run(),
        error_shapes=openai_api.ERROR_SHAPES | embeddings.ERROR_SHAPES,
    )
    app.state.worker, app.state.lifecycle, app.state.heartbeat = worker, lifecycle, heartbeat
    return app


def _routes(worker: Worker, lifecycle: Lifecycle) -> list[Route]:
    api, inference = WorkerApi(worker, lifecycle), InferenceApi(worker)
    backend = WorkerBackend(worker, inference)
    return [
        Route("/health", api.health),
        Route("/v1/health", api.health),
        Route("/v1/ready", api.ready),
        Route("/v1/loading/progress", api.loading),
        Route("/v1/inference", inference.infer, methods=["POST"]),
        Route("/v1/inference/{request_id}", inference.cancel, methods=["DELETE"]),
        Route("/v1/admin/drain", api.drain, methods=["POST"]),
        Route("/v1/admin/shutdown", api.shutdown, methods=["POST"]),
        Route("/info", api.info),
        Route("/v1/info", api.info),
        Route("/metrics", api.metrics),
        *text_api.routes(worker),
        *openai_api.routes(backend),
        *embeddings.routes(backend),
    ]


class WorkerApi:
    """Endpoints, answered from memory."""

    def __init__(self, worker: Worker, lifecycle: Lifecycle) -> None:
        self._worker, self._lifecycle = worker, lifecycle

    async def health(self, _: Request) -> Response:
        """Say that the process lives; the one route without a token."""
        return JsonResponse({"status": "alive", "version": __version__, "api_version": API_VERSION})

    async def ready(self, _: Request) -> Response:
        """Say whether requests are taken, and while loading where progress can be followed."""
        state = self._worker.state
        loaded = self._worker.engine.info is not None and state is not WorkerState.FAILED
        body: dict[str, object] = {
            "ready": state in (WorkerState.IDLE, WorkerState.BUSY),
            "state": state.value,
            "model_loaded": loaded,
        }
        if state is WorkerState.LOADING:
            body["progress_url"] = f"{self._worker.settings.public_url}/v1/loading/progress"
        return JsonResponse(body)

    @takes(streams="text/event-stream")
    async def loading(self, _: Request) -> ASGIApp:
        """Stream the progress of loading; after it, ``ready`` at once."""
        return sse(self._progress(), ping_interval_s=self._worker.settings.ping_interval_s)

    async def _progress(self) -> AsyncGenerator[bytes, None]:
        engine = self._worker.engine
        progress = engine.progress
        while progress.stage not in ("ready", "failed"):
            figures = {"layers_loaded": progress.layers_loaded, "layers_total": progress.layers_total}
            yield events.encode(events.loading("loading_to_vram", **figures))
            try:
                progress = await self._worker.next_progress(progress)
            except WorkerDraining as e:
                yield events.encode(events.loading("failed", code=e.code, message=e.message, **figures)) + events.DONE
                return
        figures = {"layers_loaded": progress.layers_loaded, "layers_total": progress.layers_total}
        if progress.stage == "failed":
            # The reason may name paths of this machine: it stands in the journal (SPEC E-29).
            code = progress.error_code or "INTERNAL_ERROR"
            message = "the model could not be loaded; the worker's journal says why"
            if code in NO_ROOM and progress.error:
                message = progress.error
            yield events.encode(events.loading("failed", code=code, message=message, **figures))
        else:
            info = engine.info
            vram_mb = info.device_memory_bytes >> 20 if info else 0
            yield events.encode(events.loading("ready", **figures, vram_mb=vram_mb))
        yield events.DONE

    async def drain(self, _: Request) -> Response:
        """Take nothing new; exit 0 when the last running request has ended."""
        self._lifecycle.drain()
        return self._accepted()

    async def shutdown(self, _: Request) -> Response:
        """Do what SIGTERM does."""
        self._lifecycle.shutdown()
        return self._accepted()

    def _accepted(self) -> Response:
        body = {"state": WorkerState.DRAINING.value, "requests_in_progress": len(self._worker.active)}
        return JsonResponse(body, status_code=202)

    async def info(self, _: Request) -> Response:
        """Show the worker's record (SPEC 3.6); ``registered``: the queen has taken note of the state it is in now."""
        worker = self._worker
        record, registered = worker.record().model_dump(mode="json"), worker.told is worker.state
        about = {"name": SERVICE_NAME, "role": "worker", "api_version": API_VERSION}
        return JsonResponse(about | {"registered": registered, "worker": record})

    async def metrics(self, _: Request) -> Response:
        """Answer Prometheus."""
        worker, info = self._worker, self._worker.engine.info
        text = worker.metrics.render(
            slots_total=worker.settings.slots,
            slots_busy=worker.slots_busy,
            vram_bytes=info.device_memory_bytes if info else 0,
            engine=worker.engine.totals,
        )
        return Response(text, media_type=CONTENT_TYPE)
