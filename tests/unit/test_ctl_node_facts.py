"""What is remembered of machines, refusals from memory, hosts of ~/.ssh/config, classes of SSH failures."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from rbee_ctl import cli, node_facts, ssh_config
from rbee_ctl.playbook import unreachable
from rbee_ctl.render import Ui
from rbee_serve.contract.errors import BackendUnavailable, ConfigInvalid, DeviceOutOfRange

DEVICES = [
    {"id": "cuda:0", "backend": "cuda", "device": 0},
    {"id": "cuda:1", "backend": "cuda", "device": 1},
    {"id": "cpu:0", "backend": "cpu", "device": 0},
]


@pytest.mark.N08
def test_contacts_and_devices_are_kept_side_by_side(tmp_path: Path) -> None:
    node_facts.capabilities(tmp_path, "ws", {"devices": DEVICES, "backends": {"cuda": 2, "cpu": 1}, "version": "0.1.0"})
    node_facts.contact(tmp_path, "ws", None)
    seen = node_facts.read(tmp_path, "ws")["last_contact"]
    node_facts.contact(tmp_path, "ws", "ws: not reachable")
    facts = node_facts.read(tmp_path, "ws")
    assert (facts["status"], facts["last_error"], facts["last_contact"]) == ("unreachable", "ws: not reachable", seen)
    assert facts["backends"] == {"cuda": 2, "cpu": 1}
    assert [p.name for p in (tmp_path / "nodes").iterdir()] == ["ws.json"]
    node_facts.forget(tmp_path, "ws")
    assert node_facts.read(tmp_path, "ws") == {}


@pytest.mark.S68
@pytest.mark.S69
@pytest.mark.parametrize(
    ("backend", "device", "error", "words"),
    [
        ("rocm", 0, BackendUnavailable, "available: cpu, cuda"),
        ("cuda", 5, DeviceOutOfRange, r"available: \[0, 1\]"),
        ("cpu", 1, DeviceOutOfRange, r"available: \[0\]"),
    ],
)
def test_what_a_machine_can_not_have_is_refused_from_memory(
    tmp_path: Path, backend: str, device: int, error: type[Exception], words: str
) -> None:
    node_facts.check_device(tmp_path, "ws", backend, device)  # nothing is known: nothing is refused
    node_facts.capabilities(tmp_path, "ws", {"devices": DEVICES})
    node_facts.check_device(tmp_path, "ws", "cuda", 1)
    with pytest.raises(error, match=words):
        node_facts.check_device(tmp_path, "ws", backend, device)


@pytest.mark.parametrize(
    ("said", "code", "ssh_class", "retryable"),
    [
        ("Host key verification failed.", "SSH_HOST_KEY_REFUSED", "host-key", False),
        ("root@x: Permission denied (publickey).", "SSH_AUTH_FAILED", "auth", False),
        ("UNPROTECTED PRIVATE KEY FILE! ... Permission denied", "SSH_AUTH_FAILED", "auth", False),
        ("ssh: connect to host x port 22: Connection timed out", "SSH_TIMEOUT", "timeout", True),
        ("ssh: connect to host x port 22: Connection refused", "NODE_UNREACHABLE", "connection", True),
    ],
)
def test_ssh_failures_have_classes(said: str, code: str, ssh_class: str, retryable: bool) -> None:
    prefix = 'Task failed: Data could not be sent to remote host "x". Make sure this host can be reached over ssh: '
    error = unreachable("ws", prefix + said)
    assert (error.code, error.details["ssh_class"], error.retryable) == (code, ssh_class, retryable)
    assert "Make sure" not in error.message
    assert said in error.message


SSH_CONFIG = """
Host *
  User nobody
Host ws gpu.lan   # two names
  HostName=10.1.1.1
  Port 2200
  IdentityFile "~/.ssh/my key"
  User ops
  User later
Host !no *.lan
Match host ws
  User never
Host plain
"""


def test_ssh_config_gives_hosts_and_no_patterns(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(SSH_CONFIG)
    ws = {
        "ansible_host": "10.1.1.1",
        "ansible_port": 2200,
        "ansible_ssh_private_key_file": "~/.ssh/my key",
        "ansible_user": "ops",
    }
    assert ssh_config.hosts(path) == {"ws": ws, "gpu.lan": ws, "plain": {}}
    path.write_text("Host x\n  Port many\n")
    with pytest.raises(ConfigInvalid, match="line 2"):
        ssh_config.hosts(path)


def run(*args: str) -> tuple[int, dict[str, object]]:
    out = io.StringIO()
    ui = Ui(out, io.StringIO())
    ui.finish(cli.run([*args, "--json"], ui))
    envelope = json.loads(out.getvalue())
    return envelope["exit_code"], envelope["data"]


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Home and inventory in ``tmp_path``, and no other setting."""
    for name in [n for n in os.environ if n.startswith("RBEE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RBEE_INVENTORY", str(tmp_path / "inventory.yml"))


@pytest.mark.usefixtures("at_home")
def test_import_is_done_once(tmp_path: Path) -> None:
    (tmp_path / "inventory.yml").write_text("rbee_hives:\n  hosts:\n    plain: {ansible_host: 10.9.9.9}\n")
    (tmp_path / "config").write_text(SSH_CONFIG)
    arguments = ("hive", "import-ssh", "--ssh-config", str(tmp_path / "config"))
    code, data = run(*arguments)
    assert (code, data["imported"], data["already_there"]) == (0, ["ws", "gpu.lan"], ["plain"])
    assert run(*arguments)[1]["imported"] == []
    assert "plain: {ansible_host: 10.9.9.9}" in (tmp_path / "inventory.yml").read_text()
    hives = run("hive", "list")[1]["hives"]
    assert [h["name"] for h in hives] == ["plain", "ws", "gpu.lan"]  # type: ignore[attr-defined]
    assert run("config", "list-nodes")[1]["hives"] == hives
    hive = run("hive", "get", "--node", "ws")[1]["hive"]
    assert hive["variables"]["ansible_port"] == 2200  # type: ignore[index]
    assert run("hive", "get")[0] == 1  # which one?


@pytest.mark.usefixtures("at_home")
def test_a_name_that_no_machine_can_have_is_passed_over_and_said(tmp_path: Path) -> None:
    """Workers' ids and the roles refuse it later."""
    (tmp_path / "inventory.yml").write_text("rbee_hives:\n  hosts:\n    plain: {}\n")
    (tmp_path / "config").write_text("Host gpu_box\n  HostName 192.0.2.7\nHost gpu-2\n  HostName 192.0.2.8\n")
    out, err = io.StringIO(), io.StringIO()
    ui = Ui(out, err)
    result = cli.run(["hive", "import-ssh", "--ssh-config", str(tmp_path / "config")], ui)
    ui.finish(result)
    assert (result.data["imported"], result.data["refused"]) == (["gpu-2"], ["gpu_box"])
    assert "gpu_box is passed over: letters, digits, dots and hyphens" in err.getvalue()
    assert "1 new, 0 there already, 1 passed over for their names (gpu_box)" in out.getvalue()
    assert "gpu_box" not in (tmp_path / "inventory.yml").read_text()
