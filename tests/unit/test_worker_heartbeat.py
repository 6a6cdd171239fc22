"""Heartbeats: when they go out, what they hold, and that a queen that is away costs one warning."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine, until

from rbee_serve.contract.api import Heartbeat
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.heartbeat import HeartbeatSender
from rbee_serve.worker.metrics import Metrics
from rbee_serve.worker.state import Worker


class QueenStandIn:
    """Takes beats; ``away`` refuses connections."""

    def __init__(self) -> None:
        self.beats: list[Heartbeat] = []
        self.requests: list[httpx.Request] = []
        self.away = False

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if self.away:
            raise httpx.ConnectError("refused", request=request)
        self.requests.append(request)
        self.beats.append(Heartbeat.model_validate(json.loads(request.content)))
        return httpx.Response(200, json={"status": "ok"})

    @property
    def states(self) -> list[str]:
        return [b.worker.status.value for b in self.beats]


def make(engine: ScriptedEngine, queen: QueenStandIn, **settings: Any) -> tuple[Worker, HeartbeatSender]:
    values: dict[str, Any] = {"name": "cpu0", "hive": "lab1", "model_id": "m", "model_path": Path("/m"), "slots": engine.slots}
    worker = Worker(WorkerSettings.from_values(values | settings, {}, origin="test"), engine, Metrics())
    sender = HeartbeatSender(worker, "http://queen:8080/", "tok", transport=httpx.MockTransport(queen.answer))
    return worker, sender


def test_first_beat_goes_out_while_loading_and_each_change_of_state_at_once() -> None:
    async def run() -> None:
        queen, engine = QueenStandIn(), ScriptedEngine(loaded=False)
        worker, sender = make(engine, queen, heartbeat_interval_s=3600)
        task = asyncio.create_task(sender.run())
        await until(lambda: queen.states == ["loading"])
        engine.load()
        worker.changed.set()
        await until(lambda: queen.states == ["loading", "idle"])
        worker.changed.set()  # nothing has changed: no beat
        engine.running |= {"a", "b"}
        worker.changed.set()
        await until(lambda: queen.states[2:] == ["busy"])
        drain = asyncio.create_task(worker.drain(0))
        await until(lambda: queen.states[3:] == ["draining"])
        await drain
        task.cancel()
        worker.stopped = True
        await sender.last()

        assert queen.states == ["loading", "idle", "busy", "draining", "stopped"]
        assert [b.seq for b in queen.beats] == [1, 2, 3, 4, 5]
        assert {(str(r.url), r.headers["authorization"]) for r in queen.requests} == {
            ("http://queen:8080/v1/worker-heartbeat", "Bearer tok")
        }
        record = queen.beats[1].worker
        assert (record.id, record.hive_id, record.slots_total, record.slots_available) == ("lab1-cpu0", "lab1", 2, 2)
        assert queen.beats[2].worker.slots_available == 0

    asyncio.run(run())


@pytest.mark.parametrize("turns", range(8))
def test_an_end_that_comes_together_with_a_change_is_heard(turns: int) -> None:
    """The worker waits for the end of its beats before its engine is closed."""

    async def run() -> None:
        queen = QueenStandIn()
        worker, sender = make(ScriptedEngine(), queen, heartbeat_interval_s=3600)
        task = asyncio.create_task(sender.run())
        await until(lambda: queen.states == ["idle"])
        for _ in range(20):  # until it waits for the next change
            await asyncio.sleep(0)
        worker.changed.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait((task,), timeout=30)
        assert done == {task}

    asyncio.run(run())


def test_beats_repeat_at_the_interval() -> None:
    async def run() -> None:
        queen = QueenStandIn()
        _, sender = make(ScriptedEngine(), queen, heartbeat_interval_s=0.01)
        task = asyncio.create_task(sender.run())
        await until(lambda: len(queen.beats) >= 5)
        task.cancel()

    asyncio.run(run())


def test_beats_that_end_for_any_reason_begin_again(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        queen, endings = QueenStandIn(), [RuntimeError("a library's own"), asyncio.CancelledError(), None]
        worker, sender = make(ScriptedEngine(), queen, heartbeat_interval_s=0.01)
        record = worker.record

        def ends() -> Any:
            if endings and (ending := endings.pop(0)) is not None:
                raise ending
            return record()

        worker.record = ends  # type: ignore[method-assign]
        task = asyncio.create_task(sender.run())
        await until(lambda: len(queen.beats) >= 3)
        task.cancel()
        await asyncio.wait((task,))
        assert asyncio.all_tasks() == {asyncio.current_task()}, "beats go on after the end"

    with caplog.at_level("ERROR", logger="rbee_serve.worker.heartbeat"):
        asyncio.run(run())
    reasons = [vars(r)["reason"] for r in caplog.records]
    assert reasons == ['RuntimeError("a library\'s own")', "cancelled"]


def test_queen_that_is_away_is_one_warning_an_outage_and_found_again(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        queen = QueenStandIn()
        _, sender = make(ScriptedEngine(), queen)
        for away in (True, True, True, False, True, False):
            queen.away = away
            await sender.beat()
        assert [b.seq for b in queen.beats] == [4, 6]

    with caplog.at_level("INFO", logger="rbee_serve.worker.heartbeat"):
        asyncio.run(run())
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO", "WARNING", "INFO"]


def warning_of(caplog: pytest.LogCaptureFixture, queen: Callable[[httpx.Request], Awaitable[httpx.Response]]) -> dict[str, Any]:
    """Return the fields of the one record that a beat to this queen leaves."""

    async def run() -> None:
        worker, _ = make(ScriptedEngine(), QueenStandIn())
        await HeartbeatSender(worker, "http://q", None, transport=httpx.MockTransport(queen)).beat()

    asyncio.run(run())
    (record,) = caplog.records
    return vars(record)


def test_queen_that_refuses_is_a_warning_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(_: httpx.Request) -> httpx.Response:
        return httpx.Response(409, json={"error": {"code": "WORKER_ALREADY_REGISTERED"}})

    record = warning_of(caplog, refuse)
    assert "409" in record["reason"]
    assert "WORKER_ALREADY_REGISTERED" in record["reason"]
    assert "hint" not in record


@pytest.mark.parametrize("error", [httpx.ConnectTimeout, httpx.ConnectError])
def test_queen_that_can_not_be_connected_to_is_a_warning_with_what_to_look_at(
    caplog: pytest.LogCaptureFixture, error: type[httpx.TransportError]
) -> None:
    async def unreachable(_: httpx.Request) -> httpx.Response:
        raise error("no way")

    record = warning_of(caplog, unreachable)
    assert "no way" in record["reason"]
    assert "rbee_worker_networks" in record["hint"]
