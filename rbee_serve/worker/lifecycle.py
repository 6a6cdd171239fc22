"""From the first layer to the last beat: what the worker tells systemd and the queen, and with which code it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from rbee_serve.common.sdnotify import Notifier
from rbee_serve.contract.errors import BY_CODE, BackendUnavailable, ExitCode, InsufficientRam, InsufficientVram
from rbee_serve.models import ram
from rbee_serve.worker.engine.protocol import LoadProgress
from rbee_serve.worker.state import Worker

if TYPE_CHECKING:
    from rbee_serve.worker.heartbeat import HeartbeatSender

logger = logging.getLogger(__name__)

#: While loading, systemd is asked for this much more time, at least every third of it. The limit on loading is the
#: engine's (load_timeout_s): systemd only has to notice a front that has stopped asking.
_EXTEND_S = 30.0

#: While ending, this much more than the drain: closing the server, writing prefixes to disk.
_END_S = 16.0

#: A woken worker that has no room answers for so long at most, and looks so often whether there is room now, seconds.
_TURN_AWAY_S = 300.0
_LOOK_S = 1.0


class Lifecycle:
    """Starts the engine, watches it, ends the process when it ends. ``exit_code`` is what the process returns."""

    def __init__(self, worker: Worker, notifier: Notifier, heartbeat: HeartbeatSender | None, leave: Callable[[], None]) -> None:
        """``leave`` makes the server begin its shutdown."""
        self._worker, self._notifier, self._heartbeat, self._leave = worker, notifier, heartbeat, leave
        self.exit_code: int = ExitCode.OK
        #: Whether systemd holds the socket and starts the next process; whether a connection has started this one.
        self.behind_socket = self.woken = False
        self._turns_away = self._may_leave = False
        self._reason = ""
        self._drainer: asyncio.Task[None] | None = None

    def alive(self) -> bool:
        """Whether the watchdog may be fed: the engine's own loop moves. Loading has its own limit."""
        engine = self._worker.engine
        if engine.progress.stage == "failed":
            return self._turns_away
        return engine.info is None or engine.step_age_s < self._worker.settings.stall_timeout_s

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Lifespan of the application: the port answers from the start, loading goes on beside it."""
        tasks = []
        if self._heartbeat is not None:
            # Before the engine is listened to, which may be up already: the queen hears of every worker that loads.
            tasks.append(asyncio.create_task(self._heartbeat.run()))
            await asyncio.sleep(0)
        await self._worker.engine.start()
        tasks.append(asyncio.create_task(self._watch()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._worker.stopped = True
            last = [self._heartbeat.last()] if self._heartbeat is not None else []
            # Together: whoever connects meanwhile waits for the next process.
            await asyncio.gather(self._worker.engine.close(), *last)

    async def on_shutdown(self) -> None:
        """Drain within ``drain_timeout_s``; connections are still accepted and told WORKER_DRAINING."""
        worker = self._worker
        if worker.dormant:
            return
        # The last status of a failed unit says why.
        status = f"draining {len(worker.active)} request(s)" if self.exit_code == ExitCode.OK else self._reason
        self._notifier.stopping(status)
        # The unit's own limit is for one that hangs.
        self._notifier.extend_timeout(worker.settings.drain_timeout_s + _END_S, status)
        if self.exit_code == ExitCode.OK:
            logger.info("draining", extra={"requests": len(worker.active)})
        await worker.drain(worker.settings.drain_timeout_s)

    def idle_exit_due(self) -> bool:
        """Whether there has been no work for ``idle_timeout_s``, or none now and no queen for ``queen_lease_s``."""
        worker, settings = self._worker, self._worker.settings
        if self._turns_away:
            return self._may_leave
        idle_s = worker.idle_s
        if not idle_s or worker.draining or self.exit_code != ExitCode.OK:
            return False
        lease_s = settings.queen_lease_s
        forgotten = bool(lease_s) and self._heartbeat is not None and self._heartbeat.silent_s > lease_s
        return forgotten or 0 < settings.idle_timeout_s <= idle_s

    def fall_dormant(self) -> None:
        """End the process; the socket stays and starts the next one (SPEC S-72, N-02, N-03)."""
        worker = self._worker
        worker.dormant = True
        if self._turns_away:  # its last words are why
            self.exit_code = ExitCode.TRY_LATER
            self._notifier.stopping(self._reason)
            worker.changed.set()
            return
        self._notifier.stopping(f"dormant: no work for {worker.idle_s:.0f} s")
        logger.info("dormant", extra={"idle_s": round(worker.idle_s, 1), "wake_url": worker.settings.public_url})
        worker.changed.set()

    def shutdown(self) -> None:
        """Begin what SIGTERM begins."""
        self._leave()

    def drain(self) -> None:
        """Take nothing new and end the process with 0 once every running request has ended, however long that takes."""
        if self._drainer is None:
            self._drainer = asyncio.create_task(self._drain_then_leave())

    async def _drain_then_leave(self) -> None:
        self._notifier.status(f"draining {len(self._worker.active)} request(s)")
        await self._worker.drain(None)
        self._leave()

    async def _watch(self) -> None:
        try:
            progress = await self._load()
            if progress.stage == "ready":
                self._ready()
                reason = await self._worker.engine.wait_dead()
                self._fail(f"the engine ended: {reason}", ExitCode.FAILED)
            elif progress.error_code in (InsufficientRam.code, InsufficientVram.code) and self.behind_socket:
                await self._turn_away(progress)
            else:
                self._fail(progress.error or "the model could not be loaded", _exit_code(progress.error_code))
        except Exception:
            logger.exception("the worker's own watch over the engine failed")
            self._fail("internal error, see the log", ExitCode.FAILED)

    async def _turn_away(self, progress: LoadProgress) -> None:
        """There is no room for the model now: leave the socket to systemd, so that a later connection tries again.

        Whoever has woken the worker is told why, and so is everybody for a while: until there is room, or for as long as the
        unit's start limit allows for one wake. Without anybody waiting, the process ends at once.
        """
        self._turns_away, self._reason = True, progress.error or "there is no room for the model"
        logger.critical("%s", self._reason, extra={"exit_code": int(ExitCode.TRY_LATER)})
        self._worker.changed.set()
        end = time.monotonic() + min(self._worker.settings.idle_timeout_s or _TURN_AWAY_S, _TURN_AWAY_S)
        path, by_ram = str(self._worker.settings.model_path), progress.error_code == InsufficientRam.code
        while self.woken and time.monotonic() < end:
            self._notifier.extend_timeout(_EXTEND_S, self._reason)
            if by_ram and 0 < progress.required_bytes <= ram.room(path):
                break
            await asyncio.sleep(min(_LOOK_S, max(0.0, end - time.monotonic())))
        self._notifier.status(self._reason)
        self._may_leave = True

    async def _load(self) -> LoadProgress:
        engine, path = self._worker.engine, self._worker.settings.model_path
        progress = engine.progress
        while progress.stage not in ("ready", "failed"):
            layers = f"{progress.layers_loaded} of {progress.layers_total or '?'} layers"
            self._notifier.extend_timeout(_EXTEND_S, f"loading {path.name}: {layers}")
            with suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it loses a cancellation that comes together with progress.
                async with asyncio.timeout(_EXTEND_S / 3):
                    progress = await engine.wait_progress(progress)
        return progress

    def _ready(self) -> None:
        info, settings = self._worker.engine.info, self._worker.settings
        if info is None:
            raise RuntimeError("the engine is ready and says nothing about itself")
        where = f"{info.backend}:{settings.device}"
        self._notifier.ready(f"{settings.model_id} on {where}, {info.slots} slots of {info.context_tokens} tokens")
        facts = {"model": settings.model_id, "backend": info.backend, "slots": info.slots, "context": info.context_tokens}
        logger.info("ready", extra=facts)
        self._worker.worked()
        self._worker.changed.set()

    def _fail(self, reason: str, code: int) -> None:
        logger.critical("%s", reason, extra={"exit_code": int(code)})
        self._notifier.status(reason)
        self.exit_code, self._reason = code, reason
        self._worker.changed.set()
        self._leave()


def _exit_code(error_code: str | None) -> int:
    """Return 78 for what only a person can put right, which systemd then does not try again."""
    error = BY_CODE.get(error_code or "")
    if error is not None and (error.exit_code is ExitCode.CONFIG or error is BackendUnavailable):
        return ExitCode.CONFIG
    return ExitCode.FAILED
