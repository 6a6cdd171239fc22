"""Whether the kernel killed for want of memory: a process that gets SIGKILL can not say why itself."""

from __future__ import annotations

import contextlib
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")


def oom_kills(table: str | None = None, mount: Path = _MOUNT) -> int:
    """Return how many processes of this control group the kernel has killed for want of memory; 0 where nobody counts.

    ``table``: what /proc/self/cgroup says. Pure and hybrid hierarchies are read alike.
    """
    if table is None:
        table = Path("/proc/self/cgroup").read_text(encoding="ascii")
    for line in table.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            counter = mount / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            counter = mount / "memory" / path.lstrip("/") / "memory.oom_control"
        else:
            continue
        with contextlib.suppress(OSError):
            for entry in counter.read_text(encoding="ascii").splitlines():
                key, _, count = entry.partition(" ")
                if key == "oom_kill":
                    return int(count)
    return 0
