"""Worker processes of a machine, from /proc and the cgroups of their units. Standard library only; nothing is changed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ansible.module_utils.rbee_node import NodeError, instances, show

_UNIT = re.compile(r"/(rbee-worker@([a-z]+[0-9]+(?:-[a-z0-9]+)?)\.service)(?:/|$)")


def parse_unit(cgroup):
    """Return (unit, instance) of the worker that /proc/PID/cgroup names, None for a process of anybody else."""
    for line in cgroup.splitlines():
        match = _UNIT.search(line.split(":", 2)[-1])
        if match:
            return match[1], match[2]
    return None


def parse_stat(text, ticks, uptime_s):
    """Return (CPU seconds, age in seconds) from /proc/PID/stat."""
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / ticks, uptime_s - int(fields[19]) / ticks


def _read(pid, name):
    return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")


def _record(pid, settings, main_pids):
    """Return the process, None when it is no worker's or has ended."""
    try:
        found = parse_unit(_read(pid, "cgroup"))
        if found is None:
            return None
        uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        cpu_s, age_s = parse_stat(_read(pid, "stat"), os.sysconf("SC_CLK_TCK"), uptime)
        rss = int(_read(pid, "statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        command = _read(pid, "cmdline").replace("\0", " ").strip()
    except (OSError, ValueError, IndexError):
        return None
    unit, name = found
    mine = settings.get(name, {})
    return {
        "pid": pid,
        "role": "main" if main_pids.get(unit) == pid else "child",
        "worker_id": f"{mine.get('hive')}-{name}" if mine.get("hive") else name,
        "name": name,
        "unit": unit,
        "model_id": mine.get("model_id"),
        "uptime_s": round(age_s, 1),
        "cpu_s": round(cpu_s, 1),
        "rss_bytes": rss,
        "command": command,
    }


def _main_pids():
    return {unit: int(props.get("MainPID") or 0) for unit, props in show("rbee-worker@*.service").items()}


def worker_processes(etc_dir):
    """Return all processes of worker units, main ones first."""
    settings, mains = instances(etc_dir), _main_pids()
    found = [_record(int(entry.name), settings, mains) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return sorted(filter(None, found), key=lambda p: (p["name"], p["role"] != "main", p["pid"]))


def worker_process(etc_dir, pid):
    """Return one process; raises NodeError WORKER_NOT_FOUND for one that is no worker's, or is not there."""
    found = _record(pid, instances(etc_dir), _main_pids())
    if found is None:
        what = "it belongs to no worker's unit" if Path(f"/proc/{pid}").exists() else "there is no such process"
        raise NodeError("WORKER_NOT_FOUND", f"process {pid} is no worker: {what}", "rbee-ctl worker process list", pid=pid)
    return found
