"""rbee-ctl runs no ssh and no systemctl itself: every program that it starts is looked at (SPEC P-06)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

#: Imported by the interpreter before rbee-ctl: writes down every program that it, or a fork of it, becomes or starts.
HOOK = """
import json, os, sys
def _seen(event, args):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "pty.spawn"):
        argv = args[0] if event in ("os.system", "pty.spawn") else args[1]
        with open(os.environ["SEEN"], "a") as f:
            f.write(json.dumps([event, [os.fsdecode(a) for a in argv] if not isinstance(argv, str) else [argv]]) + "\\n")
sys.addaudithook(_seen)
"""


def started(folder: Path, *arguments: str) -> list[list[str]]:
    """Run rbee-ctl and return the programs that it started itself."""
    (folder / "sitecustomize.py").write_text(HOOK)
    (folder / "inventory.yml").write_text(
        "rbee_hives:\n  hosts:\n    gone: {ansible_host: 127.0.0.1, ansible_port: 9}\n"
        f"    here: {{ansible_connection: local, ansible_python_interpreter: {sys.executable}}}\n"
    )
    seen = folder / "seen.jsonl"
    seen.write_text("")
    # Ansible gets an environment of named variables only, so what it starts in turn does not have the hook.
    environ = os.environ | {
        "PYTHONPATH": f"{folder}:{Path(__file__).resolve().parents[2]}",
        "SEEN": str(seen),
        "HOME": str(folder),
        "RBEE_INVENTORY": str(folder / "inventory.yml"),
        "RBEE_QUEEN_URL": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "rbee_ctl.cli", *arguments]
    subprocess.run(command, env=environ, capture_output=True, stdin=subprocess.DEVNULL, timeout=120, check=False)
    return [json.loads(line)[1] for line in seen.read_text().splitlines()]


@pytest.mark.parametrize(
    "arguments",
    [
        ["hive", "refresh"],
        ["hive", "status", "--node", "gone"],
        ["worker", "start", "--node", "here", "--model", "m"],
        ["worker", "list"],
        ["hive", "list"],
    ],
    ids=" ".join,
)
def test_only_ansible_is_started(tmp_path: Path, arguments: list[str]) -> None:
    programs = [Path(argv[0]).name for argv in started(tmp_path, *arguments)]
    assert not {"ssh", "systemctl", "scp", "sftp", "journalctl"} & set(programs), programs
    if arguments[0] == "hive" and arguments[1] != "list":
        assert "ansible-playbook" in programs  # the hook does see what is started


@pytest.mark.S91
def test_logs_alone_runs_ssh(tmp_path: Path) -> None:
    programs = [Path(argv[0]).name for argv in started(tmp_path, "logs", "--node", "gone", "-n", "1")]
    assert programs == ["ssh"]
