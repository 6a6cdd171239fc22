"""The worker's front over a scripted engine: statuses, streams, cancellation, deadlines, drain."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from asgi import Exchange
from scripted_engine import ScriptedEngine, until

from rbee_serve.contract.api import WorkerState
from rbee_serve.contract.errors import ModelFileInvalid, PromptTooLong
from rbee_serve.contract.events import PING
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.app import create_app
from rbee_serve.worker.engine.protocol import EngineInfo, LoadProgress
from rbee_serve.worker.lifecycle import Lifecycle
from rbee_serve.worker.state import Worker

TOKEN = "fleet-token"
P: dict[str, Any] = {"prompt": "Hello", "max_tokens": 10}


class Front:
    """A worker's application with its lifespan, and requests into it."""

    def __init__(self, engine: ScriptedEngine, **settings: Any) -> None:
        values = {"name": "cpu0", "hive": "lab1", "model_id": "m", "model_path": Path("/m.gguf"), "slots": engine.slots}
        self.settings = WorkerSettings.from_values(values | settings, {}, origin="test")
        self.left = asyncio.Event()
        self.engine = engine
        self.app = create_app(self.settings, engine, fleet_token=TOKEN, leave=self.left.set)
        self.worker: Worker = self.app.state.worker
        self.lifecycle: Lifecycle = self.app.state.lifecycle

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Exchange:
        raw = b"" if body is None else json.dumps(body).encode()
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        return Exchange(self.app, method, path, headers={"Authorization": f"Bearer {TOKEN}"} | named, body=[raw]).start()

    async def get(self, path: str) -> Exchange:
        return await self.ask("GET", path).finish()

    async def infer(self, body: Any = None, **headers: str) -> Exchange:
        return await self.ask("POST", "/v1/inference", P if body is None else body, **headers).finish()


def with_front(
    test: Callable[[Front], Awaitable[None]], engine: Callable[[], ScriptedEngine] = ScriptedEngine, **settings: Any
) -> None:
    @asynccontextmanager
    async def front() -> AsyncIterator[Front]:
        made = Front(engine(), **settings)
        async with made.lifecycle.run():
            yield made

    async def run() -> None:
        async with front() as made:
            await test(made)
        assert made.engine.closed

    asyncio.run(run())


def endless() -> ScriptedEngine:
    return ScriptedEngine(endless=True)


def loading() -> ScriptedEngine:
    return ScriptedEngine(loaded=False)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_stream_has_started_tokens_end_and_done_once() -> None:
    async def check(front: Front) -> None:
        answer = await front.infer()
        events = answer.events()

        assert [e if e == "[DONE]" else e["type"] for e in events] == ["started", "token", "token", "token", "end", "[DONE]"]
        started, end = events[0], events[-2]
        assert (started["model"], started["worker_id"], started["prompt_tokens"]) == ("m", "lab1-cpu0", 7)
        assert started["request_id"] == answer.headers["x-request-id"]
        assert [(e["i"], e["t"]) for e in events[1:4]] == [(0, "one "), (1, "two "), (2, "three ")]
        assert (end["stop_reason"], end["tokens_out"], end["prompt_tokens"]) == ("EOS", 3, 7)

    with_front(check)


def all_at_once() -> ScriptedEngine:
    engine = ScriptedEngine()
    engine.at_once = True
    return engine


