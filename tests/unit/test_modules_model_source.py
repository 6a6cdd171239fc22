"""Who asks the hub and who gets a model from whom: roles/rbee_hive/action_plugins/rbee_model_source.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import node_modules
import pytest

source = node_modules.load("action_plugins", "rbee_model_source")
Machine, Others = source.Machine, source.Others

HAS: dict[str, Any] = {"status": "Ready", "sha256": "d1"}
OTHER: dict[str, Any] = {"status": "Ready", "sha256": "d2"}
BROKEN: dict[str, Any] = {"status": "Failed", "sha256": "d1"}
BUSY: dict[str, Any] = {"status": "Downloading"}
FULL = {"code": "INSUFFICIENT_DISK", "message": "full"}
GATED = {"code": "MODEL_ACCESS_DENIED", "message": "gated", "details": {"http_status": 403}}
DOWN = {"code": "DOWNLOAD_TIMEOUT", "message": "no bytes", "details": {"tries": 6}}
KILLED = {"code": "DOWNLOAD_FAILED", "message": "killed", "details": {"unit": "u"}}


def roles(machines: list[Any], others: Any, sha256: str | None = None, **more: Any) -> dict[str, Any]:
    """Return what each machine is told: its role, and the source or the error's message where there is one."""
    found = {}
    for machine in machines:
        role, where, error = source.decide(machine.name, machines, others, sha256, **more)
        found[machine.name] = f"{role} {error['message']}" if error else f"{role} {where}" if where else role
    return found


def test_nobody_has_it_one_fetches_for_all() -> None:
    machines = [Machine("a"), Machine("b"), Machine("c", BROKEN)]
    assert roles(machines, None) == {"a": "ask", "b": "wait", "c": "wait"}
    assert roles(machines, Others()) == {"a": "fetch", "b": "wait", "c": "wait"}
    machines[0].brought = True
    assert roles(machines, Others()) == {"a": "have", "b": "get a", "c": "get a"}


def test_whoever_has_it_gives_it_to_the_others() -> None:
    assert roles([Machine("a"), Machine("b", HAS), Machine("c")], None) == {"a": "get b", "b": "have", "c": "get b"}


def test_a_machine_outside_of_the_play_saves_the_hub() -> None:
    assert roles([Machine("a"), Machine("b")], Others(["z"])) == {"a": "get z", "b": "get z"}


@pytest.mark.parametrize("error", [FULL, KILLED, DOWN])
def test_one_that_can_not_fetch_is_followed_by_the_next_and_takes_it_from_there(error: dict[str, Any]) -> None:
    machines = [Machine("a", error=error), Machine("b"), Machine("c")]
    assert roles(machines, Others()) == {"a": "wait", "b": "fetch", "c": "wait"}
    machines[1].brought = True
    assert roles(machines, Others()) == {"a": "get b", "b": "have", "c": "get b"}
    everybody = [Machine("a", error=error), Machine("b", error=FULL)]
    assert roles(everybody, Others()) == {"a": f"fail {error['message']}", "b": "fail full"}


def test_what_the_hub_refuses_is_asked_once_and_told_by_all() -> None:
    machines = [Machine("a", error=FULL), Machine("b", error=GATED), Machine("c")]
    assert roles(machines, Others()) == {"a": "fail gated", "b": "fail gated", "c": "fail gated"}
    gone = {"code": "DOWNLOAD_FAILED", "message": "gone", "details": {"http_status": 410}}
    assert roles([Machine("a", error=gone), Machine("b")], Others()) == {"a": "fail gone", "b": "fail gone"}
    assert roles(machines, Others(["z"])) == {"a": "get z", "b": "get z", "c": "get z"}  # who has it may still give it


def test_a_hub_that_three_machines_could_not_reach_is_down() -> None:
    machines = [Machine("a", error=DOWN), Machine("b", error=DOWN), Machine("c"), Machine("d")]
    assert roles(machines, Others())["c"] == "fetch"
    machines[2].error = DOWN
    assert set(roles(machines, Others()).values()) == {"fail no bytes"}


def test_who_does_not_give_it_is_passed_by() -> None:
    machines = [Machine("a", HAS), Machine("b", HAS), Machine("c", shunned={"a": "port shut"}), Machine("d")]
    assert roles(machines, None) == {"a": "have", "b": "have", "c": "get b", "d": "get a"}
    machines[2].shunned["b"] = "port shut"
    assert roles(machines, Others())["c"] == "fetch"
    machines[2].final, machines[2].error = True, FULL
    assert roles(machines, Others())["c"] == "fail full"


