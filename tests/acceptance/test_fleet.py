"""A deployed fleet on booted machines: what site.yml promises, what systemd does, what the queen makes of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from machines import ROOT, Fleet, Lab
from secrets_left import files_with
from waiting import until

from rbee_ctl.demo_model import MODEL_ID
from tests.repeated_calls import Caller

RECAP = re.compile(r"^(\w+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)
MAIN_PID = "systemctl show -p MainPID --value rbee-worker@cpu0"


@pytest.fixture
def queen(fleet: Fleet) -> Iterator[httpx.Client]:
    """A client of the queen, once both workers are idle."""
    with httpx.Client(base_url=fleet.queen_url, headers=fleet.headers, timeout=60, trust_env=False) as client:
        until(lambda: {"lab1-cpu0", "lab2-cpu0"} <= idle(client), "both workers idle before the test")
        yield client


def idle(queen: httpx.Client) -> set[str]:
    """Ids of the workers that take requests; empty while the queen is away."""
    try:
        return {w["id"] for w in queen.get("/v1/workers", params={"state": "idle"}).json()["workers"]}
    except httpx.TransportError:
        return set()


def lives(queen: httpx.Client, worker_id: str, pid: int) -> bool:
    """Say whether this very process takes requests."""
    found = queen.get("/v1/workers", params={"state": "idle"}).json()["workers"]
    return any((w["id"], w["pid"]) == (worker_id, pid) for w in found)


def recap(text: str) -> dict[str, dict[str, int]]:
    """Return the play recap: host -> changed, unreachable, failed."""
    return {m[1]: {"changed": int(m[3]), "unreachable": int(m[4]), "failed": int(m[5])} for m in RECAP.finditer(text)}


def tokens_of_seconds(queen: httpx.Client, seconds: float) -> int:
    """Return how many tokens a stream takes about so long for, as busy as this machine is: for what is done meanwhile."""
    body = {"model": MODEL_ID, "prompt": "Once", "max_tokens": 50, "ignore_eos": True, "stream": False}
    took_s = float(queen.post("/v1/inference", json=body).json()["duration_ms"]) / 1000
    return max(50, min(2000, round(50 / took_s * seconds)))


def main_pids(lab: Lab) -> dict[str, str]:
    """Main process of cpu0 on both machines."""
    return {n: lab.ssh(n, MAIN_PID).stdout.strip() for n in ("lab1", "lab2")}


# --- site.yml -------------------------------------------------------------------------------------------------------


@pytest.mark.N09
def test_second_run_of_the_site_changes_nothing_and_needs_no_rbee_ctl(fleet: Fleet, tmp_path: Path) -> None:
    """Ansible's interpreter finds a package rbee_ctl that refuses to be imported: nothing the site runs imports it."""
    trap = tmp_path / "rbee_ctl"
    trap.mkdir()
    (trap / "__init__.py").write_text("raise ImportError('site.yml must not need rbee_ctl')\n")
    assert fleet.lab.command([sys.executable, "-P", "-c", "import rbee_ctl"], env={"PYTHONPATH": str(tmp_path)}).returncode == 1

    argv = ["ansible-playbook", "-i", str(fleet.lab.inventory), str(ROOT / "site.yml")]
    done = fleet.lab.command(argv, timeout=600, env={"PYTHONPATH": str(tmp_path)})

    assert done.returncode == 0, done.stdout[-3000:]
    assert {host: r["changed"] for host, r in recap(done.stdout).items()} == {"lab1": 0, "lab2": 0}


