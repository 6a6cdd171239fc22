"""Run a module of rbee's in a fraction of the time that Ansible's wrapper takes; see module_utils/rbee_quick.py.

The wrapper finds out on the controller, in every run, which files a module imports, and carries all of Ansible's own to the node,
which compiles them each time. What a module of rbee's needs is known and little. Its arguments are checked here by Ansible's
validator with the module's own specification. Whatever is out of the ordinary goes Ansible's way: wrong arguments (so the message
is Ansible's), secrets among them, paths that the node has to expand, other machines than the task's, ``async``.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import marshal
import re
import zlib
from pathlib import Path

import ansible.module_utils
from ansible.errors import AnsibleError
from ansible.module_utils import basic
from ansible.module_utils.common.arg_spec import ModuleArgumentSpecValidator
from ansible.plugins.action import ActionBase

try:
    from ansible.executor.interpreter_discovery import InterpreterDiscoveryRequiredError
    from ansible.executor.module_common import _BuiltModule, _get_shebang
    from ansible.module_utils.common.json import Direction, get_module_encoder
except ImportError:  # no promises of Ansible's: a version without them goes its own way with all
    _BuiltModule = None

_HOME = Path(__file__).resolve().parents[1]
_MODULES = next((p for p in (_HOME / "library", _HOME / "modules") if p.is_dir()), _HOME / "library")
_UTILS = _HOME / "module_utils"
_SCRIPT = "rbee_quick"
#: Where a module finds what it shares with others: in a role, in a collection.
_PACKAGE = (
    ".".join(_UTILS.parts[_UTILS.parts.index("ansible_collections") :])
    if "ansible_collections" in _UTILS.parts
    else ("ansible.module_utils")
)
_IMPORTED = re.compile(rf"^\s*(?:from|import) {re.escape(_PACKAGE)}\.(rbee_\w+)", re.MULTILINE)
#: AnsibleModule's own options that are arguments of the validator, too.
_RULES = ("mutually_exclusive", "required_together", "required_one_of", "required_if", "required_by")


class _Asked(Exception):
    """The specification of a module's arguments, in place of its run."""


def _specify(**specification):
    raise _Asked(specification)


