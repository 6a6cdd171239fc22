"""What both servers share at their edge: ids, keys, limits, the one error shape, streams."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest
from asgi import Exchange
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from rbee_serve.common.http import JsonResponse, RequestLimits, correlation_id, create_base_app, read_json, sse, while_connected
from rbee_serve.contract.errors import AllSlotsBusy, RequestCanceled

AUTH = {"Authorization": "Bearer good"}


async def echo(request: Request) -> Response:
    return JsonResponse({"got": await read_json(request), "id": correlation_id()})


async def busy(_: Request) -> Response:
    raise AllSlotsBusy("all busy", slots_total=2, slots_busy=2, retry_after_s=3)


async def broken(_: Request) -> Response:
    raise RuntimeError("password is hunter2")


async def breaks_off(_: Request) -> Response:
    async def body() -> AsyncGenerator[bytes, None]:
        yield b"half"
        raise RuntimeError("mid-way")

    return StreamingResponse(body())


def make_app(*more: Route, key: str | None = "good", limit: int = 1024, **limits: Any) -> Starlette:
    routes = [
        Route("/echo", echo, methods=["POST"]),
        Route("/busy", busy),
        Route("/broken", broken),
        Route("/breaks-off", breaks_off),
        Route("/health", lambda _: JsonResponse({})),
        *more,
    ]
    accepted = RequestLimits(limit, **({"headers_max_bytes": 1024, "receive_timeout_s": 30.0, "requests_max": 10} | limits))
    return create_base_app(routes, authenticate=None if key is None else lambda token, _: token == key, limits=accepted)


def ask(method: str, path: str, body: bytes | list[bytes] = b"", *, headers: Mapping[str, str] = AUTH, **app: Any) -> Exchange:
    async def exchange() -> Exchange:
        pieces = list(body) if isinstance(body, list) else [body]
        return await Exchange(make_app(**app), method, path, headers=headers, body=pieces).finish()

    return asyncio.run(exchange())


@pytest.mark.parametrize("given", ["abc", "A.b_c-9", "x" * 128])
def test_correlation_id_is_kept(given: str) -> None:
    answer = ask("POST", "/echo", b"{}", headers=AUTH | {"X-Correlation-ID": given})

    assert answer.headers["x-correlation-id"] == given
    assert answer.json()["id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "ä", "../x"])
def test_correlation_id_that_could_hurt_is_replaced(given: str) -> None:
    answer = ask("GET", "/nowhere", headers=AUTH | {"X-Correlation-ID": given})

    assert answer.error()["correlation_id"] != given
    assert len(answer.headers["x-correlation-id"]) == 36


@pytest.mark.parametrize(
    "value",
    [
        "",
        "good",
        "Bearer",
        "Bearer ",
        "bearer good",
        "BEARER good",
        "Bearer  good",
        "Bearer good ",
        "Bearer good x",
        "Basic good",
    ],
)
def test_authorization_of_another_form_is_no_key(value: str) -> None:
    answer = ask("GET", "/busy", headers={"Authorization": value})

    assert (answer.status, answer.error()["code"]) == (401, "MISSING_API_KEY")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_two_authorization_headers_are_no_key() -> None:
    async def exchange() -> Exchange:
        one = Exchange(make_app(), "GET", "/busy")
        one._scope["headers"] = [(b"authorization", b"Bearer bad"), (b"authorization", b"Bearer good")]
        return await one.finish()

    assert asyncio.run(exchange()).error()["code"] == "MISSING_API_KEY"


def test_wrong_key_is_refused_and_not_repeated() -> None:
    answer = ask("GET", "/busy", headers={"Authorization": "Bearer s3cret-guess"})

    assert (answer.status, answer.error()["code"]) == (401, "INVALID_API_KEY")
    assert b"s3cret-guess" not in answer.body


@pytest.mark.parametrize("path", ["/nowhere", "/", "/health/", "/echo/x", "/healthx"])
def test_unknown_paths_ask_for_a_key_too(path: str) -> None:
    assert ask("GET", path, headers={}).status == 401
    answer = ask("GET", path)
    assert (answer.status, answer.error()["code"]) == (404, "NOT_FOUND")


def test_health_needs_no_key() -> None:
    assert ask("GET", "/health", headers={}).status == 200


def test_without_keys_everything_is_open() -> None:
    assert ask("POST", "/echo", b"{}", headers={}, key=None).status == 200


def test_wrong_method_says_which_are_right() -> None:
    answer = ask("PUT", "/echo")

    assert (answer.status, answer.error()["code"], answer.headers["allow"]) == (405, "METHOD_NOT_ALLOWED", "POST")


def test_busy_has_slots_flat_and_in_details_and_says_when_to_come_back() -> None:
    answer = ask("GET", "/busy")
    error = answer.error()

    assert (answer.status, answer.headers["retry-after"]) == (503, "3")
    assert (error["slots_total"], error["slots_busy"]) == (2, 2)
    assert (error["details"]["slots_total"], error["details"]["slots_busy"]) == (2, 2)


def test_unexpected_error_is_told_to_the_log_and_not_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    answer = ask("GET", "/broken")

    assert (answer.status, answer.error()["code"]) == (500, "INTERNAL_ERROR")
    assert b"hunter2" not in answer.body
    assert "hunter2" in caplog.text


def test_error_after_the_beginning_leaves_the_answer_unfinished() -> None:
    async def exchange() -> Exchange:
        one = Exchange(make_app(), "GET", "/breaks-off", headers=AUTH)
        with pytest.raises(RuntimeError, match="mid-way"):
            await one.finish()
        return one

    sent = asyncio.run(exchange()).sent
    assert sent[-1]["body"] == b"half"
    assert sent[-1]["more_body"] is True


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "line 1, column 1"),
        (b'{"a": 1', "line 1, column 8"),
        (b'{"a":\n nope}', "line 2, column 2"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b"[1]", "object expected, got list"),
        (b'"x"', "object expected, got str"),
        (b"null", "object expected, got NoneType"),
        (b"[" * 1000, "body"),
    ],
)
def test_body_that_is_no_object_is_400_with_the_place(body: bytes, says: str) -> None:
    answer = ask("POST", "/echo", body)

    assert (answer.status, answer.error()["code"]) == (400, "INVALID_REQUEST")
    assert says in answer.error()["message"]


def test_deep_nesting_is_400() -> None:
    answer = ask("POST", "/echo", b'{"a":' + b"[" * 200_000, limit=1_000_000)

    assert (answer.status, answer.error()["details"]["field"]) == (400, "body")


def test_body_over_the_limit_by_its_length_is_413() -> None:
    answer = ask("POST", "/echo", b"x", headers=AUTH | {"Content-Length": "1025"})

    assert (answer.status, answer.error()["code"]) == (413, "BODY_TOO_LARGE")
    assert answer.error()["details"]["limit_bytes"] == 1024


def test_chunked_body_over_the_limit_is_413_and_one_at_the_limit_is_not() -> None:
    fits = json.dumps({"a": "x" * (1024 - 9)}).encode()
    assert len(fits) == 1024

    assert ask("POST", "/echo", [fits[:500], fits[500:]]).status == 200
    assert ask("POST", "/echo", [fits[:500], fits[500:], b" "]).error()["code"] == "BODY_TOO_LARGE"


def test_large_body_without_a_key_is_401() -> None:
    assert ask("POST", "/echo", b"x", headers={"Content-Length": "99999999"}).status == 401


class Source:
    """A stream's body that says whether it was closed."""

    def __init__(self, *pieces: bytes, silent: bool = False) -> None:
        self.pieces, self.silent, self.closed = pieces, silent, False

    async def body(self) -> AsyncGenerator[bytes, None]:
        try:
            for piece in self.pieces:
                yield piece
            if self.silent:
                await asyncio.Event().wait()
        finally:
            self.closed = True

    def app(self, ping_s: float = 10.0) -> Starlette:
        return make_app(Route("/s", lambda _: sse(self.body(), ping_interval_s=ping_s, headers={"X-Request-Id": "r1"})))


