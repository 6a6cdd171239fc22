"""One real worker process with the real model, as its unit would start it: notify socket, settings file, secret file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from fleet import events_of, wait_until

from rbee_ctl.embedded import free_port

TOKEN = "worker-test-token-9f3a"

# What systemd does before exec: the listening socket is descriptor 3 and nothing else, LISTEN_PID the worker's own pid.
_HAND_OVER = """
import os, sys
fd = int(sys.argv[1])
if fd != 3:
    os.dup2(fd, 3)
    os.close(fd)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.argv[2], sys.argv[2:])
"""


def handed_over(held: socket.socket) -> dict[str, Any]:
    """Return what a WorkerProcess needs to get ``held`` as systemd gives it."""
    return {"pass_fds": (held.fileno(),), "prefix": [sys.executable, "-c", _HAND_OVER, str(held.fileno())]}


class HeldLoad:
    """An engine stays in loading until `release`: its store of prefixes has a pipe among its files, at which opening waits."""

    def __init__(self, directory: Path) -> None:
        self.settings = {"prefix_store_dir": str(directory)}
        (directory / "cpu0").mkdir(parents=True)
        self._pipe = directory / "cpu0" / "hold.prefix"
        os.mkfifo(self._pipe)

    def release(self) -> None:
        """Let it go on, as soon as it has come so far."""
        self._pipe.open("wb").close()


@dataclass
class WorkerProcess:
    """``start``, talk, ``stop``. Everything it says to systemd is in ``notices``, everything it logs in ``log``."""

    directory: Path
    model_path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    pass_fds: tuple[int, ...] = ()
    prefix: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        secret = self.directory / "fleet-token"
        secret.touch(0o600)
        secret.write_text(TOKEN + "\n", encoding="utf-8")
        values = {
            "name": "cpu0",
            "hive": "lab1",
            "port": self.port,
            "model_id": "smollm2-135m",
            "model_path": str(self.model_path),
            "fleet_token_file": str(secret),
            "slots": 2,
            "context_tokens": 1024,
            "threads": 1,
        } | self.settings
        self.config = self.directory / "cpu0.toml"
        lines = [f"{k} = {json.dumps(v)}\n" for k, v in values.items() if v is not None]
        self.config.write_text("".join(lines), encoding="utf-8")
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(self.directory / "notify"))
        self._said: list[str] = []
        self._read_so_far = threading.Event()
        # A thread, as the manager's own loop would: the queue of the socket holds few datagrams.
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._poller: httpx.Client | None = None

    @property
    def command(self) -> list[str]:
        return [*self.prefix, sys.executable, "-m", "rbee_serve.worker.main", "--config", str(self.config)]

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {"NOTIFY_SOCKET": str(self.directory / "notify")} | self.environ

    def start(self) -> WorkerProcess:
        with (self.directory / "log").open("wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.env, pass_fds=self.pass_fds)
        return self

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end, which must come by itself."""
        try:
            return subprocess.run([*self.command, *args], capture_output=True, text=True, env=self.env, timeout=120, check=False)
        finally:
            self._hang_up()

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(encoding="utf-8")

    @property
    def notices(self) -> list[str]:
        """Return all lines that systemd would have got so far: of a process that has ended, every one."""
        if self._listener.is_alive():
            self._read_so_far.clear()
            self._note(b"SO-FAR")
            assert self._read_so_far.wait(60)
        return list(self._said)

    def _note(self, data: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(data, str(self.directory / "notify"))

    def _listen(self) -> None:
        while (data := self._manager.recv(65536)) != b"HANG-UP":
            if data == b"SO-FAR":
                self._read_so_far.set()
            else:
                self._said += data.decode().split("\n")

    def _hang_up(self) -> None:
        """Return when everything that was sent is in ``notices``."""
        with self._manager:
            self._note(b"HANG-UP")
            self._listener.join(60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, token: str | None = TOKEN) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def wait_ready(self) -> WorkerProcess:
        def ready() -> bool:
            assert self.process.poll() is None, self.log
            return "READY=1" in self.notices

        wait_until(ready, "worker ready")
        return self

    def record(self) -> dict[str, Any]:
        if self._poller is None:  # making a client costs more than 20 ms, which a test that polls should not take
            self._poller = self.client()
        answer: dict[str, Any] = self._poller.get("/info").json()["worker"]
        return answer

    def wait_idle(self) -> None:
        def idle() -> bool:
            record = self.record()
            return bool(record["slots_available"] == record["slots_total"])

        wait_until(idle, "slots free")

    def infer(self, prompt: str = "Once upon a time", **params: Any) -> dict[str, Any]:
        """Return the whole answer."""
        with self.client() as client:
            body = {"prompt": prompt, "temperature": 0, "stream": False} | params
            response = client.post("/v1/inference", json=body)
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer

    def stream(self, prompt: str = "Once upon a time", **params: Any) -> list[dict[str, Any]]:
        """Return the events of a stream, [DONE] checked."""
        with self.client() as client:
            body = {"prompt": prompt, "temperature": 0} | params
            with client.stream("POST", "/v1/inference", json=body) as response:
                assert response.status_code == 200, response.read()
                return list(events_of(response))

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="ascii").split()
        assert len(children) == 1, children
        return int(children[0])

    def stop(self) -> int:
        if self._poller is not None:
            self._poller.close()
            self._poller = None
        self.process.terminate()
        return self.process.wait(100)

    def __enter__(self) -> WorkerProcess:
        return self.start()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._poller is not None:
            self._poller.close()
        self._hang_up()
