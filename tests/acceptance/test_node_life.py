"""The life of workers on a booted machine: asleep behind a socket, hung, out of memory, fenced in, stopped as one."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from machines import Fleet
from waiting import until

from rbee_ctl.demo_model import MODEL_ID

NODE = "lab2"
#: Asleep behind a socket; with a stream; the one that things happen to.
SLEEPER, STREAMER, VICTIM = "cpu0-s", "cpu0-g", "cpu0-v"
#: On a port that is not the next one.
ASIDE = "cpu0-t"
#: tests/integration/test_scale_from_zero.py has 200 of them, with a socket that is held as systemd does.
IDLE_EXITS = int(os.environ.get("RBEE_TEST_IDLE_EXITS", "5"))
PROBE = Path(__file__).with_name("sandbox_probe.py")


class Node:
    """lab2 with three workers more than site.yml gave it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.lab = fleet, fleet.lab
        token = (self.lab.directory / "state/secrets/fleet-token").read_text().strip()
        self.headers = {"Authorization": f"Bearer {token}"}

    def sh(self, command: str, *, check: bool = True) -> str:
        return self.lab.ssh(NODE, command, check=check).stdout.strip()

    def add(self, name: str, *, socket: bool) -> None:
        request = {"backend": "cpu", "device": 0, "model": MODEL_ID, "name": name, "threads": 1, "slots": 1}
        variables = json.dumps({"rbee_worker_request": request, "rbee_worker_socket": socket})
        done = self.lab.playbook("worker_start", "--limit", NODE, "-e", variables)
        assert done.returncode == 0, done.stdout[-3000:]

    def settings(self, name: str, *lines: str) -> None:
        """Replace the test's own drop-in of an instance: shorter times, less memory."""
        folder = f"/etc/systemd/system/rbee-worker@{name}.service.d"
        text = "\\n".join(lines)
        self.sh(f"mkdir -p {folder} && printf '{text}\\n' > {folder}/90-test.conf && systemctl daemon-reload")

    def show(self, unit: str) -> dict[str, str]:
        keys = "ActiveState,SubState,Result,NRestarts,MainPID,ExecMainStatus,StatusText"
        return dict(line.split("=", 1) for line in self.sh(f"systemctl show {unit} -p {keys}").splitlines())

    def service(self, name: str) -> dict[str, str]:
        return self.show(f"rbee-worker@{name}.service")

    def socket(self, name: str) -> str:
        return self.show(f"rbee-worker@{name}.socket")["ActiveState"]

    def restart(self, name: str) -> None:
        self.sh(f"systemctl reset-failed rbee-worker@{name}.service; systemctl restart rbee-worker@{name}.service")

    def url(self, name: str) -> str:
        port = self.sh(f"sed -n 's/^port = //p' /etc/rbee/workers/{name}.toml")
        return f"http://{self.lab.address(NODE)}:{port}"

    def enforces_address_lists(self, outside: str) -> bool:
        """Whether the kernel under the lab runs systemd's programs for cgroups (BPF)."""
        connect = f"import socket; socket.create_connection(('{outside}', 22), 2)"
        refused = f'systemd-run --wait --collect -q -p IPAddressDeny=any python3 -c "{connect}" || echo refused'
        return self.sh(refused).endswith("refused")

    def workers(self) -> dict[str, dict[str, Any]]:
        """Workers of the machine that the queen hears, by name."""
        answer = httpx.get(f"{self.fleet.queen_url}/v1/workers", headers=self.fleet.headers, trust_env=False, timeout=60)
        return {w["name"]: w for w in answer.json()["workers"] if w["hive_id"] == NODE}

    def registry(self) -> dict[str, str]:
        """States of these workers."""
        return {name: worker["status"] for name, worker in self.workers().items()}


