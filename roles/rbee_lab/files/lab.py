#!/usr/bin/env python3
"""Throw-away machines for trying and testing rbee: systemd-nspawn hosts with sshd on a bridge of their own.

    lab.py up [--nodes N] [--memory MIB] [--recreate]     lab1 ... labN run; those that do are left alone
    lab.py down [NAME ...]                                remove machines; without names the whole lab
    lab.py status | reboot NAME | partition NAME | heal NAME

Needs root, Linux, systemd-container; mmdebstrap for the first root file system. The result is one JSON object on
stdout, progress goes to stderr; a failure is ``{"rbee_error": {code, message, hint, details}}`` and exit code 1.
Environment: RBEE_LAB_NET (10.77.0), RBEE_LAB_BRIDGE, RBEE_LAB_DIR (.lab), RBEE_CACHE (~/.cache/rbee). The machines have
no internet; no firewall rule, no route and nothing under /proc/sys is changed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab_node
import lab_rootfs
from lab_common import MAX_NODES, Lab, LabError, Node, hand_over, links, progress, run

PROGRAMS = {
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "mount": "mount",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}


# --- before anything is changed ---------------------------------------------------------------------------------------


def preflight(lab: Lab) -> None:
    """Refuse what can not work; raises LabError and changes nothing."""
    if sys.platform != "linux":
        raise LabError("MISSING_DEPENDENCY", f"the lab needs Linux, this is {sys.platform}", "rbee-ctl serve")
    require_root()
    missing = {program: package for program, package in PROGRAMS.items() if not shutil.which(program)}
    if missing:
        raise LabError(
            "MISSING_DEPENDENCY",
            f"not installed: {', '.join(missing)}",
            f"apt-get install {' '.join(sorted(set(missing.values())))}",
            programs=sorted(missing),
        )
    if not host_can_isolate():
        raise LabError(
            "MISSING_DEPENDENCY",
            "this root may not mount file systems (a container without CAP_SYS_ADMIN?)",
            "run it on a machine or in a privileged container; without a lab: rbee-ctl serve",
        )
    check_owner(lab)
    check_network(lab)


def require_root() -> None:
    """Raise LabError unless this is root."""
    if os.geteuid() != 0:
        raise LabError(
            "MISSING_DEPENDENCY",
            "the lab needs root: it makes mounts, network namespaces and a bridge",
            f"sudo {' '.join(sys.argv)}",
        )


def host_can_isolate() -> bool:
    """Whether this process has CAP_SYS_ADMIN and CAP_NET_ADMIN."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
            return bool(effective >> 21 & 1 and effective >> 12 & 1)
    return False


def has_bridge(lab: Lab) -> bool:
    """Whether an interface of the bridge's name exists."""
    return lab.bridge in links()


def kind(lab: Lab) -> str:
    """Return the kind of that interface; empty when it does not exist."""
    return str(links().get(lab.bridge, {}).get("linkinfo", {}).get("info_kind", ""))


def owner(lab: Lab) -> Path | None:
    """Return the state directory of the lab that has the bridge (its alias says so), None when there is no bridge."""
    text = links().get(lab.bridge, {}).get("ifalias", "")
    return Path(text.removeprefix("rbee-lab ")) if text.startswith("rbee-lab ") else None


def check_owner(lab: Lab) -> None:
    """Raise LabError when the lab on this network belongs to another checkout that still exists."""
    other = owner(lab)
    if other is not None and other != lab.directory and (other / "nodes").is_dir():
        raise LabError(
            "CONFIG_INVALID",
            f"the lab on {lab.net}.0/24 belongs to {other}, this is {lab.directory}",
            f"take that one down first (RBEE_LAB_DIR={other}) or use another network: export RBEE_LAB_NET=10.77.1",
            owner=str(other),
        )


def check_network(lab: Lab) -> None:
    """Raise LabError when an interface or a route of the controller is in the lab's network already."""
    ours = ipaddress.ip_network(f"{lab.net}.0/24")
    for interface in json.loads(run("ip", "-json", "-4", "address").stdout or "[]"):
        for address in interface.get("addr_info", []):
            theirs = ipaddress.ip_interface(f"{address['local']}/{address['prefixlen']}")
            if interface["ifname"] != lab.bridge and theirs.network.overlaps(ours):
                _refuse_network(ours, f"{interface['ifname']} ({theirs})")
    for route in json.loads(run("ip", "-json", "-4", "route").stdout or "[]"):
        if route["dst"] == "default" or route.get("dev") == lab.bridge:
            continue
        if ipaddress.ip_network(route["dst"], strict=False).overlaps(ours):
            _refuse_network(ours, f"a route to {route['dst']} by {route.get('dev', route.get('gateway', '?'))}")


def _refuse_network(ours: object, user: str) -> None:
    raise LabError(
        "CONFIG_INVALID", f"{ours} is in use by {user}", "choose another: export RBEE_LAB_NET=10.78.0", network=str(ours)
    )


