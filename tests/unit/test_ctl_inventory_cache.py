"""What ansible-inventory said is kept while nothing changes, and never a moment longer (SPEC N: status within 0.4 s)."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from rbee_ctl import content, inventory, inventory_cache

TEXT = "rbee_hives:\n  hosts: {lab1: , lab2: }\n"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An inventory with variables beside it, written long ago."""
    monkeypatch.setenv("RBEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inventory_cache, "SETTLED_S", 0.0)
    found = tmp_path / "fleet/inventory.yml"
    (found.parent / "group_vars/rbee_hives").mkdir(parents=True)
    found.write_text(TEXT)
    (found.parent / "group_vars/all.yml").write_text("ansible_user: one\n")
    (found.parent / "group_vars/rbee_hives/more.yml").write_text("rbee_install_path: /srv/a\nhub_token: planted-secret\n")
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Inventories that Ansible was asked for."""
    found: list[Path] = []
    really = inventory._said_by_ansible

    def ask(path: Path) -> dict[str, list[object]]:
        found.append(path)
        return really(path)

    monkeypatch.setattr(inventory, "_said_by_ansible", ask)
    return found


def kept(path: Path) -> list[Path]:
    return list((path.parents[1] / "cache").rglob("*.json"))


def test_ansible_is_asked_once_and_again_at_once_when_a_file_has_changed(path: Path, asked: list[Path]) -> None:
    first, second = inventory.load(path), inventory.load(path)
    assert (first, len(asked)) == (second, 1)
    assert (second.get("lab1").variables["ansible_user"], second.get("lab2").install_path) == ("one", "/srv/a")
    assert second.get("lab1").groups == {"all", "rbee_hives"}

    # As long as before, and with the old time put back.
    changed = path.parent / "group_vars/all.yml"
    before = changed.stat()
    changed.write_text("ansible_user: two\n")
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert inventory.load(path).get("lab1").variables["ansible_user"] == "two"
    assert inventory.load(path).get("lab1").variables["ansible_user"] == "two"
    assert len(asked) == 2


def test_what_is_kept_is_for_this_user_alone_and_holds_no_secret(path: Path, asked: list[Path]) -> None:
    inventory.load(path)
    (file,) = kept(path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert "planted" not in file.read_text()
    file.chmod(0o644)  # whoever could read it could perhaps write it, too
    inventory.load(path)
    assert len(asked) == 2


@pytest.fixture
def told(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands for ansible-inventory: each answer has a host more than the one before."""
    answers: list[int] = []

    def ask(_: Path) -> dict[str, list[object]]:
        answers.append(len(answers))
        return {f"host{n}": [["all"], {}] for n in range(len(answers))}

    monkeypatch.setattr(inventory, "_said_by_ansible", ask)
    inventory.load(path)
    assert len(inventory.load(path).hosts) == 1
    return answers


def _new_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path.parent / "other.cfg").write_text("[defaults]\n")
    monkeypatch.setattr(content, "ansible_cfg", lambda: path.parent / "other.cfg")


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "inventory": lambda path, _: path.write_text(TEXT + "# more\n"),
    "replaced by one that looks the same": lambda path, _: (
        path.with_suffix(".new").write_text(TEXT),
        path.with_suffix(".new").replace(path),
    ),
    "host_vars appear": lambda path, _: (
        (path.parent / "host_vars").mkdir(),
        (path.parent / "host_vars/lab1.yml").write_text("a: 1\n"),
    ),
    "deep in group_vars": lambda path, _: (path.parent / "group_vars/rbee_hives/more.yml").write_text("b: 1\n"),
    "a file goes": lambda path, _: (path.parent / "group_vars/all.yml").unlink(),
    "ansible.cfg": _new_config,
    "the version": lambda _, monkeypatch: monkeypatch.setattr(inventory_cache, "__version__", "99"),
    "the cache is no JSON": lambda path, _: kept(path)[0].write_text("{"),
    "the cache is of another shape": lambda path, _: kept(path)[0].write_text(json.dumps([1])),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_is_seen_at_once(
    path: Path, told: list[int], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, pytest.MonkeyPatch], object]
) -> None:
    change(path, monkeypatch)
    assert len(inventory.load(path).hosts) == 2
    assert len(inventory.load(path).hosts) == 2


def _vault(path: Path) -> None:
    (path.parent / "group_vars/vault.yml").write_text("$ANSIBLE_VAULT;1.1;AES256\n3131\n")


def _plugin(path: Path) -> None:
    path.write_text("plugin: amazon.aws.aws_ec2\n")


def _program(path: Path) -> None:
    path.chmod(0o755)


def _linked(path: Path) -> None:
    (path.parents[1] / "elsewhere").mkdir()
    (path.parent / "group_vars/linked").symlink_to(path.parents[1] / "elsewhere")


@pytest.mark.parametrize("make", [_vault, _plugin, _program, _linked])
def test_what_may_change_by_itself_or_holds_a_vault_is_never_kept(
    path: Path, told: list[int], make: Callable[[Path], None]
) -> None:
    make(path)
    assert [len(inventory.load(path).hosts) for _ in range(3)] == [2, 3, 4]


def test_what_was_changed_just_now_is_not_kept_yet(path: Path, told: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory_cache, "SETTLED_S", 3600.0)
    path.write_text(TEXT + "# more\n")
    assert [len(inventory.load(path).hosts) for _ in range(2)] == [2, 3]


def test_what_changes_while_ansible_reads_is_not_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(_: Path) -> dict[str, list[object]]:
        path.write_text(path.read_text() + "# more\n")
        return {}

    monkeypatch.setattr(inventory, "_said_by_ansible", ask)
    inventory.load(path)
    assert kept(path) == []
