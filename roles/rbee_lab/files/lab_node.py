"""Boot and remove one lab machine: an overlay over the shared tree, a network namespace, systemd-nspawn.

No state file is needed to remove a machine: everything it consists of is found by name in the system (see
``belongings``), so a run that was killed half-way is repaired by the next ``up`` or ``down``.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from lab_common import Lab, LabError, Node, links, run
from lab_rootfs import hosts_file

CGROUP = Path("/sys/fs/cgroup")
BOOT_LIMIT_S = 60.0
#: Longest wait for the first words of an sshd that has taken a connection.
GREETING_LIMIT_S = 30.0

# The shell enters the machine's own cgroups (in each hierarchy), then boots; nspawn ends with 133 when the machine
# wants to reboot, and is then started again. The shell, not a preexec_fn: machines are booted from several threads.
LAUNCHER = """
n=$1; shift
while [ "$n" -gt 0 ]; do echo $$ >"$1/cgroup.procs" || exit 70; shift; n=$((n-1)); done
while :; do "$@"; s=$?; [ "$s" -eq 133 ] || exit "$s"; done
"""


def host_runs_systemd() -> bool:
    """Whether PID 1 of the controller is systemd: then systemd makes the machine's cgroup, on pure version 2 too."""
    return Path("/run/systemd/system").is_dir()


# --- what there is ---------------------------------------------------------------------------------------------------


def mounts(prefix: str) -> list[tuple[str, str]]:
    """Return (source, mount point) of the mounts whose source or mount point's last part begins with ``prefix``, newest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point, source = _unescape(left.split()[4]), _unescape(right.split()[1])
        if source.startswith(prefix) or Path(point).name.startswith(prefix):
            found.append((source, point))
    return found[::-1]


def _unescape(text: str) -> str:
    return re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), text)


def cgroups(prefix: str) -> list[Path]:
    """Return the cgroups, in all hierarchies, whose name begins with ``prefix``."""
    found = []
    for base, children, _ in os.walk(CGROUP):
        mine = [c for c in children if c.startswith(prefix)]
        found += [Path(base, c) for c in mine]
        children[:] = [c for c in children if c not in mine]
    return found


def processes(prefix: str) -> list[int]:
    """Return the ids of the nspawn processes and their launchers of machines whose name begins with ``prefix``."""
    found, mark = [], f"--machine={prefix}".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_bytes().split(b"\0")
            if any(a.startswith(mark) for a in arguments):
                found.append(int(path.parent.name))
    return sorted(found)


def belongings(lab: Lab) -> dict[str, list[str]]:
    """Return everything of this lab's machines that the kernel knows: ``{"mounts": [...], "links": ...}``."""
    return {
        "processes": [str(pid) for pid in processes(lab.prefix)],
        "mounts": [f"{source} on {point}" for source, point in mounts(lab.prefix)],
        "namespaces": sorted(p.name for p in Path("/run/netns").glob(f"{lab.prefix}*")),
        "links": sorted(name for name in links() if name.startswith(lab.link_prefix)),
        "cgroups": [str(p) for p in cgroups(lab.prefix)],
    }


def known_nodes(lab: Lab) -> list[Node]:
    """Return the machines of which anything exists, running or not, in order."""
    names = set()
    texts = [*(t for kind in belongings(lab).values() for t in kind), *(p.name for p in (lab.directory / "nodes").glob("*"))]
    for pid in processes(lab.prefix):
        with contextlib.suppress(OSError):
            texts.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"))
    for text in texts:
        if match := re.search(rf"(?:{lab.prefix}lab|{lab.link_prefix}|^lab)(\d+)(?:\D|$)", text):
            names.add(f"lab{match[1]}")
    return sorted((lab.node(n) for n in names), key=lambda node: node.number)


def supervisor(node: Node) -> int | None:
    """Return the process id of the machine's systemd-nspawn, None when it does not run."""
    mark = f"--machine={node.unique}"
    for pid in processes(node.unique):
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if Path(arguments[0]).name == "systemd-nspawn" and mark in arguments:
                return pid
    return None


