"""``rbee-ctl status``: the queen's view, and what machines say of declared workers that she does not hear."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rbee_ctl import cli
from rbee_ctl.playbook import HostOutcome, PlaybookResult
from rbee_ctl.render import Ui
from rbee_ctl.result import OperationResult
from rbee_ctl.session import Session
from rbee_serve.contract.errors import MissingDependency, SshTimeout
from tests.unit.queen_stand_in import QueenStandIn, worker

INVENTORY = """
rbee_hives:
  hosts:
    lab1: {ansible_host: 10.77.0.11, rbee_workers: [{backend: cpu, model: m}, {backend: cpu, name: cpu0-x, state: stopped}]}
    lab2: {ansible_host: 10.77.0.12, rbee_workers: [{backend: cpu, model: m}, {backend: cuda, device: 1, model: m}]}
    lab3: {ansible_host: 10.77.0.13}
"""
FAILED = {
    "unit": "rbee-worker@cuda1.service",
    "name": "cuda1",
    "active_state": "failed",
    "sub_state": "failed",
    "result": "exit-code",
    "n_restarts": 5,
    "journal": ["it fell off the bus"],
}


@pytest.fixture
def queen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[QueenStandIn]:
    (tmp_path / "inventory.yml").write_text(INVENTORY)
    for name in [n for n in os.environ if n.startswith("RBEE_")]:
        monkeypatch.delenv(name)
    with QueenStandIn().running() as found:
        settings = {"inventory": "inventory.yml", "state_dir": "state", "queen_url": found.url}
        (tmp_path / "config.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
        monkeypatch.setenv("RBEE_CONFIG", str(tmp_path / "config.toml"))
        found.workers = [worker("lab1-cpu0"), worker("lab2-cpu0")]
        yield found


def status(monkeypatch: pytest.MonkeyPatch, outcome: HostOutcome | Exception, *more: str) -> tuple[list[Any], str, str]:
    """Return (limits of the playbooks that ran, stdout, stderr)."""
    asked: list[Any] = []

    def play(_: Session, name: str, *, limit: str, silent: bool) -> PlaybookResult:
        asked.append((name, limit, silent))
        if isinstance(outcome, Exception):
            raise outcome
        return PlaybookResult("success", 0, {"lab2": outcome})

    monkeypatch.setattr(Session, "play", play)
    out, err = io.StringIO(), io.StringIO()
    ui = Ui(out, err)
    result = cli.run(["status", *more], ui)
    ui.finish(result)
    assert result.exit_code == 0
    return asked, out.getvalue(), err.getvalue()


def test_a_failed_unit_is_shown_with_its_last_words_and_only_its_machine_is_asked(
    queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = HostOutcome("ok", {"hive": {"target": "active", "units": [FAILED]}})
    asked, out, err = status(monkeypatch, outcome, "--ask")
    assert asked == [("status", "lab2", True)]
    assert "declared and not heard: lab2-cuda1; asking lab2" in err
    assert "lab2-cuda1     lab2  failed (failed)  exit-code  5         active" in out
    assert "    it fell off the bus" in out
    assert "next: journalctl -u rbee-worker@cuda1.service -n 50 on lab2; then rbee-ctl hive start --node lab2" in out


def test_a_machine_that_is_away_and_one_that_is_stopped_say_so(queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    away = HostOutcome("unreachable", {}, SshTimeout("lab2: SSH did not answer in time", hint="is it up?"))
    _, out, _ = status(monkeypatch, away, "--ask")
    assert "lab2: SSH did not answer in time\n  next: is it up?" in out
    _, out, _ = status(monkeypatch, HostOutcome("ok", {"hive": {"target": "inactive", "units": []}}), "--verbose")
    assert "lab2: the hive is stopped; next: rbee-ctl hive start --node lab2" in out


def test_nobody_is_asked_unless_it_is_wanted_and_what_was_not_looked_at_is_said(
    queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPEC OP-14: in a second, from what the queen knows."""
    outcome = HostOutcome("ok", {})
    asked, out, err = status(monkeypatch, outcome)
    assert asked == []
    assert "declared and not heard: lab2-cuda1; lab2 not asked; to ask: rbee-ctl status --ask" in err
    assert "lab2-cuda1     lab2  not asked" in out
    assert status(monkeypatch, outcome, "--quick", "--verbose")[0] == []
    queen.workers.append(worker("lab2-cuda1", backend="cuda", device=1))
    asked, _, err = status(monkeypatch, outcome, "--ask")
    assert (asked, err) == ([], "")


def test_without_ansible_the_queens_view_is_what_there_is(queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, err = status(monkeypatch, MissingDependency("ansible-runner is not installed"), "--ask")
    assert "ansible-runner is not installed" in err
    assert "lab2-cuda1     lab2  not asked" in out


def hives(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    return {h["name"]: h for h in json.loads(status(monkeypatch, HostOutcome("ok", {}), "--json")[1])["data"]["hives"]}


def test_a_machine_s_status_is_the_queen_s_word_and_follows_her_rule_where_she_was_not_told(
    queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"declared": True, "address": None, "models": ["m"], "slots": {"total": 2, "busy": 0}}
    queen.hives = [
        {"name": "lab1", "status": "asleep", "workers": ["lab1-cpu0"], **told},
        {"name": "stray", "status": "up", "workers": ["stray-cpu0"], **told},
    ]
    found = hives(monkeypatch)
    assert {name: (h["status"], h["address"]) for name, h in found.items()} == {
        "lab1": ("asleep", "10.77.0.11"),
        "lab2": ("silent", "10.77.0.12"),
        "lab3": ("empty", "10.77.0.13"),
        "stray": ("up", None),
    }
    assert found["lab1"] == {**queen.hives[0], "address": "10.77.0.11", "state": "asleep"}
    assert all(h["state"] == h["status"] for h in found.values())


@pytest.mark.parametrize("command", [("worker", "list"), ("workers", "list"), ("workers", "health")])
def test_a_machine_that_nobody_knows_is_no_empty_list(queen: QueenStandIn, command: tuple[str, str]) -> None:
    def ask(node: str) -> OperationResult:
        return cli.run([*command, "--node", node], Ui(io.StringIO(), io.StringIO()))

    queen.hives = [{"name": "stray", "declared": False}]
    (error,) = ask("lab4").errors
    assert (error.code, error.details["known"]) == ("NODE_NOT_FOUND", ["lab1", "lab2", "lab3"])
    assert "did you mean lab" in (error.hint or "")
    assert ask("lab3").data["workers"] == []
    assert ask("stray").data["workers"] == []


def test_without_an_inventory_the_queen_says_which_machines_there_are(
    queen: QueenStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alone.toml").write_text(f'queen_url = "{queen.url}"\nstate_dir = "state"\n')
    monkeypatch.setenv("RBEE_CONFIG", str(tmp_path / "alone.toml"))
    ui = Ui(io.StringIO(), io.StringIO())
    assert cli.run(["worker", "list", "--node", "ghost"], ui).data == {"workers": []}, "she was told of no machine: who knows?"
    queen.hives = [{"name": "lab1", "declared": True}]
    (error,) = cli.run(["worker", "list", "--node", "ghost"], ui).errors
    assert (error.code, error.details["known"]) == ("NODE_NOT_FOUND", ["lab1"])
