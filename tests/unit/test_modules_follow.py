"""The action that shows how a unit gets on: what it makes of one look at the node."""

from __future__ import annotations

import json

import node_modules
import pytest

follow = node_modules.load("action_plugins", "rbee_follow")


def look(*lines: str, end: str = "\n") -> str:
    return f"ActiveState=active{end}StatusText=a=b{end}--rbee-progress--{end}" + "".join(lines)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_look_is_split_into_properties_and_complete_lines(end: str) -> None:
    text = look('{"stage": "downloading"}' + end, '{"stage": "comp', end=end)
    props, lines = follow.parse_look(text)
    assert props == {"ActiveState": "active", "StatusText": "a=b"}
    assert lines == [{"stage": "downloading"}]


def test_a_line_that_is_no_json_still_counts_so_that_the_next_look_goes_on_behind_it() -> None:
    assert follow.parse_look(look("garbage\n"))[1] == [{}]
    assert follow.parse_look(look())[1] == []


def test_of_many_lines_the_newest_is_shown_and_the_last_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(follow.display, "display", shown.append)
    action = follow.ActionModule.__new__(follow.ActionModule)
    many = [{"stage": "downloading", "human": f"{i} %"} for i in range(3)]
    assert action._lines(many) is None
    assert action._lines([{"stage": "retrying", "human": "again"}]) is None
    assert shown == ["rbee: 2 %", "rbee: again"]
    done = action._lines([{"stage": "complete", "human": "there", "downloaded": True, "model": {"id": "m"}}])
    assert done == {"changed": True, "rbee_result": {"model": {"id": "m"}, "downloaded": True}}


def test_what_begins_and_ends_between_two_looks_is_shown_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(follow.display, "display", shown.append)
    stages = ["resolving", "downloading", "downloading", "verifying", "complete"]
    follow.ActionModule.__new__(follow.ActionModule)._lines([{"stage": s, "human": f"{s} {n}"} for n, s in enumerate(stages)])
    assert shown == ["rbee: resolving 0", "rbee: downloading 2", "rbee: verifying 3", "rbee: complete 4"]


def test_a_failed_line_becomes_the_agreed_error() -> None:
    action = follow.ActionModule.__new__(follow.ActionModule)
    line = {"stage": "failed", "code": "MODEL_NOT_FOUND", "message": "no", "hint": "look", "details": {"n": 1}, "human": "no"}
    result = action._lines([json.loads(json.dumps(line))])
    assert result["failed"] is True
    assert result["rbee_error"] == {"code": "MODEL_NOT_FOUND", "message": "no", "hint": "look", "details": {"n": 1}}
    assert result["msg"] == "no [MODEL_NOT_FOUND]; next: look"
