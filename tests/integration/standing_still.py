"""A process that stands still, connections open: what it is at work at is certain to last for as long."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the direct children of a process: of a worker's front, its engine."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def state(pid: int) -> str:
    """Return the kernel's letter for the state of a process."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]


@contextmanager
def standing_still(*pids: int | None) -> Iterator[None]:
    """Stop these processes on the way in, let them go on at the end."""
    stopped = [pid for pid in pids if pid is not None]
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        while any(state(pid) != "T" for pid in stopped):
            time.sleep(0.001)
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
