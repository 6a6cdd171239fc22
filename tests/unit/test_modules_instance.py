"""One instance of a worker: what is put back when a change does not work out."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import node_modules
import pytest
from ansible.module_utils.rbee_node import NodeError

instance: Any = node_modules.load("library", "rbee_instance")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three running workers in tmp_path/workers: a has the new runtime, b and c the old one; what systemctl is told is listed."""
    told: list[str] = []
    (tmp_path / "workers").mkdir()
    for name, runtime in (("a", "new"), ("b", "old"), ("c", "old")):
        (tmp_path / f"workers/{name}.toml").write_text(f'name = "{name}"\nport = 1\n')
        (tmp_path / f"workers/{name}.runtime").symlink_to(runtime)

    def refuse(*_: object) -> None:
        raise NodeError("SELF_TEST_FAILED", "no token", "look")

    def run(*argv: str, **_: object) -> tuple[int, str, str]:
        told.append(" ".join(argv))
        return 0, "", ""

    active = {"ActiveState": "active", "SubState": "running", "MainPID": "7"}
    monkeypatch.setattr(instance, "show", lambda *units: {u: active if u.endswith(".service") else {} for u in units})
    monkeypatch.setattr(instance, "wait_until", lambda units, ready, limit: dict.fromkeys(units, active if told[-1:] else {}))
    monkeypatch.setattr(instance.Instance, "stop", lambda self, limit: told.append(f"stop {self.name}"))
    monkeypatch.setattr(instance, "run", run)
    monkeypatch.setattr(instance, "validate", lambda *_: None)
    monkeypatch.setattr(instance, "self_test", refuse)
    monkeypatch.setattr(instance.grp, "getgrnam", lambda _: SimpleNamespace(gr_gid=os.getgid()))
    monkeypatch.setattr(instance.os, "chown", lambda *_: None)
    return told


def test_a_failed_self_test_takes_the_whole_machine_back(machine: list[str], tmp_path: Path) -> None:
    limits = tmp_path / "50-rbee.conf"
    limits.write_text("new")
    params = {
        "name": "b",
        "state": "started",
        "settings": 'name = "b"\nport = 2\n',
        "runtime": "new",
        "apply": True,
        "files_changed": True,
        "drop_ins_before": {str(limits): "old", str(tmp_path / "none"): None},
        "disrupt": True,
        "timeout_s": 1.0,
        "rejoin_s": 0.0,
        "etc_dir": str(tmp_path),
    }
    with pytest.raises(NodeError, match="no token"):
        instance.present(params, False)

    assert [str((tmp_path / f"workers/{n}.runtime").readlink()) for n in "abc"] == ["old", "old", "old"]
    assert "port = 1" in (tmp_path / "workers/b.toml").read_text()
    assert limits.read_text() == "old"
    assert [t for t in machine if t.startswith("stop ")] == ["stop b", "stop a"], "c has the old one and is left alone"
    assert [t.split("@")[1] for t in machine if "restart" in t] == ["b.service", "a.service"]
