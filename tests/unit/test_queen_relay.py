"""The relay against scripted workers: what is retried, what is continued, what the client sees."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from test_queen_registry import beat

from rbee_serve.contract import events
from rbee_serve.contract.api import InferenceRequest
from rbee_serve.contract.errors import (
    AllSlotsBusy,
    ConnectionTimeout,
    MalformedResponse,
    NoWorkerAvailable,
    PromptTooLong,
    RbeeError,
    RequestTimeout,
    WorkerCrashed,
    WorkerDraining,
    WorkerLoading,
)
from rbee_serve.contract.settings import QueenSettings
from rbee_serve.queen.metrics import Metrics
from rbee_serve.queen.registry import Registry
from rbee_serve.queen.relay import Relay, Stream
from rbee_serve.queen.state import Queen
from rbee_serve.queen.upstream import Limits

TEXT = ["Once", " upon", " a", " time", ",", " ", "é", "…", " [DONE]", " end"]

Piece = bytes | Exception | float
Script = Callable[[dict[str, Any]], httpx.Response]


class Body(httpx.AsyncByteStream):
    """Bytes, failures and pauses (seconds) of one scripted answer; knows whether it was closed."""

    def __init__(self, *pieces: Piece) -> None:
        self.pieces = pieces
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                yield piece

    async def aclose(self) -> None:
        self.closed = True


def tokens(start: int, stop: int | None = None) -> list[bytes]:
    """Return the token events of TEXT; the id of token i is 100 + i."""
    return [events.encode(events.token(t, i, 100 + i)) for i, t in enumerate(TEXT)][start:stop]


STARTED = events.encode(events.started("w-1", "smollm2", seed=1, prompt_tokens=7, cached_tokens=0, worker_id="w"))
END = events.encode(events.end(len(TEXT), "EOS", prompt_ms=1, decode_ms=2, prompt_tokens=7))
BREAK = httpx.ReadError("connection reset")


def stream_of(*pieces: Piece) -> Script:
    """Return a worker that answers with these pieces, whatever it is asked."""
    return lambda _: httpx.Response(200, stream=Body(*pieces))


def whole(request: dict[str, Any]) -> httpx.Response:
    """A worker that does everything right, continuations included."""
    first = len(request.get("continue_from", {}).get("generated_ids", []))
    return httpx.Response(200, stream=Body(STARTED, *tokens(first), END, events.DONE))


def answers(status: int, body: bytes) -> Script:
    """A worker that answers with this status."""
    return lambda _: httpx.Response(status, stream=Body(body))


def refuses(error: RbeeError) -> Script:
    """A worker that answers with an error of ours."""
    return answers(error.status, json.dumps(error.envelope()).encode())


def breaks_after(n: int) -> Script:
    """A worker that dies after n tokens."""
    return stream_of(STARTED, *tokens(0, n), BREAK)


class Bench:
    """A relay over scripted workers lab0, lab1, ... which are preferred in this order."""

    def __init__(self, *scripts: Script, classes: list[str] | None = None, **limits: float) -> None:
        self.registry = Registry()
        self.asked: list[tuple[str, dict[str, Any], httpx.Headers]] = []
        self.bodies: list[httpx.AsyncByteStream] = []
        self._scripts = {f"lab{n}-cpu0": script for n, script in enumerate(scripts)}
        for n, worker_id in enumerate(self._scripts):
            record = {"hive_id": f"lab{n}", "slots_available": 4 - n, "continuation_class": (classes or ["A"] * 9)[n]}
            self.registry.beat(beat(worker_id, **record), 0.0)
        client = httpx.AsyncClient(transport=httpx.MockTransport(self._answer))
        seconds = Limits(**({"connect_s": 1.0, "first_byte_s": 1.0, "stall_s": 1.0} | limits))
        self.metrics = Metrics()
        self.relay = Relay(self.registry, client, "fleet", seconds, self.metrics, 60.0, lambda: 0.0)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        worker_id = request.url.host
        body = json.loads(request.content)
        self.asked.append((worker_id, body, request.headers))
        response = self._scripts[worker_id](body)
        self.bodies.append(response.stream)
        return response

    async def open(self, **request: Any) -> Stream:
        asked = InferenceRequest.model_validate({"prompt": "hi", "max_tokens": 10} | request)
        return await self.relay.open(asked, api="native", correlation_id="c-1")

    def run(self, **request: Any) -> list[dict[str, Any]]:
        """Return the client's events; checks that the books are settled afterwards."""

        async def read() -> list[dict[str, Any]]:
            stream = await self.open(**request)
            return [event async for batch in stream.events() for _, event in batch]

        try:
            return asyncio.run(read())
        finally:
            self.check_settled()

    def check_settled(self) -> None:
        assert [w.in_flight for w in self.registry] == [0] * len(self.registry)
        assert self.relay.streams == {}
        assert all(b.closed for b in self.bodies if isinstance(b, Body))

    @property
    def workers(self) -> list[str]:
        return [worker_id for worker_id, _, _ in self.asked]

    def failed(self) -> list[str]:
        return [w.id for w in self.registry if w.failed]


