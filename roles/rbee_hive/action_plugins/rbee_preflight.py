"""Run the module of the same name and show what it found; see library/rbee_preflight.py."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()


class ActionModule(ActionBase):
    """The action ``rbee_preflight``."""

    def run(self, tmp=None, task_vars=None):
        """Return the module's result."""
        super().run(tmp, task_vars)
        result = self._execute_module(task_vars=task_vars)
        # On one line: of several in a row ansible-runner reports the first alone.
        if lines := result.get("narration", []):
            display.display("rbee: " + "; ".join(lines))
        return result
