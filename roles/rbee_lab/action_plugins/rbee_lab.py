"""Run lab.py on the controller and show its progress through Ansible's display; see library/rbee_lab.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

_SCRIPT = Path(__file__).resolve().parent.parent / "files" / "lab.py"


class ActionModule(ActionBase):
    """The action ``rbee_lab``."""

    _requires_connection = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("command", "arguments", "directory", "net", "cache"))

    def run(self, tmp=None, task_vars=None):
        """Return the result; see the documentation in library/rbee_lab.py."""
        super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            {
                "command": {"type": "str", "required": True, "choices": ["up", "down", "status", "reboot"]},
                "arguments": {"type": "list", "elements": "str", "default": []},
                "directory": {"type": "path", "required": True},
                "net": {"type": "str", "required": True},
                "cache": {"type": "path", "required": True},
            }
        )
        verb = [args["command"], *args["arguments"]]
        if self._task.check_mode:
            verb = ["status"]
        command = [sys.executable, str(_SCRIPT), "--directory", args["directory"], *verb]
        environment = {**os.environ, "RBEE_LAB_NET": args["net"], "RBEE_CACHE": args["cache"]}
        # The result goes to a file: one pipe (progress) needs no thread to be read without a dead-lock.
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, text=True, env=environment
            )
            said = []
            for line in process.stderr:
                if line.startswith("rbee: "):
                    display.display(line.rstrip())
                else:
                    said.append(line)
            code = process.wait()
            output.seek(0)
            return self._conclude(code, output.read(), "".join(said))

    @staticmethod
    def _conclude(code, stdout, stderr):
        try:
            answer = json.loads(stdout)
        except ValueError:
            answer = None
        if code == 0 and answer is not None:
            return {"changed": bool(answer.get("changed")), "rbee_result": answer}
        error = (answer or {}).get("rbee_error") or {
            "code": "PLAYBOOK_FAILED",
            "message": f"lab.py ended with {code}: {stderr.strip()[-800:] or 'no message'}",
            "hint": "rbee-ctl lab down; rbee-ctl lab up",
            "details": {},
        }
        return {"failed": True, "msg": f"{error['message']}; next: {error['hint']}", "rbee_error": error}
