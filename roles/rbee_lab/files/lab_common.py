"""What the lab's modules share: names and paths of one lab, errors, programs. Standard library only, Python >= 3.11.

Everything that a lab makes on the machine carries its id (derived from its network), so that ``down`` finds it from the
system alone: interfaces ``rv<id>-<n>``, namespaces, cgroups and mount sources ``rbee-lab-<id>-<node>``.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

MAX_NODES = 50
FIRST_HOST = 10  # node lab1 gets NET.11


class LabError(Exception):
    """Something the lab could not do: ``code`` is one of rbee's error codes, ``hint`` the next command to type."""

    def __init__(self, code: str, message: str, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.details = details

    def as_dict(self) -> dict[str, Any]:
        """Return ``{"code", "message", "hint", "details"}``, the shape of every ``rbee_error``."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}


def progress(text: str) -> None:
    """Tell the operator (stderr; stdout is for the result)."""
    print(f"rbee: {text}", file=sys.stderr, flush=True)


def run(*argv: str | Path, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; raises LabError with its last words when ``check`` and it fails."""
    command = [str(a) for a in argv]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip())[-600:]
        raise LabError(
            "PLAYBOOK_FAILED",
            f"{' '.join(command[:6])} failed ({done.returncode}): {words}",
            "run the command again with 'down' first",
        )
    return done


def links() -> dict[str, dict[str, Any]]:
    """Return this machine's interfaces by name, as ``ip -json -details link`` describes them.

    Not from /sys/class/net: in a container that may show another namespace's.
    """
    return {link["ifname"]: link for link in json.loads(run("ip", "-json", "-details", "link").stdout or "[]")}


def hand_over(path: Path) -> None:
    """Give a file of the lab to the user who typed sudo: ssh and rbee-ctl need no root afterwards."""
    if (uid := os.environ.get("SUDO_UID")) and (gid := os.environ.get("SUDO_GID")):
        os.chown(path, int(uid), int(gid), follow_symlinks=False)


def mac(net: str, host: int) -> str:
    """Return the hardware address of a host: made from its network address, since neighbours remember the one it had before."""
    return "02:" + ":".join(f"{int(octet):02x}" for octet in net.split(".")) + f":00:{host:02x}"


@dataclass(frozen=True)
class Lab:
    """One lab: its network, its bridge and the directory of its state."""

    net: str  # first three octets: "10.77.0"
    directory: Path
    cache: Path
    bridge: str

    @classmethod
    def from_environment(cls, directory: Path | None = None) -> Lab:
        """Read RBEE_LAB_NET, RBEE_LAB_BRIDGE, RBEE_LAB_DIR and RBEE_CACHE; raises LabError for values that can not work."""
        net = os.environ.get("RBEE_LAB_NET") or "10.77.0"
        hint = "export RBEE_LAB_NET=10.77.1   # three octets of a private network"
        try:
            network = ipaddress.ip_network(f"{net}.0/24")
        except ValueError:
            raise LabError("CONFIG_INVALID", f"RBEE_LAB_NET is {net!r}, expected three octets like 10.77.0", hint) from None
        if not network.is_private or network.is_loopback or network.is_link_local:
            raise LabError("CONFIG_INVALID", f"RBEE_LAB_NET {net} is no private network", hint)
        bridge = os.environ.get("RBEE_LAB_BRIDGE") or ("rbee0" if net == "10.77.0" else f"rb{cls._id(net)}")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,15}", bridge):
            raise LabError("CONFIG_INVALID", f"RBEE_LAB_BRIDGE is {bridge!r}, expected at most 15 letters, digits, - and _", hint)
        directory = (directory or Path(os.environ.get("RBEE_LAB_DIR") or ".lab")).resolve()
        cache = Path(os.environ.get("RBEE_CACHE") or Path.home() / ".cache/rbee").resolve()
        return cls(net, directory, cache, bridge)

    @staticmethod
    def _id(net: str) -> str:
        return "".join(f"{int(octet):02x}" for octet in net.split("."))

    @cached_property
    def id(self) -> str:
        """The network in hexadecimal: six characters, unique on this machine as the network is."""
        return self._id(self.net)

    @property
    def prefix(self) -> str:
        """Start of the names of namespaces, cgroups, mount sources and machines."""
        return f"rbee-lab-{self.id}-"

    @property
    def link_prefix(self) -> str:
        """Start of the names of the veths on the controller's side."""
        return f"rv{self.id}-"

    @property
    def bridge_mac(self) -> str:
        """Hardware address of the controller on the lab's network."""
        return mac(self.net, 1)

    @property
    def run_directory(self) -> Path:
        """Where the control sockets of SSH lie (a path short enough for a socket) and the lab's lock."""
        return Path(f"/run/rbee-lab-{self.id}")

    @property
    def key(self) -> Path:
        """The private key that opens the lab's machines."""
        return self.directory / "id"

    @property
    def known_hosts(self) -> Path:
        """The host key of all machines of this lab."""
        return self.directory / "known_hosts"

    def node(self, name: str) -> Node:
        """Return the node of that name; raises LabError when it is no name of a lab machine."""
        match = re.fullmatch(r"lab([1-9][0-9]?)", name)
        if not match or int(match[1]) > MAX_NODES:
            raise LabError(
                "NODE_NOT_FOUND", f"{name!r} is no lab machine; they are lab1 ... lab{MAX_NODES}", "rbee-ctl lab status"
            )
        return Node(self, int(match[1]))


@dataclass(frozen=True)
class Node:
    """One machine of a lab."""

    lab: Lab
    number: int

    @property
    def name(self) -> str:
        return f"lab{self.number}"

    @property
    def unique(self) -> str:
        """Its name among all labs of this machine."""
        return self.lab.prefix + self.name

    @property
    def address(self) -> str:
        return f"{self.lab.net}.{FIRST_HOST + self.number}"

    @property
    def link(self) -> str:
        return f"{self.lab.link_prefix}{self.number}"

    @property
    def mac(self) -> str:
        return mac(self.lab.net, FIRST_HOST + self.number)

    @property
    def directory(self) -> Path:
        return self.lab.directory / "nodes" / self.name

    @property
    def root(self) -> Path:
        return self.directory / "root"
