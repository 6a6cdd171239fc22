"""The real queen with two real workers and the real model."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fleet import MODEL, MODEL_REF, Fleet, Service, events_of, ids_of, text_of, wait_until
from standing_still import children, standing_still

pytestmark = pytest.mark.integration

STORY = "Once upon a time, in a small village"
GREEDY: dict[str, Any] = {"prompt": STORY, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
#: So many more that a stream is not at its end by the time the test has done something to it.
LONGER = {"max_tokens": 200}
SEEDED: dict[str, Any] = {"prompt": STORY, "max_tokens": 60, "temperature": 0.9, "top_p": 0.95, "seed": 1234, "ignore_eos": True}


@pytest.fixture(scope="module")
def running_fleet(tmp_path_factory: pytest.TempPathFactory, model_path: Any) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), model_path, queen_settings={"queue_max": 1})
    try:
        fleet.start_queen()
        fleet.add_worker("lab1")
        fleet.add_worker("lab2")
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def fleet(running_fleet: Fleet) -> Fleet:
    """The fleet, with everything up and idle."""
    running_fleet.revive()
    return running_fleet


@pytest.fixture
def client(fleet: Fleet) -> Iterator[httpx.Client]:
    with fleet.client() as client:
        yield client


@pytest.fixture
def ai(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.queen.url}/v1", api_key=fleet.key, max_retries=0) as client:
        yield client


def generate(client: httpx.Client, **request: Any) -> list[dict[str, Any]]:
    """Return all events of one request."""
    with client.stream("POST", "/v1/inference", json={"model": MODEL, **request}) as response:
        assert response.status_code == 200, response.read()
        return list(events_of(response))


# --- the native API -------------------------------------------------------------------------------------------------


def test_workers_are_listed_with_state_and_address(fleet: Fleet) -> None:
    records = fleet.records()

    assert set(records) == {"lab1-cpu0", "lab2-cpu0"}
    for worker_id, record in records.items():
        assert record["url"] == fleet.workers[worker_id].url
        assert (record["model_id"], record["status"], record["available"]) == (MODEL, "idle", True)


def test_tokens_arrive_while_they_are_made(fleet: Fleet, client: httpx.Client) -> None:
    """Each time one is here the engine is stopped, and has not made the last one yet."""
    still_busy = []
    with client.stream("POST", "/v1/inference", json=GREEDY | {"model": MODEL, "max_tokens": 400}) as response:
        chosen = response.headers["x-rbee-worker"]
        assert chosen in ("lab1-cpu0", "lab2-cpu0")
        request_id = response.headers["x-request-id"]
        events = []
        for event in events_of(response):
            events.append(event)
            if event["type"] == "token" and event["i"] in (0, 60, 120):
                with standing_still(*children(fleet.workers[chosen].pid)), fleet.worker_client(chosen) as worker:
                    still_busy.append(worker.get("/info").json()["worker"]["slots_available"] == 1)

    assert [e["type"] for e in events] == ["started", *["token"] * 400, "end"]
    assert (events[0]["request_id"], events[0]["worker_id"]) == (request_id, chosen)
    assert (events[-1]["tokens_out"], events[-1]["stop_reason"]) == (400, "MAX_TOKENS")
    assert still_busy == [True, True, True]


@pytest.mark.P01
@pytest.mark.parametrize("prompt", [STORY, "List three colours:", "Émile écrit: «né à Paris» 🎉 你好"])
@pytest.mark.parametrize("max_tokens", [1, 17, 48])
def test_greedy_text_through_the_queen_equals_the_worker_s_own(fleet: Fleet, prompt: str, max_tokens: int) -> None:
    request = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    with fleet.client() as queen, fleet.worker_client("lab1-cpu0") as worker:
        through = generate(queen, **request)
        with worker.stream("POST", "/v1/inference", json=request) as response:
            direct = list(events_of(response))

    assert ids_of(through) == ids_of(direct)
    assert text_of(through) == text_of(direct)


def test_whole_answer_has_the_same_text(client: httpx.Client) -> None:
    streamed = generate(client, **GREEDY)
    whole = client.post("/v1/inference", json=GREEDY | {"model": MODEL_REF, "stream": False}).json()

    assert (whole["text"], whole["token_ids"]) == (text_of(streamed), ids_of(streamed))
    assert (whole["tokens_generated"], whole["stop_reason"], whole["model"]) == (60, "MAX_TOKENS", MODEL)


@pytest.mark.P09
@pytest.mark.parametrize("where", [{"node": "lab2"}, {"worker_id": "lab2-cpu0"}])
def test_filters_choose_the_worker(client: httpx.Client, where: dict[str, str]) -> None:
    used = {generate(client, **GREEDY | {"max_tokens": 1} | where)[0]["worker_id"] for _ in range(4)}

    assert used == {"lab2-cpu0"}


def four_at_once(fleet: Fleet, client: httpx.Client, request: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return the events of four requests, of which none has ended before all have begun: the workers stand still until then."""
    with ThreadPoolExecutor(4) as pool:
        with standing_still(*(service.pid for service in fleet.workers.values())):
            streams = [pool.submit(generate, client, **request | {"seed": n}) for n in range(4)]
            wait_until(lambda: sum(w["in_flight"] for w in fleet.records().values()) == 4, "four requests running")
        return [stream.result() for stream in streams]


