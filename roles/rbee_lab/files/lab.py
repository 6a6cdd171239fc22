#!/usr/bin/env python3
"""Throw-away Debian machines with systemd as PID 1, sshd and an address of their own: systemd-nspawn on one bridge.

    lab.py --dir .lab up --nodes 2 [--memory-mib N] [--recreate]
    lab.py --dir .lab status | down | reboot NAME

A machine boots in half a second from an overlay over one cached root file system. Everything is named after the lab's
id (derived from its folder), so that what is left of a crash is found in the system itself, not in a state file, and
two labs never touch each other. The result is printed as one JSON object on stdout, progress on stderr.

Needs root, Linux with overlayfs, systemd-nspawn, iproute2, and mmdebstrap for the first build. Standard library only.
Exit codes: 0 done, 1 failed (reason and next command on stderr), 2 usage.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SUITE = "bookworm"  # systemd 252; newer releases refuse the hybrid cgroups that many hosts still have
PACKAGES = (
    "systemd,systemd-sysv,dbus,libnss-systemd,openssh-server,sudo,iproute2,ca-certificates,"
    "libgomp1,python3,python3-venv,python3-apt,python3-packaging"
)
MASKED = (
    "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer e2scrub_reap.service "
    "systemd-pstore.service console-getty.service getty.target systemd-update-utmp.service "
    "systemd-update-utmp-runlevel.service dev-hugepages.mount sys-fs-fuse-connections.mount"
)
SSHD = "UseDNS no\nPasswordAuthentication no\nMaxSessions 100\nMaxStartups 100:30:200\n"
JOURNALD = "[Journal]\nStorage=volatile\nRuntimeMaxUse=32M\n"
CGROUPS = Path("/sys/fs/cgroup")
FIRST_HOST = 11
BOOT_LIMIT_S = 60.0
INIT = Path(__file__).with_name("rbee-lab-init")


class LabError(Exception):
    """Something is missing or failed; the message says what and what to type next."""


def say(text: str) -> None:
    """Tell a person."""
    print(text, file=sys.stderr, flush=True)


def run(*command: str, check: bool = True, text_in: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program; with ``check`` a failure becomes a LabError with its last words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, input=text_in)
    if check and done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip() or done.returncode}")
    return done


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, waiting for another holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# --- root file system ---------------------------------------------------------------------------------------------


def host_mirror() -> list[str]:
    """Return the Debian mirror that this host's apt uses, as an argument for mmdebstrap; none: its own default."""
    form = "$(REPO_URI) $(CODENAME) $(LABEL)"
    done = run("apt-get", "indextargets", "--format", form, "Created-By: Packages", check=False)
    for line in done.stdout.splitlines():
        uri, codename, label = [*line.split(), "", "", ""][:3]
        if codename == SUITE and label == "Debian":
            return [uri]
    return []


def rootfs_key() -> str:
    """Digest of all that goes into the root file system."""
    inputs = (SUITE, PACKAGES, MASKED, SSHD, JOURNALD, INIT.read_text(), platform.machine())
    return hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]


def configure_rootfs(root: Path) -> None:
    """Make the tree fit for many machines: no identity of its own, no needless units."""
    (root / "etc/machine-id").write_text("")
    for name in ("var/lib/dbus/machine-id", "etc/hostname"):
        (root / name).unlink(missing_ok=True)
    # An unreachable name server would make fact gathering wait 11 s for the fully qualified name.
    for name, text in (
        ("etc/resolv.conf", ""),
        ("etc/ssh/sshd_config.d/10-lab.conf", SSHD),
        ("etc/systemd/journald.conf.d/lab.conf", JOURNALD),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
    for unit in MASKED.split():
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    init = root / "sbin/rbee-lab-init"
    shutil.copy(INIT, init)
    init.chmod(0o755)


def ensure_rootfs(cache: Path) -> Path:
    """Return the cached root file system, building it (about 90 s) when its inputs are new. Never changed afterwards:
    it is the lower layer of running machines."""
    root = cache / "rootfs" / rootfs_key()
    if root.is_dir():
        return root
    with locked(cache / "rootfs" / ".lock"):
        if root.is_dir():
            return root
        if not shutil.which("mmdebstrap"):
            raise LabError("mmdebstrap is not installed; next: apt-get install mmdebstrap")
        say(f"building the root file system of the lab machines (Debian {SUITE}): once, about 90 s")
        with tempfile.TemporaryDirectory(prefix=".build-", dir=root.parent) as scratch:
            tree = Path(scratch, "tree")
            log = Path(scratch, "log")
            command = ["mmdebstrap", "--mode=root", "--variant=minbase", '--aptopt=APT::Install-Recommends "false"']
            command += ["--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"]
            command += [f"--include={PACKAGES}", SUITE, str(tree), *host_mirror()]
            began = time.monotonic()
            with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL) as process:
                while True:
                    try:
                        code = process.wait(10)
                        break
                    except subprocess.TimeoutExpired:
                        say(f"  ... {time.monotonic() - began:.0f} s")
            if code != 0:
                raise LabError("mmdebstrap failed:\n" + "\n".join(log.read_text().splitlines()[-15:]))
            configure_rootfs(tree)
            tree.rename(root)
    return root


