"""A fleet changes its version while clients stream: nothing lost; a version that can not serve stops at the first machine.

Clients ask without pause and never ask again: no request may be refused, also while the queen itself is restarted, and every
stream must end whole, with the very tokens that the old version gave.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from machines import Fleet
from newer_checkout import NEWER, newer_checkout
from waiting import until

from rbee_ctl.demo_model import MODEL_ID

NODES = ("lab1", "lab2")
#: All but the last stay within what is continued exactly (256 tokens of prompt and answer with an f16 cache).
REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "Once upon a time", "max_tokens": 90, "temperature": 0.8, "seed": 1},
    {"prompt": "The old bridge was", "max_tokens": 70, "temperature": 0.7, "seed": 2},
    {"prompt": "Bees are", "max_tokens": 110, "temperature": 0},
    {"prompt": "In the year 1900", "max_tokens": 280, "temperature": 0.9, "seed": 4},
)
EXACT = len(REQUESTS) - 1


class Client:
    """One client: the same question again and again, each answer compared with the first one."""

    def __init__(self, fleet: Fleet, request: dict[str, Any], *, exact: bool) -> None:
        self.fleet, self.exact = fleet, exact
        self.body = {"model": MODEL_ID, "ignore_eos": True, **request}
        whole = httpx.post(
            f"{fleet.queen_url}/v1/inference",
            json={**self.body, "stream": False},
            headers=fleet.headers,
            timeout=120,
            trust_env=False,
        )
        self.reference: list[int] = whole.json()["token_ids"]
        self.answers = self.moved = 0
        self.faults: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the answer that is running."""
        self._stop.set()
        self._thread.join(300)
        assert not self._thread.is_alive(), "a stream neither ended nor failed"

    def _run(self) -> None:
        while not self._stop.is_set() and not self.faults:
            try:
                self._ask()
            except httpx.HTTPError as e:
                self.faults.append(f"{type(e).__name__}: {e}")

    def _ask(self) -> None:
        lines: list[str] = []
        with (
            httpx.Client(base_url=self.fleet.queen_url, headers=self.fleet.headers, timeout=120, trust_env=False) as http,
            http.stream("POST", "/v1/inference", json=self.body) as stream,
        ):
            if stream.status_code != 200:
                self.faults.append(f"{stream.status_code}: {stream.read().decode()}")
                return
            lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
        self._judge(lines)

    def _judge(self, lines: list[str]) -> None:
        events = [json.loads(line) for line in lines if line != "[DONE]"]
        tokens = [e for e in events if e["type"] == "token"]
        moves = [e for e in events if e["type"] == "resumed"]
        self.moved += len(moves)
        if lines[-1:] != ["[DONE]"] or not events or events[-1]["type"] != "end":
            self.faults.append(f"no end after {len(tokens)} tokens: {lines[-2:]}")
        elif [t["i"] for t in tokens] != list(range(self.body["max_tokens"])):
            self.faults.append(f"{len(tokens)} tokens of {self.body['max_tokens']}, or not in order")
        elif self.exact and [t["id"] for t in tokens] != self.reference:
            self.faults.append(f"other tokens than before the upgrade; moved: {moves}")
        else:
            self.answers += 1


class Clients:
    """All of them, streaming from ``with`` on; at its end every answer has been whole."""

    def __init__(self, fleet: Fleet) -> None:
        self.all = [Client(fleet, request, exact=n < EXACT) for n, request in enumerate(REQUESTS)]

    def __enter__(self) -> Clients:
        for client in self.all:
            client.start()
        until(lambda: all(c.answers or c.faults for c in self.all), "every client had an answer", limit_s=300)
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.all:
            client.stop()

    @property
    def moved(self) -> int:
        """Streams that were taken over by another worker."""
        return sum(c.moved for c in self.all)

    def faults(self) -> list[str]:
        return [f for c in self.all for f in c.faults]


