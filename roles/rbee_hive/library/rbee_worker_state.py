#!/usr/bin/python
"""Start or stop worker instances that are there."""

from __future__ import annotations

import contextlib
import subprocess
import time

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_lock import ARGUMENTS, release
from ansible.module_utils.rbee_lock import check as check_lock
from ansible.module_utils.rbee_node import (
    NodeError,
    fail,
    instances,
    killed,
    listening,
    refuse_foreign_port,
    refuse_masked,
    run,
    running,
    settled,
    show,
    socket_unit,
    start_failure,
    unit_instance,
    up,
    wait_until,
    worker_sockets,
    worker_unit,
    worker_units,
)

DOCUMENTATION = r"""
module: rbee_worker_state
short_description: Start or stop worker instances
description:
  - Works on instances that have a settings file. Making one is the role rbee_worker's work.
  - Starting returns with the unit being started (C(pending)) unless I(wait) is set or it is up within I(patience_s); the action
    C(rbee_follow) shows how it loads. A unit that is seen not to come up fails the module with C(UNIT_START_FAILED) and its last
    journal lines.
  - An instance whose socket listens counts as started although no process runs: it sleeps; see I(wake).
  - Stopping lets running streams finish and stops the socket with the service.
options:
  names:
    description: Instances.
    type: list
    elements: str
    required: true
  state:
    description: What they shall be.
    type: str
    choices: [started, stopped]
    required: true
  wait:
    description: Wait until a started unit is ready or failed.
    type: bool
    default: true
  patience_s:
    description: Without I(wait), wait so long all the same - what is started by then needs no second look.
    type: float
    default: 0
  unlock:
    description: Give the node's lock back when nothing is left to do.
    type: bool
    default: false
  restart:
    description: When starting, restart what already runs, for settings that changed.
    type: bool
    default: false
  wake:
    description: When starting, start also what sleeps behind its socket.
    type: bool
    default: false
  invocation:
    description: >-
      Invocation id that the unit had before all this began; with it, C(changed) says whether the unit was started since.
    type: str
  timeout_s:
    description: Longest time to wait, seconds.
    type: float
    default: 330
  etc_dir:
    description: Where the instances' settings are.
    type: path
    default: /etc/rbee
  run:
    description: Identity of the run; the action of the same name fills it in.
    type: dict
author: rbee
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: Stop a worker
  rbee_worker_state:
    names: [cpu0]
    state: stopped
"""

RETURN = r"""
pending:
  description: Whether a started unit is still on its way.
  returned: I(state=started)
  type: bool
released:
  description: Whether the node's lock was given back.
  returned: success
  type: bool
rbee_result:
  description: >-
    For C(stopped) the lists of names, and C(forced), those that had to be killed; for C(started) the worker (the first of
    I(names)) and whether it changed.
  returned: success
  type: dict
  sample:
    changed: true
    worker: {worker_id: lab1-cpu0, name: cpu0, unit: rbee-worker@cpu0.service, url: "http://10.77.0.11:8001", state: idle,
             model_id: smollm2-135m-instruct, backend: cpu, device: 0, port: 8001}
"""


#: Seconds between two looks at a unit that is being started.
LOOK_S = 0.15
STATES = {"active": "idle", "activating": "loading", "deactivating": "draining", "failed": "failed", "inactive": "stopped"}


def record(name, settings, props, sleeps):
    state = STATES.get(props["ActiveState"], props["ActiveState"])
    if int(props.get("Job") or 0) and state == "stopped":
        state = "loading"  # asked for and not begun
    elif state == "stopped" and sleeps:
        state = "dormant"
    return {
        "worker_id": f"{settings.get('hive')}-{name}",
        "name": name,
        "unit": worker_unit(name),
        "url": settings.get("url") or f"http://{settings.get('host', '127.0.0.1')}:{settings.get('port')}",
        "state": state,
        **{key: settings.get(key) for key in ("model_id", "backend", "device", "port")},
    }


def known(names, etc_dir):
    """Return the settings of all instances; raises NodeError WORKER_NOT_FOUND for a name that is none."""
    settings = instances(etc_dir)
    there = {*settings, *map(unit_instance, worker_units(etc_dir))}
    for name in names:
        if name not in there:
            raise NodeError(
                "WORKER_NOT_FOUND",
                f"no worker {name!r} on this machine; it has {', '.join(sorted(there)) or 'none'}",
                "rbee-ctl worker list",
                known=sorted(there),
            )
    return settings


def watch(unit, limit_s, job):
    """Return what a unit that is being started says of itself until it is up, down, or ``limit_s`` are over.

    ``job``: the systemctl that waits for it. It says when to look: looking all the time takes the worker its cores away.
    """
    said, end = [], time.monotonic() + limit_s
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(LOOK_S)
        props = show(unit)[unit]
        # While systemctl runs, a unit that seems to have arrived has not begun: systemd has not been asked yet.
        ended, arrived = job.returncode is not None, settled(props)
        text = props.get("StatusText", "")
        if text and text not in said and (props["ActiveState"] == "activating" or (ended and arrived and not said)):
            said.append(text)
        if (ended and arrived) or ((ended or not arrived) and time.monotonic() > end):
            return [f"{unit_instance(unit)}: {text}" for text in said]
        if ended:  # it failed, and systemd begins it anew
            time.sleep(LOOK_S)