@pytest.mark.N09
def test_check_mode_on_a_virgin_machine_passes_and_touches_nothing(fleet: Fleet, tmp_path: Path) -> None:
    lab = fleet.lab
    lab.machines(3)
    inventory = lab.inventory_of(tmp_path / "inventory.yml", ["lab3"])
    text = inventory.read_text().replace(str(lab.directory / "state"), str(tmp_path / "state"))
    inventory.write_text(text)
    # Ansible's own folder for its temporary files is all that may appear.
    state = (
        "find /etc /opt /usr /var/lib /root -xdev -not -path '/root/.ansible*' -type f -exec sha256sum {} + "
        "| sort | sha256sum; getent passwd | sha256sum; systemctl list-unit-files --no-legend | sha256sum"
    )
    try:
        before = lab.ssh("lab3", state).stdout
        done = lab.playbook("site", "--check", "--diff", inventory=inventory)
        after = lab.ssh("lab3", state).stdout
    finally:
        lab.run("down", "lab3")

    assert done.returncode == 0, done.stdout[-3000:]
    assert recap(done.stdout)["lab3"]["changed"] > 5
    assert after == before
    assert not (tmp_path / "state").exists()


@pytest.mark.N09
def test_one_machine_away_stops_nobody_else_and_is_told(fleet: Fleet, tmp_path: Path) -> None:
    fleet.lab.partition("lab2")
    try:
        done = fleet.lab.playbook("site")
        status = fleet.lab.ctl("hive", "status")
    finally:
        fleet.lab.heal("lab2")

    assert done.returncode != 0
    assert recap(done.stdout)["lab1"] == {"changed": 0, "unreachable": 0, "failed": 0}
    assert recap(done.stdout)["lab2"]["unreachable"] == 1
    assert status.returncode == 4, status.stderr
    assert re.search(r"lab2.*(unreachable|not be reached|timed out|no answer)", status.stdout + status.stderr, re.IGNORECASE)


def test_status_of_an_unreachable_machine_is_one_clear_line_and_exit_code_4(fleet: Fleet) -> None:
    fleet.lab.partition("lab2")
    try:
        done = fleet.lab.ctl("hive", "status", "--node", "lab2", "--json")
    finally:
        fleet.lab.heal("lab2")

    report = json.loads(done.stdout)
    assert (done.returncode, report["exit_code"]) == (4, 4)
    (error,) = report["errors"]
    assert error["host"] == "lab2"
    assert error["code"] in ("SSH_TIMEOUT", "NODE_UNREACHABLE", "CONNECTION_TIMEOUT")


def test_a_misspelt_variable_is_refused_by_name(fleet: Fleet, tmp_path: Path) -> None:
    inventory = fleet.lab.inventory_of(tmp_path / "inventory.yml", ["lab1", "lab2"], rbee_worker_instnces=[])

    done = fleet.lab.playbook("site", inventory=inventory)

    assert done.returncode != 0
    assert "unknown variable rbee_worker_instnces on lab1" in done.stdout
    assert {r["changed"] for r in recap(done.stdout).values()} == {0}


def test_a_misspelt_key_of_a_worker_is_refused_by_name(fleet: Fleet, tmp_path: Path) -> None:
    inventory = fleet.lab.inventory_of(tmp_path / "inventory.yml", ["lab1", "lab2"])
    inventory.write_text(inventory.read_text().replace("model: smollm2", "modle: smollm2", 1))

    done = fleet.lab.playbook("site", inventory=inventory)

    assert done.returncode != 0
    assert "modle" in done.stdout


# --- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.P04
@pytest.mark.N04
@pytest.mark.N12
def test_the_worker_is_a_true_unit_with_llama_cpp_in_it(fleet: Fleet, queen: httpx.Client) -> None:
    show = "systemctl show rbee-worker@cpu0 -p Type -p PartOf -p WatchdogUSec -p User -p ControlGroup -p NotifyAccess"

    properties = dict(line.split("=", 1) for line in fleet.lab.ssh("lab1", show).stdout.splitlines())

    assert properties["Type"] == "notify"
    assert "rbee-hive.target" in properties["PartOf"]
    assert properties["WatchdogUSec"] == "30s"
    assert properties["User"] == "rbee-cpu0"
    maps = "for p in $(systemctl show -p MainPID --value rbee-worker@cpu0 | xargs -I{} pgrep -P {}); do cat /proc/$p/maps; done"
    assert "libllama" in fleet.lab.ssh("lab1", maps).stdout