def text_of(seen: list[dict[str, Any]]) -> str:
    """Return the text; checks that the numbering has no gap."""
    numbered = [(e["i"], e["t"]) for e in seen if e["type"] == "token"]
    assert [i for i, _ in numbered] == list(range(len(numbered)))
    return "".join(t for _, t in numbered)


def kinds(seen: list[dict[str, Any]]) -> list[str]:
    """Return the types of the events, tokens once."""
    return [e["type"] for n, e in enumerate(seen) if e["type"] != "token" or seen[n - 1]["type"] != "token"]


def test_undisturbed_stream_passes_through() -> None:
    bench = Bench(whole)

    seen = bench.run()

    assert kinds(seen) == ["started", "token", "end"]
    assert text_of(seen) == "".join(TEXT)
    assert seen[-1] == {
        "type": "end", "tokens_out": 10, "prompt_tokens": 7, "stop_reason": "EOS", "prompt_time_ms": 1, "decode_time_ms": 2
    }  # fmt: skip


def test_worker_is_asked_with_token_correlation_id_and_a_fixed_seed() -> None:
    bench = Bench(whole)

    bench.run(model="smollm2", node="lab0", temperature=0.5)

    ((_, body, headers),) = bench.asked
    assert headers["authorization"] == "Bearer fleet"
    assert headers["x-correlation-id"] == "c-1"
    assert 0 <= body.pop("seed") < 2**32
    assert (body["prompt"], body["temperature"], body["stream"]) == ("hi", 0.5, True)
    assert body.keys().isdisjoint({"model", "node", "messages", "continue_from", "timeout_s"})


def test_started_names_the_request_as_the_queen_does() -> None:
    bench = Bench(whole)

    async def read() -> tuple[str, dict[str, Any]]:
        stream = await bench.open()
        seen = [e async for batch in stream.events() for _, e in batch]
        return stream.id, seen[0]

    request_id, started = asyncio.run(read())
    assert started["request_id"] == request_id


@pytest.mark.parametrize(
    ("script", "broken"),
    [
        (refuses(AllSlotsBusy("busy", slots_total=4, slots_busy=4)), False),
        (refuses(WorkerLoading("loading")), False),
        (refuses(WorkerDraining("draining")), False),
        (refuses(RbeeError("boom")), False),
        (answers(502, b"<html>"), False),
        (answers(418, b"teapot"), False),
        (answers(401, b"{}"), True),
        (stream_of(), True),
        (stream_of(BREAK), True),
        (stream_of(STARTED, BREAK), True),
        (stream_of(STARTED), True),
        (stream_of(STARTED, b"data: {broken\n\n"), True),
        (stream_of(STARTED, events.encode(events.error(WorkerCrashed("engine died")))), True),
        (stream_of(STARTED, events.encode(events.error(WorkerDraining("handing over")))), False),
    ],
)
def test_before_the_first_token_another_worker_takes_over_silently(script: Script, broken: bool) -> None:
    bench = Bench(script, whole)

    seen = bench.run()

    assert kinds(seen) == ["started", "token", "end"]
    assert text_of(seen) == "".join(TEXT)
    assert bench.workers == ["lab0-cpu0", "lab1-cpu0"]
    assert bench.failed() == (["lab0-cpu0"] if broken else [])
    assert bench.asked[0][1] == bench.asked[1][1]


def test_refused_connection_goes_to_another_worker_at_once() -> None:
    def refuse(_: dict[str, Any]) -> httpx.Response:
        raise httpx.ConnectError("refused")

    bench = Bench(refuse, whole)

    assert text_of(bench.run()) == "".join(TEXT)
    assert bench.workers == ["lab0-cpu0", "lab1-cpu0"]
    assert bench.failed() == ["lab0-cpu0"]


