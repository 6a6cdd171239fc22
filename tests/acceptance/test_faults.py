"""What goes wrong between a controller and a machine: one clear line, an exit code of its own, and the next run goes on.

One virgin machine that SSH enters as an ordinary user. Each test brings one fault upon its deployment and takes it away
again; together they are the way from nothing to a fleet that serves, with everything in between that can be in the way.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from machines import ROOT, Done, Lab
from waiting import until

NODE = "lab1"
LOCK = "/run/rbee-lock.json"
WORKER = "rbee-worker@cpu0.service"
#: Stops the process on the machine in which a deployment spends most of its time, in the moment in which it is found.
STOP_PIP = (
    "for p in $(pgrep -f '[p]ip.* --find-links .*wheels-worker'); do "
    "[ $p = '{before}' ] || {{ kill -STOP $p && echo $p && break; }}; done"
)


class Faulty:
    """The machine, and ``rbee-ctl apply`` on it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def sh(self, command: str, *, check: bool = True) -> str:
        """Look or meddle as root, beside what is being tested."""
        return self.lab.ssh(NODE, command, check=check).stdout.strip()

    def refused(self, codes: str, exit_code: int, *words: str, command: tuple[str, ...] = ("apply",)) -> dict[str, Any]:
        """Run a command that has to fail in this way; returns its one error."""
        done = self.lab.ctl(*command, "--json", timeout=300)
        envelope = json.loads(done.stdout)
        assert done.returncode == exit_code, done.stdout[-3000:]
        (error,) = envelope["errors"]
        assert error["code"] in codes.split()
        assert error["host"] == NODE
        assert error["message"].startswith(f"{NODE}: ")
        assert "\n" not in error["message"], error["message"]
        assert error["hint"], "no next command"
        for word in words:
            assert word in f"{error['message']} {error['hint']}", error
        found: dict[str, Any] = error
        return found

    @contextmanager
    def half_way(self, before: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
        """A deployment in its middle, where it stands still: its process here, and that on the machine which stands.

        ``before``: the one that an earlier deployment has left there.
        """
        command = ["rbee-ctl", "apply"]
        process = subprocess.Popen(command, env=self.lab.environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            pid = until(lambda: self.pip(before) or self.over(process), "packages being installed", limit_s=250)
            yield process, pid
        finally:
            process.kill()
            process.communicate()
            with suppress(ValueError, OSError):  # Ansible itself, where a failed test leaves it behind
                holder = json.loads(self.sh(f"cat {LOCK}", check=False))["pid"]
                if str(self.lab.inventory) in Path(f"/proc/{holder}/cmdline").read_text():
                    os.kill(holder, signal.SIGKILL)

    def pip(self, before: str) -> str:
        """Process that installs packages on the machine, stopped; empty while there is none but ``before``."""
        return next(iter(self.sh(STOP_PIP.format(before=before), check=False).split()), "")

    def over(self, process: subprocess.Popen[str]) -> str:
        assert process.poll() is None, f"the deployment has ended with {process.returncode}: {process.communicate()[1]}"
        return ""

    def runs(self, pid: str) -> bool:
        """Whether a process of the machine is still there."""
        return self.sh(f"test -e /proc/{pid} && echo yes", check=False) == "yes"


@pytest.fixture(scope="module")
def faulty(lab_possible: None, tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Faulty]:
    """A virgin machine with a user ``ops`` who has root's rights by sudo, with a log-in by key."""
    lab = Lab(tmp_path_factory.mktemp("faults") / "lab")
    try:
        lab.up(1)
        keys = "install -d -m 700 -o ops /home/ops/.ssh; install -m 600 -o ops /root/.ssh/authorized_keys /home/ops/.ssh/"
        lab.ssh(NODE, f"useradd --create-home --shell /bin/bash --password '*' ops; {keys}")
        lab.inventory.write_text(lab.inventory.read_text().replace("ansible_user: root", "ansible_user: ops"))
        yield Faulty(lab)
    finally:
        lab.run("down", check=False)


def test_sudo_that_is_refused(faulty: Faulty) -> None:
    faulty.refused("SUDO_REFUSED", 10, "sudo", "NOPASSWD")

    assert faulty.sh("ls -d /etc/rbee /opt/rbee 2>&1", check=False).count("No such file") == 2
    faulty.sh("echo 'ops ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/ops && chmod 440 /etc/sudoers.d/ops")


@pytest.mark.N13
def test_a_machine_that_is_too_old_is_told_what_it_lacks(faulty: Faulty) -> None:
    done = faulty.lab.playbook("install", "-e", '{"__rbee_hive_systemd_minimum": 999}')

    assert done.returncode != 0
    assert "needed are Linux on x86_64, systemd 999 and Python 3.11 or newer" in " ".join(done.stdout.split()), done.stdout
    assert faulty.sh("ls -d /etc/rbee /opt/rbee 2>&1", check=False).count("No such file") == 2


def test_a_disk_that_is_full(faulty: Faulty) -> None:
    faulty.sh("mkdir -p /opt/rbee && mount -t tmpfs -o size=20M tmpfs /opt/rbee")
    try:
        faulty.refused("DISK_FULL", 11, "no space left for the worker's runtime: /opt/rbee", "has 21 MB free", "df -h /opt/rbee")
    finally:
        faulty.sh("umount /opt/rbee")

    assert faulty.sh(f"test -e {LOCK} || echo free") == "free"


@pytest.mark.N06
def test_two_controllers_and_one_that_dies(faulty: Faulty) -> None:
    with faulty.half_way() as (first, left):
        for command in (
            ("apply",),
            ("hive", "stop"),
            ("queen", "stop", "--no-cascade"),
            ("hive", "uninstall", "--node", NODE, "--yes"),
        ):
            error = faulty.refused("NODE_LOCKED", 7, "has been changing this machine for", "site.yml", command=command)
            assert (error["details"]["lock"]["playbook"], error["details"]["lock"]["pid"] > 0) == ("site.yml", True)
        plain = faulty.lab.playbook("hive_stop")
        assert plain.returncode != 0
        assert "[NODE_LOCKED]; next: wait until it is done" in plain.stdout
        looking = faulty.lab.ctl("hive", "status", "--json")
        assert json.loads(looking.stdout)["errors"] == [], "looking is never refused"

        holder = json.loads(faulty.sh(f"cat {LOCK}"))["pid"]
        first.kill()
        first.wait()
        subprocess.run(["kill", "-KILL", str(holder)], check=False)
        until(lambda: not Path(f"/proc/{holder}").exists(), "the controller is dead")

    assert faulty.runs(left), "the machine does not know that its controller is dead"
    assert json.loads(faulty.sh(f"cat {LOCK}"))["pid"] == holder
    with faulty.half_way(left) as (second, again):
        assert not faulty.runs(left), "two of them would write into one environment"
        second.send_signal(signal.SIGINT)
        _, said = second.communicate(timeout=180)
    assert second.returncode == 130, said
    assert "took over the lock of" in said
    assert "ended what it left working here" in said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert again != left


def test_a_unit_that_its_administrator_has_masked(faulty: Faulty) -> None:
    faulty.sh(f"systemctl mask {WORKER}")

    error = faulty.refused("UNIT_MASKED", 13, WORKER, f"systemctl unmask {WORKER}")

    assert error["details"]["unit"] == WORKER
    assert faulty.sh(f"systemctl is-enabled {WORKER}", check=False) == "masked", "that is not ours to undo"
    faulty.sh(f"systemctl unmask {WORKER}")


def test_a_port_that_somebody_else_has(faulty: Faulty) -> None:
    listener = "import socket,time; s=socket.create_server(('',8001)); time.sleep(6000)"
    faulty.sh(f'systemd-run --unit=squatter -p Type=exec python3 -c "{listener}"')
    try:
        until(lambda: faulty.sh("ss -ltnH 'sport = :8001'"), "the port is taken")
        faulty.refused("PORT_TAKEN", 12, "port 8001 of worker cpu0 is taken by python3", "another port")
    finally:
        faulty.sh("systemctl stop squatter")


def test_a_half_installed_runtime_is_repaired_by_the_run_that_ends_well(faulty: Faulty) -> None:
    home = faulty.sh("dirname $(ls /opt/rbee/runtimes/cpu/*/metadata.yaml | head -n 1)")
    faulty.sh(f"rm {home}/metadata.yaml; rm -r {home}/lib/python3*/site-packages/llama_cpp; truncate -s 0 {home}/bin/rbee-worker")

    done = faulty.lab.ctl("apply", timeout=300)

    assert done.returncode == 0, done.stderr
    assert faulty.sh(f"systemctl is-active {WORKER}") == "active"
    until(lambda: " idle " in faulty.lab.ctl("worker", "list").stdout, "known to the queen")
    story = faulty.lab.ctl("infer", "--prompt", "Once upon", "-n", "5", "--temperature", "0")
    assert (story.returncode, bool(story.stdout.strip())) == (0, True), story.stderr
    again = faulty.lab.ctl("plan")
    assert again.returncode == 0, again.stdout
    assert faulty.sh(f"test -e {LOCK} || echo free") == "free"


@pytest.mark.N12
def test_what_the_inventory_allows_a_worker_is_what_the_kernel_enforces(faulty: Faulty) -> None:
    text = faulty.lab.inventory.read_text()
    limits = "memory_max: 900M, cpu_quota: 150%, cpu_weight: 50, cpu_affinity: '0', threads: 1"
    faulty.lab.inventory.write_text(re.sub(r"threads: \d+", limits, text))

    done = faulty.lab.ctl("apply", timeout=300)

    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{NODE}\s+changed", done.stdout, re.MULTILINE), done.stdout
    show = "systemctl show -p MemoryMax -p CPUQuotaPerSecUSec -p CPUWeight -p CPUAffinity -p IPAddressDeny -p User"
    told = dict(line.split("=", 1) for line in faulty.sh(f"{show} {WORKER}").splitlines())
    assert set(told.pop("IPAddressDeny").split()) == {"0.0.0.0/0", "::/0"}
    assert told.pop("CPUQuotaPerSecUSec") in ("1.500000s", "1.5s")
    assert told == {
        "MemoryMax": str(900 << 20),
        "CPUWeight": "50",
        "CPUAffinity": "0",
        "User": "rbee-cpu0",
    }

    # What systemd has told the kernel, in the words of either version of cgroups.
    def kernel(*names: str) -> list[str]:
        where = " -o ".join(f"-path '*/{WORKER}/{name}'" for name in names)
        return faulty.sh(f"find /sys/fs/cgroup \\( {where} \\) -exec cat {{}} +").split()

    assert str(900 << 20) in kernel("memory.max", "memory.limit_in_bytes")
    assert "150000" in kernel("cpu.max", "cpu.cfs_quota_us")
    processes = f"p=$(systemctl show -p MainPID --value {WORKER}); for q in $p $(pgrep -P $p); do"
    allowed = faulty.sh(f"{processes} sed -n 's/^Cpus_allowed_list:\\s*//p' /proc/$q/status; done").split()
    assert (set(allowed), len(allowed) > 1) == ({"0"}, True), "front and engine"
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", faulty.sh(f"systemd-analyze security --no-pager {WORKER}"))
    assert exposure
    assert float(exposure[1]) <= 2.0


def test_every_kind_of_command_works_through_sudo(faulty: Faulty) -> None:
    """Also those that run more than modules: followers, copies to and from the machine, peers."""
    for command in (
        ("worker", "stop", f"{NODE}-cpu0"),
        ("hive", "start", "--node", NODE),
        ("model", "list", "--node", NODE),
        ("hive", "check", "--node", NODE),
        ("drift",),
        ("audit", "fetch"),
        ("key", "rotate", "--yes"),
        ("worker", "start", "--node", NODE, "--model", "smollm2-135m-instruct", "--name", "cpu0-b", "--slots", "1"),
        ("worker", "cleanup", "--yes"),
        ("hive", "stop", "--node", NODE),
        ("hive", "start", "--node", NODE),
    ):
        done = faulty.lab.ctl(*command, timeout=200)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


def test_a_machine_that_is_not_the_one_it_was(faulty: Faulty) -> None:
    known = faulty.lab.directory / "known_hosts"
    right = known.read_text()
    other = faulty.lab.directory / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    key = " ".join(Path(f"{other}.pub").read_text().split()[:2])
    known.write_text(re.sub(r"ssh-ed25519 \S+", key, right))
    close(faulty.lab)
    try:
        faulty.refused("SSH_HOST_KEY_REFUSED", 9, "ssh-keygen -R", command=("hive", "status"))
    finally:
        known.write_text(right)
        for path in (other, Path(f"{other}.pub")):
            path.unlink()
    works(faulty.lab)


def test_a_key_that_the_machine_does_not_know(faulty: Faulty) -> None:
    faulty.sh("mv /home/ops/.ssh/authorized_keys /home/ops/.ssh/away")
    close(faulty.lab)
    try:
        faulty.refused("SSH_AUTH_FAILED", 8, "ansible_ssh_private_key_file", command=("hive", "status"))
    finally:
        faulty.sh("mv /home/ops/.ssh/away /home/ops/.ssh/authorized_keys")
    works(faulty.lab)


def test_a_machine_that_does_not_answer(faulty: Faulty) -> None:
    faulty.lab.partition(NODE)
    try:
        faulty.refused("SSH_TIMEOUT NODE_UNREACHABLE", 4, "rbee-ctl hive list", command=("hive", "status"))
    finally:
        faulty.lab.heal(NODE)
    works(faulty.lab)


def works(lab: Lab) -> None:
    """The next run: with the fault taken away there is nothing to repair."""
    done: Done = lab.ctl("hive", "status")
    assert done.returncode == 0, done.stderr


def close(lab: Lab) -> None:
    """End the connections that are kept open: who has one is not asked for keys."""
    for path in Path(lab.run("status")["lab"]["control_path"]).iterdir():
        if path.is_socket():
            subprocess.run(["ssh", "-o", f"ControlPath={path}", "-O", "exit", "any"], capture_output=True, check=False)
            until(lambda path=path: not path.exists(), "its master has ended")
