"""Ctrl+C on a real rbee-ctl with real playbooks: 130 in every stage, nothing left running, and the next run works (SPEC S-61)."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fleet import wait_until

from rbee_serve import process_tree

pytestmark = pytest.mark.integration

#: Stands in for every verb's playbook: waits in its one task until ``go`` is there.
PLAYBOOK = """
- hosts: all
  gather_facts: {gather}
  tasks:
    - name: Verb | hold
      ansible.builtin.command: {{argv: [sh, -c, "test -e {folder}/go || {{ touch {folder}/held; exec sleep 7615; }}"]}}
      changed_when: false
    - name: Verb | report
      ansible.builtin.set_fact:
        rbee_result: {{target: active, worker: {{}}}}
"""
#: Stands in for a node's Python: holds before the first module runs.
INTERPRETER = """#!/bin/sh
test -e {folder}/go || {{ touch {folder}/held; exec sleep 7615; }}
exec {python} "$@"
"""
#: An inventory that is a program, and as slow.
PROGRAM = """#!/bin/sh
test -e {folder}/go || {{ touch {folder}/held; sleep 7615; }}
cat <<X
{{"rbee_hives": {{"hosts": ["one"], "vars": {{"ansible_connection": "local", "ansible_python_interpreter": "{python}"}}}}}}
X
"""
HOSTS = """
rbee_hives:
  vars: {{ansible_connection: local, ansible_python_interpreter: "{python}"}}
  hosts: {{one: }}
"""
AWAY = """
rbee_hives:
  hosts: {{one: {{ansible_host: 127.0.0.1, ansible_port: 9, ansible_ssh_common_args: "-o ConnectTimeout=3"}}}}