# --- parts of the whole lab --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(lab: Lab) -> Iterator[None]:
    """Hold the lab's lock: two commands at once wait for each other."""
    lab.run_directory.mkdir(mode=0o700, exist_ok=True)
    hand_over(lab.run_directory)
    with (lab.run_directory / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def make_keys(lab: Lab) -> None:
    """Make the key that opens the machines, their host key and known_hosts, once a lab."""
    lab.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    hand_over(lab.directory)
    for path, comment in ((lab.key, "rbee-lab"), (lab.directory / "host_key", "rbee-lab-host")):
        if not (path.is_file() and path.with_suffix(".pub").is_file()):
            path.unlink(missing_ok=True)
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path)
        hand_over(path)
        hand_over(path.with_suffix(".pub"))
    kind, key = (lab.directory / "host_key.pub").read_text().split()[:2]
    lab.known_hosts.write_text(f"{lab.net}.* {kind} {key}\n")
    hand_over(lab.known_hosts)


def make_bridge(lab: Lab) -> None:
    """Make the bridge with the controller's own address; idempotent."""
    if not has_bridge(lab):
        run("ip", "link", "add", lab.bridge, "type", "bridge")
    elif kind(lab) != "bridge":
        raise LabError("CONFIG_INVALID", f"{lab.bridge} exists and is no bridge", "export RBEE_LAB_BRIDGE=rbee1")
    run("ip", "link", "set", lab.bridge, "alias", f"rbee-lab {lab.directory}")
    # Else it has the least of its ports' and changes it as machines come and go, which still send to the old one.
    run("ip", "link", "set", lab.bridge, "address", lab.bridge_mac)
    run("ip", "address", "replace", f"{lab.net}.1/24", "dev", lab.bridge)
    run("ip", "link", "set", lab.bridge, "up")


def check_forwarding(lab: Lab, nodes: list[Node]) -> None:
    """Raise LabError when a firewall of the controller keeps the machines from each other (bridge-nf-call-iptables)."""
    switch = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if len(nodes) < 2 or not switch.exists() or switch.read_text().strip() == "0":
        return
    probe = f"exec 3<>/dev/tcp/{nodes[1].address}/22"
    done = run("ip", "netns", "exec", nodes[0].unique, "timeout", "3", "bash", "-c", probe, check=False)
    if done.returncode != 0:
        raise LabError(
            "CONFIG_INVALID",
            f"{nodes[0].name} does not reach {nodes[1].name}: a firewall of this machine filters bridged frames",
            f"iptables -I FORWARD -i {lab.bridge} -o {lab.bridge} -j ACCEPT",
        )


def remove_bridge(lab: Lab) -> None:
    """Remove the bridge and the directories under /run that only it and the machines needed."""
    if kind(lab) == "bridge" and (owner(lab) is not None or lab.bridge.startswith("rb")):
        run("ip", "link", "del", lab.bridge)
    in_parallel(end_connection, [control for control in lab.run_directory.glob("*") if control.is_socket()])
    shutil.rmtree(lab.run_directory, ignore_errors=True)


def end_connection(control: Path, limit_s: float = 10.0) -> None:
    """End a ControlPersist master of ssh, which would live on for minutes, and wait until it has: it answers before."""
    said = run("ssh", "-o", f"ControlPath={control}", "-O", "check", "lab", check=False).stderr
    run("ssh", "-o", f"ControlPath={control}", "-O", "exit", "lab", check=False)
    master, end = re.search(r"pid=(\d+)", said), time.monotonic() + limit_s
    while master and lab_node.cmdline(int(master[1])) and time.monotonic() < end:
        time.sleep(0.02)


