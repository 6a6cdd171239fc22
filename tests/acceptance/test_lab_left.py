"""A test run that is broken off leaves no machine running, also where several processes run the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from machines import ROOT, Lab
from waiting import until

#: A run of its own, with the hooks of this one and a test that boots a machine and never ends.
CONFTEST = """
from tests import leftover_labs


def pytest_configure(config):
    leftover_labs.begin(config)


def pytest_unconfigure(config):
    leftover_labs.take_down(config)
"""
HOLDS = """
import threading
from pathlib import Path

from machines import Lab


def test_hold():
    Lab(Path({directory!r}), {net!r}).run("up", "--nodes", "1")
    Path({held!r}).touch()
    threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("signals", "processes"),
    [
        (lambda pid: os.killpg(pid, signal.SIGINT), ("-n", "1")),  # Ctrl+C on a terminal reaches all of them
        (lambda pid: os.kill(pid, signal.SIGTERM), ("-n", "0")),
    ],
    ids=["Ctrl+C, two processes", "SIGTERM, one process"],
)
def test_machines_are_taken_down(
    lab_possible: None, tmp_path: Path, signals: Callable[[int], None], processes: tuple[str, str]
) -> None:
    lab, held = Lab(tmp_path / "lab"), tmp_path / "held"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/conftest.py").write_text(CONFTEST)
    (tmp_path / "run/test_holds.py").write_text(HOLDS.format(directory=str(lab.directory), net=lab.net, held=str(held)))
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "tests/acceptance", ROOT)))
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, *processes]
    run = subprocess.Popen(
        [*command, f"--rootdir={tmp_path}", f"--basetemp={tmp_path}/base", str(tmp_path / "run")],
        env=environ,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_takes_ctrl_c,
    )
    try:
        until(lambda: held.exists() or run.poll() is not None, "a machine runs", limit_s=600)
        assert [n["state"] for n in lab.run("status")["nodes"]] == ["running"]
        signals(run.pid)
        said, _ = run.communicate(timeout=300)
        left = lab.run("status")
    finally:
        run.kill()
        lab.down()
    assert left["nodes"] == [], said
    assert not any(left["belongings"].values()), left["belongings"]
    assert f"taking down the lab in {lab.directory}" in said


def _takes_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
