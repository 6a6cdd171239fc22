#!/usr/bin/python
"""Check the workers that the inventory declares against this machine, before one of them is touched."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_devices import devices
from ansible.module_utils.rbee_fit import parse_size, with_figures
from ansible.module_utils.rbee_ledger import Ledger
from ansible.module_utils.rbee_memory import DEFAULTS
from ansible.module_utils.rbee_node import (
    NodeError,
    any_runtime_python,
    fail,
    instances,
    listening,
    running,
    show,
    socket_unit,
    worker_unit,
)
from ansible.module_utils.rbee_plan import check_device, declared_names
from ansible.module_utils.rbee_store import READY, CatalogError, find, parse_ref, read

DOCUMENTATION = r"""
module: rbee_declared
short_description: Check the declared workers of a node against its devices and its memory
description:
  - Fails when a worker needs a device that is not there, or when those that would be started, new or with another model,
    slots or context, do not all fit into the memory that is free. What they take is added up in their order, and what
    those give back that are stopped or changed is taken off.
  - A worker that runs and stays as it is is not asked about, nor one whose socket alone is opened; it looks for itself when it
    wakes.
  - Changes nothing; check mode is the same.
options:
  declared:
    description: The workers, see C(rbee_worker_instances) of the role rbee_worker.
    type: list
    elements: dict
    required: true
  mem_available_bytes:
    description: Memory to reckon with instead of what is free.
    type: int
  node:
    description: Name of this machine in the inventory, for the hint.
    type: str
    default: NODE
  etc_dir: {type: path, default: /etc/rbee, description: Where the instances' settings are.}
  models_dir: {type: path, default: /var/lib/rbee/models, description: Where the models are.}
  install_path: {type: path, default: /opt/rbee, description: Where the runtimes are.}
  unit_dir: {type: path, default: /etc/systemd/system, description: Where drop-ins are.}
author: rbee
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: Does what is declared fit?
  rbee_declared:
    declared: [{backend: cpu, model: smollm2-135m-instruct, slots: 4}]
"""

RETURN = r"""
starts:
  description: The instances that would be started, and were found to fit.
  returned: success
  type: list
  elements: str
"""

#: Settings on which the memory depends.
WEIGHTY = ("slots", "context_tokens", "kv_type", "deterministic", "prompt_block_tokens", "memory_check")


def settings_of(entry):
    """Return the settings of an entry of rbee_workers that its memory depends on; a key of its own goes before ``settings:``."""
    inner = entry.get("settings") or {}
    found = {k: entry.get(k, inner.get(k)) for k in WEIGHTY if entry.get(k, inner.get(k)) is not None}
    return {k: int(v) if isinstance(v, str) and v.isdigit() else v for k, v in found.items()}  # INI files know text alone


def is_same(entry, model, settings, limit, memory_max):
    """Return whether a worker that is there needs nothing else than it has: same model (a catalog entry), settings and limit."""
    same_model = model is not None and model["id"] == settings.get("model_id")
    was = {**DEFAULTS, **{k: settings[k] for k in WEIGHTY if k in settings}}
    return same_model and {**DEFAULTS, **settings_of(entry)} == was and limit == memory_max


def action(entry, model, settings, alive, limit):
    """Return what would become of the instance: ``start``, ``restart``, ``stop``, or None where it stays as it is."""
    state = entry.get("state", "started")
    if state in ("stopped", "absent"):
        return "stop" if alive else None
    if alive and settings:
        return None if is_same(entry, model, settings, limit, parse_size(entry.get("memory_max"))) else "restart"
    return "start" if state == "started" and not alive else None


def limit_of(name, unit_dir):
    """Return the MemoryMax= that the instance's drop-in has now, bytes; None for none."""
    try:
        lines = Path(unit_dir, f"{worker_unit(name)}.d", "50-rbee.conf").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((parse_size(line.partition("=")[2]) for line in lines if line.startswith("MemoryMax=")), None)


def todo(params, entries):
    """Return ([(name, entry, model or None, action, process id or 0)] of the instances that change, {name: settings} of all)."""
    names, known = declared_names(params["declared"]), instances(params["etc_dir"])
    units = show(*[u for n in names for u in (worker_unit(n), socket_unit(n))]) if names else {}
    found = []
    for name, entry in zip(names, params["declared"], strict=True):
        unit, socket = units.get(worker_unit(name), {}), units.get(socket_unit(name), {})
        settings = known.get(name, {})
        model = find(entries, parse_ref(entry["model"])) if entry.get("state") != "absent" else None
        act = action(entry, model, settings, running(unit) or listening(socket), limit_of(name, params["unit_dir"]))
        if act:
            found.append((name, entry, model, act, int(unit.get("MainPID") or 0)))
    return found, known


def check(params):
    """Return the names of the instances that would be started; raises NodeError, CatalogError."""
    present = devices()
    for entry in params["declared"]:
        if entry.get("state") != "absent":
            check_device({"backend": entry["backend"], "device": int(entry.get("device", 0))}, present)
    entries, _ = read(params["models_dir"], any_runtime_python(params["install_path"]))
    entries = [with_figures(e) if e["status"] == READY else e for e in entries]
    changes, known = todo(params, entries)
    if not any(act in ("start", "restart") for _, _, _, act, _ in changes):
        return []
    ledger, starts = Ledger.of_machine(present, params["mem_available_bytes"]), []
    for name, entry, model, act, pid in changes:
        if pid:
            ledger.end(pid, name, known, entries)
        if act == "stop":
            continue
        if not model or model["status"] != READY:
            continue  # said by the task that makes the instance
        try:
            device = f"{entry['backend']}:{entry.get('device', 0)}"
            ledger.take(model, device, settings_of(entry), entries, parse_size(entry.get("memory_max")))
        except NodeError as e:
            also = f" beside {', '.join(starts)}, which this run starts as well" if starts else ""
            e.message = f"worker {name} does not fit here{also}: {e.message}"
            e.hint = f"{e.hint}; in rbee_workers of {params['node']} ({name}), then: rbee-ctl apply --node {params['node']}"
            e.details["worker"] = name
            raise
        starts.append(name)
    return starts


def main():
    module = AnsibleModule(
        argument_spec={
            "declared": {"type": "list", "elements": "dict", "required": True},
            "mem_available_bytes": {"type": "int"},
            "node": {"type": "str", "default": "NODE"},
            "etc_dir": {"type": "path", "default": "/etc/rbee"},
            "models_dir": {"type": "path", "default": "/var/lib/rbee/models"},
            "install_path": {"type": "path", "default": "/opt/rbee"},
            "unit_dir": {"type": "path", "default": "/etc/systemd/system"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(changed=False, starts=check(module.params))
    except (NodeError, CatalogError) as e:
        fail(module, e)


if __name__ == "__main__":
    main()