@pytest.fixture(scope="module")
def node(fleet: Fleet) -> Iterator[Node]:
    node = Node(fleet)
    try:
        node.add(SLEEPER, socket=True)
        node.add(STREAMER, socket=False)
        node.add(VICTIM, socket=False)
        yield node
    finally:
        for name in (SLEEPER, STREAMER, VICTIM, ASIDE):
            units = f"rbee-worker@{name}.service rbee-worker@{name}.socket"
            node.sh(
                f"systemctl disable --now {units}; systemctl reset-failed {units}; rm -rf /etc/rbee/workers/{name}.toml"
                f" /etc/rbee/workers/{name}.runtime /etc/systemd/system/rbee-worker@{name}.*.d; systemctl daemon-reload",
                check=False,
            )
        done = node.lab.ctl("hive", "start", "--node", NODE)
        assert done.returncode == 0, done.stderr


# --- asleep ---------------------------------------------------------------------------------------------------------


@pytest.mark.S72
@pytest.mark.S75
@pytest.mark.N02
@pytest.mark.N03
@pytest.mark.N10
@pytest.mark.P15
def test_an_idle_worker_sleeps_and_every_connection_wakes_it_also_after_a_reboot(node: Node) -> None:
    exits = f"journalctl -u rbee-worker@{SLEEPER} -o cat --no-pager | grep -c 'Deactivated successfully' || true"
    url = node.url(SLEEPER)
    node.settings(SLEEPER, "[Unit]", "StartLimitBurst=10000", "[Service]", "Environment=RBEE_IDLE_TIMEOUT_S=0.5")
    node.restart(SLEEPER)
    until(lambda: node.service(SLEEPER)["ActiveState"] == "inactive", "asleep")
    assert node.socket(SLEEPER) == "active"
    assert node.show("rbee-hive.target")["ActiveState"] == "active"
    until(lambda: node.registry().get(SLEEPER) == "dormant", "dormant in the registry")

    before = int(node.sh(exits))
    answers = []
    while int(node.sh(exits)) < before + IDLE_EXITS:
        for _ in range(3):  # some of them find it awake, some asleep, some on its way between
            answers.append(httpx.get(f"{url}/health", timeout=60, trust_env=False).status_code)
            time.sleep(0.2)

    assert set(answers) == {200}
    assert node.service(SLEEPER)["NRestarts"] == "0"
    assert node.service(SLEEPER)["Result"] == "success"
    node.settings(SLEEPER, "[Service]", "Environment=RBEE_IDLE_TIMEOUT_S=300")
    node.lab.reboot(NODE)
    until(lambda: node.socket(SLEEPER) == "active", "its socket listens after the boot")
    assert node.service(SLEEPER)["MainPID"] == "0"
    assert httpx.get(f"{url}/health", timeout=60, trust_env=False).status_code == 200
    until(lambda: node.registry().get(SLEEPER) == "idle", "awake")
    answer = httpx.post(f"{url}/v1/inference", json={"prompt": "Once", "stream": False}, headers=node.headers, timeout=60)
    assert answer.json()["tokens_generated"] > 0
    until(lambda: node.registry().get("cpu0") == "idle", "the enabled worker is back after the boot")


@pytest.mark.X07
def test_a_queen_that_is_gone_longer_than_its_lease_frees_the_machine_and_the_socket_stays(node: Node) -> None:
    # The lease is renewed by each beat: it is not over while the queen is there.
    node.settings(
        SLEEPER,
        "[Service]",
        *(f"Environment=RBEE_{setting}" for setting in ("IDLE_TIMEOUT_S=0", "QUEEN_LEASE_S=8", "HEARTBEAT_INTERVAL_S=1")),
    )
    node.restart(SLEEPER)
    until(lambda: node.registry().get(SLEEPER) == "idle", "awake, and never to sleep by itself")
    node.lab.ssh("lab1", "systemctl stop rbee-queen")
    try:
        until(lambda: node.service(SLEEPER)["ActiveState"] == "inactive", "the worker has ended", limit_s=60)
        assert (node.service(SLEEPER)["Result"], node.service(SLEEPER)["ExecMainStatus"]) == ("success", "0")
        assert node.socket(SLEEPER) == "active"
        assert node.service("cpu0")["ActiveState"] == "active", "one without a socket could not come back"
    finally:
        node.lab.ssh("lab1", "systemctl start rbee-queen")
    until(lambda: node.registry().get("cpu0") == "idle", "the queen hears the others again")
    node.settings(SLEEPER, "[Service]", "Environment=RBEE_IDLE_TIMEOUT_S=300")
    node.restart(SLEEPER)