@functools.cache
def specification(path):
    """Return what the module hands to AnsibleModule: nothing else of it runs here but its imports."""
    if _PACKAGE == "ansible.module_utils" and str(_UTILS) not in ansible.module_utils.__path__:
        ansible.module_utils.__path__.append(str(_UTILS))
    spec = importlib.util.spec_from_file_location(f"rbee_quick_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own, basic.AnsibleModule = basic.AnsibleModule, _specify  # some import it in main()
    module.AnsibleModule = _specify
    try:
        module.main()
    except _Asked as e:
        return e.args[0]
    finally:
        basic.AnsibleModule = own
    raise AnsibleError(f"{path}: main() does not begin with AnsibleModule")  # never: tests/unit/test_modules_quick.py


def needed(path):
    """Return {name: file} of a module and of all it imports from rbee's module_utils."""
    found, ahead = {}, [(f"rbee_module.{path.stem}", path)]
    while ahead:
        name, file = ahead.pop()
        found[name] = file
        names = _IMPORTED.findall(file.read_text(encoding="utf-8"))
        ahead += [(full, _UTILS / f"{n}.py") for n in names if (full := f"{_PACKAGE}.{n}") not in found]
    return found


def compiled(name, file):
    """Return a file's bytecode, from Python's own cache where it is there."""
    return marshal.dumps(importlib.util.spec_from_file_location(name, file).loader.get_code(name))


@functools.cache
def packed(path):
    """Return (what is to be sent for the module ``path`` as base64, its index {name: [begin, middle, end]})."""
    blob, index = b"", {}
    for name, file in needed(path).items():
        source, code = file.read_bytes(), compiled(name, file)
        index[name] = [len(blob), len(blob) + len(source), len(blob) + len(source) + len(code)]
        blob += source + code
    return base64.b64encode(zlib.compress(blob, 1)).decode("ascii"), index


def validated(path, params):
    """Return a module's parameters as AnsibleModule would have them; None where that is to be left to it."""
    spec = specification(path)
    options = spec["argument_spec"]
    for name, value in params.items():
        rule = options.get(name, {})
        if rule.get("no_log") or (rule.get("type") == "path" and isinstance(value, str) and {"~", "$"} & set(value)):
            return None
    result = ModuleArgumentSpecValidator(options, *(spec.get(rule) for rule in _RULES)).validate(params)
    return None if result.error_messages else {**params, **result.validated_parameters}


def invocation(params, task_info):
    """Return what Ansible's modules say in the journal about how they were called."""
    words = " ".join(f"{k}={basic.heuristic_log_sanitize(str(v))}" for k, v in params.items())
    return " ".join(filter(None, (task_info, f"Invoked with {words}" if words else "Invoked")))


def script(path, name, params, internal):
    """Return the script that runs the module ``path`` on a node; ``internal`` are Ansible's own arguments."""
    sent, index = packed(path)
    arguments = {
        "name": name,
        "module": f"rbee_module.{path.stem}",
        "index": json.dumps(index),
        "magic": importlib.util.MAGIC_NUMBER.hex(),
        "params": params,
        "check_mode": bool(internal.get("_ansible_check_mode")),
        "facility": str(internal.get("_ansible_syslog_facility") or "LOG_USER"),
        "log": "" if internal.get("_ansible_no_log") else invocation(params, internal.get("_ansible_target_log_info")),
    }
    text = json.dumps(arguments, cls=get_module_encoder("legacy", Direction.CONTROLLER_TO_MODULE))
    runner = (_UTILS / f"{_SCRIPT}.py").read_text(encoding="utf-8")
    return f"{runner}\n\nmain({sent!r}, {text!r})\n"


def configured(action, module_name, module_args, task_vars):
    """Return what ``_configure_module`` does, in the quick way; None where Ansible's is to be gone."""
    path = _MODULES / f"{module_name.rpartition('.')[2]}.py"
    remote = getattr(action._connection, "_remote_is_local", False)
    if _BuiltModule is None or action._task.delegate_to or action._task.async_val or not path.is_file():
        return None
    internal = {k: v for k, v in module_args.items() if k.startswith("_ansible_")}
    params = validated(path, {k: v for k, v in module_args.items() if k not in internal})
    if params is None:
        return None
    try:
        shebang, _ = _get_shebang("/usr/bin/python", task_vars, action._templar, remote_is_local=bool(remote))
    except InterpreterDiscoveryRequiredError:
        return None
    text = script(path, module_name, params, internal)
    built = _BuiltModule(
        b_module_data=f"{shebang}\n{text}".encode(), module_style="new", shebang=shebang, serialization_profile="legacy"
    )
    return built, str(path)


class ActionModule(ActionBase):
    """The action of modules that are linked to it, and what ``rbee_guarded`` runs others by."""

    _supports_check_mode = True
    _supports_async = True

    def run(self, tmp=None, task_vars=None):
        """Return the module's result."""
        super().run(tmp, task_vars)
        return self.execute(self._task.args, task_vars, bool(self._task.async_val and not self._connection.has_native_async))

    def execute(self, module_args, task_vars, wrap_async=False):
        """Run the module of the task; as ``_execute_module``, and for actions of other classes as well."""
        ordinary = type(self)._configure_module

        def configure(module_name, module_args, task_vars):
            quick = configured(self, module_name, module_args, task_vars)
            return quick or ordinary(self, module_name=module_name, module_args=module_args, task_vars=task_vars)

        self._configure_module = configure
        return self._execute_module(module_args=module_args, task_vars=task_vars, wrap_async=wrap_async)
