"""A model is fetched from the hub once and reaches several machines: by rbee-ctl, by the inventory, by the controller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import Hub
from machines import Fleet

REPO = "HuggingFaceTB/once-GGUF"
FILE = "Once-Q4_1.gguf"
REF = f"hf:{REPO}:{FILE}"
NODES = ("lab1", "lab2")


@pytest.fixture
def hub(fleet: Fleet, tmp_path: Path, model_path: Path) -> Iterator[Hub]:
    """A hub with one more model, a header's byte away from the one that all machines have."""
    data = bytearray(model_path.read_bytes())
    data[-1] ^= 1
    file = tmp_path / "once.gguf"
    file.write_bytes(data)
    with Hub(tmp_path / "hub", host=fleet.lab.controller) as hub:
        hub.add(REPO, FILE, file)
        yield hub
    for node in NODES:
        fleet.lab.ssh(
            node, "systemctl stop 'rbee-share-*' 'rbee-download-*'; rm -rf /var/lib/rbee/models/HuggingFaceTB/once-GGUF"
        )


def inventory(fleet: Fleet, path: Path, **variables: Any) -> Path:
    data = yaml.safe_load(fleet.lab.inventory.read_text())
    data["all"].setdefault("vars", {}).update(variables)
    path.write_text(yaml.safe_dump(data))
    return path


def digests(fleet: Fleet) -> dict[str, str]:
    path = f"/var/lib/rbee/models/{REPO}/{FILE}"
    return {n: fleet.lab.ssh(n, f"sha256sum {path}").stdout.split()[0] for n in NODES}


def asked_once(hub: Hub, bytes_of: Path) -> None:
    assert len(hub.downloads) == 1, hub.log
    assert hub.bytes_sent == bytes_of.stat().st_size


@pytest.mark.S21
@pytest.mark.S28
def test_several_machines_get_a_model_that_the_hub_gives_once(fleet: Fleet, hub: Hub, tmp_path: Path) -> None:
    """The second machine gets it from the first, in a transfer that breaks in the middle and is resumed by repeating."""
    lab, digest = fleet.lab, hub.sha256(hub.root / REPO / FILE)
    where = inventory(fleet, tmp_path / "slow.yml", rbee_hub_endpoint=hub.url)
    download = ("-i", str(where), "model", "download", REF, "--node", "lab1,lab2", "--json")
    done = lab.ctl(*download, timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    hosts = json.loads(done.stdout)["data"]["hosts"]
    assert {(hosts[n]["status"], hosts[n]["downloaded"], hosts[n]["model"]["sha256"]) for n in NODES} == {("ok", True, digest)}
    assert f"{REF} comes from lab1" in done.stderr
    assert digests(fleet) == dict.fromkeys(NODES, digest)
    asked_once(hub, hub.root / REPO / FILE)

    again = lab.ctl(*download, timeout=120)
    assert again.returncode == 0, again.stderr
    assert not any(h["downloaded"] for h in json.loads(again.stdout)["data"]["hosts"].values() if "downloaded" in h)
    asked_once(hub, hub.root / REPO / FILE)

    # One machine that lacks it, alone in the run: another one of the fleet has it. Its transfer is broken off on the way.
    model = hosts["lab2"]["model"]["id"]
    assert lab.ctl("model", "delete", model, "--node", "lab2", "--yes", timeout=120).returncode == 0
    slow = inventory(fleet, tmp_path / "slow.yml", rbee_hub_endpoint=hub.url, rbee_hub_bytes_per_s=20_000_000)
    home = f"/var/lib/rbee/models/{REPO}"
    lab.ssh(
        "lab2",
        "systemd-run --quiet --unit=test-breaker sh -c 'until [ \"$(stat -c %s "
        f'{home}/{FILE}.partial 2>/dev/null || echo 0)" -gt 20000000 ]; do sleep 0.05; done; '
        'systemctl kill -s KILL "rbee-download-*"\'',
    )
    broken = lab.ctl("-i", str(slow), "model", "download", REF, "--node", "lab2", "--json", timeout=240)
    assert broken.returncode != 0
    assert lab.ssh("lab2", f"ls {home}").stdout.split().count(FILE) == 0
    there = int(lab.ssh("lab2", f"stat -c %s {home}/{FILE}.partial").stdout)
    assert there > 20_000_000
    resumed = lab.ctl("-i", str(where), "model", "download", REF, "--node", "lab2", timeout=240)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming {FILE}" in resumed.stderr
    assert digests(fleet) == dict.fromkeys(NODES, digest)
    asked_once(hub, hub.root / REPO / FILE)


def test_the_controller_fetches_for_machines_that_see_no_hub(fleet: Fleet, hub: Hub, tmp_path: Path) -> None:
    where = inventory(fleet, tmp_path / "via.yml", rbee_hub_endpoint=hub.url)
    env = {"RBEE_CACHE": str(tmp_path / "cache"), "PATH": fleet.lab.environment["PATH"]}
    command = ("-i", str(where), "model", "download", REF, "--via", "controller", "--json")
    done = fleet.lab.ctl(*command, timeout=240, env=env)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert digests(fleet) == dict.fromkeys(NODES, hub.sha256(hub.root / REPO / FILE))
    asked_once(hub, hub.root / REPO / FILE)
    assert {r.authorization for r in hub.log} == {None}


def test_a_declared_model_is_fetched_once_by_the_site_and_has_its_declared_name(fleet: Fleet, hub: Hub, tmp_path: Path) -> None:
    digest = hub.sha256(hub.root / REPO / FILE)
    data = yaml.safe_load(fleet.lab.inventory.read_text())
    data["all"]["vars"] = {**data["all"].get("vars", {}), "rbee_hub_endpoint": hub.url}
    hives = data["all"]["children"]["rbee_hives"]
    declared = hives.get("vars", {}).get("rbee_models") or data["all"]["vars"]["rbee_models"]
    hives["vars"] = {**hives.get("vars", {}), "rbee_models": [*declared, {"id": "once", "reference": REF, "sha256": digest}]}
    where = tmp_path / "site.yml"
    where.write_text(yaml.safe_dump(data))
    done = fleet.lab.playbook("install", inventory=where)
    assert done.returncode == 0, done.stdout[-4000:]
    assert digests(fleet) == dict.fromkeys(NODES, digest)
    asked_once(hub, hub.root / REPO / FILE)
    listed = fleet.lab.ctl("model", "list", "--json").stdout
    for node in NODES:
        ids = {m["id"]: m["reference"] for m in json.loads(listed)["data"]["hosts"][node]["models"]}
        assert ids["once"] == REF
        assert list(ids.values()).count(REF) == 1
    again = fleet.lab.playbook("install", inventory=where)
    assert again.stdout.count("changed=0 ") == len(NODES), again.stdout[-1500:]
    asked_once(hub, hub.root / REPO / FILE)
