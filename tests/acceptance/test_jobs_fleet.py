"""Operations on machines by both doors, rbee-ctl and a job of the deployed queen, which has a key to them (SPEC 2).

The third machine, lab3, has another install path (S-86) and is taken through its whole life.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from gguf_files import write_gguf
from hub import Hub
from machines import Done, Fleet, Lab
from secrets_left import files_with
from source_package import GOOD_BACKEND, compiler, source_package
from waiting import until

from rbee_ctl.demo_model import MODEL_ID, default_cache

Answer = dict[str, Any]
WORKER = "lab2-cpu0-op"
#: On lab2 alone, by lab2 alone: pip trusts an index without TLS on its own machine.
INDEX_PORT, INDEX_DIR, GO = 8399, "/root/index", "/run/rbee-test-go"


#: What the hub asks for: known to the inventory and the queen's unit alone.
HUB_TOKEN = "hf_token_of_the_jobs_0123456789"


class Doors:
    """The two ways in: rbee-ctl here, and jobs of the queen on lab1, which has rbee-ctl, an inventory and a key of its own."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.fleet, self.lab, self.folder = fleet, fleet.lab, folder
        self.inventory = folder / "inventory.yml"
        self.http = httpx.Client(base_url=fleet.queen_url, headers=fleet.headers, timeout=300, trust_env=False)

    @property
    def env(self) -> dict[str, str]:
        return {"RBEE_INVENTORY": str(self.inventory)}

    def run(self, *arguments: str) -> Done:
        return self.lab.ctl(*arguments, env=self.env, timeout=300)

    def ctl(self, *arguments: str, code: int = 0) -> Answer:
        """Return the envelope of a command."""
        done = self.run(*arguments, "--json")
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        envelope: Answer = json.loads(done.stdout)
        return envelope

    def job(self, operation: str, *, watch: Callable[[Answer], None] | None = None, **fields: Any) -> tuple[str, list[Answer]]:
        """Run a job to its end; returns its state and all its events. ``watch`` gets each event as it comes."""
        answer = self.http.post("/v1/jobs", json={"operation": operation, **fields})
        assert answer.status_code == 200, answer.text
        job = answer.json()
        with self.http.stream("GET", job["sse_url"]) as stream:
            lines = []
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    lines.append(line.removeprefix("data: "))
                    if watch is not None and lines[-1] != "[DONE]":
                        watch(json.loads(lines[-1]))
        assert lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]]
        assert {e["job_id"] for e in events} == {job["job_id"]}
        return str(self.http.get(f"/v1/jobs/{job['job_id']}").json()["state"]), events

    def job_result(self, operation: str, *, watch: Callable[[Answer], None] | None = None, **fields: Any) -> Answer:
        state, events = self.job(operation, watch=watch, **fields)
        assert state == "completed", events[-3:]
        assert any(e.get("action") == "mode" for e in events) or operation == "infer"
        return next((e["data"] for e in events if e["type"] == "result"), {})

    def job_error(self, operation: str, **fields: Any) -> Answer:
        state, events = self.job(operation, **fields)
        assert (state, events[-1]["type"]) == ("failed", "error"), events[-3:]
        return events[-1]

    def worker(self, worker_id: str = WORKER) -> Answer | None:
        found = {w["id"]: w for w in self.http.get("/v1/workers").json()["workers"]}
        return found.get(worker_id)

    def pid(self, unit: str = "rbee-worker@cpu0-op") -> int:
        return int(self.lab.ssh("lab2", f"systemctl show -p MainPID --value {unit}").stdout)

    def state(self, unit: str = "rbee-worker@cpu0-op") -> str:
        return self.lab.ssh("lab2", f"systemctl is-active {unit}", check=False).stdout.strip()


