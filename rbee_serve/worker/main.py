"""Entry point of the worker: ``rbee-worker --config FILE [--check-config]``.

Exit codes: 0 drained and stopped, 1 the engine died, 78 the settings, a secret or the model file are wrong (systemd does
not restart then).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from rbee_serve.common import serving
from rbee_serve.common.credentials import load_secret, require_auth_for_bind
from rbee_serve.common.log import setup_logging
from rbee_serve.common.sdnotify import Notifier
from rbee_serve.contract.errors import BackendUnavailable, ConfigInvalid, ExitCode, ModelFileInvalid, RbeeError
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.app import Worker
from rbee_serve.worker.engine.gguf_header import read_header
from rbee_serve.worker.engine.process import ProcessEngine
from rbee_serve.worker.engine.protocol import EngineConfig

logger = logging.getLogger("rbee.worker")

#: Failures of loading that another start would only repeat.
_NOT_RESTARTED = frozenset({ModelFileInvalid.code, BackendUnavailable.code, ConfigInvalid.code})
#: Start-up time asked for with each sign of loading progress.
_LOAD_STEP_S = 60.0


def engine_config(settings: WorkerSettings) -> EngineConfig:
    """Return the engine's part of the settings."""
    return EngineConfig(
        model_path=str(settings.model_path),
        model_sha256=settings.model_sha256,
        backend=settings.backend,
        device=settings.device,
        slots=settings.slots,
        context_tokens=settings.context_tokens,
        threads=settings.threads,
        prompt_block_tokens=settings.prompt_block_tokens,
        kv_type=settings.kv_type,
        cpu_variant=settings.cpu_variant,
    )


class Service:
    """One worker process under systemd (or under a shell)."""

    def __init__(self, settings: WorkerSettings, token: str | None, notifier: Notifier) -> None:
        self._settings, self._notifier = settings, notifier
        self._engine = ProcessEngine(engine_config(settings), settings.queue_max, settings.load_timeout_s)
        self._server: serving.Server | None = None
        self._stopping = False
        self.exit_code = ExitCode.OK
        self._worker = Worker(settings, self._engine, token, self._request_exit)

    def run(self) -> None:
        """Serve until told to stop or the engine is dead."""
        s = self._settings
        serving.run(
            self._worker.app(),
            host=s.host,
            port=s.port,
            notifier=self._notifier,
            alive=lambda: self._engine.progress.stage != "ready" or self._engine.step_age_s < s.stall_timeout_s,
            on_shutdown=self._on_shutdown,
            on_started=self._on_started,
            graceful_timeout_s=2.0,
            on_server=self._set_server,
        )

    def _set_server(self, server: serving.Server) -> None:
        self._server = server

    def _request_exit(self) -> None:
        if self._server is not None:
            self._server.should_exit = True

    async def _on_started(self) -> None:
        self._watch = asyncio.create_task(self._watch_engine())

    async def _watch_engine(self) -> None:
        """Tell systemd of loading and readiness; end the process when the engine is gone."""
        progress = self._engine.progress
        while progress.stage not in ("ready", "failed"):
            status = f"loading {self._settings.model_id}: {progress.layers_loaded} of {progress.layers_total} layers"
            self._notifier.extend_timeout(_LOAD_STEP_S, status)
            progress = await self._engine.wait_progress(progress)
        if progress.stage == "ready":
            s = self._settings
            self._notifier.ready(f"ready: {s.model_id} on {s.backend}:{s.device}, {s.slots} slots, {s.public_url}")
            logger.info("ready: %s on %s:%d, %d slots, %s", s.model_id, s.backend, s.device, s.slots, s.public_url)
            await self._engine.wait_dead()
            progress = self._engine.progress
        if self._stopping:
            return
        reason = progress.error or "the engine ended"
        self.exit_code = ExitCode.CONFIG if progress.error_code in _NOT_RESTARTED else ExitCode.FAILED
        self._notifier.status(f"failed: {reason}")
        logger.error("%s", reason)
        self._request_exit()

    async def _on_shutdown(self) -> None:
        self._stopping = True
        if self.exit_code is ExitCode.OK:
            self._notifier.stopping(f"draining: {self._worker.inference.running} streams")
            await self._worker.begin_drain()


def main(argv: list[str] | None = None) -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(prog="rbee-worker", description="one llama.cpp model behind HTTP, as a systemd service")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="settings file (docs/settings.md)")
    parser.add_argument("--check-config", action="store_true", help="validate the settings and exit")
    options = parser.parse_args(argv)
    notifier = Notifier()
    try:
        settings = WorkerSettings.load(options.config)
        if options.check_config:
            return ExitCode.OK
        setup_logging(settings.log_level)
        token = load_secret(settings.fleet_token_file, "fleet-token")
        require_auth_for_bind(settings.host, token is not None, "a fleet token (fleet_token_file)")
        read_header(settings.model_path)
        service = Service(settings, token, notifier)
        service.run()
    except RbeeError as e:
        hint = f"; next: {e.hint}" if e.hint else ""
        notifier.status(f"failed: {e.message}")
        print(f"rbee-worker: {e.message}{hint}", file=sys.stderr, flush=True)
        return e.exit_code
    return service.exit_code


if __name__ == "__main__":
    sys.exit(main())
