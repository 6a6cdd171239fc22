"""A queen that restarts refuses nobody: the service manager holds its socket meanwhile (here: this test, as systemd does)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fleet import wait_until

from rbee_ctl.embedded import free_port
from tests.repeated_calls import Caller

pytestmark = pytest.mark.integration

#: Puts the socket where systemd does, says so under its own process id, and becomes the queen.
AS_SYSTEMD = 'if [ -n "$KEPT" ]; then exec 3<&"$KEPT" {KEPT}<&-; export LISTEN_PID=$$ LISTEN_FDS=1; fi; exec "$@"'


TOKEN = "t" * 40 + "\n"
#: Without any a queen listens on loopback alone.
KEYS = json.dumps(
    {
        "version": 1,
        "keys": [{"id": "k1", "name": "test", "admin": True, "sha256": "0" * 64, "created_at": "2026-01-01T00:00:00Z"}],
    }
)


class Manager:
    """What systemd does for a unit with ``Type=notify`` and ``FileDescriptorStoreMax=1``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host, self.port = folder, "127.0.0.1", free_port()
        self.inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.inbox.bind(str(folder / "notify"))
        self.inbox.settimeout(60)
        self.kept: int | None = None
        self.said: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the queen; returns when it is ready."""
        settings = {
            "host": self.host,
            "client_keys_file": self.secret("keys", KEYS),
            "fleet_token_file": self.secret("token", TOKEN),
        }
        lines = [f"port = {self.port}", *(f'{key} = "{value}"' for key, value in settings.items())]
        (self.folder / "queen.toml").write_text("\n".join(lines) + "\n")
        queen = [sys.executable, "-m", "rbee_serve.queen.main", "--config", str(self.folder / "queen.toml")]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LISTEN_", "RBEE_"))}
        environ = inherited | {"NOTIFY_SOCKET": str(self.folder / "notify"), "KEPT": str(self.kept or "")}
        fds = (self.kept,) if self.kept is not None else ()
        self.process = subprocess.Popen(["bash", "-c", AS_SYSTEMD, "bash", *queen], env=environ, pass_fds=fds)
        self.until("READY=1")

    def secret(self, name: str, text: str) -> str:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text)
        return str(path)

    def until(self, word: str) -> None:
        """Take messages until one says so, and do what they ask for."""
        while True:
            data, fds, *_ = socket.recv_fds(self.inbox, 4096, 1)
            lines = data.decode().splitlines()
            self.said.append(lines[0])
            if lines[0] == "FDSTOREREMOVE=1":
                self.drop()
            if lines[0] == "FDSTORE=1":
                assert self.kept is None
                (self.kept,) = fds
            if word in lines:
                return

    def drop(self) -> None:
        if self.kept is not None:
            os.close(self.kept)
        self.kept = None

    def end(self, number: signal.Signals) -> int:
        """Send the queen a signal and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.drop()
        self.inbox.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(tmp_path)) as one:
        yield one


def test_nobody_is_refused_while_the_queen_restarts(manager: Manager) -> None:
    manager.start()
    with Caller(f"http://127.0.0.1:{manager.port}/health") as caller:
        for _ in range(4):
            so_far = len(caller.answers)
            wait_until(lambda so_far=so_far: len(caller.answers) > so_far, "answers again")
            assert manager.end(signal.SIGTERM) == 0
            manager.start()
    assert caller.failed == []
    assert set(caller.answers) == {200}
    assert manager.said.count("FDSTORE=1") == 1, "the socket is given away once and then handed on"


def test_a_queen_that_is_killed_loses_no_connection_that_it_had_not_taken(manager: Manager) -> None:
    manager.start()
    assert manager.end(signal.SIGKILL) == -signal.SIGKILL
    with socket.create_connection(("127.0.0.1", manager.port), timeout=60) as waiting:
        waiting.sendall(b"GET /health HTTP/1.1\r\nHost: queen\r\nConnection: close\r\n\r\n")
        manager.start()
        assert waiting.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_socket_of_older_settings_is_given_back_and_the_new_address_is_used(manager: Manager) -> None:
    manager.start()
    before, manager.port = manager.port, free_port()
    assert manager.end(signal.SIGTERM) == 0
    manager.start()
    assert httpx.get(f"http://127.0.0.1:{manager.port}/health", timeout=60, trust_env=False).status_code == 200
    assert [m for m in manager.said if m.startswith("FDSTORE")] == ["FDSTORE=1", "FDSTOREREMOVE=1", "FDSTORE=1"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", before), timeout=5)


def test_a_new_address_on_the_same_port_is_free_at_once(manager: Manager) -> None:
    manager.start()
    manager.host = "localhost"  # where it is already
    assert manager.end(signal.SIGTERM) == 0
    manager.start()
    manager.host = "0.0.0.0"  # noqa: S104 -- with keys
    assert manager.end(signal.SIGTERM) == 0
    manager.start()
    assert httpx.get(f"http://127.0.0.1:{manager.port}/health", timeout=60, trust_env=False).status_code == 200
    assert [m for m in manager.said if m.startswith("FDSTORE")] == ["FDSTORE=1", "FDSTOREREMOVE=1", "FDSTORE=1"]
