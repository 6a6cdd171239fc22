"""Reaching machines through the real Ansible and ssh, as far as one machine can show it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes no more connections and answers none: a firewall that drops looks the same."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(server.getsockname())
            waiting.append(client)
        yield server.getsockname()[1]
        for client in waiting:
            client.close()


@pytest.mark.S02
def test_silence_is_tried_three_times_and_changes_nothing(tmp_path: Path, silent_port: int) -> None:
    inventory = tmp_path / "inventory.yml"
    inventory.write_text("rbee_hives:\n  hosts:\n")
    command = [str(Path(sys.executable).parent / "rbee-ctl"), "-i", str(inventory), "setup", "add-node", "--name", "ws"]
    done = subprocess.run(
        [*command, "--ssh-host", "127.0.0.1", "--ssh-port", str(silent_port)],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(tmp_path), "RBEE_SSH_TIMEOUT_S": "1"},
        timeout=90,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    attempts = re.findall(r"attempt (\d)/3 \(timeout 1s, delay (\d+)ms\)", done.stderr)
    assert [number for number, _ in attempts] == ["1", "2", "3"]
    for (_, delay), pause in zip(attempts, (0, 200, 400), strict=True):
        assert pause * 0.5 <= int(delay) <= pause * 1.5
    assert "SSH_TIMEOUT" in done.stderr
    assert inventory.read_text() == "rbee_hives:\n  hosts:\n"
    assert not (tmp_path / ".local/state/rbee/nodes/ws.json").exists()


@pytest.mark.S20
@pytest.mark.S57
def test_a_machine_that_does_not_answer_is_tried_three_times_before_a_worker_is_started_there(tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.yml"
    inventory.write_text("rbee_hives:\n  hosts: {gone: {ansible_host: 127.0.0.1, ansible_port: 9}}\n")
    ctl = [str(Path(sys.executable).parent / "rbee-ctl"), "-i", str(inventory)]
    environ = os.environ | {"HOME": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*ctl, *arguments], capture_output=True, text=True, env=environ, timeout=90, check=False)

    done = run("worker", "start", "--node", "gone", "--model", "m")
    assert done.returncode == 4, done.stderr
    attempts = re.findall(r"gone does not answer: attempt (\d)/3 \(delay (\d+)ms\)", done.stderr)
    assert [number for number, _ in attempts] == ["2", "3"]
    for (_, delay), pause in zip(attempts, (200, 400), strict=True):
        assert pause * 0.5 <= int(delay) <= pause * 1.5
    assert "[NODE_UNREACHABLE]" in done.stderr
    assert "rbee-ctl hive list" in done.stderr
    assert "unreachable" in run("hive", "list").stdout


def test_an_inventory_without_a_queen_is_one_too(tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.yml"
    inventory.write_text("rbee_hives:\n  hosts: {ws: {ansible_host: 127.0.0.1}}\n")
    ctl = [str(Path(sys.executable).parent / "rbee-ctl"), "-i", str(inventory)]
    environ = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run([*ctl, "config", "check"], capture_output=True, text=True, env=environ, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