# --- in trouble -----------------------------------------------------------------------------------------------------


@pytest.mark.S74
@pytest.mark.N04
@pytest.mark.P15
def test_a_blocked_generation_thread_is_noticed_by_the_watchdog_and_nobody_else_suffers(node: Node) -> None:
    node.settings(VICTIM, "[Service]", "WatchdogSec=10", "Environment=RBEE_STALL_TIMEOUT_S=5")
    node.restart(VICTIM)
    others = {n: node.service(n)["MainPID"] for n in ("cpu0", STREAMER)}
    pid = node.service(VICTIM)["MainPID"]

    # The engine's process alone: the front's event loop goes on and would feed a watchdog that asked no further.
    node.sh(f"kill -STOP $(cat /proc/{pid}/task/{pid}/children)")

    until(lambda: node.service(VICTIM)["NRestarts"] == "1", "restarted by systemd")
    until(lambda: node.service(VICTIM)["ActiveState"] == "active", "well again")
    assert "Watchdog timeout" in node.sh(f"journalctl --sync; journalctl -u rbee-worker@{VICTIM} -o cat --no-pager -n 40")
    until(lambda: node.registry().get(VICTIM) == "idle", "registered again")
    assert {n: node.service(n)["MainPID"] for n in others} == others
    assert node.show("rbee-hive.target")["ActiveState"] == "active"


@pytest.mark.S35
@pytest.mark.S46
@pytest.mark.P15
def test_a_worker_that_runs_out_of_memory_while_loading_ends_failed_and_says_so(node: Node) -> None:
    limits = ("[Unit]", "StartLimitBurst=3", "[Service]", "MemoryMax=90M", "RestartSec=100ms")
    node.sh(f"systemctl stop rbee-worker@{VICTIM}")
    node.settings(VICTIM, *limits)
    try:
        node.sh(f"systemctl start --no-block rbee-worker@{VICTIM}")
        until(lambda: node.service(VICTIM)["ActiveState"] == "failed", "given up", limit_s=120)

        assert int(node.service(VICTIM)["NRestarts"]) <= 3
        # Its beats may have come so far that it loads, and nobody took that back.
        until(lambda: VICTIM not in node.registry(), "forgotten by the registry")
        status = node.lab.ctl("hive", "status", "--node", NODE).stdout
        assert re.search(rf"rbee-worker@{VICTIM}.service.* failed", status), status
        assert "out of memory" in status, status

        # With room for the process and none for the model the worker looks for itself, and `hive start` tells its figures.
        node.settings(VICTIM, *limits[:3], "MemoryMax=180M", "RestartSec=100ms")
        done = node.lab.ctl("hive", "start", "--node", NODE, "--json")
        error = json.loads(done.stdout)["errors"][0]
        assert (done.returncode, error["code"], error["host"]) == (5, "INSUFFICIENT_RAM", NODE), done.stdout
        assert f"rbee-worker@{VICTIM}.service did not start: " in error["message"]
        assert re.search(r"nothing was loaded: the model needs \d+ MB", error["message"]), error
        assert node.show("rbee-hive.target")["ActiveState"] == "active"
        until(lambda: node.registry().get("cpu0") == "idle", "the others are as before")
    finally:
        node.settings(VICTIM, "")


