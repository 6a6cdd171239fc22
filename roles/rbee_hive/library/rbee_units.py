#!/usr/bin/python
"""State of the hive, its workers and the queen, as systemd has it."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_node import (
    QUEEN_UNIT,
    TARGET,
    NodeError,
    fail,
    instances,
    journal,
    read_toml,
    show,
    unit_instance,
    unit_row,
    worker_sockets,
    worker_units,
)

DOCUMENTATION = r"""
module: rbee_units
short_description: Report rbee's units on a node
description:
  - Reads C(rbee-hive.target), every C(rbee-worker@*.service) and C(rbee-queen.service) with C(systemctl show).
  - Changes nothing; check mode is the same. A node without rbee is reported, not refused.
options:
  etc_dir:
    description: Where hive.toml and the instances' settings are.
    type: path
    default: /etc/rbee
author: rbee
"""

EXAMPLES = r"""
- name: Read the units
  rbee_units:
"""

RETURN = r"""
rbee_result:
  description: The hive. A unit that failed has its last journal lines besides.
  returned: always
  type: dict
  sample:
    hive:
      target: active
      version: 0.1.0
      units:
        - {unit: rbee-worker@cpu0.service, name: cpu0, active_state: active, sub_state: running, result: success,
           n_restarts: 0, main_pid: 312, status_text: "ready: smollm2-135m-instruct", enabled: true,
           model_id: smollm2-135m-instruct, port: 8001}
      queen: null
"""


def row(props, settings, socket=None):
    found = unit_row(props)
    if socket is not None:
        found["socket"] = socket["ActiveState"]
        found["enabled"] = found["enabled"] or socket["UnitFileState"] == "enabled"
    if settings is not None:
        found["name"] = unit_instance(props["Id"])
        found.update({k: settings.get(k) for k in ("model_id", "backend", "device", "port")})
    if found["active_state"] == "failed" or (found["result"] not in ("success", "") and found["active_state"] != "active"):
        # Its own last words say why, systemd's what came of it.
        found["journal"] = [*journal(props["Id"], lines=6, own=True), *journal(props["Id"], lines=2)]
    return found


def hive(etc_dir):
    units = show(TARGET, QUEEN_UNIT)
    target = units[TARGET]
    settings = instances(etc_dir)
    absent = target["LoadState"] == "not-found"
    facts = read_toml(Path(etc_dir, "hive.toml"))
    sockets = worker_sockets(etc_dir)
    workers = sorted(worker_units(etc_dir).values(), key=lambda p: unit_instance(p["Id"]))
    return {
        "target": "absent" if absent else "active" if target["ActiveState"] == "active" else "inactive",
        "version": facts.get("rbee_version") or facts.get("version"),
        "units": [row(p, settings.get(n, {}), sockets.get(n)) for p in workers if not absent for n in [unit_instance(p["Id"])]],
        "queen": row(units[QUEEN_UNIT], None) if units[QUEEN_UNIT]["LoadState"] == "loaded" else None,
    }


def main():
    module = AnsibleModule(argument_spec={"etc_dir": {"type": "path", "default": "/etc/rbee"}}, supports_check_mode=True)
    try:
        module.exit_json(changed=False, rbee_result={"hive": hive(module.params["etc_dir"])})
    except NodeError as e:
        fail(module, e)


if __name__ == "__main__":
    main()
