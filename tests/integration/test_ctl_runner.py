"""Real playbooks through rbee_ctl.playbook: outcomes, secrets, Ctrl+C. Local connection; one host that does not answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fleet import wait_until

from rbee_ctl import content, events
from rbee_ctl.playbook import run_playbook
from rbee_serve import process_tree
from rbee_serve.contract.errors import MissingDependency

pytestmark = pytest.mark.integration

SECRET = "planted-" + "secret-5f3a"
INVENTORY = """
all:
  vars: {ansible_connection: local, ansible_python_interpreter: "%s"}
  hosts:
    good: {wrong: false}
    bad: {wrong: true}
    away: {ansible_connection: ssh, ansible_host: 127.0.0.1, ansible_port: 9, ansible_ssh_args: "-o ConnectTimeout=3"}
"""
PLAYBOOK = """
- hosts: all
  gather_facts: false
  tasks:
    - name: Verb | look
      ansible.builtin.command: "true"
      changed_when: false
    - name: Verb | refuse
      ansible.builtin.fail: {msg: "it is wrong"}
      when: wrong
    - name: Verb | report
      ansible.builtin.set_fact:
        rbee_result: {given: "{{ given | default('nothing') }}", state: "{{ lookup('env', 'RBEE_STATE_DIR') }}"}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "playbooks").mkdir()
    (tmp_path / "playbooks/verb.yml").write_text(PLAYBOOK)
    (tmp_path / "inventory.yml").write_text(INVENTORY % sys.executable)
    monkeypatch.setattr(content, "root", lambda: tmp_path)
    return tmp_path


@pytest.mark.N06
def test_each_host_has_its_own_outcome(project: Path) -> None:
    seen: list[events.Event] = []
    inventory = project / "inventory.yml"
    result = run_playbook("verb", inventory=inventory, extra_vars={"given": "x y"}, on_event=seen.append, state_dir=project)
    assert {h: o.status for h, o in result.hosts.items()} == {"good": "ok", "bad": "failed", "away": "unreachable"}
    assert result.hosts["good"].result == {"given": "x y", "state": str(project)}
    assert [getattr(o.error, "code", None) for o in result.hosts.values()].count("PLAYBOOK_FAILED") == 1
    assert result.hosts["away"].error is not None
    assert result.hosts["away"].error.code == "NODE_UNREACHABLE"
    assert (result.status, result.exit_code) == ("partial", 3)
    assert events.TaskStarted("Verb | look") in seen


@pytest.mark.parametrize(
    ("limit", "status", "exit_code"), [("good", "success", 0), ("bad", "failed", 1), ("away", "unreachable", 4)]
)
def test_limit_and_exit_code(project: Path, limit: str, status: str, exit_code: int) -> None:
    result = run_playbook("verb", inventory=project / "inventory.yml", limit=limit)
    assert (list(result.hosts), result.status, result.exit_code) == ([limit], status, exit_code)


def test_playbook_that_can_not_be_parsed_says_why(project: Path) -> None:
    (project / "playbooks/verb.yml").write_text("- hosts: all\n  tasks:\n    - nonsense_module_xyz: {}\n")
    result = run_playbook("verb", inventory=project / "inventory.yml", limit="good")
    assert result.exit_code == 1
    assert result.error is not None
    assert "nonsense_module_xyz" in result.error.message


def test_unknown_playbook_is_named(project: Path) -> None:
    with pytest.raises(MissingDependency, match=r"no playbook fly\.yml"):
        run_playbook("fly", inventory=project / "inventory.yml")


def private_folders(below: list[process_tree.Process]) -> set[Path]:
    """Return the folders of runs that these processes know of: other tests have runs of their own at the same time."""
    known = b""
    for process in below:
        with contextlib.suppress(OSError):
            known += Path(f"/proc/{process.pid}/cmdline").read_bytes() + Path(f"/proc/{process.pid}/environ").read_bytes()
    folders = {p for base in (Path("/dev/shm"), Path("/tmp")) for p in base.glob("rbee-ctl-*")}
    return {p for p in folders if str(p).encode() in known}


