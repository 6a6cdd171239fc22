"""How much of a machine's memory is free for another model. Standard library only (nodes use it too, like memory.py).

MemAvailable alone says too much: weights that a running llama.cpp has mapped are page cache, which the kernel counts as
free although the next token reads all of them again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

_PROC = Path("/proc")
_MOUNT = Path("/sys/fs/cgroup")
_WORKERS = Path("/etc/rbee/workers")
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s+(/.*\.gguf)$")
_MODEL_PATH = re.compile(r"^model_path = (\".*\")$", re.MULTILINE)
#: From here on a limit of version 1 control groups is none.
_NO_LIMIT = 1 << 60


def mem_available(proc: Path = _PROC) -> int:
    """Return MemAvailable in bytes, as the kernel tells it."""
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{proc}/meminfo has no MemAvailable")


def mapped(proc: Path = _PROC) -> dict[str, int]:
    """Return {path: bytes in memory} of the model files that processes have mapped; each file once, however many share it.

    Processes that may not be looked into are left out: root sees all.
    """
    found: dict[str, int] = {}
    for process in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
            # What has no model mapped costs a short file; page tables are walked for the others alone.
            if ".gguf" in (process / "maps").read_text(encoding="utf-8", errors="replace"):
                for path, size in _resident((process / "smaps").read_text(encoding="utf-8", errors="replace")).items():
                    found[path] = max(found.get(path, 0), size)
    return found


def _resident(smaps: str) -> dict[str, int]:
    found: dict[str, int] = {}
    path = None
    for line in smaps.splitlines():
        if line[:1].islower() or line[:1].isdigit():  # the fields below a mapping begin with a capital
            match = _MAPPING.match(line)
            path = match[1] if match else None
        elif path is not None and line.startswith("Rss:"):
            found[path] = found.get(path, 0) + int(line.split()[1]) * 1024
    return found


def own_bytes(pid: int, proc: Path = _PROC) -> int:
    """Return what a process and its descendants hold for themselves (no files), bytes: free again when they end."""
    total = 0
    with contextlib.suppress(OSError):
        for line in (proc / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
        for children in (proc / str(pid) / "task").glob("*/children"):
            total += sum(own_bytes(int(child), proc) for child in children.read_text(encoding="ascii").split())
    return total


# --- from within a worker, which sees no process but its own ---------------------------------------------------------


def room(model_path: str, proc: Path = _PROC, mount: Path = _MOUNT, workers: Path = _WORKERS) -> int:
    """Return the bytes that this process may still take to load ``model_path``: what the machine has, what its unit allows."""
    table = (proc / "self/cgroup").read_text(encoding="ascii")
    free = mem_available(proc) - _mapped_by_siblings(table, model_path, mount, workers)
    return max(0, min([free, *_limits(table, mount)]))


def _groups(table: str, mount: Path) -> list[tuple[Path, Path]]:
    """Return (folder of this process's control group, root of its hierarchy) where memory is counted; hybrids have two."""
    found = []
    for line in table.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = mount / "memory" if controllers else mount
            found.append((root / path.lstrip("/"), root))
    return found


def _figures(file: Path) -> dict[str, int]:
    try:
        rows = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _limits(table: str, mount: Path) -> list[int]:
    """Return what is left of each MemoryMax= that this process is under."""
    left = []
    for folder, root in _groups(table, mount):
        for place in (folder, *folder.parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):  # "max"
                    limit = int((place / name).read_text(encoding="ascii"))
                    stat = _figures(place / "memory.stat")
                    if limit < _NO_LIMIT:
                        used = stat.get("anon", 0) + stat.get("shmem", 0) if "anon" in stat else stat.get("total_rss", 0)
                        left.append(limit - used)
            if place == root:
                break
    return left


def _mapped_by_siblings(table: str, model_path: str, mount: Path, workers: Path) -> int:
    """Return what the other workers have mapped, but not those that have the same file: that is shared.

    A lower bound: pages that somebody else has read first are counted there.
    """
    total = 0
    for folder, _ in _groups(table, mount):
        for stat in folder.parent.glob("rbee-worker@*.service/memory.stat") if folder.name.startswith("rbee-worker@") else ():
            if stat.parent == folder or _model_of(stat.parent.name, workers) == os.path.realpath(model_path):
                continue
            figures = _figures(stat)
            total += figures.get("file_mapped", figures.get("total_mapped_file", 0))
    return total


def _model_of(unit: str, workers: Path) -> str | None:
    name = unit.partition("@")[2].removesuffix(".service")
    try:
        match = _MODEL_PATH.search((workers / f"{name}.toml").read_text(encoding="utf-8"))
        return os.path.realpath(json.loads(match[1])) if match else None
    except (OSError, ValueError):
        return None
