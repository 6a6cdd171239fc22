"""The Ansible collection that is built from this tree: it installs, and its playbooks, roles, modules and actions work."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.installed_collection import ROOT, InstalledCollection

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> InstalledCollection:
    return InstalledCollection(tmp_path_factory.mktemp("collection"))


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    """An inventory of this machine."""
    here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    here |= {"rbee_hive_models_dir": str(tmp_path / "models"), "rbee_workers": [{"backend": "cpu", "model": "m"}]}
    path = tmp_path / "inventory.yml"
    path.write_text(json.dumps({"rbee_queen": {"hosts": {"localhost": None}}, "rbee_hives": {"hosts": {"localhost": here}}}))
    return path


def test_every_role_playbook_and_module_is_in_it_and_none_is_a_role_s_own(collection: InstalledCollection) -> None:
    home = collection.home
    assert {p.name for p in (ROOT / "playbooks").glob("*.yml")} == {p.name for p in (home / "playbooks").glob("*.yml")}
    assert {p.name for p in (ROOT / "roles").iterdir()} == {p.name for p in (home / "roles").iterdir()}
    modules = {p.name for p in (ROOT / "roles").glob("*/library/*.py")}
    assert modules == {p.name for p in (home / "plugins/modules").glob("*.py")}
    assert not [*home.glob("roles/*/library"), *home.glob("roles/*/module_utils"), *home.glob("roles/*/*_plugins")]
    assert not [p for p in home.glob("plugins/**/*.py") if "ansible.module_utils.rbee_" in p.read_text()]


def test_its_filters_are_found_by_the_names_that_its_roles_use(collection: InstalledCollection) -> None:
    used = "rbee.rbee.rbee_newest_wheel"
    assert f"| {used} " in (collection.home / "roles/rbee_hive/tasks/runtime_make.yml").read_text()
    wheels = [f"/w/x-0.3.{n}-py3-none-any.whl" for n in (9, 10, 8)]
    said = collection.run("ansible", "localhost", "-m", "ansible.builtin.debug", "-a", f"msg={{{{ {wheels} | {used} }}}}")
    assert "x-0.3.10-" in said
    assert "x-0.3.9-" not in said


def test_nodes_get_the_same_runtime_from_it_as_from_the_checkout(collection: InstalledCollection) -> None:
    """Its archive is made from the wheel that travels along, and asking makes none."""
    script = "roles/rbee_wheels/files/build_wheelhouse.py"
    versions = {
        json.loads(collection.run(sys.executable, str(home / script), "--plan"))["version"] for home in (ROOT, collection.home)
    }
    assert len(versions) == 1, versions


def test_its_playbooks_run_without_a_checkout(collection: InstalledCollection, inventory: Path) -> None:
    play = partial(collection.play, inventory=inventory)
    play("site", "--syntax-check")
    assert "failed=0" in play("declaration")
    refused = play("declaration", "-e", "rbee_nonsense=1", check=False)
    assert "unknown variable rbee_nonsense" in refused
    assert '"backends": {"cpu": 1}' in play("probe", "-v")  # an action plugin and its module
    assert '"models": []' in play("model_list", "-v")  # a module with common code
    missing = play("model_get", "-e", "rbee_model_ref=ghost", check=False)
    assert "MODEL_NOT_FOUND" in missing


def test_its_modules_work_in_tasks_of_others_by_their_full_names(collection: InstalledCollection, inventory: Path) -> None:
    """One that minds the lock, one that does not, and that one in the background."""
    catalog = {"rbee.rbee.rbee_catalog": {"state": "list", "models_dir": str(inventory.with_name("models"))}}
    tasks = [
        {"rbee.rbee.rbee_lock": {"state": "held"}, "check_mode": True},
        {**catalog, "register": "now"},
        {**catalog, "async": 60, "poll": 1, "register": "later"},
        {"ansible.builtin.assert": {"that": "now.rbee_result.models == later.rbee_result.models == []"}},
    ]
    own = inventory.with_name("own.yml")
    own.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
    said = collection.run("ansible-playbook", "-i", str(inventory), str(own))
    assert "ok=4 " in said
