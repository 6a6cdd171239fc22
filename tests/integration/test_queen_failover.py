"""Nothing is lost: real workers killed, stopped, drained and cut off while they generate (SPEC X-14, S-54..56, P-09)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet import MODEL, Fleet, events_of, ids_of, text_of, wait_until
from proxy import Proxy
from standing_still import children, standing_still

from rbee_ctl.embedded import free_port

pytestmark = pytest.mark.integration

STORY = "Once upon a time, in a small village"
SEEDED: dict[str, Any] = {"prompt": STORY, "max_tokens": 8, "temperature": 0.9, "top_p": 0.95, "seed": 77, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}
SHAPED: dict[str, Any] = {
    "prompt": "A person as JSON: ",
    "max_tokens": 10,
    "temperature": 0.9,
    "seed": 5,
    "json_schema": SCHEMA,
}
LONG = SEEDED | {"max_tokens": 150}  # within what all workers compute alike


class Cuttable(Fleet):
    """A fleet whose queen reaches each worker through a proxy."""

    def __init__(self, directory: Path, model_path: Path, **settings: Any) -> None:
        super().__init__(directory, model_path, **settings)
        self.proxies: dict[str, Proxy] = {}

    def add_worker(self, hive: str, **settings: Any) -> str:
        port = free_port()
        proxy = Proxy(port)
        worker_id = super().add_worker(hive, url=f"http://127.0.0.1:{proxy.port}", port=port, **settings)
        self.proxies[worker_id] = proxy
        return worker_id

    def hold(self, what: int | str | None) -> None:
        """Let each worker's next stream get as far as this token, or its first event of this type, and no further."""
        mark = None if what is None else f'"type":"{what}"' if isinstance(what, str) else f'"i":{what},"id":'
        for proxy in self.proxies.values():
            proxy.hold_after = mark and mark.encode()

    def close(self) -> None:
        super().close()
        for proxy in self.proxies.values():
            proxy.close()


@pytest.fixture(scope="module")
def running_fleet(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Cuttable]:
    queen = {"stall_timeout_s": 3.0, "first_byte_timeout_s": 3.0}
    fleet = Cuttable(tmp_path_factory.mktemp("fleet"), model_path, queen_settings=queen)
    fleet.worker_settings = {"heartbeat_interval_s": 1.0, "ping_interval_s": 0.5}
    try:
        fleet.start_queen()
        for name in ("lab1", "lab2", "lab3"):
            fleet.add_worker(name)
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def fleet(running_fleet: Cuttable) -> Cuttable:
    running_fleet.hold(None)
    running_fleet.revive()
    return running_fleet


