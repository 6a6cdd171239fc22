#!/usr/bin/python
"""Tell where a node differs from what is declared and installed, beyond what Ansible's own tasks compare."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_node import (
    NodeError,
    any_runtime_python,
    current_of,
    fail,
    instances,
    read_toml,
    running,
    show,
    socket_unit,
    unit_instance,
    worker_unit,
)
from ansible.module_utils.rbee_plan import declared_names
from ansible.module_utils.rbee_store import CatalogError, read

DOCUMENTATION = r"""
module: rbee_drift
short_description: Tell where a node differs from what is declared and installed
description:
  - Effective unit files against the shipped ones, drop-ins that rbee did not write, masked units, versions that run against those
    that are installed, workers that nobody declares, models whose files are not what the catalog says.
  - Changes nothing; check mode is the same.
options:
  declared:
    description: The workers that the inventory declares for this node.
    type: list
    elements: dict
    default: []
  units:
    description: Shipped unit files, name and SHA-256.
    type: dict
    default: {}
  deep:
    description: Read every model file again and compare its digest. Takes as long as reading takes.
    type: bool
    default: false
  etc_dir: {type: path, default: /etc/rbee, description: Where the settings are.}
  models_dir: {type: path, default: /var/lib/rbee/models, description: Where the models are.}
  install_path: {type: path, default: /opt/rbee, description: Where the runtimes are.}
author: rbee
"""

EXAMPLES = r"""
- name: Look for drift
  rbee_drift:
    declared: [{backend: cpu, model: smollm2-135m-instruct}]
"""

RETURN = r"""
rbee_result:
  description: One entry a difference.
  returned: success
  type: dict
  sample:
    drift:
      - {kind: drop-in, what: rbee-worker@cpu0.service, expected: none but rbee's own, found: /etc/systemd/system/x.conf,
         next: systemctl cat rbee-worker@cpu0.service}
"""

OWN_DROP_IN = "50-rbee.conf"
#: The other drop-ins that the roles write.
OWN_OF_UNIT = {"rbee-queen.service": ("jobs.conf", "tls.conf")}
#: Where an administrator's drop-ins are.
UNIT_PLACES = ("/etc/systemd/system", "/run/systemd/system")


def entry(kind, what, expected, found, command):
    return {"kind": kind, "what": what, "expected": str(expected), "found": str(found), "next": command}


def digest(path):
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def unit_files(props, shipped):
    """Yield what is not as shipped about one unit's files."""
    unit = props["Id"]
    if props.get("LoadState") == "masked":
        yield entry("masked", unit, "not masked", "masked by the administrator", f"systemctl unmask {unit}")
        return
    fragment = props.get("FragmentPath")
    template = unit.split("@")[0] + "@." + unit.rsplit(".", 1)[1] if "@" in unit else unit
    if fragment and template in shipped and digest(fragment) != shipped[template]:
        yield entry(
            "unit file", fragment, f"as shipped ({shipped[template][:12]})", digest(fragment)[:12], f"systemctl cat {unit}"
        )
    # Also those on disk that systemd has not read yet: they take effect at the next reload, whoever asks for it.
    unread = [str(p) for place in UNIT_PLACES for name in {unit, template} for p in Path(place, name + ".d").glob("*.conf")]
    for drop_in in sorted({*props.get("DropInPaths", "").split(), *unread}):
        if Path(drop_in).name not in (OWN_DROP_IN, *OWN_OF_UNIT.get(unit, ())) and "/rbee" in drop_in:
            yield entry("drop-in", unit, "none but rbee's own", drop_in, f"systemctl cat {unit}")
    if props.get("NeedDaemonReload") == "yes":
        yield entry("not reloaded", unit, "systemd has read its files", "they have changed since", "systemctl daemon-reload")


def runtime_of(pid):
    """Return the runtime's folder that a process runs from; None if that can not be told."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    for word in argv[:2]:
        path = Path(word.decode(errors="replace")).parent.parent
        if "/runtimes/" in str(path):
            return os.path.realpath(path)
    return None


def chosen(params, hive):
    """Yield a runtime that somebody made current in place of the release's (rbee-ctl runtime use): it stays until undone."""
    root = Path(params["install_path"], "runtimes", "cpu")
    now, release = current_of(root), hive.get("runtime_version")
    if now and release and now.name != release and (root / release).is_dir():
        command = f"rbee-ctl runtime use --type cpu --version {release}"
        yield entry("chosen runtime", "cpu", release, f"{now.name}, chosen by hand", command)


