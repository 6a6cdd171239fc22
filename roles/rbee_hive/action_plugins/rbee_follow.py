"""Follow a unit on a node and show its progress through Ansible's display; see library/rbee_follow.py."""

from __future__ import annotations

import json
import shlex
import time

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

_MARK = "--rbee-progress--"
_ALIVE = ("activating", "active", "reloading", "deactivating")
_SHOWN = "ActiveState,SubState,Result,NRestarts,StatusText,Job"


def parse_look(text):
    """Split one look into (unit's properties, complete progress lines)."""
    head, _, tail = text.replace("\r\n", "\n").partition(_MARK + "\n")  # ssh gives a terminal, and that its line ends
    props = dict(line.split("=", 1) for line in head.splitlines() if "=" in line)
    lines = []
    for line in tail.split("\n")[:-1]:  # the last piece is empty, or a line that is still being written
        try:
            lines.append(json.loads(line))
        except ValueError:
            lines.append({})
    return props, lines


class ActionModule(ActionBase):
    """The action ``rbee_follow``."""

    _requires_connection = True
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("unit", "progress_file", "joined", "label", "timeout_s", "interval_s", "lost_timeout_s"))

    def run(self, tmp=None, task_vars=None):
        """Return the result; see the documentation in library/rbee_follow.py."""
        super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            {
                "unit": {"type": "str", "required": True},
                "progress_file": {"type": "path"},
                "joined": {"type": "bool", "default": False},
                "label": {"type": "str", "default": ""},
                "timeout_s": {"type": "float", "default": 86400.0},
                "interval_s": {"type": "float", "default": 1.0},
                "lost_timeout_s": {"type": "float", "default": 120.0},
            }
        )
        if self._task.check_mode:
            return {"changed": False, "active_state": "unknown", "skipped": True}
        if args["joined"]:
            display.display(f"rbee: another run has begun this already ({args['unit']}); it goes on for both")
        return self._follow(args)

    def _follow(self, args):
        end, seen, shown, gone = time.monotonic() + args["timeout_s"], 0, None, 0
        while True:
            began = time.monotonic()
            props, lines = self._look(args, seen)
            seen += len(lines)
            if done := self._lines(lines):
                return {**done, "active_state": props.get("ActiveState", "")}
            alive = int(props.get("Job") or 0) or props.get("ActiveState") in _ALIVE
            if args["progress_file"]:
                # Down without a last line: give what was written in the meantime one more look, then it is a crash.
                gone = 0 if alive else gone + 1
                if gone > 1:
                    return self._crashed(args)
            else:
                shown = self._status(args["label"], props, shown)
                looping = props.get("SubState") == "auto-restart" and int(props.get("NRestarts") or 0) >= 1
                if looping or not alive or props.get("ActiveState") == "active":
                    return {"changed": False, "active_state": props.get("ActiveState", "")}
            if began > end:
                return {"changed": False, "active_state": props.get("ActiveState", ""), "timed_out": True}
            time.sleep(max(0.0, args["interval_s"] - (time.monotonic() - began)))

    def _look(self, args, seen):
        """Read the unit's state and the progress lines after the first ``seen``."""
        command = f"systemctl show --no-pager --property={_SHOWN} -- {shlex.quote(args['unit'])}; echo {_MARK}"
        if args["progress_file"]:
            command += f"; tail -n +{seen + 1} -- {shlex.quote(args['progress_file'])} 2>/dev/null || true"
        lost = None
        while True:
            try:
                answer = self._low_level_execute_command(command, sudoable=True)
            except AnsibleConnectionFailure as e:
                answer = {"rc": 255, "stdout": "", "stderr": str(e)}
            if answer["rc"] == 0 and _MARK in answer["stdout"]:
                if lost:
                    display.display("rbee: connected again")
                return parse_look(answer["stdout"])
            now = time.monotonic()
            if lost is None:
                lost = now
                display.display(f"rbee: connection lost, {args['unit']} goes on without it; trying again")
            elif now - lost > args["lost_timeout_s"]:
                raise AnsibleConnectionFailure(f"no connection for {now - lost:.0f} s: {answer['stderr'].strip()}")
            time.sleep(args["interval_s"])

    def _lines(self, lines):
        """Show new progress lines; returns the task's result when one of them is the last."""
        latest = None
        for line in lines:
            stage = line.get("stage")
            if stage == "failed":
                return self._failed(line)
            if stage in ("downloading", "verifying"):
                if latest and latest["stage"] != stage:
                    display.display(f"rbee: {latest.get('human', '')}")
                latest = line  # of many, the newest will do
                continue
            if latest:  # also what has begun and ended between two looks is told
                display.display(f"rbee: {latest.get('human', '')}")
                latest = None
            display.display(f"rbee: {line.get('human', '')}")
            if stage == "complete":
                if runtime := line.get("runtime"):
                    return {"changed": runtime.get("made", True), "rbee_result": {"runtime": runtime}}
                return {
                    "changed": line.get("downloaded", True),
                    "rbee_result": {"model": line.get("model"), "downloaded": line.get("downloaded")},
                }
        if latest:
            display.display(f"rbee: {latest.get('human', '')}")
        return None

    def _failed(self, line):
        error = {key: line.get(key) for key in ("code", "message", "hint", "details")}
        words = f"{error['message']} [{error['code']}]" + (f"; next: {error['hint']}" if error["hint"] else "")
        return {"failed": True, "changed": False, "msg": words, "rbee_error": error}

    def _crashed(self, args):
        return self._failed(
            {
                "code": "DOWNLOAD_FAILED",
                "message": f"{args['unit']} was killed or stopped before it was done",
                "hint": f"journalctl -u {args['unit']} -n 50",
                "details": {"unit": args["unit"]},
            }
        )

    def _status(self, label, props, shown):
        """Show the status text of a unit that is coming up, with each change."""
        text = props.get("StatusText", "")
        if text and text != shown and props.get("ActiveState") != "inactive":
            display.display(f"rbee: {label + ': ' if label else ''}{text}")
        return text or shown
