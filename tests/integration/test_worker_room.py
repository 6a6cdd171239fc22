"""A worker looks before it loads: what can not fit is not loaded, and whoever waits for it is told so (SPEC S-34, E-38)."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet import MODEL, Fleet, wait_until
from test_queen_cold_start import Socket
from worker_process import WorkerProcess, handed_over

from rbee_serve.models import gguf, memory, ram
from rbee_serve.worker.engine import room
from rbee_serve.worker.engine.protocol import EngineConfig

pytestmark = pytest.mark.integration

#: With the context that `roomy_model` allows: a cache of more than a terabyte.
TOO_MUCH: dict[str, Any] = {"slots": 64, "context_tokens": 1_048_576}


@pytest.fixture(scope="module")
def roomy_model(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model, whose header says that it was trained for a million tokens."""
    path = tmp_path_factory.mktemp("model") / "roomy.gguf"
    shutil.copyfile(model_path, path)
    with path.open("r+b") as f:
        head = f.read(1 << 16)
        at = head.index(b"llama.context_length") + len(b"llama.context_length")
        kind, length = struct.unpack_from("<II", head, at)
        assert (kind, length) == (4, 8192)
        f.seek(at + 4)
        f.write(struct.pack("<I", TOO_MUCH["context_tokens"]))
    return path


def test_what_can_not_fit_is_not_loaded_and_the_figures_are_told(tmp_path: Path, roomy_model: Path) -> None:
    """Not 78: memory may be there again in a moment, and systemd tries an always-on worker a few times."""
    worker = WorkerProcess(tmp_path, roomy_model, TOO_MUCH)
    done = worker.run()
    assert done.returncode == 1, done.stderr
    assert "out of memory, nothing was loaded: the model needs " in done.stderr + done.stdout
    assert "64 slots x 1048576 tokens" in done.stderr + done.stdout
    assert "READY=1" not in worker.notices
    assert any(n.startswith("STATUS=out of memory, nothing was loaded") for n in worker.notices)


def test_a_self_test_says_the_same(tmp_path: Path, roomy_model: Path) -> None:
    done = WorkerProcess(tmp_path, roomy_model, TOO_MUCH).run("--self-test")
    assert done.returncode == 5
    assert done.stderr.startswith("rbee-worker: out of memory, nothing was loaded")


@pytest.fixture
def sleeping(tmp_path: Path, roomy_model: Path) -> Iterator[tuple[Fleet, Socket]]:
    """A fleet whose only worker sleeps, and finds no room when it is woken the next time."""
    (tmp_path / "worker").mkdir()
    fleet = Fleet(tmp_path, roomy_model, queen_settings={"ping_interval_s": 0.5})
    settings = {"idle_timeout_s": 1.0, "queen_url": fleet.queen.url, "fleet_token_file": str(tmp_path / "fleet-token")}
    behind = Socket(tmp_path / "worker", roomy_model, settings)
    try:
        fleet.start_queen()
        behind.wake()
        wait_until(lambda: [w["status"] for w in fleet.records().values()] == ["dormant"], "the worker sleeps")
        wait_until(lambda: behind.worker.process.poll() is not None, "its process has ended")
        text = behind.worker.config.read_text()
        for key, value in TOO_MUCH.items():
            text = "".join(f"{key} = {value}\n" if line.startswith(f"{key} =") else line for line in text.splitlines(True))
        behind.worker.config.write_text(text.replace("idle_timeout_s = 1.0", "idle_timeout_s = 6.0"))
        yield fleet, behind
    finally:
        fleet.close()
        behind.close()