def test_stream_passes_pieces_on_as_they_are() -> None:
    source = Source(b"data: 1\n\n", b"data: \xc3\xa4\n\n")

    answer = asyncio.run(Exchange(source.app(), "GET", "/s", headers=AUTH).finish())

    assert [m["body"] for m in answer.sent[1:]] == [b"data: 1\n\n", b"data: \xc3\xa4\n\n", b""]
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"] == "r1"
    assert "x-correlation-id" in answer.headers


def test_silent_stream_pings_and_is_closed_when_the_client_leaves() -> None:
    source = Source(b"data: 1\n\n", silent=True)

    async def exchange() -> Exchange:
        one = Exchange(source.app(ping_s=0.01), "GET", "/s", headers=AUTH).start()
        async with asyncio.timeout(5):
            while one.body.count(b": ping\n\n") < 3:  # noqa: ASYNC110 - pings have no event
                await asyncio.sleep(0.005)
        assert not source.closed
        one.leave()
        return await one.finish(1)

    asyncio.run(exchange())
    assert source.closed


def test_work_ends_when_its_client_leaves() -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            seen.append("begun")
            await asyncio.Event().wait()
        finally:
            seen.append("ended")

    async def endpoint(request: Request) -> Response:
        await read_json(request)
        with pytest.raises(RequestCanceled):
            await while_connected(request, work())
        return JsonResponse({})

    async def exchange() -> None:
        app = make_app(Route("/w", endpoint, methods=["POST"]))
        one = Exchange(app, "POST", "/w", headers=AUTH, body=[b"{}"]).start()
        async with asyncio.timeout(5):
            while not seen:  # noqa: ASYNC110 - the endpoint has no event
                await asyncio.sleep(0.001)
        one.leave()
        await one.finish(1)

    asyncio.run(exchange())
    assert seen == ["begun", "ended"]


