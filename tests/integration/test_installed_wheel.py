"""The wheel alone, installed anywhere: what the checkout does, it does (no checkout in sight)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from rbee_serve import __version__

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


class Installed:
    """A virtual environment with the built wheel; what it needs comes from the tests' own environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir()
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
        subprocess.run(build, check=True, capture_output=True, timeout=120)
        self.wheel = next(folder.glob("rbee-*.whl"))
        self.prefix = folder / "venv"
        venv.create(self.prefix, with_pip=False, symlinks=True)
        target = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        install = [sys.executable, "-m", "pip", "--python", str(self.prefix / "bin/python"), "install", "-q", "--no-deps"]
        subprocess.run([*install, "--no-index", str(self.wheel)], check=True, capture_output=True, timeout=120)
        # Ansible and the other libraries, behind the wheel; ansible-playbook with this environment's interpreter.
        (self.prefix / target / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for program in ("ansible-playbook", "ansible-inventory", "ansible-galaxy"):
            text = (Path(sys.executable).parent / program).read_text()
            script = self.prefix / "bin" / program
            script.write_text(f"#!{self.prefix}/bin/python\n" + text.partition("\n")[2])
            script.chmod(0o755)

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("RBEE_", "ANSIBLE_", "PYTHON"))}
        environ |= {"HOME": str(self.home), "PATH": f"{self.prefix}/bin:{environ['PATH']}"}
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
        assert not check or done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


def test_the_wheel_carries_all_that_the_checkout_runs(installed: Installed) -> None:
    inside = {n.removeprefix("rbee_ctl/content/") for n in zipfile.ZipFile(installed.wheel).namelist() if "/content/" in n}
    listed = subprocess.run(
        ["git", "ls-files", "roles", "playbooks", "systemd"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = {name for name in listed.stdout.split() if not (ROOT / name).is_dir()}
    linked = [name for name in listed.stdout.split() if (ROOT / name).is_dir()]  # links to folders: their files are there too
    tracked |= {f"{name}/{p.name}" for name in linked for p in (ROOT / name).glob("*.py")}
    assert len(tracked) > 80
    assert tracked | {"site.yml", "ansible.cfg", "requirements/constraints.txt"} <= inside
    assert not [name for name in inside if "__pycache__" in name]
    version = json.loads(installed.run("rbee-ctl", "version", "--json").stdout)["data"]
    assert version["version"] == __version__
    assert version["content"] == str(next(installed.prefix.glob("lib/*/site-packages/rbee_ctl/content")))


@pytest.mark.S83
def test_from_nothing_to_a_checked_machine(installed: Installed) -> None:
    first = json.loads(installed.run("rbee-ctl", "install", "--json").stdout)["data"]
    assert first["changed"]
    assert (installed.home / ".local/bin/rbee-ctl").resolve() == installed.prefix / "bin/rbee-ctl"
    assert (installed.home / ".local/share/rbee/models").is_dir()
    assert (installed.home / ".config/rbee/config.toml").is_file()
    assert "rbee-queen --config" in (installed.home / ".config/systemd/user/rbee-queen.service").read_text()
    assert json.loads(installed.run("rbee-ctl", "install", "--json").stdout)["data"]["changed"] == []

    installed.run("rbee-ctl", "init", "localhost", "ops@192.0.2.7:2200", "-o", "mine.yml")
    inventory = installed.folder / "mine.yml"
    again = installed.run("rbee-ctl", "init", "localhost", "-o", "mine.yml", check=False)
    assert (again.returncode, "is there already" in again.stderr) == (1, True)
    hosts = json.loads(installed.run("ansible-inventory", "-i", "mine.yml", "--list").stdout)
    assert hosts["_meta"]["hostvars"]["node2"] == {"ansible_host": "192.0.2.7", "ansible_port": 2200, "ansible_user": "ops"}
    assert hosts["rbee_queen"]["hosts"] == ["localhost"]

    update = [
        "rbee-ctl",
        "-i",
        "mine.yml",
        "setup",
        "update-node",
        "--name",
        "localhost",
        "--ssh-host",
        "127.0.0.1",
        "--no-probe",
    ]
    installed.run(*update)
    text = inventory.read_text()
    inventory.write_text(text.replace("ansible_host: 127.0.0.1", "ansible_host: 127.0.0.1\n          ansible_connection: local"))
    listed = json.loads(installed.run("rbee-ctl", "-i", "mine.yml", "hive", "list", "--json").stdout)["data"]["hives"]
    assert [h["name"] for h in listed] == ["localhost", "node2"]
    # What is wrong with settings and inventory is told before any machine is asked.
    held = json.loads(installed.run("rbee-ctl", "-i", "mine.yml", "config", "check", "--json").stdout)["data"]["checks"]
    assert {c["name"]: c["ok"] for c in held} == {
        "file": True,
        "inventory": True,
        "declaration": True,
        "key": False,
        "queen": False,
    }
    right = inventory.read_text()
    inventory.write_text(right.replace("ansible_connection: local", "ansible_connection: local\n          rbee_instal_path: /x"))
    wrong = installed.run("rbee-ctl", "-i", "mine.yml", "config", "check", check=False)
    assert (wrong.returncode, "rbee_instal_path" in wrong.stdout) == (1, True), wrong.stdout
    inventory.write_text(right)
    # A playbook out of the wheel, with its role's modules, by rbee-ctl and by ansible-playbook.
    checked = json.loads(installed.run("rbee-ctl", "-i", "mine.yml", "hive", "refresh", "--node", "localhost", "--json").stdout)
    assert checked["data"]["hosts"]["localhost"]["backends"]["cpu"] == 1
    site = next(installed.prefix.glob("lib/*/site-packages/rbee_ctl/content/site.yml"))
    installed.run(
        "env", f"ANSIBLE_CONFIG={site.parent}/ansible.cfg", "ansible-playbook", "-i", "mine.yml", str(site), "--syntax-check"
    )


def test_the_wheelhouse_is_named_and_the_wheel_packed_again_without_a_checkout(installed: Installed) -> None:
    script = next(installed.prefix.glob("lib/*/site-packages/rbee_ctl/content/roles/rbee_wheels/files/build_wheelhouse.py"))
    source = script.parents[3]
    python = str(installed.prefix / "bin/python")
    plan = json.loads(
        installed.run(python, str(script), f"--source={source}", f"--cache={installed.folder}/cache", "--plan").stdout
    )
    assert plan["rbee_version"] == __version__
    here = [sys.executable, str(ROOT / "roles/rbee_wheels/files/build_wheelhouse.py"), "--plan"]
    checkout = json.loads(subprocess.run(here, capture_output=True, text=True, check=True).stdout)
    assert plan["version"] == checkout["version"], "the same rbee is the same runtime on the nodes"
    code = (
        f"import sys; sys.path.insert(0, {str(script.parent)!r}); import build_wheelhouse as b; from pathlib import Path\n"
        f"print(b.repack(b.installed(Path({str(source)!r})), Path('again')))"
    )
    again = zipfile.ZipFile(installed.folder / installed.run(python, "-c", code).stdout.strip())
    original = zipfile.ZipFile(installed.wheel)
    assert again.testzip() is None
    assert set(again.namelist()) == set(original.namelist())
    assert all(again.read(n) == original.read(n) for n in original.namelist() if not n.endswith("/RECORD"))
