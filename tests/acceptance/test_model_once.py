"""A model is fetched from the hub once and reaches several machines: by rbee-ctl, by the inventory, by the controller."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import Hub
from machines import ROOT, Fleet
from waiting import until

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
    kill_at(fleet, "lab2", 20_000_000)
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


def kill_at(fleet: Fleet, node: str, size: int) -> str:
    """Have the node kill its own download when that many bytes are there; returns the partial file."""
    partial = f"/var/lib/rbee/models/{REPO}/{FILE}.partial"
    fleet.lab.ssh(
        node,
        f'systemd-run --quiet --collect --unit=test-breaker sh -c \'until [ "$(stat -c %s {partial} 2>/dev/null || echo 0)" '
        f'-gt {size} ]; do sleep 0.05; done; systemctl kill -s KILL "rbee-download-*"\'',
    )
    return partial


@pytest.mark.S40
def test_a_machine_that_can_not_fetch_is_followed_by_the_next(fleet: Fleet, hub: Hub, tmp_path: Path) -> None:
    """The first has a full disk: it alone fails. Then the one that has the model can not share it: that is told."""
    lab, home = fleet.lab, f"/var/lib/rbee/models/{REPO}"
    where = inventory(fleet, tmp_path / "full.yml", rbee_hub_endpoint=hub.url)
    lab.ssh("lab1", f"install -d -o rbee -g rbee {home} && mount -t tmpfs -o size=10m,uid=$(id -u rbee) tmpfs {home}")
    try:
        done = lab.ctl("-i", str(where), "model", "download", REF, "--node", "lab1,lab2", "--json", timeout=240)
    finally:
        lab.ssh("lab1", f"umount {home}")
    assert done.returncode == 3, f"{done.stdout}\n{done.stderr}"
    answer = json.loads(done.stdout)
    assert [(e["code"], e["details"]["to_free_bytes"] > 0) for e in answer["errors"]] == [("INSUFFICIENT_DISK", True)]
    assert {n: h["status"] for n, h in answer["data"]["hosts"].items()} == {"lab1": "failed", "lab2": "ok"}
    assert f"lab1 could not fetch {REF}: " in done.stderr
    assert "[INSUFFICIENT_DISK]; lab2 does it" in done.stderr
    asked_once(hub, hub.root / REPO / FILE)

    lab.ssh("lab2", "systemctl stop 'rbee-share-*'")  # of before, at a port that is free
    taken = inventory(fleet, tmp_path / "taken.yml", rbee_hub_endpoint=hub.url, rbee_model_share_port=22)
    done = lab.ctl("-i", str(taken), "model", "download", REF, "--node", "lab1", timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"lab2 does not give {REF} to lab1: " in done.stderr
    assert "lab1 fetches it itself" in done.stderr
    assert digests(fleet) == dict.fromkeys(NODES, hub.sha256(hub.root / REPO / FILE))
    assert len(hub.downloads) == 2


def test_a_fetcher_that_is_killed_takes_from_the_next_what_it_lacks(fleet: Fleet, hub: Hub, tmp_path: Path) -> None:
    lab = fleet.lab
    slow = inventory(fleet, tmp_path / "slow.yml", rbee_hub_endpoint=hub.url, rbee_hub_bytes_per_s=20_000_000)
    kill_at(fleet, "lab1", 20_000_000)
    done = lab.ctl("-i", str(slow), "model", "download", REF, "--node", "lab1,lab2", timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"lab1 could not fetch {REF}: " in done.stderr
    assert f"{REF} comes from lab2" in done.stderr
    assert f"resuming {FILE}" in done.stderr
    assert digests(fleet) == dict.fromkeys(NODES, hub.sha256(hub.root / REPO / FILE))
    assert len(hub.downloads) == 2


@pytest.mark.S24
@pytest.mark.E04
def test_a_refusal_is_heard_once_by_all_and_a_second_run_joins_the_first(fleet: Fleet, hub: Hub, tmp_path: Path) -> None:
    lab = fleet.lab
    # It takes ten seconds: the second run asks while the first still fetches, also when one of them begins late.
    slow = inventory(fleet, tmp_path / "slow.yml", rbee_hub_endpoint=hub.url, rbee_hub_bytes_per_s=10_000_000)
    hub.behaviour.status, hub.behaviour.error_code = 403, "GatedRepo"
    done = lab.ctl("-i", str(slow), "model", "download", REF, "--node", "lab1,lab2", "--json", timeout=240)
    errors = json.loads(done.stdout)["errors"]
    assert [e["code"] for e in errors] == ["MODEL_ACCESS_DENIED"] * 2
    assert len(hub.log) == 1
    hub.behaviour.status = None

    # At the same moment, for different machines.
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(lab.ctl, "-i", str(slow), "model", "download", REF, "--node", node, timeout=240) for node in NODES]
        both = [run.result() for run in runs]
    assert [done.returncode for done in both] == [0, 0], "\n".join(done.stderr for done in both)
    assert digests(fleet) == dict.fromkeys(NODES, hub.sha256(hub.root / REPO / FILE))
    asked_once(hub, hub.root / REPO / FILE)
    assert sum(f" fetches {REF} for somebody else already" in done.stderr for done in both) == 1


@pytest.mark.E04
def test_runs_of_different_users_in_the_same_moment_ask_the_hub_once(fleet: Fleet, hub: Hub, tmp_path: Path) -> None:
    """SPEC E-04: while the hub has not even answered the first one, the catalogs tell nothing. A second run is for another
    machine and a third for the same one; each has a cache, and so notes, of its own, as a job of the queen has."""
    hub.behaviour.held = held = threading.Event()
    where = inventory(fleet, tmp_path / "held.yml", rbee_hub_endpoint=hub.url, rbee_hub_tries=40, rbee_hub_bytes_per_s=30_000_000)
    with ExitStack() as stack:
        stack.callback(held.set)
        first = stack.enter_context(Run(fleet, where, "lab1", tmp_path / "a"))
        until(lambda: hub.log, "the first run has asked the hub", limit_s=120)
        other = stack.enter_context(Run(fleet, where, "lab2", tmp_path / "b"))
        same = stack.enter_context(Run(fleet, where, "lab1", tmp_path / "c"))
        until(lambda: f"lab1 fetches {REF} for somebody else already" in other.said(), "the second joins", limit_s=120)
        until(lambda: "another run has begun this already" in same.said(), "the third joins", limit_s=120)
        held.set()
        runs = (first, other, same)
        assert [run.wait() for run in runs] == [0, 0, 0], "\n".join(run.said() for run in runs)
    assert all(f"downloading {FILE}" in run.said() for run in runs)
    assert digests(fleet) == dict.fromkeys(NODES, hub.sha256(hub.root / REPO / FILE))
    asked_once(hub, hub.root / REPO / FILE)


class Run:
    """``rbee-ctl model download`` in the background, with a cache of its own; a context manager."""

    def __init__(self, fleet: Fleet, inventory: Path, node: str, cache: Path) -> None:
        self._log = cache.with_suffix(".log")
        environ = fleet.lab.environment | {"RBEE_CACHE": str(cache)}
        command = ["rbee-ctl", "-i", str(inventory), "model", "download", REF, "--node", node]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def said(self) -> str:
        """Return what it has written so far."""
        return self._log.read_text()

    def wait(self) -> int:
        """Return its exit code."""
        return self._process.wait(240)


def test_the_controller_fetches_for_machines_that_see_no_hub(fleet: Fleet, hub: Hub, tmp_path: Path) -> None:
    where = inventory(fleet, tmp_path / "via.yml", rbee_hub_endpoint=hub.url)
    env = {"RBEE_CACHE": str(tmp_path / "cache"), "PATH": fleet.lab.environment["PATH"]}
    command = ("-i", str(where), "model", "download", REF, "--via", "controller", "--json")
    done = fleet.lab.ctl(*command, timeout=240, env=env)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert digests(fleet) == dict.fromkeys(NODES, hub.sha256(hub.root / REPO / FILE))
    asked_once(hub, hub.root / REPO / FILE)
    assert {r.authorization for r in hub.log} == {None}
    told = [f"{n}: copying {FILE}: 98.4 of 98.4 MB (100 %)" in done.stderr for n in NODES]
    assert told == [True, True], done.stderr


def test_a_path_is_each_machine_s_own_file(fleet: Fleet, hub: Hub) -> None:
    """Registered where it is; nobody gives it to the one that lacks it, and no hub is asked."""
    lab, folder = fleet.lab, "/var/lib/rbee/models/own"
    source = "$(find /var/lib/rbee/models/HuggingFaceTB -name '*.gguf' | head -n 1)"
    try:
        lab.ssh("lab1", f"install -d -o rbee -g rbee {folder} && ln {source} {folder}/own-Q4_1.gguf")
        ref = f"file://{folder}/own-Q4_1.gguf"
        done = lab.ctl("model", "download", ref, "--node", "lab1,lab2", "--json", timeout=240)
        answer = json.loads(done.stdout)
        assert (done.returncode, [e["code"] for e in answer["errors"]]) == (3, ["MODEL_FILE_INVALID"]), done.stderr
        found = answer["data"]["hosts"]["lab1"]
        assert (found["status"], found["model"]["path"]) == ("ok", f"{folder}/own-Q4_1.gguf")
        assert hub.log == []
        refused = lab.ctl("model", "download", ref, "--via", "controller")
        assert refused.returncode != 0
        assert "each machine has for itself" in refused.stderr
    finally:
        lab.ssh("lab1", f"rm -rf {folder} /var/lib/rbee/models/local/own-*", check=False)


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
