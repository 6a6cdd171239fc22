"""What ``rbee-worker`` does once its engine process has been begun (main.py): check, test itself, serve."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from rbee_serve import __version__
from rbee_serve.common.credentials import is_loopback, load_secret, refreshed, require_auth_for_bind
from rbee_serve.common.http import RequestLimits
from rbee_serve.common.log import setup_logging
from rbee_serve.common.sdnotify import Notifier
from rbee_serve.common.serving import Leave, Server, run
from rbee_serve.contract.api import SamplingParams
from rbee_serve.contract.errors import BY_CODE, ConfigInvalid, ExitCode, InferenceFailed, WorkerCrashed
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.app import create_app
from rbee_serve.worker.engine.model_file import read_header
from rbee_serve.worker.engine.process import ProcessEngine
from rbee_serve.worker.engine.protocol import EngineConfig, GenerateRequest, TokenOut
from rbee_serve.worker.engine.spawn import EngineChild
from rbee_serve.worker.lifecycle import Lifecycle
from rbee_serve.worker.state import Worker

if TYPE_CHECKING:
    from rbee_serve.worker.heartbeat import HeartbeatSender

logger = logging.getLogger(__name__)

#: Seconds that connections have to close once every stream has ended or was told to.
_CLOSE_S = 2.0


def check(settings: WorkerSettings) -> str | None:
    """Return the fleet token; raises ConfigInvalid or ModelFileInvalid for whatever only a person can put right."""
    token = load_secret(settings.fleet_token_file, "fleet-token")
    require_auth_for_bind(settings.host, token is not None, "a fleet token (fleet_token_file)")
    if settings.queen_url and settings.url is None and settings.host in ("0.0.0.0", "::"):  # noqa: S104 -- compared, not bound
        raise ConfigInvalid(
            f"url: required, since the queen cannot reach a worker at {settings.host}",
            hint=f"set url to the address of this machine, for example http://10.0.0.5:{settings.port}",
        )
    read_header(settings.model_path)
    return token


def reload_token(settings: WorkerSettings, worker: Worker, heartbeat: HeartbeatSender | None) -> None:
    """Read the fleet token again; one that can not be taken is logged and the old one stays (SPEC E-23)."""
    try:
        token = load_secret(refreshed("fleet-token") or settings.fleet_token_file, "fleet-token")
        if token is None or worker.fleet_token is None:
            raise ConfigInvalid("whether a fleet token is asked for changes by a restart alone")
    except ConfigInvalid as e:
        logger.error("fleet token not reloaded: %s", e.message)
        return
    worker.fleet_token = token
    if heartbeat is not None:
        heartbeat.use_token(token)
    logger.info("fleet token reloaded")


def self_test(settings: WorkerSettings, config: EngineConfig, child: EngineChild | None) -> int:
    """Load the model and make one token, without a port and without the queen: what an upgrade asks of a new runtime.

    Prints ``{"loaded_s", "token_id", "backend", "version"}``; raises ModelFileInvalid or whatever the engine failed with.
    """
    sys.stdout.write(json.dumps(asyncio.run(_tested(settings, config, child))) + "\n")
    return ExitCode.OK


async def _tested(settings: WorkerSettings, config: EngineConfig, child: EngineChild | None) -> dict[str, Any]:
    read_header(settings.model_path)
    began = time.monotonic()
    engine = ProcessEngine(config, load_timeout_s=settings.load_timeout_s, child=child)
    try:
        await engine.start()
        while (progress := engine.progress).stage not in ("ready", "failed"):
            await engine.wait_progress(progress)
        if engine.info is None:
            raise BY_CODE.get(progress.error_code or "", WorkerCrashed)(progress.error or "the engine did not become ready")
        loaded_s = time.monotonic() - began
        params = SamplingParams.model_validate({"max_tokens": 1, "temperature": 0.0, "seed": 0, "ignore_eos": True})
        if not engine.info.metadata["generates"]:
            await engine.embed(["a"])
            return {"loaded_s": round(loaded_s, 2), "token_id": None, "backend": settings.backend, "version": __version__}
        request = GenerateRequest("self-test", "a", parse_special=False, add_bos=True, params=params)
        ids = [e.token_id async for batch in engine.generate(request) for e in batch if isinstance(e, TokenOut)]
        if len(ids) != 1:
            raise InferenceFailed(f"one token expected, got {len(ids)}")
        return {
            "loaded_s": round(loaded_s, 2),
            "token_id": ids[0],
            "backend": settings.backend,
            "version": __version__,
        }
    finally:
        await engine.close()


def start(settings: WorkerSettings, config: EngineConfig, child: EngineChild | None, notifier: Notifier) -> int:
    """Check and serve; ``child``: the engine process, begun already. Raises what `check` raises."""
    token = check(settings)
    setup_logging(settings.log_level, settings.log_format)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # one that comes before `started` must not end the process
    if token is None and is_loopback(settings.host):
        logger.warning("no fleet token: every program on this machine may use it", extra={"url": settings.public_url})
    return _serve(settings, token, ProcessEngine(config, settings.queue_max, settings.load_timeout_s, child), notifier)


def _serve(settings: WorkerSettings, token: str | None, engine: ProcessEngine, notifier: Notifier) -> int:
    """Serve until SIGTERM, a drain or the end of the engine; return the exit code."""
    servers: list[Server] = []

    def leave() -> None:
        for server in servers:
            server.should_exit = True

    app = create_app(settings, engine, fleet_token=token, notifier=notifier, leave=leave)
    lifecycle: Lifecycle = app.state.lifecycle

    def serving(server: Server) -> None:
        servers.append(server)
        lifecycle.behind_socket, lifecycle.woken = server.handed_over, server.woken

    async def started() -> None:
        reload = partial(reload_token, settings, app.state.worker, app.state.heartbeat)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)

    run(
        app,
        host=settings.host,
        port=settings.port,
        notifier=notifier,
        alive=lifecycle.alive,
        on_started=started,
        on_shutdown=lifecycle.on_shutdown,
        graceful_timeout_s=_CLOSE_S,
        on_server=serving,
        leave=Leave(lifecycle.idle_exit_due, lifecycle.fall_dormant),
        leave_unwatched=settings.idle_exit_without_socket,
        limits=RequestLimits.of(settings),
    )
    return lifecycle.exit_code
