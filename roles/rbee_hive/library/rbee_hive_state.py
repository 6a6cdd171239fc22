#!/usr/bin/python
"""Start or stop everything of rbee on a node."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_lock import ARGUMENTS
from ansible.module_utils.rbee_lock import check as check_lock
from ansible.module_utils.rbee_node import (
    TARGET,
    NodeError,
    fail,
    killed,
    listening,
    refuse_masked,
    require_hive,
    run,
    running,
    settled,
    show,
    start_failure,
    unit_instance,
    up,
    wait_until,
    worker_sockets,
    worker_units,
)

DOCUMENTATION = r"""
module: rbee_hive_state
short_description: Start or stop a hive and wait until that is true
description:
  - Starting starts C(rbee-hive.target), which brings the enabled workers back, and waits until each is ready or failed.
  - Stopping stops the target, its workers and their sockets, lets running streams finish, and returns when nothing runs.
  - A worker that does not come up fails the module with C(UNIT_START_FAILED) and its last journal lines.
options:
  state:
    description: What the hive shall be.
    type: str
    choices: [started, stopped]
    required: true
  wait:
    description: >-
      When starting, wait until every enabled worker is ready or failed; when stopping, until nothing runs. The action of
      the same name waits for a stop on the controller and shows how many units have stopped.
    type: bool
    default: true
  timeout_s:
    description: Longest time to wait, seconds. Starting counts from the start, for all workers together.
    type: float
    default: 330
  etc_dir:
    description: Where the instances' settings are.
    type: path
    default: /etc/rbee
  install_hint:
    description: Command that installs rbee on this node, for the error where it is missing.
    type: str
    default: ansible-playbook site.yml
  run:
    description: Identity of the run; the action of the same name fills it in.
    type: dict
author: rbee
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: Start the hive
  rbee_hive_state:
    state: started
"""

RETURN = r"""
rbee_result:
  description: >-
    What is now. C(forced) are the workers that had to be killed. Without I(wait), C(stopping) maps the units that are being
    stopped to their main processes.
  returned: success
  type: dict
  sample: {target: inactive, changed: true, workers: [cpu0], forced: []}
"""


def start(params, check):
    target = show(TARGET)[TARGET]
    require_hive(target, params["install_hint"])
    refuse_masked(target)
    units = [*worker_units(params["etc_dir"]).values(), *worker_sockets(params["etc_dir"]).values()]
    # Of an instance with a socket that is the enabled one: its worker sleeps until somebody asks.
    workers = {p["Id"]: p for p in units if p["UnitFileState"] == "enabled"}
    changed = target["ActiveState"] != "active" or not all(map(up, workers.values()))
    if check:
        return {"target": "active", "changed": changed, "workers": sorted(map(unit_instance, workers))}
    if changed:
        down = [u for u, p in workers.items() if not up(p)]
        if down:  # a start is refused for units that failed too often
            run("systemctl", "reset-failed", *down)
        # The workers by name as well: an active target does not bring back one that went down beneath it.
        run("systemctl", "start", "--no-block", TARGET, *down, check=True)
    if not params["wait"]:
        return {"target": "active", "changed": changed, "workers": sorted(map(unit_instance, workers))}
    now = wait_until([TARGET, *workers], settled, params["timeout_s"])
    for unit in workers:
        if now[unit]["ActiveState"] != "active":
            raise start_failure(unit, now[unit])
    return {"target": "active", "changed": changed, "workers": sorted(map(unit_instance, workers))}


def stop(params, check):
    target = show(TARGET)[TARGET]
    require_hive(target, params["install_hint"])
    alive = [u for u, p in worker_units(params["etc_dir"]).items() if running(p)]
    sockets = [p["Id"] for p in worker_sockets(params["etc_dir"]).values() if listening(p)]
    changed = target["ActiveState"] != "inactive" or bool(alive or sockets)
    result = {"target": "inactive", "changed": changed, "workers": sorted(map(unit_instance, alive)), "forced": []}
    if check or not changed:
        return result
    stopping = {u: int(p["MainPID"]) for u, p in show(*alive).items()} if alive else {}
    if not params["wait"]:
        run("systemctl", "stop", "--no-block", TARGET, *sockets, *alive, check=True)
        return {**result, "stopping": {**stopping, **dict.fromkeys(sockets, 0)}}
    # One job for all, so they drain in parallel; the sockets too, or the next connection would revive a worker (N-01).
    run("systemctl", "stop", TARGET, *sockets, *alive, check=True)
    now = wait_until([*worker_units(params["etc_dir"]), *sockets], lambda p: not running(p), params["timeout_s"])
    left = sorted(unit for unit, props in now.items() if running(props))
    if left:
        raise NodeError(
            "PLAYBOOK_FAILED",
            f"still running after {params['timeout_s']:g} s: {', '.join(left)}",
            f"systemctl status {left[0]}",
            units=left,
        )
    result["forced"] = [killed(u, pid) for u, pid in stopping.items() if now.get(u, {}).get("Result") == "timeout"]
    return result


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["started", "stopped"], "required": True},
            "wait": {"type": "bool", "default": True},
            "timeout_s": {"type": "float", "default": 330.0},
            "etc_dir": {"type": "path", "default": "/etc/rbee"},
            **ARGUMENTS,
            "install_hint": {"type": "str", "default": "ansible-playbook site.yml"},
        },
        supports_check_mode=True,
    )
    try:
        if not module.check_mode:
            check_lock(module.params["run"])
        result = (start if module.params["state"] == "started" else stop)(module.params, module.check_mode)
    except NodeError as e:
        fail(module, e)
    module.exit_json(changed=result["changed"], rbee_result=result)


if __name__ == "__main__":
    main()