def test_kept_connection_that_was_just_closed_is_tried_again_on_a_fresh_one() -> None:
    answers = iter([httpx.RemoteProtocolError("server disconnected"), None])

    def once(request: dict[str, Any]) -> httpx.Response:
        if (failure := next(answers)) is not None:
            raise failure
        return whole(request)

    bench = Bench(once, whole)

    assert text_of(bench.run()) == "".join(TEXT)
    assert bench.workers == ["lab0-cpu0", "lab0-cpu0"]
    assert bench.failed() == []


@pytest.mark.parametrize(("classes", "mode"), [(["A", "A"], "exact"), (["A", "B"], "approximate")])
def test_broken_stream_goes_on_at_another_worker(classes: list[str], mode: str) -> None:
    bench = Bench(breaks_after(3), whole, classes=classes)

    seen = bench.run(seed=42)

    assert text_of(seen) == "".join(TEXT)
    assert [e for e in seen if e["type"] == "resumed"] == [{"type": "resumed", "mode": mode, "worker_id": "lab1-cpu0", "i": 3}]
    assert kinds(seen) == ["started", "token", "resumed", "token", "end"]
    assert bench.asked[1][1] == bench.asked[0][1] | {"continue_from": {"generated_ids": [100, 101, 102]}}
    assert bench.failed() == ["lab0-cpu0"]


def test_worker_of_the_same_class_is_preferred_for_a_continuation() -> None:
    bench = Bench(breaks_after(3), whole, whole, classes=["A", "B", "A"])

    seen = bench.run()

    assert bench.workers == ["lab0-cpu0", "lab2-cpu0"]
    assert [e["mode"] for e in seen if e["type"] == "resumed"] == ["exact"]


def test_stream_survives_two_workers() -> None:
    def second(request: dict[str, Any]) -> httpx.Response:
        assert len(request["continue_from"]["generated_ids"]) == 3
        return httpx.Response(200, stream=Body(STARTED, *tokens(3, 6), BREAK))

    bench = Bench(breaks_after(3), second, whole)

    assert text_of(bench.run()) == "".join(TEXT)
    assert bench.workers == ["lab0-cpu0", "lab1-cpu0", "lab2-cpu0"]


@pytest.mark.parametrize("wrong", [tokens(2, 3), tokens(4, 5), [events.encode({"type": "token", "t": "x", "i": 3})]])
def test_wrong_number_is_never_passed_on(wrong: list[bytes]) -> None:
    bench = Bench(stream_of(STARTED, *tokens(0, 3), *wrong, *tokens(5), END), whole)

    assert text_of(bench.run()) == "".join(TEXT)
    assert bench.failed() == ["lab0-cpu0"]


def test_worker_that_dies_between_last_token_and_end_needs_no_other() -> None:
    bench = Bench(breaks_after(3), whole)

    seen = bench.run(max_tokens=3)

    assert kinds(seen) == ["started", "token", "end"]
    assert (seen[-1]["stop_reason"], seen[-1]["tokens_out"]) == ("MAX_TOKENS", 3)
    assert bench.workers == ["lab0-cpu0"]


def test_worker_whose_context_is_too_small_to_go_on_is_passed_over() -> None:
    too_long = refuses(PromptTooLong("5000 > 4096", prompt_tokens=5000, context_tokens=4096))

    assert text_of(Bench(breaks_after(3), too_long, whole).run()) == "".join(TEXT)
    assert Bench(breaks_after(3), too_long).run()[-1]["code"] == WorkerCrashed.code


@pytest.mark.parametrize(("holds_to", "mode"), [(10, "exact"), (9, "approximate"), (0, "approximate")])
def test_continuation_is_exact_only_up_to_the_context_that_the_workers_state(holds_to: int, mode: str) -> None:
    bench = Bench(breaks_after(3), whole)  # 7 tokens of prompt + 3
    for worker in bench.registry:
        worker.record.model_info["exact_context_tokens"] = holds_to

    assert [e["mode"] for e in bench.run() if e["type"] == "resumed"] == [mode]


def test_client_s_own_continuation_goes_on_counting() -> None:
    seen = Bench(whole).run(continue_from={"generated_ids": [100, 101]}, max_tokens=10)

    assert [e["i"] for e in seen if e["type"] == "token"] == list(range(2, 10))
    assert seen[-1]["tokens_out"] == 10


def test_silent_worker_is_left() -> None:
    bench = Bench(stream_of(STARTED, *tokens(0, 2), 30.0), whole, stall_s=0.05)

    assert text_of(bench.run()) == "".join(TEXT)
    assert bench.failed() == ["lab0-cpu0"]


def test_pings_count_as_life() -> None:
    pings: list[Piece] = [events.PING, 0.02] * 10
    bench = Bench(stream_of(STARTED, *pings, *tokens(0), END), stall_s=0.1)

    assert text_of(bench.run()) == "".join(TEXT)