"""


@dataclass
class Project:
    """A folder with playbooks and an inventory, and rbee-ctl that uses them."""

    folder: Path
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def write(self, name: str, text: str, *, executable: bool = False, **values: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(folder=self.folder, python=sys.executable, **values))
        path.chmod(0o755 if executable else 0o644)
        return path

    def begin(self, *args: str, terminal: int | None = None) -> subprocess.Popen[str]:
        """Start rbee-ctl; with ``terminal`` (a descriptor) stdin and stderr are one."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("RBEE_", "ANSIBLE_", "NO_COLOR"))}
        environ |= {"RBEE_INVENTORY": str(self.folder / "inventory.yml"), "RBEE_STATE_DIR": str(self.folder / "state")}
        environ |= {"RBEE_CACHE": str(self.folder / "cache"), "HOME": str(self.folder)}
        process = subprocess.Popen(
            [sys.executable, str(self.folder / "ctl.py"), *args],
            env=environ,
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
            cwd=self.folder,
        )
        self.running.append(process)
        return process

    @contextlib.contextmanager
    def on_a_terminal(self, *args: str, until: bytes) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
        """Start rbee-ctl on a terminal; yields it, and what it has written up to and with ``until``."""
        ours, theirs = pty.openpty()
        try:
            process, said = self.begin(*args, terminal=theirs), b""
            while until not in said:
                said += os.read(ours, 1000)
            yield process, said
        finally:
            os.close(ours)
            os.close(theirs)

    def held(self, process: subprocess.Popen[str]) -> list[process_tree.Process]:
        """Wait until something holds; returns all that runs below the command then."""

        def look() -> bool:
            assert process.poll() is None, process.communicate()
            return (self.folder / "held").exists()

        wait_until(look, "the stage is reached")
        return process_tree.descendants(process.pid)

    def go(self) -> None:
        (self.folder / "go").touch()


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    found = Project(tmp_path)
    found.write("inventory.yml", HOSTS)
    found.write("playbooks/hive_stop.yml", PLAYBOOK, gather="false")
    (tmp_path / "ctl.py").write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            from rbee_ctl import cli, content
            content.root = lambda: Path({str(tmp_path)!r})
            sys.exit(cli.main())
            """
        )
    )
    yield found
    for process in found.running:
        if process.poll() is None:
            process_tree.kill(process_tree.descendants(process.pid))
            process.kill()
        process.communicate()


def interrupted(process: subprocess.Popen[str], below: list[process_tree.Process], *, times: int = 1) -> tuple[str, str]:
    """Press Ctrl+C; returns stdout and stderr of a command that has ended as it should and left nothing."""
    for _ in range(times):
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    wait_until(lambda: not any(process_tree.alive(p) for p in below), "init has buried what was killed")
    return out, err


def folders(below: list[process_tree.Process]) -> set[str]:
    """Return the private folders of the runs below."""
    told = b""
    for process in below:
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            told += b"".join(Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
    return {match.decode() for match in re.findall(rb"/(?:dev/shm|tmp)/rbee-ctl-\w+", told)}


VERBS = [
    ("site", ("apply",)),
    ("upgrade", ("upgrade",)),
    ("drain", ("drain", "one")),
    ("install", ("setup", "install", "--node", "one")),
    ("stop", ("queen", "stop")),
    ("worker_start", ("worker", "start", "--node", "one", "--model", "m")),
    ("model_download", ("model", "download", "hf:org/repo")),
    ("runtime_build", ("worker", "build", "--type", "cpu")),
]


@pytest.mark.S61
@pytest.mark.parametrize(("playbook", "verb"), VERBS, ids=[" ".join(verb[:2]) for _, verb in VERBS])
def test_every_long_verb_ends_with_130_in_the_middle_of_a_task(project: Project, playbook: str, verb: tuple[str, ...]) -> None:
    project.write(f"playbooks/{playbook}.yml", PLAYBOOK, gather="false")
    process = project.begin(*verb, "--json")
    below = project.held(process)
    private = folders(below)
    out, _ = interrupted(process, below)
    envelope = json.loads(out)
    assert (envelope["exit_code"], [e["code"] for e in envelope["errors"]]) == (130, ["REQUEST_CANCELED"])
    assert private
    assert not [folder for folder in private if Path(folder).exists()]


def _program(project: Project) -> None:
    (project.folder / "inventory.yml").unlink()
    project.write("inventory.yml", PROGRAM, executable=True)


def _interpreter(project: Project) -> None:
    python = project.write("python3", INTERPRETER, executable=True)
    text = HOSTS.replace("{python}", str(python))
    project.write("inventory.yml", text)
    project.write("playbooks/hive_stop.yml", PLAYBOOK, gather="true")


@pytest.mark.S61
@pytest.mark.parametrize(
    ("prepare", "times"),
    [(_program, 1), (_interpreter, 1), (lambda _: None, 2)],
    ids=["before Ansible, at the inventory", "in gathering facts", "again, in the cleanup"],
)
def test_ctrl_c_in_any_stage_leaves_nothing_and_the_next_run_works(project: Project, prepare: object, times: int) -> None:
    assert callable(prepare)
    prepare(project)
    process = project.begin("hive", "stop", "--node", "one")
    below = project.held(process)
    private = folders(below)
    _, err = interrupted(process, below, times=times)
    assert "interrupted" in err
    assert not [folder for folder in private if Path(folder).exists()]
    project.go()
    again = project.begin("hive", "stop", "--node", "one")
    out, err = again.communicate(timeout=60)
    assert (again.returncode, "active" in out) == (0, True), err


@pytest.mark.S61
def test_ctrl_c_between_two_tries_of_a_machine_that_does_not_answer(project: Project) -> None:
    project.write("inventory.yml", AWAY)
    project.write("playbooks/hive_start.yml", PLAYBOOK, gather="false")
    process = project.begin("hive", "start", "--node", "one")
    assert process.stderr is not None
    assert any("attempt 2/3" in line for line in process.stderr)
    interrupted(process, process_tree.descendants(process.pid))


@pytest.mark.S61
def test_ctrl_c_at_the_question_changes_nothing(project: Project) -> None:
    project.write("playbooks/uninstall.yml", PLAYBOOK, gather="false")
    with project.on_a_terminal("hive", "uninstall", "--node", "one", until=b"[y/N]") as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not (project.folder / "held").exists()


def test_verbose_shows_ansibles_own_output_and_colours_are_for_terminals(project: Project) -> None:
    """Also the output of ansible-playbook, which would colour it if it could."""
    project.go()
    plain = project.begin("hive", "stop", "--node", "one")
    out, err = plain.communicate(timeout=60)
    assert (plain.returncode, "PLAY RECAP" in err) == (0, False), err
    loud = project.begin("hive", "stop", "--node", "one", "--verbose")
    loud_out, loud_err = loud.communicate(timeout=60)
    assert loud.returncode == 0, loud_err
    assert "TASK [Verb | report]" in loud_err
    assert "PLAY RECAP" in loud_err
    assert loud_out == out
    assert not any("\x1b" in text for text in (out, err, loud_out, loud_err))
    quiet = project.begin("hive", "stop", "--node", "one", "-q")
    assert quiet.communicate(timeout=60) == (out, "")

    with project.on_a_terminal("hive", "stop", "--node", "one", until=b"report") as (shown, said):
        assert shown.wait(60) == 0
    assert b"\x1b[2m" in said
