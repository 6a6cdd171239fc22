"""One record, one line, whatever it holds."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from rbee_serve.common.log import LineFormatter, correlation, setup_logging
from rbee_serve.contract.errors import ConfigInvalid


@pytest.fixture(autouse=True)
def root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def line(message: str, *args: object, level: int = logging.INFO, journal: bool = True, **extra: object) -> str:
    record = logging.getLogger("rbee.test").makeRecord("rbee.test", level, "f", 1, message, args, None, None, extra)
    return LineFormatter(journal=journal).format(record)


def test_extras_follow_as_key_and_value() -> None:
    assert line("queen %s", "up", port=8080, why="two words") == '<6>info rbee.test: queen up port=8080 why="two words"'


@pytest.mark.parametrize("nasty", ["a\nb", "a\r\nb", "\x1b[31mred", "nul\x00", "\u2028", "fake [id]"])
def test_nothing_breaks_out_of_the_line(nasty: str) -> None:
    for text in (line(nasty), line("m", value=nasty), line("%s", nasty)):
        assert text.isprintable()
        assert len(text.splitlines()) == 1


def test_correlation_id_stands_last() -> None:
    reset = correlation.set("c-1")
    try:
        assert line("m", a=1).endswith("m a=1 [c-1]")
    finally:
        correlation.reset(reset)
    assert not line("m").endswith("]")


@pytest.mark.parametrize(("level", "priority"), [(10, 7), (20, 6), (30, 4), (40, 3), (50, 2)])
def test_journal_gets_the_priority(level: int, priority: int) -> None:
    assert line("m", level=level).startswith(f"<{priority}>")


def test_terminal_gets_the_time() -> None:
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} info rbee.test: m$", line("m", journal=False))


def test_level_comes_from_settings_and_rbee_log_overrides_it(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("warning", {})
    logging.getLogger("rbee.a").info("quiet")
    setup_logging("warning", {"RBEE_LOG": "debug"})
    logging.getLogger("rbee.a").debug("loud")

    err = capsys.readouterr().err
    assert "quiet" not in err
    assert "debug rbee.a: loud" in err


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"RBEE_LOG: got 'loud', expected one of debug"):
        setup_logging("info", {"RBEE_LOG": "loud"})