def sshd_answers(node: Node, timeout_s: float) -> bool:
    """Whether the machine's sshd can be connected to within that time, and greets.

    A connection is made by the kernels, at once or never; the greeting comes from a process, which takes its time on a busy
    controller.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((node.address, 22), min(0.3, timeout_s)) as connection:
                connection.settimeout(GREETING_LIMIT_S)
                if connection.recv(4).startswith(b"SSH"):
                    return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.02)


def state(node: Node, timeout_s: float = 0.5) -> str:
    """Return ``running``, ``unreachable`` (boots, hangs or is cut off), ``broken`` (parts are left) or ``absent``."""
    if supervisor(node) is not None and any(point == str(node.root) for _, point in mounts(node.unique)):
        return "running" if sshd_answers(node, timeout_s) else "unreachable"
    return "broken" if node in known_nodes(node.lab) else "absent"


# --- up --------------------------------------------------------------------------------------------------------------


def boot(node: Node, tree: Path, memory_mib: int | None) -> float:
    """Make the machine and wait until its sshd greets; returns the seconds it took.

    Raises LabError and leaves the parts for ``remove``.
    """
    began = time.monotonic()
    for part in ("upper", "work", "root"):
        (node.directory / part).mkdir(parents=True, exist_ok=True)
    _mount(node, tree)
    _furnish(node)
    _wire(node)
    child = _launch(node, memory_mib)
    while not sshd_answers(node, 0.1):
        ended = child is not None and child.poll() is not None
        if ended or time.monotonic() - began > BOOT_LIMIT_S:
            console = (node.directory / "console.log").read_text(errors="replace").strip()[-500:]
            what = "systemd-nspawn ended" if ended else f"no sshd within {BOOT_LIMIT_S:.0f} s"
            raise LabError(
                "UNIT_START_FAILED",
                f"{node.name} did not boot: {what}; console: {console or 'empty'}",
                "rbee-ctl lab down; rbee-ctl lab up",
                node=node.name,
            )
    return time.monotonic() - began


def _mount(node: Node, tree: Path) -> None:
    d = node.directory
    # volatile: no fsync reaches the disk. The layer can not be mounted a second time; a throw-away machine never needs it.
    options = f"lowerdir={tree},upperdir={d}/upper,workdir={d}/work,volatile"
    done = run("mount", "-t", "overlay", node.unique, "-o", options, node.root, check=False)
    if done.returncode != 0:
        raise LabError(
            "PLAYBOOK_FAILED",
            f"overlay mount on {node.root} failed: {done.stderr.strip()}",
            "put the lab on a file system that can carry an overlay (ext4, xfs, tmpfs): export RBEE_LAB_DIR=/var/tmp/lab",
            directory=str(d),
        )


def _furnish(node: Node) -> None:
    """Write what differs between machines and labs into the machine's own layer."""
    lab, etc = node.lab, node.root / "etc"
    (etc / "hostname").write_text(f"{node.name}\n")
    (etc / "hosts").write_text(hosts_file(lab.net))
    keys = node.root / "root/.ssh/authorized_keys"
    keys.write_text(lab.key.with_suffix(".pub").read_text())
    keys.chmod(0o600)
    for suffix, mode in (("", 0o600), (".pub", 0o644)):
        target = etc / f"ssh/ssh_host_ed25519_key{suffix}"
        shutil.copyfile(lab.directory / f"host_key{suffix}", target)
        target.chmod(mode)


def _wire(node: Node) -> None:
    lab = node.lab
    run("ip", "netns", "add", node.unique)
    outside = (
        f"link add {node.link} type veth peer name eth0 address {node.mac} netns {node.unique}\n"
        f"link set {node.link} master {lab.bridge} up\n"
    )
    run("ip", "-b", "-", stdin=outside)
    inside = f"link set lo up\naddr add {node.address}/24 dev eth0\nlink set eth0 up\nroute add default via {lab.net}.1\n"
    run("ip", "-n", node.unique, "-b", "-", stdin=inside)


def _launch(node: Node, memory_mib: int | None) -> subprocess.Popen[bytes] | None:
    """Start systemd-nspawn; returns its launcher, or None when the controller's systemd supervises it."""
    nspawn = [
        "systemd-nspawn",
        "--quiet",
        "--register=no",
        "--keep-unit",
        f"--directory={node.root}",
        f"--machine={node.unique}",
        f"--hostname={node.name}",
        f"--network-namespace-path=/run/netns/{node.unique}",
        "--resolv-conf=off",
        "--timezone=off",
        "--link-journal=no",
        "--kill-signal=SIGRTMIN+3",
        "--console=pipe",
        "--system-call-filter=bpf",  # for IPAddressDeny= and the like: systemd has the kernel run its programs
        "/sbin/rbee-lab-init",
    ]
    console = node.directory / "console.log"
    if host_runs_systemd():
        limits = [f"--property=MemoryMax={memory_mib}M"] if memory_mib else []
        properties = ["Delegate=yes", "KillMode=mixed", "TasksMax=16384", "RestartForceExitStatus=133", "SuccessExitStatus=133"]
        properties += [f"StandardOutput=append:{console}", f"StandardError=append:{console}"]
        run(
            "systemd-run",
            "--quiet",
            "--collect",
            f"--unit={node.unique}.service",
            *(f"--property={p}" for p in properties),
            *limits,
            shutil.which("systemd-nspawn") or "systemd-nspawn",
            *nspawn[1:],
        )
        return None
    groups = [path for _, path in _own_cgroups(f"{node.unique}-{secrets.token_hex(3)}")]  # a fresh name each boot (LAB 1.4)
    for group in groups:
        group.mkdir()
        if memory_mib:
            for limit in ("memory.limit_in_bytes", "memory.max"):
                if (group / limit).exists():
                    (group / limit).write_text(str(memory_mib << 20))
    command = ["sh", "-c", LAUNCHER, "rbee-lab", str(len(groups)), *map(str, groups), *nspawn]
    with console.open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/")


