"""What runs one of rbee's modules on a node instead of Ansible's own wrapper. Standard library only.

It is the text of a script, to which the action plugin ``rbee_quick`` adds the call of ``main``. Modules are the same files either
way; here they get a small ``AnsibleModule``, since the controller has checked their arguments, and come as bytecode where
controller and node have the same Python. Nothing is written on the node.
"""

from __future__ import annotations

import sys

sys.path = [p for p in sys.path if p not in ("", ".")]  # the working directory is no place to import from

import base64  # noqa: E402
import json  # noqa: E402
import marshal  # noqa: E402
import os  # noqa: E402
import types  # noqa: E402
import zlib  # noqa: E402
from _frozen_importlib import ModuleSpec  # noqa: E402
from _frozen_importlib_external import MAGIC_NUMBER  # noqa: E402

BASIC = "ansible.module_utils.basic"


def say(result):
    """Print a result for the controller."""
    print("\n" + json.dumps(result, default=str))


class AnsibleModule:
    """What rbee's modules use of Ansible's class of that name."""

    given = None

    def __init__(self, **_):
        self.params, self.check_mode = self.given["params"], self.given["check_mode"]

    def exit_json(self, **result):
        """Tell the result and end."""
        say({"invocation": {"module_args": self.params}, **result})
        sys.exit(0)

    def fail_json(self, msg, **result):
        """Tell the failure and end."""
        say({"invocation": {"module_args": self.params}, **result, "failed": True, "msg": str(msg)})
        sys.exit(1)


class Sent:
    """Importer of what was sent: {name: (source, bytecode)}; all that stands before a dot in a name is a package."""

    def __init__(self, files, same):
        self.files, self.same = files, same
        parents = {".".join(name.split(".")[:n]) for name in [*files, BASIC] for n in range(1, name.count(".") + 1)}
        for name in sorted(parents):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = []

    def code(self, name):
        """Return the code of a module: its bytecode, where it is of this Python, else compiled from its source."""
        source, code = self.files[name]
        return marshal.loads(code) if self.same else compile(source, name, "exec")  # noqa: S302 -- from the controller, as the source is

    def find_spec(self, name, path=None, target=None):
        """Find a module that was sent."""
        return ModuleSpec(name, self) if name in self.files else None

    def create_module(self, spec):
        """Leave it to the interpreter."""
        return

    def exec_module(self, module):
        """Run a module's text."""
        exec(self.code(module.__name__), module.__dict__)  # noqa: S102 -- it is what was sent to be run


def log(name, facility, text):
    """Say in the node's journal what runs, as every module of Ansible's does."""
    import syslog

    syslog.openlog(f"ansible-{name}", 0, getattr(syslog, facility, syslog.LOG_USER))
    syslog.syslog(syslog.LOG_INFO, text)


def main(packed, arguments):
    """Run the module ``arguments["module"]`` of what was ``packed`` and end the process."""
    try:
        os.getcwd()  # noqa: PTH109 -- pathlib takes its time
    except OSError:
        os.chdir("/")
    given = json.loads(arguments)
    index, blob = json.loads(given["index"]), zlib.decompress(base64.b64decode(packed))
    files = {name: (blob[begin:middle], blob[middle:end]) for name, (begin, middle, end) in index.items()}
    sent = Sent(files, given["magic"] == MAGIC_NUMBER.hex())
    sys.meta_path.insert(0, sent)
    basic = sys.modules[BASIC] = types.ModuleType(BASIC)
    basic.AnsibleModule = AnsibleModule
    AnsibleModule.given = given
    if given["log"]:
        log(given["name"], given["facility"], given["log"])
    try:
        exec(sent.code(given["module"]), {"__name__": "__main__", "__builtins__": __builtins__})  # noqa: S102 -- as above
    except Exception as e:
        import traceback

        say({"failed": True, "msg": f"Module failed: {e}", "exception": traceback.format_exc()})
        sys.exit(1)