def test_a_second_run_joins_the_first() -> None:
    """Whether the other run's machine is in this play or not, and whether its catalog tells it or only the note."""
    machines = [Machine("a"), Machine("b")]
    for others, claimed in ((Others(busy=["z"]), None), (Others(), "z")):
        assert roles(machines, others, claimed=claimed) == {"a": "join z", "b": "wait z"}
    assert roles(machines, Others(), claimed="b") == {"a": "wait", "b": "fetch"}
    assert roles([Machine("a"), Machine("b", BUSY)], Others()) == {"a": "wait", "b": "fetch"}
    machines[0].shunned["z"] = "not reachable"
    assert roles(machines, Others(busy=["z"]), claimed="z") == {"a": "fetch", "b": "wait"}


def test_a_path_is_each_machine_s_own() -> None:
    machines = [Machine("a", HAS), Machine("b"), Machine("c", error={"code": "MODEL_FILE_INVALID", "message": "none"})]
    assert roles(machines, None, local=True) == {"a": "have", "b": "fetch", "c": "fail none"}


@pytest.mark.parametrize(("sha256", "role"), [(None, "have"), ("d2", "have"), ("d1", "ask")])
def test_another_digest_than_the_declared_one_is_not_the_model(sha256: str | None, role: str) -> None:
    assert roles([Machine("a", OTHER)], None, sha256) == {"a": role}


def test_a_note_of_who_fetches_holds_as_long_as_its_run_lives(tmp_path: Path) -> None:
    ref = "hf:org/repo:Q4_0"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as run:
        assert source.claim(tmp_path, ref, "z", run.pid) is None
        assert source.claim(tmp_path, ref, "a", os.getpid()) == "z"
        assert source.claim(tmp_path, ref, None, os.getpid()) == "z"
        assert source.claim(tmp_path, ref, "z", run.pid) is None  # its own
        assert source.claim(tmp_path, "hf:org/other:Q4_0", "a", os.getpid()) is None
        run.communicate(b"\n")
    assert source.claim(tmp_path, ref, "a", os.getpid()) is None


@pytest.mark.parametrize("broken", ["note", "folder"])
def test_a_cache_whose_notes_are_not_ours_is_one_without_notes(tmp_path: Path, broken: str) -> None:
    """Another user's note, or folder: neither can be opened. A folder in a file's place stands for it, also for root."""
    ref = "hf:org/repo:Q4_0"
    folder = tmp_path / "claims"
    source.claim(folder, ref, "a", os.getpid())
    (note,) = folder.iterdir()
    note.unlink()
    if broken == "note":
        note.mkdir()
    else:
        folder.rmdir()
        folder.write_text("")
    assert source.claim(folder, ref, "b", os.getpid()) is None
    assert source.claim(folder, ref, None, os.getpid()) is None


def test_what_went_wrong_and_what_happens_instead_is_said() -> None:
    shunned = Machine("c", shunned={"a": "port shut"})
    assert source.words("c", "REF", "get", "b", [shunned]) == ["a does not give REF to c: port shut; it comes from b"]
    assert source.words("c", "REF", "fetch", None, [shunned]) == ["a does not give REF to c: port shut; c fetches it itself"]
    lines = source.words("b", "REF", "fetch", None, [Machine("a", error=FULL), Machine("b")])
    assert lines == ["a could not fetch REF: full [INSUFFICIENT_DISK]; b does it"]
    assert source.words("b", "REF", "fetch", None, [Machine("b")]) == []


def test_the_fleet_s_note_of_who_fetches_is_another_run_s() -> None:
    hosts: dict[str, Any] = {name: {} for name in "abz"}
    hosts["a"]["__rbee_hive_model_claimed"] = {"ref": "REF", "machine": "z"}
    assert source.claimed_in(hosts, ["a", "b"], "REF") == "z"
    assert source.claimed_in(hosts, ["a", "b"], "OTHER") is None
    del hosts["z"]  # of another inventory: nothing can be asked of it
    assert source.claimed_in(hosts, ["a", "b"], "REF") is None


def test_of_runs_in_the_same_moment_the_first_note_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = node_modules.load("library", "rbee_claim")
    now = [1000.0]
    monkeypatch.setattr(claim, "RUN_DIR", str(tmp_path))
    monkeypatch.setattr("ansible.module_utils.rbee_node.RUN_DIR", str(tmp_path))
    monkeypatch.setattr(claim.time, "monotonic", lambda: now[0])

    def ask(machine: str, state: str = "present", *passed_by: str, check: bool = False) -> str | None:
        asked = {"ref": "REF", "machine": machine, "state": state, "passed_by": list(passed_by)}
        answer: str | None = claim.work(asked, check)
        return answer

    assert ask("a", check=True) is None
    assert ask("b") is None
    assert (ask("a"), ask("b")) == ("b", None)  # a is told, b is repeated
    assert ask("a", "absent") is None
    assert ask("a") == "b"  # nobody takes another's back
    assert (ask("a", "present", "b"), ask("b")) == (None, "a")  # b could not
    assert (ask("a", "absent"), ask("b")) == (None, None)
    now[0] += claim.VALID_S
    assert ask("a") is None  # of a run that died
    claim.path_of("REF").write_text("{")
    assert ask("b") is None
