#!/usr/bin/python
"""Decide whether and how a worker can be started on a node, before anything is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_devices import devices
from ansible.module_utils.rbee_fit import check_memory, mb, parse_size, with_figures
from ansible.module_utils.rbee_ledger import Ledger
from ansible.module_utils.rbee_lock import ARGUMENTS, take, taken_over
from ansible.module_utils.rbee_node import (
    TARGET,
    NodeError,
    any_runtime_python,
    fail,
    instances,
    listening_ports,
    read_toml,
    require_hive,
    runtimes,
    show,
    up,
    worker_unit,
)
from ansible.module_utils.rbee_plan import (
    BY_HAND,
    check_device,
    check_runtime,
    check_temperature,
    check_version,
    choose_name,
    choose_port,
    cool,
    declared_extras,
    declared_names,
    instance,
    is_identical,
    preferred_device,
)
from ansible.module_utils.rbee_store import READY, CatalogError, find, parse_ref, read

DOCUMENTATION = r"""
module: rbee_preflight
short_description: Check a request for a worker against a node
description:
  - Checks backend and device, its temperature, runtime, model, memory (by the model's own figures, and at least 1.2 times its
    file) and port, and settles the instance's name.
  - Changes nothing; check mode is the same. A refusal is C(rbee_error) with the figures, the same on every run.
