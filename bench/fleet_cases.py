"""Cases about the control plane: what rbee-ctl costs beside ssh and systemctl, and what twenty machines cost beside one."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.engine_cases import Run
from bench.results import Row
from rbee_ctl.demo_model import MODEL_ID
from tests.acceptance.machines import Lab, unavailable

UNIT = "rbee-worker@cpu0.service"


@contextmanager
def lab(machines: int) -> Iterator[Lab]:
    """Booted machines with nothing on them; raises RuntimeError where none can boot."""
    if reason := unavailable():
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as folder:
        found = Lab(Path(folder) / "lab")
        try:
            found.up(machines)
            yield found
        finally:
            found.run("down", check=False)


def _timed(act: Callable[[], subprocess.CompletedProcess[str]]) -> float:
    began = time.monotonic()
    done = act()
    took = time.monotonic() - began
    if done.returncode != 0:
        raise RuntimeError(f"{done.args}: {done.stdout[-500:]} {done.stderr[-1000:]}")
    return took


def one(run: Run) -> None:
    """Start and stop a worker of one machine: what rbee-ctl adds to ssh and systemctl."""
    added: dict[str, list[float]] = {"stop": [], "start": []}
    with lab(1) as machine:
        _timed(lambda: machine.playbook("site", timeout=900))
        commands = {
            "stop": ["worker", "stop", "lab1-cpu0"],
            "start": ["worker", "start", "--node", "lab1", "--model", MODEL_ID],
        }
        for n in range(run.rounds + 1):
            for verb, command in commands.items():
                plain = _timed(lambda verb=verb: machine.ssh("lab1", f"systemctl {verb} {UNIT}"))
                machine.ssh("lab1", f"systemctl {'start' if verb == 'stop' else 'stop'} {UNIT}")
                ours = _timed(lambda command=command: machine.ctl(*command))
                if n:  # the first round warms files and connections
                    added[verb].append(ours - plain)
    for verb, values in added.items():
        what = f"rbee-ctl worker {verb}: what it adds to ssh + systemctl {verb}"
        run.results.add(Row(f"fleet-one/{verb}", what, "s", values, 1.0))


def twenty(run: Run) -> None:
    """One call for twenty machines on these cores, against the same call for one of them."""
    many, single = [], []
    with lab(20) as machines:
        target = str(Path(__file__).parents[1] / "systemd/rbee-hive.target")
        copy = f"src={target} dest=/etc/systemd/system/rbee-hive.target mode=0644"
        ansible = ["ansible", "-i", str(machines.inventory), "rbee_hives", "-m", "ansible.builtin.copy", "-a", copy]
        _timed(lambda: machines.command(ansible))
        for n in range(run.rounds + 1):
            for verb in ("start", "stop"):
                few = _timed(lambda verb=verb: machines.ctl("hive", verb, "--node", "lab1"))
                all_ = _timed(lambda verb=verb: machines.ctl("hive", verb))
                if n:
                    single.append(few)
                    many.append(all_)
    what = "rbee-ctl hive start and stop on twenty machines that share these cores"
    run.results.add(Row("fleet-twenty/time", what, "s", many, 3, False, single, "one machine"))


CASES = {"fleet-one": one, "fleet-twenty": twenty}