@pytest.mark.parametrize("path", ["/v1/inference", "/v1/completions"])
def test_those_who_are_ended_together_are_told_their_own_text_alone(path: str) -> None:
    """One error ends all that run, and each answer has a part of its own in it."""

    async def check(front: Front) -> None:
        asked = []
        for count in (1, 2):
            asked.append(front.ask("POST", path, {"model": "m", "prompt": "Hello", "max_tokens": count, "stream": False}))
            await until(lambda: sum(g.tokens_out for g in front.worker.active.values()) == len(asked) * (len(asked) + 1) // 2)
        streamed = front.ask("POST", "/v1/inference", P)
        await until(lambda: sum(g.tokens_out for g in front.worker.active.values()) == 6)
        await front.lifecycle.on_shutdown()
        one, two = [(await exchange.finish()).json()["error"] for exchange in asked]
        assert (one["code"], two["code"]) == ("WORKER_DRAINING", "WORKER_DRAINING")
        assert "one two" not in json.dumps(one)
        assert "partial_text" not in json.dumps((await streamed.finish()).events()[-2])
        assert (one["details"]["partial_text"], two["details"]["partial_text"]) == ("one ", "one two ")

    with_front(check, lambda: ScriptedEngine(endless=True, slots=3), drain_timeout_s=0.05)


def test_what_comes_together_is_told_event_by_event_and_counted() -> None:
    async def check(front: Front) -> None:
        answer = await front.infer()
        told = answer.events()
        assert [e if e == "[DONE]" else e["type"] for e in told] == ["started", "token", "token", "token", "end", "[DONE]"]
        assert [e["i"] for e in told[1:4]] == [0, 1, 2]
        assert (await front.infer(P | {"stream": False})).json()["token_ids"] == [100, 101, 102]
        figures = (await front.get("/metrics")).body.decode()
        assert "worker_tokens_generated_total 6.0" in figures
        assert "worker_tokens_in_total 14.0" in figures, "each start counts once"
        assert front.worker.active == {}

    with_front(check, all_at_once)


def test_whole_answer_has_text_figures_and_ids() -> None:
    async def check(front: Front) -> None:
        body = (await front.infer(P | {"stream": False, "seed": 5})).json()

        assert (body["text"], body["tokens_generated"], body["token_ids"]) == ("one two three ", 3, [100, 101, 102])
        assert (body["seed"], body["stop_reason"], body["prompt_tokens"], body["cached_tokens"]) == (5, "EOS", 7, 3)
        assert body["duration_ms"] >= 0

    with_front(check)


def test_seed_is_drawn_reported_and_given_to_the_engine() -> None:
    async def check(front: Front) -> None:
        seeds = [(await front.infer()).events()[0]["seed"] for _ in range(4)]

        assert seeds == [r.params.seed for r in front.engine.requests]
        assert len(set(seeds)) == 4

    with_front(check)


def test_messages_go_through_the_template_and_prompts_do_not() -> None:
    async def check(front: Front) -> None:
        await front.infer({"messages": [{"role": "user", "content": "Hi"}]})
        await front.infer({"prompt": "<user>Hi"})
        chat, plain = front.engine.requests

        assert (chat.text, chat.parse_special, chat.add_bos) == ("<user>Hi<assistant>", True, True)
        assert (plain.text, plain.parse_special, plain.add_bos) == ("<user>Hi", False, True)

    with_front(check)


def test_continuation_that_has_all_its_tokens_is_told_its_end() -> None:
    async def check(front: Front) -> None:
        answer = await front.infer(P | {"max_tokens": 3, "continue_from": {"generated_ids": [100, 101, 102]}})

        assert [e["type"] for e in answer.events()[:-1]] == ["started", "end"]
        assert answer.events()[-2]["tokens_out"] == 3

    with_front(check)


def test_started_says_from_which_prompt_it_goes_on_and_a_continuation_renders_the_same() -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}

    async def started(front: Front, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = (await front.infer(body | more)).events()[0]
        return found

    async def check(front: Front) -> None:
        first = await started(front)
        there = await started(front, continue_from={"generated_ids": [100], "rendered_at": first["rendered_at"]})
        tomorrow = await started(front, continue_from={"generated_ids": [100], "rendered_at": "2031-01-01T00:00:00+05:45"})

        assert (there["prompt_digest"], there["rendered_at"]) == (first["prompt_digest"], first["rendered_at"])
        assert front.engine.requests[0].text == front.engine.requests[1].text
        assert front.engine.requests[2].text == "2031-01-01 00:00 +0545"
        assert tomorrow["prompt_digest"] != first["prompt_digest"]
        assert tomorrow["rendered_at"] == "2031-01-01T00:00:00+05:45"

    with_front(check, lambda: ScriptedEngine(template="{{ strftime_now('%Y-%m-%d %H:%M %z') }}"))


def test_started_tells_of_a_prompt_only_what_the_worker_has_made_of_it() -> None:
    async def check(front: Front) -> None:
        chat, plain = await front.infer({"messages": [{"role": "user", "content": "Hi"}]}), await front.infer()

        assert len(chat.events()[0]["prompt_digest"]) == 16
        assert "rendered_at" not in chat.events()[0]
        assert plain.events()[0].keys().isdisjoint({"prompt_digest", "rendered_at"})

    with_front(check)


def test_continuation_goes_on_counting() -> None:
    async def check(front: Front) -> None:
        answer = await front.infer(P | {"continue_from": {"generated_ids": [100, 101]}})

        assert [e["i"] for e in answer.events()[:-1] if e["type"] == "token"] == [2]
        assert front.engine.requests[0].generated_ids == [100, 101]

    with_front(check)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (P | {"max_tokens": 2049}, "max_tokens"),
        (P | {"max_tokens": 0}, "max_tokens"),
        (P | {"temperature": 3}, "temperature"),
        (P | {"continue_from": {"generated_ids": [500]}}, "continue_from.generated_ids"),
        (P | {"continue_from": {"rendered_at": "2026-11-22T10:00:00"}}, "continue_from.rendered_at"),
        (P | {"nonsense": 1}, "nonsense"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages"),
    ],
)
def test_bad_input_is_400_names_the_field_and_takes_no_slot(body: dict[str, Any], field: str) -> None:
    async def check(front: Front) -> None:
        answer = await front.infer(body)

        assert (answer.status, answer.error()["details"]["field"]) == (400, field)
        assert field in answer.error()["message"]
        assert front.engine.requests == []
        assert front.worker.active == {}

    with_front(check)


