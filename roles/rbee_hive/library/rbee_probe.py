#!/usr/bin/python
"""What a node is and has, as a list of named checks."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_devices import devices
from ansible.module_utils.rbee_node import TARGET, read_toml, run, runtimes, show
from ansible.module_utils.rbee_ram import mem_available

DOCUMENTATION = r"""
module: rbee_probe
short_description: Find out what a node is and has
description:
  - Devices, operating system, systemd, Python, memory, disk, and what of rbee is installed, as named checks.
  - The action of the same name adds how long one command over the open connection takes.
  - Changes nothing; check mode is the same. A check that does not hold never fails the module.
options:
  install_path: {type: path, default: /opt/rbee, description: Where the runtimes are.}
  models_dir: {type: path, default: /var/lib/rbee/models, description: Where the models are.}
  etc_dir: {type: path, default: /etc/rbee, description: Where the settings are.}
  systemd_minimum: {type: int, default: 250, description: Oldest systemd that is supported.}
  python_minimum: {type: str, default: "3.11", description: Oldest Python that is supported.}
  disk_minimum_bytes: {type: int, default: 2000000000, description: Free disk that an installation and a small model need.}
  memory_minimum_bytes: {type: int, default: 500000000, description: Free memory that a small model needs.}
  install_hint:
    description: Command that installs rbee on this node.
    type: str
    default: ansible-playbook site.yml
author: rbee
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: Look at the machine
  rbee_probe:
"""

RETURN = r"""
rbee_result:
  description: >-
    C(devices) and C(backends) as rbee_devices gives them, and C(checks), each with name, ok, got and, where it does not
    hold, expected and hint. C(required) tells checks without which nothing can run from what an installation brings.
  returned: always
  type: dict
  sample:
    backends: {cpu: 1}
    devices: [{id: "cpu:0", backend: cpu, device: 0, name: "Intel(R) Xeon(R)", memory_bytes: 25769803776}]
    version: 0.1.0
    checks: [{name: systemd, ok: true, required: true, got: "252"}]
"""


def existing(path):
    """Return the nearest directory above ``path`` that is there."""
    path = Path(path)
    while not path.is_dir():
        path = path.parent
    return path


def check(name, ok, got, expected="", hint=None, required=True):
    found = {"name": name, "ok": bool(ok), "required": required, "got": str(got)}
    return found if ok else {**found, "expected": expected, "hint": hint}


def look(params):
    """Return (checks, version of rbee here or None)."""
    _, out, _ = run("systemctl", "--version")
    words = out.split()
    systemd = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    python = ".".join(map(str, sys.version_info[:2]))
    wanted = tuple(map(int, params["python_minimum"].split(".")))
    free = shutil.disk_usage(existing(params["models_dir"])).free
    memory = mem_available()
    there = [kind for kind in ("cpu", "cuda", "rocm", "vulkan") if runtimes(params["install_path"], kind)]
    facts = read_toml(Path(params["etc_dir"], "hive.toml"))
    version = facts.get("rbee_version") or facts.get("version")
    booted = Path("/run/systemd/system").is_dir()
    manager = f"{systemd or 'none'}{'' if booted else ', not in charge'}"
    target = show(TARGET)[TARGET] if booted else {}
    install = params["install_hint"]
    machine = f"{os.uname().sysname} {os.uname().machine}"
    checks = [
        check("privileges", os.geteuid() == 0, "root" if os.geteuid() == 0 else f"uid {os.geteuid()}", "root (by sudo)",
              "give the user passwordless sudo, or set ansible_become_password in a vault"),
        check("machine", machine == "Linux x86_64", machine, "Linux x86_64", "use another machine"),
        check("systemd", booted and systemd >= params["systemd_minimum"], manager,
              f">= {params['systemd_minimum']}", "use a machine that systemd has booted"),
        check("python", sys.version_info[:2] >= wanted, python, f">= {params['python_minimum']}", "apt-get install python3"),
        check("disk", free >= params["disk_minimum_bytes"], f"{free / 1e9:.1f} GB free",
              f">= {params['disk_minimum_bytes'] / 1e9:.1f} GB", "rbee-ctl model list; rbee-ctl model delete"),
        check("memory", memory >= params["memory_minimum_bytes"], f"{memory / 1e6:.0f} MB available",
              f">= {params['memory_minimum_bytes'] / 1e6:.0f} MB", "stop what uses the memory"),
        check("runtime", there, ", ".join(there) or "none", "a runtime", install, required=False),
        check("version", version, version or "not installed", "installed", install, required=False),
        check("hive", target.get("ActiveState") == "active", target.get("ActiveState", "unknown")
              if target.get("LoadState") not in (None, "not-found") else "not installed", "active",
              "rbee-ctl hive start" if version else install, required=False),
    ]  # fmt: skip
    return checks, version


def main():
    module = AnsibleModule(
        argument_spec={
            "install_path": {"type": "path", "default": "/opt/rbee"},
            "models_dir": {"type": "path", "default": "/var/lib/rbee/models"},
            "etc_dir": {"type": "path", "default": "/etc/rbee"},
            "systemd_minimum": {"type": "int", "default": 250},
            "python_minimum": {"type": "str", "default": "3.11"},
            "disk_minimum_bytes": {"type": "int", "default": 2_000_000_000},
            "memory_minimum_bytes": {"type": "int", "default": 500_000_000},
            "install_hint": {"type": "str", "default": "ansible-playbook site.yml"},
        },
        supports_check_mode=True,
    )
    checks, version = look(module.params)
    found = devices()
    counts = {}
    for device in found:
        counts[device["backend"]] = counts.get(device["backend"], 0) + 1
    module.exit_json(changed=False, rbee_result={"devices": found, "backends": counts, "checks": checks, "version": version})


if __name__ == "__main__":
    main()
