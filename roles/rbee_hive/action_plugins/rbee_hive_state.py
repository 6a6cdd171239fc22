"""Run the module of the same name; while a hive stops, show how many of its units have; see library/rbee_hive_state.py."""

from __future__ import annotations

import shlex
import time

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import action_loader
from ansible.utils.display import Display

display = Display()

_SHOWN = "Id,ActiveState,SubState,MainPID,Result,ExecMainStatus,ExecMainCode"
_INTERVAL_S = 0.3
#: A stop that was begun goes on without us: how long a broken connection is tried again.
_LOST_S = 60.0


# A role's module_utils travel with modules alone; what follows is rbee_node's for the controller.


def parse_show(text):
    """Return {unit: properties} of ``systemctl show``; a connection with a terminal has its line ends."""
    blocks = text.replace("\r\n", "\n").split("\n\n")
    found = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in blocks]
    return {props["Id"]: props for props in found if props.get("Id")}


def running(props):
    """Return whether anything of the unit still runs or is about to."""
    return props.get("ActiveState") in ("active", "activating", "deactivating", "reloading") or int(props.get("MainPID") or 0) > 0


def instance(unit):
    """Return the instance name of a worker's unit."""
    return unit.split("@", 1)[1].rsplit(".", 1)[0]


def killed(unit, pid):
    """Return the record of a worker that systemd had to kill (SPEC E-42)."""
    return {"name": instance(unit), "pid": int(pid), "signal": "SIGKILL", "reason": "it did not end in time after SIGTERM"}


class ActionModule(ActionBase):
    """The action ``rbee_hive_state``."""

    _requires_connection = True
    _supports_check_mode = True

    def run(self, tmp=None, task_vars=None):
        """Return the module's result, of a stop with what came of it."""
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        stops = args.get("state") == "stopped" and args.get("wait", True) and not self._task.check_mode
        # In the Ansible collection it is known under the collection's name alone.
        guard = action_loader.get("rbee_guarded", class_only=True, collection_list=self._task.collections)
        result = guard.guarded(self, {**args, "wait": False} if stops else args, task_vars)
        stopping = result.get("rbee_result", {}).pop("stopping", {}) if stops else {}
        if result.get("failed") or not stopping:
            return result
        return self._follow(task_vars["inventory_hostname"], stopping, float(args.get("timeout_s", 330)), result)

    def _follow(self, host, stopping, timeout_s, result):
        """Wait until none of ``stopping`` ({unit: pid}) runs."""
        end, said = time.monotonic() + timeout_s, None
        while True:
            now = self._look(stopping)
            left = sorted(u for u, p in now.items() if running(p))
            if len(left) != said and any(u.endswith(".service") for u in stopping):
                said = len(left)
                waiting = ", ".join(map(instance, left))
                display.display(
                    f"rbee: {host}: {len(stopping) - said} of {len(stopping)} stopped{'; ' + waiting if left else ''}"
                )
            if not left or time.monotonic() > end:
                break
            time.sleep(_INTERVAL_S)
        if left:
            record = {
                "code": "PLAYBOOK_FAILED",
                "message": f"still running after {timeout_s:g} s: {', '.join(left)}",
                "hint": f"systemctl status {left[0]}",
                "details": {"units": left},
            }
            return {**result, "failed": True, "msg": f"{record['message']}; next: {record['hint']}", "rbee_error": record}
        forced = [killed(unit, pid) for unit, pid in stopping.items() if now[unit].get("Result") == "timeout"]
        for kill in forced:
            display.display(f"rbee: {host}: {kill['name']} was killed: pid {kill['pid']}, {kill['signal']}, {kill['reason']}")
        result["rbee_result"]["forced"] = forced
        return result

    def _look(self, units):
        command = f"systemctl show --no-pager --property={_SHOWN} -- {' '.join(map(shlex.quote, units))}"
        lost = time.monotonic() + _LOST_S
        while True:
            try:
                answer = self._low_level_execute_command(command, sudoable=True)
                found = parse_show(answer["stdout"])
                if answer["rc"] == 0 and set(units) <= set(found):
                    return found
                problem = answer["stderr"].strip() or f"exit code {answer['rc']}"
            except AnsibleConnectionFailure as e:
                problem = str(e)
            if time.monotonic() > lost:
                raise AnsibleConnectionFailure(f"the stop goes on without a connection: {problem}")
            time.sleep(_INTERVAL_S)