def test_max_tokens_over_the_limit_names_both_numbers() -> None:
    async def check(front: Front) -> None:
        error = (await front.infer(P | {"max_tokens": 51})).error()

        assert (error["details"]["got"], error["details"]["limit"]) == (51, 50)
        assert "51" in error["message"]
        assert "50" in error["message"]

    with_front(check, max_tokens_limit=50)


def test_refusal_of_the_engine_has_its_own_status_and_leaves_nothing() -> None:
    async def check(front: Front) -> None:
        front.engine.refusal = PromptTooLong("prompt: 5000 tokens, context 1024", prompt_tokens=5000, context_tokens=1024)
        for stream in (True, False):
            answer = await front.infer(P | {"stream": stream})
            assert (answer.status, answer.error()["code"]) == (400, "PROMPT_TOO_LONG")
            assert answer.headers["content-type"] == "application/json"
        assert front.worker.active == {}

    with_front(check)


def test_full_worker_is_503_with_its_slots() -> None:
    async def check(front: Front) -> None:
        running = [front.ask("POST", "/v1/inference", P) for _ in range(2)]
        await until(lambda: front.worker.state is WorkerState.BUSY)

        answer = await front.infer()

        error = answer.error()
        assert (answer.status, error["code"], answer.headers["retry-after"]) == (503, "ALL_SLOTS_BUSY", "1")
        assert (error["slots_total"], error["slots_busy"], error["details"]["slots_total"]) == (2, 2, 2)
        for one in running:
            one.leave()
            await one.finish()
        await until(lambda: front.worker.state is WorkerState.IDLE)

    with_front(check, endless)


