#!/usr/bin/python
"""The runtimes of a node: virtual environments with one build of llama.cpp each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from ansible.module_utils.rbee_node import (
    NodeError,
    alone,
    begin,
    complete,
    current_of,
    fail,
    instances,
    read_toml,
    run,
    running,
    settled,
    show,
    start_failure,
    wait_until,
    worker_unit,
)

DOCUMENTATION = r"""
module: rbee_runtime
short_description: List, make, switch or delete the runtimes of a node
description:
  - A runtime ("worker binary") is C(<install_path>/runtimes/TYPE/VERSION) with a C(metadata.yaml), which is written last.
    Several versions of a type lie side by side; the link C(TYPE/current) leads to the one that new instances get.
options:
  state:
    description: >-
      C(list) and C(get) report, C(current) the path of the current one of I(type), C(used) makes I(version) current and
      moves the instances of the type over to it one by one (one that does not come up goes back, and so do all),
      C(deployed) makes the runtime of a release current where the machine had another release, C(absent) deletes,
      C(making) begins to build or fetch one in a transient unit that the action C(rbee_follow) shows.
    type: str
    choices: [list, get, current, used, deployed, absent, making]
    default: list
  type:
    description: C(cpu), C(cuda), C(rocm) or C(vulkan); C(cpu-llm-worker) is the same as C(cpu).
    type: str
  version:
    description: Which one; by default the current one, for C(absent) the only one.
    type: str
  force:
    description: For C(absent), also while an instance uses it or it is the current one.
    type: bool
    default: false
  script:
    description: For C(making), files/make_runtime.py of the role on the node.
    type: path
  arguments:
    description: For C(making), the script's arguments.
    type: dict
    default: {}
  fallback:
    description: For C(current), the version that a deployment would bring (check mode on a virgin machine).
    type: str
    default: ""
  timeout_s:
    description: For C(used), longest time that an instance may take to come up, seconds.
    type: float
    default: 330
  etc_dir: {type: path, default: /etc/rbee, description: Where the instances' settings are.}
  install_path: {type: path, default: /opt/rbee, description: Where the runtimes are.}
author: rbee
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: Go back to the version before
  rbee_runtime:
    state: used
    type: cpu
    version: 0.1.0-6a42cd2e
"""

RETURN = r"""
rbee_result:
  description: >-
    C(runtimes) for list; C(runtime) for get and absent (with C(freed_bytes)); C(runtime), C(previous), C(moved) for used.
  returned: sometimes
  type: dict
path:
  description: For C(current).
  returned: sometimes
  type: str
unit:
  description: For C(making), the transient unit.
  returned: sometimes
  type: str
joined:
  description: For C(making), whether another run has begun it.
  returned: sometimes
  type: bool
progress_file:
  description: For C(making), its progress.
  returned: sometimes
  type: str
"""

TYPES = ("cpu", "cuda", "rocm", "vulkan")
PROGRESS_DIR = "rbee-runtimes"
#: How a build was compiled, within its wheel (files/make_runtime.py writes it); wheels of others have none.
BUILD_RECORD = "lib/python3*/site-packages/llama_cpp_python-*.dist-info/rbee-build.json"


def kind_of(text):
    """Return the type; raises NodeError INVALID_BACKEND."""
    kind = (text or "").removesuffix("-llm-worker")
    if kind not in TYPES:
        raise NodeError(
            "INVALID_BACKEND",
            f"{text!r} is no worker type, expected one of {', '.join(TYPES)}",
            "--type cpu",
            expected=list(TYPES),
        )
    return kind


def metadata_of(home):
    """Return the metadata of a runtime: JSON, or the plain ``key: value`` lines that the role writes."""
    text = (home / "metadata.yaml").read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError:
        pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith(("#", " ")))
        return {k.strip(): v.strip().strip("'\"") for k, v in pairs}


def build_of(home):
    """Return what the build of a runtime was compiled from and how; None when its wheel does not say."""
    with contextlib.suppress(OSError, ValueError):
        for path in home.glob(BUILD_RECORD):
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def size_of(home):
    """Return the bytes that a directory takes."""
    total = 0
    for folder, _, names in os.walk(home):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118 -- ten thousand of them
    return total


def used_by(params, home):
    """Return the instances whose link leads to this runtime."""
    found = []
    for name in instances(params["etc_dir"]):
        link = Path(params["etc_dir"], "workers", f"{name}.runtime")
        with contextlib.suppress(OSError):
            if link.readlink() == home:
                found.append(name)
    return found


def record(params, home, sized=True):
    """Return what is known of one runtime."""
    known = metadata_of(home)
    kind = home.parent.name
    return {
        **known,
        "id": f"{kind}/{home.name}",
        "type": kind,
        "worker_type": f"{kind}-llm-worker",
        "version": home.name,
        "path": str(home),
        "current": current_of(home.parent) == home,
        "used_by": used_by(params, home),
        "build": build_of(home),
        **({"size_bytes": size_of(home)} if sized else {}),
    }


def find(params):
    """Return the directory that type and version mean; raises NodeError WORKER_BINARY_NOT_FOUND."""
    kind = kind_of(params["type"])
    root = Path(params["install_path"], "runtimes", kind)
    there = complete(root)
    if params["version"] is None:
        if params["state"] == "absent" and len(there) > 1:
            versions = ", ".join(p.name for p in there)
            raise NodeError(
                "INVALID_REQUEST", f"there are several {kind} runtimes: {versions}", "--version VERSION", field="version"
            )
        home = current_of(root)
    else:
        home = next((p for p in there if p.name == params["version"]), None)
    if home is None:
        wanted = params["version"] or "VERSION"
        known = ", ".join(p.name for p in there) or "none"
        raise NodeError(
            "WORKER_BINARY_NOT_FOUND",
            f"no {kind} runtime{' ' + params['version'] if params['version'] else ''} here; installed: {known}",
            f"rbee-ctl runtime build --type {kind}, or rbee-ctl runtime download --type {kind} --source WHEEL",
            expected_path=str(root / wanted),
            known=[p.name for p in there],
        )
    return home


def absent(params, check):
    """Delete a runtime; refused while it is used."""
    home = find(params)
    users, is_current = used_by(params, home), current_of(home.parent) == home
    alone = len(complete(home.parent)) == 1
    if (users or (is_current and not alone)) and not params["force"]:
        why = f"used by {', '.join(users)}" if users else f"the current {home.parent.name} runtime"
        raise NodeError(
            "WORKER_BINARY_IN_USE",
            f"{home} is {why}",
            f"rbee-ctl runtime use --type {home.parent.name} --version OTHER, or delete it all the same with --force",
            workers=users,
        )
    gone = record(params, home)
    if not check:
        (home / "metadata.yaml").unlink()  # first: from here on it does not exist
        shutil.rmtree(home)
        link = home.parent / "current"
        if link.is_symlink() and not link.exists():
            link.unlink()
    return {"runtime": gone, "freed_bytes": gone["size_bytes"], "changed": True}


def point(link, target):
    """Make a link lead somewhere, in one step."""
    part = link.with_name(f".{link.name}.new")
    part.unlink(missing_ok=True)
    part.symlink_to(target)
    part.replace(link)


def move(params, names, home, alive):
    """Move instances over one by one, restarting those in ``alive``; raises NodeError of the one that did not come up."""
    moved = []
    for name in names:
        link = Path(params["etc_dir"], "workers", f"{name}.runtime")
        if link.is_symlink() and link.readlink() == home:
            continue
        unit = worker_unit(name)
        point(link, home)
        moved.append(name)
        if name in alive:
            run("systemctl", "reset-failed", unit)
            run("systemctl", "restart", "--no-block", unit, check=True)
            time.sleep(0.2)  # the job is queued: `settled` sees it from then on
            now = wait_until([unit], settled, params["timeout_s"])
            if now[unit]["ActiveState"] != "active":
                raise start_failure(unit, now[unit])
    return moved


def use(params, check):
    """Make a version current; on a failure everything goes back."""
    home = find(params)
    root = home.parent
    before = current_of(root)
    names = [n for n, s in instances(params["etc_dir"]).items() if s.get("backend") == root.name]
    links = {n: Path(params["etc_dir"], "workers", f"{n}.runtime") for n in names}
    old = {n: link.readlink() for n, link in links.items() if link.is_symlink()}
    same = before == home and (root / "current").is_symlink() and all(p == home for p in old.values())
    result = {"runtime": record(params, home, sized=False), "previous": before.name if before else None}
    if same or check:
        return {**result, "moved": [], "changed": not same}
    alive = {n for n in names if running(show(worker_unit(n))[worker_unit(n)])}
    try:
        moved = move(params, sorted(names), home, alive)
    except NodeError as e:
        back = [n for n in sorted(names) if n in old and links[n].readlink() != old[n]]
        away = {}
        for name in back:  # one that does not come back keeps no other from it
            try:
                move(params, [name], old[name], alive)
            except NodeError as worse:
                away[name] = worse.message
        well = [name for name in back if name not in away]
        e.message += f"; all of {', '.join(well) or 'none'} runs {before.name if before else 'what it ran'} again"
        for name, why in away.items():
            e.message += f"; {name} did not come back on {old[name].name} either: {why}"
        raise
    point(root / "current", home)
    return {**result, "runtime": record(params, home, sized=False), "moved": moved, "changed": True}


def begin_making(kind, unit, progress_file, script, arguments):
    """Start the transient unit that makes a runtime."""
    flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in arguments.items() if v not in ("", False, None)]
    properties = ["ProtectHome=yes", "PrivateTmp=yes", "Nice=10", f"Description=rbee: a {kind} runtime"]
    begin(unit, progress_file, properties, "/usr/bin/python3", script, *flags)


def make(params, check):
    """Begin to make a runtime in a transient unit."""
    kind = kind_of(params["type"])
    arguments = {**params["arguments"], "type": kind, "install-path": params["install_path"]}
    key = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:12]
    unit = f"rbee-runtime-{kind}-{key}.service"
    progress_file = f"/run/{PROGRESS_DIR}/{kind}-{key}.jsonl"
    arguments |= {"progress-file": progress_file, "work": f"/var/lib/rbee/build-{kind}-{key}"}
    joined = False
    if not check:
        with alone(unit):  # a second caller in the same moment joins the first
            joined = show(unit)[unit]["ActiveState"] in ("active", "activating")
            if not joined:
                begin_making(kind, unit, progress_file, params["script"], arguments)
    return {"unit": unit, "progress_file": progress_file, "joined": joined, "changed": True}


def release(params):
    """Return the version of the release that this machine was last brought to; None before the first time."""
    return read_toml(Path(params["etc_dir"], "hive.toml")).get("runtime_version")


def current(params, check):
    """Return the path of the current runtime of a type; in check mode the one that would be after a deployment."""
    root = Path(params["install_path"], "runtimes", kind_of(params["type"]))
    home = current_of(root)
    deployed = root / params["fallback"] if params["fallback"] and root.name == "cpu" else None
    if deployed and check and release(params) != params["fallback"]:
        home = deployed
    return str(home or find(params))


def report(params):
    """Return the result of list or get."""
    if params["state"] == "get":
        return {"runtime": record(params, find(params)), "changed": False}
    kinds = [kind_of(params["type"])] if params["type"] else TYPES
    homes = [h for k in kinds for h in complete(Path(params["install_path"], "runtimes", k))]
    return {"runtimes": [record(params, h) for h in homes], "changed": False}


def deploy(params, check):
    """Make a release's own runtime current when the machine is brought to that release. One that was chosen since then by
    ``used`` stays: the same release again changes nothing."""
    root = Path(params["install_path"], "runtimes", kind_of(params["type"]))
    home, link = root / params["version"], root / "current"
    stays = release(params) == params["version"] and (link / "metadata.yaml").is_file()
    changed = not stays and not (link.is_symlink() and root / link.readlink() == home)
    if changed and not check:
        find(params)
        point(link, home)
    return {"changed": changed, "path": str(root / link.readlink() if link.is_symlink() else home)}


def main():
    # Not at the top: rbee-ctl reads this machine with the functions above, in its own process (CAP-27).
    from ansible.module_utils.basic import AnsibleModule

    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": ["list", "get", "current", "used", "deployed", "absent", "making"],
                "default": "list",
            },
            "type": {"type": "str"},
            "version": {"type": "str"},
            "force": {"type": "bool", "default": False},
            "script": {"type": "path"},
            "arguments": {"type": "dict", "default": {}},
            "fallback": {"type": "str", "default": ""},
            "timeout_s": {"type": "float", "default": 330.0},
            "etc_dir": {"type": "path", "default": "/etc/rbee"},
            "install_path": {"type": "path", "default": "/opt/rbee"},
        },
        required_if=[
            *(("state", s, ["type"]) for s in ("get", "current", "absent", "making")),
            *(("state", s, ["type", "version"]) for s in ("used", "deployed")),
            ("state", "making", ["script"]),
        ],
        supports_check_mode=True,
    )
    params, check = module.params, module.check_mode
    try:
        if params["state"] == "making":
            module.exit_json(**make(params, check))
        if params["state"] == "deployed":
            module.exit_json(**deploy(params, check))
        if params["state"] == "current":
            module.exit_json(changed=False, path=current(params, check))
        if params["state"] in ("list", "get"):
            result = report(params)
        else:
            result = (absent if params["state"] == "absent" else use)(params, check)
    except NodeError as e:
        fail(module, e)
    module.exit_json(changed=result["changed"], rbee_result=result)


if __name__ == "__main__":
    main()
