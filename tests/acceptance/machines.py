"""A lab of its own for the tests: booted systemd machines, reached over SSH, on a network that nobody else uses."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from tests import leftover_labs

ROOT = Path(__file__).resolve().parents[2]
LAB_PY = ROOT / "roles/rbee_lab/files/lab.py"
Done = subprocess.CompletedProcess[str]


def unavailable() -> str | None:
    """Return why no lab can start on this machine, None when it can."""
    if os.geteuid() != 0:
        return "the lab needs root"
    missing = [p for p in ("systemd-nspawn", "ip", "ssh", "mmdebstrap") if not shutil.which(p)]
    return f"the lab needs {', '.join(missing)}: make setup" if missing else None


def free_network() -> str:
    """Return the first three octets of a 10.77.x network that no interface of this machine is in, for this process alone."""
    listing = subprocess.run(["ip", "-json", "-4", "address"], check=True, capture_output=True, text=True).stdout
    used = [
        ipaddress.ip_network(f"{a['local']}/{a['prefixlen']}", strict=False)
        for link in json.loads(listing)
        for a in link.get("addr_info", [])
    ]
    start = os.getpid() % 200  # two test runs on one machine begin at different places
    for step in range(200):
        net = f"10.77.{20 + (start + step) % 200}"
        if not any(ipaddress.ip_network(f"{net}.0/24").overlaps(u) for u in used) and claimed(net):
            return net
    raise RuntimeError("no free network in 10.77.20.0 ... 10.77.219.0")


def claimed(net: str) -> bool:
    """Keep other test runs off a network for as long as this process lives: a lab's interfaces come after its choice."""
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        holder.bind(f"\0rbee-test-network-{net}")  # a name that one socket has at a time, and no file
    except OSError:
        holder.close()
        return False
    holder.detach()
    return True