@pytest.fixture(scope="module")
def hub(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A model hub that the machines reach."""
    with Hub(tmp_path_factory.mktemp("hub"), host=fleet.lab.controller) as found:
        yield found


@pytest.fixture(scope="module")
def doors(fleet: Fleet, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """The fleet with a queen that runs jobs, a third machine and one that nobody can reach; all of it taken back."""
    found = Doors(fleet, tmp_path_factory.mktemp("operations"))
    lab = fleet.lab
    data = yaml.safe_load(lab.inventory.read_text())
    hives = data["all"]["children"]["rbee_hives"]["hosts"]
    worker = {**hives["lab2"]["rbee_workers"][0], "threads": 1}
    hives["lab3"] = {"ansible_host": lab.address("lab3"), "rbee_install_path": "/srv/rbee", "rbee_workers": [worker]}
    hives["lab2"] |= {"rbee_runtime_source": f"http://127.0.0.1:{INDEX_PORT}/simple/", "rbee_hub_endpoint": hub.url}
    hives["lab2"]["rbee_runtime_cmake_args"] = "-DCMAKE_CUDA_ARCHITECTURES=86"
    hives["gone"] = {"ansible_host": "127.0.0.1", "ansible_port": 9, "rbee_workers": []}
    jobs = {"rbee_queen_jobs": True, "rbee_queen_jobs_ssh_key": str(lab.directory / "id"), "rbee_queen_jobs_hub_token": HUB_TOKEN}
    data["all"]["children"]["rbee_queen"]["hosts"]["lab1"] = jobs
    found.inventory.write_text(yaml.safe_dump(data))
    with found.http:
        try:
            lab.machines(3)
            done = lab.playbook("site", "--limit", "all:!gone", inventory=found.inventory)
            assert done.returncode == 0, done.stdout[-5000:]
            until(lambda: found.worker("lab2-cpu0"), "lab2's worker is known again")
            yield found
        finally:
            lab.ssh("lab2", "systemctl stop rbee-worker@cpu0-op; rm -f /etc/rbee/workers/cpu0-op.*", check=False)
            done = lab.playbook("site", "--limit", "lab1")
            assert done.returncode == 0, done.stdout[-5000:]
            left = lab.ssh("lab1", "ls -d /etc/rbee/jobs /opt/rbee/runtimes/ctl /etc/rbee/credentials/jobs-ssh-key", check=False)
            lab.run("down", "lab3")
            assert left.stdout == ""


def test_reading_by_both_doors(doors: Doors) -> None:
    lab = doors.lab
    lab.ssh("lab2", "systemd-run --quiet --unit=decoy bash -c 'exec -a llm-worker sleep 600'")
    try:
        pid = doors.pid("rbee-worker@cpu0")
        for found in (
            doors.ctl("worker", "process", "list", "--node", "lab2")["data"],
            doors.job_result("worker_process_list", hive_id="lab2"),
        ):
            main = next(p for p in found["processes"] if p["role"] == "main")
            assert (main["pid"], main["worker_id"], main["model_id"]) == (pid, "lab2-cpu0", MODEL_ID)
            assert main["uptime_s"] > 0
            assert not [p for p in found["processes"] if "sleep" in p["command"]]
    finally:
        lab.ssh("lab2", "systemctl stop decoy")
    for found in (
        doors.ctl("worker", "process", "get", "--node", "lab2", "--pid", str(pid))["data"],
        doors.job_result("worker_process_get", hive_id="lab2", pid=pid),
    ):
        assert (found["process"]["pid"], found["process"]["unit"]) == (pid, "rbee-worker@cpu0.service")
        assert found["process"]["rss_bytes"] > 10_000_000
    for found in (
        doors.ctl("worker", "binary", "list", "--node", "lab2")["data"],
        doors.job_result("worker_binary_list", hive_id="lab2"),
    ):
        assert "cpu0" in next(r for r in found["hosts"]["lab2"]["runtimes"] if r["current"])["used_by"]
    for found in (
        doors.ctl("worker", "binary", "get", "--node", "lab2", "--type", "cpu-llm-worker")["data"],
        doors.job_result("worker_binary_get", hive_id="lab2", worker_type="cpu-llm-worker"),
    ):
        assert found["hosts"]["lab2"]["runtime"]["path"].startswith("/opt/rbee/runtimes/cpu/")
    for found in (
        doors.ctl("model", "list", "--node", "lab2")["data"],
        doors.job_result("model_list", hive_id="lab2"),
    ):
        assert MODEL_ID in [m["id"] for m in found["hosts"]["lab2"]["models"]]
    for found in (
        doors.ctl("model", "get", "--node", "lab2", MODEL_ID)["data"],
        doors.job_result("model_get", hive_id="lab2", id=MODEL_ID),
    ):
        assert found["hosts"]["lab2"]["model"]["metadata"]["layers"] == 30


def test_what_is_known_without_asking_machines(doors: Doors) -> None:
    for found in (doors.ctl("status")["data"], doors.job_result("status")):
        assert {"lab1", "lab2"} <= {h["name"] for h in found["hives"]}
        assert {"lab1-cpu0", "lab2-cpu0"} <= {w["id"] for w in found["workers"]}
        told = {h["name"]: (h["status"], h["declared"], h["workers"]) for h in found["hives"]}
        assert told["lab2"] == ("up", True, ["lab2-cpu0"])
        assert told["gone"] == ("empty", True, [])
    for found in (doors.ctl("hive", "list")["data"], doors.job_result("hive_list")):
        assert sorted(h["name"] for h in found["hives"]) == ["gone", "lab1", "lab2", "lab3"]
        assert next(h for h in found["hives"] if h["name"] == "lab3")["install_path"] == "/srv/rbee"
    for found in (
        doors.ctl("hive", "refresh", "--node", "lab2")["data"],
        doors.job_result("hive_refresh_capabilities", alias="lab2"),
    ):
        assert found["hosts"]["lab2"]["devices"][0]["id"] == "cpu:0"
    for found in (doors.ctl("hive", "get", "--node", "lab2")["data"], doors.job_result("hive_get", alias="lab2")):
        assert found["hive"]["devices"][0]["id"] == "cpu:0"
    assert str(doors.lab.directory) not in json.dumps(found), "the queen's own inventory has no path of the controller"
    for found in (doors.ctl("hive", "ssh-test", "--node", "lab2")["data"], doors.job_result("ssh_test", alias="lab2")):
        assert found["ok"] is True
    units = doors.ctl("hive", "status", "--node", "lab2")["data"]["hosts"]["lab2"]["hive"]["units"]
    assert all(0 <= u["heartbeat_age_s"] < 60 for u in units), units
    for found in (doors.ctl("hive", "status", "--node", "lab2")["data"], doors.job_result("hive_status", alias="lab2")):
        assert found["hosts"]["lab2"]["hive"]["target"] == "active"
        assert found["hosts"]["lab2"]["hive"]["units"][0]["active_state"] == "active"
    for found in (doors.ctl("worker", "list", "--node", "lab2")["data"], doors.job_result("active_worker_list", hive_id="lab2")):
        assert [w["id"] for w in found["workers"]] == ["lab2-cpu0"]
    for found in (doors.ctl("worker", "get", "lab2-cpu0")["data"], doors.job_result("active_worker_get", worker_id="lab2-cpu0")):
        assert found["worker"]["pid"] == doors.pid("rbee-worker@cpu0")


@pytest.mark.S89
@pytest.mark.S90
@pytest.mark.S17
def test_a_worker_by_both_doors_from_its_start_to_its_removal(doors: Doors) -> None:
    spawn = {"hive_id": "lab2", "model": MODEL_ID, "worker": "cpu-llm-worker", "device": 0, "name": "cpu0-op", "slots": 1}
    made = doors.job_result("worker_spawn", **spawn)["worker"]
    assert made["worker_id"] == WORKER
    same = doors.ctl(
        "worker", "start", "--node", "lab2", "--model", MODEL_ID, "--device", "0", "--name", "cpu0-op", "--slots", "1"
    )
    assert (same["data"]["worker"]["worker_id"], same["data"]["changed"]) == (WORKER, False)
    until(lambda: (doors.worker() or {}).get("status") == "idle", "the worker is idle", limit_s=60)

    health = doors.ctl("workers", "health", "--node", "lab2")["data"]["workers"]
    assert {w["id"]: w["ready"] for w in health} == {"lab2-cpu0": True, WORKER: True}
    for command in (("workers", "health"), ("worker", "list")):
        (error,) = doors.ctl(*command, "--node", "ghost", code=1)["errors"]
        assert (error["code"], error["details"]["known"]) == ("NODE_NOT_FOUND", ["gone", "lab1", "lab2", "lab3"])
    refused = doors.job_error("active_worker_list", hive_id="ghost")
    assert (refused["code"], refused["details"]["known"]) == ("NODE_NOT_FOUND", ["gone", "lab1", "lab2", "lab3"])
    assert doors.job_result("active_worker_list", hive_id="gone")["workers"] == []
    told = doors.run("infer", "--worker-id", WORKER, "--prompt", "Once", "--max-tokens", "4")
    assert (told.returncode, bool(told.stdout)) == (0, True), told.stderr
    state, events = doors.job("infer", worker_id=WORKER, prompt="Once", max_tokens=4)
    tokens = [e for e in events if e["type"] == "token"]
    assert (state, [e["i"] for e in tokens]) == ("completed", [0, 1, 2, 3])
    assert next(e["data"] for e in events if e["type"] == "result")["token_ids"] == [e["id"] for e in tokens]

    # Retired: refused without --yes where nobody can be asked, then never chosen again; twice is once.
    assert doors.run("worker", "retire", WORKER).returncode == 2
    assert doors.ctl("worker", "retire", WORKER, "--yes")["data"]["worker"]["status"] == "retiring"
    assert doors.job_result("active_worker_retire", worker_id=WORKER)["worker"]["status"] == "retiring"
    refused = doors.run("infer", "--worker-id", WORKER, "--prompt", "Once")
    assert refused.returncode != 0, refused.stdout
    until(lambda: doors.state() == "inactive", "the retired worker has ended")

    # Its process, started again on the machine itself and ended for good, by either door.
    doors.lab.ssh("lab2", "systemctl start rbee-worker@cpu0-op")
    restarts = "systemctl show -p NRestarts --value rbee-worker@cpu0-op"
    gone = doors.ctl("worker", "process", "delete", "--node", "lab2", "--pid", str(doors.pid()), "--yes")["data"]["process"]
    assert gone["deleted"] is True
    assert (doors.state(), doors.lab.ssh("lab2", restarts).stdout.strip()) == ("inactive", "0")
    doors.lab.ssh("lab2", "systemctl start rbee-worker@cpu0-op")
    assert doors.job_result("worker_process_delete", hive_id="lab2", pid=doors.pid())["process"]["deleted"] is True
    assert doors.state() == "inactive"

    # Started on the machine itself: known again, and shut down by its id; its neighbour does not notice.
    neighbour = doors.pid("rbee-worker@cpu0")
    doors.lab.ssh("lab2", "systemctl start rbee-worker@cpu0-op")
    until(lambda: (doors.worker() or {}).get("status") == "idle", "the worker is idle", limit_s=60)
    doors.ctl("workers", "shutdown", "--id", WORKER)
    assert (doors.state(), doors.pid("rbee-worker@cpu0")) == ("inactive", neighbour)
    assert doors.run("workers", "shutdown", "--id", "ghost-cpu0").returncode == 1

    # A program that can not run: said with its journal, and how to see more.
    folder = "/etc/systemd/system/rbee-worker@cpu0-op.service.d"
    program = "[Service]\\nExecStart=\\nExecStart=/bin/false\\n"
    doors.lab.ssh("lab2", f"mkdir -p {folder} && printf '{program}' > {folder}/99-broken.conf && systemctl daemon-reload")
    broken = doors.run(
        "worker", "start", "--node", "lab2", "--model", MODEL_ID, "--device", "0", "--name", "cpu0-op", "--slots", "1"
    )
    assert (broken.returncode, "UNIT_START_FAILED" in broken.stderr) == (1, True), broken.stderr
    assert "journalctl -u rbee-worker@cpu0-op" in broken.stderr
    doors.lab.ssh("lab2", f"rm {folder}/99-broken.conf; systemctl daemon-reload; systemctl reset-failed rbee-worker@cpu0-op")

    # Nobody declares it: named with --check, kept without --yes, removed with it.
    assert "cpu0-op" in json.dumps(doors.ctl("worker", "cleanup", "--node", "lab2", "--check")["data"])
    assert doors.run("worker", "cleanup", "--node", "lab2").returncode == 2
    assert doors.lab.ssh("lab2", "ls /etc/rbee/workers").stdout.count("cpu0-op")
    assert "cpu0-op" in json.dumps(doors.ctl("worker", "cleanup", "--node", "lab2", "--yes")["data"])
    assert "cpu0-op" not in doors.lab.ssh("lab2", "ls /etc/rbee/workers").stdout
    assert doors.pid("rbee-worker@cpu0") == neighbour


@pytest.mark.S76
def test_a_job_says_how_many_of_a_machine_s_workers_have_stopped(doors: Doors) -> None:
    """SPEC E-42: "k of n stopped" while it happens; the second worker takes its time until the first has been told."""
    spawn = {"hive_id": "lab2", "model": MODEL_ID, "worker": "cpu", "device": 0, "name": "cpu0-op", "slots": 1}
    assert doors.job_result("worker_spawn", **spawn)["worker"]["worker_id"] == WORKER
    folder, told = "/etc/systemd/system/rbee-worker@cpu0-op.service.d", []
    waits = '[Service]\\nExecStop=/bin/sh -c "until test -e /run/rbee-let-go; do sleep 0.1; done"\\n'
    doors.lab.ssh("lab2", f"mkdir -p {folder} && printf '{waits}' > {folder}/99-slow.conf && systemctl daemon-reload")

    def stopping(event: Answer) -> None:
        if " stopped" in event.get("human", ""):
            told.append(event["human"])
            if "1 of 2 stopped; cpu0-op" in event["human"]:
                doors.lab.ssh("lab2", "touch /run/rbee-let-go")

    try:
        result = doors.job_result("hive_stop", watch=stopping, alias="lab2")["hosts"]["lab2"]
        assert (result["status"], doors.state(), doors.state("rbee-worker@cpu0")) == ("ok", "inactive", "inactive")
        assert [line for line in told if " of 2 stopped" in line][-2:] == [
            "lab2: 1 of 2 stopped; cpu0-op",
            "lab2: 2 of 2 stopped",
        ]
    finally:
        doors.lab.ssh("lab2", f"touch /run/rbee-let-go; rm -rf {folder}; systemctl daemon-reload")
        doors.job_result("hive_start", alias="lab2")
        doors.ctl("worker", "cleanup", "--node", "lab2", "--yes")
        doors.lab.ssh("lab2", "rm -f /run/rbee-let-go")
    until(lambda: (doors.worker("lab2-cpu0") or {}).get("status") == "idle", "lab2's declared worker is back", limit_s=60)


def test_runtimes_that_nobody_uses_are_deleted_by_both_doors(doors: Doors) -> None:
    delete: list[tuple[str, Callable[[], Answer]]] = [
        ("vulkan", lambda: doors.job_result("worker_binary_delete", hive_id="lab2", worker_type="vulkan")),
        ("rocm", lambda: doors.ctl("worker", "binary", "delete", "--node", "lab2", "--type", "rocm", "--yes")["data"]),
    ]
    for kind, act in delete:
        home = f"/opt/rbee/runtimes/{kind}/0-spare"
        doors.lab.ssh("lab2", f"mkdir -p {home}/bin && echo 'version: 0-spare' > {home}/metadata.yaml")
        assert act()["hosts"]["lab2"]["runtime"]["path"] == home
        assert doors.lab.ssh("lab2", f"ls {home}", check=False).returncode != 0


def index(lab: Lab, folder: Path) -> None:
    """Serve on lab2 an index with the wheel of the cache, and with a source package that a compiler makes in a second."""
    packages, compilers = folder / "index/simple/llama-cpp-python", folder / "compiler"
    packages.mkdir(parents=True)
    source_package(packages, GOOD_BACKEND.format(go=GO))
    shutil.copy(next((default_cache() / "wheels").glob("*/llama_cpp_python-*.whl")), packages)
    links = "".join(f'<a href="{p.name}">{p.name}</a>' for p in sorted(packages.iterdir()))
    (packages / "index.html").write_text(f"<html><body>{links}</body></html>")
    compiler(compilers, "/opt/compiler")
    for path, target in ((folder / "index", INDEX_DIR), (compilers, "/opt/compiler")):
        lab.send("lab2", path, target)
    lab.ssh("lab2", "ln -sf /opt/compiler/bin/gcc /opt/compiler/bin/g++ /opt/compiler/bin/make /usr/local/bin/")
    serve = f"python3 -m http.server {INDEX_PORT} --bind 127.0.0.1 --directory {INDEX_DIR}"
    lab.ssh("lab2", f"systemd-run --quiet --unit=test-index {serve}")
    answers = f"python3 -c 'import urllib.request as u; u.urlopen(\"http://127.0.0.1:{INDEX_PORT}\")'"
    until(lambda: lab.ssh("lab2", answers, check=False).returncode == 0, "the index answers")


def test_a_runtime_is_downloaded_and_one_compiled_by_jobs(doors: Doors, tmp_path: Path) -> None:
    """SPEC OP-01 and OP-02 by HTTP: what the inventory names as source, and the compiler heard while it works."""
    lab, said = doors.lab, []

    def compiling(event: Answer) -> None:
        if "gcc -c part" in event.get("human", ""):
            said.append(event["human"])
            if "part0.c" in event["human"]:  # the compile waits behind it
                assert not any("part1.c" in line for line in said)
                lab.ssh("lab2", f"touch {GO}")

    index(lab, tmp_path)
    made = []
    try:
        made.append(doors.job_result("worker_download", hive_id="lab2", worker_type="cpu-llm-worker")["hosts"]["lab2"]["runtime"])
        again = doors.job_result("worker_download", hive_id="lab2", worker_type="cpu")["hosts"]["lab2"]
        assert (again["runtime"]["version"], again["runtime"]["made"]) == (made[0]["version"], False)
        assert made[0]["source"].endswith("/simple/")
        built = doors.job_result("worker_build", watch=compiling, hive_id="lab2", worker_type="cpu-llm-worker")
        made.append(built["hosts"]["lab2"]["runtime"])
        assert [line.rpartition(" ")[2] for line in said] == ["part0.c", "part1.c", "part2.c"]
        assert (made[1]["source"], made[1]["made"]) == ("built here", True)
        kept = ("runtime", "get", "--node", "lab2", "--type", "cpu", "--version", made[1]["version"])
        flags = doors.ctl(*kept)["data"]["hosts"]["lab2"]["runtime"]["build"]["cmake_args"]
        assert {"-DGGML_NATIVE=OFF", "-DCMAKE_CUDA_ARCHITECTURES=86"} <= set(flags)
        listed = doors.job_result("worker_binary_list", hive_id="lab2")["hosts"]["lab2"]["runtimes"]
        assert {m["version"] for m in made} <= {r["version"] for r in listed}
        lab.ssh("lab2", "systemctl stop test-index")
        refused = doors.job_error("worker_download", hive_id="lab2", worker_type="cpu")
        assert (refused["code"], f":{INDEX_PORT}/simple/" in refused["message"]) == ("DOWNLOAD_FAILED", True)
    finally:
        paths = " ".join(f"/opt/rbee/runtimes/cpu/{m['version']}" for m in made)
        lab.ssh("lab2", "systemctl stop test-index", check=False)
        lab.ssh(
            "lab2", f"rm -rf {INDEX_DIR} {GO} /opt/compiler /usr/local/bin/gcc /usr/local/bin/g++ /usr/local/bin/make {paths}"
        )


def test_a_model_is_downloaded_and_deleted_by_jobs(doors: Doors, hub: Hub, tmp_path: Path) -> None:
    """SPEC OP-10 and OP-13 by HTTP; the hub asks for the token that is a credential of the queen's unit (S-24)."""
    hub.behaviour.token = HUB_TOKEN
    hub.add("org/small", "small-Q8_0.gguf", write_gguf(tmp_path / "small-Q8_0.gguf", tensors=8))
    hub.behaviour.bytes_per_s = 2_000_000
    state, events = doors.job("model_download", hive_id="lab2", model="hf:org/small")
    assert state == "completed", events[-3:]
    assert any(" of 8." in e.get("human", "") for e in events if e["type"] == "progress")
    assert f"Bearer {HUB_TOKEN}" in {r.authorization for r in hub.log}
    assert HUB_TOKEN not in json.dumps(events)
    asked = len(hub.downloads)
    assert asked > 0
    result = doors.job_result("model_download", hive_id="lab2", model="hf:org/small:small-Q8_0.gguf")
    model = result["hosts"]["lab2"]["model"]
    assert (len(hub.downloads), model["status"]) == (asked, "Ready"), "what is there causes no traffic"
    listed = doors.ctl("model", "list", "--node", "lab2")["data"]["hosts"]["lab2"]["models"]
    assert model["id"] in [m["id"] for m in listed]
    gone = doors.job_result("model_delete", hive_id="lab2", id=model["id"])["hosts"]["lab2"]
    assert gone["freed_bytes"] > 8_000_000
    assert doors.lab.ssh("lab2", "find /var/lib/rbee/models -path '*org/small*' -type f").stdout == ""
    assert doors.job_error("model_delete", hive_id="lab2", id=model["id"])["code"] == "MODEL_NOT_FOUND"
    in_use = doors.job_error("model_delete", hive_id="lab2", id=MODEL_ID)
    assert (in_use["code"], "cpu0" in in_use["details"]["workers"]) == ("MODEL_IN_USE", True)


def test_two_machines_take_a_model_from_a_third_at_the_same_time(doors: Doors, hub: Hub, tmp_path: Path) -> None:
    """One fetch from the hub, then both transfers at once: their own progress tells when bytes came."""
    hub.add("org/spread", "spread-Q8_0.gguf", write_gguf(tmp_path / "spread-Q8_0.gguf", tensors=8))
    hub.behaviour.token = HUB_TOKEN
    asked = len(hub.downloads)
    data = yaml.safe_load(doors.inventory.read_text())
    limits = {"rbee_hub_endpoint": hub.url, "rbee_hub_token": HUB_TOKEN, "rbee_hub_bytes_per_s": 1_000_000}
    data["all"]["vars"] = {**data["all"].get("vars", {}), **limits}
    slow, nodes = tmp_path / "slow.yml", ("lab1", "lab2", "lab3")
    slow.write_text(yaml.safe_dump(data))
    try:
        done = doors.lab.ctl("-i", str(slow), "model", "download", "hf:org/spread", "--node", ",".join(nodes), timeout=300)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert len(hub.downloads) == asked + 1
        told = [doors.lab.ssh(n, "cat $(ls -t /run/rbee-downloads/*.jsonl | head -n 1)").stdout for n in nodes[1:]]
        lines = [[json.loads(line) for line in text.splitlines()] for text in told]
        times = [[x["at"] for x in ls if x["stage"] == "downloading" and x["bytes_downloaded"]] for ls in lines]
        assert max(t[0] for t in times) < min(t[-1] for t in times), times
    finally:
        for node in nodes:
            doors.lab.ssh(node, "systemctl stop 'rbee-share-*'; rm -rf /var/lib/rbee/models/org/spread", check=False)


def fingerprint(doors: Doors) -> list[str]:
    """What must not change on the machines that nobody asked for."""
    look = "sha256sum /etc/rbee/hive.toml /etc/rbee/workers/cpu0.toml; systemctl show -p MainPID rbee-worker@cpu0"
    return [doors.lab.ssh(n, look).stdout for n in ("lab1", "lab2")]


@pytest.mark.S04
@pytest.mark.S05
@pytest.mark.S16
@pytest.mark.S86
def test_a_machine_to_nothing_and_back_again(doors: Doors) -> None:
    lab, others = doors.lab, fingerprint(doors)
    runtime = (
        "readlink /etc/rbee/workers/cpu0.runtime; readlink -f /proc/$(systemctl show -p MainPID --value rbee-worker@cpu0)/cwd"
    )
    assert lab.ssh("lab3", runtime).stdout.startswith("/srv/rbee/runtimes/cpu/")
    assert lab.ssh("lab3", "ls /opt/rbee", check=False).returncode != 0

    doors.job_result("hive_stop", alias="lab3")
    assert doors.run("hive", "status", "--node", "lab3").returncode == 3
    doors.job_result("hive_start", alias="lab3")
    assert doors.ctl("hive", "stop", "--node", "lab3")["data"]["hosts"]["lab3"]["status"] == "ok"
    assert doors.ctl("hive", "start", "--node", "lab3")["data"]["hosts"]["lab3"]["status"] == "ok"
    assert doors.run("hive", "status", "--node", "lab3").returncode == 0

    assert doors.run("hive", "uninstall", "--node", "lab3").returncode == 2
    doors.job_result("hive_uninstall", alias="lab3")
    left = "systemctl list-unit-files --no-legend 'rbee*'; ls -d /srv/rbee /etc/rbee; id -u rbee"
    assert lab.ssh("lab3", left, check=False).stdout == ""
    assert lab.ssh("lab3", "ls /var/lib/rbee/models").stdout  # models stay
    virgin = doors.run("hive", "start", "--node", "lab3")
    assert (virgin.returncode, "setup install --node lab3" in virgin.stderr) == (1, True), virgin.stderr
    assert "setup install --node lab3" in doors.job_error("hive_start", alias="lab3")["hint"]

    # By a job, from the queen's machine: what it installs was brought there with the queen.
    doors.job_result("hive_install", alias="lab3")
    token = "sha256sum /etc/rbee/credentials/fleet-token"
    assert lab.ssh("lab3", token).stdout == lab.ssh("lab2", token).stdout
    misspelt = doors.folder / "misspelt.yml"
    misspelt.write_text(doors.inventory.read_text().replace("rbee_install_path", "rbee_instal_path"))
    refused = doors.lab.ctl("--inventory", str(misspelt), "apply", "--node", "lab3")
    assert (refused.returncode, "rbee_instal_path" in refused.stderr) == (1, True), refused.stderr
    assert doors.ctl("apply", "--node", "lab3")["data"]["hosts"]["lab3"]["changed"] is True  # its worker
    assert doors.ctl("apply", "--node", "lab3")["data"]["hosts"]["lab3"]["changed"] is False
    done = doors.run("setup", "install", "--node", "lab3")
    assert done.returncode == 0, done.stderr

    doors.ctl("hive", "uninstall", "--node", "lab3", "--yes", "--purge")
    assert lab.ssh("lab3", "ls -d /var/lib/rbee", check=False).returncode != 0
    assert fingerprint(doors) == others


@pytest.mark.S84
def test_rbee_ctl_installs_itself_for_all_users_of_a_machine(doors: Doors) -> None:
    """On lab1, which has an rbee-ctl: its queen's."""
    lab = doors.lab
    ctl = lab.ssh("lab1", "ls /opt/rbee/runtimes/ctl/*/bin/rbee-ctl").stdout.strip()
    refused = lab.ssh("lab1", f"runuser -u nobody -- {ctl} install --system", check=False)
    assert (refused.returncode, "root" in refused.stderr) == (1, True)
    files = "/usr/local/bin/rbee-ctl /usr/local/bin/rbee-queen /etc/rbee/config.toml"
    try:
        assert json.loads(lab.ssh("lab1", f"{ctl} install --system --json").stdout)["data"]["changed"]
        assert lab.ssh("lab1", "readlink /usr/local/bin/rbee-ctl").stdout.strip() == ctl
        assert lab.ssh("lab1", "rbee-ctl version; ls -d /var/lib/rbee/models /etc/rbee/config.toml").returncode == 0
        assert json.loads(lab.ssh("lab1", "rbee-ctl install --system --json").stdout)["data"]["changed"] == []
    finally:
        lab.ssh("lab1", f"rm -rf {files} /var/lib/rbee/state")


@pytest.mark.S91
def test_the_journal_of_a_machine_is_followed_until_ctrl_c(doors: Doors) -> None:
    lab = doors.lab
    command = ["rbee-ctl", "logs", "--node", "lab2", "--follow", "--lines", "1"]
    say = "systemd-run --quiet --wait --unit=rbee-said echo {}"
    lab.ssh("lab2", say.format("before"))  # a unit that the journal knows
    with subprocess.Popen(
        command, env=lab.environment | doors.env, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    ) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline()
        lab.ssh("lab2", say.format("live-line-4711"))
        assert any("live-line-4711" in line for line in logs.stdout)
        logs.send_signal(signal.SIGINT)
        assert logs.wait(60) in (0, 130)
    until(lambda: lab.ssh("lab2", "pgrep journalctl", check=False).stdout == "", "journalctl has ended on the machine")
    assert lab.ctl("logs", "--node", "gone", env=doors.env).returncode == 4
    told = doors.run("logs", "--node", "lab2", "--worker", "cpu0", "--json").stdout.splitlines()
    entries = [json.loads(line) for line in told]
    assert {(e["node"], e["unit"]) for e in entries} <= {("lab2", u) for u in ("rbee-worker@cpu0.service", "init.scope")}
    assert any(e["message"] == "ready" and e["level"] == "info" and e["model"] == MODEL_ID for e in entries)
    gone = doors.run("logs", "--node", "gone", "--json")
    assert (gone.returncode, json.loads(gone.stdout)["errors"][0]["code"]) == (4, "NODE_UNREACHABLE")


#: Files that hold one of the lines on stdin, with their modes, then how many lines of the journal do.
WHERE_SECRETS_ARE = """
umask 077; cat > /opt/looked-for
grep -rlsaF -D skip -f /opt/looked-for /var/lib /var/log /var/tmp /tmp /root /run /dev/shm /etc/rbee /etc/systemd |
  xargs -r stat -c %a:%n
journalctl --no-pager | grep -caF -f /opt/looked-for
rm /opt/looked-for
"""


def test_the_queens_sandbox_and_inventory_hold_no_secret(doors: Doors) -> None:
    lab = doors.lab
    token = (lab.directory / "state/secrets/fleet-token").read_text().strip()
    shown = lab.ssh("lab1", "cat /etc/rbee/jobs/*; systemctl show rbee-queen; ps auxe").stdout
    secrets = (token, HUB_TOKEN, doors.fleet.api_key, (lab.directory / "id").read_text().splitlines()[1])
    for secret in secrets:
        assert secret not in shown
    assert lab.ssh("lab1", "runuser -u nobody -- cat /etc/rbee/jobs/inventory.yml", check=False).returncode != 0
    assert str(lab.directory) not in lab.ssh("lab1", "cat /etc/rbee/jobs/inventory.yml").stdout

    # Nor does what the jobs and commands before this test have left, on the queen's machine, on theirs and here: every byte.
    patterns = doors.folder / "secrets"
    patterns.write_text("".join(f"{secret}\n" for secret in secrets))
    for node in ("lab1", "lab2"):
        with patterns.open("rb") as stdin:
            found = lab.ssh(node, WHERE_SECRETS_ARE, check=False, stdin=stdin).stdout.split()
        *files, journal = found
        modes = {path: mode for mode, _, path in (line.partition(":") for line in files)}
        # Where they are by design: credentials, the queen's reload, and the token that a job installs machines with.
        places = (
            "/etc/rbee/credentials/",
            "/run/credentials/",
            "/root/.ssh/",
            "/run/rbee-queen/",
            "/var/lib/rbee-queen/ctl/secrets/",
        )
        assert [path for path in modes if not path.startswith(places)] == [], node
        assert {mode[1:] for path, mode in modes.items() if not path.startswith("/root/.ssh/")} == {"00"}, modes
        assert journal == "0", node
    home = [lab.directory / "state", Path.home() / ".ansible", *Path("/dev/shm").glob("rbee-ctl-*")]
    kept = {lab.directory / "state/secrets" / name for name in ("fleet-token", "client-key")}
    assert files_with(secrets, home) - kept == set()


#: rbee-fleet.service on the queen's machine, which has Ansible and a key; the inventory names one that outlives the queen's unit.
AS_CONTROLLER = r"""
set -e
home=$(echo /opt/rbee/runtimes/ctl/*/lib/python3*/site-packages/rbee_ctl/content)
cp "$home/systemd/rbee-fleet.service" /etc/systemd/system/
sed 's|/run/credentials/rbee-queen.service|/etc/rbee/credentials|' /etc/rbee/jobs/inventory.yml > /root/fleet.yml
printf 'RBEE_HOME=%s\nRBEE_INVENTORY=/root/fleet.yml\nPATH=%s:/usr/bin:/bin\n' \
  "$home" "$(echo /opt/rbee/runtimes/ctl/*/bin)" > /etc/rbee/fleet.env
systemctl daemon-reload
"""


@pytest.mark.N01
def test_the_fleet_is_a_unit_of_its_controller_also_while_a_machine_is_away(doors: Doors) -> None:
    """The inventory has ``gone``, which nobody can reach."""
    lab = doors.lab
    units = {"lab1": "rbee-queen rbee-hive.target rbee-worker@cpu0", "lab2": "rbee-hive.target rbee-worker@cpu0"}

    def states() -> set[str]:
        return {
            state
            for node, names in units.items()
            for state in lab.ssh(node, f"systemctl is-active {names}", check=False).stdout.split()
        }

    def fleet_unit() -> str:
        return lab.ssh("lab1", "systemctl is-active rbee-fleet", check=False).stdout.strip()

    lab.ssh("lab1", AS_CONTROLLER)
    try:
        lab.ssh("lab1", "systemctl start rbee-fleet", timeout=300)
        assert (fleet_unit(), states()) == ("active", {"active"})

        lab.ssh("lab1", "systemctl stop rbee-fleet", timeout=300)
        assert (fleet_unit(), states()) == ("inactive", {"inactive"})
        said = lab.ssh("lab1", "journalctl --sync; journalctl -u rbee-fleet --no-pager -o cat").stdout
        assert [line for line in said.splitlines() if "gone" in line and "unreachable" in line.lower()]

        lab.ssh(
            "lab1", "echo '- nonsense: [' > /root/broken.yml && sed -i 's|/root/fleet.yml|/root/broken.yml|' /etc/rbee/fleet.env"
        )
        assert lab.ssh("lab1", "systemctl start rbee-fleet", check=False, timeout=300).returncode != 0
        assert (fleet_unit(), states()) == ("failed", {"inactive"})
    finally:
        lab.ssh("lab1", "rm -f /etc/systemd/system/rbee-fleet.service /etc/rbee/fleet.env /root/*.yml; systemctl daemon-reload")
        done = lab.playbook("start")
        assert done.returncode == 0, done.stdout[-3000:]
    until(lambda: doors.worker("lab2-cpu0"), "the fleet is back")