def restart(units, patience_s):
    """Begin units, and watch the first for ``patience_s``; returns what it says of itself."""
    if not patience_s:
        run("systemctl", "restart", "--no-block", *units, check=True)
        return []
    # What it says when it fails is worked out from the unit's own state.
    command = ["systemctl", "restart", *units]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        try:
            return watch(units[0], patience_s, job)
        finally:
            job.kill()  # the waiting alone ends: systemd goes on


def start(params, check):
    # In check mode the instance may be one that the role would have made before.
    settings = instances(params["etc_dir"]) if check else known(params["names"], params["etc_dir"])
    units = [worker_unit(n) for n in params["names"]]
    before, sockets = show(*units), worker_sockets(params["etc_dir"])
    asleep = {
        worker_unit(n)
        for n in params["names"]
        if n in sockets and listening(sockets[n]) and before[worker_unit(n)]["ActiveState"] == "inactive"
    }
    there = asleep if not params["wake"] else set()
    down = [u for u in units if params["restart"] or not (up(before[u]) or u in there)]
    for unit in down:
        refuse_masked(before[unit])
    said = []
    if down and not check:
        for name in map(unit_instance, down):
            held = running(before[worker_unit(name)]) or (name in sockets and listening(sockets[name]))
            if not held and settings[name].get("port"):
                refuse_foreign_port(name, settings[name]["port"])
        # A start is refused for units that failed too often.
        run("systemctl", "reset-failed", *down, *(socket_unit(unit_instance(u)) for u in down if unit_instance(u) in sockets))
        said = restart(down, params["patience_s"])
    now = wait_until(units, settled, params["timeout_s"]) if params["wait"] and not check else show(*units)
    pending = not check and not all(map(settled, now.values()))
    if (params["wait"] or (params["patience_s"] and not pending)) and not check:
        for unit in units:
            if now[unit]["ActiveState"] != "active" and not (unit in there and unit not in down):
                socket = socket_unit(unit_instance(unit))
                held = show(socket)[socket]
                if unit_instance(unit) in sockets and held["ActiveState"] == "failed" and not int(now[unit]["NRestarts"] or 0):
                    raise start_failure(socket, held)
                raise start_failure(unit, now[unit])
    changed = bool(down)
    if params["invocation"] is not None:
        changed = changed or now[units[0]]["InvocationID"] != params["invocation"]
    name, rest = params["names"][0], {"changed": changed, "pending": pending, "narration": said}
    if name not in settings:
        return {"worker": {"name": name, "unit": units[0], "state": "absent"}, **rest, "changed": True}
    return {"worker": record(name, settings[name], now[units[0]], name in sockets), **rest}


def stop(params, check):
    known(params["names"], params["etc_dir"])
    units = [worker_unit(n) for n in params["names"]]
    alive = [u for u, p in show(*units).items() if running(p)]
    pids, forced = {u: show(u)[u]["MainPID"] for u in alive}, []
    alive += [p["Id"] for n, p in worker_sockets(params["etc_dir"]).items() if n in params["names"] and listening(p)]
    if alive and not check:
        run("systemctl", "stop", *alive, check=True)
        now = wait_until(alive, lambda p: not running(p), params["timeout_s"])
        forced = [killed(u, pids[u]) for u, p in now.items() if p.get("Result") == "timeout" and u in pids]
        left = [u for u, p in now.items() if running(p)]
        if left:
            raise NodeError("PLAYBOOK_FAILED", f"still running: {', '.join(left)}", f"systemctl status {left[0]}", units=left)
    stopped = [n for n in params["names"] if worker_unit(n) in alive or socket_unit(n) in alive]
    already = [n for n in params["names"] if n not in stopped]
    return {"stopped": stopped, "already_stopped": already, "forced": forced, "changed": bool(alive)}


def main():
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["started", "stopped"], "required": True},
            "wait": {"type": "bool", "default": True},
            "patience_s": {"type": "float", "default": 0.0},
            "unlock": {"type": "bool", "default": False},
            "restart": {"type": "bool", "default": False},
            "wake": {"type": "bool", "default": False},
            "invocation": {"type": "str"},
            "timeout_s": {"type": "float", "default": 330.0},
            "etc_dir": {"type": "path", "default": "/etc/rbee"},
            **ARGUMENTS,
        },
        supports_check_mode=True,
    )
    if not module.params["names"]:
        module.fail_json(msg="names is empty: give at least one instance, for example cpu0")
    try:
        if not module.check_mode:
            check_lock(module.params["run"])
        result = (start if module.params["state"] == "started" else stop)(module.params, module.check_mode)
        pending, said = result.pop("pending", False), result.pop("narration", [])
        done = module.params["unlock"] and not pending and not module.check_mode
        released = bool(done and module.params["run"] and release(module.params["run"]))
    except NodeError as e:
        fail(module, e)
    changed = result["changed"] if "worker" in result else result.pop("changed")
    module.exit_json(changed=changed, pending=pending, released=released, narration=said, rbee_result=result)


if __name__ == "__main__":
    main()