class Lab:
    """Machines lab1 ... labN on ``net``; nothing is booted before ``up``."""

    def __init__(self, directory: Path, net: str | None = None) -> None:
        self.directory = directory
        self.net = net or free_network()
        self._noted = leftover_labs.note(directory, self.net)

    # --- the lab itself -------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """The environment that makes lab.py, the playbooks and rbee-ctl use this lab and none else."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("RBEE_LAB", "ANSIBLE_"))}
        return environ | {
            "PATH": f"{Path(sys.executable).parent}:{environ.get('PATH', '')}",
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "RBEE_LAB_DIR": str(self.directory),
            "RBEE_LAB_NET": self.net,
            "RBEE_CONFIG": str(self.directory / "config.toml"),
        }

    def run(self, *verb: str, check: bool = True, timeout: float = 300) -> dict[str, Any]:
        """Run lab.py; returns its result, or ``{"rbee_error": ...}`` when ``check`` is off and it failed."""
        done = self.command([sys.executable, str(LAB_PY), *verb], timeout=timeout)
        if check and done.returncode != 0:
            raise AssertionError(f"lab.py {' '.join(verb)} ended with {done.returncode}: {done.stderr}")
        if verb == ("down",) and done.returncode == 0 and self._noted is not None:
            self._noted.unlink(missing_ok=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def up(self, nodes: int) -> dict[str, Any]:
        """Boot lab1 ... labN with the role, which writes inventory and settings too."""
        done = self.playbook("lab_up", "-e", json.dumps({"rbee_lab_nodes": nodes}))
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return self.run("status")

    def down(self) -> dict[str, Any]:
        """Remove everything."""
        return self.run("down")

    def machines(self, count: int) -> None:
        """Make lab1 ... lab<count> run without touching the inventory: the further ones are virgin machines."""
        self.run("up", "--nodes", str(count))

    # --- one machine ----------------------------------------------------------------------------------------------

    def address(self, node: str) -> str:
        """Return its address."""
        return f"{self.net}.{10 + int(node.removeprefix('lab'))}"

    @property
    def controller(self) -> str:
        """Address under which the machines see this one."""
        return f"{self.net}.1"

    def ssh(self, node: str, command: str, *, check: bool = True, timeout: float = 120, stdin: IO[bytes] | None = None) -> Done:
        """Run a shell command as root on the machine; the exit code 255 is ssh's own."""
        options = [f"UserKnownHostsFile={self.directory}/known_hosts", "StrictHostKeyChecking=yes", "BatchMode=yes"]
        options += ["ConnectTimeout=30", "LogLevel=ERROR", "IdentitiesOnly=yes"]
        argv = ["ssh", "-i", str(self.directory / "id"), *(a for o in options for a in ("-o", o))]
        done = self.command([*argv, f"root@{self.address(node)}", "--", command], timeout=timeout, stdin=stdin)
        if check:
            assert done.returncode == 0, f"{node}: {command!r} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def send(self, node: str, path: Path, target: str) -> None:
        """Copy the contents of a folder into a folder of the machine."""
        with subprocess.Popen(["tar", "-C", str(path), "-c", "."], stdout=subprocess.PIPE) as tar:
            self.ssh(node, f"mkdir -p {target} && tar -C {target} -x --no-same-owner", stdin=tar.stdout)

    def partition(self, node: str) -> None:
        """Cut it off the network; nothing is refused, packets vanish."""
        self.run("partition", node)

    def heal(self, node: str) -> None:
        """Connect it again."""
        self.run("heal", node)

    def outside(self, node: str) -> str:
        """Give it an address of no private network as well (RFC 5737), on its loopback interface until it boots; returns that."""
        (namespace,) = [n["namespace"] for n in self.run("status")["nodes"] if n["name"] == node]
        address = "203.0.113.7"
        subprocess.run(["ip", "-n", namespace, "address", "replace", f"{address}/32", "dev", "lo"], check=True)
        return address

    def reboot(self, node: str) -> None:
        """Reboot it and wait for its sshd."""
        self.run("reboot", node)

    def journal(self, node: str, unit: str = "rbee-*", lines: int = 30) -> str:
        """Return what its units said last, for failing tests, long lines cut; never raises."""
        try:
            show = (
                f"systemctl list-units --all --no-legend '{unit}'; "
                f"journalctl --no-pager -o short-precise -n {lines} -u '{unit}' | cut -c 1-240"
            )
            return self.ssh(node, show, check=False, timeout=15).stdout
        except (AssertionError, OSError) as e:
            return f"no journal from {node}: {e}"

    # --- programs against it --------------------------------------------------------------------------------------

    @property
    def inventory(self) -> Path:
        """The inventory that the role wrote."""
        return self.directory / "inventory.yml"

    def inventory_of(self, path: Path, names: Iterable[str], **host_variables: Any) -> Path:
        """Write an inventory of these machines alone: the lab's own with other hosts; the first one gets the queen."""
        data = yaml.safe_load(self.inventory.read_text())
        groups = data["all"]["children"]
        worker = next(iter(groups["rbee_hives"]["hosts"].values()))["rbee_workers"]
        names = list(names)
        groups["rbee_hives"]["hosts"] = {
            n: {"ansible_host": self.address(n), "rbee_workers": worker, **host_variables} for n in names
        }
        groups["rbee_queen"]["hosts"] = {names[0]: None}
        path.write_text(yaml.safe_dump(data))
        return path

    def command(
        self, argv: list[str], *, timeout: float = 300, env: dict[str, str] | None = None, stdin: IO[bytes] | None = None
    ) -> Done:
        """Run any program in this lab's environment; one that does not end is told to, and the test fails with what it said."""
        environ, given = self.environment | (env or {}), subprocess.DEVNULL if stdin is None else stdin
        pipes: dict[str, Any] = {"stdin": given, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(argv, **pipes, env=environ, cwd=ROOT, start_new_session=True) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                out, err = interrupted(process)
                raise AssertionError(f"{argv} did not end within {timeout} s\n{out[-3000:]}\n{err[-3000:]}") from None
            except BaseException:
                interrupted(process)
                raise
        return Done(argv, process.returncode, out, err)

    def playbook(self, name: str, *arguments: str, inventory: Path | None = None, timeout: float = 900) -> Done:
        """Run ``playbooks/<name>.yml`` (``site``: site.yml) with ansible-playbook, as somebody without rbee-ctl would."""
        path = ROOT / "site.yml" if name == "site" else ROOT / "playbooks" / f"{name}.yml"
        where = ["-i", str(inventory)] if inventory else (["-i", str(self.inventory)] if self.inventory.is_file() else [])
        return self.command(["ansible-playbook", *where, str(path), *arguments], timeout=timeout)

    def ctl(self, *arguments: str, timeout: float = 300, env: dict[str, str] | None = None) -> Done:
        """Run rbee-ctl with this lab's settings."""
        return self.command(["rbee-ctl", *arguments], timeout=timeout, env=env)


def interrupted(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a program as Ctrl+C does, so that it leaves no lock on a machine, and then what is left of it; returns its output."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=5)
    return "", "something of it, in a session of its own, goes on"


@dataclass(frozen=True)
class Fleet:
    """A lab on which site.yml has run: queen on lab1, one CPU worker on each machine."""

    lab: Lab
    queen_url: str
    api_key: str

    @property
    def headers(self) -> dict[str, str]:
        """The header that the queen wants from a client."""
        return {"Authorization": f"Bearer {self.api_key}"}
