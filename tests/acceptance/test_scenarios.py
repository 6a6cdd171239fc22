"""Steps of the features: rbee-ctl, ansible-playbook and HTTP as people use them; ssh only to look."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub import Hub
from machines import ROOT, Done, Fleet, Lab
from pytest_bdd import given, parsers, scenarios, then, when
from waiting import until

from rbee_ctl.demo_model import MODEL_ID

scenarios("features")

LONG = {"prompt": "Once upon a time", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}
ENGINE = "pgrep -x rbee-engine"


class World:
    """What one scenario has seen so far."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.lab = fleet, fleet.lab
        self.http = httpx.Client(base_url=fleet.queen_url, headers=fleet.headers, timeout=60, trust_env=False)
        self.fleet_token = (self.lab.directory / "state/secrets/fleet-token").read_text().strip()
        self.stack = ExitStack()
        self.done: Done | None = None
        self.seen: dict[str, Any] = {}

    @property
    def last(self) -> Done:
        assert self.done is not None, "no command was run"
        return self.done

    def ctl(self, *arguments: str, timeout: float = 300) -> None:
        self.done = self.lab.ctl(*arguments, timeout=timeout)

    def workers(self, **filters: str) -> dict[str, dict[str, Any]]:
        return {w["id"]: w for w in self.http.get("/v1/workers", params=filters).json()["workers"]}

    def worker_url(self, worker_id: str) -> str:
        return str(self.workers()[worker_id]["url"])

    def main_pids(self, unit: str = "rbee-worker@cpu0") -> dict[str, str]:
        return {n: self.lab.ssh(n, f"systemctl show -p MainPID --value {unit}").stdout.strip() for n in ("lab1", "lab2")}

    def units(self, node: str) -> str:
        return self.lab.ssh(node, "systemctl list-units --all --no-legend --plain 'rbee-*' | awk '{print $1}'").stdout

    def part(self, part: str) -> tuple[str, dict[str, str]]:
        """Return base URL and authorization of the queen, or of the worker on lab1."""
        if part == "queen":
            return self.fleet.queen_url, self.fleet.headers
        return self.worker_url("lab1-cpu0"), {"Authorization": f"Bearer {self.fleet_token}"}

    def slots_taken(self) -> int:
        """Return the slots that are taken: as the workers themselves say, and as the queen counts its own requests."""
        taken = 0
        for worker in self.workers().values():
            headers = {"Authorization": f"Bearer {self.fleet_token}"}
            metrics = self.http.get(f"{worker['url']}/metrics", headers=headers).text  # by a connection that is kept: it is timed
            taken += worker["in_flight"] + int(float(re.findall(r"^worker_slots_busy (\S+)", metrics, re.MULTILINE)[0]))
        return taken

    def seen_busy(self) -> None:
        """Wait until a slot is seen taken: without it "all slots are free" would say nothing."""
        until(self.slots_taken, "a slot taken")

    def background(self, body: dict[str, Any]) -> None:
        """Hold a stream open until the scenario ends."""
        started = threading.Event()

        def read() -> None:
            client = httpx.Client(base_url=self.fleet.queen_url, headers=self.fleet.headers, timeout=60, trust_env=False)
            with client, client.stream("POST", "/v1/inference", json=body) as stream:
                for line in stream.iter_lines():
                    if line.startswith("event: token"):
                        started.set()
                    if stop.is_set():
                        return

        stop = threading.Event()
        thread = threading.Thread(target=read)
        thread.start()
        self.stack.callback(thread.join)
        self.stack.callback(stop.set)
        assert started.wait(60), "the stream gave no token"


@pytest.fixture
def world(fleet: Fleet) -> Iterator[World]:
    world = World(fleet)
    with world.http, world.stack:
        until(lambda: len(world.workers(state="idle")) >= 2, "both workers idle before the scenario")
        world.stack.callback(remove_made_by_hand, world.lab)
        yield world


