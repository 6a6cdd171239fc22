"""The queen's application without a network: keys, heartbeats, lists, and what bad input gets."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from test_queen_registry import beat

from rbee_serve.common.credentials import ClientKeys
from rbee_serve.contract.keys import ClientKey
from rbee_serve.contract.settings import QueenSettings
from rbee_serve.queen.app import create_app

KEY, FLEET = "client-key-1", "fleet-token-1"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CLIENT = {"Authorization": f"Bearer {KEY}"}
WORKER = {"Authorization": f"Bearer {FLEET}"}


@dataclass
class App:
    """A queen whose clock stands still until it is set."""

    now: float = 1000.0
    app: Starlette = field(init=False)

    def __post_init__(self) -> None:
        keys = ClientKeys([ClientKey(id="k1", name="test", admin=True, sha256=hashlib.sha256(KEY.encode()).hexdigest())])
        self.app = create_app(QueenSettings(), client_keys=keys, fleet_token=FLEET, clock=lambda: self.now)

    def ask(self, method: str, path: str, *, headers: dict[str, str] = CLIENT, **more: Any) -> httpx.Response:
        return ask(self.app, method, path, headers=headers, **more)

    def beat(self, worker_id: str = "lab1-cpu0", **record: Any) -> httpx.Response:
        body = beat(worker_id, **record).model_dump(mode="json")
        return self.ask("POST", "/v1/worker-heartbeat", headers=WORKER, json=body)


def ask(app: Starlette, method: str, path: str, **more: Any) -> httpx.Response:
    """Send one request into the application."""

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://queen") as client:
            return await client.request(method, path, **more)

    return asyncio.run(send())


def paths(app: Starlette) -> list[str]:
    """Return a concrete path for every route."""
    return [re.sub(r"\{[^}]*\}", "x", route.path) for route in app.routes if isinstance(route, Route)]


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    error: dict[str, Any] = body if isinstance(body["error"], str) else body["error"]  # Ollama's is a text
    assert error["correlation_id"] == response.headers["x-correlation-id"]
    return error


@pytest.mark.E18
@pytest.mark.P14
@pytest.mark.parametrize(("headers", "code"), [({}, "MISSING_API_KEY"), ({"Authorization": "Bearer wrong"}, "INVALID_API_KEY")])
def test_every_route_and_method_asks_for_a_key_but_health(headers: dict[str, str], code: str) -> None:
    app = App().app
    checked = 0
    for path in [*paths(app), "/", "/nowhere", "/v1/workers/", "/health/"]:
        for method in METHODS:
            if path in ("/health", "/v1/health") or (path == "/v1/worker-heartbeat" and headers and method != "POST"):
                continue
            response = ask(app, method, path, headers=headers)
            assert response.status_code == 401, f"{method} {path}"
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert error_of(response)["code"] == code
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
def test_health_is_open_and_says_its_version(path: str) -> None:
    response = App().ask("GET", path, headers={})

    assert response.status_code == 200
    assert response.json().keys() == {"status", "version", "api_version"}
    assert (response.json()["status"], response.json()["api_version"]) == ("alive", "v1")


def test_fleet_token_opens_heartbeats_only_and_a_client_key_opens_all_but_heartbeats() -> None:
    app = App()

    assert app.beat().status_code == 200
    assert app.ask("GET", "/v1/workers", headers=WORKER).status_code == 401
    refused = app.ask("POST", "/v1/worker-heartbeat", json=beat().model_dump(mode="json"))
    assert (refused.status_code, error_of(refused)["code"]) == (401, "INVALID_API_KEY")


@pytest.mark.E19
def test_without_keys_clients_need_none_and_workers_still_need_the_token() -> None:
    app = create_app(QueenSettings(), fleet_token=FLEET)
    body = beat().model_dump(mode="json")

    assert ask(app, "GET", "/v1/workers").status_code == 200
    assert ask(app, "POST", "/v1/worker-heartbeat", json=body).status_code == 401
    assert ask(app, "POST", "/v1/worker-heartbeat", json=body, headers=WORKER).status_code == 200


def test_empty_fleet_is_an_empty_list() -> None:
    app = App()

    assert app.ask("GET", "/v1/workers").json() == {"workers": []}
    assert app.ask("GET", "/v1/hives").json() == {"hives": []}
    assert app.ask("GET", "/v1/models").json() == {"object": "list", "data": []}


def test_worker_is_listed_with_what_it_said_and_what_the_queen_knows() -> None:
    app = App()
    app.beat(slots_available=3)
    app.now += 4

    (worker,) = app.ask("GET", "/v1/workers").json()["workers"]

    assert (worker["id"], worker["hive_id"], worker["model_id"], worker["pid"]) == ("lab1-cpu0", "lab1", "smollm2", 1)
    assert (worker["status"], worker["available"], worker["in_flight"], worker["last_heartbeat_age_s"]) == ("idle", True, 0, 4.0)
    assert app.ask("GET", "/v1/workers/lab1-cpu0").json() == worker


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ["lab1-cpu0", "lab2-cpu0", "lab2-cpu1"]),
        ("node=lab2", ["lab2-cpu0", "lab2-cpu1"]),
        ("model=other", ["lab2-cpu1"]),
        ("model=hf:org/smollm2:Q4_1.gguf&node=lab1", ["lab1-cpu0"]),
        ("state=loading", ["lab2-cpu0"]),
        ("node=lab2&state=idle", ["lab2-cpu1"]),
        ("node=nowhere", []),
    ],
)
def test_filters_of_the_list(query: str, expected: list[str]) -> None:
    app = App()
    app.beat("lab1-cpu0")
    app.beat("lab2-cpu0", hive_id="lab2", status="loading")
    app.beat("lab2-cpu1", hive_id="lab2", model_id="other", model_ref=None)

    assert [w["id"] for w in app.ask("GET", f"/v1/workers?{query}").json()["workers"]] == expected


@pytest.mark.P08
def test_silent_worker_disappears_and_comes_back() -> None:
    app = App()
    app.beat(seq=1)
    app.now += 30.1
    assert app.ask("GET", "/v1/workers").json() == {"workers": []}

    app.beat(seq=2)
    assert len(app.ask("GET", "/v1/workers").json()["workers"]) == 1


@pytest.mark.E01
def test_second_worker_of_the_same_id_is_refused() -> None:
    app = App()
    app.beat()

    response = app.beat(url="http://elsewhere:8001")

    assert (response.status_code, error_of(response)["code"]) == (409, "WORKER_ALREADY_REGISTERED")


@pytest.mark.E01
def test_ten_first_heartbeats_at_once_make_ten_workers() -> None:
    app = App()

    async def all_at_once() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app.app), base_url="http://queen", headers=WORKER) as client:
            bodies = [beat(f"lab{n}-cpu0", hive_id=f"lab{n}").model_dump(mode="json") for n in range(10)]
            answers = await asyncio.gather(*(client.post("/v1/worker-heartbeat", json=b) for b in bodies))
        return [a.status_code for a in answers]

    assert asyncio.run(all_at_once()) == [200] * 10
    assert len(app.ask("GET", "/v1/workers").json()["workers"]) == 10


def test_hives_status_and_models_tell_the_same_story() -> None:
    app = App()
    app.beat("lab1-cpu0", slots_available=1)
    app.beat("lab2-cpu0", hive_id="lab2", status="loading", slots_total=0, slots_available=0)

    status = app.ask("GET", "/v1/status").json()

    assert [h["name"] for h in status["hives"]] == ["lab1", "lab2"]
    assert status["hives"] == app.ask("GET", "/v1/hives").json()["hives"]
    assert (status["states"], status["models"], status["slots"]) == (
        {"idle": 1, "loading": 1},
        ["smollm2"],
        {"total": 4, "busy": 3},
    )
    assert [m["id"] for m in app.ask("GET", "/v1/models").json()["data"]] == ["smollm2"]
    assert app.ask("GET", "/v1/models/smollm2").json()["object"] == "model"


def test_info_says_where_clients_go() -> None:
    info = App().ask("GET", "/v1/info").json()

    assert (info["name"], info["role"], info["openai_base_url"]) == ("rbee", "queen", "http://queen/v1")


@pytest.mark.E32
def test_metrics_name_workers_by_state() -> None:
    app = App()
    app.beat()

    text = app.ask("GET", "/metrics").text

    assert 'queen_workers{state="idle"} 1.0' in text
    assert 'queen_slots{kind="total"} 4.0' in text
    assert 'queen_heartbeats_total{outcome="registered"} 1.0' in text


@pytest.mark.E27
def test_correlation_id_is_kept() -> None:
    response = App().ask("GET", "/v1/workers/x", headers=CLIENT | {"X-Correlation-ID": "abc-123"})

    assert (response.status_code, error_of(response)["correlation_id"]) == (404, "abc-123")


def test_delete_of_an_unknown_request_is_fine() -> None:
    app = App()

    assert [app.ask("DELETE", "/v1/inference/nobody").status_code for _ in range(2)] == [204, 204]


@pytest.mark.E27
@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "NOT_FOUND"),
        ("GET", "/v1/inference", 405, "METHOD_NOT_ALLOWED"),
        ("PUT", "/v1/models", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/v1/workers/x", 404, "WORKER_NOT_FOUND"),
        ("GET", "/v1/models/x", 404, "MODEL_NOT_FOUND"),
        ("GET", "/v1/workers?state=happy", 400, "INVALID_REQUEST"),
        ("GET", "/v1/workers?modle=x", 400, "INVALID_REQUEST"),
    ],
)
def test_wrong_paths_get_the_envelope(method: str, path: str, status: int, code: str) -> None:
    response = App().ask(method, path)

    assert (response.status_code, error_of(response)["code"]) == (status, code)


P, M = {"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.E26
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/inference", {}, "body"),
        ("/v1/inference", P | M, "body"),
        ("/v1/inference", {"prompt": ""}, "prompt"),
        ("/v1/inference", {"prompt": 5}, "prompt"),
        ("/v1/inference", {"prompt": "x" * 32_769}, "prompt"),
        ("/v1/inference", P | {"max_tokens": 0}, "max_tokens"),
        ("/v1/inference", P | {"max_tokens": "many"}, "max_tokens"),
        ("/v1/inference", P | {"temperature": 2.1}, "temperature"),
        ("/v1/inference", P | {"top_p": 2}, "top_p"),
        ("/v1/inference", P | {"min_p": -1}, "min_p"),
        ("/v1/inference", P | {"top_k": -1}, "top_k"),
        ("/v1/inference", P | {"repetition_penalty": 1e-40}, "repetition_penalty"),
        ("/v1/inference", P | {"seed": -1}, "seed"),
        ("/v1/inference", P | {"seed": 2**32}, "seed"),
        ("/v1/inference", P | {"stop": ["a"] * 5}, "stop"),
        ("/v1/inference", P | {"stop": ["x" * 101]}, "stop.0"),
        ("/v1/inference", P | {"device": -1}, "device"),
        ("/v1/inference", P | {"worker_id": "a/../b"}, "worker_id"),
        ("/v1/inference", P | {"timeout_s": 0}, "timeout_s"),
        ("/v1/inference", P | {"temprature": 1}, "temprature"),
        ("/v1/inference", {"messages": []}, "messages"),
        ("/v1/chat/completions", M, "model"),
        ("/v1/chat/completions", {"model": "m"}, "messages"),
        ("/v1/chat/completions", M | {"model": "m", "temperature": -1}, "temperature"),
        ("/v1/chat/completions", M | {"model": "m", "tools": [{}]}, "tools.0.type"),
        ("/v1/completions", {"model": "m"}, "prompt"),
        ("/v1/completions", P | {"model": "m", "max_tokens": -5}, "max_tokens"),
        ("/v1/completions", {"model": "m", "prompt": ["a", 5]}, "prompt"),
    ],
)
def test_bad_input_is_400_and_names_the_field(path: str, body: dict[str, Any], field: str) -> None:
    app = App()
    app.beat()

    response = app.ask("POST", path, json=body)

    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "INVALID_REQUEST")
    assert error["details"]["field"] == field
    assert field in error["message"]
    if path != "/v1/inference":
        assert (error["type"], error["param"]) == ("invalid_request_error", field)


@pytest.mark.parametrize(
    ("body", "field"), [(P | {"prompt": "\ud800"}, "prompt"), (P | {"temperature": float("nan")}, "temperature")]
)
def test_what_is_no_strict_json_is_400(body: dict[str, Any], field: str) -> None:
    """Half a surrogate pair and NaN: Python's json writes them, nothing further on could take them."""
    response = App().ask("POST", "/v1/inference", content=json.dumps(body))

    assert (response.status_code, error_of(response)["code"]) == (400, "INVALID_REQUEST")
    assert error_of(response)["details"]["field"] in ("body", field)


