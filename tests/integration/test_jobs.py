"""Jobs through a real queen: rbee-ctl and Ansible as its children, streams over HTTP (SPEC P-12, CAP-20 to 27)."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet import Fleet, events_of, wait_until
from secrets_left import files_with

from rbee_serve import process_tree

pytestmark = pytest.mark.integration

SECRET = "planted-" + "secret-77c1"
NODES = """
rbee_hives:
  vars: {ansible_connection: local, ansible_python_interpreter: "%s"}
  hosts: {one: , two: , refuses: {wrong: true}}
"""
#: Stands in for playbooks/hive_start.yml: a silent task, then what it says.
START = """
- hosts: rbee_hives
  gather_facts: false
  tasks:
    - name: Start | silent for a while
      ansible.builtin.command: "sleep 2.7"
      changed_when: false
      when: wrong is not defined
    - name: Start | refuse
      rbee_refuse:
      when: wrong is defined
    - name: Start | hand over a secret as roles do
      ansible.builtin.command: cat
      args: {stdin: "{{ lookup('ansible.builtin.env', 'HF_TOKEN') }}"}
      register: handed
      no_log: true
      changed_when: false
    - name: Start | see that it came
      ansible.builtin.assert: {that: handed.stdout | length > 10, quiet: true}
    - name: Start | report
      ansible.builtin.set_fact:
        rbee_result: {target: "active on {{ inventory_hostname }}, failed: [DONE]"}
"""
#: Stands in for playbooks/hive_stop.yml: never ends by itself.
STOP = """
- hosts: rbee_hives
  gather_facts: false
  tasks:
    - name: Stop | hang
      ansible.builtin.command: "sleep 7613"
      changed_when: false
"""
REFUSE = """
from ansible.module_utils.basic import AnsibleModule
module = AnsibleModule(argument_spec={})
module.fail_json(msg="no", rbee_error={"code": "INSUFFICIENT_RAM", "message": "too small", "hint": "buy", "details": {"mb": 1}})
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Fleet]:
    """A queen with client keys, whose rbee-ctl has playbooks of this test's own."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "playbooks/library").mkdir(parents=True)
    (folder / "playbooks/hive_start.yml").write_text(START)
    (folder / "playbooks/hive_stop.yml").write_text(STOP)
    (folder / "playbooks/library/rbee_refuse.py").write_text(REFUSE)
    (folder / "inventory.yml").write_text(NODES % sys.executable)
    script = folder / "ctl.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            from rbee_ctl import cli, content
            content.root = lambda: Path({str(folder)!r})
            sys.exit(cli.main())
            """
        )
    )
    fleet = Fleet(folder, model_path, {"ctl_command": f"{sys.executable} {script}"})
    before = {k: os.environ.get(k) for k in ("RBEE_INVENTORY", "RBEE_STATE_DIR", "HF_TOKEN")}
    os.environ |= {"RBEE_INVENTORY": str(folder / "inventory.yml"), "RBEE_STATE_DIR": str(folder / "state"), "HF_TOKEN": SECRET}
    try:
        fleet.start_queen()
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
    try:
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def queen(fleet: Fleet) -> Iterator[httpx.Client]:
    with fleet.client() as client:
        yield client


def begin(queen: httpx.Client, operation: str, **fields: Any) -> str:
    answer = queen.post("/v1/jobs", json={"operation": operation, **fields})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["sse_url"] == f"/v1/jobs/{body['job_id']}/stream"
    return str(body["job_id"])


def read(queen: httpx.Client, job_id: str) -> list[tuple[float, dict[str, Any]]]:
    """Return the job's events with the times at which they came; [DONE] once, last."""
    with queen.stream("GET", f"/v1/jobs/{job_id}/stream") as response:
        assert response.status_code == 200
        return [(time.monotonic(), event) for event in events_of(response)]


def state(queen: httpx.Client, job_id: str) -> str:
    return str(queen.get(f"/v1/jobs/{job_id}").json()["state"])