def _own_cgroups(name: str) -> Iterator[tuple[str, Path]]:
    """Yield (controllers, child of our own cgroup called ``name``) for every hierarchy.

    cpuset is left out: it takes no task before its cpus and mems are set.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = CGROUP / "unified" if (CGROUP / "unified").is_dir() else CGROUP
        else:
            base = CGROUP / controllers.removeprefix("name=")
        if controllers != "cpuset" and base.is_dir():
            yield controllers, base / path.strip("/") / name


# --- down ------------------------------------------------------------------------------------------------------------


def remove(node: Node, limit_s: float = 20.0) -> float:
    """Remove every part of the machine, whatever state it is in; returns seconds. Raises LabError naming what would not go."""
    began = time.monotonic()
    _kill(node, began + limit_s)
    if host_runs_systemd():
        run("systemctl", "stop", f"{node.unique}.service", check=False)
        run("systemctl", "reset-failed", f"{node.unique}.service", check=False)
    run("ip", "link", "del", node.link, check=False)  # there or not: belongings() below has the last word
    roots = [point for source, point in mounts(node.unique) if source == node.unique]
    for point in roots:
        with contextlib.suppress(OSError):  # a killed nspawn leaves its lock on the tree
            status = Path(point).stat()
            Path(f"/run/systemd/nspawn/locks/inode-{status.st_dev}:{status.st_ino}").unlink(missing_ok=True)
        if run("umount", point, check=False).returncode != 0:
            run("umount", "-l", point, check=False)
    if Path("/run/netns", node.unique).exists():
        run("ip", "netns", "del", node.unique, check=False)
    for path in Path("/run/systemd/nspawn").glob(f"*/{node.unique}"):
        shutil.rmtree(path, ignore_errors=True)
    left = [text for kind in belongings(node.lab).values() for text in kind if re.search(rf"{re.escape(node.unique)}\b", text)]
    if left or any(str(p) == str(node.root) for _, p in mounts(node.unique)):
        raise LabError("PLAYBOOK_FAILED", f"{node.name} could not be removed: {'; '.join(left)}", "rbee-ctl lab down", left=left)
    # Only after the mounts are gone: a tree that is still mounted is somebody's machine. The mount points that were
    # found may belong to a lab directory that is not ours any more; they are removed with it.
    for directory in {node.directory, *(Path(p).parent for p in roots if p.endswith(f"/nodes/{node.name}/root"))}:
        shutil.rmtree(directory, ignore_errors=True)
    return time.monotonic() - began


def _kill(node: Node, end: float) -> None:
    """Kill everything in the machine's cgroups, and nothing else, then remove the cgroups."""
    pattern = re.compile(rf"{re.escape(node.unique)}(-[0-9a-f]+|\.service)")
    while True:
        groups = [g for g in cgroups(node.unique) if pattern.fullmatch(g.name)]
        # A launcher killed before it entered its cgroup, or a system without cgroup.kill, is met by process id.
        strays = [p for p in processes(node.unique) if f"--machine={node.unique}\0" in cmdline(p)]
        if not groups and not strays:
            return
        for group in groups:
            with contextlib.suppress(OSError):
                (group / "cgroup.kill").write_text("1")
        if not any((g / "cgroup.kill").exists() for g in groups):
            strays += [int(p) for g in groups for f in g.rglob("cgroup.procs") for p in f.read_text().split()]
        for pid in strays:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for group in groups:
            if not group.name.endswith(".service"):  # systemd removes its own
                _rmdir(group)
        if all(g.name.endswith(".service") for g in groups) and not strays:
            return
        if time.monotonic() > end:
            raise LabError(
                "PLAYBOOK_FAILED", f"{node.name}: processes or cgroups would not go: {strays} {groups}", "rbee-ctl lab down"
            )
        time.sleep(0.02)  # rmdir says busy until the last task is reaped


def cmdline(pid: int) -> str:
    """Return a process's command line; empty for one that is gone, or dead and not reaped."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _rmdir(group: Path) -> None:
    for base, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            Path(base).rmdir()


# --- in between ------------------------------------------------------------------------------------------------------


def reboot(node: Node) -> float:
    """Reboot the machine from inside its own systemd; returns the seconds until sshd greets again. Its files stay."""
    began = time.monotonic()
    old = supervisor(node)
    if old is None:
        raise LabError("NODE_NOT_FOUND", f"{node.name} is not running", "rbee-ctl lab up", node=node.name)
    leader = Path(f"/proc/{old}/task/{old}/children").read_text().split()
    if not leader:
        raise LabError(
            "UNIT_START_FAILED", f"{node.name} has no running system", "rbee-ctl lab down; rbee-ctl lab up", node=node.name
        )
    os.kill(int(leader[-1]), signal.SIGRTMIN + 5)  # systemd(1): start reboot.target
    while time.monotonic() - began < BOOT_LIMIT_S:
        if supervisor(node) not in (None, old) and sshd_answers(node, 0.1):
            return time.monotonic() - began
        time.sleep(0.02)
    raise LabError(
        "UNIT_START_FAILED", f"{node.name} did not come back within {BOOT_LIMIT_S:.0f} s", "rbee-ctl lab status", node=node.name
    )
