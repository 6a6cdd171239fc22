"""Everything that a fleet without internet needs in one file: made here, carried over, installed and served from there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from machines import Lab

from rbee_ctl.demo_model import MODEL_ID, REFERENCE, SHA256

CTL = "rbee/bin/rbee-ctl"


def carry(lab: Lab, path: Path, node: str) -> None:
    options = [f"UserKnownHostsFile={lab.directory}/known_hosts", "StrictHostKeyChecking=yes", "BatchMode=yes"]
    argv = ["scp", "-q", "-i", str(lab.directory / "id"), *(a for o in options for a in ("-o", o))]
    done = lab.command([*argv, str(path), f"root@{lab.address(node)}:"])
    assert done.returncode == 0, done.stderr


def refused(lab: Lab, *arguments: str) -> dict[str, str]:
    done = lab.ctl("bundle", *arguments, "--json")
    assert done.returncode == 1, done.stdout
    error: dict[str, str] = json.loads(done.stdout)["errors"][0]
    return error


#: What a machine without a route counts when something asks for one, and what a name look-up without a server leaves behind.
COUNTERS = r"""
awk '/^Ip: [0-9]/ {print $13} /^Udp: [0-9]/ {print $3}' /proc/net/snmp; awk '/^Ip6OutNoRoutes/ {print $2}' /proc/net/snmp6
"""


@pytest.mark.timeout(3600)  # wheels, a whole installation on one machine, and the same again from what is there
def test_a_machine_without_any_route_out_installs_and_serves_from_a_bundle(
    own_lab: Lab, tmp_path: Path, model_path: Path
) -> None:
    """SPEC "air-gap": the machine is controller, queen and hive in one, and nothing ever leaves it."""
    lab, file = own_lab, tmp_path / "rbee.tar"
    lab.up(1)
    models = [{"id": MODEL_ID, "reference": REFERENCE, "src": str(model_path), "sha256": SHA256}]
    declared = {"all": {"children": {"rbee_hives": {"hosts": {"anybody": None}, "vars": {"rbee_models": models}}}}}
    (tmp_path / "models.yml").write_text(yaml.safe_dump(declared))
    made = lab.ctl("-i", str(tmp_path / "models.yml"), "bundle", "create", str(file), "--json", timeout=500)
    assert made.returncode == 0, made.stderr
    shown = json.loads(made.stdout)["data"]["bundle"]
    assert ([m["id"] for m in shown["models"]], shown["wheels"] > 10) == ([MODEL_ID], True)

    # A byte in the middle, one file less, one more: found by name, and nothing is laid out.
    broken = tmp_path / "broken.tar"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    broken.write_bytes(data)
    assert refused(lab, "verify", str(broken))["code"] == "BUNDLE_INVALID"
    assert refused(lab, "install", str(broken), "--no-apply")["code"] == "BUNDLE_INVALID"
    broken.write_bytes(file.read_bytes())
    subprocess.run(["tar", "--delete", "-f", str(broken), "nodes/wheels.tar"], check=True)
    assert "nodes/wheels.tar is missing" in refused(lab, "verify", str(broken))["message"]
    (tmp_path / "extra.sh").write_text("#!/bin/sh\n")
    broken.write_bytes(file.read_bytes())
    subprocess.run(["tar", "-rf", str(broken), "-C", str(tmp_path), "extra.sh"], check=True)
    assert "extra.sh is not in its list" in refused(lab, "verify", str(broken))["message"]
    broken.unlink()

    # From here on as README.txt says, on a machine that has nothing and no route to anywhere but its own network.
    carry(lab, file, "lab1")
    namespace = lab.run("status")["nodes"][0]["namespace"]
    assert lab.command(["ip", "-n", namespace, "route", "del", "default"]).returncode == 0
    lab.ssh("lab1", "! ip route get 192.0.2.1")
    before = lab.ssh("lab1", COUNTERS).stdout
    lab.ssh(
        "lab1",
        f"tar -xf {file.name} controller && python3 -m venv rbee && "
        "rbee/bin/pip install --quiet --no-index --find-links controller 'rbee[ctl]'",
        timeout=600,
    )
    assert MODEL_ID in lab.ssh("lab1", f"{CTL} bundle verify {file.name}", timeout=300).stdout
    worker = {"backend": "cpu", "model": MODEL_ID, "threads": 1}
    host = {"ansible_connection": "local", "ansible_host": lab.address("lab1"), "rbee_workers": [worker]}
    fleet = {"rbee_queen": {"hosts": {"lab1": None}}, "rbee_hives": {"hosts": {"lab1": host}}}
    inventory = yaml.safe_dump({"all": {"vars": {"ansible_python_interpreter": "/usr/bin/python3"}, "children": fleet}})
    lab.ssh("lab1", f"cat > fleet.yml <<'X'\n{inventory}X\n")
    installed = lab.ssh("lab1", f"{CTL} bundle install {file.name} -i fleet.yml", check=False, timeout=800)
    assert installed.returncode == 0, f"{installed.stdout}\n{installed.stderr}"
    asked = lab.ssh(
        "lab1", f"{CTL} -i fleet.yml infer --model {MODEL_ID} --prompt 'Once upon a time' --max-tokens 8", timeout=300
    )
    assert asked.stdout.strip()
    assert lab.ssh("lab1", f"sha256sum /var/lib/rbee/models/*/*/{model_path.name}").stdout.startswith(SHA256)
    assert lab.ssh("lab1", COUNTERS).stdout == before
    ask = "import socket; socket.create_connection(('192.0.2.1', 80))"
    lab.ssh("lab1", f'! python3 -c "{ask}"')
    assert lab.ssh("lab1", COUNTERS).stdout != before  # a request that wants out is counted
    again = lab.ssh("lab1", f"{CTL} bundle install {file.name} -i fleet.yml --no-apply --json", timeout=600)
    assert "everything is in /root/.cache/rbee already" in again.stderr
