"""What the worker is doing right now, and the record that says so to the queen."""

from __future__ import annotations

import asyncio
import os
import time

from rbee_serve import __version__
from rbee_serve.contract.api import WorkerRecord, WorkerState
from rbee_serve.contract.errors import LoadingTimeout, RbeeError, WorkerCrashed, WorkerDraining, WorkerLoading
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.engine.protocol import Engine


class WorkerStatus:
    """State derived from the engine and from whether the worker drains. ``changed`` wakes the heartbeat."""

    def __init__(self, settings: WorkerSettings, engine: Engine) -> None:
        self._settings, self._engine = settings, engine
        self._draining = self._stopped = False
        self._started_at = time.time()
        self._changed = asyncio.Event()

    def notice(self) -> None:
        """Something may have changed: beat soon."""
        self._changed.set()

    async def wait_changed(self) -> None:
        """Return after the next ``notice``."""
        await self._changed.wait()
        self._changed.clear()

    @property
    def draining(self) -> bool:
        """Whether new work is refused for good."""
        return self._draining

    def drain(self) -> None:
        """Take nothing new from now on."""
        self._draining = True
        self.notice()

    def stop(self) -> None:
        """The last thing that is ever said."""
        self._draining = self._stopped = True

    @property
    def state(self) -> WorkerState:
        """Current state."""
        if self._stopped:
            return WorkerState.STOPPED
        stage = self._engine.progress.stage
        if stage == "failed":
            return WorkerState.FAILED
        if self._draining:
            return WorkerState.DRAINING
        if stage != "ready":
            return WorkerState.LOADING
        return WorkerState.BUSY if self._engine.slots_busy >= self._settings.slots else WorkerState.IDLE

    def refuse_unless_ready(self) -> None:
        """Raise what a new request gets now: WorkerDraining, WorkerLoading, WorkerCrashed or nothing."""
        state, progress = self.state, self._engine.progress
        if state in (WorkerState.DRAINING, WorkerState.STOPPED):
            raise WorkerDraining("this worker finishes what it has and takes nothing new", retry_after_s=1)
        if state is WorkerState.FAILED:
            raise WorkerCrashed(progress.error or "the engine failed")
        if state is WorkerState.LOADING:
            raise WorkerLoading(
                f"loading: {progress.layers_loaded} of {progress.layers_total} layers",
                layers_loaded=progress.layers_loaded,
                layers_total=progress.layers_total,
                retry_after_s=2,
            )

    def loading_error(self) -> RbeeError | None:
        """Return why loading failed, None when it did not."""
        progress = self._engine.progress
        if progress.stage != "failed":
            return None
        cls = LoadingTimeout if progress.error_code == LoadingTimeout.code else WorkerCrashed
        return cls(progress.error or "the engine failed")

    def record(self) -> WorkerRecord:
        """Return the worker as the queen is to know it."""
        s, info = self._settings, self._engine.info
        ready = self.state in (WorkerState.IDLE, WorkerState.BUSY)
        return WorkerRecord(
            id=s.worker_id,
            hive_id=s.hive,
            name=s.name,
            url=s.public_url,
            model_id=s.model_id,
            model_ref=s.model_ref,
            backend=s.backend,
            device=s.device,
            port=s.port,
            pid=os.getpid(),
            status=self.state,
            slots_total=s.slots,
            slots_available=max(0, s.slots - self._engine.slots_busy) if ready else 0,
            implementation="llama.cpp",
            version=__version__,
            started_at=self._started_at,
            context_tokens=info.context_tokens if info else None,
            vram_bytes=info.device_memory_bytes if info else None,
            continuation_class=info.continuation_class if info else None,
            model_info={
                "architecture": info.architecture,
                "quantization": info.quantization,
                "parameters": info.parameters,
                "size_bytes": info.size_bytes,
                "engine": info.engine_version,
                "exact_context_tokens": info.metadata.get("exact_context_tokens", 0),
            }
            if info
            else {},
        )
