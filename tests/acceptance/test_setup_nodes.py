"""Machines enter, change and leave the inventory: SPEC scenarios 1 to 10 without the ones that `setup install` owns."""

from __future__ import annotations

import difflib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from machines import Done, Fleet


class Registry:
    """A copy of the lab's inventory with a state folder of its own: the lab's stay as they are."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.fleet, self.lab, self.folder = fleet, fleet.lab, folder
        self.path = folder / "inventory.yml"
        self.path.write_text("# mine\n" + fleet.lab.inventory.read_text())
        key = folder / "key"
        key.touch(0o600)
        key.write_text(fleet.api_key)
        self.env = {
            "RBEE_INVENTORY": str(self.path),
            "RBEE_STATE_DIR": str(folder / "state"),
            "RBEE_QUEEN_URL": fleet.queen_url,
            "RBEE_API_KEY_FILE": str(key),
        }

    def ctl(self, *arguments: str) -> Done:
        return self.lab.ctl(*arguments, env=self.env)

    def add(self, *more: str) -> Done:
        return self.ctl("setup", "add-node", "--name", "workstation", "--ssh-host", self.lab.address("lab2"), *more)

    def host(self, name: str) -> dict[str, Any]:
        """What Ansible says about the host."""
        done = self.lab.command(["ansible-inventory", "-i", str(self.path), "--host", name])
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def registry(fleet: Fleet, tmp_path: Path) -> Registry:
    return Registry(fleet, tmp_path)


@pytest.mark.S01
@pytest.mark.S06
@pytest.mark.S09
def test_a_machine_is_reached_and_written_down(registry: Registry) -> None:
    before = registry.path.read_text()
    key = str(registry.lab.directory / "id")
    done = registry.add("--ssh-user", "root", "--ssh-key", key, "--install-path", "/srv/rbee")
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("[ctl") for line in done.stderr.splitlines()) >= 2
    host = registry.host("workstation")
    assert (host["ansible_host"], host["ansible_port"], host["ansible_user"]) == (registry.lab.address("lab2"), 22, "root")
    assert (host["ansible_ssh_private_key_file"], host["rbee_install_path"]) == (key, "/srv/rbee")
    changed = difflib.ndiff(before.splitlines(), registry.path.read_text().splitlines())
    assert [line for line in changed if line[0] in "-?"] == []

    listed = json.loads(registry.ctl("setup", "list-nodes", "--json").stdout)["data"]["hives"]
    assert [h["name"] for h in listed] == ["lab1", "lab2", "workstation"]
    assert listed[-1]["status"] == "reachable"
    assert listed[-1]["last_contact"] is not None
    assert listed[-1]["install_path"] == "/srv/rbee"
    got = json.loads(registry.ctl("hive", "get", "--node", "workstation", "--json").stdout)["data"]["hive"]
    assert [d["id"] for d in got["devices"]] == ["cpu:0"]
    assert got["devices"][0]["memory_bytes"] > 1e9

    now = registry.path.read_bytes()
    again = registry.add()
    assert (again.returncode, registry.path.read_bytes()) == (1, now)
    assert "NODE_EXISTS" in again.stderr
    assert "update-node" in again.stderr
    assert "remove-node" in again.stderr


@pytest.mark.S03
def test_a_key_that_is_refused_is_tried_once(registry: Registry) -> None:
    before = registry.path.read_bytes()
    key = registry.folder / "wrong"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    for mode, words in ((0o600, "SSH refused the key"), (0o644, "chmod 600")):
        key.chmod(mode)
        done = registry.add("--ssh-key", str(key))
        assert done.returncode == 8, done.stderr
        assert done.stderr.count("attempt ") == 1
        assert words in done.stderr
        assert "SSH_AUTH_FAILED" in done.stderr
    assert registry.path.read_bytes() == before


@pytest.mark.S08
def test_a_key_that_is_not_there_is_refused_before_any_connection(registry: Registry) -> None:
    before = registry.path.read_bytes()
    done = registry.add("--ssh-key", "/nonexistent/key")
    assert done.returncode == 1
    assert "/nonexistent/key" in done.stderr
    assert "attempt" not in done.stderr
    assert registry.path.read_bytes() == before


@pytest.mark.S07
def test_a_machine_with_active_workers_stays_unless_forced(registry: Registry) -> None:
    before = registry.path.read_text()
    refused = registry.ctl("setup", "remove-node", "--name", "lab2", "--yes")
    assert refused.returncode == 1
    assert "lab2-cpu0" in refused.stderr
    assert registry.path.read_text() == before
    unasked = registry.ctl("setup", "remove-node", "--name", "lab2", "--force")
    assert (unasked.returncode, "--yes" in unasked.stderr) == (2, True)
    done = registry.ctl("setup", "remove-node", "--name", "lab2", "--force", "--yes")
    assert done.returncode == 0, done.stderr
    listed = registry.lab.command(["ansible-inventory", "-i", str(registry.path), "--list"]).stdout
    assert "lab2" not in json.loads(listed)["_meta"]["hostvars"]
    assert set(registry.path.read_text().splitlines()) < set(before.splitlines())


@pytest.mark.S10
def test_inference_on_an_unknown_machine_tells_how_to_add_it(registry: Registry) -> None:
    done = registry.ctl("infer", "--node", "ghost", "--prompt", "Hi")
    assert done.returncode == 1
    assert "NODE_NOT_FOUND" in done.stderr
    assert "rbee-ctl setup add-node --name ghost" in done.stderr


def test_check_names_each_finding_and_refresh_remembers_the_devices(registry: Registry) -> None:
    checked = json.loads(registry.ctl("hive", "check", "--node", "lab2", "--json").stdout)
    names = {c["name"]: c for c in checked["data"]["checks"]}
    assert {"ssh", "latency", "privileges", "systemd", "python", "disk", "memory", "runtime", "version", "hive"} <= set(names)
    assert (checked["exit_code"], checked["data"]["fit"]) == (0, True)
    assert names["runtime"]["got"] == "cpu"
    # Remembered now: a device that is not there is refused without contact.
    done = registry.ctl("worker", "start", "--node", "lab2", "--model", "smollm2-135m-instruct", "--device", "5")
    assert (done.returncode, "DEVICE_OUT_OF_RANGE" in done.stderr, "available: [0]" in done.stderr) == (5, True, True)
    assert "worker_start" not in done.stderr
