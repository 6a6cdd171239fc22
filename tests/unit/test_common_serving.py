"""Notify protocol, socket hand-over and the addresses that a service refuses."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from rbee_serve.common.sdnotify import Notifier, listen_sockets
from rbee_serve.common.serving import bind
from rbee_serve.contract.errors import ConfigInvalid


@pytest.mark.parametrize(
    ("say", "expected"),
    [
        (lambda n: n.ready("model on\ncpu"), "READY=1\nSTATUS=model on cpu"),
        (lambda n: n.status("5 of 30"), "STATUS=5 of 30"),
        (lambda n: n.stopping("draining"), "STOPPING=1\nSTATUS=draining"),
        (lambda n: n.extend_timeout(1.5, "loading"), "EXTEND_TIMEOUT_USEC=1500000\nSTATUS=loading"),
        (lambda n: n.watchdog(), "WATCHDOG=1"),
    ],
)
def test_notifier_sends_one_datagram(tmp_path: Path, say: Callable[[Notifier], None], expected: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.settimeout(5)
        say(Notifier({"NOTIFY_SOCKET": str(tmp_path / "n")}))
        assert manager.recv(4096).decode() == expected


def test_notifier_without_or_with_a_vanished_manager_does_nothing(tmp_path: Path) -> None:
    assert not Notifier({}).available
    Notifier({}).ready("x")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("x")


def test_children_inherit_neither_notify_nor_watchdog() -> None:
    environ = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "OTHER": "1"}

    assert Notifier(environ).watchdog_s == 3.0
    assert environ == {"OTHER": "1"}


@pytest.mark.parametrize("environ", [{}, {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "x"}])
def test_watchdog_of_somebody_else_is_none(environ: dict[str, str]) -> None:
    assert Notifier(environ).watchdog_s is None


def test_sockets_meant_for_another_process_are_left_alone() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1"}

    assert listen_sockets(environ) == []
    assert environ == {}


def test_taken_address_is_refused_by_name() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigInvalid, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use") as e:
            bind("127.0.0.1", port)
        assert e.value.exit_code == 78
        assert str(port) in (e.value.hint or "")


def test_address_of_another_machine_is_refused_by_name() -> None:
    with pytest.raises(ConfigInvalid, match=r"cannot listen on 192\.0\.2\.1:8001: Cannot assign"):
        bind("192.0.2.1", 8001)