def versions(what, props, link, newest):
    """Yield a process that runs another version than its link says, and a link that is not what the machine has now."""
    target = os.path.realpath(link) if Path(link).is_symlink() else None
    runs = runtime_of(int(props.get("MainPID") or 0)) if running(props) else None
    if runs and target and runs != target:
        yield entry("running version", what, Path(target).name, Path(runs).name, f"systemctl restart {props['Id']}")
    if target and newest and Path(target).name != newest:
        yield entry(
            "installed version",
            what,
            newest,
            Path(target).name,
            "rbee-ctl upgrade, or ansible-playbook site.yml",
        )


def runtime_link(params, name):
    """Return an instance's link, and the version that is current of its type."""
    link = Path(params["etc_dir"], "workers", f"{name}.runtime")
    now = current_of(Path(os.path.realpath(link)).parent)
    return link, now.name if now else None


def workers(params):
    """Yield differences of instances: declared ones that are not there or not as they should be, and strangers."""
    there, names = instances(params["etc_dir"]), declared_names(params["declared"])
    states = dict(zip(names, (w.get("state", "started") for w in params["declared"]), strict=True))
    units = show("rbee-worker@*.service", *[worker_unit(n) for n in {*there, *names}])
    sockets = show(*[socket_unit(n) for n in {*there, *names}]) if there or names else {}
    for unit, props in sorted(units.items()):
        name = unit_instance(unit)
        if not name:
            continue
        state = states.get(name)
        asleep = sockets.get(socket_unit(name), {}).get("ActiveState") == "active"
        if state is None and (name in there or running(props)):
            yield entry(
                "undeclared worker", name, "in rbee_workers", props["ActiveState"], f"rbee-ctl worker stop --node NODE {name}"
            )
        if state == "absent" and (name in there or running(props)):
            yield entry("worker", name, "absent", props["ActiveState"], "ansible-playbook site.yml")
        if state not in (None, "absent") and name not in there:
            yield entry("worker", name, state, "not there", "ansible-playbook site.yml")
        elif state == "started" and not asleep and props["ActiveState"] != "active":
            yield entry("worker", name, "started", props["ActiveState"], f"journalctl -u {unit} -n 50")
        elif state == "stopped" and (running(props) or asleep):
            yield entry("worker", name, "stopped", props["ActiveState"], "ansible-playbook site.yml")
        yield from unit_files(props, params["units"])
        if held := sockets.get(socket_unit(name)):
            yield from unit_files(held, params["units"])
        if name in there:
            yield from versions(name, props, *runtime_link(params, name))


def models(params):
    """Yield models whose files are not what the catalog says."""
    try:
        entries, _ = read(params["models_dir"], any_runtime_python(params["install_path"]))
    except CatalogError as e:
        yield entry("catalog", params["models_dir"], "readable", e.message, "rbee-ctl model list")
        return
    for model in entries:
        if model["status"] != "Ready":
            yield entry(
                "model", model["id"], "Ready", model.get("problem") or model["status"], f"rbee-ctl model download {model['id']}"
            )
        elif params["deep"] and model.get("sha256") and model.get("path") and not model.get("parts"):
            found = digest(model["path"])
            if found != model["sha256"]:
                yield entry("model digest", model["id"], model["sha256"][:12], found[:12], f"rbee-ctl model delete {model['id']}")


def drift(params):
    """Return all differences."""
    hive = read_toml(Path(params["etc_dir"], "hive.toml"))
    if not hive:
        return [entry("machine", "rbee", "installed", "not installed", "ansible-playbook site.yml")]
    found = []
    fixed = show("rbee-hive.target", "rbee.slice", "rbee-queen.service")
    for props in fixed.values():
        found += unit_files(props, params["units"])
    queen = fixed["rbee-queen.service"]
    if queen.get("LoadState") == "loaded":
        found += versions("queen", queen, f"{params['etc_dir']}/queen.runtime", hive.get("runtime_version"))
    return [*found, *chosen(params, hive), *workers(params), *models(params)]


def main():
    module = AnsibleModule(
        argument_spec={
            "declared": {"type": "list", "elements": "dict", "default": []},
            "units": {"type": "dict", "default": {}},
            "deep": {"type": "bool", "default": False},
            "etc_dir": {"type": "path", "default": "/etc/rbee"},
            "models_dir": {"type": "path", "default": "/var/lib/rbee/models"},
            "install_path": {"type": "path", "default": "/opt/rbee"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(changed=False, rbee_result={"drift": drift(module.params)})
    except NodeError as e:
        fail(module, e)


if __name__ == "__main__":
    main()