def test_no_start_has_to_compile_anything(fleet: Fleet) -> None:
    """No account that runs a runtime may write there: what is not bytecode when it is installed never will be."""
    lacking = """python3 - <<'X'
from pathlib import Path

sources = [p for p in Path("/opt/rbee/runtimes").rglob("*.py") if "site-packages" in p.parts]
print(len(sources), *(p for p in sources if not list(p.parent.glob(f"__pycache__/{p.stem}.cpython-*.pyc"))))
X"""
    count, *files = fleet.lab.ssh("lab1", lacking, timeout=300).stdout.split()
    assert (int(count) > 100, files) == (True, [])


@pytest.mark.P05
@pytest.mark.N01
@pytest.mark.N11
def test_stopping_the_hive_ends_its_workers_and_starting_it_brings_the_same_back(fleet: Fleet, queen: httpx.Client) -> None:
    lab = fleet.lab
    enabled = lab.ssh("lab2", "ls /etc/systemd/system/rbee-hive.target.wants").stdout
    address = f"http://{lab.address('lab2')}:8001/health"

    lab.ssh("lab2", "systemctl stop rbee-hive.target")

    # It returns when all is over, and within the drain's time: what takes longer is killed, and its result is not success.
    assert lab.ssh("lab2", "systemctl show -p Result -p ExecMainStatus --value rbee-worker@cpu0").stdout.split() == [
        "success",
        "0",
    ]
    assert lab.ssh("lab2", "pgrep -f [/]opt/rbee -c", check=False).stdout.strip() == "0"
    assert lab.ssh("lab2", "systemctl is-active rbee-worker@cpu0", check=False).stdout.strip() == "inactive"
    with pytest.raises(httpx.ConnectError):
        httpx.get(address, trust_env=False)
    until(lambda: "lab2-cpu0" not in idle(queen), "gone from the registry")
    assert "lab1-cpu0" in idle(queen)
    # The queen knows from the inventory that it should be there.
    hive = queen.get("/v1/hives/lab2").json()
    assert (hive["status"], hive["declared"], hive["address"], hive["workers"]) == ("silent", True, lab.address("lab2"), [])
    assert [(w["id"], w["status"]) for w in hive["declared_workers"]] == [("lab2-cpu0", None)]
    # Nothing is left that could revive it: no waiting restart, no job, no socket, no timer.
    assert lab.ssh("lab2", "systemctl show -p SubState --value rbee-worker@cpu0").stdout.strip() == "dead"
    for waiting in ("list-jobs", "list-sockets 'rbee*'", "list-timers 'rbee*'"):
        assert "rbee" not in lab.ssh("lab2", f"systemctl --no-legend {waiting}").stdout, waiting

    lab.ssh("lab2", "systemctl start rbee-hive.target")

    until(lambda: "lab2-cpu0" in idle(queen), "back in the registry")
    assert lab.ssh("lab2", "ls /etc/systemd/system/rbee-hive.target.wants").stdout == enabled
    assert httpx.get(address, trust_env=False).status_code == 200


@pytest.mark.P15
@pytest.mark.N11
def test_a_killed_worker_is_restarted_once_and_routed_to_again(fleet: Fleet, queen: httpx.Client) -> None:
    lab = fleet.lab
    before = int(lab.ssh("lab2", "systemctl show -p NRestarts --value rbee-worker@cpu0").stdout)
    old = lab.ssh("lab2", MAIN_PID).stdout.strip()

    lab.ssh("lab2", f"kill -9 {old}")

    until(lambda: lab.ssh("lab2", MAIN_PID).stdout.strip() not in ("0", old), "restarted by systemd")
    # For up to 30 s the registry may still show the process that is no more: wait for the new one.
    until(lambda: lives(queen, "lab2-cpu0", int(lab.ssh("lab2", MAIN_PID).stdout)), "the new process in the registry")
    assert int(lab.ssh("lab2", "systemctl show -p NRestarts --value rbee-worker@cpu0").stdout) == before + 1
    answer = queen.post("/v1/inference", json={"prompt": "x", "max_tokens": 2, "worker_id": "lab2-cpu0", "stream": False})
    assert (answer.status_code, answer.headers["x-rbee-worker"]) == (200, "lab2-cpu0")