@pytest.mark.parametrize(
    ("script", "code"),
    [(breaks_after(3), WorkerCrashed.code), (stream_of(STARTED, *tokens(0, 3), 30.0), ConnectionTimeout.code)],
)
def test_without_another_worker_the_stream_ends_with_the_reason(script: Script, code: str) -> None:
    bench = Bench(script, stall_s=0.05)

    seen = bench.run()

    assert kinds(seen) == ["started", "token", "error"]
    assert text_of(seen) == "".join(TEXT[:3])
    assert (seen[-1]["code"], seen[-1]["tokens_out"], seen[-1]["correlation_id"]) == (code, 3, "c-1")


def test_pinned_request_is_not_moved_elsewhere() -> None:
    bench = Bench(breaks_after(3), whole)

    seen = bench.run(worker_id="lab0-cpu0")

    assert seen[-1]["code"] == WorkerCrashed.code
    assert bench.workers == ["lab0-cpu0"]


def test_error_of_the_request_is_not_retried() -> None:
    bench = Bench(refuses(PromptTooLong("5000 > 4096", prompt_tokens=5000, context_tokens=4096)), whole)

    with pytest.raises(PromptTooLong) as e:
        bench.run()

    assert e.value.details == {"prompt_tokens": 5000, "context_tokens": 4096}
    assert bench.workers == ["lab0-cpu0"]
    assert bench.failed() == []


def test_failure_of_the_generation_is_told_and_not_retried() -> None:
    failed = {"type": "error", "code": "INFERENCE_FAILED", "message": "llama_decode returned -3", "details": {}}
    bench = Bench(stream_of(STARTED, *tokens(0, 2), events.encode(failed), events.DONE), whole)

    seen = bench.run()

    assert seen[-1] == failed | {"tokens_out": 2}
    assert bench.workers == ["lab0-cpu0"]


def test_all_busy_is_told_with_totals() -> None:
    busy = refuses(AllSlotsBusy("busy", slots_total=4, slots_busy=4, retry_after_s=1))
    bench = Bench(busy, busy)

    with pytest.raises(AllSlotsBusy) as e:
        bench.run()

    assert e.value.details == {"slots_total": 8, "slots_busy": 8, "retry_after_s": 1}
    assert len(bench.asked) == 2


def test_fleet_token_that_differs_is_said_and_is_not_the_clients_fault() -> None:
    with pytest.raises(MalformedResponse, match="refused the queen's fleet token") as e:
        Bench(answers(401, b"{}")).run()

    assert e.value.status == 502


def test_nobody_there() -> None:
    with pytest.raises(NoWorkerAvailable):
        Bench().run()


def test_deadline_before_the_first_byte_is_408() -> None:
    async def slow() -> None:
        bench = Bench(whole)

        async def wait(_: httpx.Request) -> httpx.Response:
            await asyncio.sleep(30)
            raise AssertionError

        bench.relay.client = httpx.AsyncClient(transport=httpx.MockTransport(wait))
        with pytest.raises(RequestTimeout) as e:
            await bench.open(timeout_s=0.05)
        assert e.value.status == 408
        bench.check_settled()
        assert bench.failed() == []  # the client's impatience says nothing about the worker

    asyncio.run(slow())


def test_deadline_within_the_stream_is_an_event() -> None:
    bench = Bench(stream_of(STARTED, *tokens(0, 2), 30.0), whole, stall_s=10.0)

    seen = bench.run(timeout_s=0.1)

    assert (seen[-1]["type"], seen[-1]["code"], seen[-1]["tokens_out"]) == ("error", RequestTimeout.code, 2)
    assert bench.failed() == []


def test_deadline_is_passed_on_and_never_lengthened() -> None:
    async def ask(deadline: float | None, timeout_s: float | None) -> str | None:
        bench = Bench(whole)
        request = InferenceRequest(prompt="hi", timeout_s=timeout_s)
        stream = await bench.relay.open(request, api="native", correlation_id=None, deadline=deadline)
        await stream.aclose()
        told: str | None = bench.asked[0][2].get("x-request-deadline")
        return told

    now = time.time()
    assert asyncio.run(ask(None, None)) is None
    assert float(asyncio.run(ask(now + 5, None)) or 0) == pytest.approx(now + 5, abs=1)
    assert float(asyncio.run(ask(None, 5)) or 0) == pytest.approx(now + 5, abs=1)
    assert float(asyncio.run(ask(now + 50, 5)) or 0) == pytest.approx(now + 5, abs=1)
    assert float(asyncio.run(ask(now + 5, 50)) or 0) == pytest.approx(now + 5, abs=1)