def generate(client: httpx.Client, request: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", "/v1/inference", json=request | {"model": MODEL}) as response:
        assert response.status_code == 200, response.read()
        return list(events_of(response))


def idle(fleet: Fleet) -> set[str]:
    """Return the workers that are certain to take a stream now."""
    return {i for i, w in fleet.records().items() if w["available"] and w["slots_available"] == w["slots_total"]}


@pytest.mark.X14
@pytest.mark.P09
@pytest.mark.parametrize("request_", [SEEDED, SHAPED], ids=["free", "json-schema"])
def test_killed_at_every_token_index_nothing_changes(fleet: Cuttable, request_: dict[str, Any]) -> None:
    with fleet.client() as client:
        undisturbed = generate(client, request_)
        expected = ids_of(undisturbed)
        modes = []
        for index in range(-1, len(expected) - 1):  # -1: before the first token
            wait_until(lambda: len(idle(fleet)) >= 2, "two workers idle")
            events: list[dict[str, Any]] = []
            fleet.hold("started" if index < 0 else index)
            with client.stream("POST", "/v1/inference", json=request_ | {"model": MODEL}) as response:
                victim = response.headers["x-rbee-worker"]
                for event in events_of(response):
                    events.append(event)
                    if (event["type"], event.get("i", -1)) == ("started" if index < 0 else "token", index):
                        fleet.hold(None)
                        fleet.workers[victim].kill()
            fleet.workers[victim].start()  # is up again long before it is needed
            assert ids_of(events) == expected, f"killed at {index}"
            assert text_of(events) == text_of(undisturbed)
            assert events[-1]["stop_reason"] == undisturbed[-1]["stop_reason"]
            modes += [e["mode"] for e in events if e["type"] == "resumed"]

    assert modes == ["exact"] * (len(expected) - 1)  # before the first token nobody is told


@pytest.mark.X14
def test_killed_between_its_last_token_and_the_end_the_end_is_the_same(fleet: Cuttable) -> None:
    """The last token that is allowed completes a stop string too."""
    with fleet.client() as client:
        request = SEEDED | {"stop": [text_of(generate(client, SEEDED))[-4:]]}
        undisturbed = generate(client, request)
        last = len(ids_of(undisturbed)) - 1
        assert (last + 1, undisturbed[-1]["stop_reason"]) == (SEEDED["max_tokens"], "STOP_SEQUENCE")
        wait_until(lambda: len(idle(fleet)) >= 2, "two workers idle")
        events: list[dict[str, Any]] = []
        fleet.hold(last)
        with client.stream("POST", "/v1/inference", json=request | {"model": MODEL}) as response:
            victim = response.headers["x-rbee-worker"]
            for event in events_of(response):
                events.append(event)
                if (event["type"], event.get("i")) == ("token", last):
                    fleet.hold(None)
                    fleet.workers[victim].kill()
        fleet.workers[victim].start()

    assert ids_of(events) == ids_of(undisturbed)
    assert (events[-1]["stop_reason"], events[-1]["stop_sequence"]) == ("STOP_SEQUENCE", request["stop"][0])
    assert [e["type"] for e in events if e["type"] != "token"] == ["started", "end"]


#: In the system message that the model's chat template begins with; what comes in its place has its length.
NAMED = b"You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TIMED = b"It is ' ~ strftime_now('%d %B %Y, %H:%M:%S %f %z') ~ '".ljust(len(NAMED), b".")


@pytest.mark.X14
def test_chat_goes_on_from_the_same_prompt_in_another_time_zone(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat template tells the model the time, to the microsecond."""
    model = tmp_path / "timed.gguf"
    weights = model_path.read_bytes()
    assert weights.count(NAMED) == 1
    model.write_bytes(weights.replace(NAMED, TIMED))
    fleet = Cuttable(tmp_path, model)
    try:
        fleet.start_queen()
        for name, zone in (("lab1", "Pacific/Kiritimati"), ("lab2", "Pacific/Pago_Pago")):
            monkeypatch.setenv("TZ", zone)
            fleet.add_worker(name)
        wait_until(lambda: len(idle(fleet)) == 2, "two workers idle")
        request = {"messages": [{"role": "user", "content": "Which day is it?"}], "max_tokens": 40, "ignore_eos": True}
        fleet.hold(10)
        events: list[dict[str, Any]] = []
        with fleet.client() as client, client.stream("POST", "/v1/inference", json=request | {"model": MODEL}) as response:
            victim = response.headers["x-rbee-worker"]
            for event in events_of(response):
                events.append(event)
                if event.get("i") == 10 and event["type"] == "token":
                    fleet.hold(None)
                    fleet.workers[victim].kill()
        assert [e["mode"] for e in events if e["type"] == "resumed"] == ["exact"]
        (other,) = fleet.workers.keys() - {victim}
        again = {"seed": events[0]["seed"], "continue_from": {"rendered_at": events[0]["rendered_at"]}}
        with fleet.client() as client:
            undisturbed = generate(client, request | again)
        assert undisturbed[0]["worker_id"] == other
        assert undisturbed[0]["prompt_digest"] == events[0]["prompt_digest"]
        assert ids_of(events) == ids_of(undisturbed)
    finally:
        fleet.close()


@pytest.mark.X14
def test_engine_that_hangs_behind_a_front_that_lives_is_left(fleet: Cuttable) -> None:
    longer = LONG | {"max_tokens": 230}
    with fleet.client() as client, contextlib.ExitStack() as stack:
        expected = ids_of(generate(client, longer))
        events: list[dict[str, Any]] = []
        with client.stream("POST", "/v1/inference", json=longer | {"model": MODEL}) as response:
            (engine,) = children(fleet.workers[response.headers["x-rbee-worker"]].pid)
            for event in events_of(response):
                events.append(event)
                if (event["type"], event.get("i")) == ("token", 5):
                    stack.enter_context(standing_still(engine))
                    stopped = time.monotonic()
                if event["type"] == "resumed":
                    gap = time.monotonic() - stopped
        metrics = client.get("/metrics").text

    assert ids_of(events) == expected
    assert gap > 2.5
    assert 'queen_failovers_total{cause="timeout",mode="exact"}' in metrics


@pytest.mark.E10
def test_drain_hands_a_running_stream_over_at_once(fleet: Cuttable) -> None:
    """It does not wait for the old worker to come to its end: from token 60 on nothing comes of that one."""
    with fleet.client() as client:
        expected = ids_of(generate(client, LONG))
        events: list[dict[str, Any]] = []
        fleet.hold(60)
        with client.stream("POST", "/v1/inference", json=LONG | {"model": MODEL}) as response:
            victim = response.headers["x-rbee-worker"]
            for event in events_of(response):
                events.append(event)
                if (event["type"], event.get("i")) == ("token", 5):
                    with fleet.worker_client(victim) as worker:
                        assert worker.post("/v1/admin/drain").status_code == 202
                if event["type"] == "resumed":
                    fleet.hold(None)
                    ended = fleet.workers[victim].process
                    assert ended is not None
                    assert ended.wait(60) == 0
        metrics = client.get("/metrics").text

    assert ids_of(events) == expected
    assert [e["mode"] for e in events if e["type"] == "resumed"] == ["exact"]
    assert 'queen_failovers_total{cause="drain",mode="exact"}' in metrics


@pytest.mark.X14
def test_cut_connection_costs_nothing(fleet: Cuttable) -> None:
    with fleet.client() as client:
        expected = ids_of(generate(client, LONG))
        events: list[dict[str, Any]] = []
        cuts = {5: 40, 40: 80, 80: None}
        fleet.hold(5)
        with client.stream("POST", "/v1/inference", json=LONG | {"model": MODEL}) as response:
            victim = response.headers["x-rbee-worker"]
            for event in events_of(response):
                events.append(event)
                if event["type"] == "token" and event["i"] in cuts:
                    fleet.hold(cuts[event["i"]])
                    fleet.proxies[victim].cut()
                victim = event["worker_id"] if event["type"] == "resumed" else victim

    assert ids_of(events) == expected
    assert len([e for e in events if e["type"] == "resumed"]) == 3


def numbered(raw: bytes) -> list[tuple[int, dict[str, Any]]]:
    """Return (id, event) of the whole frames in ``raw``, pings and [DONE] left out."""
    found = []
    for frame in raw.split(b"\n\n")[:-1]:
        if frame.startswith(b"id: "):
            head, _, data = frame.partition(b"\ndata: ")
            found.append((int(head.split(b"\n")[0][4:]), json.loads(data)))
    return found


def read_some(response: httpx.Response, more_than: int) -> list[tuple[int, dict[str, Any]]]:
    """Read until more than so many events are there; the connection is lost when the response is closed."""
    raw = b""
    for chunk in response.iter_raw():
        raw += chunk
        if len(numbered(raw)) > more_than:
            break
    return numbered(raw)


@pytest.mark.parametrize("disturbed", [False, True], ids=["undisturbed", "worker-killed"])
def test_client_that_lost_its_connection_gets_the_rest_also_from_another_worker(fleet: Cuttable, disturbed: bool) -> None:
    with fleet.client() as client:
        expected = ids_of(generate(client, LONG))
    with fleet.client() as client:
        asked = {"headers": {"X-Rbee-Reattach": "60"}, "json": LONG | {"model": MODEL}}
        fleet.hold(30 if disturbed else None)
        with client.stream("POST", "/v1/inference", **asked) as response:
            assert response.headers["x-rbee-reattach"] == "60"
            path = f"/v1/inference/{response.headers['x-request-id']}/stream"
            victim = response.headers["x-rbee-worker"]
            seen = read_some(response, 6)
    if disturbed:  # while nobody reads
        fleet.hold(None)
        fleet.workers[victim].kill()
    for more in (20, 10_000):  # the connection is lost once more on the way
        with fleet.client() as client, client.stream("GET", path, headers={"Last-Event-ID": str(seen[-1][0])}) as response:
            assert response.status_code == 200, response.read()
            seen += read_some(response, more)
    with fleet.client() as client:
        last = client.get(path, headers={"Last-Event-ID": str(seen[-1][0])}).content  # also after the end, and nothing twice
        whole = numbered(client.get(path).content)
        strange = client.get(path, headers={"Last-Event-ID": "first"})

    events = [event for _, event in seen]
    assert [n for n, _ in seen] == list(range(len(seen)))
    assert ids_of(events) == expected
    assert [e["mode"] for e in events if e["type"] == "resumed"] == (["exact"] if disturbed else [])
    assert (events[-1]["type"], last) == ("end", b"data: [DONE]\n\n")
    assert whole == seen
    assert (strange.status_code, strange.json()["error"]["details"]["field"]) == (400, "Last-Event-ID")


def test_stream_that_nobody_comes_back_for_frees_its_slot_and_is_forgotten(fleet: Cuttable) -> None:
    with fleet.client() as client:
        asked = {"headers": {"X-Rbee-Reattach": "0.5"}, "json": LONG | {"max_tokens": 900, "model": MODEL}}
        with client.stream("POST", "/v1/inference", **asked) as response:
            path = f"/v1/inference/{response.headers['x-request-id']}/stream"
            victim = response.headers["x-rbee-worker"]
            read_some(response, 6)
    wait_until(lambda: fleet.records()[victim]["in_flight"] == 0, "the slot is free", limit_s=60)
    with fleet.client() as client:
        gone = client.get(path, headers={"Last-Event-ID": "3"})

    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "REQUEST_NOT_FOUND")


class Chaos:
    """One worker at a time is killed, stopped, drained or cut off, and is well again before the next."""

    def __init__(self, fleet: Cuttable, seed: int) -> None:
        self.fleet, self.random = fleet, random.Random(seed)  # noqa: S311
        self.done: list[str] = []

    def strike(self) -> None:
        wait_until(self.all_up, "every worker takes requests again", limit_s=60)
        worker_id = self.random.choice(sorted(self.fleet.workers))
        service = self.fleet.workers[worker_id]
        what = self.random.choice(["kill", "kill-engine", "stop", "drain", "cut"])
        self.done.append(f"{what} {worker_id}")
        if what == "kill":
            service.kill()
            service.start()
        elif what == "kill-engine":
            os.kill(children(service.pid)[0], signal.SIGKILL)
            assert service.process is not None
            service.process.wait(60)
            service.start()
        elif what == "stop":
            service.pause()
            time.sleep(4.5)  # longer than a worker may be silent: how long it hangs is the test's to say
            service.go_on()
        elif what == "drain":
            with self.fleet.worker_client(worker_id) as worker:
                worker.post("/v1/admin/drain")
            assert service.process is not None
            service.process.wait(60)
            service.start()
        else:
            self.fleet.proxies[worker_id].cut()

    def all_up(self) -> bool:
        return {i for i, w in self.fleet.records().items() if w["status"] in ("idle", "busy")} == set(self.fleet.workers)


@pytest.mark.X14
@pytest.mark.E37
def test_chaos_leaves_no_mark_on_any_stream(fleet: Cuttable) -> None:
    seconds, seed = float(os.environ.get("RBEE_CHAOS_S", "22")), int(os.environ.get("RBEE_CHAOS_SEED", "1"))
    clients = int(os.environ.get("RBEE_CHAOS_CLIENTS", "5"))
    requests = [
        {"prompt": f"{STORY} number {n}", "max_tokens": 40, "temperature": 0.9 * (n % 2), "seed": n, "ignore_eos": True}
        for n in range(5)
    ]
    with fleet.client() as client:
        references = [ids_of(generate(client, r)) for r in requests]
    chaos = Chaos(fleet, seed)
    over = threading.Event()

    def talk(number: int) -> list[tuple[int, list[dict[str, Any]]]]:
        pick = random.Random(seed * 1000 + number)  # noqa: S311
        seen = []
        with fleet.client() as client:
            while not over.is_set():
                which = pick.randrange(len(requests))
                seen.append((which, generate(client, requests[which])))
        return seen

    with ThreadPoolExecutor(clients) as pool:
        talking = [pool.submit(talk, n) for n in range(clients)]
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end and not any(t.done() for t in talking):
                chaos.strike()
        finally:
            over.set()
        streams = [one for t in talking for one in t.result()]

    modes = [e["mode"] for _, events in streams for e in events if e["type"] == "resumed"]
    print(f"\n{len(streams)} streams of {clients} clients, {len(chaos.done)} faults, {len(modes)} streams moved after a token")
    for which, events in streams:
        assert events[-1]["type"] == "end", (events[-1], chaos.done)
        assert ids_of(events) == references[which], chaos.done
    assert len(chaos.done) >= 3
    assert set(modes) == {"exact"}, chaos.done  # it did happen, and always exactly