class Roll:
    """The fleet, and an inventory that is deployed from the newer checkout."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.fleet, self.lab = fleet, fleet.lab
        source = newer_checkout(folder / "newer")
        data = yaml.safe_load(self.lab.inventory.read_text())
        data["all"]["vars"]["rbee_wheels_source"] = str(source)
        self.inventory = folder / "inventory.yml"
        self.inventory.write_text(yaml.safe_dump(data))
        plan = self.lab.command(["python", "roles/rbee_wheels/files/build_wheelhouse.py", f"--source={source}", "--plan"])
        self.version: str = json.loads(plan.stdout)["version"]
        assert self.version.startswith(f"{NEWER}-")

    @property
    def runtime(self) -> str:
        """Folder of the new worker runtime on a machine."""
        return f"/opt/rbee/runtimes/cpu/{self.version}"

    def upgrade(self) -> tuple[int, dict[str, Any]]:
        """Return exit code and envelope of ``rbee-ctl upgrade``."""
        done = self.lab.ctl("-i", str(self.inventory), "upgrade", "--json", timeout=900)
        return done.returncode, json.loads(done.stdout)

    def running(self, node: str) -> str:
        """Return the runtime of the worker's process; the link to it says the same."""
        pid = self.pid(node)
        shown = f"readlink /etc/rbee/workers/cpu0.runtime; tr '\\0' '\\n' < /proc/{pid}/cmdline | head -1"
        link, interpreter = self.lab.ssh(node, shown).stdout.split()
        assert interpreter.startswith(f"{link}/bin/"), f"{node}: the link leads to {link}, the process runs {interpreter}"
        return link

    def pid(self, node: str) -> str:
        return self.lab.ssh(node, "systemctl show -p MainPID --value rbee-worker@cpu0").stdout.strip()

    def registered(self) -> dict[str, int]:
        """Workers that take requests, with their process ids."""
        answer = httpx.get(f"{self.fleet.queen_url}/v1/workers", headers=self.fleet.headers, trust_env=False, timeout=30)
        return {w["id"]: w["pid"] for w in answer.json()["workers"] if w["status"] in ("idle", "busy")}

    def break_new_runtime(self, node: str) -> None:
        """Have the machine damage the new runtime in the moment it is complete: llama.cpp's library is away."""
        hide = f"mv $(find {self.runtime} -name libllama.so) /root/libllama.so"
        watch = f"--path-property=PathExists={self.runtime}/metadata.yaml --unit=spoiler --service-type=oneshot"
        self.lab.ssh(node, f"systemd-run --quiet --remain-after-exit {watch} sh -c '{hide}'")

    def mend_new_runtime(self, node: str) -> None:
        where = f"$(dirname $(find {self.runtime} -name libggml.so))"
        self.lab.ssh(node, f"systemctl stop spoiler.path spoiler.service; mv /root/libllama.so {where}/")


@pytest.fixture(scope="module")
def roll(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roll]:
    roll = Roll(fleet, tmp_path_factory.mktemp("roll"))
    until(lambda: len(roll.registered()) >= len(NODES), "the whole fleet is up", limit_s=60)
    try:
        yield roll
    finally:
        done = fleet.lab.playbook("site")
        assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.timeout(3000)  # two rolls with clients at work all the while, and the wheels of a version that nobody has built
def test_an_upgrade_loses_no_token_and_one_that_can_not_serve_stops_at_the_first_machine(roll: Roll) -> None:
    before = {node: (roll.running(node), roll.pid(node)) for node in NODES}
    assert {path.rsplit("/", 1)[1] for path, _ in before.values()} != {roll.version}
    roll.break_new_runtime("lab1")

    with Clients(roll.fleet) as clients:
        code, report = roll.upgrade()

        (error,) = report["errors"]
        assert (code, error["code"], error["host"]) == (14, "SELF_TEST_FAILED", "lab1"), report
        assert roll.version in error["message"]
        assert {n: h["upgraded"] for n, h in report["data"]["hosts"].items()} == {"lab1": False, "lab2": False}
        assert roll.running("lab1") == before["lab1"][0]
        assert (roll.running("lab2"), roll.pid("lab2")) == before["lab2"], "the second machine was touched"
        until(lambda: roll.registered().get("lab1-cpu0") == int(roll.pid("lab1")), "the old worker is back", limit_s=60)

        roll.mend_new_runtime("lab1")
        code, report = roll.upgrade()

        assert (code, report["errors"]) == (0, []), report
        done = report["data"]["hosts"]
        assert {n: (done[n]["upgraded"], done[n]["runs"]) for n in done} == dict.fromkeys(NODES, (True, roll.version))
        until(lambda: len(roll.registered()) == len(NODES), "the whole fleet is up", limit_s=60)
        answers = [c.answers for c in clients.all]
        until(
            lambda: all(c.answers > n or c.faults for c, n in zip(clients.all, answers, strict=True)),
            "every client had an answer of the new version",
            limit_s=300,
        )

    assert clients.faults() == []
    assert clients.moved > 0, "no stream was taken over: the test has tried nothing"
    assert {node: roll.running(node) for node in NODES} == dict.fromkeys(NODES, roll.runtime)
    assert all(roll.pid(node) != before[node][1] for node in NODES)
