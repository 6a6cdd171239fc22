"""The Ansible collection that is built from this tree: it installs, and its playbooks, roles, modules and actions work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


class Installed:
    """The collection, installed in a folder without a checkout, and an inventory of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run(sys.executable, str(ROOT / "scripts/collection.py"), str(folder))
        (self.tarball,) = folder.glob("rbee-rbee-*.tar.gz")
        self.run("ansible-galaxy", "collection", "install", "--offline", "-p", str(folder / "installed"), str(self.tarball))
        here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        here |= {"rbee_hive_models_dir": str(folder / "models"), "rbee_workers": [{"backend": "cpu", "model": "m"}]}
        inventory = {"rbee_queen": {"hosts": {"localhost": None}}, "rbee_hives": {"hosts": {"localhost": here}}}
        (folder / "inventory.yml").write_text(json.dumps(inventory))

    def run(self, *arguments: str, check: bool = True) -> str:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("RBEE_", "ANSIBLE_", "PYTHONPATH"))}
        environ |= {"PATH": f"{BIN}:{environ['PATH']}", "ANSIBLE_COLLECTIONS_PATH": str(self.folder / "installed")}
        done = subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=environ,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert (done.returncode == 0) is check, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def play(self, name: str, *arguments: str, check: bool = True) -> str:
        return self.run("ansible-playbook", "-i", "inventory.yml", f"rbee.rbee.{name}", *arguments, check=check)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("collection"))


def test_every_role_playbook_and_module_is_in_it_and_none_is_a_role_s_own(collection: Installed) -> None:
    home = collection.folder / "installed/ansible_collections/rbee/rbee"
    assert {p.name for p in (ROOT / "playbooks").glob("*.yml")} == {p.name for p in (home / "playbooks").glob("*.yml")}
    assert {p.name for p in (ROOT / "roles").iterdir()} == {p.name for p in (home / "roles").iterdir()}
    modules = {p.name for p in (ROOT / "roles").glob("*/library/*.py")}
    assert modules == {p.name for p in (home / "plugins/modules").glob("*.py")}
    assert not [*home.glob("roles/*/library"), *home.glob("roles/*/module_utils"), *home.glob("roles/*/action_plugins")]
    assert not [p for p in home.glob("plugins/**/*.py") if "ansible.module_utils.rbee_" in p.read_text()]


def test_its_playbooks_run_without_a_checkout(collection: Installed) -> None:
    collection.play("site", "--syntax-check")
    assert "failed=0" in collection.play("declaration")
    refused = collection.play("declaration", "-e", "rbee_nonsense=1", check=False)
    assert "unknown variable rbee_nonsense" in refused
    assert '"backends": {"cpu": 1}' in collection.play("probe", "-v")  # an action plugin and its module
    assert '"models": []' in collection.play("model_list", "-v")  # a module with common code
    missing = collection.play("model_get", "-e", "rbee_model_ref=ghost", check=False)
    assert "MODEL_NOT_FOUND" in missing
