"""ansible-playbook that is begun ahead: for which verbs, and what becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
import typer

from rbee_ctl import ansible_ahead
from rbee_ctl.ansible_environment import environment, of_run
from rbee_ctl.cli import app
from rbee_ctl.terminal import Terminal
from rbee_serve import process_tree

PLAYBOOK = str(Path(sys.executable).with_name("ansible-playbook"))
PLAY = """
- hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.debug:
        msg: "ran as {{ lookup('ansible.builtin.pipe', 'cat /proc/$PPID/cmdline') }} in {{ lookup('env', 'LATE') }}"
"""


def until(condition: Callable[[], bool], what: str, limit_s: float = 60) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.02)


@pytest.fixture
def waiting() -> Iterator[ansible_ahead.Ahead]:
    ansible_ahead.begin(["worker", "start"])
    found = ansible_ahead._waiting
    assert found is not None
    with found.folder:
        yield found
        ansible_ahead.end()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("worker start --node a --model m", True),
        ("-i file --json worker --quiet stop x", True),
        ("apply", True),
        ("worker list", False),
        ("worker start --help", False),
        ("-i apply", False),
        ("--version", False),
        ("", False),
    ],
)
def test_it_begins_for_verbs_that_run_a_playbook_alone(line: str, wanted: bool) -> None:
    assert ansible_ahead.wanted(line.split()) is wanted


def test_the_verbs_exist() -> None:
    root = typer.main.get_command(app)
    for verb in ansible_ahead.VERBS:
        group = root
        for word in verb.split():
            assert word in group.commands, verb  # type: ignore[attr-defined]
            group = group.commands[word]  # type: ignore[attr-defined]


def run(waiting: ansible_ahead.Ahead, tmp_path: Path, **changes: str) -> tuple[int, str, int | None]:
    (tmp_path / "play.yml").write_text(PLAY)
    env = environment() | of_run(Path(waiting.folder.name)) | ansible_ahead._runners_settings()
    env |= {"ANSIBLE_STDOUT_CALLBACK": "awx_display", "AWX_ISOLATED_DATA_DIR": str(tmp_path), "RBEE_LATE": "x"} | changes
    (tmp_path / "job_events").mkdir()
    terminal = Terminal(
        PLAYBOOK, ["-i", "localhost,", "-c", "local", "play.yml"], cwd=str(tmp_path), env=env, timeout=60, encoding="utf-8"
    )
    terminal.expect(pexpect.EOF)
    terminal.close()
    events = [json.loads(p.read_text()) for p in (tmp_path / "job_events").glob("*.json")]
    return terminal.pid, str(events), terminal.exitstatus


def test_it_runs_what_it_is_given(waiting: ansible_ahead.Ahead, tmp_path: Path) -> None:
    pid, said, status = run(waiting, tmp_path)
    assert (pid, status) == (waiting.process.pid, 0)
    assert f"{ansible_ahead._WAITING}" in said


def test_another_environment_than_it_has_imported_with_means_a_new_start(waiting: ansible_ahead.Ahead, tmp_path: Path) -> None:
    pid, said, status = run(waiting, tmp_path, LATE="there")
    assert (pid, status) == (waiting.process.pid, 0)
    assert PLAYBOOK in said
    assert "in there" in said
    assert str(ansible_ahead._WAITING) not in said


def test_one_that_has_died_is_replaced(waiting: ansible_ahead.Ahead, tmp_path: Path) -> None:
    os.kill(waiting.process.pid, signal.SIGKILL)
    until(lambda: not waiting.process.isalive(), "it is dead")
    pid, said, status = run(waiting, tmp_path)
    assert (pid != waiting.process.pid, status) == (True, 0)
    assert PLAYBOOK in said


def test_another_program_does_not_get_it(waiting: ansible_ahead.Ahead) -> None:
    terminal = Terminal("/bin/true", [])
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert (terminal.exitstatus, waiting.process.isalive()) == (0, False)


def test_nothing_is_left_when_rbee_ctl_is_killed_or_needs_none(tmp_path: Path) -> None:
    script = (
        "import sys; from rbee_ctl import ansible_ahead as a; a.begin(['apply']); "
        "print(a._waiting.process.pid, a._waiting.folder.name, flush=True); sys.stdin.read(); a.end()"
    )
    for signal_or_none in (signal.SIGKILL, None):
        with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ctl:
            assert ctl.stdout is not None
            pid, folder = ctl.stdout.readline().split()
            child = next(p for p in process_tree.children(ctl.pid) if p.pid == int(pid))
            if signal_or_none is not None:
                ctl.send_signal(signal_or_none)
            else:
                assert ctl.stdin is not None
                ctl.stdin.close()
            ctl.wait(60)
        until(lambda: not process_tree.alive(child), "the process that waited has ended")  # noqa: B023 -- within the turn
        assert not Path(folder).exists()