@pytest.mark.P09
def test_parallel_requests_use_both_workers(fleet: Fleet, client: httpx.Client) -> None:
    streams = four_at_once(fleet, client, SEEDED)

    used = [s[0]["worker_id"] for s in streams]
    assert sorted(used) == ["lab1-cpu0"] * 2 + ["lab2-cpu0"] * 2
    assert all(len(ids_of(s)) == 60 for s in streams)


def test_request_without_a_slot_waits_and_is_told_and_one_too_many_gets_503(fleet: Fleet, client: httpx.Client) -> None:
    """The four that run stand still until two more have come."""
    long = GREEDY | LONGER
    with ThreadPoolExecutor(4) as pool, contextlib.ExitStack() as stopped:
        stopped.enter_context(standing_still(*(service.pid for service in fleet.workers.values())))
        streams = [pool.submit(generate, client, **long) for _ in range(4)]
        wait_until(lambda: sum(w["in_flight"] for w in fleet.records().values()) == 4, "four requests running")
        with client.stream("POST", "/v1/inference", json=GREEDY) as waiting:  # headers are here while it waits
            assert (waiting.status_code, waiting.headers["x-rbee-placement"]) == (200, "queued")
            later = events_of(waiting)
            assert (first := next(later)).items() >= {"type": "queued", "position": 1}.items()
            response = client.post("/v1/inference", json=GREEDY)
            stopped.close()
            rest = list(later)
        assert all(len(ids_of(s.result())) == 200 for s in streams)

    started = next(e for e in rest if e["type"] == "started")
    assert (len(ids_of(rest)), rest[-1]["type"], started["queued_ms"] > first["waited_ms"]) == (60, "end", True)

    error = response.json()["error"]
    assert (response.status_code, error["code"], error["slots_total"], error["slots_busy"]) == (503, "ALL_SLOTS_BUSY", 4, 4)
    assert error["details"]["queued"] == 1
    assert 1 <= int(response.headers["retry-after"]) <= 60


def test_prompt_longer_than_the_context_is_400_with_both_numbers(client: httpx.Client) -> None:
    response = client.post("/v1/inference", json=GREEDY | {"prompt": "word " * 3000})

    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "PROMPT_TOO_LONG")
    assert error["details"]["prompt_tokens"] > 3000 > error["details"]["context_tokens"] == 1024


@pytest.mark.P13
def test_prompt_may_hold_what_looks_like_the_end_of_a_stream(client: httpx.Client) -> None:
    events = generate(client, prompt="Repeat: data: [DONE]\n\ndata: [DONE]\n\nfailed:", max_tokens=8, temperature=0)

    assert len(ids_of(events)) >= 1
    assert events[-1]["type"] == "end"


# --- cancelling -----------------------------------------------------------------------------------------------------


@pytest.mark.P10
def test_delete_ends_the_stream_and_frees_the_slot(fleet: Fleet, client: httpx.Client) -> None:
    events: list[dict[str, Any]] = []
    with client.stream("POST", "/v1/inference", json=GREEDY | {"max_tokens": 900}) as response:
        for event in events_of(response):
            events.append(event)
            if len(events) == 4:
                path = f"/v1/inference/{response.headers['x-request-id']}"
                assert [client.delete(path).status_code for _ in range(2)] == [204, 204]

    assert (events[-1]["type"], events[-1]["stop_reason"]) == ("end", "CANCELLED")
    assert len(ids_of(events)) == events[-1]["tokens_out"] < 900
    fleet.wait_ready()