@pytest.mark.S35
@pytest.mark.N03
def test_a_woken_worker_without_room_refuses_with_figures_and_its_socket_waits_for_better_times(node: Node) -> None:
    """Loading would take more than its MemoryMax= leaves: 507 and no start after the other; the next request finds room."""

    def ask() -> httpx.Response:
        body = {"worker_id": f"{NODE}-{SLEEPER}", "prompt": "x", "max_tokens": 2, "stream": False}
        url = f"{node.fleet.queen_url}/v1/inference"
        return httpx.post(url, json=body, headers=node.fleet.headers, timeout=120, trust_env=False)

    unit, asleep = f"rbee-worker@{SLEEPER}.service", "Environment=RBEE_IDLE_TIMEOUT_S=0.5"
    node.settings(SLEEPER, "[Unit]", "StartLimitBurst=100", "[Service]", asleep)
    node.restart(SLEEPER)
    until(lambda: node.service(SLEEPER)["ActiveState"] == "inactive", "asleep")
    until(lambda: node.registry().get(SLEEPER) == "dormant", "dormant in the registry")
    node.settings(SLEEPER, "[Unit]", "StartLimitBurst=100", "[Service]", "MemoryMax=180M", "Environment=RBEE_IDLE_TIMEOUT_S=300")
    try:
        refused = ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "INSUFFICIENT_RAM"), refused.text
        assert "out of memory, nothing was loaded: the model needs " in refused.json()["error"]["message"]
        assert "out of memory, nothing was loaded" in node.service(SLEEPER)["StatusText"]
        node.sh(f"systemctl set-property --runtime {unit} MemoryMax=infinity")
        until(lambda: node.service(SLEEPER)["ActiveState"] == "failed", "it has seen the room and left")
        left = node.service(SLEEPER)
        assert (left["ExecMainStatus"], left["NRestarts"], node.socket(SLEEPER)) == ("75", "0", "active")
        until(lambda: node.registry().get(SLEEPER) == "dormant", "asleep again")
        assert ask().json()["tokens_generated"] == 2
    finally:
        node.settings(SLEEPER, "[Service]", "Environment=RBEE_IDLE_TIMEOUT_S=300")
        node.sh(f"rm -rf /run/systemd/system.control/{unit}.d; systemctl daemon-reload")


@pytest.mark.S45
def test_a_sleeping_worker_whose_port_is_taken_is_refused_with_the_name_of_the_taker(node: Node) -> None:
    port = node.url(SLEEPER).rsplit(":", 1)[1]
    node.sh(f"systemctl stop rbee-worker@{SLEEPER}.socket rbee-worker@{SLEEPER}.service")
    listener = f"import socket,time; s=socket.create_server(('',{port})); time.sleep(600)"
    node.sh(f'systemd-run --unit=squatter -p Type=exec python3 -c "{listener}"')
    try:
        until(lambda: node.sh(f"ss -ltnH 'sport = :{port}'"), "the port is taken")
        request = {"backend": "cpu", "device": 0, "model": MODEL_ID, "name": SLEEPER}
        variables = json.dumps({"rbee_worker_request": request, "rbee_worker_socket": True})
        done = node.lab.playbook("worker_start", "--limit", NODE, "-e", variables)
        assert done.returncode != 0
        assert f"port {port} of worker {SLEEPER} is taken by python3" in done.stdout, done.stdout[-3000:]
        assert "[PORT_TAKEN]" in done.stdout
    finally:
        node.sh("systemctl stop squatter")
    node.restart(SLEEPER)
    assert node.socket(SLEEPER) == "active"


@pytest.mark.S45
def test_a_new_worker_steps_aside_from_a_port_that_another_process_has(node: Node) -> None:
    listener = "import socket,time; s=[socket.create_server(('',p)) for p in range(8005,8012)]; time.sleep(600)"
    node.sh(f'systemd-run --unit=squatter -p Type=exec python3 -c "{listener}"')
    try:
        until(lambda: node.sh("ss -ltnH 'sport = :8011'"), "the ports are taken")
        done = node.lab.ctl("worker", "start", "--node", NODE, "--model", MODEL_ID, "--name", ASIDE, "--slots", "1", "--json")
        assert done.returncode == 0, done.stderr
        warned = re.search(r"port [0-9, ]+ is taken by another process; using (\d+)", done.stderr)
        assert warned, done.stderr
        assert json.loads(done.stdout)["data"]["worker"]["url"].endswith(f":{warned[1]}")
        assert httpx.get(f"{node.url(ASIDE)}/health", timeout=60, trust_env=False).json()["status"] == "alive"
        until(lambda: ASIDE in node.workers(), "known to the queen")
        assert node.workers()[ASIDE]["url"] == node.url(ASIDE)
    finally:
        node.sh("systemctl stop squatter")


