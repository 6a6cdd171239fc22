"""One record, one line, whatever it holds."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rbee_serve.common.log import LineFormatter, correlation, setup_logging
from rbee_serve.contract.errors import ConfigInvalid
from rbee_serve.contract.log_lines import from_journal, readable


@pytest.fixture(autouse=True)
def root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def line(
    message: str, *args: object, level: int = logging.INFO, journal: bool = True, text: bool = False, **extra: object
) -> str:
    record = logging.getLogger("rbee.test").makeRecord("rbee.test", level, "f", 1, message, args, None, None, extra)
    return LineFormatter(journal=journal, text=text).format(record)


def fields(*args: Any, **extra: Any) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(line(*args, journal=False, **extra))
    return parsed


def test_a_record_is_one_json_object_with_its_facts() -> None:
    found = fields("queen %s", "up", port=8080, why="two words", where=Path("/x"))

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "info",
        "logger": "rbee.test",
        "message": "queen up",
        "port": 8080,
        "why": "two words",
        "where": "/x",
    }


def test_a_fact_can_not_take_the_place_of_the_head() -> None:
    found = fields("m", time="never", logger="other", correlation_id="mine")

    assert (found["time_"], found["logger_"], found["logger"]) == ("never", "other", "rbee.test")
    assert found["time"] != "never"


def test_an_exception_is_told_in_the_same_line() -> None:
    try:
        raise ValueError("why\nnot")
    except ValueError:
        record = logging.getLogger("rbee.test").makeRecord("rbee.test", 40, "f", 1, "m", (), sys.exc_info())
    for text in (False, True):
        made = LineFormatter(journal=False, text=text).format(record)
        assert len(made.splitlines()) == 1
        assert "ValueError: why" in made


def test_text_has_extras_as_key_and_value() -> None:
    made = line("queen %s", "up", text=True, port=8080, why="two words")

    assert made == '<6>info rbee.test: queen up port=8080 why="two words"'


@pytest.mark.parametrize("nasty", ["a\nb", "a\r\nb", "\x1b[31mred", "nul\x00", "\u2028", "fake [id]", "\ud800"])
@pytest.mark.parametrize("text", [False, True])
def test_nothing_breaks_out_of_the_line(nasty: str, text: bool) -> None:
    for made in (line(nasty, text=text), line("m", text=text, value=nasty), line("%s", nasty, text=text)):
        assert made.isprintable()
        assert len(made.splitlines()) == 1


def test_correlation_id_is_there_while_a_request_is_handled() -> None:
    reset = correlation.set("c-1")
    try:
        assert line("m", text=True, a=1).endswith("m a=1 [c-1]")
        assert fields("m")["correlation_id"] == "c-1"
    finally:
        correlation.reset(reset)
    assert "correlation_id" not in fields("m")


def test_the_journal_s_lines_are_readable_again() -> None:
    before = "2026-01-01T00:00:00+0000 lab1 rbee-queen[7]"

    assert readable(f"{before}: {line('m', journal=False, a=1)}") == f"{before}: info rbee.test: m a=1"
    for other in ("-- Boot --", f"{before}: plain words", f'{before}: {{"time":1', f'{before}: {{"time":'):
        assert readable(other) == other


def test_an_entry_of_the_journal_is_one_flat_object_for_programs() -> None:
    entry = {"_SYSTEMD_UNIT": "rbee-worker@cpu0.service", "_PID": "7", "PRIORITY": "6", "SYSLOG_IDENTIFIER": "x"}
    entry |= {"__REALTIME_TIMESTAMP": "1700000000123456"}
    head = {"node": "lab1", "unit": "rbee-worker@cpu0.service", "pid": 7}
    said = line("ready", journal=False, slots=4)
    ours = from_journal(json.dumps(entry | {"MESSAGE": said}), "lab1")
    assert ours == head | json.loads(said)
    plain = from_journal(json.dumps(entry | {"MESSAGE": "Started."}), "lab1")
    assert plain == head | {"time": "2023-11-14T22:13:20.123Z", "message": "Started.", "source": "x", "priority": 6}
    assert from_journal(json.dumps(entry | {"MESSAGE": [104, 105, 255]}), "lab1")["message"] == "hi\ufffd"
    assert from_journal(json.dumps(entry | {"MESSAGE": '{"time":'}), "lab1")["message"] == '{"time":'
    for odd in ("no JSON", "[1]"):
        assert from_journal(odd, "lab1") == {"node": "lab1", "message": odd}


@pytest.mark.parametrize(("level", "priority"), [(10, 7), (20, 6), (30, 4), (40, 3), (50, 2)])
def test_journal_gets_the_priority(level: int, priority: int) -> None:
    assert line("m", level=level).startswith(f"<{priority}>")


def test_terminal_gets_the_time() -> None:
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info rbee.test: m$", line("m", journal=False, text=True))


def test_level_comes_from_settings_and_rbee_log_overrides_it(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("warning", environ={})
    logging.getLogger("rbee.a").info("quiet")
    setup_logging("warning", "text", {"RBEE_LOG": "debug"})
    logging.getLogger("rbee.a").debug("loud")

    err = capsys.readouterr().err
    assert "quiet" not in err
    assert "debug rbee.a: loud" in err


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"RBEE_LOG: got 'loud', expected one of debug"):
        setup_logging("info", environ={"RBEE_LOG": "loud"})


def test_auto_is_json_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", environ={})
    logging.getLogger("rbee.a").info("said")

    assert json.loads(capsys.readouterr().err)["message"] == "said"