# --- the lab ------------------------------------------------------------------------------------------------------


class Lab:
    """One lab: its folder, its id, its subnet and its machines."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder.resolve(), cache
        self.id = hashlib.sha256(str(self.folder).encode()).hexdigest()[:4]
        self.bridge = os.environ.get("RBEE_LAB_BRIDGE", f"rbee-{self.id}")
        self.record = self.folder / "lab.json"
        self.nodes_dir = self.folder / "nodes"

    # Names of everything that belongs to this lab: all found again by prefix.
    def netns(self, node: str) -> str:
        """Network namespace of a machine."""
        return f"rb-{self.id}-{node}"

    def veth(self, index: int) -> str:
        """Host end of a machine's cable."""
        return f"rbv{self.id}-{index}"

    def cgroup_prefix(self, node: str = "") -> str:
        """Start of the names of a machine's control groups."""
        return f"rbee-lab-{self.id}-{node}"

    def load(self) -> dict[str, object]:
        """Return what `up` recorded, empty when there is none."""
        try:
            value = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def choose_net(self) -> str:
        """Return the subnet's first three numbers: as recorded, as RBEE_LAB_NET says, else the first free 10.77.N."""
        recorded = self.load().get("net")
        wanted = os.environ.get("RBEE_LAB_NET")
        taken = set()
        for link in json.loads(run("ip", "-j", "-4", "addr").stdout):
            if link.get("ifname") != self.bridge:
                taken |= {a["local"].rsplit(".", 1)[0] for a in link.get("addr_info", ())}
        if wanted or isinstance(recorded, str):
            net = wanted or str(recorded)
            if net in taken:
                raise LabError(f"subnet {net}.0/24 is in use by another interface; next: RBEE_LAB_NET=10.77.200 rbee-ctl lab up")
            return net
        for n in range(256):
            if f"10.77.{n}" not in taken:
                return f"10.77.{n}"
        raise LabError("no free 10.77.N.0/24; next: RBEE_LAB_NET=A.B.C rbee-ctl lab up")

    def key(self) -> Path:
        """Return the lab's own SSH key, made once."""
        path = self.folder / "id_ed25519"
        if not path.exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"rbee-lab-{self.id}", "-f", str(path))
        return path

    # --- one machine ------------------------------------------------------------------------------------------

    def cgroup_dirs(self, node: str) -> list[Path]:
        """New groups for one boot, one in each hierarchy (pure v2, v1 and hybrid hosts). A random end: a stale group of
        the same name makes nspawn fail. cpuset is left out, it takes no task before it is filled in."""
        name = f"{self.cgroup_prefix(node)}-{secrets.token_hex(3)}"
        found = []
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                base = CGROUPS / "unified" if (CGROUPS / "unified").is_dir() else CGROUPS
            elif (short := controllers.removeprefix("name=")) == "cpuset":
                continue
            else:
                base = CGROUPS / short
            if base.is_dir():
                found.append(base / path.strip("/") / name)
        return found

    def leftover_cgroups(self, node: str = "") -> list[Path]:
        """Groups of this lab (or of one machine) that exist now, wherever an earlier session made them."""
        prefix = self.cgroup_prefix(node) + ("-" if node else "")
        found = []
        for top, names, _ in os.walk(CGROUPS):
            hits = [n for n in names if n.startswith(prefix)]
            found += [Path(top, n) for n in hits]
            names[:] = [n for n in names if n not in hits and not n.startswith("rbee-lab-")]
        return found

    def healthy(self, node: str, address: str) -> bool:
        """Whether the machine runs and its sshd answers."""
        return bool(self.leftover_cgroups(node)) and ssh_answers(address)

    def boot(self, node: str, index: int, net: str, root: Path, hosts: str, memory_mib: int | None) -> float:
        """Boot one machine from scratch; return the seconds until its sshd answered."""
        began = time.monotonic()
        home = self.nodes_dir / node
        for part in ("upper/root/.ssh", "upper/etc", "work", "root"):
            (home / part).mkdir(parents=True, exist_ok=True)
        ssh_dir = home / "upper/root/.ssh"
        (home / "upper/root").chmod(0o700)
        ssh_dir.chmod(0o700)
        authorized = ssh_dir / "authorized_keys"
        authorized.write_text(self.key().with_suffix(".pub").read_text())
        authorized.chmod(0o600)
        (home / "upper/etc/hosts").write_text(hosts)
        (home / "upper/etc/hostname").write_text(f"{node}\n")
        (home / "upper/etc/machine-id").write_text(hashlib.md5(f"{self.id}/{node}".encode(), usedforsecurity=False).hexdigest() + "\n")
        layers = f"lowerdir={root},upperdir={home}/upper,workdir={home}/work,volatile"
        run("mount", "-t", "overlay", f"rbee-{self.id}-{node}", "-o", layers, str(home / "root"))
        ns, veth, mac = self.netns(node), self.veth(index), f"02:72:{self.id[:2]}:{self.id[2:]}:00:{index:02x}"
        run("ip", "netns", "add", ns)
        # The MAC follows from lab and index: a random one makes a recreated machine unreachable for 30 s (stale ARP).
        plug = f"link add {veth} type veth peer name eth0 address {mac} netns {ns}\nlink set {veth} master {self.bridge} up\n"
        run("ip", "-b", "-", text_in=plug)
        inside = f"link set lo up\naddr add {net}.{index}/24 dev eth0\nlink set eth0 up\nroute add default via {net}.1\n"
        run("ip", "-n", ns, "-b", "-", text_in=inside)
        groups = self.cgroup_dirs(node)
        for group in groups:
            group.mkdir()
            for limit in ("memory.limit_in_bytes", "memory.max"):
                if memory_mib and (group / limit).exists():
                    (group / limit).write_text(str(memory_mib << 20))
        process = self._spawn(node, home, ns, groups)
        while time.monotonic() - began < BOOT_LIMIT_S:
            if process.poll() is not None:
                tail = (home / "console.log").read_text(errors="replace")[-600:]
                raise LabError(f"{node}: nspawn ended with {process.returncode}: {tail}")
            if ssh_answers(f"{net}.{index}"):
                return time.monotonic() - began
            time.sleep(0.02)
        raise LabError(f"{node}: no sshd within {BOOT_LIMIT_S:.0f} s; next: less {home}/console.log")

    def _spawn(self, node: str, home: Path, ns: str, groups: list[Path]) -> subprocess.Popen[bytes]:
        def enter() -> None:
            os.setsid()
            for group in groups:
                (group / "cgroup.procs").write_text("0")  # 0: the writer itself

        # --keep-unit ends with 133 when the machine reboots; the loop boots it again, as systemd would for a unit.
        loop = 'while :; do "$@"; [ $? -eq 133 ] || exit; done'
        command = ["sh", "-c", loop, "rbee-lab", "systemd-nspawn", "-q", "--register=no", "--keep-unit"]
        command += [f"--directory={home}/root", f"--machine={self.id}-{node}", f"--hostname={node}"]
        command += [f"--network-namespace-path=/run/netns/{ns}", "--resolv-conf=off", "--timezone=off", "--link-journal=no"]
        command += ["--kill-signal=SIGRTMIN+3", "--console=pipe", "/sbin/rbee-lab-init"]
        with (home / "console.log").open("wb") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=enter)  # noqa: PLW1509

    def remove(self, node: str, index: int) -> None:
        """Take everything of one machine away; what is not there is fine."""
        groups = self.leftover_cgroups(node)
        end = time.monotonic() + 15
        while groups and time.monotonic() < end:
            for group in groups:
                kill_group(group)
            groups = [g for g in groups if not remove_group(g)]
            if groups:
                time.sleep(0.02)
        run("ip", "link", "del", self.veth(index), check=False)
        run("ip", "netns", "del", self.netns(node), check=False)
        home = self.nodes_dir / node
        for mount in sorted(mounts_below(home), key=len, reverse=True):
            if run("umount", mount, check=False).returncode != 0:
                run("umount", "-l", mount, check=False)
        if groups:
            raise LabError(f"{node}: processes do not end: {', '.join(map(str, groups))}")
        shutil.rmtree(home, ignore_errors=True)

    # --- verbs ------------------------------------------------------------------------------------------------

    def up(self, count: int, memory_mib: int | None, recreate: bool) -> dict[str, object]:
        """Boot what is not there; machines that run are left alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock"):
            before = self.load().get("nodes")
            net = self.choose_net()
            root = ensure_rootfs(self.cache)
            nodes = {f"lab{i + 1}": FIRST_HOST + i for i in range(count)}
            for gone in self._known() - set(nodes):
                self.remove(gone, FIRST_HOST - 1 + int(gone.removeprefix("lab")))
            record = {"id": self.id, "net": net, "bridge": self.bridge, "nodes": {n: f"{net}.{i}" for n, i in nodes.items()}}
            self.record.write_text(json.dumps(record, indent=2) + "\n")
            run("ip", "link", "add", self.bridge, "type", "bridge", check=False)
            run("ip", "addr", "replace", f"{net}.1/24", "dev", self.bridge)
            run("ip", "link", "set", self.bridge, "up")
            self.key()
            self._write_known_hosts(root, record["nodes"])  # type: ignore[arg-type]
            hosts = "127.0.0.1 localhost\n::1 localhost\n" + "".join(f"{net}.{i} {n}\n" for n, i in nodes.items())
            with futures.ThreadPoolExecutor() as pool:
                booted = list(pool.map(lambda n: self._ensure(n, nodes[n], net, root, hosts, memory_mib, recreate), nodes))
        return {**record, "booted": [n for n, fresh in zip(nodes, booted, strict=True) if fresh], "changed": before != record["nodes"]}

    def _ensure(
        self, node: str, index: int, net: str, root: Path, hosts: str, memory_mib: int | None, recreate: bool
    ) -> bool:
        if not recreate and self.healthy(node, f"{net}.{index}"):
            return False
        self.remove(node, index)
        seconds = self.boot(node, index, net, root, hosts, memory_mib)
        say(f"{node}: {net}.{index} answers after {seconds:.2f} s")
        return True

    def _write_known_hosts(self, root: Path, nodes: dict[str, str]) -> None:
        public = (root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
        lines = [f"{address} {' '.join(public)}\n" for address in nodes.values()]
        (self.folder / "known_hosts").write_text("".join(lines))

    def _known(self) -> set[str]:
        """Machines of this lab that left any trace."""
        names = set(self.load().get("nodes") or ())  # type: ignore[call-overload]
        if self.nodes_dir.is_dir():
            names |= {p.name for p in self.nodes_dir.iterdir()}
        prefix = self.netns("")
        names |= {p.name.removeprefix(prefix) for p in Path("/run/netns").glob(f"{prefix}*")}
        cut = self.cgroup_prefix()
        names |= {p.name.removeprefix(cut).rsplit("-", 1)[0] for p in self.leftover_cgroups()}
        return {str(n) for n in names if str(n).removeprefix("lab").isdigit()}

    def down(self) -> dict[str, object]:
        """Remove everything of this lab from the system; caches stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock"):
            nodes = sorted(self._known())
            with futures.ThreadPoolExecutor() as pool:
                list(pool.map(lambda n: self.remove(n, FIRST_HOST - 1 + int(n.removeprefix("lab"))), nodes))
            for link in json.loads(run("ip", "-j", "link").stdout):
                if link["ifname"].startswith(f"rbv{self.id}-"):
                    run("ip", "link", "del", link["ifname"], check=False)
            run("ip", "link", "del", self.bridge, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        return {"id": self.id, "removed": nodes}

    def status(self) -> dict[str, object]:
        """Say which machines run."""
        record = self.load()
        nodes = record.get("nodes") or {}
        states = {n: {"address": a, "running": self.healthy(n, a)} for n, a in nodes.items()}  # type: ignore[attr-defined]
        return {"id": self.id, "net": record.get("net"), "nodes": states}

    def reboot(self, node: str) -> dict[str, object]:
        """Reboot a machine over SSH and wait until it answers with a new boot id."""
        address = dict(self.load().get("nodes") or {}).get(node)  # type: ignore[call-overload]
        if address is None:
            raise LabError(f"no machine {node!r} in this lab; next: rbee-ctl lab status")
        ssh = ["ssh", "-i", str(self.key()), "-o", f"UserKnownHostsFile={self.folder}/known_hosts", "-o", "ConnectTimeout=2"]
        ask = [*ssh, f"root@{address}", "cat /proc/sys/kernel/random/boot_id; systemctl show -p UserspaceTimestampMonotonic"]
        before = run(*ask).stdout
        run(*ssh, f"root@{address}", "systemctl reboot", check=False)
        end = time.monotonic() + BOOT_LIMIT_S
        while time.monotonic() < end:
            done = run(*ask, check=False)
            if done.returncode == 0 and done.stdout != before:
                return {"id": self.id, "rebooted": node}
            time.sleep(0.1)
        raise LabError(f"{node} did not come back within {BOOT_LIMIT_S:.0f} s")


# --- helpers ------------------------------------------------------------------------------------------------------


def ssh_answers(address: str) -> bool:
    """Whether an SSH server greets at the address."""
    try:
        with socket.create_connection((address, 22), 0.3) as s:
            return s.recv(4).startswith(b"SSH")
    except OSError:
        return False


def kill_group(group: Path) -> None:
    """Kill everything in a control group and nothing else: by the kernel's own switch, on v1 by its member list."""
    switch = group / "cgroup.kill"
    if switch.exists():
        with contextlib.suppress(OSError):
            switch.write_text("1")
        return
    for procs in group.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            for pid in procs.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def remove_group(group: Path) -> bool:
    """Remove a control group with its children; False while a task is still being reaped."""
    for sub in sorted((p for p in group.rglob("*") if p.is_dir()), key=lambda p: -len(p.parts)):
        with contextlib.suppress(OSError):
            sub.rmdir()
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def mounts_below(path: Path) -> list[str]:
    """Return mount points at or below ``path``."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [p for p in points if p == str(path) or p.startswith(f"{path}/")]


def check_host() -> None:
    """Refuse clearly what can not work."""
    if platform.system() != "Linux":
        raise LabError(f"the lab needs Linux, this is {platform.system()}")
    if os.geteuid() != 0:
        raise LabError("the lab boots machines and needs root; next: sudo rbee-ctl lab up")
    for tool, package in (("systemd-nspawn", "systemd-container"), ("ip", "iproute2"), ("ssh-keygen", "openssh-client")):
        if not shutil.which(tool):
            raise LabError(f"{tool} is not installed; next: apt-get install {package}")


def main() -> int:
    """Parse, do, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(".lab"), help="folder of the lab (default: .lab)")
    default_cache = os.environ.get("RBEE_CACHE") or str(Path.home() / ".cache/rbee")
    parser.add_argument("--cache", type=Path, default=Path(default_cache), help="where the root file system is kept")
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up")
    up.add_argument("--nodes", type=int, default=2, choices=range(1, 65), metavar="1..64")
    up.add_argument("--memory-mib", type=int, default=None)
    up.add_argument("--recreate", action="store_true")
    verbs.add_parser("down")
    verbs.add_parser("status")
    verbs.add_parser("reboot").add_argument("node")
    options = parser.parse_args()
    lab = Lab(options.dir, options.cache.expanduser())
    try:
        check_host()
        if options.verb == "up":
            result = lab.up(options.nodes, options.memory_mib, options.recreate)
        elif options.verb == "reboot":
            result = lab.reboot(options.node)
        else:
            result = lab.down() if options.verb == "down" else lab.status()
    except LabError as e:
        say(f"rbee lab: {e}")
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    sys.exit(main())
