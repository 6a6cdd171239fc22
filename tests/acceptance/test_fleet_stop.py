"""The whole fleet as one thing: stopped with the queen or beneath it, and as a unit of the controller (SPEC X-07, N-01)."""

from __future__ import annotations

import re

import httpx
import pytest
from machines import Fleet
from waiting import until

UNITS = {"lab1": ("rbee-hive.target", "rbee-worker@cpu0", "rbee-queen"), "lab2": ("rbee-hive.target", "rbee-worker@cpu0")}


def states(fleet: Fleet) -> dict[str, list[str]]:
    """State of all of rbee's units on both machines."""
    return {n: fleet.lab.ssh(n, f"systemctl is-active {' '.join(u)}", check=False).stdout.split() for n, u in UNITS.items()}


def pids(fleet: Fleet) -> list[str]:
    """Main processes of the workers."""
    return [fleet.lab.ssh(n, "systemctl show -p MainPID --value rbee-worker@cpu0").stdout.strip() for n in UNITS]


def idle(fleet: Fleet) -> set[str]:
    """Ids of the workers that take requests; empty while the queen is away."""
    try:
        answer = httpx.get(f"{fleet.queen_url}/v1/workers?state=idle", headers=fleet.headers, timeout=60, trust_env=False)
    except httpx.TransportError:
        return set()
    return {w["id"] for w in answer.json()["workers"]}


@pytest.mark.N01
@pytest.mark.X07
def test_the_queen_stops_alone_or_with_the_fleet(fleet: Fleet) -> None:
    down = {n: ["inactive"] * len(u) for n, u in UNITS.items()}
    until(lambda: idle(fleet) >= {"lab1-cpu0", "lab2-cpu0"}, "both workers idle before the test")
    before = pids(fleet)
    try:
        done = fleet.lab.ctl("queen", "stop", "--no-cascade")
        assert done.returncode == 0, done.stderr
        assert states(fleet) == {"lab1": ["active", "active", "inactive"], "lab2": ["active", "active"]}
        done = fleet.lab.ctl("queen", "start")
        assert done.returncode == 0, done.stderr
        assert pids(fleet) == before
        until(lambda: idle(fleet) >= {"lab1-cpu0", "lab2-cpu0"}, "the registry is full again")

        done = fleet.lab.ctl("daemon", "stop")
        assert done.returncode == 0, done.stderr
        assert re.search(r"lab2: 1 of 1 stopped", done.stderr), done.stderr
        assert states(fleet) == down
    finally:
        done = fleet.lab.playbook("start")
        assert done.returncode == 0, done.stdout[-3000:]
    until(lambda: idle(fleet) >= {"lab1-cpu0", "lab2-cpu0"}, "the fleet is back")


def test_a_queen_that_systemd_refuses_to_start_again_is_started_by_rbee(fleet: Fleet) -> None:
    """systemd counts the starts that people ask for as well, and takes the sixth in five minutes for a crash loop."""
    again = "for n in 1 2 3 4 5 6; do systemctl restart rbee-queen || exit 7; done"
    try:
        assert fleet.lab.ssh("lab1", again, check=False, timeout=120).returncode == 7
        assert fleet.lab.ssh("lab1", "systemctl is-active rbee-queen", check=False).stdout.strip() == "failed"
        done = fleet.lab.ctl("queen", "start")
        assert done.returncode == 0, done.stderr
    finally:
        fleet.lab.ssh("lab1", "systemctl reset-failed rbee-queen; systemctl start rbee-queen")
    until(lambda: idle(fleet) >= {"lab1-cpu0", "lab2-cpu0"}, "the registry is full again")
