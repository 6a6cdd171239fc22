"""The queen's application: its parts put together, its routes, and who may call them."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import Router

from rbee_serve.common.apis import anthropic_api, embeddings, ollama_api, openai_api, responses_api
from rbee_serve.common.audit import AuditLog
from rbee_serve.common.credentials import ClientKeys, fingerprint
from rbee_serve.common.http import RequestLimits, create_base_app
from rbee_serve.common.openapi import with_document
from rbee_serve.contract.errors import InvalidApiKey
from rbee_serve.contract.keys import ClientKey
from rbee_serve.contract.settings import QueenSettings
from rbee_serve.queen import job_commands, jobs_api, native_api
from rbee_serve.queen.backend import FleetBackend
from rbee_serve.queen.http_client import Client, PooledClient
from rbee_serve.queen.internal import Internal
from rbee_serve.queen.job_runner import JobRunner
from rbee_serve.queen.jobs import Jobs
from rbee_serve.queen.memory import Memory
from rbee_serve.queen.metrics import Metrics
from rbee_serve.queen.registry import Registry
from rbee_serve.queen.relay import Relay
from rbee_serve.queen.state import Queen
from rbee_serve.queen.upstream import Limits

_APIS = (openai_api, embeddings, responses_api, anthropic_api, ollama_api)


def create_app(
    settings: QueenSettings,
    *,
    client_keys: ClientKeys | None = None,
    fleet_token: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    audit: AuditLog | None = None,
) -> Starlette:
    """Return the application; ``app.state.queen`` holds its parts (a ``state.Queen``).

    ``client_keys``: None asks clients for no key. ``fleet_token``: None asks workers for none. ``clock``: monotonic
    seconds.
    """
    limits = Limits(settings.connect_timeout_s, settings.first_byte_timeout_s, settings.stall_timeout_s)
    registry = Registry(settings.stale_after_s, settings.forget_after_s)
    metrics = Metrics()
    client: Client = PooledClient(settings.connect_timeout_s, settings.dead_peer_timeout_s)
    relay = Relay(
        registry,
        client,
        fleet_token,
        limits,
        metrics,
        settings.request_timeout_s,
        clock,
        queue_max=settings.queue_max,
        queue_timeout_s=settings.queue_timeout_s,
        load_timeout_s=settings.load_timeout_s,
    )
    queen = Queen(settings, registry, metrics, relay, clock, fleet_token, client_keys, audit)

    state_dir = settings.state_dir or (Path(d.split(":")[0]) if (d := os.environ.get("STATE_DIRECTORY")) else None)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        memory = Memory(registry, state_dir) if state_dir is not None else None
        if memory is not None:
            memory.load(clock())
        try:
            yield
        finally:
            if memory is not None:
                await memory.aclose()
            await jobs.close()
            await queen.tapes.aclose()
            await relay.aclose()
            if audit is not None:
                audit.close()

    def authenticate(token: str, path: str) -> ClientKey | bool:
        """Workers hold the fleet token and clients a key; neither opens the other's door (heartbeats look themselves)."""
        if path == native_api.HEARTBEAT_PATH:
            return True
        key = client_keys.find(token) if client_keys is not None else None
        if key is None:
            queen.record("auth.refused", path=path[:200], key_fingerprint=fingerprint(token))
        if key is not None and key.expires_at is not None and key.expires_at <= time.time():
            raise InvalidApiKey(
                f"key {key.name!r} has expired", hint="ask for a new one: rbee-ctl key create NAME", expired_at=key.expires_at
            )
        return key or False

    backend = FleetBackend(queen)
    native = native_api.routes(queen)
    jobs = Jobs(JobRunner(settings, Internal(Router(native))).run, job_commands.lane, metrics.job_ended)
    app = create_base_app(
        with_document([*native, *jobs_api.routes(queen, jobs), *(r for api in _APIS for r in api.routes(backend))], "rbee queen"),
        authenticate=authenticate if client_keys is not None else None,
        limits=RequestLimits.of(settings),
        lifespan=lifespan,
        on_error=lambda error: metrics.errors.labels(code=error.code).inc(),
        error_shapes={path: shape for api in _APIS for path, shape in api.ERROR_SHAPES.items()},
    )
    app.state.queen = queen
    return app
