"""The quick way to run a module on a node: the result that Ansible's wrapper gives; whatever is unusual is left to that."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import node_modules
import pytest

quick = node_modules.load("action_plugins", "rbee_quick")
LIBRARY = node_modules.ROLE / "library"
MODULES = sorted(p for p in LIBRARY.glob("rbee_*.py") if "AnsibleModule(" in p.read_text())


def run(script: str, cwd: Path) -> tuple[dict[str, Any], str]:
    """Run a script as a connection does: an interpreter reads it from its standard input."""
    # A folder that is not for importing: modules of that name there must not be taken.
    (cwd / "json.py").write_text("raise SystemExit('the working directory was imported from')")
    done = subprocess.run([sys.executable], input=script, capture_output=True, text=True, check=False, cwd=cwd)
    return json.loads(done.stdout), done.stderr


def catalog(tmp_path: Path, **more: Any) -> str:
    params = quick.validated(LIBRARY / "rbee_catalog.py", {"state": "list", "models_dir": str(tmp_path / "models"), **more})
    script: str = quick.script(LIBRARY / "rbee_catalog.py", "rbee_catalog", params, {"_ansible_no_log": True})
    return script


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_module_tells_its_arguments_and_uses_no_more_of_ansible_than_there_is(path: Path) -> None:
    assert quick.specification(path)["supports_check_mode"]
    for file in quick.needed(path).values():
        text = file.read_text()
        assert set(re.findall(r"\bmodule\.([a-z_]+)\b(?!\.py)", text)) <= {"params", "check_mode", "exit_json", "fail_json"}, file
        imported = set(re.findall(r"^\s*(?:from|import) (ansible\S*)", text, re.MULTILINE))
        assert all(n == "ansible.module_utils.basic" or n.startswith("ansible.module_utils.rbee_") for n in imported), file


def test_the_result_is_the_module_s_own_from_bytecode_and_from_source(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    script = catalog(tmp_path)
    said, errors = run(script, tmp_path)
    assert errors == ""
    assert said["rbee_result"]["models"] == []
    assert said["changed"] is False
    assert said["invocation"]["module_args"]["state"] == "list"
    other_python = re.sub(r'"magic": "[0-9a-f]+"', '"magic": "00"', script)
    assert other_python != script
    again, errors = run(other_python, tmp_path)
    assert errors == ""
    assert again["rbee_result"].pop("disk").keys() == said["rbee_result"].pop("disk").keys()  # others write to it meanwhile
    assert again == said


def test_a_failure_is_told_as_ever_and_a_mistake_names_itself(tmp_path: Path) -> None:
    said, _ = run(catalog(tmp_path, state="get", ref="ghost"), tmp_path)
    assert said["failed"]
    assert said["rbee_error"]["code"] == "MODEL_NOT_FOUND"
    broken = {"state": "get", "ref": 7}
    script = quick.script(LIBRARY / "rbee_catalog.py", "rbee_catalog", broken, {"_ansible_no_log": True})
    said, _ = run(script, tmp_path)
    assert said["failed"]
    assert said["msg"].startswith("Module failed: ")
    assert "rbee_module.rbee_catalog" in said["exception"] or "rbee_catalog.py" in said["exception"]


def test_arguments_are_those_that_the_module_would_have(tmp_path: Path) -> None:
    path = LIBRARY / "rbee_worker_state.py"
    params = quick.validated(path, {"names": "cpu0,cpu1", "state": "stopped", "timeout_s": "7"})
    assert params["names"] == ["cpu0", "cpu1"]
    assert params["timeout_s"] == 7.0
    assert params["etc_dir"] == "/etc/rbee"
    assert params["invocation"] is None


@pytest.mark.parametrize(
    ("module", "params"),
    [
        ("rbee_worker_state", {"names": ["cpu0"], "state": "sideways"}),
        ("rbee_worker_state", {"names": ["cpu0"], "state": "stopped", "nonsense": 1}),
        ("rbee_worker_state", {"state": "stopped"}),
        ("rbee_worker_state", {"names": ["cpu0"], "state": "stopped", "etc_dir": "~/etc"}),
        ("rbee_worker_state", {"names": ["cpu0"], "state": "stopped", "etc_dir": "$HOME/etc"}),
        ("rbee_instance", {"name": "cpu0", "state": "present"}),
    ],
)
def test_what_is_wrong_or_for_the_node_to_expand_is_left_to_ansible(module: str, params: dict[str, Any]) -> None:
    assert quick.validated(LIBRARY / f"{module}.py", params) is None


def test_the_journal_is_told_what_runs_without_passwords_in_addresses() -> None:
    said = quick.invocation({"names": ["cpu0"], "url": "https://user:secret@host/x"}, "info")
    assert said.startswith("info Invoked with names=['cpu0'] url=https://user:")
    assert "secret" not in said
