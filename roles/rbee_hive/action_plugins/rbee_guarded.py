"""What every module that changes a node is run by: tells it which run it belongs to, and shows what it says.

``rbee_lock``, ``rbee_instance``, ... beside this file are links to it: Ansible finds an action by its name.
"""

from __future__ import annotations

import getpass
import os
import socket
import sys
from pathlib import Path

from ansible.plugins.action import ActionBase
from ansible.plugins.loader import action_loader
from ansible.utils.display import Display

display = Display()


def started(pid):
    """Return when a process began, in ticks since boot; None when there is none, or when it is dead and only not buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def machine():
    """Return what tells this controller, in this boot and with these process ids, from others (containers share a kernel)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def identity(pid):
    """Return the record of the run whose main process is ``pid``."""
    playbook = next((Path(a).name for a in sys.argv[1:] if a.endswith((".yml", ".yaml")) and "inventor" not in a), None)
    return {
        "id": f"{machine()}:{pid}:{started(pid)}",
        "machine": machine(),
        "pid": pid,
        "started": started(pid),
        "host": socket.gethostname(),
        "user": getpass.getuser(),
        "playbook": playbook or "ansible",
    }


def dead(record):
    """Return whether this is the record of a run that was made here and is no more."""
    return record.get("machine") == machine() and started(record.get("pid")) != record.get("started")


def quickly(action, args, task_vars):
    """Run the action's module by ``rbee_quick``; without that, as Ansible does."""
    # In the Ansible collection it is known under the collection's name alone: that of the play, or of the task itself.
    quick = action_loader.get("rbee_quick", class_only=True, collection_list=action._task.collections)
    if quick is None and (home := (action._task.resolved_action or action._task.action).rpartition(".")[0]):
        quick = action_loader.get(f"{home}.rbee_quick", class_only=True)
    if quick is None:
        return action._execute_module(module_args=args, task_vars=task_vars)
    return quick.execute(action, args, task_vars)


class ActionModule(ActionBase):
    """The action of all modules that are linked to it."""

    def run(self, tmp=None, task_vars=None):
        """Return the module's result; a lock that a dead run of this controller left is no obstacle."""
        super().run(tmp, task_vars)
        result = self.guarded(self._task.args, task_vars)
        # On one line: of several in a row ansible-runner reports the first alone.
        if lines := result.get("narration", []):
            display.display("rbee: " + "; ".join(lines))
        return result

    def guarded(self, args, task_vars):
        """Run the module as this run of ansible-playbook, whose forks tasks are; from a dead one it takes the lock over."""
        me = identity(os.getppid())
        # By this the next run knows what is left working on the node when this one dies.
        self._task.environment = [*(self._task.environment or []), {"RBEE_RUN": me["id"]}]
        result = quickly(self, {**args, "run": me}, task_vars)
        error = result.get("rbee_error") or {}
        record = (error.get("details") or {}).get("lock")
        if error.get("code") == "NODE_LOCKED" and record and dead(record):
            result = quickly(self, {**args, "run": {**me, "dead": record["id"]}}, task_vars)
        return result
