#!/usr/bin/python
"""Drop-ins of one worker instance, and whether it comes up at boot: by its service, or asleep behind its socket."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_node import NodeError, fail, refuse_masked, run, show, socket_unit, worker_unit, write_drop_in

DOCUMENTATION = r"""
module: rbee_worker_unit
short_description: Drop-ins of a worker instance, and whether it comes up at boot
description:
  - Writes or removes the instance's drop-ins for service and socket and makes systemd read them.
  - Enables the socket where there is one, else the service; the other one is disabled, and a socket that is no longer
    wanted is stopped. Starts nothing.
options:
  name:
    description: Instance.
    type: str
    required: true
  service:
    description: Text of the service's drop-in; empty for none.
    type: str
    default: ""
  socket:
    description: Text of the socket's drop-in; empty for a worker without a socket.
    type: str
    default: ""
  enabled:
    description: Whether the instance comes up with C(rbee-hive.target).
    type: bool
    default: true
  unit_dir:
    description: Where drop-ins are.
    type: path
    default: /etc/systemd/system
author: rbee
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
"""

EXAMPLES = r"""
- name: A worker that sleeps behind its socket
  rbee_worker_unit:
    name: cpu0
    socket: |
      [Socket]
      ListenStream=0.0.0.0:8001
"""

RETURN = r"""
files_changed:
  description: Whether a drop-in was written or removed; a running worker then still runs by the old one.
  returned: success
  type: bool
before:
  description: Of each drop-in that was changed its path, and its text before; null where there was none.
  returned: success
  type: dict
"""

HEADER = "# Managed by Ansible (role rbee_worker).\n"
FILE = "50-rbee.conf"


def drop_ins(params):
    """Return {path: wanted text or None}."""
    wanted = {worker_unit(params["name"]): params["service"], socket_unit(params["name"]): params["socket"]}
    return {
        Path(params["unit_dir"], f"{unit}.d", FILE): HEADER + text.strip() + "\n" if text.strip() else None
        for unit, text in wanted.items()
    }


def current(path):
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def enablement(params):
    """Return [(verb, unit)] that are left to do; what systemd does not know yet counts as disabled."""
    service, socket = worker_unit(params["name"]), socket_unit(params["name"])
    comes_up = {service: params["enabled"] and not params["socket"], socket: params["enabled"] and bool(params["socket"])}
    todo = []
    for unit, wanted in comes_up.items():
        if wanted:
            refuse_masked(show(unit)[unit])
        _, out, _ = run("systemctl", "is-enabled", unit)
        if (out.strip() == "enabled") != wanted:
            todo.append(("enable" if wanted else "disable", unit))
    return todo


def apply(params, check):
    files = drop_ins(params)
    stale = {path: (old, text) for path, text in files.items() if (old := current(path)) != text}
    todo = enablement(params)
    if not check:
        for path in stale:
            write_drop_in(path, files[path])
        if stale:
            run("systemctl", "daemon-reload", check=True)
        for verb, unit in todo:
            run("systemctl", verb, unit, check=True)
        # After the reload: a service that still required the socket would be stopped with it.
        socket = socket_unit(params["name"])
        if stale and not params["socket"] and show(socket)[socket]["ActiveState"] == "active":
            run("systemctl", "stop", socket, check=True)
    diff = [
        {"before_header": str(p), "after_header": str(p), "before": old or "", "after": new or ""}
        for p, (old, new) in stale.items()
    ]
    before = {str(path): old for path, (old, _) in stale.items()}
    return {"changed": bool(stale or todo), "files_changed": bool(stale), "before": before, "diff": diff}


def main():
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "service": {"type": "str", "default": ""},
            "socket": {"type": "str", "default": ""},
            "enabled": {"type": "bool", "default": True},
            "unit_dir": {"type": "path", "default": "/etc/systemd/system"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**apply(module.params, module.check_mode))
    except NodeError as e:
        fail(module, e)


if __name__ == "__main__":
    main()
