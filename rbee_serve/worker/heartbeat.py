"""Heartbeats to the queen: every interval and at once on each change of state (SPEC X-09, CAP-72).

A queen that is away costs a warning, never the worker: it serves on, and the next beat finds the queen again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time

import httpx

from rbee_serve.contract.api import Heartbeat, WorkerState
from rbee_serve.contract.errors import ConfigInvalid
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.state import Worker

logger = logging.getLogger(__name__)

PATH = "/v1/worker-heartbeat"
_TIMEOUT = httpx.Timeout(5.0, connect=5.0)
#: The last beat must not hold up the end of the process for longer.
_LAST_BEAT_S = 5.0
#: Pause between beats while the queen does not answer.
_AWAY_S = 2.0
#: Said where there was no connection at all: the unit lets a worker talk to few addresses, and to no name server in the internet.
_UNREACHABLE = (
    "is the queen up, and in a private network? A worker's unit reaches those and the address that queen_url spells out; "
    "a public address behind a name, or a public name server: rbee_worker_networks in the inventory (IPAddressAllow=)"
)


def _trust(queen_url: str, settings: WorkerSettings) -> ssl.SSLContext | bool:
    """Return what proves an https queen's identity; for plain http nothing is read (root certificates take 50 ms)."""
    if not queen_url.startswith("https:"):
        return False
    try:
        return ssl.create_default_context(cafile=settings.queen_ca_file)
    except (OSError, ssl.SSLError) as e:
        raise ConfigInvalid(
            f"queen_ca_file: cannot use {settings.queen_ca_file}: {e}", hint="a PEM file with the certificates to trust"
        ) from e


class HeartbeatSender:
    """Sends the worker's record. ``run`` until cancelled, then ``last``."""

    def __init__(
        self, worker: Worker, queen_url: str, fleet_token: str | None, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._worker = worker
        self._url = queen_url.rstrip("/") + PATH
        headers = {"Authorization": f"Bearer {fleet_token}"} if fleet_token else {}
        # The environment's proxies are not for a private network.
        self._client = httpx.AsyncClient(
            timeout=_TIMEOUT, headers=headers, transport=transport, trust_env=False, verify=_trust(queen_url, worker.settings)
        )
        self._seq = 0
        self._told: WorkerState | None = None
        self._lost = False
        self._answered_at = time.monotonic()

    def use_token(self, fleet_token: str) -> None:
        """Show another token from the next beat on."""
        self._client.headers["Authorization"] = f"Bearer {fleet_token}"

    @property
    def silent_s(self) -> float:
        """Seconds since the queen took a beat last; before the first one, since the worker began."""
        return time.monotonic() - self._answered_at

    async def run(self) -> None:
        """Beat for ever. The first beat goes out at once: the queen learns of a worker while it still loads.

        A worker whose beats have ended serves nobody: whatever ends them is logged, and they begin again.
        """
        while True:
            beats = asyncio.create_task(self._beats())
            try:
                await asyncio.wait((beats,))
            except asyncio.CancelledError:
                beats.cancel()
                await asyncio.wait((beats,))
                raise
            reason = "cancelled" if beats.cancelled() else repr(beats.exception())
            logger.error("heartbeats ended and begin again", extra={"url": self._url, "reason": reason})
            self._lost = True
            await asyncio.sleep(min(self._worker.settings.heartbeat_interval_s, _AWAY_S))

    async def _beats(self) -> None:
        interval = self._worker.settings.heartbeat_interval_s
        while True:
            self._worker.changed.clear()
            await self.beat()
            # Jitter keeps a fleet from beating in step; never longer than the interval, which the queen counts on. A queen
            # that is away is asked more often, so that its registry is full soon after it is back.
            pause = min(interval, _AWAY_S) if self._lost else interval
            await self._wait_for_change(time.monotonic() + pause * random.uniform(0.8, 1.0))  # noqa: S311

    async def last(self) -> None:
        """Say that the worker has stopped or is dormant, and close the connection."""
        try:
            async with asyncio.timeout(_LAST_BEAT_S):
                await self.beat()
        except TimeoutError:
            logger.warning("the queen did not take the last heartbeat", extra={"url": self._url})
        finally:
            await self._client.aclose()

    async def _wait_for_change(self, until: float) -> None:
        """Return at ``until`` or when the state differs from what the queen was told last."""
        while (left := until - time.monotonic()) > 0:
            try:
                # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the change.
                async with asyncio.timeout(left):
                    await self._worker.changed.wait()
            except TimeoutError:
                return
            self._worker.changed.clear()
            if self._worker.state is not self._told:
                return

    async def beat(self) -> None:
        """Send one heartbeat; a failure is logged once an outage."""
        record = self._worker.record()
        self._seq += 1
        self._told = record.status
        hint: dict[str, str] = {}
        body = Heartbeat(worker=record, timestamp=self._worker.wall(), seq=self._seq).model_dump_json()
        try:
            response = await self._client.post(self._url, content=body, headers={"Content-Type": "application/json"})
            problem = None if response.is_success else f"HTTP {response.status_code}: {response.text[:200]}"
        except httpx.HTTPError as e:
            problem = f"{type(e).__name__}: {e}"
            if isinstance(e, httpx.ConnectError | httpx.ConnectTimeout):
                hint = {"hint": _UNREACHABLE}
        self._worker.told = None if problem else record.status
        self._worker.metrics.heartbeats.labels(result="failed" if problem else "ok").inc()
        if problem and not self._lost:
            logger.warning("the queen does not take heartbeats; trying on", extra={"url": self._url, "reason": problem} | hint)
        elif not problem and self._lost:
            logger.info("the queen takes heartbeats again", extra={"url": self._url})
        self._lost = problem is not None
        if not problem:
            self._answered_at = time.monotonic()
