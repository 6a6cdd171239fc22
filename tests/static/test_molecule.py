"""Molecule's scenarios work on machines that have booted systemd, and end with a look at them (SPEC N-14)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SHARED = yaml.safe_load((ROOT / ".config/molecule/config.yml").read_text())["ansible"]["playbooks"]
SCENARIOS = sorted((ROOT / "molecule").glob("*/molecule.yml"))


@pytest.mark.N14
def test_machines_are_the_labs_and_what_is_tried_on_them_is_the_whole_site() -> None:
    assert {k: Path(v).name for k, v in SHARED.items()} == {
        "create": "lab_up.yml",
        "converge": "site.yml",
        "destroy": "lab_down.yml",
    }
    sequences = [yaml.safe_load(path.read_text())["scenario"]["test_sequence"] for path in SCENARIOS]
    steps = {step for sequence in sequences for step in sequence}
    assert steps >= {"check", "converge", "idempotence", "side_effect", "verify"}


@pytest.mark.N14
@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.parent.name)
def test_a_scenario_boots_deploys_looks_and_takes_down(path: Path) -> None:
    sequence = yaml.safe_load(path.read_text())["scenario"]["test_sequence"]
    order = [step for step in sequence if step in ("create", "converge", "verify", "destroy")]
    assert order == ["create", "converge", "verify", "destroy"]


@pytest.mark.N14
def test_make_runs_every_scenario() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert [p.parent.name for p in SCENARIOS if f"molecule test -s {p.parent.name}" not in makefile] == []
