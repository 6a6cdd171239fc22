"""The lock of a node: who is changing it. One small file in /run, so that a reboot forgets it. Standard library only.

A lock is held by one run of ansible-playbook, which every module call of that run renews. It ends with the run's release; a run
that died is found out by the next one from the same controller (its process is gone: the action plugin ``rbee_guarded`` looks),
or by anybody once it has not been renewed for ``LEASE_S``. What such a run left working on the node is ended before the next one
begins: a module whose controller is gone goes on by itself, and two of them would write into the same files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from pathlib import Path

from ansible.module_utils.rbee_node import NodeError

PATH = "/run/rbee-lock.json"
#: Longest time that a live run may spend between two of its tasks on a node, seconds.
LEASE_S = 3600.0

#: Variable that tells in the environment of a run's modules, and of what they start, which run that is.
MARK = "RBEE_RUN"

#: What every module that changes a node takes besides its own options.
ARGUMENTS = {"run": {"type": "dict"}}


def read(path=PATH):
    """Return the lock's record; None when there is none or it can not be read."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "id" in record else None


def holder(run, record, now, lease_s=LEASE_S):
    """Return ``record`` when another run than ``run`` holds the lock, else None."""
    if record is None or (run and record["id"] in (run["id"], run.get("dead"))):
        return None
    return record if 0 <= now - record.get("touched", 0) < lease_s else None


def check(run, path=PATH):
    """Raise NodeError NODE_LOCKED when another run is changing this node; renew the lock when it is ours."""
    record = read(path)
    if other := holder(run, record, time.time()):
        raise locked(other)
    if record and run and record["id"] == run["id"]:
        write({**record, "touched": time.time()}, path)


def take(run, path=PATH):
    """Hold the lock for ``run``; raises NodeError NODE_LOCKED.

    Returns the record of a dead run that it was taken from, with ``left``: how many of its processes were ended.
    """
    with alone(path):
        before = read(path)
        check(run, path)
        ours = bool(before) and before["id"] == run["id"]
        since = before["since"] if ours else time.time()
        write({**{k: v for k, v in run.items() if k != "dead"}, "since": since, "touched": time.time()}, path)
    return None if ours or before is None else {**before, "left": end_left(before["id"])}


@contextlib.contextmanager
def alone(path):
    """Of runs in the same moment one looks and writes, the others find what it wrote. By the folder: no further file is left."""
    folder = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def left_by(run_id, proc="/proc"):
    """Return the ids of the processes on this node that modules of that run are, or have started."""
    mark, found = f"{MARK}={run_id}".encode(), []
    for folder in Path(proc).glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def end_left(run_id, limit_s=10.0):
    """Kill what a dead run left working here and wait until it is gone; returns how many processes that were."""
    ended, end = set(), time.monotonic() + limit_s
    while (left := left_by(run_id)) and time.monotonic() < end:
        ended.update(left)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    return len(ended)


def taken_over(dead):
    """Return the lines that tell of a lock taken over from a dead run; none where there was none."""
    if not dead:
        return []
    left = [f"ended what it left working here (processes: {dead['left']})"] if dead["left"] else []
    return [f"took over the lock of {dead.get('user')}@{dead.get('host')}, whose run has died", *left]


def release(run, path=PATH):
    """Give the lock back if ``run`` holds it; returns whether it did."""
    record = read(path)
    if record is None or record["id"] != run["id"]:
        return False
    Path(path).unlink(missing_ok=True)
    return True


def locked(record):
    """Return the error that says who holds the lock."""
    age = int(time.time() - record.get("since", time.time()))
    who = f"{record.get('user', '?')}@{record.get('host', '?')}"
    run = f"{record.get('playbook', 'ansible-playbook')}, process {record.get('pid')}"
    left = max(0, int(LEASE_S - (time.time() - record.get("touched", 0))))
    return NodeError(
        "NODE_LOCKED",
        f"{who} has been changing this machine for {age} s ({run})",
        f"wait until it is done; if that run is dead: in {left} s the lock ends by itself, or remove {PATH} on the machine",
        lock=record,
    )


def write(record, path=PATH):
    """Replace the file in one step."""
    temporary = Path(f"{path}.{os.getpid()}")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.chmod(0o644)
    temporary.replace(path)
