"""What a worker is at this moment: its state, who may come in, its record. No I/O."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rbee_serve import __version__
from rbee_serve.contract.api import WorkerRecord, WorkerState
from rbee_serve.contract.errors import InsufficientRam, InsufficientVram, RbeeError, WorkerCrashed, WorkerDraining, WorkerLoading
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.engine.protocol import Engine, EngineInfo, LoadProgress
from rbee_serve.worker.metrics import Metrics

if TYPE_CHECKING:
    from rbee_serve.worker.chat import ChatTemplate
    from rbee_serve.worker.generation import Generation

#: Seconds after which a refused client may try again.
RETRY_AFTER_S = 1
#: The same where there was no memory for the model.
_NO_ROOM_RETRY_S = 10
#: Errors of a model that was not loaded for want of memory: said to callers as they are, there is nothing secret in them.
NO_ROOM = {e.code: e for e in (InsufficientRam, InsufficientVram)}
#: How often a slot that is being freed is looked at. The engine needs one step for it and has no event for its end.
_SETTLE_S = 0.02


class Worker:
    """One worker. ``active`` holds the requests that are running, by the engine's names for them."""

    def __init__(
        self, settings: WorkerSettings, engine: Engine, metrics: Metrics, *, wall: Callable[[], float] = time.time
    ) -> None:
        """``wall``: seconds since the epoch."""
        self.settings, self.engine, self.metrics, self.wall = settings, engine, metrics, wall
        self.started_at = wall()
        #: What callers must show; changes on SIGHUP.
        self.fleet_token: str | None = None
        self.active: dict[str, Generation] = {}
        self._drain_began = asyncio.Event()
        #: The process ends, and the socket that systemd holds starts the next one.
        self.dormant = False
        self.stopped = False
        self._beside = 0  # requests that need no slot
        self._worked_at = time.monotonic()
        #: The state that the queen has taken note of last; None before that and while she is away.
        self.told: WorkerState | None = None
        #: Set when the state may have changed; the heartbeat clears it.
        self.changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._settling: asyncio.Task[None] | None = None
        self._chat: ChatTemplate | None = None

    @property
    def state(self) -> WorkerState:
        """The state as the registry shows it."""
        if self.dormant:
            return WorkerState.DORMANT
        if self.stopped:
            return WorkerState.STOPPED
        if self.engine.progress.stage == "failed":
            return WorkerState.FAILED
        if self.draining:
            return WorkerState.DRAINING
        if self.engine.info is None:
            return WorkerState.LOADING
        return WorkerState.BUSY if self.engine.slots_busy >= self.settings.slots else WorkerState.IDLE

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken, for good."""
        return self._drain_began.is_set()

    @property
    def slots_busy(self) -> int:
        """Slots taken; requests that wait for one do not count."""
        return min(self.engine.slots_busy, self.settings.slots)

    @property
    def idle_s(self) -> float:
        """Seconds since there was work last; 0 while a request runs and while the model is being loaded."""
        if self.active or self._beside or self.engine.slots_busy or self.engine.info is None:
            return 0.0
        return time.monotonic() - self._worked_at

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Count work that takes no slot: meanwhile the worker is not idle, and a drain waits for its end."""
        self._beside += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._beside -= 1
            self.worked()
            if not self.active and not self._beside:
                self._idle.set()

    def worked(self) -> None:
        """Note that there was work just now."""
        self._worked_at = time.monotonic()

    def admit(self) -> EngineInfo:
        """Return what is loaded; raises WorkerLoading, WorkerDraining or WorkerCrashed. Slots are the engine's to grant."""
        state = self.state
        if state in (WorkerState.DRAINING, WorkerState.STOPPED):
            raise WorkerDraining("the worker finishes what it has and takes nothing new", retry_after_s=RETRY_AFTER_S)
        if state is WorkerState.FAILED:
            progress = self.engine.progress
            if progress.error_code in NO_ROOM:
                raise NO_ROOM[progress.error_code](progress.error or "no room for the model", retry_after_s=_NO_ROOM_RETRY_S)
            raise WorkerCrashed("the engine of this worker has failed; its journal says why")
        info, progress = self.engine.info, self.engine.progress
        if info is None:
            raise WorkerLoading(
                f"the model is being loaded: {progress.layers_loaded} of {progress.layers_total or '?'} layers",
                layers_loaded=progress.layers_loaded,
                layers_total=progress.layers_total,
                progress_url=f"{self.settings.public_url}/v1/loading/progress",
                retry_after_s=RETRY_AFTER_S,
            )
        return info

    def chat(self, info: EngineInfo) -> ChatTemplate:
        """Return the model's chat template."""
        if self._chat is None:
            from rbee_serve.worker.chat import ChatTemplate  # jinja2: not for a start

            self._chat = ChatTemplate(info.chat_template, bos_token=info.bos_token, eos_token=info.eos_token)
        return self._chat

    def running(self, request_id: str) -> Generation | None:
        """Return the request of this id that runs; one that was cancelled and is being ended does not."""
        return next((g for g in self.active.values() if g.id == request_id and not g.is_ending), None)

    def add(self, generation: Generation) -> None:
        """A request is running."""
        self.active[generation.engine_name] = generation
        self.worked()
        self._idle.clear()
        self.changed.set()

    def remove(self, generation: Generation) -> None:
        """A request has ended; its slot is free now or within one step of the engine."""
        self.active.pop(generation.engine_name, None)
        self.worked()
        if not self.active and not self._beside:
            self._idle.set()
        self.changed.set()
        if self.engine.slots_busy > len(self.active) and self._settling is None:
            self._settling = asyncio.create_task(self._settle())

    async def _settle(self) -> None:
        try:
            while self.engine.slots_busy > len(self.active):  # noqa: ASYNC110 -- the engine has no event for it
                await asyncio.sleep(_SETTLE_S)
        finally:
            self._settling = None
        self.changed.set()

    async def drain(self, timeout_s: float | None) -> None:
        """Take nothing new and return when every running request has ended.

        After ``timeout_s`` the rest is handed back with an ``error`` event WORKER_DRAINING, so that the queen can go on
        with it elsewhere. None: wait as long as it takes.
        """
        self._drain_began.set()
        self.changed.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            self.end_all(WorkerDraining("the worker is stopping and the time for running requests is over"))

    async def next_progress(self, seen: LoadProgress) -> LoadProgress:
        """Return the progress of loading as soon as it differs from ``seen``; raises WorkerDraining when that is in vain."""
        waits = [asyncio.ensure_future(self.engine.wait_progress(seen)), asyncio.ensure_future(self._drain_began.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        progress = self.engine.progress
        if progress == seen:
            raise WorkerDraining("the worker is stopping")
        return progress

    def end_all(self, why: RbeeError) -> None:
        """End every running request with ``why``."""
        for generation in list(self.active.values()):
            generation.end(why)

    def record(self) -> WorkerRecord:
        """Return the worker as it describes itself (SPEC 3.6)."""
        s, info, state = self.settings, self.engine.info, self.state
        takes = state in (WorkerState.IDLE, WorkerState.BUSY)
        return WorkerRecord(
            id=s.worker_id,
            hive_id=s.hive,
            name=s.name,
            url=s.public_url,
            model_id=s.model_id,
            model_ref=s.model_ref,
            backend=info.backend if info else s.backend,
            device=s.device,
            port=s.port,
            pid=os.getpid(),
            status=state,
            slots_total=s.slots,
            slots_available=s.slots - self.slots_busy if takes else 0,
            implementation="llama-cpp-python",
            version=__version__,
            started_at=self.started_at,
            context_tokens=info.context_tokens if info else None,
            vram_bytes=info.device_memory_bytes if info else None,
            continuation_class=info.continuation_class if info else None,
            model_info=model_info(info, self.settings.model_sha256) if info else {},
        )


def model_info(info: EngineInfo, sha256: str | None) -> dict[str, object]:
    """Return what was loaded, as ``WorkerRecord.model_info`` tells it; ``sha256``: of the file, where the catalog has it."""
    return {
        "sha256": sha256,
        "architecture": info.architecture,
        "quantization": info.quantization,
        "parameters": info.parameters,
        "size_bytes": info.size_bytes,
        "layers": info.layers,
        "vocab_size": info.vocab_size,
        "context_trained": info.context_trained,
        "chat_template": info.chat_template is not None,
        "devices": info.devices,
        "threads": info.threads,
        "engine_version": info.engine_version,
        # Up to this length another worker of the same class continues a stream exactly; the queen reads it.
        "exact_context_tokens": info.metadata.get("exact_context_tokens", 0),
        "metadata": info.metadata,
    }
