"""A real worker with the real model over HTTP (SPEC 3.4, S-48..52, 62, 63, 70, 71)."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet import events_of, ids_of, text_of, wait_until
from standing_still import standing_still
from worker_process import TOKEN, WorkerProcess

pytestmark = pytest.mark.integration

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
PATHS = (
    "/v1/ready",
    "/v1/loading/progress",
    "/v1/inference",
    "/v1/inference/x",
    "/v1/tokenize",
    "/v1/admin/drain",
    "/v1/admin/shutdown",
    "/info",
    "/v1/info",
    "/metrics",
    "/",
    "/nowhere",
    "/health/",
)
LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[WorkerProcess]:
    settings = {"prompt_block_tokens": 32, "unread_timeout_s": 3}
    with WorkerProcess(tmp_path_factory.mktemp("worker"), model_path, settings) as process:
        yield process.wait_ready()
        assert process.stop() == 0, process.log
        assert TOKEN not in process.log
        assert "Traceback" not in process.log, process.log


@pytest.fixture
def client(worker: WorkerProcess) -> Iterator[httpx.Client]:
    worker.wait_idle()
    with worker.client() as client:
        yield client


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.E18
@pytest.mark.P14
@pytest.mark.parametrize(("token", "code"), [(None, "MISSING_API_KEY"), ("wrong", "INVALID_API_KEY")])
def test_every_path_and_method_asks_for_the_token(worker: WorkerProcess, token: str | None, code: str) -> None:
    with worker.client(token) as client:
        for path in PATHS:
            for method in METHODS:
                response = client.request(method, path)
                assert response.status_code == 401, f"{method} {path}"
                assert response.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    error = response.json()["error"]
                    assert (error["code"], error["correlation_id"]) == (code, response.headers["x-correlation-id"])


def test_health_needs_none(worker: WorkerProcess) -> None:
    with worker.client(None) as client:
        for path in ("/health", "/v1/health"):
            assert client.get(path).json()["status"] == "alive"


@pytest.mark.E18
@pytest.mark.E28
def test_hundred_parallel_requests_get_what_their_token_deserves(worker: WorkerProcess) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=worker.url, trust_env=False, timeout=60) as client:

            async def ask(right: bool) -> None:
                headers = {"Authorization": f"Bearer {TOKEN if right else TOKEN[:-1]}"}
                response = await client.get("/v1/ready", headers=headers)
                assert response.status_code == (200 if right else 401)

            await asyncio.gather(*(ask(random.random() < 0.5) for _ in range(100)))  # noqa: S311

    asyncio.run(run())


# --- generation -------------------------------------------------------------------------------------------------------


def test_tokens_come_as_they_are_made(worker: WorkerProcess, client: httpx.Client) -> None:
    """Each time one is here the engine is stopped, and has not made the last one yet."""
    still_busy = []
    with client.stream("POST", "/v1/inference", json=LONG | {"max_tokens": 400}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        request_id = response.headers["x-request-id"]
        events = []
        for event in events_of(response):
            events.append(event)
            if event["type"] == "token" and event["i"] in (0, 60, 120):
                with standing_still(worker.engine_pid):
                    still_busy.append(worker.record()["slots_available"] == 1)

    assert [events[0]["type"], events[-1]["type"]] == ["started", "end"]
    assert events[0]["request_id"] == request_id
    assert len(ids_of(events)) == 400
    assert (events[-1]["tokens_out"], events[-1]["stop_reason"]) == (400, "MAX_TOKENS")
    assert still_busy == [True, True, True]


def test_whole_answer_equals_the_stream(worker: WorkerProcess) -> None:
    events = worker.stream(max_tokens=24)
    whole = worker.infer(max_tokens=24)

    assert (whole["text"], whole["token_ids"]) == (text_of(events), ids_of(events))
    assert whole["tokens_generated"] == 24
    assert whole["duration_ms"] > 0


def test_logprobs_come_with_each_token_where_asked_for(worker: WorkerProcess) -> None:
    events = worker.stream(max_tokens=6, logprobs=2, logit_bias={"260": -100})
    whole = worker.infer(max_tokens=6, logprobs=2, logit_bias={"260": -100})

    reported = [e["lp"] for e in events if e["type"] == "token"]
    assert whole["logprobs"] == reported
    assert 260 not in whole["token_ids"]
    assert "".join(lp["piece"] for lp in reported) == whole["text"]
    assert all(len(lp["top"]) == 2 and lp["logprob"] <= 0 for lp in reported)
    assert "logprobs" not in worker.infer(max_tokens=2)


def test_seed_decides_and_the_drawn_one_can_be_used_again(worker: WorkerProcess) -> None:
    drawn = worker.infer(max_tokens=24, temperature=1.2)
    again = worker.infer(max_tokens=24, temperature=1.2, seed=drawn["seed"])
    other = worker.infer(max_tokens=24, temperature=1.2, seed=drawn["seed"] ^ 1)

    assert again["token_ids"] == drawn["token_ids"]
    assert other["token_ids"] != drawn["token_ids"]


def test_stop_string_ends_the_text_before_itself(worker: WorkerProcess) -> None:
    free = worker.infer(max_tokens=30)["text"]
    stop = free.split(" ")[4]
    stopped = worker.infer(max_tokens=30, stop=[stop])

    assert stopped["stop_reason"] == "STOP_SEQUENCE"
    assert stopped["text"] == free[: free.index(stop)]


def test_top_k_one_is_greedy_at_any_temperature(worker: WorkerProcess) -> None:
    greedy = worker.infer(max_tokens=16)["token_ids"]

    assert worker.infer(max_tokens=16, temperature=2, top_k=1)["token_ids"] == greedy
    assert worker.infer(max_tokens=16, temperature=2, min_p=1.0)["token_ids"] == greedy
    assert worker.infer(max_tokens=16, temperature=2, top_p=0.0001)["token_ids"] == greedy


def test_chat_is_rendered_by_the_template_of_the_model(worker: WorkerProcess, client: httpx.Client) -> None:
    rendered = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"
    )
    body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0, "stream": False}
    answer = client.post("/v1/inference", json=body).json()
    tokens = client.post("/v1/tokenize", json={"text": rendered, "parse_special": True}).json()

    assert answer["prompt_tokens"] == tokens["count"]
    assert answer["text"].startswith("Hello")


def test_continuation_goes_on_exactly(worker: WorkerProcess) -> None:
    whole = ids_of(worker.stream(max_tokens=20, temperature=0.9, seed=7))
    rest = worker.stream(max_tokens=20, temperature=0.9, seed=7, continue_from={"generated_ids": whole[:8]})
    tokens = [e for e in rest if e["type"] == "token"]

    assert [t["i"] for t in tokens] == list(range(8, 20))
    assert [t["id"] for t in tokens] == whole[8:]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b"\xff\xfe{}", "body"),
        ({}, "body"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 32769}, "prompt"),
        ({"prompt": "x", "messages": []}, "messages"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 2049}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "ten"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1e99}, "max_tokens"),
        ({"prompt": "x", "temperature": -0.1}, "temperature"),
        ({"prompt": "x", "temperature": 2.1}, "temperature"),
        ({"prompt": "x", "top_p": 1.1}, "top_p"),
        ({"prompt": "x", "min_p": 1.1}, "min_p"),
        ({"prompt": "x", "top_k": -1}, "top_k"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 2**32}, "seed"),
        ({"prompt": "x", "stop": ["a"] * 5}, "stop"),
        ({"prompt": "x", "stop": [""]}, "stop.0"),
        ({"prompt": "x", "stop": ["x" * 101]}, "stop.0"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logit_bias": {"49152": 1}}, "logit_bias"),
        ({"prompt": "x", "timeout_s": -1}, "timeout_s"),
        ({"prompt": "x", "temprature": 1}, "temprature"),
        ({"prompt": "x", "continue_from": {"generated_ids": [49152]}}, "continue_from.generated_ids"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages.0.role"),
    ],
)
def test_bad_input_is_400_and_names_the_field(client: httpx.Client, body: Any, field: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/v1/inference", content=content)

    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "INVALID_REQUEST"), error
    assert error["details"]["field"] == field
    assert field in error["message"]


def test_prompt_over_the_context_is_400_with_both_numbers(client: httpx.Client) -> None:
    for stream in (True, False):
        response = client.post("/v1/inference", json={"prompt": "word " * 2000, "stream": stream})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "PROMPT_TOO_LONG")
        assert error["details"]["prompt_tokens"] > 2000
        assert error["details"]["context_tokens"] == 1024


def test_body_over_a_megabyte_is_413_also_in_chunks(client: httpx.Client) -> None:
    big = b'{"prompt": "' + b"x" * 1_100_000 + b'"}'
    pieces = (big[i : i + 65536] for i in range(0, len(big), 65536))
    for content in (big, pieces):
        response = client.post("/v1/inference", content=content)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "BODY_TOO_LARGE")


# --- slots ------------------------------------------------------------------------------------------------------------


def open_stream(worker: WorkerProcess, body: dict[str, Any]) -> socket.socket:
    """Send the request over a bare socket and return it once tokens come."""
    raw = json.dumps(body).encode()
    head = f"POST /v1/inference HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", worker.port), timeout=60)
    connection.sendall(head.encode() + raw)
    seen = b""
    while b"event: started" not in seen:
        piece = connection.recv(4096)
        assert piece, seen
        seen += piece
    return connection


#: Requests whose client has gone, of which nobody has waited for the end.
LEFT = 'worker_requests_total{outcome="REQUEST_CANCELED"}'


def test_client_that_closes_its_socket_frees_the_slot_at_once(worker: WorkerProcess, client: httpx.Client) -> None:
    left = _metric(client, LEFT)
    for _ in range(3):
        connection = open_stream(worker, LONG)
        assert worker.record()["slots_available"] == 1
        connection.close()
        worker.wait_idle()
    wait_until(lambda: _metric(client, LEFT) == left + 3, "three have been let go")


def test_client_that_leaves_during_prompt_evaluation_frees_the_slot_too(worker: WorkerProcess, client: httpx.Client) -> None:
    left = _metric(client, LEFT)
    text = " ".join(f"w{random.random()}" for _ in range(25))  # noqa: S311 - not in any prefix cache
    connection = open_stream(worker, {"prompt": text, "max_tokens": 700, "ignore_eos": True})
    connection.close()
    worker.wait_idle()
    wait_until(lambda: _metric(client, LEFT) == left + 1, "it has been let go")


def test_client_that_leaves_a_whole_answer_frees_the_slot_too(worker: WorkerProcess, client: httpx.Client) -> None:
    left = _metric(client, LEFT)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/inference", json=LONG | {"stream": False}, timeout=0.5)
    worker.wait_idle()
    wait_until(lambda: _metric(client, LEFT) == left + 1, "it has been let go")


def test_delete_ends_the_stream_with_cancelled_and_is_204_always(worker: WorkerProcess, client: httpx.Client) -> None:
    with client.stream("POST", "/v1/inference", json=LONG) as response:
        path = f"/v1/inference/{response.headers['x-request-id']}"
        events = []
        for event in events_of(response):
            events.append(event)
            if len(events) == 5:
                with worker.client() as other:
                    assert [other.delete(p).status_code for p in (path, path, "/v1/inference/unknown")] == [204, 204, 204]
    assert (events[-1]["type"], events[-1]["stop_reason"]) == ("end", "CANCELLED")
    assert events[-1]["tokens_out"] == len(ids_of(events)) < 900
    worker.wait_idle()


def test_id_can_be_used_again_as_soon_as_its_request_was_cancelled(worker: WorkerProcess, client: httpx.Client) -> None:
    for _ in range(20):
        with client.stream("POST", "/v1/inference", json=LONG, headers={"X-Request-Id": "again"}) as response:
            assert response.status_code == 200, response.read()
            with worker.client() as other:
                other.delete("/v1/inference/again")
            (*_, end) = events_of(response)
            assert end["stop_reason"] == "CANCELLED"
    worker.wait_idle()


def test_full_worker_says_503_and_takes_the_next_one_after(worker: WorkerProcess, client: httpx.Client) -> None:
    left = _metric(client, LEFT)
    running = [open_stream(worker, LONG) for _ in range(2)]
    assert client.get("/v1/ready").json() == {"ready": True, "state": "busy", "model_loaded": True}
    response = client.post("/v1/inference", json={"prompt": "x"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "ALL_SLOTS_BUSY")
    assert (error["slots_total"], error["slots_busy"]) == (2, 2)
    assert int(response.headers["retry-after"]) >= 1
    running[0].close()
    wait_until(lambda: worker.record()["status"] == "idle", "one slot free")
    wait_until(lambda: _metric(client, LEFT) == left + 1, "it has been let go")
    assert worker.infer(max_tokens=2)["tokens_generated"] == 2
    running[1].close()


@pytest.mark.E03
def test_admission_is_atomic(worker: WorkerProcess, client: httpx.Client) -> None:
    """Nobody is done before all have asked: the engine stands still until four have been refused."""

    async def run() -> list[int]:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=worker.url, headers=headers, trust_env=False, timeout=60) as many:
            body = LONG | {"max_tokens": 40, "stream": False}
            waiting = {asyncio.create_task(many.post("/v1/inference", json=body)) for _ in range(6)}
            refused: set[asyncio.Task[httpx.Response]] = set()
            with standing_still(worker.engine_pid):
                while len(refused) < 4:
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    refused |= done
            return [sum(r.result().status_code == 503 for r in refused), *(a.status_code for a in await asyncio.gather(*waiting))]

    assert asyncio.run(run()) == [4, 200, 200]


@pytest.mark.E31
def test_deadline_is_kept(worker: WorkerProcess, client: httpx.Client) -> None:
    events = worker.stream(**(LONG | {"timeout_s": 1.5}))
    assert (events[-1]["type"], events[-1]["code"]) == ("error", "REQUEST_TIMEOUT")
    response = client.post("/v1/inference", json=LONG, headers={"X-Request-Deadline": "1"})
    assert (response.status_code, response.json()["error"]["code"]) == (408, "REQUEST_TIMEOUT")
    worker.wait_idle()


@pytest.mark.E39
def test_slow_reader_loses_nothing(worker: WorkerProcess, client: httpx.Client) -> None:
    expected = ids_of(worker.stream(**(LONG | {"max_tokens": 120})))
    with client.stream("POST", "/v1/inference", json=LONG | {"max_tokens": 120}) as response:
        wait_until(lambda: worker.record()["slots_available"] == 2, "the engine is done long before its reader")
        assert ids_of(list(events_of(response))) == expected


def test_client_that_reads_nothing_is_let_go(worker: WorkerProcess, client: httpx.Client) -> None:
    """Connected and alive, but it never takes a byte: its request must not keep the worker from draining or going idle."""
    before = _metric(client, LEFT)
    body = json.dumps(LONG | {"logprobs": 20}).encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(("127.0.0.1", worker.port))
        head = f"POST /v1/inference HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        deaf.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: _metric(client, LEFT) == before + 1, "it is let go")
    worker.wait_idle()


# --- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.E27
def test_correlation_id_goes_through(client: httpx.Client) -> None:
    headers = {"X-Correlation-ID": "from-the-queen"}
    with client.stream("POST", "/v1/inference", json={"prompt": "x", "max_tokens": 1}, headers=headers) as response:
        response.read()
    assert response.headers["x-correlation-id"] == "from-the-queen"


@pytest.mark.S49
@pytest.mark.P03
def test_loading_progress_after_loading_is_ready_at_once(client: httpx.Client) -> None:
    with client.stream("GET", "/v1/loading/progress") as response:
        (event,) = events_of(response)
    assert (event["stage"], event["layers_loaded"], event["layers_total"]) == ("ready", 30, 30)


def test_info_and_metrics_show_what_is_loaded(worker: WorkerProcess, client: httpx.Client) -> None:
    record = worker.record()
    assert (record["id"], record["backend"], record["pid"]) == ("lab1-cpu0", "cpu", worker.process.pid)
    assert record["model_info"]["layers"] == 30
    assert record["context_tokens"] == 1024
    before = _metric(client, "worker_tokens_generated_total")
    worker.infer(max_tokens=3)
    assert _metric(client, "worker_tokens_generated_total") == before + 3
    assert _metric(client, "worker_uptime_seconds") > 0


def _metric(client: httpx.Client, name: str) -> float:
    lines = [li for li in client.get("/metrics").text.splitlines() if li.startswith(name + " ")]
    return float(lines[0].split()[1]) if lines else 0.0
