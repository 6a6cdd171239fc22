"""Idle services leave their socket to systemd and nobody who connects notices (SPEC S-72, N-02, N-03, P-15)."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet import Fleet, wait_until
from worker_process import WorkerProcess, handed_over

pytestmark = pytest.mark.integration

HERE = Path(__file__).resolve().parent


class Activated:
    """A socket with a manager that starts the service behind it; each exit code of the service is in ``exits``."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self.socket.getsockname()[1]
        self.exits: list[int] = []
        command = [sys.executable, str(HERE / "activation.py"), str(self.socket.fileno())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(self.socket.fileno(),)
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.exits.append(int(line))

    def close(self) -> None:
        self.process.communicate()
        self._reader.join(60)
        self.socket.close()


def raw(port: int, pause_s: float) -> bytes:
    """Connect, send the request after a pause, return the whole answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        time.sleep(pause_s)
        return ask(s)


def ask(s: socket.socket) -> bytes:
    """Send one request and return everything until the end of the connection."""
    s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = b""
    while data := s.recv(4096):
        answer += data
    return answer


@pytest.fixture
def activated() -> Iterator[Callable[[], Activated]]:
    made: list[Activated] = []

    def make() -> Activated:
        made.append(Activated())
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.mark.N02
def test_no_connection_is_lost_across_200_idle_exits(activated: Callable[[], Activated]) -> None:
    """Four services side by side, since most of the time is waiting; two clients each, around the moment of the exit."""
    answers: list[bytes] = []

    def client(service: Activated, late: bool, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311
        served = 0
        while len(service.exits) < 50 or served < 30:  # a life on a busy machine may be over before it has served anybody
            time.sleep(chance.uniform(0.0, 0.3))
            answers.append(raw(service.port, chance.uniform(0.0, 0.15) if late else 0.0))
            served += 1

    with ThreadPoolExecutor(8) as pool:
        services = [activated() for _ in range(4)]
        running = [pool.submit(client, s, late, i) for i, s in enumerate(services) for late in (False, True)]
        for future in running:
            future.result(240)

    exits = [code for s in services for code in s.exits]
    assert len(exits) >= 200
    assert set(exits) == {0}
    assert len(answers) > 200
    assert all(a.startswith(b"HTTP/1.1 200") for a in answers), {a[:80] for a in answers}


def test_connections_accepted_and_unread_are_served_and_those_in_the_backlog_start_the_next_life(
    activated: Callable[[], Activated],
) -> None:
    service = activated()
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda i: raw(service.port, i % 5 / 20), range(150)))

    assert all(a.startswith(b"HTTP/1.1 200") for a in answers), {a[:80] for a in answers}


def test_a_long_request_and_a_silent_newcomer_keep_the_service_up_and_a_quiet_kept_alive_connection_does_not(
    activated: Callable[[], Activated],
) -> None:
    service = activated()
    with httpx.Client(base_url=f"http://127.0.0.1:{service.port}", trust_env=False, timeout=60) as client:
        assert client.get("/", params={"s": 0.6}).status_code == 200  # by the first life: it is the only one
        wait_until(lambda: service.exits == [0], "exit under a kept-alive connection")
        with socket.create_connection(("127.0.0.1", service.port)) as newcomer:
            first = client.get("/").text
            # Far beyond the idle time: the connection that has said nothing yet still finds the same process.
            time.sleep(0.5)
            assert ask(newcomer).endswith(first.encode())
        wait_until(lambda: service.exits == [0, 0], "exit after the newcomer")


# --- a worker ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def held() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as s:
        yield s


def worker_behind(held: socket.socket, tmp_path: Path, model_path: Path, settings: dict[str, Any]) -> WorkerProcess:
    return WorkerProcess(tmp_path, model_path, settings, port=held.getsockname()[1], **handed_over(held))


def at_the_door(worker: WorkerProcess) -> socket.socket:
    """Return a connection that has said nothing yet: the worker stays up for it, however short its idle time is."""
    return socket.create_connection(("127.0.0.1", worker.port))


@pytest.mark.P15
@pytest.mark.N02
def test_idle_worker_exits_0_and_who_connects_then_waits_for_the_next_one(
    held: socket.socket, tmp_path: Path, model_path: Path
) -> None:
    worker = worker_behind(held, tmp_path, model_path, {"idle_timeout_s": 0.5})
    with worker:
        with at_the_door(worker):
            worker.wait_ready()
            # Longer than the idle time: a running request is work.
            assert worker.infer(max_tokens=200, ignore_eos=True)["tokens_generated"] == 200
        assert worker.process.wait(60) == 0, worker.log
        (idle_s,) = (line["idle_s"] for line in map(json.loads, worker.log.splitlines()) if line["message"] == "dormant")
        assert idle_s >= 0.5
        assert any(n.startswith("STATUS=dormant") for n in worker.notices)
        assert "STOPPING=1" in worker.notices
        with socket.create_connection(("127.0.0.1", worker.port), timeout=60) as waiting:
            waiting.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            worker.start()
            assert waiting.recv(4096).startswith(b"HTTP/1.1 200"), worker.log
        assert worker.stop() == 0


def test_worker_without_a_socket_stays_unless_it_is_told_to_go(tmp_path: Path, model_path: Path) -> None:
    with WorkerProcess(tmp_path, model_path, {"idle_timeout_s": 0.2}) as worker:
        worker.wait_ready()
        time.sleep(1.0)
        assert worker.process.poll() is None
        assert worker.stop() == 0
    other = tmp_path / "other"
    other.mkdir()
    with WorkerProcess(other, model_path, {"idle_timeout_s": 0.2, "idle_exit_without_socket": True}) as worker:
        assert worker.process.wait(60) == 0, worker.log


@pytest.mark.X07
def test_worker_that_may_never_go_stays_and_a_silent_queen_ends_it_all_the_same(
    held: socket.socket, tmp_path: Path, model_path: Path
) -> None:
    settings = {"idle_timeout_s": 0, "queen_lease_s": 1.0, "queen_url": "http://127.0.0.1:9", "heartbeat_interval_s": 0.1}
    with worker_behind(held, tmp_path, model_path, settings) as worker:
        with at_the_door(worker):
            worker.wait_ready()
            # One request that runs when the lease is over: it is never cut.
            assert worker.infer(max_tokens=600, ignore_eos=True)["tokens_generated"] == 600
        assert worker.process.wait(60) == 0, worker.log
        assert "dormant" in worker.log


@pytest.mark.N03
def test_queen_is_told_that_the_worker_is_dormant_and_where_to_wake_it(
    held: socket.socket, tmp_path: Path, model_path: Path
) -> None:
    fleet = Fleet(tmp_path, model_path)
    fleet.start_queen()
    try:
        settings = {"idle_timeout_s": 0.3, "queen_url": fleet.queen.url, "fleet_token_file": str(tmp_path / "fleet-token")}
        directory = tmp_path / "worker"
        directory.mkdir()
        with worker_behind(held, directory, model_path, settings) as worker:
            assert worker.process.wait(60) == 0, worker.log
            record = fleet.records()["lab1-cpu0"]
            assert (record["status"], record["url"], record["slots_available"]) == ("dormant", worker.url, 0)
    finally:
        fleet.close()