def test_a_stream_goes_on_elsewhere_when_its_worker_is_killed(fleet: Fleet, queen: httpx.Client) -> None:
    body = {"model": MODEL_ID, "prompt": "Once upon a time", "max_tokens": 200, "temperature": 0.8, "seed": 7, "ignore_eos": True}
    before = main_pids(fleet.lab)
    reference = queen.post("/v1/inference", json={**body, "stream": False}).json()
    tokens: list[dict[str, Any]] = []
    victim = None

    with queen.stream("POST", "/v1/inference", json=body) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["type"] == "token":
                tokens.append(event)
            if len(tokens) == 5 and victim is None:
                victim = stream.headers["x-rbee-worker"].split("-")[0]
                fleet.lab.ssh(victim, f"kill -9 $({MAIN_PID})")
            assert event["type"] != "error", event

    assert [t["i"] for t in tokens] == list(range(200))
    assert [t["id"] for t in tokens] == reference["token_ids"]
    assert "".join(t["t"] for t in tokens) == reference["text"]
    assert victim is not None
    until(lambda: main_pids(fleet.lab)[victim] not in ("0", before[victim]), "restarted by systemd")
    # The next test must not be given the process that is no more.
    until(lambda: lives(queen, f"{victim}-cpu0", int(main_pids(fleet.lab)[victim])), "the new process in the registry")


def cut_off_in_the_middle(
    fleet: Fleet, queen: httpx.Client, **request: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], float]:
    """Ask for a seeded stream at lab2 and take lab2 off the network after five tokens; returns an undisturbed answer to the
    same, the events, and how long the longest silence after the cut was. Connects lab2 again."""
    body = {"model": MODEL_ID, "prompt": "Once upon a time", "max_tokens": 200, "temperature": 0.8, "seed": 7, "ignore_eos": True}
    reference = queen.post("/v1/inference", json={**body, "stream": False}).json()
    events: list[dict[str, Any]] = []
    cut, silence = 0.0, 0.0
    with contextlib.ExitStack() as stack:
        # The least busy one is asked: lab2 as soon as lab1 has as many as it has slots, if not earlier.
        for _ in range(5):
            stream = stack.enter_context(queen.stream("POST", "/v1/inference", json=body | request))
            if stream.headers["x-rbee-worker"] == "lab2-cpu0":
                break
        assert stream.headers["x-rbee-worker"] == "lab2-cpu0"
        stack.callback(fleet.lab.heal, "lab2")
        last = 0.0
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
                now = time.monotonic()
                silence, last = max(silence, now - last if cut else 0.0), now
            if not cut and sum(e["type"] == "token" for e in events) == 5:
                fleet.lab.partition("lab2")
                cut = last = time.monotonic()
        assert line == "" or line == "data: [DONE]"
    until(lambda: {"lab1-cpu0", "lab2-cpu0"} <= idle(queen), "lab2 is back", limit_s=60)
    return reference, events, silence


@pytest.mark.S56
def test_a_stream_whose_worker_is_cut_off_the_network_goes_on_elsewhere(fleet: Fleet, queen: httpx.Client) -> None:
    reference, events, silence = cut_off_in_the_middle(fleet, queen)

    tokens = [e for e in events if e["type"] == "token"]
    assert [t["i"] for t in tokens] == list(range(200))
    assert [t["id"] for t in tokens] == reference["token_ids"]
    assert [(e["mode"], e["worker_id"]) for e in events if e["type"] == "resumed"] == [("exact", "lab1-cpu0")]
    assert events[-1]["type"] == "end"
    assert silence < 30, "the cut was found by keep-alive (5 s), and not by the silence of the stream (60 s)"