options:
  request:
    description: The worker that is wanted.
    type: dict
    required: true
    suboptions:
      backend: {type: str, description: Accelerator; may be left out where the machine has one kind.}
      device: {type: int, description: "Index of the device within the backend; by default the one with most free memory."}
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
    description: Memory to reckon with instead of what is free (MemAvailable without the model files that workers have mapped).
    type: int
  previous_available_bytes:
    description: What an earlier check found free; that it shrank is said.
    type: int
  gpu_max_celsius:
    description: Temperature from which on an accelerator takes no new worker.
    type: int
    default: 87
  ask_only:
    description: >-
      Return C(fits) instead of refusing, and tell nothing: asked by another machine that has no room. The value is what
      a model needs, in bytes, which is not here.
    type: dict
    suboptions:
      ram: {type: int, required: true, description: Of the machine's own memory.}
      device: {type: int, default: 0, description: Of an accelerator.}
      disk: {type: int, default: 0, description: Of the file system of I(models_dir).}
  elsewhere:
    description: Machines that could take the worker; named in a refusal for want of memory.
    type: list
    elements: str
    default: []
  etc_dir: {type: path, default: /etc/rbee, description: Where the instances' settings are.}
  models_dir: {type: path, default: /var/lib/rbee/models, description: Where the models are.}
  install_path: {type: path, default: /opt/rbee, description: Where the runtimes are.}
  controller_version:
    description: Version of the rbee-ctl that asks; refused where the node has another one.
    type: str
  install_hint:
    description: Command that installs rbee on this node.
    type: str
    default: ansible-playbook site.yml
  run:
    description: Identity of the run; the action of the same name fills it in. The run then holds the node's lock.
    type: dict
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
    device: {type: dict, description: "The device, as the module rbee_devices tells it."}
    required_bytes: {type: int, description: "Memory that the worker needs; null for one that runs already."}
    available_bytes: {type: int, description: "Memory that is free for it, null where nobody tells."}
fits:
  description: With I(ask_only), whether the worker could be started here.
  returned: sometimes
  type: bool
narration:
  description: Lines for a person, shown by the action of the same name.
  returned: success
  type: list
  elements: str
"""


#: A download leaves this free (rbee_serve/models/download.py).
DISK_RESERVE_BYTES = 1 << 20


def find_model(params, entries):
    """Return (entry, reference to download): one of them is None."""
    ref = parse_ref(params["request"]["model"])
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


def memory(params, found, wanted, device, entries, ledger, limit=None):
    """Return the narration of the memory check and note the figures in ``found``; raises NodeError."""
    devices_now = list(ledger.devices.values())
    device = ledger.devices.get(device["id"], device)
    words, required, free = check_memory(
        found["model"], device, ledger.ram, wanted, entries, params["elsewhere"], ledger.shared, limit, devices_now
    )
    found["required_bytes"], found["available_bytes"] = required, free
    before = params["previous_available_bytes"]
    if before is not None and free is not None and free < before:
        words = f"{mb(before - free)} less are free than at the first look; {words}"
    return words


def plan(params):
    """Return (plan, narration); raises NodeError, CatalogError."""
    request, etc_dir = dict(params["request"]), params["etc_dir"]
    target = show(TARGET)[TARGET]
    require_hive(target, params["install_hint"])
    check_version(params["controller_version"], read_toml(Path(etc_dir, "hive.toml")))
    present = devices()
    if request["backend"] is None:
        kinds = sorted({d["backend"] for d in present})
        if len(kinds) > 1:
            raise NodeError(
                "INVALID_REQUEST", f"this machine has {', '.join(kinds)}: say which", f"--backend {kinds[0]}", field="backend"
            )
        request["backend"] = kinds[0]
    check_device(request, present)
    paths = runtimes(params["install_path"], request["backend"])
    runtime = check_runtime(request["backend"], paths, params["install_path"], params["install_hint"])
    entries, _ = read(params["models_dir"], any_runtime_python(params["install_path"]))
    entries = [with_figures(e) if e["status"] == READY else e for e in entries]
    model, download_ref = find_model(params, entries)
    known = instances(etc_dir)
    chosen = request["device"] is None
    if chosen and model:
        request["device"] = preferred_device(request, known, model["id"])
    device = check_device(request, present, params["gpu_max_celsius"])
    say = [f"{device['id']}: {device['name']}"]
    same = [d for d in present if d["backend"] == device["backend"]]
    if chosen and len(same) > 1:
        why = "has the model already" if request["device"] is not None else "has the most free memory"
        if request["device"] is None and not all(cool(d, params["gpu_max_celsius"]) for d in same):
            why += " of those that are cool enough"
        say = [f"{device['id']} ({device['name']}) chosen: it {why} ({mb(device.get('memory_free_bytes') or 0)} free)"]
    request["device"] = device["device"]
    found = {
        "model": model,
        "download_ref": download_ref,
        "instance": None,
        "identical": False,
        "invocation": "",
        "target_active": target["ActiveState"] == "active",
        "runtime": runtime,
        "device": device,
        "required_bytes": None,
        "available_bytes": None,
    }
    if model is None:
        return found, [*say, f"{download_ref} is not on this machine yet"]
    declared = declared_names(params["declared"])
    name, settings = choose_name(request, model["id"], known, by_hand(etc_dir, known), declared)
    unit = show(worker_unit(name))[worker_unit(name)]
    found["identical"] = bool(settings) and is_identical(request, settings, model["id"])
    if up(unit):
        found["invocation"] = unit["InvocationID"]
    extras = declared_extras(params["declared"], name)
    if not (found["identical"] and up(unit)):  # one that runs has its memory already
        say += [w for w in [check_temperature(device, params["gpu_max_celsius"])] if w]
        asked = {k: v for k, v in request.items() if v is not None}
        wanted = {**(settings or {}), **extras.get("settings", {}), **asked}
        ledger = Ledger.of_machine(present, params["mem_available_bytes"])
        if up(unit) and settings and int(unit["MainPID"] or 0):
            ledger.end(int(unit["MainPID"]), name, known, entries)  # it is restarted
        say.append(memory(params, found, wanted, device, entries, ledger, parse_size(extras.get("memory_max"))))
    port, warning = choose_port(request, settings, known, listening_ports(), declared)
    found["instance"] = extras | instance(request, model, settings, name, port, declared)
    return found, [*say, *([warning] if warning else [])]


def disk_free(folder):
    """Return the bytes that are free where a folder is, or would be."""
    return shutil.disk_usage(next(p for p in (Path(folder), *Path(folder).parents) if p.is_dir())).free


def fits(params, found):
    """Return whether there is room; a model that is not here needs what the asking machine says, and room on the disk."""
    if found["model"] is not None:
        return True
    device, needs, ledger = found["device"], params["ask_only"], Ledger.of_machine([], params["mem_available_bytes"])
    free = device.get("memory_free_bytes")
    on_device = device["backend"] == "cpu" or (free is not None and free >= needs["device"])
    on_device = on_device and cool(device, params["gpu_max_celsius"])
    return on_device and ledger.ram >= needs["ram"] and disk_free(params["models_dir"]) >= needs["disk"] + DISK_RESERVE_BYTES


def main():
    optional = {k: {"type": "int"} for k in ("slots", "context_tokens", "threads", "port")}
    module = AnsibleModule(
        argument_spec={
            "request": {
                "type": "dict",
                "required": True,
                "options": {
                    "backend": {"type": "str"},
                    "device": {"type": "int"},
                    "model": {"type": "str", "required": True},
                    "name": {"type": "str"},
                    **optional,
                },
            },
            "declared": {"type": "list", "elements": "dict", "default": []},
            "allow_download": {"type": "bool", "default": False},
            "mem_available_bytes": {"type": "int"},
            "previous_available_bytes": {"type": "int"},
            "gpu_max_celsius": {"type": "int", "default": 87},
            "ask_only": {
                "type": "dict",
                "options": {
                    "ram": {"type": "int", "required": True},
                    "device": {"type": "int", "default": 0},
                    "disk": {"type": "int", "default": 0},
                },
            },
            "elsewhere": {"type": "list", "elements": "str", "default": []},
            "etc_dir": {"type": "path", "default": "/etc/rbee"},
            "models_dir": {"type": "path", "default": "/var/lib/rbee/models"},
            "install_path": {"type": "path", "default": "/opt/rbee"},
            "controller_version": {"type": "str"},
            "install_hint": {"type": "str", "default": "ansible-playbook site.yml"},
            **ARGUMENTS,
        },
        supports_check_mode=True,
    )
    said = []
    try:
        if module.params["run"] and not module.check_mode and module.params["ask_only"] is None:
            # Until the run's end: two that start a worker here would choose the same name and port.
            said = taken_over(take(module.params["run"]))
        found, narration = plan(module.params)
    except (NodeError, CatalogError) as e:
        if module.params["ask_only"] is not None:
            module.exit_json(changed=False, fits=False)
        fail(module, e)
    if module.params["ask_only"] is not None:
        module.exit_json(changed=False, fits=fits(module.params, found))
    module.exit_json(changed=False, plan=found, narration=[*said, *narration])


if __name__ == "__main__":
    main()
