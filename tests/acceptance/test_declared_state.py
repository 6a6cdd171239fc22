"""What the inventory declares of workers: made, changed one at a time after a drain, stopped, gone without a trace."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from machines import Done, Fleet
from waiting import until

from rbee_ctl.demo_model import MODEL_ID

RECAP = re.compile(r"^(\w+)\s+: ok=\d+\s+changed=(\d+)\s+unreachable=0\s+failed=0", re.MULTILINE)
NODES = ("lab1", "lab2")
TOKENS = 500


def worker(name: str, **more: Any) -> dict[str, Any]:
    """One more worker of the CPU, small; on a port that no other test's worker gets."""
    ports = {"cpu0-b": 8101, "cpu0-n": 8102, "cpu0-q": 8103}
    small = {"slots": 1, "threads": 1, "context_tokens": 1024}
    return {"name": name, "backend": "cpu", "device": 0, "model": MODEL_ID, "port": ports[name], **small, **more}


class Declared:
    """The fleet with more workers declared than ``site.yml`` gave it."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.fleet, self.lab, self.inventory = fleet, fleet.lab, folder / "inventory.yml"
        token = (self.lab.directory / "state/secrets/fleet-token").read_text().strip()
        self.headers = {"Authorization": f"Bearer {token}"}

    def apply(self, more: dict[str, list[dict[str, Any]]], *, prune: bool = False) -> dict[str, int]:
        """Make the workers what is declared: those of ``site.yml`` and ``more``; returns what changed on each machine."""
        done = self.run(more, prune=prune)
        assert done.returncode == 0, done.stdout[-4000:]
        return {host: int(changed) for host, changed in RECAP.findall(done.stdout)}

    def run(self, more: dict[str, list[dict[str, Any]]], *, prune: bool = False, free_bytes: int | None = None) -> Done:
        """Run ``workers.yml``; ``free_bytes``: what each machine is told to have free."""
        data = yaml.safe_load(self.lab.inventory.read_text())
        for node, host in data["all"]["children"]["rbee_hives"]["hosts"].items():
            host["rbee_workers"] += more.get(node, [])
            if free_bytes is not None:
                host["rbee_preflight_mem_available_bytes"] = free_bytes
        self.inventory.write_text(yaml.safe_dump(data))
        return self.lab.playbook("workers", *(["-e", "rbee_worker_prune=true"] if prune else []), inventory=self.inventory)

    def show(self, node: str, unit: str, *keys: str) -> dict[str, str]:
        shown = self.lab.ssh(node, f"systemctl show {unit} -p {','.join(keys)}").stdout
        return dict(line.split("=", 1) for line in shown.splitlines())

    def pid(self, node: str, name: str) -> int:
        return int(self.show(node, f"rbee-worker@{name}.service", "MainPID")["MainPID"])

    def state(self, node: str, name: str) -> tuple[str, str, str]:
        """Return whether service and socket are active, and whether either is enabled."""
        units = f"rbee-worker@{name}.service rbee-worker@{name}.socket"
        service, socket = self.lab.ssh(node, f"systemctl is-active {units}", check=False).stdout.split()
        return service, socket, str("enabled" in self.lab.ssh(node, f"systemctl is-enabled {units}", check=False).stdout.split())

    def traces(self, node: str, name: str) -> str:
        """Return every file, folder and unit whose name has the instance's."""
        places = "/etc /opt /run /var/lib /var/cache /sys/fs/cgroup/systemd"
        found = f"find {places} -name '*{name}*' 2>/dev/null; systemctl list-units --all --no-legend '*{name}*'"
        return self.lab.ssh(node, f"{found}; systemctl list-unit-files --no-legend '*{name}*'", check=False).stdout

    def registered(self) -> set[str]:
        answer = httpx.get(f"{self.fleet.queen_url}/v1/workers", headers=self.fleet.headers, trust_env=False, timeout=30)
        return {w["id"] for w in answer.json()["workers"]}


