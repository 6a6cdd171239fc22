"""Descendants of a process, from /proc: what a cancelled playbook must not leave behind.

Ansible's forks call setsid(), so ending ansible-playbook's process group leaves them and their ssh clients running.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process; the start time (clock ticks since boot) tells it from a later one with the same id."""

    pid: int
    started: int


def _stat(pid: int) -> tuple[int, int] | None:
    """Return (parent, start time), or None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), int(fields[19])


def _by_parent() -> dict[int, list[Process]]:
    found: dict[int, list[Process]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 -- names alone are needed, not hundreds of Path objects
        if entry.isdigit() and (stat := _stat(int(entry))) is not None:
            found.setdefault(stat[0], []).append(Process(int(entry), stat[1]))
    return found


def children(root: int) -> list[Process]:
    """Return the direct children of ``root``."""
    return _by_parent().get(root, [])


def descendants(root: int) -> list[Process]:
    """Return all processes below ``root``, parents before children; ``root`` itself is not among them."""
    by_parent = _by_parent()
    below: list[Process] = []
    waiting = [root]
    while waiting:
        for child in by_parent.get(waiting.pop(0), []):
            below.append(child)
            waiting.append(child.pid)
    return below


def alive(process: Process) -> bool:
    """Say whether it still is the same process."""
    found = _stat(process.pid)
    return found is not None and found[1] == process.started


def kill(processes: Iterable[Process], sig: signal.Signals = signal.SIGKILL) -> None:
    """Send ``sig`` to those that still are the same processes; one that has become another user's (sudo) ends by itself."""
    for process in processes:
        if alive(process):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, sig)