@pytest.mark.S56
def test_a_stream_that_nobody_may_go_on_with_ends_with_the_reason_and_its_slot_is_free_again(
    fleet: Fleet, queen: httpx.Client
) -> None:
    # By name: a worker that was cut off a moment ago is otherwise given requests last.
    reference, events, silence = cut_off_in_the_middle(fleet, queen, failover="off", node="lab2")

    tokens = [e["id"] for e in events if e["type"] == "token"]
    assert 5 <= len(tokens) < 200
    assert tokens == reference["token_ids"][: len(tokens)]
    assert (events[-1]["type"], events[-1]["code"], events[-1]["tokens_out"]) == ("error", "WORKER_CRASHED", len(tokens))
    assert events[-1]["hint"]
    assert silence < 30

    def all_free() -> bool:
        found = queen.get("/v1/workers/lab2-cpu0").json()
        return bool(found["slots_available"] == found["slots_total"])

    until(all_free, "the worker has let go of the stream", limit_s=60)


def test_a_client_key_comes_and_goes_without_costing_a_stream(fleet: Fleet, queen: httpx.Client) -> None:
    def asks(key: str, **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        wanted = {"prompt": "x", "max_tokens": 1, "stream": False, **body}
        return httpx.post(f"{fleet.queen_url}/v1/inference", json=wanted, headers=headers, timeout=60, trust_env=False)

    pid = "systemctl show -p MainPID --value rbee-queen"
    before = fleet.lab.ssh("lab1", pid).stdout
    body = {"model": MODEL_ID, "prompt": "Once", "max_tokens": 150, "ignore_eos": True}
    with queen.stream("POST", "/v1/inference", json=body) as stream:
        lines = stream.iter_lines()
        assert any('"type":"token"' in line for line in lines)

        made = fleet.lab.ctl("key", "create", "guest", "--model", "smollm2*", "--expires", "1d")
        assert made.returncode == 0, made.stderr
        key = made.stdout.strip()
        until(lambda: asks(key, model=MODEL_ID).status_code == 200, "the new key opens")
        assert asks(key, model="other").status_code == 403
        assert json.loads(fleet.lab.ctl("key", "list", "--json").stdout)["data"]["keys"][1]["name"] == "guest"
        unasked = fleet.lab.ctl("key", "revoke", "guest")
        assert (unasked.returncode, asks(key, model=MODEL_ID).status_code) == (2, 200)

        assert fleet.lab.ctl("key", "revoke", "guest", "--yes").returncode == 0
        until(lambda: asks(key, model=MODEL_ID).status_code == 401, "the revoked key is refused")
        rest = list(lines)

    assert any('"tokens_out":150' in line for line in rest), "the stream that ran meanwhile is whole"
    assert fleet.lab.ssh("lab1", pid).stdout == before, "the queen was not restarted"


def test_a_restarted_queen_costs_no_worker_no_stream_and_refuses_nobody(fleet: Fleet, queen: httpx.Client) -> None:
    before = main_pids(fleet.lab)
    count = tokens_of_seconds(queen, 8)
    body = {"model": MODEL_ID, "prompt": "Once", "max_tokens": count, "ignore_eos": True}
    short = {"model": MODEL_ID, "prompt": "x", "max_tokens": 1, "stream": False}
    caller = Caller(f"{fleet.queen_url}/v1/inference", json=short, headers=fleet.headers)
    with caller, queen.stream("POST", "/v1/inference", json=body) as stream:
        lines = stream.iter_lines()
        assert any('"type":"token"' in line for line in lines)
        fleet.lab.ssh("lab1", "systemctl --no-block restart rbee-queen")
        state = "systemctl show -p ActiveState --value rbee-queen"
        until(lambda: "deactivating" in fleet.lab.ssh("lab1", state).stdout, "the queen waits for the stream")
        assert any(f'"tokens_out":{count}' in line for line in lines), "the stream that ran meanwhile is whole"
        # As agents do: the next request by the same client, at once.
        asked = queen.post("/v1/inference", json=short, timeout=60)
        assert asked.status_code == 200, asked.text
    assert (caller.failed, set(caller.answers)) == ([], {200})

    fleet.lab.ssh("lab1", "systemctl stop rbee-queen")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{fleet.queen_url}/health", timeout=30, trust_env=False)
    fleet.lab.ssh("lab1", "systemctl start rbee-queen")

    # One heartbeat interval of 10 s at most, and the time to beat; two are 16 s at least.
    until(lambda: {"lab1-cpu0", "lab2-cpu0"} <= idle(queen), "registry full again", limit_s=15)
    assert main_pids(fleet.lab) == before


@pytest.mark.S29
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        ("rm -f /var/lib/rbee/models/test/bad.gguf", "No such file"),
        ("head -c 4096 /dev/zero > /var/lib/rbee/models/test/bad.gguf", "GGUF"),
    ],
)
def test_a_bad_model_file_fails_the_unit_with_path_and_reason_and_no_restarts(fleet: Fleet, make: str, reason: str) -> None:
    lab, unit, path = fleet.lab, "rbee-worker@cpu0-x.service", "/var/lib/rbee/models/test/bad.gguf"
    settings = "/etc/rbee/workers/cpu0-x.toml"
    lab.ssh(
        "lab2", f"mkdir -p /var/lib/rbee/models/test && chown rbee /var/lib/rbee/models/test; {make}; chown -f rbee {path}; true"
    )
    sed = f"sed -e 's,^name.*,name = \"cpu0-x\",' -e 's,^port.*,port = 8055,' -e 's,^model_path.*,model_path = \"{path}\",'"
    lab.ssh("lab2", f"{sed} -e '/sha256/d' -e 's,:8001,:8055,' /etc/rbee/workers/cpu0.toml > {settings} && chgrp rbee {settings}")
    lab.ssh(
        "lab2",
        f"ln -sfn $(readlink /etc/rbee/workers/cpu0.runtime) /etc/rbee/workers/cpu0-x.runtime; systemctl start {unit}",
        check=False,
    )
    try:
        until(lambda: lab.ssh("lab2", f"systemctl is-failed {unit}", check=False).stdout.strip() == "failed", "unit failed")
        status = lab.ssh("lab2", f"journalctl --sync; systemctl status --no-pager {unit}", check=False).stdout
        assert path in status
        assert reason in status
        assert lab.ssh("lab2", f"systemctl show -p NRestarts -p ExecMainStatus {unit}").stdout.split() == [
            "NRestarts=0",
            "ExecMainStatus=78",
        ]
    finally:
        lab.ssh(
            "lab2", f"systemctl reset-failed {unit}; rm -rf {settings} /etc/rbee/workers/cpu0-x.runtime /var/lib/rbee/models/test"
        )