def test_a_request_that_wakes_a_worker_without_room_gets_507_and_later_ones_find_it_asleep_again(
    sleeping: tuple[Fleet, Socket],
) -> None:
    fleet, behind = sleeping
    answers: list[httpx.Response] = []
    body = {"model": MODEL, "prompt": "x", "stream": False, "max_tokens": 2}

    def ask() -> None:
        with fleet.client() as client:
            answers.append(client.post("/v1/inference", json=body))

    waiting = [threading.Thread(target=ask) for _ in range(3)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(120)
    errors = [a.json()["error"] for a in answers]
    assert {(a.status_code, e["code"]) for a, e in zip(answers, errors, strict=True)} == {(507, "INSUFFICIENT_RAM")}
    assert all("lab1-cpu0 could not be woken: out of memory, nothing was loaded" in e["message"] for e in errors)
    assert behind.lives == 2, "one attempt for all"
    # It stays a while, so that it is not started again and again; it says no at once, and is known to be down.
    with httpx.Client(
        base_url=behind.worker.url, headers={"Authorization": f"Bearer {fleet.token}"}, timeout=60, trust_env=False
    ) as direct:
        told = direct.post("/v1/inference", json={"prompt": "x", "stream": False})
    assert (told.status_code, told.json()["error"]["code"]) == (507, "INSUFFICIENT_RAM")
    assert behind.worker.process.poll() is None
    wait_until(lambda: fleet.records()["lab1-cpu0"]["status"] == "failed", "the queen has heard of it")

    # Then its socket waits on: 75 keeps systemd from starting it by itself. With room, the next request is answered.
    wait_until(lambda: behind.worker.process.poll() is not None, "it has left")
    assert behind.worker.process.returncode == 75, behind.worker.log
    wait_until(lambda: fleet.records()["lab1-cpu0"]["status"] == "dormant", "asleep again")
    text = behind.worker.config.read_text()
    behind.worker.config.write_text(text.replace("slots = 64", "slots = 1").replace("1048576", "256"))
    with fleet.client() as client:
        answer = client.post("/v1/inference", json=body)
    assert (answer.status_code, answer.json()["tokens_generated"]) == (200, 2)
    assert behind.lives == 3


def config_of(path: Path, **settings: Any) -> EngineConfig:
    base = {"model_path": str(path), "backend": "cpu", "device": 0, "threads": 1, "model_sha256": None}
    return EngineConfig(**{**base, **memory.DEFAULTS, **settings})


def test_it_is_the_preflight_s_own_figure_without_what_the_processes_hold_already(model_path: Path, monkeypatch: Any) -> None:
    header = gguf.read(model_path)
    parts = memory.need(gguf.facts(model_path), {"slots": 2})
    assert parts is not None
    take = parts["total"] - parts["process"]
    monkeypatch.setattr(ram, "room", lambda path: take)
    room.check(config_of(model_path, slots=2), header)
    monkeypatch.setattr(ram, "room", lambda path: take - 1)
    with pytest.raises(room.InsufficientRam) as e:
        room.check(config_of(model_path, slots=2), header)
    assert e.value.details == {"required_bytes": take, "available_bytes": take - 1}
    room.check(config_of(model_path, slots=2, memory_check=False), header)
    # A device has an account of its own.
    with pytest.raises(room.InsufficientVram, match="of memory of CUDA0"):
        room.check_device(config_of(model_path, slots=2, backend="cuda"), header, "CUDA0", 100_000_000)
    room.check_device(config_of(model_path, slots=2, backend="cuda"), header, "CUDA0", 0)


def test_all_parts_of_a_split_model_count(model_path: Path, tmp_path: Path) -> None:
    header = gguf.read(model_path)
    for n in (1, 2, 3):
        (tmp_path / f"m-{n:05d}-of-00003.gguf").symlink_to(model_path)
    first = gguf.Header({**header.values, "split.count": 3}, header.parameters, header.matrix_types, header.weight_bytes)
    assert len(room.headers_of(first, str(tmp_path / "m-00001-of-00003.gguf"))) == 3
    assert len(room.headers_of(first, str(tmp_path / "renamed.gguf"))) == 1
    assert len(room.headers_of(header, str(model_path))) == 1


def test_a_worker_s_mapped_weights_are_no_free_memory(tmp_path: Path, model_path: Path) -> None:
    """MemAvailable counts them; what rbee reckons with does not."""
    with WorkerProcess(tmp_path, model_path, {"slots": 1, "context_tokens": 256}) as worker:
        worker.wait_ready()
        worker.infer(max_tokens=2)
        weights = gguf.facts(model_path)["memory"]["weight_bytes"]
        assert ram.mapped()[str(model_path.resolve())] > 0.9 * weights
        assert ram.own_bytes(worker.process.pid) > 50_000_000
        assert json.loads(worker.config.read_text().partition("model_path = ")[2].splitlines()[0]) == str(model_path)
        assert worker.stop() == 0


def test_somebody_at_the_socket_is_told_from_a_start_by_hand(tmp_path: Path, roomy_model: Path) -> None:
    """Nobody waits: it ends at once, so that `systemctl start` does not wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        settings = TOO_MUCH | {"idle_timeout_s": 300.0}
        worker = WorkerProcess(tmp_path, roomy_model, settings, port=held.getsockname()[1], **handed_over(held))
        with worker:
            assert worker.process.wait(60) == 75, worker.log
            assert json.loads(worker.log.splitlines()[-1])["message"].startswith("out of memory, nothing was loaded")
