#!/usr/bin/python
"""Take rbee off a machine."""

from __future__ import annotations

import pwd
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_lock import ARGUMENTS
from ansible.module_utils.rbee_lock import PATH as LOCK
from ansible.module_utils.rbee_lock import check as check_lock
from ansible.module_utils.rbee_node import NodeError, fail, run, running, show, wait_until

DOCUMENTATION = r"""
module: rbee_hive_absent
short_description: Take rbee off a machine
description:
  - Stops everything (running streams finish), then removes units, drop-ins, slice, settings, credentials, runtimes, caches, the
    queen's state with its audit log, the user and what lies in C(/run). Also a half installed machine. Packages of the
    distribution stay - others may need them by now.
  - Models stay, owned by root, unless I(purge).
options:
  purge:
    description: Remove the models too.
    type: bool
    default: false
  install_path: {type: path, default: /opt/rbee, description: Where the runtimes are.}
  models_dir: {type: path, default: /var/lib/rbee/models, description: Where the models are.}
  timeout_s:
    description: Longest time for running streams, seconds.
    type: float
    default: 90
  run:
    description: Identity of the run; the action of the same name fills it in.
    type: dict
author: rbee
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
"""

EXAMPLES = r"""
- name: Take rbee off this machine
  rbee_hive_absent:
"""

RETURN = r"""
rbee_result:
  description: What was removed, or in check mode would be; and which models stay.
  returned: success
  type: dict
  sample: {removed: [/etc/rbee, user rbee], stopped: [rbee-worker@cpu0.service], models_kept: /var/lib/rbee/models}
"""

UNIT_DIR = Path("/etc/systemd/system")
STATE = Path("/var/lib/rbee")
ETC = Path("/etc/rbee")
#: The fleet as a unit of its controller. Where that is this machine it stays: stopping it would stop every machine.
FLEET = "rbee-fleet.service"
#: What an operator has here beside it (docs/operations.md, rbee-ctl install --system): settings, and secrets of the fleet.
OPERATORS = (ETC / "fleet.env", ETC / "config.toml", STATE / "state")


def is_there(path):
    return path.is_symlink() or path.exists()


def models_left(models_dir):
    """Return whether there is any file that a purge would cost."""
    return models_dir.is_dir() and any(p.is_file() for p in models_dir.rglob("*"))


def leftovers(params):
    """Return every path of rbee's on this machine that is to go, outermost first."""
    models_dir, keep = Path(params["models_dir"]), not params["purge"] and models_left(Path(params["models_dir"]))
    units = [*UNIT_DIR.glob("rbee*"), *UNIT_DIR.glob("*.wants/rbee*"), *Path("/run/systemd/system").glob("rbee*")]
    home = Path(params["install_path"])
    # A folder that others have things in too, be it /opt itself: ours in it are the runtimes.
    ours = home / "runtimes" if home.is_dir() and any(p.name != "runtimes" for p in home.iterdir()) else home
    places = [*sorted(u for u in units if u.name.partition(".d")[0] != FLEET), ETC, ours]
    places += [*sorted(Path("/run").glob("rbee*")), Path("/etc/tmpfiles.d/rbee.conf"), Path("/etc/ansible/facts.d/rbee.fact")]
    # What systemd made for the units: caches (of accounts that exist only while a worker runs) and the queen's state.
    places += [p for folder in ("/var/cache", "/var/cache/private", "/var/lib/private") for p in Path(folder).glob("rbee*")]
    places += sorted(STATE.parent.glob("rbee-*"))
    places += [models_dir, STATE]
    kept = [*([models_dir] if keep else []), *filter(is_there, OPERATORS)]
    places = [p for p in places if is_there(p) and p.name != "rbee-lock.json"]
    found = list(dict.fromkeys(p for place in places for p in without(place, kept)))
    return [p for p in found if not any(other in p.parents for other in found)]


def without(place, kept):
    """Return ``place``, or what is in it where something in it is kept."""
    if place in kept:
        return []
    if not any(place in k.parents for k in kept):
        return [place]
    return [p for child in sorted(place.iterdir()) for p in without(child, kept)]


def user():
    """Return the entry of the user rbee, or None."""
    try:
        return pwd.getpwnam("rbee")
    except KeyError:
        return None


def remove(params, check):
    """Return (result, changed)."""
    units = {u: p for u, p in show("rbee*").items() if p.get("LoadState") != "not-found" and u != FLEET}
    alive = [u for u, p in units.items() if running(p) and not u.endswith(".slice")]
    gone, owner, models = leftovers(params), user(), Path(params["models_dir"])
    kept = str(models) if models_left(models) and not params["purge"] else None
    foreign = kept is not None and models.stat().st_uid != 0
    result = {"removed": [*map(str, gone), *(["user rbee"] if owner else [])], "stopped": alive, "models_kept": kept}
    changed = bool(gone or owner or alive or foreign)
    if check or not changed:
        return result, changed
    if alive:
        run("systemctl", "stop", *alive, check=True)
        left = [u for u, p in wait_until(alive, lambda p: not running(p), params["timeout_s"]).items() if running(p)]
        if left:
            said = f"still running after {params['timeout_s']:g} s: {', '.join(left)}"
            raise NodeError("PLAYBOOK_FAILED", said, f"systemctl kill -s KILL {left[0]}", units=left)
    enabled = [u for u, p in units.items() if p.get("UnitFileState") == "enabled"]
    if enabled:
        run("systemctl", "disable", "--quiet", *enabled)
    run("systemctl", "stop", "rbee.slice")
    for path in leftovers(params):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    run("systemctl", "daemon-reload", check=True)
    run("systemctl", "reset-failed", "rbee*")
    if foreign:  # the user's number may be somebody else's one day
        run("chown", "-R", "0:0", str(models), check=True)
        for parent in models.parents:
            if parent == STATE or STATE in parent.parents:
                run("chown", "0:0", str(parent), check=True)
    if owner:
        code, _, said = run("userdel", "rbee")
        if code not in (0, 6):
            raise NodeError("PLAYBOOK_FAILED", f"userdel rbee: {said.strip()}", "ps -u rbee")
        run("groupdel", "rbee")  # gone already where it was the user's own
    return result, True


def main():
    module = AnsibleModule(
        argument_spec={
            "purge": {"type": "bool", "default": False},
            "install_path": {"type": "path", "default": "/opt/rbee"},
            "models_dir": {"type": "path", "default": "/var/lib/rbee/models"},
            "timeout_s": {"type": "float", "default": 90.0},
            **ARGUMENTS,
        },
        supports_check_mode=True,
    )
    try:
        if not module.check_mode:
            check_lock(module.params["run"])
        result, changed = remove(module.params, module.check_mode)
        if not module.check_mode:  # ours, or that of a run that is dead
            Path(LOCK).unlink(missing_ok=True)
    except NodeError as e:
        fail(module, e)
    diff = {"before": "".join(f"{line}\n" for line in result["removed"]), "after": ""}
    module.exit_json(changed=changed, rbee_result=result, diff=diff)


if __name__ == "__main__":
    main()
