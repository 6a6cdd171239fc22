"""``rbee-ctl plan`` and ``drift``: nothing on a converged fleet; every difference by name on a machine that has drifted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from machines import Fleet, Lab

UNIT = "/etc/systemd/system/rbee-worker@.service"
#: What somebody does to a machine, and how it is undone.
DEEDS = (
    ("mkdir -p {unit_d} && printf '[Service]\\nNice=3\\n' > {unit_d}/99-admin.conf", "rm {unit_d}/99-admin.conf"),
    (f"cp -a {UNIT} /root/unit && echo '# mine' >> {UNIT}", f"mv /root/unit {UNIT}"),
    (
        "mkdir /opt/rbee/runtimes/cpu/0.0.9 && cp -a /etc/rbee/workers/cpu0.runtime /root/link "
        "&& ln -sfn /opt/rbee/runtimes/cpu/0.0.9 /etc/rbee/workers/cpu0.runtime",
        "mv -T /root/link /etc/rbee/workers/cpu0.runtime; rmdir /opt/rbee/runtimes/cpu/0.0.9",
    ),
    ("sed 's/cpu0/cpu0-z/' /etc/rbee/workers/cpu0.toml > /etc/rbee/workers/cpu0-z.toml", "rm /etc/rbee/workers/cpu0-z.toml"),
    (
        "cp -a {catalog} /root/catalog && sed -i 's/b179c9523d0e/000000000000/' {catalog}",
        "mv /root/catalog {catalog}",
    ),
)
PLACES = {
    "unit_d": "/etc/systemd/system/rbee-worker@cpu0.service.d",
    "catalog": "$(find /var/lib/rbee/models -name metadata.yaml)",
}


def asked(lab: Lab, *arguments: str, code: int) -> dict[str, Any]:
    """Run rbee-ctl with --json; returns what it found on each machine."""
    done = lab.ctl(*arguments, "--json", timeout=300)
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    data: dict[str, Any] = json.loads(done.stdout)["data"]
    assert data["differs"] is (code == 6)
    hosts: dict[str, Any] = data["hosts"]
    return hosts


@pytest.fixture
def drifted(fleet: Fleet) -> Iterator[Lab]:
    """lab2 after all the deeds."""
    lab, done = fleet.lab, list[str]()
    try:
        for deed, undo in DEEDS:
            lab.ssh("lab2", deed.format(**PLACES))
            done.append(undo.format(**PLACES))
        yield lab
    finally:
        lab.ssh("lab2", "; ".join([*done, "systemctl daemon-reload"]))


def test_a_converged_fleet_has_no_drift(fleet: Fleet) -> None:
    began = {node: fleet.lab.ssh(node, "date +%s").stdout.strip() for node in ("lab1", "lab2")}
    hosts = asked(fleet.lab, "drift", "--deep", code=0)
    assert {h: (f["drift"], f["changes"]) for h, f in hosts.items()} == {"lab1": ([], []), "lab2": ([], [])}
    for node, since in began.items():  # looking at a worker without a socket made systemd complain of it
        said = fleet.lab.ssh(node, f"journalctl --no-pager -o cat -t systemd --since @{since}").stdout
        assert "no Listen setting" not in said


def test_drift_names_what_was_changed_by_hand_and_the_plan_what_would_be_put_right(drifted: Lab) -> None:
    state = "find /etc /opt/rbee /var/lib/rbee -type f -o -type l | xargs stat -c '%n %Y %s' | sort | sha256sum"
    before = drifted.ssh("lab2", state).stdout

    hosts = asked(drifted, "drift", "--deep", code=6)

    assert (hosts["lab1"]["drift"], hosts["lab1"]["changes"]) == ([], [])
    found = {(d["kind"], d["what"].rsplit("/", 1)[-1]) for d in hosts["lab2"]["drift"]}
    assert found >= {
        ("drop-in", "rbee-worker@cpu0.service"),
        ("unit file", "rbee-worker@.service"),
        ("not reloaded", "rbee-worker@cpu0.service"),
        ("running version", "cpu0"),
        ("installed version", "cpu0"),
        ("undeclared worker", "cpu0-z"),
        ("model digest", "smollm2-135m-instruct"),
    }
    assert all(d["next"] for d in hosts["lab2"]["drift"])
    changed = [c["what"] for c in hosts["lab2"]["changes"]]
    assert UNIT in changed
    assert "/etc/rbee/workers/cpu0.toml" in changed  # settings and runtime link of an instance are one thing
    (unit,) = [c["diff"] for c in hosts["lab2"]["changes"] if c["what"] == UNIT]
    assert "-# mine" in unit
    assert drifted.ssh("lab2", state).stdout == before, "looking for drift changed the machine"

    text = drifted.ctl("plan", "--node", "lab2")
    assert text.returncode == 6
    assert "-# mine" in text.stdout