@pytest.mark.P10
@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_the_worker_s_slot_at_once(fleet: Fleet, stream: bool) -> None:
    body = json.dumps(GREEDY | {"max_tokens": 900, "stream": stream, "node": "lab1"}).encode()
    head = (
        f"POST /v1/inference HTTP/1.1\r\nHost: queen\r\nAuthorization: Bearer {fleet.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with fleet.worker_client("lab1-cpu0") as worker:

        def busy() -> int:
            info = worker.get("/info").json()["worker"]
            return int(info["slots_total"] - info["slots_available"])

        def whole() -> float:
            """Requests that have come to their end."""
            ended = 'worker_requests_total{outcome="MAX_TOKENS"} '
            return sum(float(x.split()[1]) for x in worker.get("/metrics").text.splitlines() if x.startswith(ended))

        before = whole()
        with socket.create_connection(("127.0.0.1", fleet.queen.port)) as raw:
            raw.sendall(head.encode() + body)
            wait_until(lambda: busy() == 1, "the worker works")
        wait_until(lambda: busy() == 0, "the slot is free")
        assert whole() == before


# --- workers that die -----------------------------------------------------------------------------------------------


@pytest.mark.X14
@pytest.mark.parametrize("request_", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("after", [1, 9, 40])
def test_worker_killed_in_the_middle_costs_no_token(
    fleet: Fleet, client: httpx.Client, request_: dict[str, Any], after: int
) -> None:
    request_ = request_ | LONGER
    undisturbed = generate(client, **request_)

    events: list[dict[str, Any]] = []
    with client.stream("POST", "/v1/inference", json=request_) as response:
        victim = response.headers["x-rbee-worker"]
        for event in events_of(response):
            events.append(event)
            if event["type"] == "token" and event["i"] == after - 1:
                fleet.workers[victim].kill()

    resumed = [e for e in events if e["type"] == "resumed"]
    assert ids_of(events) == ids_of(undisturbed)
    assert text_of(events) == text_of(undisturbed)
    assert [(e["mode"], e["worker_id"] != victim) for e in resumed] == [("exact", True)]
    assert (events[-1]["type"], events[-1]["tokens_out"]) == ("end", 200)
    told = [line for line in fleet.queen.lines if line.get("request_id") == response.headers["x-request-id"]]
    moved = [(line["from_worker"], line["to_worker"]) for line in told if line["message"] == "stream goes on at another worker"]
    assert moved == [(victim, resumed[0]["worker_id"])]  # each fail-over, with both


@pytest.mark.P09
def test_worker_killed_before_the_first_token_is_not_noticed_by_the_client(fleet: Fleet, client: httpx.Client) -> None:
    """Both workers stand still when the request comes, so the one that gets it dies before its first token for certain."""
    undisturbed = generate(client, **GREEDY | {"node": "lab2"})
    with ThreadPoolExecutor(1) as pool:
        for service in fleet.workers.values():
            service.pause()
        running = pool.submit(generate, client, **GREEDY)
        chosen = wait_until(
            lambda: next((i for i, w in fleet.records().items() if w["in_flight"]), None), "the request is at a worker"
        )
        fleet.workers[chosen].kill()
        other = next(i for i in fleet.workers if i != chosen)
        fleet.workers[other].go_on()
        events = running.result()

    assert [e["type"] for e in events] == ["started", *["token"] * 60, "end"]
    assert events[0]["worker_id"] == other
    assert ids_of(events) == ids_of(undisturbed)


@pytest.mark.E05
def test_killed_worker_is_not_routed_to_and_is_back_after_its_restart(fleet: Fleet, client: httpx.Client) -> None:
    fleet.workers["lab1-cpu0"].kill()

    assert client.post("/v1/inference", json=GREEDY | {"node": "lab1"}).json()["error"]["code"] == "WORKER_CRASHED"
    used = {generate(client, **GREEDY | {"max_tokens": 2})[0]["worker_id"] for _ in range(4)}
    assert used == {"lab2-cpu0"}
    assert fleet.records()["lab1-cpu0"]["status"] == "failed"

    fleet.revive()
    used = {events[0]["worker_id"] for events in four_at_once(fleet, client, GREEDY)}
    assert used == {"lab1-cpu0", "lab2-cpu0"}


@pytest.mark.X14
def test_last_worker_killed_ends_the_stream_with_the_reason(fleet: Fleet, client: httpx.Client) -> None:
    events: list[dict[str, Any]] = []
    with client.stream("POST", "/v1/inference", json=GREEDY | {"node": "lab1", "max_tokens": 900}) as response:
        for event in events_of(response):
            events.append(event)
            if event["type"] == "token" and event["i"] == 4:
                fleet.workers["lab1-cpu0"].kill()

    assert (events[-1]["type"], events[-1]["code"]) == ("error", "WORKER_CRASHED")
    assert events[-1]["tokens_out"] == len(ids_of(events)) >= 5
    assert events[-1]["correlation_id"] == response.headers["x-correlation-id"]


def test_openai_stream_goes_on_when_its_worker_is_killed(fleet: Fleet, ai: openai.OpenAI) -> None:
    def ask() -> Any:
        return ai.completions.create(model=MODEL, prompt=STORY, max_tokens=200, temperature=0, stream=True)

    undisturbed = "".join(chunk.choices[0].text for chunk in ask())
    pieces: list[str] = []
    for chunk in ask():
        pieces.append(chunk.choices[0].text)
        if len(pieces) == 5:
            busy = [i for i, w in fleet.records().items() if w["in_flight"]]
            fleet.workers[busy[0]].kill()

    assert len(busy) == 1
    assert "".join(pieces) == undisturbed


# --- the queen itself -----------------------------------------------------------------------------------------------


@pytest.mark.E09
@pytest.mark.P08
def test_restarted_queen_knows_all_workers_within_a_heartbeat_and_touches_none(fleet: Fleet) -> None:
    pids = {i: s.pid for i, s in fleet.workers.items()}
    assert fleet.queen.stop() == 0

    fleet.start_queen()
    wait_until(lambda: set(fleet.records()) == set(fleet.workers), "both workers known")

    with fleet.client() as client:  # by the first beat of each
        assert 'queen_heartbeats_total{outcome="registered"} 2.0' in client.get("/metrics").text
    assert {i: r["pid"] for i, r in fleet.records().items()} == pids


@pytest.mark.E09
@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/v1/inference", GREEDY | {"model": MODEL, "stream": False, "max_tokens": 2}, 200),
        ("/v1/inference", {"prompt": "x", "max_tokens": 1, "stream": False}, 200),
        ("/v1/embeddings", {"model": MODEL, "input": "x"}, 200),
        ("/v1/inference", {"prompt": "x", "model": "unknown", "stream": False}, 404),
    ],
)
def test_a_queen_that_has_just_been_restarted_waits_for_the_workers_it_had(
    fleet: Fleet, client: httpx.Client, path: str, body: dict[str, Any], code: int
) -> None:
    """Until their first heartbeat; nobody has to try again. The workers stand still until the request is there."""
    fleet.wait_ready()
    assert fleet.queen.stop() == 0
    for worker in fleet.workers.values():
        worker.pause()
    try:
        fleet.start_queen()
        assert fleet.records() == {}
        with ThreadPoolExecutor() as pool:
            asking = pool.submit(client.post, path, json=body)
            if code != 200:
                assert asking.result().status_code == code
            wait_until(lambda: asking.running() or asking.done(), "the request is on its way")
            fleet.records()  # so is what was sent before
            for worker in fleet.workers.values():  # its next heartbeat is up to 2 s away
                worker.go_on()
    finally:
        for worker in fleet.workers.values():
            worker.go_on()
    assert asking.result().status_code == code, asking.result().text