def test_error_after_the_beginning_is_an_event_and_done_follows() -> None:
    async def check(front: Front) -> None:
        front.engine.breaks_after = 2
        answer = await front.infer()

        assert answer.status == 200
        events = answer.events()
        assert [e["type"] for e in events[:-1]] == ["started", "token", "token", "error"]
        assert (events[-2]["code"], events[-1]) == ("WORKER_CRASHED", "[DONE]")
        assert events[-2]["correlation_id"] == answer.headers["x-correlation-id"]

        whole = await front.infer(P | {"stream": False})
        assert (whole.status, whole.error()["details"]["partial_text"]) == (502, "one two ")

    with_front(check)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("given", ["ab c", "x" * 129, "a/b"])
def test_request_id_of_another_form_is_refused(stream: bool, given: str) -> None:
    async def check(front: Front) -> None:
        assert (await front.infer(P | {"stream": stream}, X_Request_Id=given)).status == 400

    with_front(check)


# --- endings from outside ---------------------------------------------------------------------------------------------


async def begun(front: Front, body: Any = None, **headers: str) -> Exchange:
    one = front.ask("POST", "/v1/inference", P if body is None else body, **headers)
    await until(lambda: one.body.count(b"event: token") == 3)
    return one


def test_delete_ends_a_stream_with_cancelled_and_is_204_always() -> None:
    async def check(front: Front) -> None:
        one = await begun(front, X_Request_Id="mine")
        for path in ("mine", "mine", "unknown"):
            assert (await front.ask("DELETE", f"/v1/inference/{path}").finish()).status == 204
        await one.finish(1)

        end = one.events()[-2]
        assert (end["type"], end["stop_reason"], end["tokens_out"]) == ("end", "CANCELLED", 3)
        assert front.engine.running == set()
        assert (await front.ask("DELETE", "/v1/inference/mine").finish()).status == 204

    with_front(check, endless)


def test_id_can_be_used_again_as_soon_as_its_request_was_cancelled() -> None:
    """While the first one's client has not read its end, and the engine has not ended it."""

    async def check(front: Front) -> None:
        first = await begun(front, X_Request_Id="mine")
        assert (await front.infer(X_Request_Id="mine")).status == 400
        await front.ask("DELETE", "/v1/inference/mine").finish()
        second = await begun(front, X_Request_Id="mine")
        await first.finish(1)
        assert first.events()[-2]["stop_reason"] == "CANCELLED"
        assert (await front.infer(X_Request_Id="mine")).status == 400, "the second one runs"
        await front.ask("DELETE", "/v1/inference/mine").finish()
        await second.finish(1)

        assert [e["request_id"] for e in second.events()[:1]] == ["mine"]
        assert second.events()[-2]["stop_reason"] == "CANCELLED"
        assert len({r.request_id for r in front.engine.requests}) == 2
        assert (front.engine.running, front.worker.active) == (set(), {})

    with_front(check, endless)


def test_delete_of_a_whole_answer_gives_what_there_is() -> None:
    async def check(front: Front) -> None:
        one = front.ask("POST", "/v1/inference", P | {"stream": False}, X_Request_Id="mine")
        await until(lambda: (mine := front.worker.running("mine")) is not None and mine.tokens_out == 3)
        await front.ask("DELETE", "/v1/inference/mine").finish()
        await one.finish(1)

        assert (one.status, one.json()["stop_reason"], one.json()["text"]) == (200, "CANCELLED", "one two three ")

    with_front(check, endless)


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_the_slot(stream: bool) -> None:
    async def check(front: Front) -> None:
        one = front.ask("POST", "/v1/inference", P | {"stream": stream})
        await until(lambda: any(g.tokens_out == 3 for g in front.worker.active.values()))
        one.leave()
        await one.finish(1)

        assert front.engine.running == set()
        assert front.worker.active == {}
        assert 'worker_requests_total{outcome="REQUEST_CANCELED"} 1.0' in (await front.get("/metrics")).body.decode()

    with_front(check, endless)