# --- tokens ---------------------------------------------------------------------------------------------------------

#: Reference: the plain high-level class of llama-cpp-python, in a process of its own, same file, same CPU variant. Its
#: completion call goes beyond max_tokens to end a character; generate() is the same loop without that.
DIRECT = """
import itertools, json, sys, llama_cpp, llama_cpp.llama_cpp as bindings
from rbee_serve.worker.engine.libs import load_cpu_variant
load_cpu_variant(bindings)
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_batch=128, n_ubatch=128, n_threads=1, flash_attn=True, verbose=False)
for prompt, count in json.loads(sys.argv[2]):
    model.reset()
    tokens = model.generate(model.tokenize(prompt.encode()), temp=0.0)
    ids = list(itertools.islice(itertools.takewhile(lambda t: t != model.token_eos(), tokens), count))
    print(json.dumps([ids, model.detokenize(ids).decode(errors="ignore")]))
"""
CASES = [
    ["Once upon a time", 60],
    ["The capital of France is", 12],
    ["def fibonacci(n):", 80],
    ["Bienen 🐝 und 蜂蜜", 33],
    ["A", 1],
]


def test_greedy_text_equals_llama_cpp_itself(fleet: Fleet, queen: httpx.Client, model_path: Path) -> None:
    argv = [sys.executable, "-c", DIRECT, str(model_path), json.dumps(CASES)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    direct = [json.loads(line) for line in done.stdout.splitlines()]

    body = {"model": MODEL_ID, "temperature": 0, "stream": False}
    answers = [queen.post("/v1/inference", json={**body, "prompt": p, "max_tokens": n}).json() for p, n in CASES]

    assert [[a["token_ids"], a["text"]] for a in answers] == direct
    assert [len(a["token_ids"]) for a in answers] == [a["tokens_generated"] for a in answers]


def test_tokens_come_as_they_are_made(queen: httpx.Client) -> None:
    body = {"model": MODEL_ID, "prompt": "Once upon a time", "max_tokens": 80, "temperature": 0, "ignore_eos": True}
    times = []

    with queen.stream("POST", "/v1/inference", json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith('data: {"type":"token"'):
                times.append(time.monotonic())

    assert len(times) == 80
    assert times[0] < times[-1] - 0.1
    assert sum(b > a for a, b in itertools.pairwise(times)) > 60


def test_ten_requests_at_once_use_both_workers(fleet: Fleet, queen: httpx.Client) -> None:
    answers: list[httpx.Response] = []
    body = {"model": MODEL_ID, "prompt": "Hello", "max_tokens": 16, "temperature": 0, "stream": False}

    def ask() -> None:
        with httpx.Client(base_url=fleet.queen_url, headers=fleet.headers, timeout=60, trust_env=False) as client:
            for _ in range(40):
                answer = client.post("/v1/inference", json=body)
                if answer.status_code != 503:
                    break
                time.sleep(float(answer.headers["retry-after"]))
            answers.append(answer)

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [a.status_code for a in answers] == [200] * 10
    assert {a.headers["x-rbee-worker"] for a in answers} == {"lab1-cpu0", "lab2-cpu0"}
    assert len({a.json()["text"] for a in answers}) == 1


def test_the_official_openai_client_works_unchanged(fleet: Fleet, queen: httpx.Client) -> None:
    env = fleet.lab.ctl("env")
    values = dict(re.findall(r"export (\w+)=(\S+)", env.stdout))
    client = openai.OpenAI(base_url=values["OPENAI_BASE_URL"], api_key=values["OPENAI_API_KEY"], max_retries=0)
    messages: Any = [{"role": "user", "content": "Say hello."}]

    with client:
        assert MODEL_ID in {m.id for m in client.models.list()}
        chat = client.chat.completions.create(model=MODEL_ID, messages=messages, max_tokens=16, temperature=0)
        chunks = list(
            client.chat.completions.create(model=MODEL_ID, messages=messages, max_tokens=16, temperature=0, stream=True)
        )
        text = client.completions.create(model=MODEL_ID, prompt="Once upon", max_tokens=8, temperature=0)
        with pytest.raises(openai.NotFoundError, match=MODEL_ID):
            client.completions.create(model="nobody-has-it", prompt="x")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()

    assert chat.choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.choices[0].message.content
    assert chat.usage is not None
    assert chat.usage.completion_tokens <= 16
    assert text.choices[0].text


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{not json", 400, "invalid JSON"),
        (b"[1]", 400, "object"),
        (json.dumps({"prompt": "x", "temperature": "hot"}).encode(), 400, "temperature"),
        (json.dumps({"prompt": "x", "temperature": 3}).encode(), 400, "temperature"),
        (json.dumps({"prompt": "x", "max_tokens": 0}).encode(), 400, "max_tokens"),
        (json.dumps({"prompt": "x", "max_tokens": 99999}).encode(), 400, "2048"),
        (json.dumps({"prompt": "x", "stop": ["a"] * 5}).encode(), 400, "stop"),
        (json.dumps({"prompt": "x", "tempreature": 1}).encode(), 400, "tempreature"),
        (json.dumps({}).encode(), 400, "prompt"),
        (json.dumps({"prompt": "x", "model": "nobody-has-it"}).encode(), 404, MODEL_ID),
        (json.dumps({"prompt": "bee " * 6000}).encode(), 400, "4096"),
    ],
)
def test_bad_input_is_refused_by_name(queen: httpx.Client, body: bytes, status: int, words: str) -> None:
    """Native route; the one model of the fleet need not be named."""
    answer = queen.post("/v1/inference", content=body, headers={"Content-Type": "application/json"})

    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert words in error["message"] + json.dumps(error["details"])
    assert error["correlation_id"] == answer.headers["x-correlation-id"]


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(queen: httpx.Client) -> None:
    answer = queen.post("/v1/inference", json={"model": MODEL_ID, "prompt": "bee " * 6000, "max_tokens": 1})

    details = answer.json()["error"]["details"]
    assert details["prompt_tokens"] > details["context_tokens"] == 4096


# --- secrets --------------------------------------------------------------------------------------------------------


def test_secrets_are_nowhere_but_in_their_files(fleet: Fleet) -> None:
    lab = fleet.lab
    token = (lab.directory / "state/secrets/fleet-token").read_text().strip()
    places = ("ps axwwe -o args", "systemctl show 'rbee-*'", "journalctl --no-pager", "env")
    places += ("find /etc/rbee /etc/systemd/system/rbee* -type f -not -path '*/credentials/*' -exec cat {} +",)
    places += ("find /tmp /var/tmp /root /run/rbee* /dev/shm -type f -exec cat {} + 2>/dev/null | tr -cd '[:print:]'",)

    for node in ("lab1", "lab2"):
        for place in places:
            seen = lab.ssh(node, place).stdout
            assert token not in seen, f"fleet token in {place!r} on {node}"
            assert fleet.api_key not in seen, f"client key in {place!r} on {node}"
        modes = lab.ssh(node, "stat -c '%a %U' /etc/rbee/credentials /etc/rbee/credentials/*").stdout
        assert set(modes.splitlines()) == {"700 root", "600 root"}
    secrets, nodes = lab.directory / "state/secrets", lab.directory / "nodes"
    here = [p for p in lab.directory.iterdir() if p != nodes]  # the machines' own file systems are looked at above
    held = files_with((token, fleet.api_key), [*here, Path("~/.ansible").expanduser()])
    assert [p for p in held if secrets not in p.parents] == []
    assert oct(secrets.stat().st_mode & 0o777) == "0o700"


def test_secrets_are_in_no_output_of_the_run_that_brings_them(fleet: Fleet) -> None:
    """A machine that lacks the token gets it again, as loud as Ansible can be."""
    lab = fleet.lab
    token = (lab.directory / "state/secrets/fleet-token").read_text().strip()
    lab.ssh("lab2", "mv /etc/rbee/credentials /etc/rbee/away")
    try:
        run = lab.playbook("site", "--check", "--diff", "-vvv", "--limit", "lab2")
    finally:
        lab.ssh("lab2", "rm -rf /etc/rbee/credentials && mv /etc/rbee/away /etc/rbee/credentials")

    assert run.returncode == 0, run.stdout[-3000:]
    assert recap(run.stdout)["lab2"]["changed"] > 0
    assert token not in run.stdout + run.stderr
    assert fleet.api_key not in run.stdout + run.stderr
