"""The lab boots real machines, leaves running ones alone, and leaves nothing behind in any case."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from machines import LAB_PY, ROOT, Lab


def prefix(lab: Lab) -> str:
    return "rbee-lab-" + "".join(f"{int(octet):02x}" for octet in lab.net.split("."))


def traces(lab: Lab) -> dict[str, list[str]]:
    """Return everything on this machine that belongs to that lab, found without its own tool."""
    identity = prefix(lab).removeprefix("rbee-lab-")
    marks = re.compile(rf"{identity}|{re.escape(str(lab.directory))}|{re.escape(lab.net)}\.")

    def matching(lines: list[str]) -> list[str]:
        return sorted(line for line in lines if marks.search(line))

    processes = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            processes.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    folders = ("/run/netns", "/sys/class/net", "/run/systemd/nspawn/propagate", "/run/systemd/nspawn/unix-export", "/run")
    listings = [f"{folder}/{p.name}" for folder in folders for p in Path(folder).glob("*")]
    show = {
        name: subprocess.run(["ip", "-4", name], capture_output=True, text=True, check=True).stdout for name in ("route", "rule")
    }
    return {
        "mounts": matching(Path("/proc/self/mountinfo").read_text().splitlines()),
        "processes": matching(processes),
        "folders": matching(listings),
        "cgroups": matching(cgroups()),
        "routes": matching([line for text in show.values() for line in text.splitlines()]),
    }


def cgroups() -> list[str]:
    """Return the cgroups of all labs. Not by rglob: it fails where a folder vanishes, and those of other labs do."""
    return [f"{where}/{d}" for where, below, _ in os.walk("/sys/fs/cgroup") for d in below if d.startswith("rbee-lab-")]


def nothing(lab: Lab) -> bool:
    return not any(traces(lab).values())


def wait_for(condition: Callable[[], object], limit_s: float, what: str) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.005)


def test_lab_boots_machines_with_systemd_and_an_address_of_their_own(lab: Lab) -> None:
    for node in ("lab1", "lab2"):
        seen = lab.ssh(
            node, "cat /proc/1/comm /etc/hostname; ip -4 -o address show eth0; systemctl is-system-running --wait"
        ).stdout
        assert seen.startswith(f"systemd\n{node}\n")
        assert f" {lab.address(node)}/24 " in seen
        assert seen.endswith("running\n")
    machine_ids = {lab.ssh(node, "cat /etc/machine-id").stdout for node in ("lab1", "lab2")}
    assert len(machine_ids) == 2
    lab.ssh("lab1", "timeout 60 bash -c '</dev/tcp/lab2/22'")


@pytest.mark.N13
def test_lab_machines_have_no_internet(lab: Lab) -> None:
    # TEST-NET-1 is nobody's; the controller must not even try to forward to it.
    assert lab.ssh("lab1", "timeout 2 bash -c '</dev/tcp/192.0.2.1/80'", check=False).returncode != 0


def test_limits_inside_a_machine_are_real(lab: Lab) -> None:
    hungry = "python3 -c 'x = bytearray(200 << 20)'"
    lab.ssh("lab1", f"systemd-run --quiet --wait -p MemoryMax=400M {hungry}")
    assert lab.ssh("lab1", f"systemd-run --quiet --wait -p MemoryMax=50M {hungry}", check=False).returncode != 0


def test_up_again_leaves_running_machines_alone(lab: Lab) -> None:
    lab.ssh("lab2", "echo mine > /root/note")
    again = lab.playbook("lab_up")
    assert again.returncode == 0, again.stdout
    assert re.search(r"localhost\s.*\bchanged=0\b", again.stdout)
    assert lab.ssh("lab2", "cat /root/note").stdout == "mine\n"


def test_reboot_keeps_files(lab: Lab) -> None:
    lab.ssh("lab2", "echo kept > /root/note; touch /run/gone")
    lab.reboot("lab2")
    assert lab.ssh("lab2", "cat /root/note; ls /run/gone 2>&1", check=False).stdout.startswith("kept\nls: ")


def test_partition_cuts_off_and_heal_connects(lab: Lab) -> None:
    lab.partition("lab2")
    try:
        assert lab.ssh("lab2", "true", check=False).returncode == 255
        assert [n["state"] for n in lab.run("status")["nodes"]] == ["running", "unreachable"]
    finally:
        lab.heal("lab2")
    lab.ssh("lab2", "true")


def test_inventory_is_kept_until_the_machines_change(own_lab: Lab) -> None:
    own_lab.up(1)
    edited = own_lab.inventory.read_text() + "# mine\n"
    own_lab.inventory.write_text(edited)
    own_lab.up(1)
    assert own_lab.inventory.read_text() == edited
    own_lab.up(2)
    assert "lab2" in own_lab.inventory.read_text()
    kept = [p.read_text() for p in own_lab.directory.glob("inventory.yml.*")]
    assert kept == [edited]
    listed = own_lab.command(["ansible", "-i", str(own_lab.inventory), "rbee_hives", "-m", "ansible.builtin.ping"])
    assert listed.stdout.count("SUCCESS") == 2, listed.stdout
    own_lab.down()
    assert [p.name for p in own_lab.directory.iterdir() if not p.name.startswith("inventory.yml.")] == []
    assert nothing(own_lab), traces(own_lab)


def test_rbee_ctl_shows_and_enters_the_lab(own_lab: Lab) -> None:
    started = own_lab.ctl("lab", "up", "--nodes", "1", "--json")
    assert started.returncode == 0, started.stderr
    data = json.loads(started.stdout)["data"]
    assert [(n["name"], n["state"], n["address"]) for n in data["nodes"]] == [("lab1", "running", own_lab.address("lab1"))]
    assert own_lab.ctl("lab", "ssh", "lab1", "echo", "$HOSTNAME", "-n").stdout == "lab1 -n\n"
    assert own_lab.ctl("lab", "ssh", "lab1", "exit 7").returncode == 7
    unknown = own_lab.ctl("lab", "ssh", "lab9", "true")
    assert unknown.returncode == 1
    assert "known: lab1" in unknown.stderr
    ended = own_lab.ctl("lab", "down")
    assert ended.returncode == 0, ended.stderr
    assert nothing(own_lab), traces(own_lab)
    assert not own_lab.directory.exists()


def test_down_leaves_nothing(own_lab: Lab) -> None:
    forwarding = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    own_lab.up(2)
    own_lab.command(["ansible", "-i", str(own_lab.inventory), "all", "-m", "ansible.builtin.ping"])  # leaves open connections
    assert all(traces(own_lab)[kind] for kind in ("mounts", "processes", "folders", "cgroups", "routes"))
    own_lab.down()
    assert nothing(own_lab), traces(own_lab)
    assert not own_lab.directory.exists()
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == forwarding
    assert own_lab.run("down")["changed"] is False


@pytest.mark.parametrize("reached", ["namespaces", "mounts", "links", "cgroups", "processes"])
def test_killed_half_way_is_repaired(own_lab: Lab, reached: str) -> None:
    own_lab.run("status")
    command = [sys.executable, str(LAB_PY), "up", "--nodes", "2"]
    looks = {
        "namespaces": lambda: list(Path("/run/netns").glob(f"{prefix(own_lab)}*")),
        "mounts": lambda: prefix(own_lab) in Path("/proc/self/mountinfo").read_text(),
        "links": lambda: [p for p in Path("/sys/class/net").glob("rv*") if prefix(own_lab)[-6:] in p.name],
        "cgroups": lambda: [name for name in cgroups() if prefix(own_lab) in name],
        "processes": lambda: own_lab.run("status")["belongings"]["processes"],
    }
    process = subprocess.Popen(command, env=own_lab.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(looks[reached], 60, reached)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if reached in ("mounts", "processes"):
        states = {n["name"]: n["state"] for n in own_lab.run("up", "--nodes", "2")["nodes"]}
        assert states == {"lab1": "running", "lab2": "running"}
    own_lab.down()
    assert nothing(own_lab), traces(own_lab)


def test_killed_machine_is_seen_and_made_anew(own_lab: Lab) -> None:
    own_lab.run("up", "--nodes", "2")
    mark = f"--machine={prefix(own_lab)}-lab1"
    supervisors = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # of a process that has just ended
            continue
        if mark in words and Path(words[0]).name == "systemd-nspawn":
            supervisors.append(int(path.parent.name))
    assert len(supervisors) == 1
    os.kill(supervisors[0], signal.SIGKILL)
    wait_for(lambda: own_lab.run("status")["nodes"][0]["state"] == "broken", 60, "status says broken")
    repaired = own_lab.run("up", "--nodes", "2")
    assert repaired["booted"] == ["lab1"]
    assert own_lab.ssh("lab1", "hostname").stdout == "lab1\n"
    own_lab.down()
    assert nothing(own_lab), traces(own_lab)


def test_two_checkouts_do_not_fight(own_lab: Lab, tmp_path: Path) -> None:
    own_lab.run("up", "--nodes", "1")
    other = Lab(tmp_path / "other", net=own_lab.net)
    for verb in (("up",), ("down",)):
        error = other.run(*verb, check=False)["rbee_error"]
        assert error["code"] == "CONFIG_INVALID"
        assert str(own_lab.directory) in error["message"]
        assert "RBEE_LAB_NET" in error["hint"]
    assert own_lab.run("status")["nodes"][0]["state"] == "running"
    beside = Lab(tmp_path / "beside")
    try:
        beside.run("up", "--nodes", "1")
        assert beside.ssh("lab1", "hostname").stdout == "lab1\n"
    finally:
        beside.down()
    assert nothing(beside), traces(beside)
    assert own_lab.ssh("lab1", "hostname").stdout == "lab1\n"


def test_network_in_use_is_refused_by_name(own_lab: Lab) -> None:
    own_lab.run("up", "--nodes", "1")
    bridge = own_lab.run("status")["lab"]["bridge"]
    done = own_lab.command([sys.executable, str(LAB_PY), "up"], env={"RBEE_LAB_BRIDGE": "rbee-other"})
    assert done.returncode == 1
    error = json.loads(done.stdout)["rbee_error"]
    assert f"{own_lab.net}.0/24 is in use by {bridge}" in error["message"]
    assert not Path("/sys/class/net/rbee-other").exists()


def test_machine_memory_limit_holds(own_lab: Lab) -> None:
    own_lab.run("up", "--nodes", "1", "--memory", "300")
    killed = own_lab.ssh("lab1", "python3 -c 'x = bytearray(600 << 20)'", check=False)
    assert killed.returncode != 0


def test_playbooks_of_the_lab_pass_check_mode_and_change_nothing(own_lab: Lab) -> None:
    done = own_lab.playbook("lab_up", "--check", "--diff")
    assert done.returncode == 0, done.stdout + done.stderr
    assert nothing(own_lab)
    assert not own_lab.directory.exists()
    assert (ROOT / "playbooks/lab_down.yml").is_file()
