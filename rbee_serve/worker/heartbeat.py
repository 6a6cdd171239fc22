"""Heartbeats: how the queen learns that this worker lives (SPEC 3.5, X-09). The queen is never needed to serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time

import httpx

from rbee_serve.contract.api import Heartbeat
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.state import WorkerStatus

logger = logging.getLogger(__name__)

#: Changes that come within this time are told in one beat.
GATHER_S = 0.02


class Heart:
    """Beats at the interval, jittered, and at once on each change of state."""

    def __init__(self, settings: WorkerSettings, status: WorkerStatus, token: str | None) -> None:
        self._settings, self._status = settings, status
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(5.0), trust_env=False)
        self._seq = 0
        self._away = False

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await self.beat()
            pause = self._settings.heartbeat_interval_s * random.uniform(0.9, 1.1)  # noqa: S311 - jitter, no secret
            if self._away:
                pause = min(pause, 1.0 + random.random())  # noqa: S311
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._status.wait_changed()
                    await asyncio.sleep(GATHER_S)

    async def beat(self) -> None:
        """Tell the queen once. A queen that is away is logged once an outage."""
        if self._settings.queen_url is None:
            return
        self._seq += 1
        message = Heartbeat(worker=self._status.record(), timestamp=time.time(), seq=self._seq)
        url = f"{self._settings.queen_url.rstrip('/')}/v1/worker-heartbeat"
        try:
            answer = await self._client.post(url, content=message.model_dump_json(), headers={"Content-Type": "application/json"})
            problem = None if answer.is_success else f"HTTP {answer.status_code} {answer.text[:200]}"
        except httpx.HTTPError as e:
            problem = f"{type(e).__name__} {e}"
        if problem and not self._away:
            logger.warning("queen at %s does not take heartbeats: %s; trying on", self._settings.queen_url, problem)
        if self._away and not problem:
            logger.info("queen at %s is back", self._settings.queen_url)
        self._away = bool(problem)

    async def last_beat(self) -> None:
        """Say that this worker is gone; waits 2 s at most."""
        self._status.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await self.beat()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