class Stream(threading.Thread):
    """A stream of TOKENS tokens from one worker, straight."""

    def __init__(self, declared: Declared, node: str, port: int) -> None:
        super().__init__()
        self.url = f"http://{declared.lab.address(node)}:{port}/v1/inference"
        self.headers, self.lines, self.began = declared.headers, list[str](), threading.Event()
        self.start()
        assert self.began.wait(60), "no token"

    def run(self) -> None:
        body = {"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
        with httpx.stream("POST", self.url, json=body, headers=self.headers, timeout=120, trust_env=False) as answer:
            for line in answer.iter_lines():
                self.lines.append(line)
                if line.startswith("event: token"):
                    self.began.set()


@pytest.fixture
def declared(fleet: Fleet, tmp_path: Path) -> Iterator[Declared]:
    declared = Declared(fleet, tmp_path)
    until(lambda: declared.registered() >= {"lab1-cpu0", "lab2-cpu0"}, "the fleet is up", limit_s=60)
    try:
        yield declared
    finally:
        declared.apply({}, prune=True)


def test_workers_become_what_the_inventory_says_and_nothing_else_is_touched(declared: Declared) -> None:
    began = {"lab1": [worker("cpu0-b")], "lab2": [worker("cpu0-b"), worker("cpu0-n", socket=True), worker("cpu0-q")]}
    declared.apply(began)
    before = {(node, name): declared.pid(node, name) for node in NODES for name in ("cpu0", "cpu0-b")}
    assert all(before.values())
    assert declared.state("lab2", "cpu0-n")[1:] == ("active", "True")
    until(lambda: "lab2-cpu0-q" in declared.registered(), "registered", limit_s=60)
    assert declared.traces("lab2", "cpu0-q")

    changed = worker("cpu0-b", settings={"max_tokens_limit": 1000})
    stopped, gone = worker("cpu0-n", socket=True, state="stopped"), worker("cpu0-q", state="absent")
    stream = Stream(declared, "lab2", changed["port"])
    declared.apply({"lab1": [changed], "lab2": [changed, stopped, gone]})

    # Changed: restarted, after its stream was whole, one in the fleet at a time. The others run on.
    stream.join(120)
    assert sum(line.startswith('data: {"type":"token"') for line in stream.lines) == TOKENS
    assert [line for line in stream.lines if line][-1] == "data: [DONE]"
    for node in NODES:
        assert declared.pid(node, "cpu0") == before[node, "cpu0"]
        assert declared.pid(node, "cpu0-b") not in (0, before[node, "cpu0-b"])
        assert "max_tokens_limit = 1000" in declared.lab.ssh(node, "cat /etc/rbee/workers/cpu0-b.toml").stdout
    # Both machines have the clock of the kernel that they share.
    times = ("ActiveEnterTimestampMonotonic", "ActiveExitTimestampMonotonic")
    first, second = sorted(
        ({k: int(v) for k, v in declared.show(n, "rbee-worker@cpu0-b.service", *times).items()} for n in NODES),
        key=lambda t: t["ActiveExitTimestampMonotonic"],
    )
    assert first["ActiveEnterTimestampMonotonic"] < second["ActiveExitTimestampMonotonic"], "two were away at the same time"
    # Stopped: kept, and nothing starts it. Absent: as if it had never been.
    assert declared.state("lab2", "cpu0-n") == ("inactive", "inactive", "False")
    assert declared.lab.ssh("lab2", "test -f /etc/rbee/workers/cpu0-n.toml").returncode == 0
    assert declared.traces("lab2", "cpu0-q") == ""
    until(lambda: "lab2-cpu0-q" not in declared.registered(), "gone from the registry", limit_s=60)

    present = {"lab1": [changed], "lab2": [changed, worker("cpu0-n", socket=True), worker("cpu0-q", state="present")]}
    declared.apply(present)
    assert declared.state("lab2", "cpu0-n")[1:] == ("active", "True")
    assert declared.state("lab2", "cpu0-q") == ("inactive", "inactive", "True")  # made, for the next start of the hive
    assert declared.apply(present) == {"lab1": 0, "lab2": 0}

    # Limits that it can not live with: the ones before come back, and the worker with them.
    cramped = {**changed, "memory_max": "30M"}
    refused = declared.run({**present, "lab1": [cramped]})
    assert refused.returncode == 2, refused.stdout[-4000:]
    assert declared.show("lab1", "rbee-worker@cpu0-b.service", "ActiveState", "MemoryMax") == {
        "ActiveState": "active",
        "MemoryMax": "infinity",
    }

    declared.apply({}, prune=True)
    assert declared.traces("lab2", "cpu0-n") == declared.traces("lab1", "cpu0-b") == ""
    assert {n: declared.pid(n, "cpu0") for n in NODES} == {n: before[n, "cpu0"] for n in NODES}


def test_workers_that_do_not_fit_together_are_refused_before_one_of_them_starts(declared: Declared) -> None:
    """Each needs 300 MB, 200 where the model is mapped already, and 340 are free: one fits and two do not."""
    before = {n: declared.pid(n, "cpu0") for n in NODES}
    two = {"lab1": [worker("cpu0-b"), worker("cpu0-n")], "lab2": [worker("cpu0-b")]}
    done = declared.run(two, free_bytes=340_000_000)
    assert done.returncode == 2, done.stdout[-4000:]
    refused = re.search(r"worker cpu0-n does not fit here beside cpu0-b.*?\[INSUFFICIENT_RAM\]; next: (.*)", done.stdout)
    assert refused, done.stdout[-4000:]
    assert "in rbee_workers of lab1 (cpu0-n)" in refused[1]
    assert declared.traces("lab1", "cpu0-b") == declared.traces("lab1", "cpu0-n") == ""
    assert declared.pid("lab2", "cpu0-b")
    # What runs is not asked about, however little is free, nor is one whose socket alone is opened.
    kept = {"lab2": [worker("cpu0-b"), worker("cpu0-n", state="present")]}
    done = declared.run(kept, free_bytes=1_000_000)
    assert done.returncode == 0, done.stdout[-4000:]
    assert {n: declared.pid(n, "cpu0") for n in NODES} == before