def test_cancel_ends_the_stream_at_once_and_closes_the_worker_s() -> None:
    async def read() -> list[dict[str, Any]]:
        bench = Bench(stream_of(STARTED, *tokens(0, 2), 30.0), whole, stall_s=20.0)
        stream = await bench.open()
        seen = []
        async for batch in stream.events():
            seen += [event for _, event in batch]
            if len(seen) == 3:
                asyncio.get_running_loop().call_later(0.01, bench.relay.streams[stream.id].cancel)
        bench.check_settled()
        return seen

    began = time.perf_counter()
    seen = asyncio.run(read())

    assert (seen[-1]["type"], seen[-1]["stop_reason"], seen[-1]["tokens_out"]) == ("end", "CANCELLED", 2)
    assert time.perf_counter() - began < 5


def test_drain_waits_for_streams_then_tells_the_rest_why_and_takes_nothing_new() -> None:
    async def drain(*pieces: Piece) -> tuple[list[dict[str, Any]], Bench]:
        bench = Bench(stream_of(STARTED, *tokens(0, 2), *pieces), stall_s=20.0)
        queen = Queen(QueenSettings(drain_timeout_s=0.2), bench.registry, bench.metrics, bench.relay, lambda: 0.0)
        stream = await bench.open()
        draining = asyncio.ensure_future(queen.drain())
        seen = [event async for batch in stream.events() for _, event in batch]
        await draining
        with pytest.raises(NoWorkerAvailable, match="shutting down"):
            await queen.open_stream(Request({"type": "http"}), InferenceRequest(prompt="hi"), "native", None)
        bench.check_settled()
        return seen, bench

    ended, _ = asyncio.run(drain(0.05, *tokens(2), END))
    cut, bench = asyncio.run(drain(30.0))

    assert (text_of(ended), ended[-1]["type"]) == ("".join(TEXT), "end")
    assert (cut[-1]["type"], cut[-1]["code"], cut[-1]["tokens_out"]) == ("error", WorkerDraining.code, 2)
    assert bench.failed() == []


def test_stream_that_is_never_read_frees_the_slot_when_closed() -> None:
    async def leave() -> None:
        bench = Bench(stream_of(STARTED, 30.0))
        stream = await bench.open()
        assert next(iter(bench.registry)).in_flight == 1
        await stream.aclose()
        await stream.aclose()
        bench.check_settled()

    asyncio.run(leave())


def test_client_that_leaves_in_the_middle_closes_the_worker_s_stream() -> None:
    async def leave() -> None:
        bench = Bench(stream_of(STARTED, *tokens(0, 2), 30.0), stall_s=20.0)
        stream = await bench.open()

        two_tokens = asyncio.Event()

        async def read() -> None:
            async for _ in stream.events():
                if len(stream.ids) == 2:
                    two_tokens.set()

        reading = asyncio.ensure_future(read())
        await two_tokens.wait()
        reading.cancel()
        await asyncio.wait((reading,))
        bench.check_settled()
        assert stream.outcome == "disconnected"

    asyncio.run(leave())


@settings(deadline=None)
@given(st.integers(0, len(TEXT)), st.integers(1, 200), st.integers(1, 200), st.booleans())
def test_cut_anywhere_the_client_gets_every_token_once(cut: int, first_size: int, second_size: int, same: bool) -> None:
    """Whatever the index of the break and however the network cuts the bytes."""

    def in_pieces(data: bytes, size: int) -> list[Piece]:
        return [data[n : n + size] for n in range(0, len(data), size)]

    def second(request: dict[str, Any]) -> httpx.Response:
        first = len(request.get("continue_from", {}).get("generated_ids", []))
        data = STARTED + b"".join(tokens(first)) + END + events.DONE
        return httpx.Response(200, stream=Body(*in_pieces(data, second_size)))

    broken = stream_of(*in_pieces(STARTED + b"".join(tokens(0, cut)) + b'event: token\ndata: {"ty', first_size), BREAK)
    bench = Bench(broken, second, classes=["A", "A" if same else "B"])

    seen = bench.run(max_tokens=len(TEXT) + 1)

    assert text_of(seen) == "".join(TEXT)
    assert [e["id"] for e in seen if e["type"] == "token"] == [100 + n for n in range(len(TEXT))]
    assert len([e for e in seen if e["type"] == "resumed"]) == (1 if cut else 0)
    assert seen[-1]["tokens_out"] == len(TEXT)
