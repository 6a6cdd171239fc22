"""The root file system of lab machines: Debian or Ubuntu of the controller's own release, made once, kept in the cache.

The same release as the controller's, so that its wheels fit the machines' Python, and from the mirror that the
controller's own apt sources name. ``<cache>/rootfs/<key>.tar.gz`` is keyed by the recipe below; beside it the unpacked
tree ``<key>/``, which all labs use read-only as the lower layer of their machines. Nobody may ever write to that tree.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from lab_common import FIRST_HOST, MAX_NODES, LabError, progress, run

PACKAGES = [
    "systemd",
    "systemd-sysv",
    "dbus",
    "openssh-server",
    "sudo",
    "iproute2",
    "nftables",  # tests that refuse traffic
    "procps",
    "ca-certificates",
    "libnss-systemd",  # names for DynamicUser
    "libgomp1",  # llama.cpp
    "python3",
    "python3-venv",  # runtimes
    "python3-apt",  # ansible.builtin.apt
    "python3-packaging",  # ansible.builtin.pip
]

#: Units without use in a throw-away machine; masked, the machine is up in a quarter of a second.
MASKED = [
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "e2scrub_reap.service",
    "systemd-pstore.service",
    "console-getty.service",
    "getty.target",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    "dev-hugepages.mount",
    "sys-fs-fuse-connections.mount",
    "motd-news.timer",
]

#: Flags of mmdebstrap that decide what is in the tree.
FLAGS = [
    "--variant=minbase",
    '--aptopt=APT::Install-Recommends "false"',
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
]

#: nspawn mounts version-1 controllers read-only: MemoryMax=, CPUQuota=, TasksMax= would be ignored without a word.
INIT = """\
#!/bin/sh
# PID 1 of a lab machine: make the version-1 controllers writable that nspawn mounted read-only, then become systemd.
for c in memory pids cpu cpuacct cpu,cpuacct blkio devices freezer; do
  [ -d "/sys/fs/cgroup/$c" ] && mount -o remount,bind,rw "/sys/fs/cgroup/$c" 2>/dev/null
done
exec /lib/systemd/systemd "$@"
"""

SSHD = "UseDNS no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxSessions 100\nMaxStartups 100:30:200\n"


def recipe(suite: str, architecture: str) -> dict[str, Any]:
    """Return all that decides what is in the tree: ``{"packages", "masked", "files": {path: [mode, text]}, ...}``."""
    return {
        "suite": suite,
        "architecture": architecture,
        "flags": FLAGS,
        "packages": PACKAGES,
        "masked": MASKED,
        "files": {
            "sbin/rbee-lab-init": [0o755, INIT],
            "etc/ssh/sshd_config.d/10-lab.conf": [0o644, SSHD],
            "etc/systemd/journald.conf.d/lab.conf": [0o644, "[Journal]\nStorage=volatile\nRuntimeMaxUse=32M\n"],
            # An unreachable name server costs Ansible 11 s a host; there is none, so all names stand here.
            "etc/resolv.conf": [0o644, ""],
            "etc/machine-id": [0o644, ""],
            "etc/apt/sources.list": [0o644, "# a lab machine has no internet\n"],
        },
        "removed": [
            "var/lib/dbus/machine-id",
            "etc/hostname",
            "etc/apt/sources.list.d/*",
            "etc/apt/apt.conf.d/99mmdebstrap",
            "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
            "etc/ssh/ssh_host_*",
        ],
        # .updated newer than /usr: nothing is to be brought up to date at each first boot
        "commands": ["install -d -m 700 root/.ssh", "touch etc/.updated var/.updated"],
    }


def hosts_file(net: str) -> str:
    """Return /etc/hosts with every machine the lab can have."""
    own = "".join(f"{net}.{FIRST_HOST + n} lab{n}\n" for n in range(1, MAX_NODES + 1))
    return f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{own}"


def release(os_release: Path = Path("/etc/os-release")) -> str:
    """Return the code name of the controller's release; raises LabError when it is neither Debian nor Ubuntu."""
    fields = dict(line.split("=", 1) for line in os_release.read_text().splitlines() if "=" in line)
    names = {fields.get("ID", "").strip('"'), *fields.get("ID_LIKE", "").strip('"').split()}
    suite = (fields.get("UBUNTU_CODENAME") or fields.get("VERSION_CODENAME") or "").strip('"')
    if not suite or not names & {"debian", "ubuntu"}:
        raise LabError(
            "MISSING_DEPENDENCY",
            f"the lab is made of Debian or Ubuntu packages; this controller is {fields.get('PRETTY_NAME', 'unknown')}",
            "use machines of your own: cp inventory/example.yml inventory/mine.yml",
        )
    return suite