def test_records_of_a_request_carry_its_id(capsys: pytest.CaptureFixture[str]) -> None:
    from rbee_serve.common.log import LineFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(journal=True, text=True))
    log = logging.getLogger("rbee_serve.common.http")
    log.addHandler(handler)
    try:
        ask("GET", "/broken", headers=AUTH | {"X-Correlation-ID": "find-me"})
    finally:
        log.removeHandler(handler)
    line = capsys.readouterr().err.splitlines()
    assert len(line) == 1
    assert line[0].startswith("<3>error rbee_serve.common.http: request failed method=GET path=/broken [find-me]")
    assert "hunter2" in line[0]


def test_a_head_over_the_limit_is_refused_before_the_key_is_looked_at() -> None:
    answer = ask("GET", "/busy", headers={"X-Long": "x" * 1100})

    assert (answer.status, answer.json()["error"]["code"]) == (431, "HEADERS_TOO_LARGE")


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def exchange() -> Exchange:
        waiting = Exchange(make_app(receive_timeout_s=0.05), "POST", "/echo", headers=AUTH, body=[b"{"], more_body=True)
        return await waiting.finish()

    answer = asyncio.run(exchange())

    assert (answer.status, answer.json()["error"]["code"]) == (408, "REQUEST_TIMEOUT")


def test_requests_over_the_limit_are_refused_and_health_is_not() -> None:
    async def check() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def hold(_: Request) -> Response:
            entered.set()
            await leave.wait()
            return JsonResponse({})

        app = make_app(Route("/hold", hold), requests_max=1)
        held = asyncio.create_task(Exchange(app, "GET", "/hold", headers=AUTH, body=[b""]).finish())
        await entered.wait()
        refused = await Exchange(app, "GET", "/busy", headers=AUTH, body=[b""]).finish()
        health = await Exchange(app, "GET", "/health", headers={}, body=[b""]).finish()
        leave.set()

        assert (refused.status, refused.json()["error"]["code"]) == (503, "OVERLOADED")
        assert refused.headers["retry-after"] == "1"
        assert (health.status, (await held).status) == (200, 200)
        assert (await Exchange(app, "GET", "/hold", headers=AUTH, body=[b""]).finish()).status == 200

    asyncio.run(check())
