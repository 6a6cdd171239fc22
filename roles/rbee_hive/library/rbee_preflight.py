#!/usr/bin/python
"""Decide whether and how a worker can be started on a node, before anything is touched."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_devices import devices
from ansible.module_utils.rbee_node import (
    TARGET,
    NodeError,
    any_runtime_python,
    fail,
    instances,
    listening_ports,
    mem_available,
    require_hive,
    runtimes,
    show,
    up,
    worker_unit,
)
from ansible.module_utils.rbee_plan import (
    BY_HAND,
    check_device,
    check_memory,
    check_runtime,
    choose_name,
    choose_port,
    declared_extras,
    declared_names,
    instance,
    is_identical,
)
from ansible.module_utils.rbee_store import READY, CatalogError, find, parse_ref, read

DOCUMENTATION = r"""
module: rbee_preflight
short_description: Check a request for a worker against a node
description:
  - Checks backend and device, runtime, model, memory (1.2 times the model's file) and port, and settles the instance's name.
  - Changes nothing; check mode is the same. A refusal is C(rbee_error) with the figures, the same on every run.
options:
  request:
    description: The worker that is wanted.
    type: dict
    required: true
    suboptions:
      backend: {type: str, description: Accelerator; may be left out where the machine has one kind.}
      device: {type: int, default: 0, description: Index of the device within the backend.}
      model: {type: str, required: true, description: "Catalog id, C(hf:org/repo[:file]) or C(file:///path)."}
      name: {type: str, description: Name of the instance.}
      slots: {type: int, description: Streams in parallel.}
      context_tokens: {type: int, description: Context of a slot.}
      threads: {type: int, description: Compute threads.}
      port: {type: int, description: TCP port.}
  declared:
    description: The workers that the inventory declares for this node; their names and ports are left to them.
    type: list
    elements: dict
    default: []
  allow_download:
    description: Return a model that is not there as C(download_ref) instead of refusing.
    type: bool
    default: false
  mem_available_bytes:
    description: Memory to reckon with instead of MemAvailable.
    type: int
  etc_dir: {type: path, default: /etc/rbee, description: Where the instances' settings are.}
  models_dir: {type: path, default: /var/lib/rbee/models, description: Where the models are.}
  install_path: {type: path, default: /opt/rbee, description: Where the runtimes are.}
  install_hint:
    description: Command that installs rbee on this node.
    type: str
    default: ansible-playbook site.yml
author: rbee
"""

EXAMPLES = r"""
- name: May this worker start here?
  rbee_preflight:
    request: {backend: cpu, device: 0, model: smollm2-135m-instruct}
"""

RETURN = r"""
plan:
  description: What is to be done.
  returned: success
  type: dict
  contains:
    instance: {type: dict, description: "The normalised instance; null while the model is not there."}
    model: {type: dict, description: "The catalog entry; null while the model is not there."}
    download_ref: {type: str, description: "What to download first; null if nothing."}
    identical: {type: bool, description: "The instance is there with just these settings."}
    target_active: {type: bool, description: "rbee-hive.target is active."}
    invocation: {type: str, description: "Invocation id of the unit as it is now; empty if it does not run."}
    runtime: {type: str, description: "The runtime's directory."}
narration:
  description: Lines for a person, shown by the action of the same name.
  returned: success
  type: list
  elements: str
"""


def find_model(params):
    """Return (entry, reference to download): one of them is None."""
    ref = parse_ref(params["request"]["model"])
    entries, _ = read(params["models_dir"], any_runtime_python(params["install_path"]))
    entry = find(entries, ref)
    if entry and entry["status"] == READY:
        return entry, None
    source = entry["reference"] if entry else ref.text if ref.kind != "id" else None
    if params["allow_download"] and source and not (entry and entry["provider"] == "file"):
        return None, source
    known = [e["id"] for e in entries if e["status"] == READY]
    why = f"no model {ref.text!r} here"
    if entry:
        why = f"{entry['id']} is {entry['status']}: {entry.get('problem', 'not complete')}"
    raise NodeError(
        "MODEL_NOT_FOUND",
        f"{why}; the catalog has {', '.join(known) or 'none'}",
        f"rbee-ctl model download {source or 'hf:org/repo:file.gguf'}",
        known=known,
    )


def by_hand(etc_dir, names):
    """Return the names of the instances that no inventory declares."""
    found = set()
    for name in names:
        with Path(etc_dir, "workers", f"{name}.toml").open(encoding="utf-8", errors="replace") as f:
            if f.readline().startswith(BY_HAND):
                found.add(name)
    return found


def plan(params):
    """Return (plan, narration); raises NodeError, CatalogError."""
    request, etc_dir = dict(params["request"]), params["etc_dir"]
    target = show(TARGET)[TARGET]
    require_hive(target, params["install_hint"])
    present = devices()
    if request["backend"] is None:
        kinds = sorted({d["backend"] for d in present})
        if len(kinds) > 1:
            raise NodeError(
                "INVALID_REQUEST", f"this machine has {', '.join(kinds)}: say which", f"--backend {kinds[0]}", field="backend"
            )
        request["backend"] = kinds[0]
    device = check_device(request, present)
    say = [f"{device['id']}: {device['name']}"]
    paths = runtimes(params["install_path"], request["backend"])
    runtime = check_runtime(request["backend"], paths, params["install_path"], params["install_hint"])
    model, download_ref = find_model(params)
    found = {
        "model": model,
        "download_ref": download_ref,
        "instance": None,
        "identical": False,
        "invocation": "",
        "target_active": target["ActiveState"] == "active",
        "runtime": runtime,
    }
    if model is None:
        return found, [*say, f"{download_ref} is not on this machine yet"]
    known = instances(etc_dir)
    declared = declared_names(params["declared"])
    name, settings = choose_name(request, model["id"], known, by_hand(etc_dir, known), declared)
    unit = show(worker_unit(name))[worker_unit(name)]
    found["identical"] = bool(settings) and is_identical(request, settings, model["id"])
    if up(unit):
        found["invocation"] = unit["InvocationID"]
    if not (found["identical"] and up(unit)):  # one that runs has its memory already
        available = params["mem_available_bytes"] or mem_available()
        say.append(check_memory(model, device, available))
    port, warning = choose_port(request, settings, known, listening_ports(), declared)
    found["instance"] = declared_extras(params["declared"], name) | instance(request, model, settings, name, port, declared)
    return found, [*say, *([warning] if warning else [])]


def main():
    optional = {k: {"type": "int"} for k in ("slots", "context_tokens", "threads", "port")}
    module = AnsibleModule(
        argument_spec={
            "request": {
                "type": "dict",
                "required": True,
                "options": {
                    "backend": {"type": "str"},
                    "device": {"type": "int", "default": 0},
                    "model": {"type": "str", "required": True},
                    "name": {"type": "str"},
                    **optional,
                },
            },
            "declared": {"type": "list", "elements": "dict", "default": []},
            "allow_download": {"type": "bool", "default": False},
            "mem_available_bytes": {"type": "int"},
            "etc_dir": {"type": "path", "default": "/etc/rbee"},
            "models_dir": {"type": "path", "default": "/var/lib/rbee/models"},
            "install_path": {"type": "path", "default": "/opt/rbee"},
            "install_hint": {"type": "str", "default": "ansible-playbook site.yml"},
        },
        supports_check_mode=True,
    )
    try:
        found, narration = plan(module.params)
    except (NodeError, CatalogError) as e:
        fail(module, e)
    module.exit_json(changed=False, plan=found, narration=narration)


if __name__ == "__main__":
    main()
