"""systemd's own judgement of the units in systemd/, and the promises that hang on single lines of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rbee_serve.contract.settings import QueenSettings, WorkerSettings

UNITS = Path(__file__).resolve().parents[2] / "systemd"
STOCK = Path("/lib/systemd/system")
#: Exposure by `systemd-analyze security`, in tenths: the limit is 2.0 (measured: worker 1.5, queen 1.4).
THRESHOLD = 20
#: What runs on and on; rbee-fleet.service is an operator's command.
SERVICES = sorted(p.name for p in UNITS.glob("*.service") if "Type=notify" in p.read_text())


def seconds(unit: str, key: str) -> float:
    match = re.search(rf"^{key}=(\d+)$", (UNITS / unit).read_text(), re.MULTILINE)
    assert match, f"{unit} has no {key}="
    return float(match[1])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A scratch root with the stock targets and slices, our units, and the programs they start."""
    system = tmp_path / "etc/systemd/system"
    system.mkdir(parents=True)
    for pattern in ("*.target", "*.slice", "*.socket"):
        for stock in STOCK.glob(pattern):
            shutil.copy(stock, system / stock.name, follow_symlinks=True)
    for unit in UNITS.iterdir():
        if unit.is_file() and unit.suffix in (".service", ".target", ".slice", ".socket"):
            shutil.copy(unit, system)
    programs = ("etc/rbee/workers/cpu0.runtime/bin/rbee-worker", "etc/rbee/queen.runtime/bin/rbee-queen")
    for program in (*programs, "usr/bin/install", "bin/kill", "bin/sh"):
        path = tmp_path / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    drop_in = system / "rbee-worker@cpu0.socket.d/50-rbee.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Socket]\nListenStream=0.0.0.0:8001\n")
    return tmp_path


UNIT_NAMES = [
    *("rbee-hive.target", "rbee.slice", "rbee-worker@cpu0.service", "rbee-worker@cpu0.socket", "rbee-queen.service"),
    "rbee-fleet.service",
]


@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_systemd_finds_nothing_to_complain_about(root: Path, unit: str) -> None:
    command = ["systemd-analyze", "verify", "--recursive-errors=yes", "--man=no", f"--root={root}", unit]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_the_check_itself_notices_a_misspelt_key(root: Path) -> None:
    unit = root / "etc/systemd/system/rbee-queen.service"
    unit.write_text(unit.read_text().replace("Restart=on-failure", "Restrat=on-failure"))
    command = ["systemd-analyze", "verify", "--recursive-errors=yes", "--man=no", f"--root={root}", "rbee-queen.service"]

    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("unit", SERVICES)
@pytest.mark.N12
def test_exposure_is_at_most_two(unit: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={THRESHOLD}", "--no-pager", str(UNITS / unit)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout[-500:]


def test_timeouts_nest_so_that_no_drain_is_cut_by_systemd() -> None:
    worker = WorkerSettings(name="cpu0", hive="h", model_id="m", model_path=Path("/m"))

    assert worker.drain_timeout_s + 5 < seconds("rbee-worker@.service", "TimeoutStopSec")
    assert worker.load_timeout_s < seconds("rbee-worker@.service", "TimeoutStartSec")
    assert QueenSettings().drain_timeout_s + 5 < seconds("rbee-queen.service", "TimeoutStopSec")


def test_stopping_the_target_stops_workers_and_sockets_and_waits_for_them() -> None:
    text = (UNITS / "rbee-worker@.service").read_text()

    assert re.search(r"^PartOf=rbee-hive\.target$", (UNITS / "rbee-worker@.socket").read_text(), re.MULTILINE)
    assert re.search(r"^PartOf=rbee-hive\.target$", text, re.MULTILINE)
    assert re.search(r"^After=.*\brbee-hive\.target\b", text, re.MULTILINE)
    assert re.search(r"^WantedBy=rbee-hive\.target$", text, re.MULTILINE)


@pytest.mark.parametrize("unit", SERVICES)
def test_wrong_configuration_is_not_started_again(unit: str) -> None:
    text = (UNITS / unit).read_text()

    prevented = re.search(r"^RestartPreventExitStatus=(.*)$", text, re.MULTILINE)
    assert prevented
    assert "78" in prevented[1].split()
    assert "Restart=on-failure\n" in text
    assert seconds(unit, "StartLimitBurst") > 0


@pytest.mark.parametrize("unit", SERVICES)
def test_secrets_come_as_credentials_and_never_by_environment(unit: str) -> None:
    text = (UNITS / unit).read_text()

    assert "LoadCredential=fleet-token:" in text
    assert not re.search(r"^Environment(File)?=", text, re.MULTILINE)


def test_units_hold_no_jinja_and_every_accelerator_drop_in_opens_devices_alone() -> None:
    for path in UNITS.rglob("*"):
        if path.is_file():
            assert "{{" not in path.read_text(), path
    for path in (UNITS / "accelerators").glob("*.conf"):
        keys = set(re.findall(r"^(\w+)=", path.read_text(), re.MULTILINE))
        assert keys <= {"PrivateDevices", "DeviceAllow", "SupplementaryGroups", "MemoryDenyWriteExecute"}, path
