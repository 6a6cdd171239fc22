"""Roles keep their word: specs, defaults and READMEs agree, playbooks and task files stay small, inventories load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jinja2 import Template

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(p.name for p in (ROOT / "roles").iterdir() if p.is_dir())
VENV = Path(sys.executable).parent


def load(path: Path) -> dict[str, object]:
    return yaml.safe_load(path.read_text()) or {}


def options(role: str) -> dict[str, dict[str, object]]:
    spec = load(ROOT / "roles" / role / "meta/argument_specs.yml")
    return spec["argument_specs"]["main"]["options"]  # type: ignore[index,return-value]


@pytest.mark.parametrize("role", ROLES)
def test_every_input_has_a_spec_and_every_optional_one_a_default(role: str) -> None:
    declared = options(role)
    path = ROOT / "roles" / role / "defaults/main.yml"
    # An input without a sane default stands there as a comment.
    defaults = set(load(path)) | set(re.findall(r"^# (\w+):", path.read_text(), re.MULTILINE))
    required = {name for name, spec in declared.items() if spec.get("required")}

    assert defaults == set(declared) - required


@pytest.mark.parametrize("role", ROLES)
def test_inputs_carry_the_role_s_name_a_type_and_a_description(role: str) -> None:
    for name, spec in options(role).items():
        assert name.startswith(f"{role}_"), name
        assert spec.get("type"), name
        assert spec.get("description"), name


@pytest.mark.parametrize("role", ROLES)
def test_readme_names_every_input(role: str) -> None:
    readme = (ROOT / "roles" / role / "README.md").read_text()

    missing = [name for name in options(role) if f"`{name}`" not in readme]

    assert missing == []


def test_playbooks_and_task_files_stay_within_their_budget() -> None:
    limits = [(ROOT / "playbooks", "*.yml", 50), (ROOT / "roles", "*/tasks/main.yml", 60), (ROOT / "roles", "*/tasks/*.yml", 130)]
    over = [
        f"{path.relative_to(ROOT)}: {len(path.read_text().splitlines())} > {limit}"
        for base, pattern, limit in limits
        for path in base.glob(pattern)
        if len(path.read_text().splitlines()) > limit
    ]

    assert over == []


def test_roles_use_builtin_modules_and_our_own_alone() -> None:
    own = {p.stem for p in (ROOT / "roles").glob("*/library/*.py")} | {
        p.stem for p in (ROOT / "roles").glob("*/action_plugins/*.py")
    }
    words = {"name", "when", "vars", "register", "loop", "loop_control", "block", "rescue", "always", "notify", "listen", "tags"}
    words |= {
        "become",
        "delegate_to",
        "ignore_unreachable",
        "run_once",
        "no_log",
        "changed_when",
        "failed_when",
        "check_mode",
        "until",
        "retries",
    }
    words |= {"delay", "environment", "apply", "any_errors_fatal", "throttle"}

    def modules(tasks: list[dict[str, object]]) -> set[str]:
        found: set[str] = set()
        for task in tasks:
            for key, value in task.items():
                if key in ("block", "rescue", "always"):
                    found |= modules(value)  # type: ignore[arg-type]
                elif key not in words:
                    found.add(key)
        return found

    foreign = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in (ROOT / "roles").glob("*/*/*.yml")
        if path.parent.name in ("tasks", "handlers")
        for module in modules(yaml.safe_load(path.read_text()) or [])
        if not module.startswith("ansible.builtin.") and module not in own
    }

    assert foreign == set()


def test_workers_look_for_models_where_the_machine_s_hive_keeps_them() -> None:
    hive = load(ROOT / "roles/rbee_hive/defaults/main.yml")["rbee_hive_models_dir"]
    worker = Template(str(load(ROOT / "roles/rbee_worker/defaults/main.yml")["rbee_worker_models_dir"]))

    assert worker.render() == hive
    assert worker.render(rbee_hive_models_dir="/data/models") == "/data/models"


def test_a_runtime_is_switched_on_one_machine_after_the_other() -> None:
    (task,) = yaml.safe_load((ROOT / "roles/rbee_hive/tasks/runtime_use.yml").read_text())

    assert task["rbee_runtime"]["state"] == "used"
    assert task["throttle"] == "{{ rbee_max_unavailable | default(1) }}"


@pytest.mark.parametrize("inventory", ["example.yml", "local.yml"])
def test_inventories_load_and_fit_the_site(inventory: str) -> None:
    path = str(ROOT / "inventory" / inventory)
    listed = subprocess.run(
        [VENV / "ansible-inventory", "-i", path, "--list"], capture_output=True, text=True, check=True, cwd=ROOT
    )

    groups = json.loads(listed.stdout)
    syntax = [VENV / "ansible-playbook", "-i", path, "site.yml", "--syntax-check"]

    assert groups["rbee_queen"]["hosts"]
    assert groups["rbee_hives"]["hosts"]
    assert subprocess.run(syntax, capture_output=True, check=False, cwd=ROOT).returncode == 0


def test_the_example_shows_the_reference_topology() -> None:
    hives = load(ROOT / "inventory/example.yml")["all"]["children"]["rbee_hives"]["hosts"]  # type: ignore[index]

    assert set(hives) == {"blep", "workstation"}
