"""rbee-ctl against a living fleet: a worker dies under a stream, is shut down, loops; a command cleans up after itself."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from machines import ROOT, Fleet
from waiting import until

from rbee_ctl.demo_model import MODEL_ID

NODE, WORKER = "lab2", "lab2-cpu0"
UNIT = "rbee-worker@cpu0.service"
UNITS = {"lab1": ("rbee-hive.target", UNIT, "rbee-queen"), "lab2": ("rbee-hive.target", UNIT)}


class Live:
    """The fleet, and what queen and machines say of it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.lab = fleet, fleet.lab

    def workers(self) -> dict[str, dict[str, Any]]:
        """Workers that the queen hears; none while it is away."""
        try:
            answer = httpx.get(f"{self.fleet.queen_url}/v1/workers", headers=self.fleet.headers, trust_env=False, timeout=60)
        except httpx.TransportError:
            return {}
        return {w["id"]: w for w in answer.json()["workers"]}

    def idle(self, *ids: str) -> bool:
        found = self.workers()
        return all(found.get(i, {}).get("status") == "idle" for i in ids)

    def sh(self, command: str, *, check: bool = True) -> str:
        return self.lab.ssh(NODE, command, check=check).stdout.strip()

    def settings(self, *lines: str) -> None:
        """Write the test's own drop-in of the worker; the fixture takes it away."""
        text = "\\n".join(lines)
        folder = f"/etc/systemd/system/{UNIT}.d"
        self.sh(f"mkdir -p {folder} && printf '{text}\\n' > {folder}/90-test.conf && systemctl daemon-reload")

    def show(self, key: str) -> str:
        return self.sh(f"systemctl show -p {key} --value {UNIT}")

    def said(self) -> str:
        """What unit and systemd have said of it lately."""
        return self.sh(f"journalctl --sync; journalctl -u {UNIT} -o cat --no-pager -n 60")

    def pids(self) -> list[str]:
        """Main processes of queen and workers."""
        return [
            self.lab.ssh(node, f"systemctl show -p MainPID --value {unit}").stdout.strip()
            for node, units in UNITS.items()
            for unit in units[1:]
        ]

    def states(self) -> set[str]:
        """State of every unit of rbee's on both machines."""
        found = {n: self.lab.ssh(n, f"systemctl is-active {' '.join(u)}", check=False).stdout.split() for n, u in UNITS.items()}
        return {state for states in found.values() for state in states}


@pytest.fixture
def live(fleet: Fleet) -> Iterator[Live]:
    live = Live(fleet)
    until(lambda: live.idle("lab1-cpu0", WORKER), "both workers idle before the test")
    yield live
    live.sh(
        f"rm -rf /etc/systemd/system/{UNIT}.d/90-test.conf; systemctl daemon-reload; systemctl reset-failed {UNIT}", check=False
    )
    done = live.lab.playbook("start")
    assert done.returncode == 0, done.stdout[-3000:]
    until(lambda: live.idle("lab1-cpu0", WORKER), "both workers idle after the test", limit_s=60)