@pytest.mark.S17
@pytest.mark.S46
def test_a_worker_that_dies_at_once_is_told_with_its_last_words_and_the_next_command(node: Node) -> None:
    unit = f"rbee-worker@{VICTIM}.service"
    node.sh(f"systemctl stop {unit}")
    node.settings(VICTIM, "[Service]", 'ExecStartPre=/bin/sh -c "echo no such luck >&2; exit 1"', "RestartSec=200ms")
    try:
        done = node.lab.ctl("worker", "start", "--node", NODE, "--model", MODEL_ID, "--name", VICTIM, "--slots", "1", "--json")
        (error,) = json.loads(done.stdout)["errors"]
        assert (done.returncode, error["code"], error["host"]) == (1, "UNIT_START_FAILED", NODE), done.stdout
        assert "no such luck" in error["message"]
        assert f"journalctl -u {unit} -n 50" in error["hint"]
        assert [line for line in error["details"]["journal"] if "no such luck" in line]
        # Tried again with pauses, and not for ever.
        until(lambda: node.service(VICTIM)["ActiveState"] == "failed", "given up", limit_s=60)
        assert int(node.service(VICTIM)["NRestarts"]) in range(2, 6)
        assert node.show("rbee-hive.target")["ActiveState"] == "active"
        until(lambda: VICTIM not in node.registry(), "not in the registry")
    finally:
        node.settings(VICTIM, "")


@pytest.mark.N12
def test_a_worker_can_not_look_at_its_neighbours_nor_write_nor_open_devices_nor_reach_the_internet(node: Node) -> None:
    """The probe runs as the worker does: same unit, same account, same view of the machine."""
    outside = node.lab.outside(NODE)
    arguments = f"{node.service('cpu0')['MainPID']} {node.lab.address(NODE)} {outside}"
    probe = f"/usr/bin/python3 /usr/local/bin/sandbox_probe.py {arguments}"
    node.sh(f"cat > /usr/local/bin/sandbox_probe.py <<'EOT'\n{PROBE.read_text()}\nEOT")
    # The number of /dev/null: outside the fence everybody can open it.
    node.sh("[ -e /dev/nvidia7 ] || mknod -m 666 /dev/nvidia7 c 1 3")
    node.settings(VICTIM, "[Service]", f"ExecStartPre={probe}")
    try:
        node.restart(VICTIM)
        said = node.sh(f"journalctl --sync; journalctl -u rbee-worker@{VICTIM} -o cat --no-pager")
        (line,) = [x for x in said.splitlines() if "PROBE" in x]
    finally:
        node.settings(VICTIM, "")
    found: dict[str, Any] = json.loads(line.removeprefix("PROBE "))

    assert found.pop("own credential") == "done"
    assert found.pop("own settings") == "done"
    assert found.pop("network of the fleet") == "done"
    if not node.enforces_address_lists(outside):  # the setting is all there is then
        assert found.pop("internet") == "done"
        fence = node.sh(f"systemctl show rbee-worker@{VICTIM} -p IPAddressDeny --value")
        assert set(fence.split()) == {"0.0.0.0/0", "::/0"}
    assert len(found) > 10
    assert {what: how for what, how in found.items() if how == "done"} == {}
    # Outside the fence every one of these attempts is possible: none fails for a reason of its own.
    credentials = f"/run/credentials/rbee-worker@{VICTIM}.service"
    said = node.sh(f"CREDENTIALS_DIRECTORY={credentials} {probe}")
    node.sh("find / /run -xdev -name rbee-probe -delete")
    free = json.loads(said.removeprefix("PROBE "))
    assert {what for what, how in free.items() if how != "done"} <= {"kernel messages"}, free


