"""A fleet on loopback: the real queen and real workers as processes, as systemd would start them."""

from __future__ import annotations

import hashlib
import json
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from rbee_ctl.embedded import free_port
from rbee_serve.contract.events import SseParser

MODEL = "smollm2-135m"
MODEL_REF = "hf:HuggingFaceTB/SmolLM2-135M-Instruct:SmolLM2-135M-Instruct.Q4_1.gguf"

_T = TypeVar("_T")


def wait_until(condition: Callable[[], _T | None], what: str, *, limit_s: float = 60.0) -> _T:
    """Return the condition's first result that is true; fail after ``limit_s``."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"not within {limit_s:g} s: {what}")


@dataclass
class Service:
    """One process of a service; its output goes to a file."""

    module: str
    config: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.config.with_suffix(".log").read_text(encoding="utf-8")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Return the whole lines of the log so far; every one of them is JSON."""
        return [json.loads(line) for line in self.log.rpartition("\n")[0].splitlines()]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        with self.config.with_suffix(".log").open("ab") as log:
            command = [sys.executable, "-m", self.module, "--config", str(self.config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        """As ``kill -9`` does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def pause(self) -> None:
        """Let it stand still, connections open, as a hung process does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self, limit_s: float = 100.0) -> int:
        """End it by SIGTERM and return its exit code."""
        assert self.process is not None
        self.go_on()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.module} did not end within {limit_s:g} s:\n{self.log}") from None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclass
class Fleet:
    """A queen and its workers ``lab1-cpu0``, ``lab2-cpu0``, ..."""

    directory: Path
    model_path: Path
    queen_settings: dict[str, Any] = field(default_factory=dict)
    worker_settings: dict[str, Any] = field(default_factory=dict)
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    workers: dict[str, Service] = field(default_factory=dict)
    queen: Service = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.key.encode()).hexdigest()
        keys = {
            "version": 1,
            "keys": [{"id": "k1", "name": "test", "admin": True, "sha256": digest, "created_at": "2026-01-01T00:00:00Z"}],
        }
        self._secret("client-keys", json.dumps(keys))
        self._secret("fleet-token", self.token + "\n")
        state = self.directory / "queen-state"
        state.mkdir(exist_ok=True)
        settings = {"client_keys_file": str(self.directory / "client-keys"), "state_dir": str(state)}
        self.queen = self._service("queen", settings | self.queen_settings, "rbee_serve.queen.main")

    def add_worker(self, hive: str, **settings: Any) -> str:
        """Start one more worker; returns its id."""
        values = {
            "name": "cpu0",
            "hive": hive,
            "model_id": MODEL,
            "model_ref": MODEL_REF,
            "model_path": str(self.model_path),
            "slots": 2,
            "context_tokens": 1024,
            "threads": 1,
            "queen_url": self.queen.url,
            "heartbeat_interval_s": 2.0,
        }
        service = self._service(hive, values | self.worker_settings | settings, "rbee_serve.worker.main")
        self.workers[f"{hive}-cpu0"] = service
        service.start()
        return f"{hive}-cpu0"

    def _secret(self, name: str, text: str) -> None:
        path = self.directory / name
        path.touch(0o600)
        path.write_text(text, encoding="utf-8")

    def _service(self, name: str, settings: dict[str, Any], module: str) -> Service:
        port = settings.get("port") or free_port()
        common = {"port": port, "fleet_token_file": str(self.directory / "fleet-token")}
        lines = [f"{key} = {json.dumps(value)}" for key, value in (common | settings).items()]
        path = self.directory / f"{name}.toml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Service(module, path, port)

    def start_queen(self) -> None:
        self.queen.start()
        wait_until(self._queen_answers, f"queen up\n{self.queen.log}")

    def _queen_answers(self) -> bool:
        assert self.queen.running, self.queen.log
        try:
            return httpx.get(f"{self.queen.url}/health", timeout=60, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def client(self, **more: Any) -> httpx.Client:
        """Return an HTTP client of the queen with the client's key."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.queen.url, headers=headers, timeout=120, trust_env=False, **more)

    def worker_client(self, worker_id: str) -> httpx.Client:
        """Return an HTTP client of a worker with the fleet's token."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.workers[worker_id].url, headers=headers, timeout=120, trust_env=False)

    def records(self) -> dict[str, dict[str, Any]]:
        """Return the queen's list of workers by id."""
        with self.client() as client:
            return {w["id"]: w for w in client.get("/v1/workers").json()["workers"]}

    def wait_ready(self) -> None:
        """Wait until the queen knows every worker as idle, with nothing running."""

        def ready() -> bool:
            for worker_id, service in self.workers.items():
                assert service.running, f"{worker_id}:\n{service.log}"
            idle = {i for i, w in self.records().items() if w["status"] == "idle" and w["slots_available"] == w["slots_total"]}
            return set(self.workers) == idle

        wait_until(ready, f"all workers idle, got {self.records()}", limit_s=90)

    def revive(self) -> None:
        """Start again whatever a test has killed, and wait until all is well."""
        for service in self.workers.values():
            if not service.running:
                service.start()
        if not self.queen.running:
            self.start_queen()
        self.wait_ready()

    def close(self) -> None:
        for service in [*self.workers.values(), self.queen]:
            if service.running:
                service.stop()


def events_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream as they come; checks that [DONE] comes once, last."""
    parser = SseParser()
    done = 0
    for chunk in response.iter_raw():
        for payload in parser.feed(chunk):
            assert not done, f"after [DONE]: {payload}"
            if payload == "[DONE]":
                done += 1
            else:
                yield json.loads(payload)
    assert done == 1


def ids_of(events: list[dict[str, Any]]) -> list[int]:
    """Return the token ids; checks that the numbering has no gap."""
    tokens = [e for e in events if e["type"] == "token"]
    assert [t["i"] for t in tokens] == list(range(len(tokens)))
    return [t["id"] for t in tokens]


def text_of(events: list[dict[str, Any]]) -> str:
    """Return the text."""
    return "".join(e["t"] for e in events if e["type"] == "token")
