"""The Ansible collection that is built from this tree, installed in a folder that knows no checkout."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.outside import run_outside

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


class InstalledCollection:
    """``folder/installed`` has it; commands run in ``folder`` with no setting of this checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run(sys.executable, str(ROOT / "scripts/collection.py"), str(folder))
        (self.tarball,) = folder.glob("rbee-rbee-*.tar.gz")
        self.run("ansible-galaxy", "collection", "install", "--offline", "-p", str(folder / "installed"), str(self.tarball))

    @property
    def home(self) -> Path:
        """Where ansible-galaxy has put it."""
        return self.folder / "installed/ansible_collections/rbee/rbee"

    def run(self, *arguments: str, check: bool = True, timeout: float = 120) -> str:
        """Run a program and return its output; ``check`` says whether it shall succeed or fail."""
        path = str(self.folder / "installed")
        done = run_outside(self.folder, *arguments, bin_dir=BIN, timeout=timeout, ANSIBLE_COLLECTIONS_PATH=path)
        assert (done.returncode == 0) is check, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def play(self, name: str, *arguments: str, inventory: Path, check: bool = True, timeout: float = 120) -> str:
        """Run one of its playbooks by its full name."""
        command = ("ansible-playbook", "-i", str(inventory), f"rbee.rbee.{name}")
        return self.run(*command, *arguments, check=check, timeout=timeout)
