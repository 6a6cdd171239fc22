"""The wheel alone, installed anywhere: what the checkout does, it does (no checkout in sight)."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import httpx
import pytest
from fleet import wait_until

from rbee_ctl.embedded import free_port
from rbee_serve import __version__
from tests.outside import run_outside

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
        done = run_outside(self.folder, *arguments, bin_dir=self.prefix / "bin", HOME=str(self.home))
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
    refused = installed.run("rbee-ctl", "queen", "start", check=False)
    assert (refused.returncode, "systemctl --user start rbee-queen" in refused.stderr) == (1, True)
    port = free_port()  # somebody may have the queen's own
    for file in (".config/rbee/queen.toml", ".local/state/rbee/client.toml"):
        text = (installed.home / file).read_text()
        (installed.home / file).write_text(text.replace("8080", str(port)))

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
        "key": True,
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


@pytest.mark.S83
def test_the_queen_that_install_has_set_up_asks_for_its_key_and_runs_jobs(installed: Installed) -> None:
    """As the user's unit starts it; the test before has installed."""
    settings, state = installed.home / ".config/rbee/queen.toml", installed.home / ".local/state/rbee"
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RBEE_", "ANSIBLE_", "PYTHON"))}
    command = [str(installed.home / ".local/bin/rbee-queen"), "--config", str(settings)]
    queen = subprocess.Popen(command, env=environ | {"HOME": str(installed.home)}, cwd=installed.folder)
    try:
        url = tomllib.loads((state / "client.toml").read_text())["queen_url"]
        headers = {"Authorization": f"Bearer {(state / 'secrets/client-key').read_text().strip()}"}

        def answers() -> bool:
            assert queen.poll() is None
            try:
                return httpx.get(f"{url}/health", timeout=60, trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, "the queen answers")
        assert json.loads(installed.run("rbee-ctl", "queen", "status", "--json").stdout)["data"]["queen"]["uptime_s"] >= 0
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as anybody:
            assert anybody.get("/v1/workers").status_code == 401
        with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as us:
            job = us.post("/v1/jobs", json={"operation": "hive_list"}).json()["job_id"]
            ended = wait_until(lambda: (j := us.get(f"/v1/jobs/{job}").json())["finished_at"] and j, "the job has ended")
        assert [h["name"] for h in ended["result"]["hives"]] == ["localhost", "node2"]
    finally:
        queen.terminate()
        queen.wait(60)
    secrets = [state / "secrets" / name for name in ("client-key", "queen-keys", "fleet-token")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (*secrets, secrets[0].parent)] == [0o600, 0o600, 0o600, 0o700]


def test_an_installation_without_libraries_says_exactly_what_to_install(installed: Installed, tmp_path: Path) -> None:
    """`pipx install FILE.whl`, without an extra: pydantic alone is there."""
    prefix = tmp_path / "pipx/venvs/rbee"
    venv.create(prefix, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(prefix / "bin/python"), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(installed.wheel)], check=True, capture_output=True, timeout=120)
    site = next(prefix.glob("lib/*/site-packages"))
    for name in ("pydantic", "pydantic_core", "annotated_types", "typing_extensions.py", "typing_inspection"):
        (site / name).symlink_to(Path(sysconfig.get_path("purelib")) / name)

    def said(*arguments: str) -> str:
        done = run_outside(tmp_path, *arguments, bin_dir=prefix / "bin", HOME=str(tmp_path))
        assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False), done.stderr
        assert "[MISSING_DEPENDENCY]" in done.stderr
        return done.stderr.splitlines()[-1].strip()

    for verb in (("install",), ("queen", "start"), ("--help",)):
        assert said("rbee-ctl", *verb) == f"try: pipx install --force '{installed.wheel}[ctl]'"
    assert said("rbee-queen", "--config", "queen.toml") == f"try: pipx install --force '{installed.wheel}[queen]'"
    (site / "ansible_runner.py").touch()  # the controller's libraries are there: they are not to be lost
    assert said("rbee-queen", "--config", "queen.toml") == f"try: pipx install --force '{installed.wheel}[ctl,queen]'"


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