@pytest.mark.parametrize("path", ["/v1/inference", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff", b"nul", b"[" * 100_000])
def test_body_that_is_no_json_object_is_400(path: str, content: bytes) -> None:
    response = App().ask("POST", path, content=content)

    assert (response.status_code, error_of(response)["code"]) == (400, "INVALID_REQUEST")


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/inference", P), ("/v1/chat/completions", M), ("/v1/completions", P)],
)
def test_unknown_model_is_404_and_names_the_known_ones(path: str, body: dict[str, Any]) -> None:
    app = App()
    app.beat()

    response = app.ask("POST", path, json=body | {"model": "gpt-9"})

    error = error_of(response)
    assert (response.status_code, error["code"]) == (404, "MODEL_NOT_FOUND")
    assert "smollm2" in error["message"]
    assert error["details"]["known"] == ["smollm2"]


@pytest.mark.parametrize("path", ["/v1/inference", "/v1/completions"])
def test_nobody_there_is_503_with_a_time_to_come_back(path: str) -> None:
    response = App().ask("POST", path, json=P | {"model": "smollm2"})

    assert (response.status_code, error_of(response)["code"]) == (503, "NO_WORKER_AVAILABLE")
    assert response.headers["retry-after"] == "1"


@pytest.mark.E31
def test_deadline_that_is_no_number_is_named_and_one_that_has_passed_is_408() -> None:
    app = App()
    app.beat()
    header = "X-Request-Deadline"

    wrong = app.ask("POST", "/v1/inference", json=P, headers=CLIENT | {header: "soon"})
    late = app.ask("POST", "/v1/inference", json=P, headers=CLIENT | {header: "1000"})

    assert (wrong.status_code, error_of(wrong)["details"]["field"]) == (400, header)
    assert (late.status_code, error_of(late)["code"]) == (408, "REQUEST_TIMEOUT")


def test_body_over_the_limit_is_413() -> None:
    response = App().ask("POST", "/v1/inference", content=b"x" * 1_048_577)

    assert (response.status_code, error_of(response)["code"]) == (413, "BODY_TOO_LARGE")


@pytest.mark.parametrize("field", ["id", "url", "status", "slots_total", "started_at"])
def test_bad_heartbeat_is_400_and_registers_nothing(field: str) -> None:
    app = App()
    body = beat().model_dump(mode="json")
    body["worker"][field] = None

    response = app.ask("POST", "/v1/worker-heartbeat", json=body, headers=WORKER)

    assert (response.status_code, error_of(response)["details"]["field"]) == (400, f"worker.{field}")
    assert app.ask("GET", "/v1/workers").json() == {"workers": []}


def limited(**limits: Any) -> App:
    """A queen whose one key has these limits."""
    app = App()
    key = ClientKey.model_validate({"id": "k1", "name": "test", "sha256": hashlib.sha256(KEY.encode()).hexdigest()} | limits)
    app.app = create_app(QueenSettings(), client_keys=ClientKeys([key]), fleet_token=FLEET, clock=lambda: app.now)
    return app


def test_an_expired_key_opens_nothing_and_says_so() -> None:
    answer = limited(expires_at=1.0).ask("GET", "/v1/workers")

    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "INVALID_API_KEY"
    assert "expired" in answer.json()["error"]["message"]


def test_a_key_for_other_models_is_refused_before_any_worker_is_asked() -> None:
    app = limited(models=["other"])
    app.beat()

    answer = app.ask("POST", "/v1/inference", json={"prompt": "x", "model": "m"})
    unnamed = app.ask("POST", "/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "x"}]})

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "MODEL_ACCESS_DENIED")
    assert (unnamed.status_code, unnamed.json()["error"]["type"]) == (403, "permission_error")


def test_requests_over_the_rate_get_429_and_when_to_come_back() -> None:
    app = limited(requests_per_minute=1)

    first = app.ask("POST", "/v1/inference", json={"prompt": "x"})
    second = app.ask("POST", "/v1/inference", json={"prompt": "x"})
    app.now += 60
    third = app.ask("POST", "/v1/inference", json={"prompt": "x"})

    assert [a.status_code for a in (first, second, third)] == [503, 429, 503]
    assert second.json()["error"]["code"] == "RATE_LIMITED"
    assert second.headers["retry-after"] == "60"


@pytest.mark.E26
def test_a_caller_that_gets_nothing_right_is_slowed_down_and_nobody_else() -> None:
    app = App()
    keys = ClientKeys(
        [
            ClientKey(id=name, name=name, admin=True, sha256=hashlib.sha256(f"key-{name}".encode()).hexdigest())
            for name in ("clumsy", "careful")
        ]
    )
    app.app = create_app(QueenSettings(bad_requests_per_minute=3), client_keys=keys, fleet_token=FLEET)

    def get(path: str, key: str) -> httpx.Response:
        return app.ask("GET", path, headers={"Authorization": f"Bearer key-{key}"})

    clumsy = [get("/v1/workers?colour=red", "clumsy").status_code for _ in range(5)]
    held_up = get("/v1/workers", "clumsy")
    strangers = [get("/v1/workers", "stranger").status_code for _ in range(5)]

    assert clumsy == [400, 400, 400, 429, 429]
    assert (held_up.status_code, error_of(held_up)["code"]) == (429, "RATE_LIMITED")
    assert 1 <= int(held_up.headers["retry-after"]) <= 20
    assert strangers == [401, 401, 401, 429, 429]
    assert get("/v1/workers", "careful").status_code == 200  # from the same address
    assert get("/health", "stranger").status_code == 200


@pytest.mark.E32
def test_answered_errors_are_counted_by_code() -> None:
    app = App()
    for path in ("/nowhere", "/v1/workers/nobody", "/v1/workers/nobody"):
        app.ask("GET", path)
    app.ask("GET", "/v1/workers", headers={})

    text = app.ask("GET", "/metrics").text

    for code, count in {"WORKER_NOT_FOUND": 2, "NOT_FOUND": 1, "MISSING_API_KEY": 1}.items():
        assert f'queen_errors_total{{code="{code}"}} {count}.0' in text


def test_a_request_that_fails_gives_its_place_back() -> None:
    app = limited(concurrent_requests=1)

    answers = [app.ask("POST", "/v1/inference", json={"prompt": "x"}).status_code for _ in range(3)]

    assert answers == [503, 503, 503]


def test_a_key_sees_the_models_that_it_may_use() -> None:
    app = limited(models=["mine*"])
    app.beat("lab1-cpu0", model_id="mine-7b")
    app.beat("lab2-cpu0", model_id="other", url="http://10.0.0.2:8001")

    listed = [m["id"] for m in app.ask("GET", "/v1/models").json()["data"]]
    tags = [m["name"] for m in app.ask("GET", "/api/tags").json()["models"]]

    assert listed == ["mine-7b"]
    assert [t.removesuffix(":latest") for t in tags] == ["mine-7b"]


def test_a_guest_runs_no_fleet_operation_retires_nobody_and_sees_no_foreign_job() -> None:
    guest = limited()
    guest.beat()
    refused = [
        guest.ask("POST", "/v1/jobs", json={"operation": "hive_stop", "alias": "lab1"}),
        guest.ask("POST", "/v1/workers/lab1-cpu0/retire"),
        guest.ask("DELETE", "/v1/workers/lab1-cpu0"),
        guest.ask("POST", "/v1/shutdown"),
    ]

    assert [(r.status_code, r.json()["error"]["code"]) for r in refused] == [(403, "OPERATION_NOT_ALLOWED")] * 4
    assert guest.ask("GET", "/v1/workers/lab1-cpu0").json()["status"] == "idle"
    assert guest.ask("GET", "/v1/jobs").json() == {"jobs": []}
    assert guest.ask("GET", "/v1/jobs/job-1").status_code == 404


def test_a_queen_without_keys_is_not_ended_over_http() -> None:
    answer = ask(create_app(QueenSettings(), fleet_token=FLEET), "POST", "/v1/shutdown")

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "OPERATION_NOT_ALLOWED")
