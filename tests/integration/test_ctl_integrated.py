"""This machine read in rbee-ctl's own process: the answers that Ansible gives, without it (SPEC CAP-27)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from demands import small_file_system

pytestmark = pytest.mark.integration

#: Imported by the interpreter before rbee-ctl: writes down every program that it becomes or starts.
HOOK = """
import os, sys
def _seen(event, args):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        with open(os.environ["SEEN"], "a") as f:
            f.write(f"{event} {args[1]}\\n")
sys.addaudithook(_seen)
"""


class Here:
    """An inventory of this machine with a catalog and a runtime of the test's own."""

    def __init__(self, folder: Path, models: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(HOOK)
        models = models or folder / "models"
        file = models / "org/repo/m.gguf"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"GGUF" + bytes(96))
        self.catalogue(file)
        runtime = folder / "opt/runtimes/cpu/0.1.0-a"
        (runtime / "bin").mkdir(parents=True)
        (runtime / "bin/python").write_bytes(bytes(1000))
        (runtime / "metadata.yaml").write_text("version: 0.1.0-a\n")
        variables = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "rbee_install_path": str(folder / "opt"),
            "rbee_hive_models_dir": str(models),
        }
        inventory = {"rbee_hives": {"hosts": {"localhost": variables}}}
        (folder / "inventory.yml").write_text(json.dumps(inventory))

    @staticmethod
    def catalogue(file: Path) -> None:
        """Write the catalog's entry of a file."""
        entry = {
            "id": "mine",
            "reference": "hf:org/repo:m.gguf",
            "provider": "hf",
            "name": "m",
            "path": str(file),
            "size_bytes": file.stat().st_size,
            "added_at": "2026-01-01T00:00:00Z",
            "status": "Ready",
            "sha256": None,
            "metadata": {},
        }
        (file.parent / "metadata.yaml").write_text(json.dumps({"models": [entry]}))

    def ctl(self, *arguments: str, mode: str) -> tuple[dict[str, Any], str, str]:
        """Return the envelope, the narration, and what was started or connected to."""
        seen = self.folder / "seen"
        seen.write_text("")
        # Ansible gets an environment of named variables only: what it starts in turn does not have the hook.
        environ = os.environ | {
            "PYTHONPATH": f"{self.folder}:{Path(__file__).resolve().parents[2]}",
            "SEEN": str(seen),
            "HOME": str(self.folder),
            "RBEE_INVENTORY": str(self.folder / "inventory.yml"),
            "RBEE_INTEGRATED": mode,
        }
        command = [sys.executable, "-m", "rbee_ctl.cli", *arguments, "--json"]
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False
        )
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["exit_code"] == done.returncode
        return found, done.stderr, seen.read_text()


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["model", "list"], 0),
        (["model", "get", "ghost", "--node", "localhost"], 1),
        (["runtime", "get", "--type", "cpu"], 0),
        (["worker", "process", "get", "--pid", "1"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_answer_is_the_one_that_ansible_gives(here: Here, arguments: list[str], code: int) -> None:
    fast, said, started = here.ctl(*arguments, mode="auto")
    assert fast["exit_code"] == code
    assert "mode           : integrated" in said
    assert "ansible" not in started, started
    assert "connect" not in started, started
    slow, said, started = here.ctl(*arguments, mode="off")
    assert "mode           : local: by Ansible" in said
    assert "integrated is off" in said
    assert "ansible-playbook" in started  # the hook does see what is started
    for envelope in (fast, slow):
        for host in envelope["data"].get("hosts", {}).values():
            host.pop("disk", None)  # free bytes: others write too
    assert fast == slow


def test_disk_figures_are_those_of_df_and_du(tmp_path: Path) -> None:
    """SPEC CAP-46, S-32: on a file system that nobody else writes to; a file takes whole blocks of 4096 bytes."""
    with small_file_system(tmp_path / "disk", 64) as disk:
        here = Here(tmp_path / "here", disk)
        file = disk / "org/repo/m.gguf"
        for size_bytes in (100, 20_000_001):
            file.write_bytes(b"GGUF" + bytes(size_bytes - 4))
            here.catalogue(file)
            found = here.ctl("model", "list", mode="auto")[0]["data"]["hosts"]["localhost"]
            df = subprocess.run(["df", "-B1", "--output=size,avail", str(disk)], check=True, capture_output=True, text=True)
            du = subprocess.run(["du", "-B1", str(file)], check=True, capture_output=True, text=True)
            total, free = map(int, df.stdout.split()[-2:])
            assert abs(found["disk"]["total_bytes"] - total) <= 4096
            assert abs(found["disk"]["free_bytes"] - free) <= 4096
            (model,) = found["models"]
            assert 0 <= int(du.stdout.split()[0]) - model["size_bytes"] < 4096


def test_what_this_process_can_not_know_is_left_to_ansible(here: Here) -> None:
    path = here.folder / "inventory.yml"
    path.write_text(path.read_text().replace(f'"{here.folder}/models"', '"{{ rbee_hive_install_path }}/../models"'))
    found, said, started = here.ctl("model", "list", mode="auto")
    assert [m["id"] for m in found["data"]["hosts"]["localhost"]["models"]] == ["mine"]
    assert "local: by Ansible, not in this process: models_dir is a template" in said
    assert "ansible-playbook" in started


def test_another_mode_is_refused(here: Here) -> None:
    found, _, _ = here.ctl("model", "list", mode="sometimes")
    assert (found["exit_code"], found["errors"][0]["code"]) == (1, "CONFIG_INVALID")
    assert "auto or off" in found["errors"][0]["message"]