def apt_sources(suite: str, apt: Path = Path("/etc/apt")) -> list[str]:
    """Return the controller's own sources of that release (updates, security) as one-line entries of ``main`` and ``universe``.

    Both forms are read: ``*.list`` (one line an entry) and ``*.sources`` (deb822). Raises LabError when there is none.
    """
    wanted = {suite, f"{suite}-updates", f"{suite}-security", f"{suite}/updates"}
    entries: list[str] = []
    for path in sorted([apt / "sources.list", *apt.glob("sources.list.d/*.list")]):
        if path.is_file():
            entries += _one_line(path.read_text(errors="replace"), wanted)
    for path in sorted(apt.glob("sources.list.d/*.sources")):
        entries += _deb822(path.read_text(errors="replace"), wanted)
    if not any(f" {suite} " in entry for entry in entries):
        raise LabError(
            "CONFIG_INVALID",
            f"no apt source for {suite} in {apt}/sources.list or {apt}/sources.list.d: the lab takes its packages from there",
            f"add one, for example: deb MIRROR/debian {suite} main",
        )
    return list(dict.fromkeys(entries))


def _entry(uri: str, suite: str, components: list[str], signed_by: str, wanted: set[str]) -> list[str]:
    components = [c for c in components if c in ("main", "universe")]
    if suite not in wanted or not components or not re.match(r"(https?|file|copy|mirror\+\w+|mirror):", uri):
        return []
    option = f"[signed-by={signed_by}] " if signed_by.startswith("/") else ""
    return [f"deb {option}{uri} {suite} {' '.join(components)}"]


def _one_line(text: str, wanted: set[str]) -> list[str]:
    entries = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line)
        if match:
            options = dict(o.split("=", 1) for o in (match[1] or "").split() if "=" in o)
            entries += _entry(match[2], match[3], match[4].split(), options.get("signed-by", ""), wanted)
    return entries


def _deb822(text: str, wanted: set[str]) -> list[str]:
    entries = []
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                fields[key] = f"{fields.get(key, '')} {line.strip()}"
            elif ":" in line:
                key, value = line.split(":", 1)
                key = key.strip().lower()
                fields[key] = value.strip()
        if fields.get("enabled", "yes").lower() in ("no", "false") or "deb" not in fields.get("types", "").split():
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                entries += _entry(uri, suite, fields.get("components", "").split(), fields.get("signed-by", ""), wanted)
    return entries


def _apt_options() -> list[str]:
    """Return the controller's own proxy and certificate settings for apt; a closed site reaches its mirror only with them."""
    dump = run("apt-config", "dump", check=False).stdout
    pattern = re.compile(
        r'^(Acquire::(?:(?:http|https)::(?:Proxy|CaInfo|Verify-Peer|Proxy-Auto-Detect)\b\S*|Check-Valid-Until|Check-Date) ".+";)$'
    )
    return [f"--aptopt={m[1]}" for line in dump.splitlines() if (m := pattern.match(line))]


