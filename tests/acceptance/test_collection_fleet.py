"""The Ansible collection on booted machines: somebody without this checkout has the same fleet by it."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from machines import Fleet
from waiting import until

from tests.installed_collection import InstalledCollection


def test_the_collection_finds_the_fleet_as_it_wants_it_and_runs_it(fleet: Fleet, tmp_path: Path) -> None:
    lab = fleet.lab
    play = partial(InstalledCollection(tmp_path).play, inventory=lab.inventory, timeout=600)

    said = play("site")
    recap = re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+) +unreachable=(\d+) +failed=(\d+)", said, re.MULTILINE)
    assert {name for name, *_ in recap} >= {"lab1", "lab2"}
    assert {tuple(counts) for _, *counts in recap} == {("0", "0", "0")}, said

    state = partial(lab.ssh, "lab2", "systemctl is-active rbee-worker@cpu0.service", check=False)
    play("hive_stop", "--limit", "lab2")
    assert state().stdout.strip() == "inactive"
    play("hive_start", "--limit", "lab2")
    until(lambda: state().stdout.strip() == "active", "the worker runs again")