@pytest.mark.E09
def test_stopped_queen_lets_a_running_stream_end(fleet: Fleet, client: httpx.Client) -> None:
    with client.stream("POST", "/v1/inference", json=GREEDY) as response:
        events = events_of(response)
        assert next(events)["type"] == "started"
        stopping = threading.Thread(target=fleet.queen.stop)
        stopping.start()
        rest = list(events)
    stopping.join()

    assert (rest[-1]["type"], len(ids_of(rest))) == ("end", 60)
    assert not fleet.queen.running


def test_stopped_worker_leaves_the_list(fleet: Fleet) -> None:
    assert fleet.workers["lab2-cpu0"].stop() == 0

    wait_until(lambda: set(fleet.records()) == {"lab1-cpu0"}, "lab2-cpu0 gone")


# --- the logs -------------------------------------------------------------------------------------------------------


def lines_about(service: Service, ident: str) -> list[dict[str, Any]]:
    return [line for line in service.lines if line.get("correlation_id") == ident]


@pytest.mark.E27
def test_a_request_is_found_in_all_logs_by_its_correlation_id_and_its_prompt_in_none(fleet: Fleet, client: httpx.Client) -> None:
    ident, secret = f"find-me-{time.time_ns()}", "my very private village"
    request = GREEDY | LONGER | {"model": MODEL, "prompt": secret}
    events: list[dict[str, Any]] = []
    with client.stream("POST", "/v1/inference", json=request, headers={"X-Correlation-ID": ident}) as response:
        first = response.headers["x-rbee-worker"]
        request_id = response.headers["x-request-id"]
        for event in events_of(response):
            events.append(event)
            if (event["type"], event.get("i")) == ("token", 5):
                fleet.workers[first].kill()
    second = next(e["worker_id"] for e in events if e["type"] == "resumed")
    # The last line is written when the answer is with the client already.
    told = wait_until(lambda: [x for x in lines_about(fleet.queen, ident) if x["message"] == "request ended"], "the queen's line")
    at_worker = wait_until(lambda: lines_about(fleet.workers[second], ident), "the worker's line")

    assert [(x["request_id"], x["worker"], x["outcome"], x["tokens_out"]) for x in told] == [
        (request_id, second, "MAX_TOKENS", 200)
    ]
    assert (told[0]["key"], told[0]["api"], told[0]["level"]) == ("test", "native", "info")
    assert at_worker[-1]["request_id"] == f"{request_id}.1"
    assert (at_worker[-1]["outcome"], at_worker[-1]["tokens_out"]) == ("MAX_TOKENS", 200)
    for service in (fleet.queen, *fleet.workers.values()):
        assert service.lines  # each one JSON
        assert secret not in service.log