def moment(node: Node, name: str, key: str) -> int:
    """Time of one of the service's changes, microseconds since boot."""
    return int(node.sh(f"systemctl show rbee-worker@{name}.service -p {key} --value"))


# --- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.S76
@pytest.mark.S77
@pytest.mark.S78
@pytest.mark.N01
@pytest.mark.P05
def test_a_stop_ends_idle_busy_and_hung_workers_and_sockets_and_nothing_comes_back(node: Node) -> None:
    assert node.lab.ctl("worker", "stop", "--node", NODE, ASIDE).returncode == 0
    for name in (SLEEPER, STREAMER, VICTIM):
        node.restart(name)
    node.settings(VICTIM, "[Service]", "TimeoutStopSec=4")
    catalog = node.sh("find /var/lib/rbee/models -type f | sort | sha256sum")
    urls = [node.url(n) for n in ("cpu0", SLEEPER, STREAMER, VICTIM)]
    lines: list[str] = []
    body = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 0}

    def stream() -> None:
        with httpx.stream(
            "POST", f"{urls[2]}/v1/inference", json=body, headers=node.headers, timeout=120, trust_env=False
        ) as answer:
            lines.extend(answer.iter_lines())

    hung = node.service(VICTIM)["MainPID"]
    # systemd follows SIGTERM with SIGCONT: only what is stopped again at once stays hung.
    node.sh(f"systemd-run --unit=freezer sh -c 'while kill -STOP {hung}; do sleep 0.05; done'")
    reader = threading.Thread(target=stream)
    reader.start()
    until(lambda: node.registry().get(STREAMER) == "busy", "generating")

    done = node.lab.ctl("hive", "stop", "--node", NODE, "--json")

    reader.join(120)
    assert done.returncode == 0, done.stderr
    # Nobody waits for the hung one: the others had begun to end when it was killed.
    began = [moment(node, n, "ActiveExitTimestampMonotonic") for n in ("cpu0", SLEEPER, STREAMER)]
    assert 0 < max(began) < moment(node, VICTIM, "InactiveEnterTimestampMonotonic")
    (forced,) = json.loads(done.stdout)["data"]["hosts"][NODE]["forced"]
    assert (forced["name"], forced["pid"], forced["signal"]) == (VICTIM, int(hung), "SIGKILL")
    assert re.search(r"5 of 5 stopped", done.stderr), done.stderr
    # The one with a stream ended it in peace: complete, exit status 0.
    tokens = [x for x in lines if x.startswith('data: {"type":"token"')]
    assert len(tokens) == 400
    assert lines[-2:-1] == ["data: [DONE]"] or "data: [DONE]" in lines
    assert (node.service(STREAMER)["Result"], node.service(STREAMER)["ExecMainStatus"]) == ("success", "0")
    assert node.sh("find /sys/fs/cgroup -path '*rbee.slice*' -name cgroup.procs -exec cat {} + | wc -l") == "0"
    for url in urls:
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health", trust_env=False)
    for name in ("cpu0", SLEEPER, STREAMER, VICTIM):
        assert node.service(name)["SubState"] in ("dead", "failed"), name
    for waiting in ("list-jobs", "list-sockets 'rbee*'", "list-timers 'rbee*'"):
        assert "rbee" not in node.sh(f"systemctl --no-legend {waiting}"), waiting
    until(lambda: set(node.registry()) <= {VICTIM}, "gone from the registry")
    assert node.sh("find /var/lib/rbee/models -type f | sort | sha256sum") == catalog

    done = node.lab.ctl("hive", "start", "--node", NODE)
    assert done.returncode == 0, done.stderr
    assert node.socket(SLEEPER) == "active"
    assert node.service(SLEEPER)["MainPID"] == "0"
    until(lambda: node.registry().get("cpu0") == "idle", "the enabled one is back")
