"""What happens while a playbook runs, as plain data: ansible-runner's event dictionaries never leave ``playbook``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: Start of a line that a role shows while a long task runs (download, build, load).
PROGRESS_PREFIX = "rbee: "
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class TaskStarted:
    """A task begins on all hosts of the play."""

    task: str


@dataclass(frozen=True)
class Progress:
    """A line of progress from a running task, without its prefix."""

    text: str


@dataclass(frozen=True)
class StillRunning:
    """Nothing else has come for a second: the task that runs, and for how long."""

    task: str
    seconds: float


@dataclass(frozen=True)
class TaskDone:
    """One host finished one task; ``status`` is ok, failed, unreachable or skipped."""

    host: str
    task: str
    status: str
    changed: bool = False
    result: dict[str, Any] = field(default_factory=dict)
    ignored: bool = False


@dataclass(frozen=True)
class Output:
    """Text that ansible-playbook printed, for ``--verbose`` and for failures that belong to no host."""

    text: str


@dataclass(frozen=True)
class Stats:
    """Ansible's own account at the end: host -> number of tasks."""

    ok: dict[str, int]
    failures: dict[str, int]
    unreachable: dict[str, int]
    changed: dict[str, int]


Event = TaskStarted | Progress | StillRunning | TaskDone | Output | Stats
OnEvent = Callable[[Event], None]

_DONE = {
    "runner_on_ok": "ok",
    "runner_on_failed": "failed",
    "runner_on_unreachable": "unreachable",
    "runner_on_skipped": "skipped",
}


def translate(raw: dict[str, Any]) -> list[Event]:
    """Return our events for one of ansible-runner's, in order."""
    found: list[Event] = []
    data = raw.get("event_data") or {}
    text = _ANSI.sub("", raw.get("stdout") or "").replace("\r", "")
    if text:
        found += [Progress(line.removeprefix(PROGRESS_PREFIX)) for line in text.splitlines() if line.startswith(PROGRESS_PREFIX)]
        found.append(Output(text))
    kind = raw.get("event")
    if kind == "playbook_on_task_start":
        found.append(TaskStarted(str(data.get("name") or data.get("task") or "")))
    elif kind in _DONE:
        result = data.get("res")
        result = result if isinstance(result, dict) else {}
        found.append(
            TaskDone(
                host=str(data.get("host", "")),
                task=str(data.get("task", "")),
                status=_DONE[kind],
                changed=bool(result.get("changed")),
                result=result,
                ignored=bool(data.get("ignore_errors")),
            )
        )
    elif kind == "playbook_on_stats":
        found.append(Stats(*(dict(data.get(key) or {}) for key in ("ok", "failures", "dark", "changed"))))
    return found