def test_deadline_within_a_stream_is_an_error_event() -> None:
    async def check(front: Front) -> None:
        answer = await front.infer(P | {"timeout_s": 0.05})

        assert [e["type"] for e in answer.events()[:-1]] == ["started", "token", "token", "token", "error"]
        assert answer.events()[-2]["code"] == "REQUEST_TIMEOUT"
        assert front.engine.running == set()

    with_front(check, endless)


def test_deadline_before_the_answer_is_408() -> None:
    async def check(front: Front) -> None:
        late = await front.infer(X_Request_Deadline=str(time.time() - 1))
        assert (late.status, late.error()["code"]) == (408, "REQUEST_TIMEOUT")
        whole = await front.infer(P | {"stream": False, "timeout_s": 0.05})
        assert (whole.status, whole.error()["details"]["partial_text"]) == (408, "one two three ")
        assert front.engine.running == set()

    with_front(check, endless)


def test_header_and_timeout_can_only_shorten_each_other() -> None:
    async def check(front: Front) -> None:
        for timeout_s, header_s in ((0.05, 100.0), (100.0, 0.05)):
            answer = await front.infer(P | {"timeout_s": timeout_s}, X_Request_Deadline=str(time.time() + header_s))
            assert answer.events()[-2]["code"] == "REQUEST_TIMEOUT"

    with_front(check, endless)


def waiting() -> ScriptedEngine:
    engine = ScriptedEngine()
    engine.granted = asyncio.Event()
    return engine


def test_headers_and_pings_come_while_a_stream_waits_for_its_slot() -> None:
    """Whoever has limits on the first byte must be able to tell a wait from a worker that is dead."""

    async def check(front: Front) -> None:
        one = front.ask("POST", "/v1/inference", P)
        await until(lambda: one.sent and PING in one.body)
        assert (one.status, one.events(), len(front.worker.active)) == (200, [], 1)
        assert front.engine.granted is not None
        front.engine.granted.set()
        await one.finish()
        assert [e["type"] for e in one.events()[:-1]] == ["started", "token", "token", "token", "end"]
        assert one.events()[0]["cached_tokens"] == 3

    with_front(check, waiting, ping_interval_s=0.01)


@pytest.mark.parametrize("how", ["deadline", "cancel", "leave"])
def test_stream_that_waits_for_its_slot_can_end_before_it_has_one(how: str) -> None:
    async def check(front: Front) -> None:
        one = front.ask("POST", "/v1/inference", P | ({"timeout_s": 0.05} if how == "deadline" else {}), X_Request_Id="r1")
        await until(lambda: one.sent)
        if how == "cancel":
            assert (await front.ask("DELETE", "/v1/inference/r1").finish()).status == 204
        if how == "leave":
            one.leave()
        await one.finish()
        last = one.events()[:1]
        assert [e.get("code", e.get("stop_reason")) for e in last] == {
            "deadline": ["REQUEST_TIMEOUT"], "cancel": ["CANCELLED"], "leave": []
        }[how]  # fmt: skip
        assert (front.engine.running, front.worker.active) == (set(), {})

    with_front(check, waiting)


def test_answer_that_is_not_streamed_has_the_status_of_what_ended_its_wait() -> None:
    async def check(front: Front) -> None:
        late = await front.infer(P | {"stream": False, "timeout_s": 0.05})
        assert (late.status, late.error()["code"]) == (408, "REQUEST_TIMEOUT")

    with_front(check, waiting)


@pytest.mark.parametrize("value", ["soon", "nan", "inf", ""])
def test_deadline_that_is_no_time_is_400(value: str) -> None:
    async def check(front: Front) -> None:
        assert (await front.infer(X_Request_Deadline=value)).error()["details"]["field"] == "X-Request-Deadline"

    with_front(check)


# --- life -------------------------------------------------------------------------------------------------------------


