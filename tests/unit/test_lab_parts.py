"""The parts of the lab that need no root: names, apt sources, the recipe of the root file system, the command line."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILES = Path(__file__).resolve().parents[2] / "roles/rbee_lab/files"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(FILES))
    for name in ("RBEE_LAB_NET", "RBEE_LAB_BRIDGE", "RBEE_LAB_DIR", "RBEE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return {name: importlib.import_module(name) for name in ("lab_common", "lab_rootfs", "lab")}


def test_names_of_two_networks_never_meet(parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    common = parts["lab_common"]
    one = common.Lab.from_environment()
    monkeypatch.setenv("RBEE_LAB_NET", "10.77.1")
    two = common.Lab.from_environment()
    assert (one.bridge, one.prefix, one.link_prefix) == ("rbee0", "rbee-lab-0a4d00-", "rv0a4d00-")
    assert not {one.bridge, one.prefix, one.link_prefix, one.run_directory} & {
        two.bridge,
        two.prefix,
        two.link_prefix,
        two.run_directory,
    }


def test_interface_names_fit_the_kernels_15_characters(parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBEE_LAB_NET", "192.168.255")
    lab = parts["lab_common"].Lab.from_environment()
    last = lab.node(f"lab{parts['lab_common'].MAX_NODES}")
    assert len(lab.bridge) <= 15
    assert len(last.link) <= 15
    assert last.address == "192.168.255.60"
    assert last.mac == "02:c0:a8:ff:00:3c"


@pytest.mark.parametrize("net", ["10.77", "10.77.0.0", "ten", "8.8.8", "127.0.0", "10.77.300", "169.254.1"])
def test_networks_that_can_not_work_are_refused(parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, net: str) -> None:
    monkeypatch.setenv("RBEE_LAB_NET", net)
    with pytest.raises(parts["lab_common"].LabError, match=net.replace(".", r"\.")) as caught:
        parts["lab_common"].Lab.from_environment()
    assert caught.value.code == "CONFIG_INVALID"


@pytest.mark.parametrize("name", ["lab0", "lab51", "lab01", "web1", "lab", "lab1;rm"])
def test_names_that_are_no_machine_are_refused(parts: dict[str, ModuleType], name: str) -> None:
    with pytest.raises(parts["lab_common"].LabError, match="no lab machine"):
        parts["lab_common"].Lab.from_environment().node(name)


ONE_LINE = """\
# deb http://commented.example/debian bookworm main
deb http://mirror.example/debian bookworm main contrib
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] https://mirror.example/security bookworm-security main  # why
deb http://other.example/apt stable main
deb cdrom:[Debian]/ bookworm main
"""
DEB822 = """\
Types: deb deb-src
URIs: https://a.example/debian
  https://b.example/debian
Suites: bookworm bookworm-updates
Components: main
# a comment within
Signed-By: /usr/share/keyrings/k.gpg

Enabled: no
Types: deb
URIs: https://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: https://vendor.example/apt
Suites: nodistro
Components: main
"""


def test_apt_sources_of_one_line_form(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(ONE_LINE)
    assert parts["lab_rootfs"].apt_sources("bookworm", tmp_path) == [
        "deb http://mirror.example/debian bookworm main",
        "deb [signed-by=/usr/share/keyrings/k.gpg] https://mirror.example/security bookworm-security main",
    ]


def test_apt_sources_of_deb822_form(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/debian.sources").write_text(DEB822)
    key = "[signed-by=/usr/share/keyrings/k.gpg]"
    assert parts["lab_rootfs"].apt_sources("bookworm", tmp_path) == [
        f"deb {key} https://a.example/debian bookworm main",
        f"deb {key} https://a.example/debian bookworm-updates main",
        f"deb {key} https://b.example/debian bookworm main",
        f"deb {key} https://b.example/debian bookworm-updates main",
    ]


def test_apt_sources_without_the_release_are_refused(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(ONE_LINE)
    with pytest.raises(parts["lab_common"].LabError, match="no apt source for trixie") as caught:
        parts["lab_rootfs"].apt_sources("trixie", tmp_path)
    assert "trixie main" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "suite"),
    [
        ("ID=debian\nVERSION_CODENAME=bookworm\n", "bookworm"),
        ("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=jammy\nUBUNTU_CODENAME=jammy\n", "jammy"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\nVERSION_CODENAME=wilma\nUBUNTU_CODENAME=noble\n', "noble"),
    ],
)
def test_machines_are_of_the_controllers_release(parts: dict[str, ModuleType], tmp_path: Path, text: str, suite: str) -> None:
    (tmp_path / "os-release").write_text(text)
    assert parts["lab_rootfs"].release(tmp_path / "os-release") == suite


def test_other_distributions_are_refused_by_name(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "os-release").write_text('ID=fedora\nPRETTY_NAME="Fedora Linux 41"\n')
    with pytest.raises(parts["lab_common"].LabError, match="Fedora Linux 41"):
        parts["lab_rootfs"].release(tmp_path / "os-release")


def test_hosts_file_names_every_machine(parts: dict[str, ModuleType]) -> None:
    lines = parts["lab_rootfs"].hosts_file("10.77.3").splitlines()
    assert lines[0] == "127.0.0.1 localhost"
    assert "10.77.3.11 lab1" in lines
    assert lines[-1] == f"10.77.3.60 lab{parts['lab_common'].MAX_NODES}"


def test_without_root_the_command_to_type_is_named(
    parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["lab.py", "up"])
    assert parts["lab"].main(["--directory", str(tmp_path / "lab"), "up"]) == 1
    said = capsys.readouterr()
    error = json.loads(said.out)["rbee_error"]
    assert error["code"] == "MISSING_DEPENDENCY"
    assert error["hint"] == "sudo lab.py up"
    assert "next: sudo lab.py up" in said.err
    assert not (tmp_path / "lab").exists()


def test_commands_of_rbee_ctl_need_root_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from rbee_ctl.commands import lab
    from rbee_serve.contract.errors import MissingDependency

    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["/venv/bin/rbee-ctl", "lab", "up", "--nodes", "3"])
    with pytest.raises(MissingDependency) as caught:
        lab._require_root()
    assert "sudo -E /venv/bin/rbee-ctl lab up --nodes 3" in (caught.value.hint or "")
