"""Two controllers: every playbook that changes a node minds the node's lock, in one of three ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HIVE = ROOT / "roles/rbee_hive"

#: Nothing on a node is changed by these.
LOOKING = {"audit_fetch", "declaration", "drift", "model_get", "model_list", "probe", "runtime_get", "runtime_list", "status"}
#: One module does it all, and refuses by itself (``rbee_worker_state``, ``rbee_hive_state``, the preflight of a start takes it).
GUARDED = {"hive_start", "hive_stop", "worker_process", "worker_start", "worker_stop"}


def plays() -> dict[str, list[dict[str, Any]]]:
    """Return the plays of each playbook that has its own and works on nodes."""
    found = {}
    for path in sorted((ROOT / "playbooks").glob("*.yml")):
        own = [play for play in yaml.safe_load(path.read_text()) if "tasks" in play and play["hosts"] != "localhost"]
        if own:
            found[path.stem] = own
    return found


def task_files(tasks: list[dict[str, Any]]) -> list[str]:
    """Return the ``tasks_from`` of a block's roles, in order."""
    return [t["ansible.builtin.import_role"].get("tasks_from", "main") for t in tasks if "ansible.builtin.import_role" in t]


@pytest.mark.parametrize("name", sorted(plays()))
def test_a_playbook_that_changes_a_node_minds_its_lock(name: str) -> None:
    for play in plays()[name]:
        if name in LOOKING | GUARDED:
            continue
        first = play["tasks"][0]
        if "block" not in first:
            assert task_files(play["tasks"])[0] == "free"
            continue
        rest = [task for task in play["tasks"][1:] if "ansible.builtin.set_fact" not in task]  # that is done on the controller
        assert rest == [], "something is done without the lock"
        assert task_files(first["block"])[0] == "lock"
        assert task_files(first["always"]) == ["unlock"]
        assert list(first["environment"]) == ["RBEE_RUN"], "what a dead run leaves working could not be told"


def test_lists_name_playbooks_that_are_there() -> None:
    assert set(plays()) >= LOOKING | GUARDED


def test_modules_that_mind_the_lock_are_told_which_run_they_belong_to() -> None:
    minding = {p.stem for p in HIVE.glob("library/*.py") if "**ARGUMENTS" in p.read_text()}
    told = {p.stem for p in HIVE.glob("action_plugins/*.py") if p.is_symlink() and p.readlink().name == "rbee_guarded.py"} | {
        "rbee_hive_state"
    }
    assert minding == told