def test_while_loading_the_port_answers_and_says_where_progress_is() -> None:
    async def check(front: Front) -> None:
        front.engine.report(LoadProgress("loading_to_vram", 1, 4))
        ready = (await front.get("/v1/ready")).json()
        assert (ready["ready"], ready["state"], ready["model_loaded"]) == (False, "loading", False)
        assert ready["progress_url"] == "http://127.0.0.1:8001/v1/loading/progress"
        answer = await front.infer()
        assert (answer.status, answer.error()["code"]) == (503, "WORKER_LOADING")
        assert "retry-after" in answer.headers

        progress = front.ask("GET", "/v1/loading/progress")
        await until(lambda: b'"layers_loaded":1' in progress.body)
        front.engine.report(LoadProgress("loading_to_vram", 3, 4))
        await until(lambda: b'"layers_loaded":3' in progress.body)
        front.engine.load()
        await progress.finish(1)
        assert [e["stage"] for e in progress.events()[:-1]] == ["loading_to_vram", "loading_to_vram", "ready"]
        assert progress.events()[-1] == "[DONE]"
        assert (await front.get("/v1/ready")).json() == {
            "ready": True,
            "state": "idle",
            "model_loaded": True,
        }

        late = await front.get("/v1/loading/progress")
        assert [e if e == "[DONE]" else e["stage"] for e in late.events()] == ["ready", "[DONE]"]

    with_front(check, loading)


def test_model_that_cannot_be_loaded_ends_the_process_with_78_and_keeps_paths_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check(front: Front) -> None:
        progress = front.ask("GET", "/v1/loading/progress")
        await until(lambda: progress.sent)
        front.engine.report(LoadProgress("failed", 0, 4, "/m.gguf is cut short", ModelFileInvalid.code))
        await progress.finish(1)
        await asyncio.wait_for(front.left.wait(), 1)

        assert progress.events()[-2]["code"] == "MODEL_FILE_INVALID"
        assert b"/m.gguf" not in progress.body
        assert front.lifecycle.exit_code == 78
        assert "/m.gguf is cut short" in caplog.text
        answer = await front.infer()
        assert (answer.status, answer.error()["code"]) == (502, "WORKER_CRASHED")

    with_front(check, loading)


def test_death_of_the_engine_ends_the_process_with_1() -> None:
    async def check(front: Front) -> None:
        await until(lambda: front.lifecycle.alive())
        await asyncio.sleep(0)
        front.engine.die("killed by SIGKILL")
        await asyncio.wait_for(front.left.wait(), 1)

        assert front.lifecycle.exit_code == 1
        assert not front.lifecycle.alive()
        assert (await front.get("/v1/ready")).json() == {
            "ready": False,
            "state": "failed",
            "model_loaded": False,
        }

    with_front(check)


def test_watchdog_is_fed_while_loading_and_while_the_engine_moves() -> None:
    async def check(front: Front) -> None:
        front.engine.age_s = 1000
        assert front.lifecycle.alive()
        front.engine.load()
        assert not front.lifecycle.alive()
        front.engine.age_s = 59
        assert front.lifecycle.alive()

    with_front(check, loading, stall_timeout_s=60)


def test_drain_lets_running_streams_finish_and_takes_nothing_new() -> None:
    async def check(front: Front) -> None:
        one = await begun(front, X_Request_Id="mine")
        shutdown = asyncio.ensure_future(front.lifecycle.on_shutdown())
        await until(lambda: front.worker.draining)

        refused = await front.infer()
        assert (refused.status, refused.error()["code"], refused.headers["retry-after"]) == (503, "WORKER_DRAINING", "1")
        assert (await front.get("/v1/ready")).json()["state"] == "draining"
        assert not shutdown.done()
        mine = front.worker.running("mine")
        assert mine is not None
        mine.end(PromptTooLong("any end will do"))
        await asyncio.wait_for(shutdown, 1)
        await one.finish(1)

    with_front(check, endless)