def ensure(cache: Path) -> Path:
    """Return the unpacked tree, making or unpacking it first when it is not in the cache.

    Blocks while another process makes the same tree. Raises LabError; a broken build leaves nothing in the cache.
    """
    suite = release()
    parts = recipe(suite, platform.machine())
    key = f"{suite}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]}"
    store = cache / "rootfs"
    store.mkdir(parents=True, exist_ok=True)
    tree, tarball = store / key, store / f"{key}.tar.gz"
    if tree.is_dir():
        return tree
    with (store / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if tree.is_dir():
            return tree
        for old in store.glob(f".make-{key}-*"):  # of a build that was killed; its owner would hold the lock
            _discard(old)
        scratch = Path(tempfile.mkdtemp(prefix=f".make-{key}-", dir=store))
        try:
            if not tarball.is_file():
                _build(parts, scratch, tarball)
            unpacked = scratch / "tree"
            unpacked.mkdir()
            run("tar", "-xzpf", tarball, "--numeric-owner", "--xattrs", "-C", unpacked)
            unpacked.chmod(0o755)
            unpacked.rename(tree)
        finally:
            _discard(scratch)
    return tree


def _discard(scratch: Path) -> None:
    """Remove a folder of a build; a mount that a killed one left in it is undone first, never followed."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed([p for p in points if p.startswith(f"{scratch}/")]):
        run("umount", "-l", point)
    shutil.rmtree(scratch, ignore_errors=True)


def _build(parts: dict[str, Any], scratch: Path, tarball: Path) -> None:
    if not shutil.which("mmdebstrap"):
        raise LabError(
            "MISSING_DEPENDENCY", "mmdebstrap is not installed: it makes the lab's root file system", "apt-get install mmdebstrap"
        )
    sources = scratch / "sources.list"
    entries = apt_sources(parts["suite"])
    sources.write_text("\n".join(entries) + "\n")
    progress(f"making the root file system of the lab once: {parts['suite']}, about 80 s ({entries[0].split()[-3]})")
    customize = scratch / "customize.sh"
    customize.write_text(_customize(parts, scratch))
    customize.chmod(0o700)
    unfinished = scratch / "rootfs.tar.gz"
    log = tarball.with_suffix(".log")
    command = [
        # Namespaces of its own, and an end when we end: mmdebstrap mounts, and a killed one would leave mounts and dpkg behind.
        *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        "mmdebstrap",
        "--mode=root",
        *parts["flags"],
        *_apt_options(),
        f"--include={','.join(parts['packages'])}",
        f"--customize-hook={customize}",
        parts["suite"],
        str(unfinished),
        str(sources),
    ]
    began = time.monotonic()
    with log.open("wb") as sink:
        environment = {**os.environ, "TMPDIR": str(scratch)}
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        shown = began
        try:
            while child.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - shown >= 10:
                    shown = time.monotonic()
                    progress(f"root file system: {_stage(log)} ({shown - began:.0f} s)")
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if child.returncode != 0:
        raise LabError(
            "PLAYBOOK_FAILED",
            f"mmdebstrap failed ({child.returncode}): {log.read_text(errors='replace').strip()[-500:]}",
            f"check that the apt sources of this machine work (apt-get update); the whole log: less {log}",
        )
    log.unlink()
    unfinished.chmod(0o600)
    unfinished.replace(tarball)
    progress(
        f"root file system ready after {time.monotonic() - began:.0f} s: {tarball.stat().st_size >> 20} MiB in {tarball.parent}"
    )


def _customize(parts: dict[str, Any], scratch: Path) -> str:
    """Return the hook that mmdebstrap calls with the tree as its argument."""
    lines = ["#!/bin/sh", "set -eu", 'cd "$1"']
    lines += [f"rm -f {pattern}" for pattern in parts["removed"]]
    lines += [f"ln -sf /dev/null etc/systemd/system/{unit}" for unit in parts["masked"]]
    for number, (path, (mode, text)) in enumerate(parts["files"].items()):
        source = scratch / f"file-{number}"
        source.write_text(text)
        lines.append(f"rm -f {path} && install -D -m {mode:o} {shlex.quote(str(source))} {path}")
    lines += parts["commands"]
    return "\n".join(lines) + "\n"


def _stage(log: Path) -> str:
    lines = [line[3:] for line in log.read_text(errors="replace").splitlines() if line.startswith("I: ")]
    return lines[-1].rstrip(".") if lines else "starting"
