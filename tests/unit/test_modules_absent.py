"""Taking rbee off a machine: everything of rbee's is named, and nothing that an operator has beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import node_modules
import pytest

absent: Any = node_modules.load("library", "rbee_hive_absent")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's folders below a temporary one."""
    etc, state, units = tmp_path / "etc/rbee", tmp_path / "var/lib/rbee", tmp_path / "etc/systemd/system"
    for folder in (etc / "workers", state / "models/m", state / "queen", units / "rbee-fleet.service.d"):
        folder.mkdir(parents=True)
    for file in (etc / "hive.toml", state / "models/m/m.gguf", units / "rbee-queen.service", units / "rbee-fleet.service"):
        file.touch()
    monkeypatch.setattr(absent, "ETC", etc)
    monkeypatch.setattr(absent, "STATE", state)
    monkeypatch.setattr(absent, "UNIT_DIR", units)
    monkeypatch.setattr(absent, "OPERATORS", (etc / "fleet.env", etc / "config.toml", state / "state"))
    return tmp_path


def found(root: Path, install_path: str = "opt/rbee", *, models: str = "var/lib/rbee/models", purge: bool = False) -> set[str]:
    params = {"models_dir": str(root / models), "install_path": str(root / install_path), "purge": purge}
    listed = absent.leftovers(params)
    assert len(listed) == len(set(listed))
    return {str(p.relative_to(root)) for p in listed if root in p.parents}


def test_everything_goes_but_models_and_the_unit_of_the_fleet(root: Path) -> None:
    (root / "opt/rbee/runtimes/cpu").mkdir(parents=True)
    units = "etc/systemd/system/rbee-queen.service"
    assert found(root) == {units, "etc/rbee", "opt/rbee", "var/lib/rbee/queen"}
    assert found(root, purge=True) == {units, "etc/rbee", "opt/rbee", "var/lib/rbee"}


def test_what_an_operator_has_beside_it_stays(root: Path) -> None:
    (root / "opt/rbee/runtimes").mkdir(parents=True)
    (root / "opt/rbee/checkout").mkdir()
    (root / "etc/rbee/fleet.env").touch()
    (root / "var/lib/rbee/state/secrets").mkdir(parents=True)
    gone = found(root, purge=True)
    assert gone >= {"opt/rbee/runtimes", "etc/rbee/workers", "etc/rbee/hive.toml", "var/lib/rbee/models", "var/lib/rbee/queen"}
    assert not gone & {"opt/rbee", "etc/rbee", "etc/rbee/fleet.env", "var/lib/rbee", "var/lib/rbee/state", "opt/rbee/checkout"}


def test_a_folder_of_models_elsewhere_stays_whole(root: Path) -> None:
    (root / "data/models/m").mkdir(parents=True)
    (root / "data/models/m/m.gguf").touch()
    assert "var/lib/rbee" in found(root, models="data/models")
    assert not {p for p in found(root, models="data/models") if p.startswith("data")}
    assert "data/models" in found(root, models="data/models", purge=True)
