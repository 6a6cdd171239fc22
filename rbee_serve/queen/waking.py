"""Waking dormant workers and following those that load (SPEC N-03, CAP-63).

A dormant worker is a socket that systemd holds: connecting starts the worker, and systemd keeps the connection until it
answers. From then on it is a loading worker like any other, which tells its progress; its own heartbeat makes it routable.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson

from rbee_serve.contract.api import WorkerState
from rbee_serve.contract.errors import BY_CODE, InsufficientRam, LoadingTimeout, NoWorkerAvailable, RbeeError
from rbee_serve.contract.events import Event, SseParser, loading
from rbee_serve.queen.http_client import Answer, BrokenError, Client, WokenError
from rbee_serve.queen.registry import Registry, Worker

logger = logging.getLogger(__name__)

#: A woken worker answers its port before it loads; the beat that makes it routable follows at once.
_BEAT_S = 10.0
_MAX_BODY = 65_536
#: A machine without memory for the model is asked again by those who wait this long.
_NO_ROOM_RETRY_S = 10


@dataclass(slots=True, eq=False)
class Waking:
    """One worker on its way. ``progress`` is the latest ``loading`` event; ``error`` why it came to nothing."""

    worker: Worker
    task: asyncio.Task[None] | None = None
    progress: Event = field(default_factory=lambda: loading("waking"))
    error: RbeeError | None = None


@dataclass(slots=True)
class Waker:
    """At most one attempt a worker, however many requests wait for it. ``clock``: monotonic seconds."""

    registry: Registry
    client: Client
    token: Callable[[], str | None]
    clock: Callable[[], float]
    load_timeout_s: float
    under_way: dict[str, Waking] = field(default_factory=dict)  # by worker id

    def follow(self, candidates: list[Worker]) -> Waking | None:
        """Follow one of the workers that load, or else wake one that is dormant; None when there is neither.

        One at a time: those who wait for a model need one worker, and the next is woken when that was not enough.
        """
        for worker in candidates:
            if (waking := self.under_way.get(worker.id)) is not None:
                return waking
        for state in (WorkerState.LOADING, WorkerState.DORMANT):
            of_state = [w for w in candidates if w.record.status is state]
            if of_state:
                # The one with the best record of late; equals by name, so that the same one is woken each time.
                return self._start(min(of_state, key=lambda w: (w.penalty(self.clock()), w.id)))
        return None

    async def aclose(self) -> None:
        """Stop following; the workers go on."""
        tasks = [w.task for w in self.under_way.values() if w.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, worker: Worker) -> Waking:
        waking = self.under_way[worker.id] = Waking(worker)
        if worker.record.status is WorkerState.DORMANT:
            logger.info("waking a dormant worker", extra={"worker_id": worker.id, "model": worker.model_id})
        waking.task = asyncio.create_task(self._run(waking))
        return waking

    async def _run(self, waking: Waking) -> None:
        worker = waking.worker
        try:
            async with asyncio.timeout(self.load_timeout_s):
                await self._load(waking)
        except TimeoutError:
            figures = {k: v for k, v in waking.progress.items() if k.startswith("layers_")}
            text = f"worker {worker.id} was not ready within {self.load_timeout_s:g} s"
            waking.error = LoadingTimeout(text, hint=f"its journal says why: rbee-ctl worker get {worker.id}", **figures)
        except RbeeError as e:
            waking.error = e
        except (BrokenError, WokenError) as e:
            text = f"worker {worker.id} could not be woken ({e})"
            waking.error = NoWorkerAvailable(text, hint=f"rbee-ctl worker get {worker.id}", retry_after_s=1)
        except (ValueError, KeyError, TypeError) as e:
            waking.error = NoWorkerAvailable(f"worker {worker.id} gave no answer of ours to being woken ({e})", retry_after_s=1)
        finally:
            self.under_way.pop(worker.id, None)
            if waking.error is not None:
                logger.warning("a worker did not come up", extra={"worker_id": worker.id, "reason": waking.error.message})
                # Another one may be tried now; a beat of this one makes it known again.
                current = self.registry.known(worker.id)
                if current is not None and not current.takes:
                    self.registry.mark_failed(current, self.clock())
            self.registry.on_room()

    async def _load(self, waking: Waking) -> None:
        url = waking.worker.record.url.rstrip("/")
        answer = await self._get(f"{url}/v1/ready")
        try:
            status, body = await self._whole(answer)
        finally:
            answer.close()
        if status != 200:
            raise ValueError(f"HTTP {status}")
        if orjson.loads(body)["state"] in (WorkerState.LOADING.value, WorkerState.FAILED.value):  # which says why it failed
            waking.progress = loading("loading_to_vram")
            await self._follow(waking, url)
        else:
            waking.progress = loading("ready")
        # The worker is known by its beat, not by our word.
        end = asyncio.get_running_loop().time() + _BEAT_S
        while not self._is_up(waking.worker.id):
            if asyncio.get_running_loop().time() > end:
                raise ValueError("it loaded, and sent no heartbeat here")
            await asyncio.sleep(0.05)

    def _is_up(self, worker_id: str) -> bool:
        worker = self.registry.known(worker_id)
        return worker is not None and self.registry.routable(worker, self.clock())

    async def _follow(self, waking: Waking, url: str) -> None:
        answer = await self._get(f"{url}/v1/loading/progress")
        parser = SseParser()
        try:
            while data := await answer.read(self._until()):
                for payload in parser.feed(data):
                    if payload == "[DONE]":
                        return
                    event = orjson.loads(payload)
                    if event["stage"] == "failed":
                        error = BY_CODE.get(str(event.get("code")))
                        if error is not None and issubclass(error, InsufficientRam):
                            text = f"worker {waking.worker.id} could not be woken: {event.get('message')}"
                            raise error(text, hint="rbee-ctl worker list", retry_after_s=_NO_ROOM_RETRY_S)
                        raise ValueError(f"{event.get('code')}: {event.get('message')}")
                    waking.progress = event
        finally:
            answer.close()

    async def _whole(self, answer: Answer) -> tuple[int, bytes]:
        status = await answer.head(self._until())
        body = b""
        while (data := await answer.read(self._until())) and len(body) < _MAX_BODY:
            body += data
        return status, body

    async def _get(self, url: str) -> Answer:
        headers = {"accept": "application/json, text/event-stream"}
        if (token := self.token()) is not None:
            headers["authorization"] = f"Bearer {token}"
        return await self.client.send("GET", url, b"", headers, fresh=True)

    def _until(self) -> float:
        return asyncio.get_running_loop().time() + self.load_timeout_s