def broken_stream(live: Live, deed: str) -> tuple[int, str, str]:
    """Ask lab2's worker, and no other one, for 1500 tokens and do the deed there in the middle; returns exit code and outputs."""
    command = ["rbee-ctl", "infer", "--worker-id", WORKER, "--prompt", "Once upon a time", "-n", "1500", "--temperature", "0"]
    process = subprocess.Popen(
        command, env=live.lab.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        first = process.stdout.read(20)
        live.sh(deed)
        rest, said = process.communicate(timeout=180)
    finally:
        process.kill()
        process.wait()
    return process.returncode, (first + rest).decode(), said.decode()


def judge_partial(live: Live, out: str, err: str, code: str) -> None:
    """A stream that nobody could take over: what came is on stdout and in a file, and the error says how much it was."""
    kept = re.search(r"partial text \((\d+) / 1500 tokens\) kept in (\S+)", err)
    assert kept, err
    assert int(kept[1]) > 0
    text = live.lab.command(["cat", kept[2]]).stdout
    assert out.rstrip("\n") == text.rstrip("\n")
    assert re.search(rf"error: .*; {kept[1]} / 1500 tokens \[{code}\]", err), err


@pytest.mark.S54
@pytest.mark.S60
def test_a_worker_that_dies_under_a_stream_that_nobody_can_take_over(live: Live) -> None:
    restarts, pid = int(live.show("NRestarts")), live.show("MainPID")
    # Not restarted at once: the queen would have the stream go on exactly there.
    live.settings("[Service]", "RestartSec=20")
    code, out, err = broken_stream(live, f"kill -9 {pid}")

    assert code == 1, err
    judge_partial(live, out, err, "WORKER_CRASHED")
    until(lambda: live.workers().get(WORKER, {}).get("pid") != int(pid), "gone from the registry")
    until(lambda: live.idle(WORKER), "restarted by systemd", limit_s=60)
    assert int(live.show("NRestarts")) == restarts + 1
    assert "code=killed, status=9/KILL" in live.said()


@pytest.mark.S55
def test_a_worker_that_stands_still_under_a_stream_is_left_and_its_watchdog_brings_it_back(live: Live) -> None:
    live.settings("[Service]", "WatchdogSec=12", "TimeoutAbortSec=2")
    live.sh(f"systemctl restart {UNIT}")
    impatient = "/run/systemd/system/rbee-queen.service.d/90-test.conf"
    setting = "[Service]\\nEnvironment=RBEE_STALL_TIMEOUT_S=5\\n"
    live.lab.ssh("lab1", f"mkdir -p $(dirname {impatient}) && printf '{setting}' > {impatient} && systemctl daemon-reload")
    try:
        live.lab.ssh("lab1", "systemctl restart rbee-queen")
        until(lambda: live.idle(WORKER), "known to the queen again", limit_s=60)
        restarts, pid = int(live.show("NRestarts")), live.show("MainPID")
        code, out, err = broken_stream(live, f"kill -STOP {pid}")
        until(lambda: int(live.show("NRestarts")) == restarts + 1, "restarted by systemd", limit_s=60)
    finally:
        live.lab.ssh("lab1", f"rm -r $(dirname {impatient}); systemctl daemon-reload; systemctl restart rbee-queen")

    assert code == 4, err
    judge_partial(live, out, err, "CONNECTION_TIMEOUT")
    assert "made no token for 5 s" in err
    assert "Watchdog timeout" in live.said()


@pytest.mark.S90
def test_a_worker_that_is_shut_down_by_its_id_stays_down_and_costs_nobody_else_anything(live: Live) -> None:
    before = live.pids()

    done = live.lab.ctl("workers", "shutdown", "--id", WORKER)

    assert done.returncode == 0, done.stderr
    assert (live.show("ActiveState"), live.show("Result"), live.show("SubState")) == ("inactive", "success", "dead")
    until(lambda: WORKER not in live.workers(), "gone from the registry")
    assert live.pids()[:2] == before[:2]
    assert live.lab.ctl("workers", "shutdown", "--id", WORKER).returncode == 0, "one that is stopped is no failure"
    unknown = live.lab.ctl("workers", "shutdown", "--id", f"{NODE}-cpu9")
    assert unknown.returncode == 1
    assert "it has cpu0" in unknown.stderr


def test_status_shows_a_unit_that_failed_too_often_and_its_last_words(live: Live) -> None:
    leak = 'ExecStartPre=/bin/sh -c "echo the roof leaks; exit 1"'
    live.settings("[Unit]", "StartLimitBurst=3", "[Service]", "RestartSec=100ms", leak)
    live.sh(f"systemctl restart {UNIT}", check=False)
    until(lambda: live.show("ActiveState") == "failed", "given up")
    assert int(live.show("NRestarts")) <= 3
    until(lambda: WORKER not in live.workers(), "gone from the registry", limit_s=60)

    hurried = live.lab.ctl("status")
    assert (hurried.returncode, f"declared and not heard: {WORKER}; {NODE} not asked" in hurried.stderr) == (0, True)
    done = live.lab.ctl("status", "--ask")

    assert done.returncode == 0, done.stderr
    assert f"declared and not heard: {WORKER}; asking {NODE}" in done.stderr
    assert re.search(rf"^{WORKER}\s+{NODE}\s+failed \(failed\)", done.stdout, re.MULTILINE), done.stdout
    assert "    the roof leaks" in done.stdout
    assert f"next: journalctl -u {UNIT} -n 50 on {NODE}; then rbee-ctl hive start --node {NODE}" in done.stdout
    data = json.loads(live.lab.ctl("status", "--ask", "--json").stdout)["data"]
    assert [(u["name"], u["active_state"]) for u in data["silent"][NODE]["units"]] == [("cpu0", "failed")]


@pytest.mark.S51
@pytest.mark.S65
def test_a_model_that_is_never_loaded_is_given_up_with_how_far_it_came(live: Live) -> None:
    live.settings("[Service]", "Environment=RBEE_LOAD_TIMEOUT_S=2", "RestartSec=100ms")
    live.sh(f"systemctl stop {UNIT}")
    # The engine's process stands still as soon as there is one; systemd's restarts bring new ones. By its own name:
    # one that is executed and stopped before that would hold its parent for ever.
    engine = "pkill -STOP -P $p -x rbee-engine"
    loop = f"while sleep 0.02; do p=$(systemctl show -p MainPID --value {UNIT}); [ $p = 0 ] || {engine}; done"
    live.sh(f"systemd-run --unit=freezer sh -c '{loop}'")
    try:
        done = live.lab.ctl("worker", "start", "--node", NODE, "--model", MODEL_ID, "--json")
    finally:
        live.sh("systemctl stop freezer")

    envelope = json.loads(done.stdout)
    assert (done.returncode, [e["code"] for e in envelope["errors"]]) == (1, ["LOADING_TIMEOUT"]), done.stdout
    (error,) = envelope["errors"]
    assert re.search(r"model not loaded after 2 s: \d+ of \S+ layers", error["message"]), error
    assert error["hint"].startswith(f"journalctl -u {UNIT}")


def test_a_queen_that_does_not_run_is_started_for_a_question_and_stays(live: Live) -> None:
    assert live.lab.ctl("queen", "stop", "--no-cascade").returncode == 0
    done = live.lab.ctl("infer", "--node", NODE, "--model", MODEL_ID, "--prompt", "Once", "-n", "8", timeout=240)
    assert (done.returncode, bool(done.stdout.strip())) == (0, True), done.stderr
    assert "starting it" in done.stderr
    assert live.states() == {"active"}


@pytest.mark.S80
def test_an_ephemeral_answer_leaves_nothing_running_that_did_not_run_before(live: Live) -> None:
    assert live.lab.ctl("queen", "stop").returncode == 0
    assert live.states() == {"inactive"}

    done = live.lab.ctl("infer", "--ephemeral", "--node", NODE, "--model", MODEL_ID, "--prompt", "Once", "-n", "8", timeout=240)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    stopped = re.findall(r"stopping (.+), which this command had started", done.stderr)
    assert stopped == [f"worker {WORKER}", f"the hive of {NODE}", "the queen"]
    assert live.states() == {"inactive"}
    assert live.sh("systemctl is-enabled rbee-worker@cpu0.service") == "enabled", "declared before, declared after"


@pytest.mark.S80
def test_an_ephemeral_worker_that_is_interrupted_as_it_starts_is_stopped_and_nothing_else(live: Live) -> None:
    live.sh(f"systemctl stop {UNIT}")
    live.settings("[Service]", "ExecStartPre=/bin/sleep 600")  # it starts for as long as the test wants
    before = live.lab.ssh("lab1", f"systemctl show -p MainPID rbee-queen {UNIT}").stdout
    command = ["rbee-ctl", "infer", "--ephemeral", "--node", NODE, "--model", MODEL_ID, "--prompt", "Once"]
    process = subprocess.Popen(command, env=live.lab.environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        until(lambda: live.show("ActiveState") == "activating", "the worker starts", limit_s=120)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, said
    assert re.findall(r"stopping (.+), which this command had started", said) == [f"worker {WORKER}"]
    assert live.show("ActiveState") in ("inactive", "failed"), "what this test has it do before its start was killed"
    assert (live.show("MainPID"), live.sh("systemctl is-active rbee-hive.target")) == ("0", "active")
    assert live.lab.ssh("lab1", f"systemctl show -p MainPID rbee-queen {UNIT}").stdout == before
    # The lock names a run that is gone: the playbook that the fixture runs next takes it over.


#: Programs that reach a machine, or change it.
REACHES = {"ssh", "scp", "sftp", "systemctl", "journalctl", "sudo", "machinectl"}
_EXEC = re.compile(r'^\d+<(?P<by>[^>]*)> execve\("[^"]*?(?P<program>[^"/]+)", .* = 0$', re.MULTILINE)


@pytest.mark.P06
@pytest.mark.parametrize(
    ("commands", "itself"),
    [
        (
            (
                ("status", "--ask"),
                ("hive", "status"),
                ("hive", "refresh", "--node", NODE),
                ("worker", "stop", WORKER),
                ("worker", "start", "--node", NODE, "--model", MODEL_ID),
                ("infer", "--model", MODEL_ID, "--prompt", "x", "--max-tokens", "2"),
            ),
            set(),
        ),
        ((("logs", "--node", NODE, "-n", "1"),), {"ssh"}),
    ],
)
def test_strace_sees_no_program_that_reaches_a_machine_but_ansibles(
    live: Live, tmp_path: Path, commands: tuple[tuple[str, ...], ...], itself: set[str]
) -> None:
    for command in commands:
        trace = tmp_path / "trace"
        strace = ["strace", "-f", "-qq", "-Y", "-e", "trace=execve", "-e", "signal=none", "-o", str(trace)]
        done = live.lab.command([*strace, "rbee-ctl", *command])
        assert done.returncode == 0, f"{command}: {done.stderr}"
        seen = [(m["by"], m["program"]) for m in _EXEC.finditer(trace.read_text())]
        assert seen, "strace saw nothing"
        by_us = {program for by, program in seen if program in REACHES and not by.startswith("ansible")}
        assert by_us == itself, f"{command}: {seen}"
        if command[0] not in ("status", "infer", "logs"):
            # By the name of the process: one that was begun ahead (rbee_ctl/ansible_ahead.py) is no program of its own.
            assert "ssh" in {program for by, program in seen if "ansible-playbook".startswith(by)}
