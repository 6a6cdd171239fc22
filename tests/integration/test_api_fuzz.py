"""schemathesis against a real queen with a real worker: whatever a client sends, no answer says that the service is at fault."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import schemathesis
from fleet import Fleet
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

pytestmark = pytest.mark.integration

#: What a queen may say when nothing is wrong with it: nobody fits the request, or nobody is free.
_CAPACITY = {"NO_WORKER_AVAILABLE", "ALL_SLOTS_BUSY"}
SLOTS = 4
#: Operations of jobs change machines, and a queen that is told to shut down does.
_LEFT_OUT = ("/v1/jobs", "/v1/shutdown")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, model_path: Any) -> Iterator[Fleet]:
    running = Fleet(tmp_path_factory.mktemp("fuzz"), model_path, queen_settings={"bad_requests_per_minute": 0})
    try:
        running.start_queen()
        running.add_worker("lab1", slots=SLOTS)
        running.wait_ready()
        yield running
    finally:
        running.close()


def check(answer: httpx.Response, what: str) -> None:
    if answer.status_code < 500:
        return
    body = answer.json()
    code = body["code"] if isinstance(body["error"], str) else body["error"]["code"]
    assert answer.status_code == 503, f"{what}: {answer.status_code} {answer.text[:500]}"
    assert code in _CAPACITY, f"{what}: {answer.text[:500]}"


@pytest.mark.E26
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_nothing_that_is_sent_is_answered_with_a_fault_of_the_service(fleet: Fleet, mode: GenerationMode) -> None:
    with fleet.client() as client:
        schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
        checked = 0
        for found in schema.get_all_operations():
            operation = found.ok()
            takes_something = operation.body or operation.query or operation.path_parameters
            if operation.path.startswith(_LEFT_OUT) or (mode is GenerationMode.NEGATIVE and not takes_something):
                continue

            @settings(
                max_examples=6,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def attack(case: Any) -> None:
                nonlocal checked
                values = case.as_transport_kwargs(base_url=fleet.queen.url)
                given_ = {k: v for k, v in (values.get("headers") or {}).items() if k.lower() != "authorization"}
                headers = given_ | dict(client.headers) | {"X-Request-Deadline": str(time.time() + 0.5)}
                request = httpx.Request(
                    values["method"],
                    values["url"],
                    params=values.get("params"),
                    headers=headers,
                    json=values.get("json"),
                    content=values.get("data"),
                )
                check(client.send(request), f"{values['method']} {values['url']} {values.get('json')!r:.300}")
                checked += 1

            attack()
    assert checked > 50


HOSTILE: list[Any] = [
    "\ud800",
    {"a": "\udfff"},
    ["x", "\ud83d"],
    json.loads("[" * 90 + "]" * 90),
    json.loads("[" * 300 + "]" * 300),
    10**30,
    -(10**400),
    float("nan"),
    float("inf"),
    True,
    None,
    {},
    [],
    [[]],
    "x\x00\x1b[31m'; DROP TABLE--<script>../../etc/passwd",
]


@pytest.mark.E26
def test_hostile_values_in_every_field_are_refused_or_harmless(fleet: Fleet) -> None:
    """Half surrogate pairs, absurd nesting, numbers without measure, wrong types: in every field of every body."""
    with fleet.client() as client:
        document = client.get("/openapi.json").json()
        cases: list[tuple[str, str, Any, dict[str, Any]]] = []
        for path, methods in document["paths"].items():
            body = methods.get("post", {}).get("requestBody")
            if body is None or path.startswith(_LEFT_OUT):
                continue
            name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            schema = document["components"]["schemas"][name]
            good = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x"}
            base = {k: v for k, v in (good | {"max_tokens": 1}).items() if k in schema["properties"]}
            if path == "/v1/inference":
                del base["prompt"]
            for field in schema["properties"]:
                cases += [(path, field, value, base) for value in HOSTILE]

        def ask(case: tuple[str, str, Any, dict[str, Any]]) -> None:
            path, field, value, base = case
            headers = {"X-Request-Deadline": str(time.time() + 0.3), "Content-Type": "application/json"}
            content = json.dumps(base | {field: value})
            check(client.post(path, content=content, headers=headers), f"{path} {field} {value!r:.60}")

        with ThreadPoolExecutor(SLOTS) as pool:  # nobody waits for a slot: what can reach the engine does
            checked = len(list(pool.map(ask, cases)))
        state = client.get("/v1/workers/lab1-cpu0").json()["status"]
    assert checked > 1000
    assert state in ("idle", "busy"), "clients in a hurry do not make a worker count as failed"
