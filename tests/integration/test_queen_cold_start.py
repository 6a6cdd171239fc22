"""A request for a model that sleeps wakes a worker through its socket, and the client sees it come (SPEC N-03, S-72, P-15)."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fleet import MODEL, Fleet, events_of, ids_of, wait_until
from worker_process import WorkerProcess, handed_over

pytestmark = pytest.mark.integration


class Socket:
    """What a socket unit does for a worker: hold the socket, start the worker when somebody connects, again and again."""

    def __init__(self, directory: Path, model_path: Path, settings: dict[str, Any]) -> None:
        self._held = socket.create_server(("127.0.0.1", 0))
        port = self._held.getsockname()[1]
        self.worker = WorkerProcess(directory, model_path, settings, port=port, **handed_over(self._held))
        self._ending, self._end = socket.socketpair()
        self.lives = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while self._ending not in select.select([self._held, self._ending], [], [])[0]:
            self.worker.start()
            self.lives += 1
            self.worker.process.wait()

    def wake(self) -> None:
        """Connect, as anybody may."""
        socket.create_connection(self._held.getsockname()).close()

    def close(self) -> None:
        """Let go of the socket (idempotent)."""
        if self._held.fileno() < 0:
            return
        self._end.send(b"x")
        if self.lives and self.worker.process.poll() is None:
            self.worker.process.terminate()
        self._thread.join(60)
        self.worker.__exit__()
        for s in (self._held, self._ending, self._end):
            s.close()


@pytest.fixture
def sleeping(tmp_path: Path, model_path: Path) -> Iterator[tuple[Fleet, Socket]]:
    """A fleet whose only worker sleeps."""
    state = tmp_path / "state"
    state.mkdir()
    fleet = Fleet(tmp_path, model_path, queen_settings={"state_dir": str(state), "ping_interval_s": 0.5})
    directory = tmp_path / "worker"
    directory.mkdir()
    settings = {"idle_timeout_s": 2.0, "queen_url": fleet.queen.url, "fleet_token_file": str(tmp_path / "fleet-token")}
    behind = Socket(directory, model_path, settings)
    try:
        fleet.start_queen()
        behind.wake()
        wait_until(lambda: [w["status"] for w in fleet.records().values()] == ["dormant"], "the worker sleeps")
        yield fleet, behind
    finally:
        fleet.close()
        behind.close()


@pytest.mark.N03
def test_sleeping_worker_is_known_over_a_restart_woken_by_a_request_and_sleeps_again(sleeping: tuple[Fleet, Socket]) -> None:
    fleet, behind = sleeping
    assert behind.lives == 1
    fleet.queen.stop()
    fleet.start_queen()
    assert {i: w["status"] for i, w in fleet.records().items()} == {"lab1-cpu0": "dormant"}
    with fleet.client() as client:
        # Looking at it wakes nobody.
        assert client.get("/v1/status").json()["states"] == {"dormant": 1}
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == [MODEL]
        assert behind.lives == 1

        request = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        with client.stream("POST", "/v1/inference", json=request) as response:
            assert (response.status_code, response.headers["x-rbee-placement"]) == (200, "queued")  # at once, not when it is up
            events = list(events_of(response))
        assert events[0]["type"] == "loading"
        assert (len(ids_of(events)), events[-1]["type"]) == (8, "end")
        assert behind.lives == 2

        wait_until(lambda: fleet.records()["lab1-cpu0"]["status"] == "dormant", "it sleeps again")
        with ThreadPoolExecutor(2) as pool:  # both come while it is being woken
            answers = list(pool.map(lambda _: client.post("/v1/inference", json=request | {"stream": False}), range(2)))
    assert [a.json()["tokens_generated"] for a in answers] == [8, 8]
    assert behind.lives == 3


def test_worker_that_cannot_be_woken_is_named_and_not_tried_for_ever(sleeping: tuple[Fleet, Socket]) -> None:
    fleet, behind = sleeping
    behind.close()  # the socket is gone: nobody holds the port
    with fleet.client() as client:
        response = client.post("/v1/inference", json={"model": MODEL, "prompt": "x", "stream": False})
        again = client.post("/v1/inference", json={"model": MODEL, "prompt": "x", "stream": False})

    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "NO_WORKER_AVAILABLE")
    assert "lab1-cpu0 could not be woken" in error["message"]
    assert (again.status_code, again.json()["error"]["code"]) == (503, "NO_WORKER_AVAILABLE")
