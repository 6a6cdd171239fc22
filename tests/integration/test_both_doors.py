"""Every operation of the contract by both doors, rbee-ctl and a job: the same answer, and the same code when it fails.

The table is checked against the contract, so that no operation can be forgotten. What an operation does to a machine is
shown on machines (tests/acceptance, molecule); here is what each of them says of a machine that nobody knows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet import Fleet, events_of

from rbee_serve.contract.operations import OPERATIONS

pytestmark = pytest.mark.integration

GHOST = {"hive_id": "ghost"}
ALIAS = {"alias": "ghost"}
#: operation -> the command, fields of the job (None: it can not fail there), and the code of both.
WRONG: dict[str, tuple[str, dict[str, Any] | None, str]] = {
    "worker_download": ("worker download --node ghost --type cpu", GHOST | {"worker_type": "cpu"}, "NODE_NOT_FOUND"),
    "worker_build": ("worker build --node ghost --type cpu", GHOST | {"worker_type": "cpu"}, "NODE_NOT_FOUND"),
    "worker_binary_list": ("worker binary list --node ghost", GHOST, "NODE_NOT_FOUND"),
    "worker_binary_get": (
        "worker binary get --node here --type rocm",
        {"hive_id": "here", "worker_type": "rocm"},
        "WORKER_BINARY_NOT_FOUND",
    ),
    "worker_binary_delete": (
        "worker binary delete --node ghost --type cpu --yes",
        GHOST | {"worker_type": "cpu"},
        "NODE_NOT_FOUND",
    ),
    "worker_spawn": ("worker start --node ghost --model m", GHOST | {"model": "m"}, "NODE_NOT_FOUND"),
    "worker_process_list": ("worker process list --node ghost", GHOST, "NODE_NOT_FOUND"),
    "worker_process_get": ("worker process get --node ghost --pid 1", GHOST | {"pid": 1}, "NODE_NOT_FOUND"),
    "worker_process_delete": ("worker process delete --node ghost --pid 1 --yes", GHOST | {"pid": 1}, "NODE_NOT_FOUND"),
    "model_download": ("model download --node ghost hf:org/repo", GHOST | {"model": "hf:org/repo"}, "NODE_NOT_FOUND"),
    "model_list": ("model list --node ghost", GHOST, "NODE_NOT_FOUND"),
    "model_get": ("model get --node here ghost", {"hive_id": "here", "id": "ghost"}, "MODEL_NOT_FOUND"),
    "model_delete": ("model delete --node ghost m --yes", GHOST | {"id": "m"}, "NODE_NOT_FOUND"),
    "status": ("--config /nonexistent status", None, "CONFIG_INVALID"),
    "hive_list": ("--inventory /nonexistent hive list", None, "CONFIG_INVALID"),
    "hive_get": ("hive get --node ghost", ALIAS, "NODE_NOT_FOUND"),
    "hive_install": ("setup install --node ghost", ALIAS, "NODE_NOT_FOUND"),
    "hive_uninstall": ("hive uninstall --node ghost --yes", ALIAS, "NODE_NOT_FOUND"),
    "hive_start": ("hive start --node ghost", ALIAS, "NODE_NOT_FOUND"),
    "hive_stop": ("hive stop --node ghost", ALIAS, "NODE_NOT_FOUND"),
    "hive_status": ("hive status --node ghost", ALIAS, "NODE_NOT_FOUND"),
    "hive_refresh_capabilities": ("hive refresh --node ghost", ALIAS, "NODE_NOT_FOUND"),
    "ssh_test": ("hive ssh-test --node ghost", ALIAS, "NODE_NOT_FOUND"),
    "hive_import_ssh": ("hive import-ssh --ssh-config /nonexistent", {"ssh_config_path": "/nonexistent"}, "CONFIG_INVALID"),
    "active_worker_list": ("--config /nonexistent worker list", None, "CONFIG_INVALID"),
    "active_worker_get": ("worker get ghost-cpu0", {"worker_id": "ghost-cpu0"}, "WORKER_NOT_FOUND"),
    "active_worker_retire": ("worker retire ghost-cpu0 --yes", {"worker_id": "ghost-cpu0"}, "WORKER_NOT_FOUND"),
    "infer": ("infer --worker-id ghost-cpu0 --prompt Hi", {"worker_id": "ghost-cpu0", "prompt": "Hi"}, "NO_WORKER_AVAILABLE"),
}
#: operation -> the command and the fields of the job: what both answer is the same.
READING: dict[str, tuple[str, dict[str, Any]]] = {
    "hive_list": ("hive list", {}),
    "hive_get": ("hive get --node here", {"alias": "here"}),
    "model_list": ("model list --node here", {"hive_id": "here"}),
    "model_get": ("model get --node here mine", {"hive_id": "here", "id": "mine"}),
    "worker_binary_list": ("worker binary list --node here", {"hive_id": "here"}),
    "worker_binary_get": ("worker binary get --node here --type cpu", {"hive_id": "here", "worker_type": "cpu"}),
    "active_worker_list": ("worker list", {}),
}


class Doors:
    """A queen with an administrator's key, and rbee-ctl with the same inventory: this machine, called here."""

    def __init__(self, folder: Path, model_path: Path) -> None:
        home = folder / "models/org/repo"
        home.mkdir(parents=True)
        (home / "m.gguf").write_bytes(b"GGUF" + bytes(96))
        entry = {"id": "mine", "reference": "hf:org/repo:m.gguf", "provider": "hf", "name": "m", "path": str(home / "m.gguf")}
        entry |= {"size_bytes": 100, "added_at": "2026-01-01T00:00:00Z", "status": "Ready", "sha256": None, "metadata": {}}
        (home / "metadata.yaml").write_text(json.dumps({"models": [entry]}))
        (folder / "opt/runtimes/cpu/1/bin").mkdir(parents=True)
        (folder / "opt/runtimes/cpu/1/metadata.yaml").write_text("version: 1\n")
        here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        here |= {"rbee_install_path": str(folder / "opt"), "rbee_hive_models_dir": str(folder / "models")}
        (folder / "inventory.yml").write_text(json.dumps({"rbee_hives": {"hosts": {"here": here}}}))
        program = Path(sys.executable).parent / "rbee-ctl"
        self.fleet = Fleet(folder, model_path, {"ctl_command": str(program)})
        (folder / "client.key").touch(0o600)
        (folder / "client.key").write_text(self.fleet.key)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RBEE_")}
        self.environ = inherited | {"HOME": str(folder), "RBEE_INVENTORY": str(folder / "inventory.yml")}
        before = {k: os.environ.get(k) for k in ("HOME", "RBEE_INVENTORY")}
        os.environ |= {k: self.environ[k] for k in before}
        try:
            self.fleet.start_queen()
        finally:
            for key, value in before.items():
                os.environ.pop(key, None)
                if value is not None:
                    os.environ[key] = value
        self.environ |= {"RBEE_QUEEN_URL": self.fleet.queen.url, "RBEE_API_KEY_FILE": str(folder / "client.key")}
        self.program, self.http = str(program), self.fleet.client()

    def ctl(self, command: str) -> dict[str, Any]:
        done = subprocess.run(
            [self.program, *command.split(), "--json"],
            capture_output=True,
            text=True,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            timeout=90,
            check=False,
        )
        envelope: dict[str, Any] = json.loads(done.stdout)
        assert envelope["exit_code"] == done.returncode
        return envelope

    def job(self, operation: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Run a job; returns its state and its last event but narration."""
        job = self.http.post("/v1/jobs", json={"operation": operation, **fields}).json()
        with self.http.stream("GET", job["sse_url"]) as stream:
            events = [e for e in events_of(stream) if e["type"] in ("result", "error")]
        return str(self.http.get(f"/v1/jobs/{job['job_id']}").json()["state"]), events[-1]


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Doors]:
    found = Doors(tmp_path_factory.mktemp("doors"), model_path)
    try:
        yield found
    finally:
        found.http.close()
        found.fleet.close()


def test_no_operation_is_forgotten() -> None:
    assert list(WRONG) == list(OPERATIONS)


@pytest.mark.S82
@pytest.mark.parametrize("operation", WRONG)
def test_it_fails_with_the_same_code_by_both_doors(doors: Doors, operation: str) -> None:
    command, fields, code = WRONG[operation]
    envelope = doors.ctl(command)
    assert (envelope["status"], [e["code"] for e in envelope["errors"]]) == ("error", [code]), envelope
    assert envelope["exit_code"] in (1, 5)
    assert envelope["errors"][0]["hint"]
    if fields is not None:
        state, error = doors.job(operation, fields)
        assert (state, error["code"]) == ("failed", code), error
        assert error["hint"]


@pytest.mark.parametrize("operation", READING)
def test_it_answers_the_same_by_both_doors(doors: Doors, operation: str) -> None:
    command, fields = READING[operation]
    envelope = doors.ctl(command)
    assert envelope["exit_code"] == 0, envelope
    state, event = doors.job(operation, fields)
    assert (state, event["type"]) == ("completed", "result"), event
    for answer in (envelope["data"], event["data"]):
        for host in answer.get("hosts", {}).values():
            host.pop("disk", None)  # others write too
        for machine in [*answer.get("hives", []), answer.get("hive", {})]:
            machine.pop("last_contact", None)  # each door has its own memory of the moment
    assert envelope["data"] == event["data"]


def test_a_job_says_how_it_reached_the_machine(doors: Doors) -> None:
    job = doors.http.post("/v1/jobs", json={"operation": "model_list", "hive_id": "here"}).json()
    with doors.http.stream("GET", job["sse_url"]) as stream:
        modes = [e["human"] for e in events_of(stream) if e.get("action") == "mode"]
    assert [m.partition(":")[0] for m in modes] == ["integrated"]
    assert httpx.get(f"{doors.fleet.queen.url}/health", timeout=60, trust_env=False).status_code == 200