# --- the official client --------------------------------------------------------------------------------------------


def test_openai_chat(ai: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is 2+2?"}]

    whole = ai.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, temperature=0)
    chunks = list(
        ai.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )

    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    assert text == whole.choices[0].message.content
    assert text
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 24
    assert whole.usage.prompt_tokens > 10


def test_openai_chat_without_a_limit_ends_by_itself(ai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Say hi."}]}]

    answer = ai.chat.completions.create(model=MODEL, messages=messages, temperature=0)

    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content


def test_openai_completions(ai: openai.OpenAI) -> None:
    whole = ai.completions.create(model=MODEL, prompt=STORY, max_tokens=20, temperature=0)
    streamed = ai.completions.create(model=MODEL, prompt=STORY, max_tokens=20, temperature=0, stream=True)
    stopped = ai.completions.create(model=MODEL, prompt="1, 2, 3, 4,", max_tokens=40, temperature=0, stop="7")

    assert "".join(c.choices[0].text for c in streamed) == whole.choices[0].text
    assert (whole.choices[0].finish_reason, stopped.choices[0].finish_reason) == ("length", "stop")
    assert "6" in stopped.choices[0].text
    assert "7" not in stopped.choices[0].text


def test_openai_seed_repeats(ai: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        return ai.completions.create(model=MODEL, prompt=STORY, max_tokens=20, seed=seed).choices[0].text

    assert ask(7) == ask(7)
    assert len({ask(n) for n in range(4)}) > 1


def test_openai_models(ai: openai.OpenAI) -> None:
    assert [m.id for m in ai.models.list()] == [MODEL]
    assert ai.models.retrieve(MODEL).owned_by == "rbee"
    assert ai.models.retrieve(MODEL_REF).id == MODEL


def test_openai_errors(fleet: Fleet, ai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError, match=MODEL) as missing:
        ai.chat.completions.create(model="gpt-9", messages=messages)
    assert missing.value.code == "MODEL_NOT_FOUND"
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        ai.chat.completions.create(model=MODEL, messages=messages, temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        ai.completions.create(model=MODEL, prompt="hi", max_tokens=5000)
    with (
        openai.OpenAI(base_url=f"{fleet.queen.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_metrics_count_what_happened(fleet: Fleet, client: httpx.Client) -> None:
    names = ("queen_tokens_relayed_total", 'queen_key_tokens_total{key="test",kind="generated"}')

    def tokens() -> list[float]:
        lines = client.get("/metrics").text.splitlines()
        return [sum(float(line.split()[-1]) for line in lines if line.startswith(name)) for name in names]

    before = tokens()
    generate(client, **GREEDY)

    wait_until(lambda: [now - then for now, then in zip(tokens(), before, strict=True)] == [60, 60], "both count 60 tokens")
