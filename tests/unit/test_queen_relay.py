"""The relay against scripted workers: what is retried, what is continued, what the client sees."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

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
    InferenceFailed,
    InvalidRequest,
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
from rbee_serve.queen.http_client import Answer, BrokenError
from rbee_serve.queen.metrics import Metrics
from rbee_serve.queen.registry import Registry
from rbee_serve.queen.relay import Relay, Stream
from rbee_serve.queen.state import Queen
from rbee_serve.queen.upstream import Limits

TEXT = ["Once", " upon", " a", " time", ",", " ", "é", "…", " [DONE]", " end"]

Piece = bytes | Exception | float


@dataclass
class Reply:
    """A scripted answer."""

    status: int
    body: Body


Script = Callable[[dict[str, Any]], Reply]


class Body:
    """Bytes, failures and pauses (seconds) of one scripted answer; knows whether it was closed."""

    def __init__(self, *pieces: Piece) -> None:
        self.pieces = pieces
        self.closed = False

    async def play(self, answer: Answer) -> None:
        for piece in self.pieces:
            if isinstance(piece, BrokenError):
                answer.on_broken(piece)
                return
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                assert isinstance(piece, bytes)
                answer.on_data(piece)
                await asyncio.sleep(0)
        answer.on_end()


class ScriptedClient:
    """What PooledClient is to real workers. ``answer(worker id, body, headers)`` may raise BrokenError."""

    def __init__(self, answer: Callable[[str, dict[str, Any], Mapping[str, str]], Awaitable[Reply]]) -> None:
        self.answer = answer
        self.players: list[asyncio.Task[None]] = []

    async def send(self, method: str, url: str, body: bytes, headers: Mapping[str, str], *, fresh: bool = False) -> Answer:
        reply = await self.answer(urlsplit(url).hostname or "", json.loads(body), headers)

        def closed(complete: bool) -> None:
            reply.body.closed = True
            player.cancel()

        answer = Answer(closed)
        answer.on_head(reply.status)
        player = asyncio.ensure_future(reply.body.play(answer))
        self.players.append(player)
        return answer

    async def aclose(self) -> None:
        pass


def tokens(start: int, stop: int | None = None) -> list[bytes]:
    """Return the token events of TEXT; the id of token i is 100 + i."""
    return [events.encode(events.token(t, i, 100 + i)) for i, t in enumerate(TEXT)][start:stop]


STARTED = events.encode(events.started("w-1", "smollm2", seed=1, prompt_tokens=7, cached_tokens=0, worker_id="w"))
END = events.encode(events.end(len(TEXT), "EOS", prompt_ms=1, decode_ms=2, prompt_tokens=7))
BREAK = BrokenError("connection reset")


def stream_of(*pieces: Piece) -> Script:
    """Return a worker that answers with these pieces, whatever it is asked."""
    return lambda _: Reply(200, Body(*pieces))


def whole(request: dict[str, Any]) -> Reply:
    """A worker that does everything right, continuations included."""
    first = len(request.get("continue_from", {}).get("generated_ids", []))
    return Reply(200, Body(STARTED, *tokens(first), END, events.DONE))


def answers(status: int, body: bytes) -> Script:
    """A worker that answers with this status."""
    return lambda _: Reply(status, Body(body))


def refuses(error: RbeeError) -> Script:
    """A worker that answers with an error of ours."""
    return answers(error.status, json.dumps(error.envelope()).encode())


def breaks_after(n: int) -> Script:
    """A worker that dies after n tokens."""
    return stream_of(STARTED, *tokens(0, n), BREAK)


class Bench:
    """A relay over scripted workers lab0, lab1, ... which are preferred in this order."""

    def __init__(
        self,
        *scripts: Script,
        classes: list[str] | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        queue_max: int = 0,
        **limits: float,
    ) -> None:
        self.registry = Registry()
        self.asked: list[tuple[str, dict[str, Any], Mapping[str, str]]] = []
        self.bodies: list[Body] = []
        self._scripts = {f"lab{n}-cpu0": script for n, script in enumerate(scripts)}
        for n, worker_id in enumerate(self._scripts):
            record = {"hive_id": f"lab{n}", "slots_available": 4 - n, "continuation_class": (classes or ["A"] * 9)[n]}
            self.registry.beat(beat(worker_id, **record), 0.0)
        seconds = Limits(**({"connect_s": 1.0, "first_byte_s": 1.0, "stall_s": 1.0} | limits))
        self.metrics = Metrics()
        self.relay = Relay(
            self.registry, ScriptedClient(self._answer), "fleet", seconds, self.metrics, 60.0, clock, queue_max=queue_max
        )

    async def _answer(self, worker_id: str, body: dict[str, Any], headers: Mapping[str, str]) -> Reply:
        self.asked.append((worker_id, body, {k.lower(): v for k, v in headers.items()}))
        reply = self._scripts[worker_id](body)
        self.bodies.append(reply.body)
        return reply

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
        assert all(b.closed for b in self.bodies)

    @property
    def workers(self) -> list[str]:
        return [worker_id for worker_id, _, _ in self.asked]

    def failed(self) -> list[str]:
        return [w.id for w in self.registry if w.failed]

    def failovers(self) -> dict[tuple[str, str], float]:
        """Return what the metrics counted, by cause and mode."""
        (family,) = (f for f in self.metrics.failovers.collect())
        return {(s.labels["cause"], s.labels["mode"]): s.value for s in family.samples if s.name.endswith("_total")}


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


@pytest.mark.X14
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
    def refuse(_: dict[str, Any]) -> Reply:
        raise BrokenError("refused")

    bench = Bench(refuse, whole)

    assert text_of(bench.run()) == "".join(TEXT)
    assert bench.workers == ["lab0-cpu0", "lab1-cpu0"]
    assert bench.failed() == ["lab0-cpu0"]


def test_kept_connection_that_was_just_closed_is_tried_again_on_a_fresh_one() -> None:
    answers = iter([BrokenError("closed", stale=True), None])

    def once(request: dict[str, Any]) -> Reply:
        if (failure := next(answers)) is not None:
            raise failure
        return whole(request)

    bench = Bench(once, whole)

    assert text_of(bench.run()) == "".join(TEXT)
    assert bench.workers == ["lab0-cpu0", "lab0-cpu0"]
    assert bench.failed() == []
    first, second = (headers["x-request-id"] for _, _, headers in bench.asked)
    assert second == f"{first}-again", "a worker that was cut off may have the first one still"


@pytest.mark.X14
@pytest.mark.parametrize(("classes", "mode"), [(["A", "A"], "exact"), (["A", "B"], "approximate")])
def test_broken_stream_goes_on_at_another_worker(classes: list[str], mode: str) -> None:
    bench = Bench(breaks_after(3), whole, classes=classes)

    seen = bench.run(seed=42)

    assert text_of(seen) == "".join(TEXT)
    assert [e for e in seen if e["type"] == "resumed"] == [{"type": "resumed", "mode": mode, "worker_id": "lab1-cpu0", "i": 3}]
    assert kinds(seen) == ["started", "token", "resumed", "token", "end"]
    assert bench.asked[1][1] == bench.asked[0][1] | {"continue_from": {"generated_ids": [100, 101, 102]}}
    assert bench.failed() == ["lab0-cpu0"]


CHAT: dict[str, Any] = {"prompt": None, "messages": [{"role": "user", "content": "hi"}]}


def started_from(digest: str | None, rendered_at: str | None = None) -> bytes:
    said = {"prompt_digest": digest, "rendered_at": rendered_at}
    told = {name: value for name, value in said.items() if value is not None}
    return events.encode(events.started("w-1", "smollm2", seed=1, prompt_tokens=7, cached_tokens=0, worker_id="w", prompt=told))


@pytest.mark.X14
@pytest.mark.parametrize(
    ("first", "second", "mode"),
    [("d1", "d1", "exact"), ("d1", "d2", "approximate"), ("d1", None, "approximate"), (None, None, "approximate")],
)
@pytest.mark.parametrize("late_s", [0.0, 0.3])
def test_chat_goes_on_exactly_only_from_the_same_prompt(first: str | None, second: str | None, mode: str, late_s: float) -> None:
    """Also where the second worker says only later from which prompt it goes on."""
    waits: list[Piece] = [events.PING, late_s] if late_s else []
    rest = stream_of(*waits, started_from(second), *tokens(3), END, events.DONE)
    bench = Bench(stream_of(started_from(first), *tokens(0, 3), BREAK), rest)

    seen = bench.run(**CHAT)

    assert kinds(seen) == ["started", "token", "resumed", "token", "end"]
    assert text_of(seen) == "".join(TEXT)
    assert [e["mode"] for e in seen if e["type"] == "resumed"] == [mode]
    assert bench.failovers() == {("crash", mode): 1.0}


@pytest.mark.X14
def test_who_goes_on_is_told_when_the_first_one_has_rendered_the_messages() -> None:
    at = "2026-12-31T23:59:59+01:00"
    second = stream_of(started_from("d1", at), *tokens(3, 6), BREAK)
    third = stream_of(started_from("d1", at), *tokens(6), END, events.DONE)
    bench = Bench(stream_of(started_from("d1", at), *tokens(0, 3), BREAK), second, third)

    seen = bench.run(**CHAT)

    assert [body["continue_from"]["rendered_at"] for _, body, _ in bench.asked[1:]] == [at, at]
    assert "continue_from" not in bench.asked[0][1]
    assert [e["mode"] for e in seen if e["type"] == "resumed"] == ["exact", "exact"]


@pytest.mark.parametrize("made", [3, 0])
def test_worker_that_is_not_upgraded_yet_goes_on_without_the_time_of_the_prompt(made: int) -> None:
    at = "2026-12-31T23:59:59+01:00"

    def old(request: dict[str, Any]) -> Reply:
        if "rendered_at" in request.get("continue_from", {}):
            return refuses(InvalidRequest("continue_from.rendered_at: no such field", field="continue_from.rendered_at"))(request)
        return Reply(200, Body(STARTED, *tokens(made, 6), BREAK))

    third = stream_of(started_from("d1", at), *tokens(6), END, events.DONE)
    bench = Bench(stream_of(started_from("d1", at), *tokens(0, made), BREAK), old, third)

    seen = bench.run(**CHAT)

    assert text_of(seen) == "".join(TEXT)
    assert bench.workers == ["lab0-cpu0", "lab1-cpu0", "lab1-cpu0", "lab2-cpu0"]
    assert bench.asked[2][1].get("continue_from") == ({"generated_ids": [100, 101, 102]} if made else None)
    assert bench.asked[3][1]["continue_from"]["rendered_at"] == at
    assert {e["mode"] for e in seen if e["type"] == "resumed"} == {"approximate"}
    assert bench.failed() == ["lab0-cpu0", "lab1-cpu0"]


def test_client_s_own_continuation_tells_when_its_prompt_was_rendered() -> None:
    at = "2026-12-31T23:59:59+01:00"
    bench = Bench(stream_of(started_from("d1", at), *tokens(2), END, events.DONE))

    bench.run(**CHAT, continue_from={"generated_ids": [100, 101], "rendered_at": at})

    assert bench.asked[0][1]["continue_from"] == {"generated_ids": [100, 101], "rendered_at": at}


def test_worker_that_takes_a_stream_over_and_dies_before_it_starts_is_not_heard_of() -> None:
    bench = Bench(breaks_after(3), stream_of(events.PING, BREAK), whole)

    seen = bench.run()

    assert text_of(seen) == "".join(TEXT)
    assert [(e["worker_id"], e["mode"]) for e in seen if e["type"] == "resumed"] == [("lab2-cpu0", "exact")]
    assert bench.failed() == ["lab0-cpu0", "lab1-cpu0"]


def test_worker_of_the_same_class_is_preferred_for_a_continuation() -> None:
    bench = Bench(breaks_after(3), whole, whole, classes=["A", "B", "A"])

    seen = bench.run()

    assert bench.workers == ["lab0-cpu0", "lab2-cpu0"]
    assert [e["mode"] for e in seen if e["type"] == "resumed"] == ["exact"]


def test_stream_survives_two_workers() -> None:
    def second(request: dict[str, Any]) -> Reply:
        assert len(request["continue_from"]["generated_ids"]) == 3
        return Reply(200, Body(STARTED, *tokens(3, 6), BREAK))

    bench = Bench(breaks_after(3), second, whole)

    assert text_of(bench.run()) == "".join(TEXT)
    assert bench.workers == ["lab0-cpu0", "lab1-cpu0", "lab2-cpu0"]


@pytest.mark.parametrize("wrong", [tokens(2, 3), tokens(4, 5), [events.encode({"type": "token", "t": "x", "i": 3})]])
def test_wrong_number_is_never_passed_on(wrong: list[bytes]) -> None:
    bench = Bench(stream_of(STARTED, *tokens(0, 3), *wrong, *tokens(5), END), whole)

    assert text_of(bench.run()) == "".join(TEXT)
    assert bench.failed() == ["lab0-cpu0"]


def ends_with(reason: str, **more: Any) -> Script:
    """A worker that has nothing to go on with."""
    return stream_of(
        STARTED, events.encode(events.end(3, reason, prompt_ms=0, decode_ms=0, prompt_tokens=7, **more)), events.DONE
    )


def test_worker_that_dies_between_last_token_and_end_leaves_another_to_say_which_end_it_was() -> None:
    bench = Bench(breaks_after(3), ends_with("STOP_SEQUENCE", stop_sequence=" a"), classes=["A", "B"])

    seen = bench.run(max_tokens=3, stop=[" a"])

    assert kinds(seen) == ["started", "token", "end"]
    assert (seen[-1]["stop_reason"], seen[-1]["stop_sequence"], seen[-1]["tokens_out"]) == ("STOP_SEQUENCE", " a", 3)
    assert bench.asked[1][1]["continue_from"] == {"generated_ids": [100, 101, 102]}
    assert bench.failed() == ["lab0-cpu0"]


def test_worker_that_dies_at_the_end_of_its_context_leaves_another_to_say_which_end_it_was() -> None:
    """7 tokens of prompt and 3 of the answer: one more than the context holds, and the last needs no room."""
    bench = Bench(breaks_after(3), ends_with("EOS"))
    for worker in bench.registry:
        worker.record.context_tokens = 9

    seen = bench.run()

    assert (seen[-1]["stop_reason"], seen[-1]["tokens_out"]) == ("EOS", 3)
    assert bench.asked[1][1]["max_tokens"] == 3, "a larger context elsewhere must not add to the answer"


@pytest.mark.parametrize(
    "others",
    [
        [],
        [refuses(AllSlotsBusy("busy", slots_total=4, slots_busy=4))],
        [refuses(PromptTooLong("5000 > 4096", prompt_tokens=5000, context_tokens=4096))],
        [stream_of(STARTED, BREAK), stream_of(STARTED, events.encode(events.error(InferenceFailed("decode failed"))))],
    ],
)
def test_where_nobody_says_which_end_it_was_all_tokens_have_come(others: list[Script]) -> None:
    bench = Bench(breaks_after(3), *others)

    seen = bench.run(max_tokens=3)

    assert kinds(seen) == ["started", "token", "end"]
    assert (seen[-1]["stop_reason"], seen[-1]["tokens_out"]) == ("MAX_TOKENS", 3)
    assert len(bench.workers) == 1 + len(others)


@pytest.mark.parametrize("dies", [[STARTED, BREAK], [STARTED, events.encode(events.error(InferenceFailed("decode failed")))]])
def test_all_tokens_have_come_also_where_the_next_worker_has_a_larger_context(dies: list[Piece]) -> None:
    bench = Bench(breaks_after(3), stream_of(*dies), ends_with("EOS"))
    for worker, context in zip(bench.registry, (9, 20, 20), strict=True):
        worker.record.context_tokens = context

    seen = bench.run(failover="off")

    assert kinds(seen) == ["started", "token", "end"]
    assert (seen[-1]["stop_reason"], seen[-1]["tokens_out"]) == ("EOS", 3)


def test_all_tokens_have_come_also_where_the_time_is_up_before_anybody_says_which_end_it_was() -> None:
    seen = Bench(breaks_after(3), stream_of(STARTED, 30.0)).run(max_tokens=3, timeout_s=0.2)

    assert kinds(seen) == ["started", "token", "end"]
    assert (seen[-1]["stop_reason"], seen[-1]["tokens_out"]) == ("MAX_TOKENS", 3)


def test_worker_whose_context_is_too_small_to_go_on_is_passed_over() -> None:
    too_long = refuses(PromptTooLong("5000 > 4096", prompt_tokens=5000, context_tokens=4096))

    assert text_of(Bench(breaks_after(3), too_long, whole).run()) == "".join(TEXT)
    assert Bench(breaks_after(3), too_long).run()[-1]["code"] == WorkerCrashed.code


@pytest.mark.parametrize(("holds_to", "mode"), [(17, "exact"), (16, "approximate"), (0, "approximate")])
def test_continuation_is_exact_only_up_to_the_context_that_the_workers_state(holds_to: int, mode: str) -> None:
    bench = Bench(breaks_after(3), whole)  # 7 tokens of prompt + at most 10
    for worker in bench.registry:
        worker.record.model_info["exact_context_tokens"] = holds_to

    assert [e["mode"] for e in bench.run() if e["type"] == "resumed"] == [mode]


@pytest.mark.parametrize(("contexts", "mode"), [((16, 16), "exact"), ((16, 17), "approximate"), ((17, 17), "approximate")])
def test_stream_can_not_be_longer_than_equal_contexts(contexts: tuple[int, int], mode: str) -> None:
    bench = Bench(breaks_after(3), whole)  # 7 tokens of prompt + at most 10
    for worker, context in zip(bench.registry, contexts, strict=True):
        worker.record.context_tokens = context
        worker.record.model_info["exact_context_tokens"] = 16

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


@pytest.mark.X14
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


@pytest.mark.E31
def test_deadline_before_the_first_byte_is_408() -> None:
    async def slow() -> None:
        bench = Bench(whole)

        async def wait(*_: object) -> Reply:
            await asyncio.sleep(30)
            raise AssertionError

        bench.relay.client = ScriptedClient(wait)
        with pytest.raises(RequestTimeout) as e:
            await bench.open(timeout_s=0.05)
        assert e.value.status == 408
        bench.check_settled()
        assert bench.failed() == []  # the client's impatience says nothing about the worker

    asyncio.run(slow())


@pytest.mark.E31
def test_deadline_within_the_stream_is_an_event() -> None:
    bench = Bench(stream_of(STARTED, *tokens(0, 2), 30.0), whole, stall_s=10.0)

    seen = bench.run(timeout_s=0.1)

    assert (seen[-1]["type"], seen[-1]["code"], seen[-1]["tokens_out"]) == ("error", RequestTimeout.code, 2)
    assert bench.failed() == []


@pytest.mark.E31
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


@pytest.mark.E09
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


@pytest.mark.X14
@settings(deadline=None)
@given(st.integers(0, len(TEXT)), st.integers(1, 200), st.integers(1, 200), st.booleans())
def test_cut_anywhere_the_client_gets_every_token_once(cut: int, first_size: int, second_size: int, same: bool) -> None:
    """Whatever the index of the break and however the network cuts the bytes."""

    def in_pieces(data: bytes, size: int) -> list[Piece]:
        return [data[n : n + size] for n in range(0, len(data), size)]

    def second(request: dict[str, Any]) -> Reply:
        first = len(request.get("continue_from", {}).get("generated_ids", []))
        data = STARTED + b"".join(tokens(first)) + END + events.DONE
        return Reply(200, Body(*in_pieces(data, second_size)))

    broken = stream_of(*in_pieces(STARTED + b"".join(tokens(0, cut)) + b'event: token\ndata: {"ty', first_size), BREAK)
    bench = Bench(broken, second, classes=["A", "A" if same else "B"])

    seen = bench.run(max_tokens=len(TEXT) + 1)

    assert text_of(seen) == "".join(TEXT)
    assert [e["id"] for e in seen if e["type"] == "token"] == [100 + n for n in range(len(TEXT))]
    assert len([e for e in seen if e["type"] == "resumed"]) == (1 if cut else 0)
    assert seen[-1]["tokens_out"] == len(TEXT)


# --- hung, drained, full, asleep ------------------------------------------------------------------------------------


def test_pings_do_not_hide_a_worker_that_hangs_while_it_decodes() -> None:
    pings: list[Piece] = [events.PING, 0.02] * 50
    bench = Bench(stream_of(STARTED, *tokens(0, 2), *pings), whole, stall_s=0.1)

    seen = bench.run()

    assert text_of(seen) == "".join(TEXT)
    assert bench.failed() == ["lab0-cpu0"]
    assert bench.failovers() == {("timeout", "exact"): 1.0}


@pytest.mark.E08
def test_worker_whose_beats_are_lost_ends_what_it_has_and_gets_nothing_new() -> None:
    now = [0.0]

    async def run() -> None:
        bench = Bench(whole, clock=lambda: now[0])
        stream = await bench.open()
        seen: list[dict[str, Any]] = []
        async for batch in stream.events():
            seen += [event for _, event in batch]
            if now[0] == 0.0:
                now[0] = bench.registry.stale_after_s + 1
                with pytest.raises(NoWorkerAvailable, match="silent"):
                    await bench.open(stream=False)
        assert text_of(seen) == "".join(TEXT)
        assert (seen[-1]["type"], bench.workers) == ("end", ["lab0-cpu0"])
        bench.registry.sweep(bench.registry.forget_after_s + 1)
        assert len(bench.registry) == 0
        assert all(body.closed for body in bench.bodies)

    asyncio.run(run())


def test_slow_client_is_no_hung_worker() -> None:
    """Nobody reads for longer than the worker may be silent; its tokens were there all along."""

    async def read() -> list[dict[str, Any]]:
        bench = Bench(stream_of(STARTED, *tokens(0, 5), 0.02, *tokens(5), END, events.DONE), stall_s=0.2)
        stream = await bench.open()
        seen = []
        async for batch in stream.events():
            seen += [event for _, event in batch]
            await asyncio.sleep(0.3)
        bench.check_settled()
        return seen

    assert text_of(asyncio.run(read())) == "".join(TEXT)


def test_without_failover_a_broken_stream_ends_and_one_that_has_not_begun_is_moved() -> None:
    bench = Bench(breaks_after(3), whole)
    seen = bench.run(failover="off")

    assert (text_of(seen), seen[-1]["code"]) == ("".join(TEXT[:3]), WorkerCrashed.code)
    assert bench.workers == ["lab0-cpu0"]
    assert bench.failovers() == {("crash", "off"): 1.0}
    assert text_of(Bench(stream_of(STARTED, BREAK), whole).run(failover="off")) == "".join(TEXT)


def test_stream_that_lost_its_worker_waits_for_a_slot_when_the_others_are_full() -> None:
    async def read() -> list[dict[str, Any]]:
        bench = Bench(breaks_after(3), whole)
        other = bench.registry.get("lab1-cpu0", 0.0)
        for _ in range(4):
            bench.registry.acquire(other)
            bench.relay.queue.started("smollm2", "")
        stream = await bench.open()
        seen = []
        async for batch in stream.events():
            seen += [event for _, event in batch]
            if seen[-1]["type"] == "queued":
                bench.relay.queue.ended("smollm2", "", 1.0)
                bench.registry.release(other)
        for _ in range(3):
            bench.relay.queue.ended("smollm2", "", 1.0)
            bench.registry.release(other)
        bench.check_settled()
        return seen

    seen = asyncio.run(read())
    assert kinds(seen) == ["started", "token", "queued", "resumed", "token", "end"]
    assert text_of(seen) == "".join(TEXT)


def drains(bench: Bench, worker_id: str) -> None:
    """The worker says that it drains."""
    record = bench.registry.get(worker_id, 0.0).record.model_dump(mode="json")
    fields = {k: v for k, v in record.items() if k not in ("id", "status", "started_at")}
    bench.registry.beat(beat(worker_id, seq=1, **fields, status="draining"), 0.0)
    bench.relay.heard_of(bench.registry.get(worker_id, 0.0))


def drained(*scripts: Script, **more: Any) -> tuple[list[dict[str, Any]], Bench]:
    """Return what the client sees when lab0 begins to drain after the third token."""

    async def read() -> tuple[list[dict[str, Any]], Bench]:
        bench = Bench(*scripts, classes=more.pop("classes", None))
        stream = await bench.open(**more)
        seen = []
        async for batch in stream.events():
            seen += [event for _, event in batch]
            if len(stream.ids) == 3 and stream.worker is not None and stream.worker.id == "lab0-cpu0":
                drains(bench, "lab0-cpu0")
        bench.check_settled()
        return seen, bench

    return asyncio.run(read())


def three_then_slow(_: dict[str, Any]) -> Reply:
    return Reply(200, Body(STARTED, *tokens(0, 3), 0.3, *tokens(3), END, events.DONE))


def test_drain_moves_a_running_stream_at_once() -> None:
    seen, bench = drained(three_then_slow, whole)

    assert text_of(seen) == "".join(TEXT)
    assert [(e["mode"], e["i"]) for e in seen if e["type"] == "resumed"] == [("exact", 3)]
    assert bench.workers == ["lab0-cpu0", "lab1-cpu0"]
    assert bench.failed() == []
    assert bench.failovers() == {("drain", "exact"): 1.0}


def test_drain_moves_a_chat_to_whom_renders_the_same_prompt() -> None:
    first = stream_of(started_from("d1"), *tokens(0, 3), 0.3, *tokens(3), END, events.DONE)
    seen, bench = drained(first, stream_of(started_from("d1"), *tokens(3), END), **CHAT)

    assert text_of(seen) == "".join(TEXT)
    assert [(e["mode"], e["i"]) for e in seen if e["type"] == "resumed"] == [("exact", 3)]
    assert bench.workers == ["lab0-cpu0", "lab1-cpu0"]


@pytest.mark.parametrize(
    ("scripts", "more"),
    [
        ([three_then_slow], {}),
        ([three_then_slow, whole], {"classes": ["A", "B"]}),  # it would not go on exactly as it began
        ([three_then_slow, refuses(AllSlotsBusy("busy", slots_total=4, slots_busy=4))], {}),
        ([three_then_slow, stream_of()], {}),
        ([three_then_slow, stream_of(started_from("d2"), *tokens(3), END)], CHAT),  # it renders another prompt
        ([three_then_slow, whole], {"failover": "off"}),
        ([three_then_slow, whole], {"worker_id": "lab0-cpu0"}),
    ],
)
def test_drain_lets_a_stream_end_where_it_is_when_nobody_goes_on_exactly(scripts: list[Script], more: dict[str, Any]) -> None:
    seen, _ = drained(*scripts, **more)

    assert text_of(seen) == "".join(TEXT)
    assert kinds(seen) == ["started", "token", "end"]


def test_worker_that_failed_is_used_again_once_it_has_recovered_and_others_have_made_tokens() -> None:
    """Two workers that fail in turn: the stream goes back to the first."""

    def first(request: dict[str, Any]) -> Reply:
        return breaks_after(3)(request) if "continue_from" not in request else whole(request)

    def second(request: dict[str, Any]) -> Reply:
        bench.registry.beat(beat("lab0-cpu0", seq=1, hive_id="lab0", continuation_class="A"), 0.0)
        return Reply(200, Body(STARTED, *tokens(3, 6), BREAK))

    bench = Bench(first, second)

    assert text_of(bench.run()) == "".join(TEXT)
    assert bench.workers == ["lab0-cpu0", "lab1-cpu0", "lab0-cpu0"]


def test_request_that_waits_gets_its_turn_and_is_told() -> None:
    async def read() -> tuple[list[dict[str, Any]], int]:
        bench = Bench(stream_of(STARTED, *tokens(0), 0.05, END, events.DONE), queue_max=10)
        streams = [await bench.open() for _ in range(4)]
        waiting = await bench.open()
        assert (waiting.worker, waiting.placement) == (None, None)

        async def events_of(stream: Stream) -> list[dict[str, Any]]:
            return [e async for batch in stream.events() for _, e in batch]

        seen = await asyncio.gather(*map(events_of, [waiting, *streams]))
        bench.check_settled()
        return seen[0], len(bench.asked)

    seen, asked = asyncio.run(read())
    assert (kinds(seen), asked) == (["queued", "started", "token", "end"], 5)
    assert seen[0]["position"] == 1
    assert text_of(seen) == "".join(TEXT)


def test_wait_in_the_queue_ends_with_the_deadline_or_its_own_limit_and_leaves_no_trace() -> None:
    async def wait(**request: Any) -> list[dict[str, Any]]:
        bench = Bench(stream_of(STARTED, *tokens(0), 5.0), queue_max=10, clock=time.monotonic, stall_s=20.0)
        for worker in bench.registry:
            worker.seen_at = time.monotonic()
        streams = [await bench.open() for _ in range(4)]
        waiting = await bench.open(**request)
        seen = [e async for batch in waiting.events() for _, e in batch]
        assert bench.relay.queue.depth() == {}
        for stream in streams:
            await stream.aclose()
        bench.check_settled()
        return seen

    late, impatient = asyncio.run(wait(timeout_s=0.1)), asyncio.run(wait(queue_timeout_s=0.1))
    assert (late[-1]["type"], late[-1]["code"]) == ("error", RequestTimeout.code)
    assert (impatient[-1]["type"], impatient[-1]["code"]) == ("error", AllSlotsBusy.code)


def test_whole_answer_waits_too_and_one_that_will_not_wait_is_refused() -> None:
    async def ask() -> None:
        bench = Bench(stream_of(STARTED, *tokens(0), 0.1, END, events.DONE), queue_max=10)
        streams = [await bench.open() for _ in range(4)]
        with pytest.raises(AllSlotsBusy):
            await bench.open(queue_timeout_s=0)
        waiting = asyncio.ensure_future(bench.open(stream=False))

        async def drain(stream: Stream) -> None:
            async for _ in stream.events():
                pass

        await asyncio.gather(*map(drain, streams))
        stream = await asyncio.wait_for(waiting, 5)
        assert stream.worker is not None
        await stream.aclose()
        bench.check_settled()

    asyncio.run(ask())


def test_client_that_leaves_the_queue_leaves_no_trace() -> None:
    async def leave() -> None:
        bench = Bench(stream_of(STARTED, *tokens(0), 5.0), queue_max=10, stall_s=20.0)
        streams = [await bench.open() for _ in range(4)]
        for way in ("unread", "cancelled", "opening"):
            if way == "opening":
                opening = asyncio.ensure_future(bench.open(stream=False))
                await asyncio.sleep(0.02)
                opening.cancel()
                await asyncio.wait((opening,))
            else:
                waiting = await bench.open()
                assert bench.relay.queue.depth() == {"smollm2": 1}
                if way == "cancelled":
                    waiting.cancel()
                    seen = [e async for batch in waiting.events() for _, e in batch]
                    assert seen[-1]["stop_reason"] == "CANCELLED"
                await waiting.aclose()
            assert bench.relay.queue.depth() == {}
        for stream in streams:
            await stream.aclose()
        bench.check_settled()

    asyncio.run(leave())