def test_stream_that_outlasts_the_drain_is_handed_back_with_the_reason() -> None:
    async def check(front: Front) -> None:
        one = await begun(front)
        await front.lifecycle.on_shutdown()
        await one.finish(1)

        assert (one.events()[-2]["code"], one.events()[-1]) == ("WORKER_DRAINING", "[DONE]")
        assert front.engine.running == set()

    with_front(check, endless, drain_timeout_s=0.05)


def test_drain_while_loading_ends_the_progress_stream() -> None:
    async def check(front: Front) -> None:
        progress = front.ask("GET", "/v1/loading/progress")
        await until(lambda: b"loading_to_vram" in progress.body)
        await front.lifecycle.on_shutdown()
        await progress.finish(1)

        assert (progress.events()[-2]["code"], progress.events()[-1]) == ("WORKER_DRAINING", "[DONE]")

    with_front(check, loading)


def test_admin_drain_waits_for_streams_however_long_and_then_leaves() -> None:
    async def check(front: Front) -> None:
        await begun(front, X_Request_Id="mine")
        for _ in range(2):
            assert (await front.ask("POST", "/v1/admin/drain").finish()).status == 202
        await until(lambda: front.worker.draining)
        await asyncio.sleep(0.1)  # twice the limit that SIGTERM has: nothing may happen meanwhile
        assert not front.left.is_set()
        await front.ask("DELETE", "/v1/inference/mine").finish()
        await asyncio.wait_for(front.left.wait(), 1)
        assert front.lifecycle.exit_code == 0

    with_front(check, endless, drain_timeout_s=0.05)


def test_drain_that_begins_as_a_request_is_admitted_waits_for_that_request() -> None:
    async def check(front: Front) -> None:
        admit, drains = front.worker.admit, []

        def admitted() -> EngineInfo:
            info = admit()
            drains.append(asyncio.ensure_future(front.worker.drain(None)))
            return info

        front.worker.admit = admitted  # type: ignore[method-assign]
        await begun(front, X_Request_Id="mine")
        assert not drains[0].done()
        await front.ask("DELETE", "/v1/inference/mine").finish()
        await asyncio.wait_for(drains[0], 1)

    with_front(check, endless)


def test_admin_shutdown_does_what_sigterm_does() -> None:
    async def check(front: Front) -> None:
        assert (await front.ask("POST", "/v1/admin/shutdown").finish()).status == 202
        assert front.left.is_set()

    with_front(check)


def test_info_metrics_and_tokenize() -> None:
    async def check(front: Front) -> None:
        await front.infer()
        record = (await front.get("/info")).json()["worker"]
        assert (record["id"], record["status"], record["slots_available"]) == ("lab1-cpu0", "idle", 2)
        assert record["model_info"]["exact_context_tokens"] == 511
        lines = (await front.get("/metrics")).body.decode().splitlines()
        for expected in (
            'worker_requests_total{outcome="EOS"} 1.0',
            "worker_tokens_generated_total 3.0",
            "worker_tokens_in_total 7.0",
            "worker_inference_duration_ms_count 1.0",
            "worker_vram_bytes 0.0",
        ):
            assert expected in lines
        assert any(line.startswith("worker_uptime_seconds ") for line in lines)
        tokens = (await front.ask("POST", "/v1/tokenize", {"text": "a b c"}).finish()).json()
        assert tokens == {"token_ids": [0, 1, 2], "count": 3}
        assert (await front.ask("POST", "/v1/tokenize", {"text": 5}).finish()).error()["details"]["field"] == "text"

    with_front(check)


def test_fifty_streams_that_are_left_leave_nothing_behind() -> None:
    async def check(front: Front) -> None:
        await until(lambda: len(asyncio.all_tasks()) >= 2)
        (await begun(front)).leave()
        await until(lambda: not front.worker.active)
        before = len(asyncio.all_tasks())
        for _ in range(50):
            one = await begun(front)
            one.leave()
            await one.finish(1)
        await until(lambda: len(asyncio.all_tasks()) <= before)
        assert front.engine.running == set()

    with_front(check, endless)
