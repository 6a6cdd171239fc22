"""The lock of a node: one run at a time, and none that blocks for ever."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import node_modules
import pytest
from ansible.module_utils import rbee_lock
from ansible.module_utils.rbee_node import NodeError

guarded = node_modules.load("action_plugins", "rbee_guarded")


def run(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "host": "ctl", "user": "root", "pid": 1, "playbook": "site.yml", **more}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "lock.json")


def test_a_second_run_is_told_who_holds_it_and_the_first_goes_on(path: str) -> None:
    assert rbee_lock.take(run("a"), path) is None
    with pytest.raises(NodeError) as e:
        rbee_lock.take(run("b"), path)
    assert e.value.code == "NODE_LOCKED"
    assert "root@ctl" in e.value.message
    assert "site.yml" in e.value.message
    assert e.value.hint
    rbee_lock.check(run("a"), path)
    assert rbee_lock.take(run("a"), path) is None
    with pytest.raises(NodeError):
        rbee_lock.check(run("b"), path)
    with pytest.raises(NodeError):
        rbee_lock.check(None, path)


def test_nobody_can_release_what_another_one_holds(path: str) -> None:
    rbee_lock.take(run("a"), path)
    assert not rbee_lock.release(run("b"), path)
    assert rbee_lock.release(run("a"), path)
    assert not rbee_lock.release(run("a"), path)
    assert rbee_lock.take(run("b"), path) is None


def test_a_lock_without_a_sign_of_life_ends_and_a_sign_of_life_renews_it(path: str) -> None:
    record = {**run("a"), "touched": 1000.0}
    assert rbee_lock.holder(run("b"), record, 1000 + rbee_lock.LEASE_S - 1) == record
    assert rbee_lock.holder(run("b"), record, 1000 + rbee_lock.LEASE_S) is None
    assert rbee_lock.holder(run("b"), record, 999) is None  # from the future: the clock was set back
    rbee_lock.write({**record, "since": 0.0, "touched": time.time() - 100}, path)
    rbee_lock.check(run("a"), path)
    assert time.time() - (rbee_lock.read(path) or {})["touched"] < 50


@pytest.mark.parametrize("text", ["", "{half", "[]", "{}"])
def test_a_broken_file_is_no_lock(path: str, text: str) -> None:
    Path(path).write_text(text)
    assert rbee_lock.take(run("a"), path) is None


def test_a_run_of_this_machine_whose_process_is_gone_is_dead_and_no_other(path: str) -> None:
    process = subprocess.Popen(["sleep", "60"])
    record = guarded.identity(process.pid)
    try:
        assert not guarded.dead(record)
        assert not guarded.dead({**record, "machine": "another one", "started": 0})
        assert guarded.dead({**record, "started": record["started"] - 1})  # the id was given to another process since
    finally:
        process.kill()
        process.wait()
    assert guarded.dead(record)
    rbee_lock.take(record, path)
    mine = guarded.identity(os.getpid())
    with pytest.raises(NodeError):
        rbee_lock.take(mine, path)
    assert (rbee_lock.take({**mine, "dead": record["id"]}, path) or {})["id"] == record["id"]
    assert (rbee_lock.read(path) or {}).keys() >= {"since", "touched", "user", "host", "pid"}
    assert "dead" not in (rbee_lock.read(path) or {})


def test_what_a_dead_run_left_working_is_ended_and_nothing_else(path: str) -> None:
    def sleeper(run_id: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sh", "-c", "sleep 600; :"], env={"PATH": "/usr/bin:/bin", "RBEE_RUN": run_id})

    rbee_lock.take(run("test:dead"), path)
    with sleeper("test:dead") as left, sleeper("test:dead:not") as foreign:
        try:
            while len(rbee_lock.left_by("test:dead")) < 2:  # the shell and what it has started
                assert left.poll() is None
            reaper = threading.Thread(target=left.wait)  # a zombie has no environment: this is for tidiness alone
            reaper.start()
            before = rbee_lock.take(run("b", dead="test:dead"), path)
            reaper.join(30)

            assert before is not None
            assert before["left"] == 2
            assert rbee_lock.left_by("test:dead") == []
            assert left.returncode == -signal.SIGKILL
            assert foreign.poll() is None
            assert rbee_lock.taken_over(before)[1] == "ended what it left working here (processes: 2)"
        finally:
            for process in (left, foreign):
                for pid in rbee_lock.left_by("test:dead:not"):
                    os.kill(pid, signal.SIGKILL)
                process.kill()


def test_of_two_runs_in_one_moment_one_holds_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one looks between the look and the entry of the first: it has to wait for both."""
    look, refused = rbee_lock.read, []

    def looked(where: str) -> Any:
        folder = os.open(Path(where).parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refused.append(where)
        finally:
            os.close(folder)
        return look(where)

    monkeypatch.setattr(rbee_lock, "read", looked)
    assert rbee_lock.take(run("a"), path) is None
    assert len(refused) >= 2
    assert list(Path(path).parent.iterdir()) == [Path(path)]
