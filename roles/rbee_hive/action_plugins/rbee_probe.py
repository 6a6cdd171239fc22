"""Run the module of the same name and measure the connection; see library/rbee_probe.py."""

from __future__ import annotations

import time

from ansible.plugins.action import ActionBase

#: A command over an open connection that takes longer makes every verb slow (SPEC 3.8).
LATENCY_WARN_MS = 100


class ActionModule(ActionBase):
    """The action ``rbee_probe``."""

    def run(self, tmp=None, task_vars=None):
        """Return the module's result with the check ``latency``."""
        super().run(tmp, task_vars)
        result = self._execute_module(task_vars=task_vars)
        found = result.get("rbee_result")
        if found is None:
            return result
        best = min(self._round_trip() for _ in range(3))
        latency = {"name": "latency", "ok": best <= LATENCY_WARN_MS, "required": False, "got": f"{best:.0f} ms"}
        if not latency["ok"]:
            latency |= {"expected": f"<= {LATENCY_WARN_MS} ms", "hint": "look at the network between here and there"}
        found["latency_ms"] = round(best, 1)
        found["checks"] = [latency, *found["checks"]]
        return result

    def _round_trip(self):
        began = time.monotonic()
        self._low_level_execute_command("true", sudoable=False)
        return (time.monotonic() - began) * 1000