@pytest.fixture
def hub(fleet: Fleet, tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub", host=fleet.lab.controller) as hub:
        variables = fleet.lab.directory / "group_vars/all.yml"
        variables.parent.mkdir(exist_ok=True)
        variables.write_text(f"---\nrbee_hub_endpoint: {hub.url}\n")
        yield hub
        variables.unlink()


def tokens_of(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in lines if line.startswith('data: {"type":"token"')]


# --- given ----------------------------------------------------------------------------------------------------------


@given(parsers.parse('a hub that has the model "{repo}" and sends {rate:d} MB a second'))
def _(hub: Hub, model_path: Path, repo: str, rate: int) -> None:
    hub.add(repo, model_path.name, model_path)
    hub.behaviour.bytes_per_s = rate * 1_000_000


@given("the process ids of all workers")
def _(world: World) -> None:
    world.seen["pids"] = world.main_pids()


@given("the process ids of queen and workers")
def _(world: World) -> None:
    world.seen |= {"pids": world.main_pids(), "queen pid": world.main_pids("rbee-queen")}


@given(parsers.parse('all slots of "{worker_id}" are taken'))
def _(world: World, worker_id: str) -> None:
    world.seen["units"] = world.units("lab1")
    others = [w for w in world.workers(node="lab1").values() if w["id"] != worker_id and w["model_id"] == MODEL_ID]
    total = world.workers()[worker_id]["slots_total"]
    for target in [worker_id] * total + [w["id"] for w in others for _ in range(w["slots_total"])]:
        world.background({**LONG, "worker_id": target})
    until(lambda: world.workers()[worker_id]["status"] == "busy", "worker busy in the registry")


@given(parsers.parse('the record of "{worker_id}" at the queen'))
def _(world: World, worker_id: str) -> None:
    world.seen["record"] = world.workers()[worker_id]
    world.seen["pids"] = world.main_pids()


@given("both hives are stopped")
def _(world: World) -> None:
    world.stack.callback(hives_run_again, world)
    done = world.lab.ctl("hive", "stop")
    assert done.returncode == 0, done.stderr
    until(lambda: not world.workers(), "no worker in the registry")


@given(parsers.parse('"{node}" has only {mb:d} MB of memory available'))
def _(world: World, node: str, mb: int) -> None:
    # Injected into the preflight: what a kernel reports can not be made small for one lab machine.
    variables = world.lab.directory / f"host_vars/{node}.yml"
    variables.parent.mkdir(exist_ok=True)
    variables.write_text(f"---\nrbee_preflight_mem_available_bytes: {mb * 1_000_000}\n")
    world.stack.callback(variables.unlink)


@given(parsers.parse('the runtimes of "{node}" are moved away'))
def _(world: World, node: str) -> None:
    world.lab.ssh(node, "mv /opt/rbee/runtimes /opt/rbee/away")
    world.stack.callback(lambda: world.lab.ssh(node, "mv /opt/rbee/away /opt/rbee/runtimes"))


@given(parsers.parse('the worker "{name}" of "{node}" is stopped'))
def _(world: World, name: str, node: str) -> None:
    done = world.lab.ctl("worker", "stop", "--node", node, name)
    assert done.returncode == 0, done.stderr
    world.stack.callback(lambda: world.lab.ctl("hive", "start", "--node", node))


@given(parsers.parse("its slot is taken for {seconds:d} second"))
def _(world: World, seconds: int) -> None:
    worker = world.seen["slot_worker"]
    busy = subprocess.Popen(
        ["rbee-ctl", "infer", "--worker-id", worker, "--prompt", "Once", "-n", "2000", "--timeout", str(seconds)],
        env=world.lab.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    world.stack.callback(busy.wait)
    until(lambda: world.workers()[worker]["status"] == "busy" or busy.poll() is not None, "slot taken", pause_s=0.02)


# --- when -----------------------------------------------------------------------------------------------------------


@when(parsers.parse('I ask "{node}" with "{model}" to go on from "{prompt}"'))
def _(world: World, node: str, model: str, prompt: str) -> None:
    options = ["--max-tokens", "20", "--temperature", "0.7", "--seed", "11", "--backend", "cpu"]
    if model.startswith("hf:"):
        world.stack.callback(world.lab.ssh, node, "rm -rf /var/lib/rbee/models/lab")
    world.ctl("infer", "--node", node, "--model", model, "--prompt", prompt, *options)
    world.seen |= {"prompt": prompt}


@when(parsers.parse('I ask the worker "{worker_id}" to go on from "{prompt}"'))
def _(world: World, worker_id: str, prompt: str) -> None:
    world.ctl("infer", "--worker-id", worker_id, "--prompt", prompt, "--max-tokens", "5")


@when(parsers.parse('I run "rbee-ctl {arguments}"'))
def _(world: World, arguments: str) -> None:
    world.ctl(*arguments.split())


@given(parsers.parse('a worker "{name}" with {slots:d} slot on "{node}"'))
@when(parsers.parse('I start a worker "{name}" with {slots:d} slot on "{node}"'))
def start_worker(world: World, name: str, slots: int, node: str) -> None:
    world.seen |= {"since": world.lab.ssh(world_queen(world), "date +%s").stdout.strip(), "slot_worker": f"{node}-{name}"}
    world.ctl("worker", "start", "--node", node, "--model", MODEL_ID, "--backend", "cpu", "--name", name, "--slots", str(slots))
    if world.last.returncode == 0:
        until(lambda: world.workers().get(f"{node}-{name}", {}).get("status") == "idle", f"{node}-{name} idle at the queen")


def world_queen(_: World) -> str:
    return "lab1"


def remove_made_by_hand(lab: Lab) -> None:
    """Take away the workers that a scenario made: the next one finds the fleet as site.yml left it."""
    for node in ("lab1", "lab2"):
        listing = lab.ssh(node, "grep -l '^# made by worker_start' /etc/rbee/workers/*.toml", check=False).stdout
        for path in listing.split():
            unit = f"rbee-worker@{Path(path).stem}.service"
            lab.ssh(
                node,
                f"systemctl disable --now {unit}; systemctl reset-failed {unit}; rm -f {path} {path[:-5]}.runtime",
                check=False,
            )


@when("the queen is restarted")
def _(world: World) -> None:
    world.lab.ssh("lab1", "systemctl restart rbee-queen")


@when(parsers.parse('I get "{path}" from the queen'))
def _(world: World, path: str) -> None:
    world.seen["answer"] = world.http.get(path)


@when(parsers.parse('I get "{path}" from the worker "{worker_id}"'))
def _(world: World, path: str, worker_id: str) -> None:
    headers = {"Authorization": f"Bearer {world.fleet_token}"}
    world.seen["answer"] = httpx.get(world.worker_url(worker_id) + path, headers=headers, timeout=60, trust_env=False)


@when(parsers.parse('I stream {count:d} tokens from "{worker_id}" and watch the registry'))
def _(world: World, count: int, worker_id: str) -> None:
    states: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=world.fleet.queen_url, headers=world.fleet.headers, timeout=60, trust_env=False) as client:
            while not stop.is_set():
                states.append(client.get(f"/v1/workers/{worker_id}").json()["status"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    until(lambda: states, "the registry is watched")
    lines: list[tuple[float, str]] = []
    world.seen["count"] = count
    body = {**LONG, "max_tokens": count, "worker_id": worker_id}
    with world.http.stream("POST", "/v1/inference", json=body) as stream:
        world.seen["answer"] = stream
        lines = [(time.monotonic(), line) for line in stream.iter_lines()]
    until(lambda: states[-1] == "idle", "idle again")
    stop.set()
    watcher.join()
    world.seen |= {"lines": lines, "states": states}


@when("I interrupt a long answer of rbee-ctl")
def _(world: World) -> None:
    command = ["rbee-ctl", "infer", "--model", MODEL_ID, "--prompt", "Once upon a time", "-n", "2000", "--temperature", "0"]
    process = subprocess.Popen(
        command, env=world.lab.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    world.stack.callback(process.kill)  # in case it outlives a failure
    assert process.stdout is not None
    first = process.stdout.read(20)
    world.seen_busy()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    world.done = subprocess.CompletedProcess(command, process.returncode, first + out, err)


@when(parsers.parse("a client of the {part} closes its connection in the middle of a stream"))
def _(world: World, part: str) -> None:
    base, headers = world.part(part)
    with (
        httpx.Client(base_url=base, headers=headers, timeout=60, trust_env=False) as client,
        client.stream("POST", "/v1/inference", json={**LONG, "model": MODEL_ID}) as stream,
    ):
        world.seen["node"] = stream.headers["x-rbee-worker"].split("-")[0] if part == "queen" else "lab1"
        lines = stream.iter_lines()  # kept: dropping it would close the connection already here
        assert len(list(itertools.islice(lines, 12))) == 12
        world.seen_busy()


@when(parsers.parse("I delete a running request of the {part} twice and an unknown one once"))
def _(world: World, part: str) -> None:
    answers, lines = [], []
    base, headers = world.part(part)
    with (
        httpx.Client(base_url=base, headers=headers, timeout=60, trust_env=False) as client,
        client.stream("POST", "/v1/inference", json={**LONG, "model": MODEL_ID}) as stream,
    ):
        ident = stream.headers["x-request-id"]
        for number, line in enumerate(stream.iter_lines()):
            lines.append(line)
            if number == 10:
                world.seen_busy()
                with httpx.Client(base_url=base, headers=headers, timeout=60, trust_env=False) as other:
                    answers = [other.delete(f"/v1/inference/{i}") for i in (ident, ident, "never-was")]
    world.seen |= {"answers": answers, "stream": lines}


@when(parsers.re(r"I post an inference to the (?P<part>queen|worker) (?P<key>without a key|with a wrong key)"))
def _(world: World, part: str, key: str) -> None:
    base = world.fleet.queen_url if part == "queen" else world.worker_url("lab1-cpu0")
    headers = {} if key == "without a key" else {"Authorization": "Bearer rbee-nobody-knows-me"}
    body = {"model": MODEL_ID, "prompt": "x"}
    world.seen["answer"] = httpx.post(f"{base}/v1/inference", json=body, headers=headers, timeout=60, trust_env=False)


@when(parsers.re(r"I run rbee-ctl (?P<key>without a key|with a wrong key)"))
def _(world: World, tmp_path: Path, key: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'queen_url = "{world.fleet.queen_url}"\nstate_dir = "{tmp_path}"\n')
    if key == "with a wrong key":
        file = tmp_path / "key"
        file.touch(0o600)
        file.write_text("rbee-nobody-knows-me\n")
        config.write_text(f'{config.read_text()}api_key_file = "{file}"\n')
    command = ["infer", "--model", MODEL_ID, "--prompt", "x"]
    world.done = world.lab.ctl(*command, env={"RBEE_CONFIG": str(config)})


# --- then: commands -------------------------------------------------------------------------------------------------


@then(parsers.parse("the command ends with {code:d}"))
def _(world: World, code: int) -> None:
    assert world.last.returncode == code, f"stdout: {world.last.stdout}\nstderr: {world.last.stderr}"


@then("standard output is the story and nothing else")
def _(world: World) -> None:
    """Same worker, same seed: the queen gives the very same bytes when it is asked without rbee-ctl."""
    body = {"prompt": world.seen["prompt"], "max_tokens": 20, "temperature": 0.7, "seed": 11, "stream": False}
    again = world.http.post("/v1/inference", json={**body, "worker_id": worker_of(world)}).json()
    assert again["tokens_generated"] > 0, again
    assert world.last.stdout == again["text"]


def worker_of(world: World) -> str:
    """Return the worker that the last line of standard error names."""
    return world.last.stderr.strip().splitlines()[-1].rsplit(", ", 1)[1]


@then("standard error tells of these steps in order:")
def _(world: World, datatable: list[list[str]]) -> None:
    """``A or B``: a model that loads between two looks is not seen loading, only loaded."""
    at = 0
    for (words,) in datatable:
        found = [i for way in words.split(" or ") if (i := world.last.stderr.find(way, at)) >= 0]
        assert found, f"{words!r} is not told after the steps before it\n{world.last.stderr}"
        at = min(found)


@then(parsers.parse('standard error says "{words}"'))
def _(world: World, words: str) -> None:
    assert words in world.last.stderr


@then(parsers.parse("standard error counts {count:d} more tries"))
def _(world: World, count: int) -> None:
    assert world.last.stderr.count("next try in") == count, world.last.stderr


@then("each of these is a line of standard output:")
def _(world: World, datatable: list[list[str]]) -> None:
    lines = [line.split() for line in world.last.stdout.splitlines()]
    for row in datatable:
        assert row in [line[: len(row)] for line in lines], world.last.stdout


@then("no playbook ran")
def _(world: World) -> None:
    """A playbook narrates its tasks under its own name: nothing but the queen and rbee-ctl itself has spoken."""
    actions = set(re.findall(r"^\[.{10}\] (\w+) *:", world.last.stderr, re.MULTILINE))
    assert actions
    assert actions <= {"busy", "done"}, world.last.stderr


@then("a playbook ran")
def _(world: World) -> None:
    assert re.search(r"^\[.{10}\] worker_start *:", world.last.stderr, re.MULTILINE), world.last.stderr


@then("what had come is on standard output")
def _(world: World) -> None:
    assert len(world.last.stdout) >= 20


@then(parsers.parse("the story has at most {count:d} tokens"))
def _(world: World, count: int) -> None:
    match = re.search(r"done\s*: (\d+) tokens", world.last.stderr)
    assert match, world.last.stderr
    assert 1 <= int(match[1]) <= count


# --- then: machines -------------------------------------------------------------------------------------------------


@then("the hub was not asked for anything")
def _(hub: Hub) -> None:
    assert hub.log == []


@then("the hub has sent the whole file once")
def _(hub: Hub, model_path: Path) -> None:
    assert hub.bytes_sent == model_path.stat().st_size
    assert len(hub.downloads) == 1


@then("the download was reported at least twice before it was complete")
def _(world: World) -> None:
    shares = [int(s) for s in re.findall(r"downloading .*\((\d+) %\)", world.last.stderr)]
    growing = [s for s in shares if s < 100]
    assert len(growing) >= 2, world.last.stderr
    assert growing == sorted(growing)


@then(parsers.parse('"{node}" has the model "{ref}" in its catalog, ready'))
def _(world: World, node: str, ref: str) -> None:
    folder = ref.removeprefix("hf:")
    text = world.lab.ssh(node, f"cat /var/lib/rbee/models/{folder}/metadata.yaml").stdout
    (entry,) = json.loads(text)["models"]
    assert entry["status"] == "Ready"
    assert entry["reference"].startswith(ref)
    assert entry["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@then("the worker that told it is idle again")
def _(world: World) -> None:
    worker = worker_of(world)
    until(lambda: world.workers()[worker]["status"] == "idle", f"{worker} idle")


@then("the process ids of all workers are unchanged")
def _(world: World) -> None:
    assert world.main_pids() == world.seen["pids"]


@then("the process ids of queen and workers are unchanged")
def _(world: World) -> None:
    assert world.main_pids() == world.seen["pids"]
    assert world.main_pids("rbee-queen") == world.seen["queen pid"]


@then(parsers.parse('"{node}" has the same units as before'))
def _(world: World, node: str) -> None:
    assert world.units(node) == world.seen["units"]


@then(parsers.parse('"{node}" has no unit for "{name}"'))
def _(world: World, node: str, name: str) -> None:
    assert f"rbee-worker@{name}.service" not in world.units(node)
    assert world.lab.ssh(node, f"test -e /etc/rbee/workers/{name}.toml", check=False).returncode == 1


def hives_run_again(world: World) -> None:
    done = world.lab.ctl("hive", "start")
    assert done.returncode == 0, done.stderr
    until(lambda: {"lab1-cpu0", "lab2-cpu0"} <= set(world.workers(state="idle")), "both workers idle")


@then(parsers.parse('the target of "{node}" is still active'))
def _(world: World, node: str) -> None:
    assert world.lab.ssh(node, "systemctl is-active rbee-hive.target").stdout.strip() == "active"


@then("the engine that served it is at rest")
def _(world: World) -> None:
    ticks = f"cat $({ENGINE} | sed 's,.*,/proc/&/stat,') | awk '{{s += $14 + $15}} END {{print s}}'"
    lab, node = world.lab, world.seen["node"]
    before = int(lab.ssh(node, f"{ticks}; sleep 1; {ticks}").stdout.split()[0])
    after = int(lab.ssh(node, ticks).stdout.split()[0])
    assert after - before < 50, f"{after - before} ticks of CPU in at least a second"


# --- then: registry and HTTP ----------------------------------------------------------------------------------------


@then(parsers.parse("the answer is exactly {text}"))
def _(world: World, text: str) -> None:
    assert world.seen["answer"].json() == json.loads(text)


@then("the answer says ready, idle and that the model is loaded")
def _(world: World) -> None:
    assert world.seen["answer"].json() == {"ready": True, "state": "idle", "model_loaded": True}


@then("the record is back within one heartbeat, with the same id, url, model, backend and device")
def _(world: World) -> None:
    record = world.seen["record"]
    # One interval of 10 s at most, and the time to beat; two are 16 s at least.
    until(lambda: len(world_workers_or_none(world)) >= 2, "registry full again", limit_s=15)
    again = world.workers()[record["id"]]
    for key in ("id", "url", "model_id", "model_ref", "backend", "device", "pid"):
        assert again[key] == record[key], key


def world_workers_or_none(world: World) -> dict[str, Any]:
    try:
        return world.workers(state="idle")
    except httpx.TransportError:
        return {}


@then(parsers.parse('the worker "{worker_id}" is idle'))
def _(world: World, worker_id: str) -> None:
    assert world.workers()[worker_id]["status"] == "idle"


@then("the workers are still listed")
def _(world: World) -> None:
    assert {"lab1-cpu0", "lab2-cpu0"} <= set(world.workers())


@then(parsers.parse('the report of "{node}" says the target is active, which version it has, and that "{unit}" is active'))
def _(world: World, node: str, unit: str) -> None:
    report = json.loads(world.last.stdout)
    assert (report["status"], report["exit_code"]) == ("success", 0)
    text = json.dumps(report["data"])
    hive = find(report["data"], "target")
    assert hive["target"] == "active", text
    assert hive["version"] == "0.1.0"
    assert {u["unit"]: u["active_state"] for u in hive["units"]}[unit] == "active"


def find(value: Any, key: str) -> dict[str, Any]:
    """Return the first object that has ``key``."""
    if isinstance(value, dict):
        if key in value:
            return value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict | list) and (hit := find(item, key)):
                return hit
    return {}


@then(parsers.parse('its settings file on "{node}" belongs to root and nobody else may read it'))
def _(world: World, node: str) -> None:
    name = world.seen["slot_worker"].split("-", 1)[1]
    stat = world.lab.ssh(node, f"stat -c '%U %G %a' /etc/rbee/workers/{name}.toml /etc/rbee/credentials/fleet-token").stdout
    assert stat.splitlines() == ["root rbee 640", "root root 600"]


@then(parsers.parse('the queen heard of "{worker_id}" while it was loading'))
def _(world: World, worker_id: str) -> None:
    read = f"journalctl --sync; journalctl -u rbee-queen --no-pager -o cat --since @{world.seen['since']}"
    log = world.lab.ssh("lab1", read).stdout
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    heard = [line["state"] for line in lines if line["message"] == "worker registered" and line["worker_id"] == worker_id]
    assert "loading" in heard, log


@then(
    parsers.parse(
        'the record of "{worker_id}" has an id, a url that answers, its model, backend "{backend}" and device {device:d}'
    )
)
def _(world: World, worker_id: str, backend: str, device: int) -> None:
    record = world.workers()[worker_id]
    assert (record["backend"], record["device"], record["model_id"]) == (backend, device, MODEL_ID)
    assert record["model_ref"].startswith("hf:")
    assert record["slots_total"] == 1
    assert httpx.get(f"{record['url']}/health", timeout=60, trust_env=False).json()["status"] == "alive"


@then(parsers.parse('the fleet token is in no argument list and no unit property on "{node}"'))
def _(world: World, node: str) -> None:
    for command in ("ps axww -o args", "systemctl show 'rbee-*'", "cat /etc/rbee/workers/*.toml"):
        assert world.fleet_token not in world.lab.ssh(node, command).stdout, command


@then("the status is 200 and the type is an event stream")
def _(world: World) -> None:
    answer = world.seen["answer"]
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")


@then("tokens are numbered from 0 without a gap, then comes the end, then [DONE], once")
def _(world: World) -> None:
    lines = [line for _, line in world.seen["lines"]]
    tokens, count = tokens_of(lines), world.seen["count"]
    assert [t["i"] for t in tokens] == list(range(count))
    data = [line for line in lines if line.startswith("data: ")]
    assert data[-1] == "data: [DONE]"
    assert data.count("data: [DONE]") == 1
    assert json.loads(data[-2][6:])["type"] == "end"
    assert json.loads(data[-2][6:])["tokens_out"] == count


@then("the first token came long before the last")
def _(world: World) -> None:
    times = [at for at, line in world.seen["lines"] if line.startswith('data: {"type":"token"')]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[-1] - times[0] > 10 * max(min(gaps), 0.001)
    assert len({round(t, 3) for t in times}) > 20, "tokens came in a few lumps"


@then("the registry showed the worker busy, and then idle")
def _(world: World) -> None:
    states = world.seen["states"]
    assert "busy" in states, states
    assert states[-1] == "idle"


@then("every slot of the fleet is free within 1 second")
def _(world: World) -> None:
    until(lambda: world.slots_taken() == 0, "all slots free", limit_s=1.0, pause_s=0.05)


@then("each answer is 204")
def _(world: World) -> None:
    assert [a.status_code for a in world.seen["answers"]] == [204, 204, 204]


@then("the stream ended as cancelled")
def _(world: World) -> None:
    data = [line for line in world.seen["stream"] if line.startswith("data: ")]
    assert data[-1] == "data: [DONE]"
    end = json.loads(data[-2][6:])
    assert (end["type"], end["stop_reason"]) == ("end", "CANCELLED")
    assert 0 < end["tokens_out"] < LONG["max_tokens"]


@then(parsers.parse("the status is {status:d} and the code is {code}"))
def _(world: World, status: int, code: str) -> None:
    answer = world.seen["answer"]
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["www-authenticate"] == "Bearer"
