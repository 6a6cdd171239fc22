"""Write a secret into a file of root's on a node, without a file on the way; see library/rbee_secret.py."""

from __future__ import annotations

import shlex

from ansible.plugins.action import ActionBase

WRITE = 'umask 077 && cat >"$1"'
#: The same for one that stays: says whether it differs from what is there, and is whole ($2 bytes) before it takes its place.
#: With "look" as $3 it only says so. The shell compares, so that it is in no argument.
KEEP = """
umask 077
if [ "$3" = look ]; then [ "$(cat)" = "$(cat "$1" 2>/dev/null)" ] || echo changed; exit 0; fi
cat >"$1.new" && [ "$(wc -c <"$1.new")" -eq "$2" ] || { rm -f "$1.new"; echo "it did not come whole" >&2; exit 1; }
[ "$(cat "$1.new")" = "$(cat "$1" 2>/dev/null)" ] || echo changed
mv -f "$1.new" "$1"
"""


class ActionModule(ActionBase):
    """The action ``rbee_secret``."""

    _requires_connection = True
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("content", "dest", "keep"))

    def run(self, tmp=None, task_vars=None):
        """Return whether it was written; see the documentation in library/rbee_secret.py."""
        super().run(tmp, task_vars)
        spec = {"content": {"type": "str", "required": True, "no_log": True}, "dest": {"type": "path", "required": True}}
        _, args = self.validate_argument_spec(spec | {"keep": {"type": "bool", "default": False}})
        look = self._task.check_mode
        if look and not args["keep"]:
            return {"changed": False, "skipped": True}
        data = args["content"].encode()
        script = (KEEP, "rbee-secret", args["dest"], str(len(data)), "look" if look else "") if args["keep"] else None
        words = script or (WRITE, "rbee-secret", args["dest"])
        command = " ".join(shlex.quote(w) for w in ("sh", "-c", *words))
        answer = self._low_level_execute_command(command, sudoable=True, in_data=data)
        if answer["rc"] != 0:
            return {"failed": True, "changed": False, "msg": f"{args['dest']}: {answer['stderr'].strip()[-300:]}"}
        return {"changed": args["keep"] and "changed" in answer["stdout"].split(), "written": not look}
