"""What rbee-ctl makes of ansible-runner's events and of what ssh says; no process is started here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rbee_ctl import events
from rbee_ctl.ansible_environment import environment
from rbee_ctl.playbook import HostOutcome, PlaybookResult, _cancellation, _Collector, task_error, unreachable
from rbee_serve import process_tree
from rbee_serve.contract.errors import (
    DiskFull,
    InsufficientRam,
    NodeLocked,
    NodeUnreachable,
    PlaybookFailed,
    RbeeError,
    SshAuthFailed,
    SshHostKeyRefused,
    SshTimeout,
    SudoRefused,
)


def done(kind: str, host: str, **result: Any) -> dict[str, Any]:
    return {"event": kind, "event_data": {"host": host, "task": "start | the unit", "res": result}}


def stats(ok: dict[str, int], failures: dict[str, int] | None = None, dark: dict[str, int] | None = None) -> dict[str, Any]:
    data = {"ok": ok, "failures": failures or {}, "dark": dark or {}, "changed": {"a": 2}}
    return {"event": "playbook_on_stats", "event_data": data}


def conclude(rc: int, *raw: dict[str, Any]) -> PlaybookResult:
    collector = _Collector(None)
    for event in raw:
        assert collector.handle(event) is False  # nothing may be written to disk
    return collector.conclude(rc, Path("start.yml"))


def test_last_rbee_result_counts_wherever_it_stands() -> None:
    told = done("runner_on_ok", "a", ansible_facts={"rbee_result": {"target": "active"}})
    result = conclude(0, done("runner_on_ok", "a", rbee_result={"target": "inactive"}), told, stats({"a": 2}))
    assert result == PlaybookResult("success", 0, {"a": HostOutcome("ok", {"target": "active"}, None, 2)})
    assert result.exit_code == 0


def test_error_of_our_modules_comes_through() -> None:
    told = {"code": "INSUFFICIENT_RAM", "message": "needs 9 GB", "hint": "free some", "details": {"required": 9, "hint": "x"}}
    error = conclude(2, done("runner_on_failed", "a", rbee_error=told, msg="m"), stats({}, {"a": 1})).hosts["a"].error
    assert isinstance(error, InsufficientRam)
    assert (error.message, error.hint, error.details) == ("a: needs 9 GB", "free some", {"required": 9})


def test_error_inside_a_loop_comes_through() -> None:
    items = [{"failed": False}, {"failed": True, "rbee_error": {"code": "VRAM_EXHAUSTED", "message": "full"}}]
    error = task_error("a", events.TaskDone("a", "t", "failed", result={"results": items}))
    assert (error.code, error.message) == ("VRAM_EXHAUSTED", "a: full")


def test_other_failures_name_task_and_message() -> None:
    result = conclude(2, done("runner_on_failed", "a", msg="no such  file\n"), stats({}, {"a": 1}))
    assert result.hosts["a"].error is not None
    assert result.hosts["a"].error.message == "a: task 'start | the unit': no such file"
    assert result.exit_code == 1


def test_rescued_and_ignored_failures_are_none() -> None:
    ignored = done("runner_on_failed", "b", msg="x")
    ignored["event_data"]["ignore_errors"] = True
    result = conclude(0, done("runner_on_failed", "a", msg="x"), ignored, stats({"a": 1, "b": 1}))
    assert (result.status, result.exit_code) == ("success", 0)


@pytest.mark.parametrize(
    ("outcomes", "exit_code"),
    [
        ({"a": None, "b": None}, 0),
        ({"a": None, "b": PlaybookFailed("x")}, 3),
        ({"a": PlaybookFailed("x"), "b": PlaybookFailed("x")}, 1),
        ({"a": None, "b": NodeUnreachable("x")}, 4),
        ({"a": SshTimeout("x"), "b": SshAuthFailed("x")}, 4),
        ({"a": DiskFull("x")}, 11),
        ({"a": NodeLocked("x")}, 7),
        ({"a": PlaybookFailed("x"), "b": NodeUnreachable("x")}, 1),
        ({"a": None, "b": PlaybookFailed("x"), "c": NodeUnreachable("x")}, 3),
        ({"a": InsufficientRam("x")}, 5),
        ({"a": InsufficientRam("x"), "b": PlaybookFailed("x")}, 1),
    ],
)
def test_exit_code_says_how_much_failed(outcomes: dict[str, RbeeError | None], exit_code: int) -> None:
    raw = []
    for host, error in outcomes.items():
        if error is None:
            raw.append(done("runner_on_ok", host))
        elif isinstance(error, NodeUnreachable):
            raw.append(done("runner_on_unreachable", host, msg="Connection timed out"))
        else:
            raw.append(done("runner_on_failed", host, rbee_error={"code": error.code, "message": "x"}))
    assert conclude(4 if any(outcomes.values()) else 0, *raw).exit_code == exit_code


def test_failure_before_any_host_shows_what_ansible_said() -> None:
    result = conclude(4, {"event": "verbose", "stdout": "ERROR! conflicting action statements"})
    assert (result.status, result.exit_code) == ("failed", 1)
    assert result.error is not None
    assert "conflicting action statements" in result.error.message


def test_no_host_matched_is_a_failure() -> None:
    result = conclude(0, {"event": "playbook_on_no_hosts_matched", "stdout": "skipping: no hosts matched"})
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("said", "cls"),
    [
        ("Failed to connect to the host via ssh: ssh: connect to host x port 22: Connection timed out", SshTimeout),
        ("Failed to connect: root@x: Permission denied (publickey).", SshAuthFailed),
        ("Host key verification failed.", SshHostKeyRefused),
        ("ssh: connect to host x port 22: No route to host", NodeUnreachable),
        ("ssh: connect to host x port 22: Connection refused", NodeUnreachable),
    ],
)
def test_unreachable_is_classified(said: str, cls: type[RbeeError]) -> None:
    error = unreachable("lab1", said)
    assert type(error) is cls
    assert error.message.startswith("lab1: ")
    assert error.hint


@pytest.mark.parametrize(
    ("errors", "exit_code"),
    [
        ([SshAuthFailed("x"), SshAuthFailed("x")], 8),
        ([SshHostKeyRefused("x")], 9),
        ([SshTimeout("x"), SshHostKeyRefused("x")], 4),
        ([SudoRefused("x")], 10),
    ],
)
def test_each_kind_of_no_entry_has_an_exit_code(errors: list[RbeeError], exit_code: int) -> None:
    hosts = {str(n): HostOutcome("unreachable", {}, error) for n, error in enumerate(errors)}
    assert PlaybookResult("unreachable", 4, hosts).exit_code == exit_code


@pytest.mark.parametrize(
    ("said", "cls"),
    [
        ("Task failed: Missing sudo password", SudoRefused),
        ("Premature end of stream waiting for become success. sudo: a password is required", SudoRefused),
        ("bee is not in the sudoers file.", SudoRefused),
        ("Unexpected failure during module execution: [Errno 28] No space left on device: '/root/.ansible/tmp'", DiskFull),
        ("dpkg: error", PlaybookFailed),
    ],
)
def test_what_a_task_says_is_classified(said: str, cls: type[RbeeError]) -> None:
    error = task_error("lab1", events.TaskDone("lab1", "Do it", "failed", result={"msg": said}))
    assert type(error) is cls
    assert error.message.startswith("lab1: ")
    assert error.hint


def test_progress_lines_are_found_among_output() -> None:
    raw = {"event": "verbose", "stdout": "\x1b[0;34mother\x1b[0m\r\n\x1b[0;34mrbee: downloading 1 of 2 MB\x1b[0m"}
    assert events.translate(raw) == [
        events.Progress("downloading 1 of 2 MB"),
        events.Output("other\nrbee: downloading 1 of 2 MB"),
    ]


def test_environment_passes_named_variables_only() -> None:
    given = {
        "HOME": "/h",
        "AWS_SECRET_ACCESS_KEY": "x",
        "OPENAI_API_KEY": "x",
        "ANSIBLE_HOST_KEY_CHECKING": "False",
        "PATH": "/p",
    }
    found = environment(given | {"RBEE_X": "1", "HF_TOKEN": "t", "SSH_AUTH_SOCK": "/s"}, Path("/state"))
    assert (
        found.items() >= {"HOME": "/h", "RBEE_X": "1", "HF_TOKEN": "t", "SSH_AUTH_SOCK": "/s", "RBEE_STATE_DIR": "/state"}.items()
    )
    assert not found.keys() & {"AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "ANSIBLE_HOST_KEY_CHECKING"}
    assert found["PATH"] == f"{Path(sys.executable).parent}:/p"
    vault = environment({"ANSIBLE_VAULT_PASSWORD_FILE": "pw", "ANSIBLE_VAULT_IDENTITY_LIST": "a@b"})
    assert (vault["ANSIBLE_VAULT_PASSWORD_FILE"], vault["ANSIBLE_VAULT_IDENTITY_LIST"]) == (str(Path.cwd() / "pw"), "a@b")


def test_descendants_are_found_also_in_sessions_of_their_own() -> None:
    parent = subprocess.Popen(["sh", "-c", "setsid sleep 60 & echo up; wait"], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        assert parent.pid in {p.pid for p in process_tree.children(os.getpid())}
        below = process_tree.descendants(parent.pid)
        assert len(below) == 1
        process_tree.kill(below)
        parent.wait(10)
        assert not process_tree.alive(below[0])
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_last_moment_of_a_run_is_not_lost(how: signal.Signals) -> None:
    before = signal.getsignal(how)
    with pytest.raises(KeyboardInterrupt), _cancellation():
        signal.raise_signal(how)
    assert signal.getsignal(how) is before


def test_a_process_that_sudo_has_made_another_user_s_keeps_the_others_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def kill(pid: int, sig: int) -> None:
        asked.append(pid)
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    me = next(p for p in process_tree.children(os.getppid()) if p.pid == os.getpid())
    process_tree.kill([me, me])
    assert asked == [me.pid, me.pid]


def test_a_reader_that_has_left_ends_no_run() -> None:
    told: list[events.Event] = []

    def listen(event: events.Event) -> None:
        told.append(event)
        raise BrokenPipeError

    collector = _Collector(listen)
    collector._event_at -= 1
    collector.tick()
    collector.handle(done("runner_on_ok", "a", rbee_result={"x": 1}))
    assert [type(e) for e in told] == [events.StillRunning, events.TaskDone]
    assert collector.conclude(0, Path("verb.yml")).hosts["a"].result == {"x": 1}