def holds_secret(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


@pytest.mark.N06
def test_secret_variables_are_in_no_argv_and_leave_no_trace_after_a_failure(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UNLISTED_TOKEN", SECRET)
    mine: set[Path] = set()
    commands: set[str] = set()
    environments: set[bytes] = set()
    modes: set[int] = set()

    def look(_: events.Event) -> None:
        below = process_tree.descendants(os.getpid())
        for process in below:
            try:
                commands.add(Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace"))
                environments.add(Path(f"/proc/{process.pid}/environ").read_bytes())
            except OSError:
                continue
        found = private_folders(below)
        mine.update(found)
        modes.update(p.stat().st_mode & 0o777 for p in found)

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    run_playbook("verb", inventory=project / "inventory.yml", limit="good,bad", extra_vars={"given": SECRET}, on_event=look)
    assert any("ansible-playbook" in c for c in commands)
    assert not [c for c in commands if SECRET in c]
    assert not [e for e in environments if SECRET.encode() in e]
    assert modes == {0o700}
    assert not [p for p in mine if p.exists()]
    assert holds_secret(home) == []


@pytest.mark.N06
def test_ctrl_c_ends_the_whole_tree_and_removes_the_folder(project: Path) -> None:
    (project / "playbooks/verb.yml").write_text(
        textwrap.dedent(
            """
            - hosts: good
              gather_facts: false
              tasks:
                - name: Verb | hang
                  ansible.builtin.command: "sleep 4242"
                  changed_when: false
            """
        )
    )
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from rbee_ctl import content, playbook
        root = Path({str(project)!r})
        content.root = lambda: root
        playbook.run_playbook("verb", inventory=root / "inventory.yml", extra_vars={{"given": {SECRET!r}}})
        """
    )
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        below = wait_for_command(child, "sleep\0004242")
        mine = private_folders(below)
        assert mine
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert "KeyboardInterrupt" in err
    assert not [p for p in mine if p.exists()]
    wait_until(lambda: not any(map(process_tree.alive, below)), "init has buried what was killed")


def wait_for_command(child: subprocess.Popen[str], command: str) -> list[process_tree.Process]:
    """Return all descendants as soon as one of them runs ``command``."""

    def look() -> list[process_tree.Process]:
        assert child.poll() is None, "it ended before"
        below = process_tree.descendants(child.pid)
        for process in below:
            with contextlib.suppress(OSError):  # gone meanwhile
                if command in Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace"):
                    return below
        return []

    return wait_until(look, f"{json.dumps(command)} is started")


def test_an_inventory_that_can_not_be_read_fails_also_without_rbee_ctl(tmp_path: Path) -> None:
    """Ansible by itself warns, finds no machines and reports success."""
    broken = tmp_path / "inventory.yml"
    broken.write_text("rbee_hives: [\n")
    for playbook in ("site.yml", "playbooks/stop.yml"):
        command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(broken), playbook]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], timeout=120)
        assert done.returncode != 0
        assert str(broken) in done.stderr


@pytest.mark.parametrize(("callback", "told"), [("default", True), ("minimal", False)])
def test_ansible_playbook_by_itself_says_which_task_still_runs(tmp_path: Path, callback: str, told: bool) -> None:
    """SPEC N-05 without rbee-ctl; whoever has Ansible write for programs gets nothing between."""
    play = tmp_path / "long.yml"
    play.write_text(
        "- hosts: localhost\n  connection: local\n  gather_facts: false\n  tasks:\n"
        "    - name: Quick\n      ansible.builtin.command: 'true'\n"
        "    - name: Long | Take a while\n      ansible.builtin.command: sleep 4.2\n"
    )
    environ = {"ANSIBLE_CONFIG": str(Path(__file__).parents[2] / "ansible.cfg"), "ANSIBLE_STDOUT_CALLBACK": callback}
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", str(play)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environ, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("rbee: Long | Take a while: ")]
    assert (len(lines) >= 2) is told, done.stdout


def test_the_password_of_a_vault_is_the_users_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the inventory that is encrypted, as for ansible-playbook; its password's file may be named from here."""
    (project / "pw").write_text("open sesame\n")
    (project / "pw").chmod(0o600)
    vault = [str(Path(sys.executable).parent / "ansible-vault"), "encrypt_string", "--vault-password-file", str(project / "pw")]
    given = subprocess.run([*vault, SECRET, "--name", "given"], capture_output=True, text=True, check=True, timeout=60).stdout
    inventory = project / "vaulted.yml"
    head, tail = "all:\n  vars:\n", "".join(f"    {line}\n" for line in given.splitlines())
    local = f"    ansible_connection: local\n    ansible_python_interpreter: {sys.executable}\n    wrong: false\n"
    inventory.write_text(f"{head}{local}{tail}  hosts:\n    good:\n")

    closed = run_playbook("verb", inventory=inventory, state_dir=project)
    assert closed.exit_code != 0
    monkeypatch.chdir(project)
    monkeypatch.setenv("ANSIBLE_VAULT_PASSWORD_FILE", "pw")
    opened = run_playbook("verb", inventory=inventory, state_dir=project)
    assert opened.exit_code == 0
    assert opened.hosts["good"].result["given"] == SECRET
