"""How a worker starts, refuses to start, and ends (SPEC E-10, E-19, E-21, E-22, N-04, CAP-77)."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet import Fleet, events_of, ids_of, wait_until
from standing_still import children, standing_still
from worker_process import TOKEN, HeldLoad, WorkerProcess, handed_over

pytestmark = pytest.mark.integration

LONG = {"prompt": "Once upon a time", "max_tokens": 150, "ignore_eos": True, "temperature": 0}


# --- what it refuses to start with ------------------------------------------------------------------------------------


def refused(worker: WorkerProcess, *says: str) -> None:
    """It must end with 78 and one line that says why, on stderr and to systemd."""
    done = worker.run()
    assert done.returncode == 78, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    (status,) = [n for n in worker.notices if n.startswith("STATUS=")]
    assert "READY=1" not in worker.notices
    for text in says:
        assert text in lines[0]
        assert text in status
    assert TOKEN not in done.stderr


def test_good_settings_pass_the_check(tmp_path: Path, model_path: Path) -> None:
    worker = WorkerProcess(tmp_path, model_path)
    done = worker.run("--check-config")

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{worker.config}: ok\n", "")


def test_missing_model_file(tmp_path: Path) -> None:
    path = tmp_path / "gone.gguf"
    refused(WorkerProcess(tmp_path, path), str(path), "No such file")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "GGUF"), (b"PK\x03\x04 a zip file", "GGUF"), (b"GGUF\x03\x00\x00\x00", "cut off: 8 bytes wanted at 8")],
)
def test_model_file_that_is_no_gguf(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refused(WorkerProcess(tmp_path, path), str(path), said)


def test_model_file_that_is_cut_short_is_found_out_by_llama_cpp(tmp_path: Path, model_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with model_path.open("rb") as whole:
        path.write_bytes(whole.read(8_000_000))
    with WorkerProcess(tmp_path, path) as worker:
        assert worker.process.wait(60) == 78, worker.log
        assert any(n.startswith("STATUS=") and str(path) in n for n in worker.notices), worker.notices
        assert str(path) in worker.log
        assert "READY=1" not in worker.notices


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])  # noqa: S104
def test_network_without_a_token(tmp_path: Path, model_path: Path, host: str) -> None:
    refused(WorkerProcess(tmp_path, model_path, {"host": host, "fleet_token_file": None}), host, "fleet token")


def test_address_that_the_queen_cannot_use(tmp_path: Path, model_path: Path) -> None:
    settings = {"host": "0.0.0.0", "queen_url": "http://127.0.0.1:9"}  # noqa: S104
    refused(WorkerProcess(tmp_path, model_path, settings), "url: required")


def test_secret_that_others_may_read(tmp_path: Path, model_path: Path) -> None:
    worker = WorkerProcess(tmp_path, model_path)
    (tmp_path / "fleet-token").chmod(0o644)
    refused(worker, str(tmp_path / "fleet-token"), "0644")


@pytest.mark.parametrize("content", ["", "\n", "two\nlines\n", "  padded\n"])
def test_secret_of_another_form(tmp_path: Path, model_path: Path, content: str) -> None:
    worker = WorkerProcess(tmp_path, model_path)
    (tmp_path / "fleet-token").write_text(content, encoding="utf-8")
    refused(worker, str(tmp_path / "fleet-token"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"slots": 0}, "slots"), ({"prot": 1}, "prot"), ({"name": "CPU 0"}, "name"), ({"backend": "quantum"}, "backend")],
)
def test_wrong_settings(tmp_path: Path, model_path: Path, settings: dict[str, Any], says: str) -> None:
    worker = WorkerProcess(tmp_path, model_path, settings)
    done = worker.run("--check-config")

    assert done.returncode == 78
    assert says in done.stderr
    assert str(worker.config) in done.stderr
    assert "Traceback" not in done.stderr


def test_port_that_is_taken(tmp_path: Path, model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(WorkerProcess(tmp_path, model_path, port=port), f"127.0.0.1:{port}", "in use")


# --- how it comes up --------------------------------------------------------------------------------------------------


@pytest.mark.S48
@pytest.mark.P03
def test_port_answers_while_loading_and_ready_is_said_after(tmp_path: Path, model_path: Path) -> None:
    held = HeldLoad(tmp_path / "prefixes")
    with WorkerProcess(tmp_path, model_path, held.settings, environ={"WATCHDOG_USEC": "300000"}) as worker:

        def early() -> dict[str, Any] | None:
            try:
                with worker.client() as client:
                    return dict(client.get("/v1/ready").json())
            except httpx.ConnectError:
                return None

        first = wait_until(early, "port answers")
        assert first["state"] == "loading"
        wait_until(lambda: any("30 of 30 layers" in n for n in worker.notices), "all layers")
        held.release()
        with worker.client() as client, client.stream("GET", "/v1/loading/progress") as response:
            stages = [e["stage"] for e in events_of(response)]
        assert stages[-1] == "ready"
        worker.wait_ready()
        notices = worker.notices
        before = notices[: notices.index("READY=1")]
        assert any(n.startswith("EXTEND_TIMEOUT_USEC=") for n in before)
        assert any(n.startswith("STATUS=loading") and "layers" in n for n in before)
        assert any(n.startswith("STATUS=smollm2-135m on cpu") for n in notices)
        wait_until(lambda: worker.notices.count("WATCHDOG=1") > 3, "watchdog fed")
        assert worker.stop() == 0
        assert "STOPPING=1" in worker.notices


def test_command_line_and_environment_hold_no_secret(tmp_path: Path, model_path: Path) -> None:
    with WorkerProcess(tmp_path, model_path) as worker:
        worker.wait_ready()
        for pid in (worker.process.pid, worker.engine_pid):
            for name in ("cmdline", "environ"):
                assert TOKEN.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        assert worker.stop() == 0
        assert TOKEN not in worker.log


def test_socket_of_systemd_is_taken_over_with_those_who_wait_in_it(tmp_path: Path, model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port, fd = held.getsockname()[1], held.fileno()
        worker = WorkerProcess(tmp_path, model_path, port=port, **handed_over(held))
        with worker, socket.create_connection(("127.0.0.1", port), timeout=60) as waiting:
            waiting.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert waiting.recv(4096).startswith(b"HTTP/1.1 200"), worker.log
            worker.wait_ready()
            assert worker.infer(max_tokens=2)["tokens_generated"] == 2
            held_by_engine = {str(f.readlink()) for f in Path(f"/proc/{worker.engine_pid}/fd").iterdir()}
            assert str(Path(f"/proc/self/fd/{fd}").readlink()) not in held_by_engine, "the engine must not hold the port"
            assert worker.stop() == 0


# --- how it ends ------------------------------------------------------------------------------------------------------


class Streaming:
    """A stream read in a thread, so that the test can act meanwhile."""

    def __init__(self, worker: WorkerProcess, **more: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self._worker, self._body = worker, LONG | more
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        wait_until(lambda: len(self.events) > 5 or self.error, "stream begun")

    def _read(self) -> None:
        try:
            with self._worker.client() as client, client.stream("POST", "/v1/inference", json=self._body) as response:
                for event in events_of(response):
                    self.events.append(event)
        except BaseException as e:
            self.error = e

    def finish(self) -> list[dict[str, Any]]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.events


@pytest.fixture
def worker(tmp_path: Path, model_path: Path) -> Any:
    with WorkerProcess(tmp_path, model_path, {"stall_timeout_s": 2.0}, {"WATCHDOG_USEC": "600000"}) as process:
        yield process.wait_ready()


def test_sigterm_lets_a_running_stream_finish_and_refuses_new_work(worker: WorkerProcess) -> None:
    expected = ids_of(worker.stream(**LONG | {"max_tokens": 400}))
    running = Streaming(worker, max_tokens=400)
    with standing_still(worker.engine_pid):  # so that the stream is not over before all has been looked at
        worker.process.terminate()
        wait_until(lambda: "STOPPING=1" in worker.notices, "draining")
        with worker.client() as client:
            response = client.post("/v1/inference", json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "WORKER_DRAINING")

    events = running.finish()

    assert ids_of(events) == expected
    assert events[-1]["stop_reason"] == "MAX_TOKENS"
    assert worker.process.wait(100) == 0, worker.log
    assert any(n.startswith("STATUS=draining 1 ") for n in worker.notices)


def test_stream_over_the_drain_limit_is_handed_back(tmp_path: Path, model_path: Path) -> None:
    with WorkerProcess(tmp_path, model_path, {"drain_timeout_s": 0.3}) as worker:
        worker.wait_ready()
        running = Streaming(worker, max_tokens=1000)
        assert worker.stop() == 0, worker.log
        events = running.finish()
        assert (events[-1]["type"], events[-1]["code"]) == ("error", "WORKER_DRAINING")
        ids_of(events)


@pytest.mark.parametrize("path", ["/v1/admin/drain", "/v1/admin/shutdown"])
def test_admin_routes_drain_and_end_with_0(worker: WorkerProcess, path: str) -> None:
    running = Streaming(worker)
    with worker.client() as client:
        assert client.post(path).status_code == 202
    assert running.finish()[-1]["stop_reason"] == "MAX_TOKENS"
    assert worker.process.wait(100) == 0, worker.log


def test_fleet_token_changes_on_sighup_and_a_running_stream_goes_on(worker: WorkerProcess) -> None:
    def status(token: str) -> int:
        with worker.client(token) as client:
            return client.get("/info").status_code

    running = Streaming(worker)
    secret = worker.directory / "fleet-token"
    secret.write_text("two\nlines\n", encoding="utf-8")
    worker.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "fleet token not reloaded" in worker.log, "the refusal in the log")
    assert status(TOKEN) == 200

    secret.write_text("another-token\n", encoding="utf-8")
    worker.process.send_signal(signal.SIGHUP)
    wait_until(lambda: status("another-token") == 200, "the new token opens")

    assert status(TOKEN) == 401
    assert running.finish()[-1]["stop_reason"] == "MAX_TOKENS"


def test_sigterm_while_loading_ends_with_0(tmp_path: Path, model_path: Path) -> None:
    with WorkerProcess(tmp_path, model_path, HeldLoad(tmp_path / "prefixes").settings) as worker:
        wait_until(lambda: any(n.startswith("STATUS=loading") for n in worker.notices), "loading")
        assert worker.stop() == 0, worker.log
        assert "READY=1" not in worker.notices


def test_engine_that_is_killed_ends_the_worker_with_1_and_its_streams_with_the_reason(worker: WorkerProcess) -> None:
    running = Streaming(worker, max_tokens=900)
    os.kill(worker.engine_pid, signal.SIGKILL)
    events = running.finish()

    assert (events[-1]["type"], events[-1]["code"]) == ("error", "WORKER_CRASHED")
    assert worker.process.wait(100) == 1, worker.log
    assert any("SIGKILL" in n for n in worker.notices if n.startswith("STATUS=")), worker.notices
    assert "SIGKILL" in worker.log


def test_engine_that_hangs_is_no_longer_vouched_for(worker: WorkerProcess) -> None:
    engine = worker.engine_pid
    fed: Callable[[], int] = lambda: worker.notices.count("WATCHDOG=1")  # noqa: E731
    count = fed()
    wait_until(lambda: fed() > count + 2, "fed while it moves")
    with standing_still(engine):
        # Silence of three watchdog periods: the time in which systemd would have killed it.
        def silent() -> bool:
            before = fed()
            time.sleep(1.8)
            return fed() == before

        wait_until(silent, "watchdog starved")
    count = fed()
    wait_until(lambda: fed() > count + 2, "fed again")


def test_engine_does_not_outlive_a_killed_worker(worker: WorkerProcess) -> None:
    engine = worker.engine_pid
    worker.process.kill()
    worker.process.wait()
    wait_until(lambda: not Path(f"/proc/{engine}/exe").exists() or _is_zombie(engine), "engine gone")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# --- beside the queen -------------------------------------------------------------------------------------------------


def test_queen_hears_loading_idle_busy_idle_draining_and_the_end(tmp_path: Path, model_path: Path) -> None:
    fleet = Fleet(tmp_path, model_path, worker_settings={"heartbeat_interval_s": 60.0, "slots": 1})
    seen: list[str] = []

    def state() -> str:
        now = str(fleet.records().get("lab1-cpu0", {}).get("status", "gone"))
        if not seen or seen[-1] != now:
            seen.append(now)
        return now

    try:
        fleet.start_queen()
        fleet.add_worker("lab1")
        wait_until(lambda: state() == "idle", "idle")
        with fleet.worker_client("lab1-cpu0") as client, client.stream("POST", "/v1/inference", json=LONG) as response:
            stream = events_of(response)
            next(stream)
            with standing_still(*children(fleet.workers["lab1-cpu0"].pid)):  # so that no state is over before it is seen
                wait_until(lambda: state() == "busy", "busy")
                os.kill(fleet.workers["lab1-cpu0"].pid, signal.SIGTERM)
                wait_until(lambda: state() == "draining", "draining")
            assert list(stream)[-1]["stop_reason"] == "MAX_TOKENS"
        wait_until(lambda: state() in ("gone", "stopped"), "the end")
        # Loading may be over between two looks; the queen's log has what it heard.
        heard = [line["state"] for line in fleet.queen.lines if line["message"] == "worker registered"]
        assert heard == ["loading"]
    finally:
        fleet.close()


def test_queen_that_is_away_costs_a_warning_and_nothing_else(tmp_path: Path, model_path: Path) -> None:
    settings = {"queen_url": "http://127.0.0.1:9", "heartbeat_interval_s": 0.05}
    with WorkerProcess(tmp_path, model_path, settings) as worker:
        worker.wait_ready()
        assert worker.infer(max_tokens=3)["tokens_generated"] == 3
        with worker.client() as client:
            wait_until(lambda: 'worker_heartbeats_total{result="failed"} 1' in client.get("/metrics").text, "tens of beats")
        assert worker.stop() == 0
        assert worker.log.count("does not take heartbeats") == 1
