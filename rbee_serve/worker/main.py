"""``rbee-worker --config FILE``: one worker as a process, under systemd or by hand."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rbee_serve import __version__
from rbee_serve.common.credentials import is_loopback, load_secret, refreshed, require_auth_for_bind
from rbee_serve.common.http import RequestLimits
from rbee_serve.common.log import setup_logging
from rbee_serve.common.sdnotify import Notifier
from rbee_serve.common.serving import Leave, Server, run
from rbee_serve.contract.api import SamplingParams
from rbee_serve.contract.errors import BY_CODE, ConfigInvalid, ExitCode, InferenceFailed, RbeeError, WorkerCrashed
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.app import create_app
from rbee_serve.worker.engine.model_file import read_header
from rbee_serve.worker.engine.process import ProcessEngine
from rbee_serve.worker.engine.protocol import EngineConfig, GenerateRequest, TokenOut
from rbee_serve.worker.heartbeat import HeartbeatSender
from rbee_serve.worker.lifecycle import Lifecycle
from rbee_serve.worker.state import Worker

logger = logging.getLogger(__name__)

#: Seconds that connections have to close once every stream has ended or was told to.
_CLOSE_S = 2.0


def engine_config(settings: WorkerSettings) -> EngineConfig:
    """Return what the engine process needs."""
    return EngineConfig(
        model_path=str(settings.model_path),
        model_sha256=settings.model_sha256,
        backend=settings.backend,
        device=settings.device,
        slots=settings.slots,
        context_tokens=settings.context_tokens,
        threads=settings.threads,
        prompt_block_tokens=settings.prompt_block_tokens,
        kv_type="q8_0" if settings.deterministic else settings.kv_type,
        cpu_variant=settings.cpu_variant,
        deterministic=settings.deterministic,
        lora=settings.adapters,
        stream_gap_s=settings.stream_gap_s,
        # A folder of its own: files of another instance are neither counted nor taken for wrong ones.
        prefix_store_dir=str(settings.prefix_store_dir / settings.name) if settings.prefix_store_dir else None,
        prefix_store_max_bytes=settings.prefix_store_max_bytes,
    )


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


async def self_test(settings: WorkerSettings) -> dict[str, Any]:
    """Load the model and make one token, without a port and without the queen: what an upgrade asks of a new runtime.

    Returns ``{"loaded_s", "token_id", "backend", "version"}``; raises ModelFileInvalid or whatever the engine failed with.
    """
    read_header(settings.model_path)
    began = time.monotonic()
    engine = ProcessEngine(engine_config(settings), load_timeout_s=settings.load_timeout_s)
    try:
        await engine.start()
        while (progress := engine.progress).stage not in ("ready", "failed"):
            await engine.wait_progress(progress)
        if engine.info is None:
            raise BY_CODE.get(progress.error_code or "", WorkerCrashed)(progress.error or "the engine did not become ready")
        loaded_s = time.monotonic() - began
        params = SamplingParams.model_validate({"max_tokens": 1, "temperature": 0.0, "seed": 0, "ignore_eos": True})
        request = GenerateRequest("self-test", "a", parse_special=False, add_bos=True, params=params)
        ids = [event.token_id async for event in engine.generate(request) if isinstance(event, TokenOut)]
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


def serve(settings: WorkerSettings, token: str | None, notifier: Notifier) -> int:
    """Serve until SIGTERM, a drain or the end of the engine; return the exit code."""
    servers: list[Server] = []

    def leave() -> None:
        for server in servers:
            server.should_exit = True

    engine = ProcessEngine(engine_config(settings), settings.queue_max, settings.load_timeout_s)
    app = create_app(settings, engine, fleet_token=token, notifier=notifier, leave=leave)
    lifecycle: Lifecycle = app.state.lifecycle

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
        on_server=servers.append,
        leave=Leave(lifecycle.idle_exit_due, lifecycle.fall_dormant),
        leave_unwatched=settings.idle_exit_without_socket,
        limits=RequestLimits.of(settings),
    )
    return lifecycle.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 drained, or idle and its socket left to systemd; 1 the engine died; 78 wrong settings, secrets, address
    or model file, which systemd does not try again."""
    parser = argparse.ArgumentParser(prog="rbee-worker", description="One model on one device, served over HTTP.")
    parser.add_argument("--config", type=Path, required=True, help="settings file, /etc/rbee/workers/NAME.toml")
    parser.add_argument("--check-config", action="store_true", help="check settings, secrets and model file, then exit")
    parser.add_argument("--self-test", action="store_true", help="load the model, make one token, say what it took, then exit")
    parser.add_argument("--version", action="version", version=f"rbee-worker {__version__}")
    args = parser.parse_args(argv)
    notifier = Notifier()
    try:
        settings = WorkerSettings.load(args.config)
        if args.self_test:
            sys.stdout.write(json.dumps(asyncio.run(self_test(settings))) + "\n")
            return ExitCode.OK
        token = check(settings)
        if args.check_config:
            sys.stdout.write(f"{args.config}: ok\n")
            return ExitCode.OK
        setup_logging(settings.log_level, settings.log_format)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # one that comes before `started` must not end the process
        if token is None and is_loopback(settings.host):
            logger.warning("no fleet token: every program on this machine may use it", extra={"url": settings.public_url})
        return serve(settings, token, notifier)
    except RbeeError as e:
        notifier.status(e.message)
        hint = f"; try: {e.hint}" if e.hint else ""
        sys.stderr.write(f"rbee-worker: {e.message}{hint}\n")
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