def remove_files(lab: Lab) -> None:
    """Remove what lies in the lab's directory, but an inventory that the user has edited."""
    inventory, noted = lab.directory / "inventory.yml", lab.directory / "inventory.sha1"
    if inventory.is_file() and noted.is_file():
        digest = hashlib.sha1(inventory.read_bytes(), usedforsecurity=False).hexdigest()  # what Ansible's modules report
        if digest == noted.read_text().strip():
            inventory.unlink()
    for name in ("id", "id.pub", "host_key", "host_key.pub", "known_hosts", "config.toml", "inventory.sha1"):
        (lab.directory / name).unlink(missing_ok=True)
    for name in ("nodes", "state"):
        shutil.rmtree(lab.directory / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        lab.directory.rmdir()  # stays when something of the user's is in it


# --- commands -----------------------------------------------------------------------------------------------------------


def up(lab: Lab, count: int, memory_mib: int | None, recreate: bool) -> dict[str, Any]:
    """Make lab1 ... labN run. Returns ``describe`` with ``changed`` and the names ``booted``."""
    preflight(lab)
    tree = lab_rootfs.ensure(lab.cache)
    with locked(lab):
        make_keys(lab)
        wanted = [lab.node(f"lab{n}") for n in range(1, count + 1)]
        existing = set(lab_node.known_nodes(lab))
        fresh_bridge = not has_bridge(lab)
        make_bridge(lab)

        def ensure(node: Node) -> str:
            if node in existing:
                if not recreate and not fresh_bridge:
                    run("ip", "link", "set", node.link, "up", check=False)
                    if lab_node.state(node, 10.0) == "running":
                        return ""
                lab_node.remove(node)
            lab_node.boot(node, tree, memory_mib)
            return node.name

        began = time.monotonic()
        booted = [name for name in in_parallel(ensure, wanted) if name]
        check_forwarding(lab, wanted)
        if booted:
            progress(f"{', '.join(booted)} booted in {time.monotonic() - began:.1f} s")
        return {"changed": bool(booted) or fresh_bridge, "booted": booted, **describe(lab)}


def down(lab: Lab, names: list[str]) -> dict[str, Any]:
    """Remove machines, without names the whole lab, whatever state they are in. Returns ``{"changed", "removed", ...}``."""
    require_root()
    check_owner(lab)
    present = lab_node.known_nodes(lab)
    nodes = [lab.node(n) for n in names] if names else present
    with locked(lab):
        in_parallel(lab_node.remove, nodes)
        bridge = has_bridge(lab)
        if not names or not lab_node.known_nodes(lab):
            remove_bridge(lab)
            remove_files(lab)
    removed = [n.name for n in nodes if n in present]
    return {"changed": bool(removed) or (bridge and not names), "removed": removed, **describe(lab)}


def describe(lab: Lab) -> dict[str, Any]:
    """Return the lab as it is: ``{"lab": {...}, "nodes": [{"name", "state", "address", ...}], "belongings": {...}}``."""
    nodes = in_parallel(lambda node: {"node": node, "state": lab_node.state(node)}, lab_node.known_nodes(lab))
    return {
        "lab": {
            "network": f"{lab.net}.0/24",
            "bridge": lab.bridge,
            "id": lab.id,
            "directory": str(lab.directory),
            "key": str(lab.key),
            "known_hosts": str(lab.known_hosts),
            "control_path": str(lab.run_directory),
        },
        "nodes": [
            {
                "name": n["node"].name,
                "state": n["state"],
                "address": n["node"].address,
                "link": n["node"].link,
                "namespace": n["node"].unique,
                "console": str(n["node"].directory / "console.log"),
            }
            for n in nodes
        ],
        "belongings": lab_node.belongings(lab),
    }


def reboot(lab: Lab, name: str) -> dict[str, Any]:
    """Reboot one machine and wait for it."""
    require_root()
    with locked(lab):
        seconds = lab_node.reboot(lab.node(name))
    progress(f"{name} rebooted in {seconds:.1f} s")
    return {"changed": True, "seconds": round(seconds, 2), **describe(lab)}


def set_link(lab: Lab, name: str, to: str) -> dict[str, Any]:
    """Cut one machine off the network (``down``) or connect it again (``up``)."""
    require_root()
    node = lab.node(name)
    if node.link not in links():
        raise LabError("NODE_NOT_FOUND", f"{name} does not exist", "rbee-ctl lab status", node=name)
    run("ip", "link", "set", node.link, to)
    return {"changed": True, **describe(lab)}


def in_parallel(function: Any, items: list[Any]) -> list[Any]:
    """Call the function for all items at once; the first failure is raised when all have ended."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        futures = [pool.submit(function, item) for item in items]
    return [f.result() for f in futures]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = argparse.ArgumentParser(prog="lab.py", description="throw-away machines for trying and testing rbee")
    root.add_argument("--directory", type=Path, default=None, help="state of the lab (default: $RBEE_LAB_DIR or .lab)")
    verbs = root.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("up", help="make lab1 ... labN run")
    verb.add_argument("--nodes", type=int, default=2, metavar="N", choices=range(1, MAX_NODES + 1), help="how many (default: 2)")
    verb.add_argument("--memory", type=int, default=None, metavar="MIB", help="limit of each machine (default: none)")
    verb.add_argument("--recreate", action="store_true", help="make running machines anew")
    verbs.add_parser("down", help="remove machines").add_argument("names", nargs="*", metavar="NAME")
    verbs.add_parser("status", help="show the lab")
    for name in ("reboot", "partition", "heal"):
        verbs.add_parser(name).add_argument("name", metavar="NAME")
    return root


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        lab = Lab.from_environment(arguments.directory)
        if arguments.verb == "up":
            result = up(lab, arguments.nodes, arguments.memory, arguments.recreate)
        elif arguments.verb == "down":
            result = down(lab, arguments.names)
        elif arguments.verb == "reboot":
            result = reboot(lab, arguments.name)
        elif arguments.verb in ("partition", "heal"):
            result = set_link(lab, arguments.name, "down" if arguments.verb == "partition" else "up")
        else:
            result = describe(lab)
    except LabError as error:
        print(json.dumps({"rbee_error": error.as_dict()}))
        print(f"lab: {error.message}\nnext: {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted; the next up or down repairs what is half done", file=sys.stderr)
        return 130
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
