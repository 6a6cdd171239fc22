"""Say once a second which task still runs: Ansible itself is silent until it ends (SPEC N-05).

For ``ansible-playbook`` by hand; rbee-ctl tells the same by itself. A timer's signal and one write: no thread that a fork of
Ansible's could leave with a lock.
"""

from __future__ import annotations

import atexit
import os
import signal
import time

from ansible import constants as C
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: rbee_pulse
type: aggregate
short_description: says once a second which task still runs
description:
  - Writes C(rbee) lines to standard output for tasks of over a second, unless another callback than C(default) owns it.
requirements:
  - enabled by C(callbacks_enabled)
"""

#: These show what they wait for by themselves.
_SPEAK = ("rbee_follow", "rbee_fetch")
_SECOND = 1.0


class CallbackModule(CallbackBase):
    """The callback."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "rbee_pulse"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self):
        super().__init__()
        self.disabled = str(C.DEFAULT_STDOUT_CALLBACK).rpartition(".")[2] != "default"
        self._pid = os.getpid()
        self._task, self._since, self._heard = "", 0.0, 0.0

    def v2_playbook_on_start(self, playbook):
        """Begin."""
        # A run that is broken off has no statistics, and a signal to an interpreter that is going ends it as killed.
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._tick)
        signal.setitimer(signal.ITIMER_REAL, _SECOND, _SECOND)

    def v2_playbook_on_stats(self, stats):
        """End."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def v2_playbook_on_task_start(self, task, is_conditional):
        """Another task."""
        speaks = task.action.rpartition(".")[2] in _SPEAK
        self._task = "" if speaks else task.get_name().rpartition(" : ")[2]
        self._since = self._heard = time.monotonic()

    def _hear(self, result, **_):
        self._heard = time.monotonic()

    v2_runner_on_ok = v2_runner_on_failed = v2_runner_on_unreachable = v2_runner_item_on_ok = v2_runner_item_on_failed = _hear

    def v2_playbook_on_handler_task_start(self, task):
        """A handler."""
        self.v2_playbook_on_task_start(task, False)

    def _tick(self, number, frame):
        now = time.monotonic()
        # Not in a fork that runs a task, and not before the second is full.
        if self._task and os.getpid() == self._pid and now - self._heard >= _SECOND - 0.1:
            os.write(1, f"rbee: {self._task}: {now - self._since:.0f} s\n".encode())
