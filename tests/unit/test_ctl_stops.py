"""Signals and closed pipes as rbee-ctl meets them at its edges: before its first line, twice at once, after its last word."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from rbee_ctl.cli import _Stop
from rbee_ctl.ephemeral import Ephemeral
from rbee_ctl.playbook import PlaybookResult
from rbee_ctl.render import Ui
from rbee_ctl.session import Session


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_a_stop_during_the_imports_is_130(how: str) -> None:
    script = f"""
        import os, signal, sys
        from rbee_ctl.start import main

        class Finder:
            def find_spec(self, name, *_):
                if name == "rbee_ctl.cli":
                    os.kill(os.getpid(), signal.{how})

        sys.meta_path.insert(0, Finder())
        sys.exit(main())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), "version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_signals_on_each_others_heels_are_one_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """timeout(1) signals its child and then the child's group."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stop = _Stop()
    for at, raises in ((100.0, True), (100.001, False), (102.0, True)):
        now[0] = at
        if raises:
            with pytest.raises(KeyboardInterrupt):
                stop(signal.SIGTERM, None)
        else:
            stop(signal.SIGTERM, None)


@pytest.mark.parametrize("events", [False, True])
def test_that_the_reader_has_left_is_told_once_and_what_is_put_in_order_then_may_go_on_talking(events: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        ui = Ui(stream if events else io.StringIO(), stream)
        ui.events = events
        with pytest.raises(BrokenPipeError):
            ui.narrate("ctl", "stop", "once")
        ui.narrate("ctl", "stop", "nobody hears it")


def test_what_was_started_for_one_answer_is_stopped_also_when_nobody_reads_that() -> None:
    """`infer --ephemeral ... 2>&1 | head`: both streams are closed."""
    reading, writing = os.pipe()
    os.close(reading)
    stopped: list[str] = []

    def stop() -> PlaybookResult:
        stopped.append("queen")
        return PlaybookResult("success", 0, {})

    def answer(owner: Ephemeral) -> None:
        with owner:
            owner._owned.append(("the queen", stop))
            owner._session.ui.token("a word")

    with os.fdopen(writing, "w") as out, os.fdopen(os.dup(writing), "w") as err:
        with pytest.raises(BrokenPipeError):
            answer(Ephemeral(Session(Ui(out, err))))
        assert stopped == ["queen"]
