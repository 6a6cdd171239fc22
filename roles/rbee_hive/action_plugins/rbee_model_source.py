"""Say where each machine gets a model from, so that the hub is asked once; see library/rbee_model_source.py."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

READY = "Ready"


def usable(model, sha256):
    """Return whether a catalog entry is a whole model, with that digest if one is asked for."""
    return bool(model) and model.get("status") == READY and (not sha256 or model.get("sha256") == sha256)


def decide(me, ref, sha256, machines, peers):
    """Return (role, source) of the machine ``me``.

    ``machines``: [(name, what it found, whether it has brought the model since)], all of this play that ask for ``ref``, in
    order; ``peers``: names outside of the play that have the model. Roles: ``have``, ``fetch`` (from the hub, as the only
    one), ``ask`` (look whether a peer has it; nobody here does), ``get`` (from the source).
    """
    has = [name for name, model, brought in machines if brought or usable(model, sha256)]
    lack = [name for name, *_ in machines if name not in has]
    if me in has:
        return "have", None
    if source := next(iter(has or peers or []), None):
        return "get", source
    first = bool(lack) and lack[0] == me
    if peers is None:
        return ("ask" if first else "wait"), None
    return ("fetch" if first else "wait"), None


class ActionModule(ActionBase):
    """The action ``rbee_model_source``."""

    _requires_connection = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("ref", "sha256", "say"))

    def run(self, tmp=None, task_vars=None):
        """Return ``role`` and ``source``; see the documentation in library/rbee_model_source.py."""
        super().run(tmp, task_vars)
        spec = {"ref": {"type": "str", "required": True}, "sha256": {"type": "str"}, "say": {"type": "bool", "default": False}}
        _, args = self.validate_argument_spec(spec)
        me, ref, hosts = task_vars["inventory_hostname"], args["ref"], task_vars["hostvars"]
        machines, peers = [], None
        for name in task_vars["ansible_play_batch"]:
            here = hosts[name].get("__rbee_hive_model_here") or {}
            if hosts[name].get("__rbee_hive_model_asked") != ref:
                continue
            brought = ref in (hosts[name].get("__rbee_hive_models_brought") or [])
            machines.append((name, (here.get("rbee_result") or {}).get("model"), brought))
            asked = hosts[name].get("__rbee_hive_model_peers_asked") or {}
            if asked.get("ref") == ref:
                peers = sorted({*(peers or []), *asked["have"]})
        role, source = decide(me, ref, args["sha256"], machines, peers)
        if role == "get" and args["say"]:
            display.display(f"rbee: {ref} comes from {source}")
        return {"changed": False, "role": role, "source": source}