def ended(queen: httpx.Client, job_id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        found: dict[str, Any] = queen.get(f"/v1/jobs/{job_id}").json()
        return found if found["finished_at"] else None

    return wait_until(look, f"{job_id} ended", limit_s=120)


@pytest.mark.P12
@pytest.mark.N05
def test_playbooks_of_two_machines_run_side_by_side_and_are_told_live(queen: httpx.Client) -> None:
    one, two = begin(queen, "hive_start", alias="one"), begin(queen, "hive_start", alias="two")
    seen: dict[str, list[tuple[float, dict[str, Any]]]] = {}

    def follow(key: str, job_id: str) -> None:
        seen[key] = read(queen, job_id)

    readers = [threading.Thread(target=follow, args=args) for args in (("a", one), ("b", one), ("c", two))]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
    events = [e for _, e in seen["a"]]
    assert [e for _, e in seen["b"]] == events
    assert {e["job_id"] for e in events} == {one}
    assert {e["job_id"] for _, e in seen["c"]} == {two}
    # Live: also during the silent task something true came.
    assert any(re.search(r"silent for a while: [1-9]\d* s", e.get("human", "")) for e in events)
    assert any(e.get("formatted", "").startswith("[one       ] hive_start     : ") for e in events)
    assert any(e.get("action") == "mode" and e["human"].startswith("local: by Ansible") for e in events)
    result = next(e for e in events if e["type"] == "result")
    assert result["data"]["hosts"]["one"]["target"] == "active on one, failed: [DONE]"  # text that ends no stream
    # Side by side: each began before the other ended.
    jobs = {j["job_id"]: j for j in queen.get("/v1/jobs").json()["jobs"]}
    assert max(jobs[one]["started_at"], jobs[two]["started_at"]) < min(jobs[one]["finished_at"], jobs[two]["finished_at"])
    assert jobs[one]["state"] == jobs[two]["state"] == "completed"
    assert [e for _, e in read(queen, one)] == events  # a late reader


def test_a_failed_playbook_is_a_failed_job_with_its_own_error(queen: httpx.Client) -> None:
    job = ended(queen, begin(queen, "hive_start", alias="refuses"))  # nobody reads
    assert (job["state"], job["error"]["code"], job["error"]["hint"]) == ("failed", "INSUFFICIENT_RAM", "buy")
    assert job["error"]["details"]["mb"] == 1
    last = read(queen, job["job_id"])[-1][1]
    assert (last["type"], last["code"]) == ("error", "INSUFFICIENT_RAM")


def test_an_unknown_machine_fails_with_how_to_add_it(queen: httpx.Client) -> None:
    job = ended(queen, begin(queen, "hive_stop", alias="ghost"))
    assert (job["state"], job["error"]["code"]) == ("failed", "NODE_NOT_FOUND")
    assert "add-node" in job["error"]["hint"]


@pytest.mark.P12
def test_delete_ends_the_playbooks_whole_tree(fleet: Fleet, queen: httpx.Client) -> None:
    job_id = begin(queen, "hive_stop", alias="one")
    waiting = begin(queen, "hive_stop", alias="one")  # the same machine: it waits

    def hanging() -> list[process_tree.Process]:
        below = process_tree.descendants(fleet.queen.pid)
        commands = {p: _command(p.pid) for p in below}
        return below if any("sleep 7613" in c for c in commands.values()) else []

    below = wait_until(hanging, "the playbook's own command runs", limit_s=120)
    assert state(queen, waiting) == "queued"
    assert queen.delete(f"/v1/jobs/{waiting}").status_code == 204
    assert queen.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert [p for p in below if process_tree.alive(p)] == []
    assert process_tree.descendants(fleet.queen.pid) == []
    assert state(queen, job_id) == state(queen, waiting) == "cancelled"
    assert queen.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert [e["type"] for _, e in read(queen, job_id)][-1] == "error"


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def test_reading_needs_no_playbook(fleet: Fleet, queen: httpx.Client) -> None:
    job = ended(queen, begin(queen, "status"))
    assert job["state"] == "completed"
    assert "uptime_s" in job["result"]["queen"]
    events = [e for _, e in read(queen, job["job_id"])]
    assert any(e.get("action") == "mode" and e["human"].startswith("integrated") for e in events)
    assert ended(queen, begin(queen, "active_worker_list"))["result"] == {"workers": []}
    assert ended(queen, begin(queen, "active_worker_get", worker_id="ghost-cpu0"))["error"]["code"] == "WORKER_NOT_FOUND"
    listed = ended(queen, begin(queen, "hive_list"))["result"]["hives"]
    assert [h["name"] for h in listed] == ["one", "two", "refuses"]


def test_hosts_of_an_ssh_configuration_are_taken_over_by_a_job(fleet: Fleet, queen: httpx.Client) -> None:
    inventory = fleet.directory / "inventory.yml"
    before, config = inventory.read_text(), fleet.directory / "ssh_config"
    config.write_text("Host *\n  User ops\nHost three\n  HostName 192.0.2.3\n  Port 2200\n")
    inventory.write_text("# mine\nrbee_hives:\n  hosts:\n    one:\n")
    try:
        first = ended(queen, begin(queen, "hive_import_ssh", ssh_config_path=str(config)))
        again = ended(queen, begin(queen, "hive_import_ssh", ssh_config_path=str(config)))
        after = inventory.read_text()
    finally:
        inventory.write_text(before)
    assert (first["result"]["imported"], again["result"]["imported"]) == (["three"], [])
    assert "ansible_port: 2200" in after
    assert after.startswith("# mine\n")


def test_inference_as_a_job_streams_its_tokens(fleet: Fleet, queen: httpx.Client) -> None:
    worker = fleet.add_worker("lab1")
    fleet.wait_ready()
    job_id = begin(queen, "infer", prompt="Once upon a time", max_tokens=8, temperature=0, worker_id=worker)
    events = [e for _, e in read(queen, job_id)]
    assert [e["i"] for e in events if e["type"] == "token"] == list(range(8))
    result = ended(queen, job_id)["result"]
    assert (result["tokens_out"], result["text"]) == (8, "".join(e["t"] for e in events if e["type"] == "token"))
    assert result["token_ids"] == [e["id"] for e in events if e["type"] == "token"]
    at_once = begin(queen, "infer", prompt="Once upon a time", max_tokens=8, temperature=0, worker_id=worker, stream=False)
    assert not [e for _, e in read(queen, at_once) if e["type"] == "token"]
    other = ended(queen, at_once)["result"]
    assert (other["text"], other["token_ids"]) == (result["text"], result["token_ids"])
    long = begin(queen, "infer", prompt="Once upon a time", max_tokens=900, temperature=0, worker_id=worker)
    wait_until(lambda: queen.get(f"/v1/jobs/{long}").json()["events"] > 5, "tokens come")
    assert queen.delete(f"/v1/jobs/{long}").status_code == 204
    assert state(queen, long) == "cancelled"
    wait_until(lambda: fleet.records()[worker]["slots_available"] == 2, "the slot is free again")
    service = fleet.workers[worker]
    wait_until(
        lambda: any("CANCEL" in line.get("outcome", "") for line in service.lines), "the worker has ended it before its end"
    )


def test_wrong_jobs_are_refused_at_once(fleet: Fleet, queen: httpx.Client) -> None:
    for body, status, code in (
        ({"operation": "fly"}, 400, "INVALID_REQUEST"),
        ({"operation": "hive_start", "alias": "a;b"}, 400, "INVALID_REQUEST"),
        ({"operation": "worker_process_get", "hive_id": "one"}, 400, "INVALID_REQUEST"),
    ):
        answer = queen.post("/v1/jobs", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    for method, path in (("GET", "/v1/jobs/job-0"), ("GET", "/v1/jobs/job-0/stream"), ("DELETE", "/v1/jobs/job-0")):
        answer = queen.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "JOB_NOT_FOUND")
    assert httpx.post(f"{fleet.queen.url}/v1/jobs", json={"operation": "status"}, timeout=60, trust_env=False).status_code == 401


def test_no_secret_in_any_stream_and_none_left_behind(fleet: Fleet, queen: httpx.Client) -> None:
    everything = json.dumps([read(queen, j["job_id"]) for j in queen.get("/v1/jobs").json()["jobs"]]) + fleet.queen.log
    for secret in (SECRET, fleet.key, fleet.token):
        assert secret not in everything
    # Every byte that the jobs have left: state and fact cache, inventory, Ansible's folders, also of other runs.
    scratch = [p for base in ("/dev/shm", "/tmp") for p in Path(base).glob("rbee-ctl-*")]
    roots = [fleet.directory, Path.home() / ".ansible", *scratch]
    assert (fleet.directory / "state").is_dir()
    assert files_with([SECRET], roots) == set()
    assert {p.name for p in files_with([fleet.key, fleet.token], roots)} == {"fleet-token"}
