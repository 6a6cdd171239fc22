"""plan and drift: what a run would change is told task by task, and the exit code says whether there is anything."""

from __future__ import annotations

from typing import Any

import pytest

from rbee_ctl import events, views
from rbee_ctl.commands.change import _report, _rolled
from rbee_ctl.playbook import HostOutcome, PlaybookResult, changes_of
from rbee_serve.contract.errors import SelfTestFailed, SshTimeout

CHANGE = {"task": "Write", "what": "/etc/x", "diff": "-a\n+b\n"}


def done(**result: Any) -> events.TaskDone:
    return events.TaskDone("lab1", "rbee_hive : Units | Install", "ok", changed=True, result=result)


def test_a_changed_task_is_named_with_its_file_and_its_diff() -> None:
    diff = {"before": "a\nb\n", "after": "a\nc\n", "after_header": "/etc/x"}
    (change,) = changes_of(done(changed=True, diff=diff))
    assert (change["task"], change["what"]) == ("Units | Install", "/etc/x")
    assert change["diff"].splitlines()[-2:] == ["-b", "+c"]


def test_of_a_loop_the_changed_items_alone_are_told() -> None:
    items = [
        {"changed": True, "dest": "/etc/one", "diff": [{"before": "", "after": "1\n"}]},
        {"changed": False, "dest": "/etc/two"},
        {"changed": True, "path": "/etc/three"},
    ]
    assert [c["what"] for c in changes_of(done(changed=True, results=items))] == ["/etc/one", "/etc/three"]


def test_a_file_that_would_be_copied_is_named_by_its_place_and_not_by_its_source() -> None:
    diff = {"before": "a\n", "after": "b\n", "before_header": "/etc/x", "after_header": "/checkout/x"}
    (change,) = changes_of(done(changed=True, diff=[diff]))
    assert change["what"] == "/etc/x"


def test_a_diff_of_records_is_shown_as_text() -> None:
    diff = {"before": {"src": "/old"}, "after": {"src": "/new"}}
    (change,) = changes_of(done(changed=True, dest="/etc/link", diff=diff))
    assert '+ "src": "/new"' in change["diff"]


@pytest.mark.parametrize(
    ("outcome", "found", "exit_code"),
    [
        (HostOutcome("ok"), {}, 0),
        (HostOutcome("ok"), {"changes": [CHANGE]}, 6),
        (HostOutcome("ok"), {"drift": [{"kind": "masked", "what": "u", "expected": "a", "found": "b", "next": "c"}]}, 6),
        (HostOutcome("unreachable", {}, SshTimeout("x")), {}, 4),
    ],
)
def test_the_exit_code_says_whether_anything_differs(outcome: HostOutcome, found: dict[str, Any], exit_code: int) -> None:
    play = PlaybookResult("success" if outcome.error is None else "unreachable", 0, {"lab1": outcome})
    result = _report("plan", play, {"lab1": found}, "plan")
    assert result.exit_code == exit_code
    assert result.data["differs"] is bool(found)
    shown = "\n".join(p if isinstance(p, str) else p.plain() for p in views.plan(result.data))
    assert ("/etc/x" in shown) == ("changes" in found)


def test_a_stopped_roll_says_which_machines_are_done_which_failed_and_which_were_not_begun() -> None:
    hosts = {
        "lab1": HostOutcome("ok", {"runs": "0.2.0-1"}),
        "lab2": HostOutcome("failed", {"model": {"id": "m"}}, SelfTestFailed("no token")),
        "lab3": HostOutcome("ok", {"model": {"id": "m"}}),
    }

    result = _rolled(PlaybookResult("partial", 2, hosts))

    assert result.exit_code == 14
    assert {h: o["upgraded"] for h, o in result.data["hosts"].items()} == {"lab1": True, "lab2": False, "lab3": False}
    shown = [str(part) for part in views.upgraded(result.data)]
    assert [line.split(",")[0] for line in shown] == ["lab1: runs 0.2.0-1", "lab2: failed", "lab3: not begun"]
