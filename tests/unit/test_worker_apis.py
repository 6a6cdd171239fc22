"""The worker's own OpenAI routes over a scripted engine."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from asgi import Exchange
from scripted_engine import ScriptedEngine, until
from test_worker_app import Front, with_front

from rbee_serve.common.apis import embeddings

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}


def chunks(events: list[Any]) -> list[Any]:
    assert events[-1] == "[DONE]"
    return events[:-1]


def saying(text: str, slots: int = 2) -> Callable[[], ScriptedEngine]:
    return lambda: ScriptedEngine(text, slots=slots)


def test_chat_whole_and_streamed_tell_the_same() -> None:
    async def check(front: Front) -> None:
        whole = (await front.ask("POST", "/v1/chat/completions", CHAT).finish()).json()
        body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
        streamed = chunks((await front.ask("POST", "/v1/chat/completions", body).finish()).events())

        assert whole["choices"][0]["message"]["content"] == "one two three "
        assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in streamed[:-1]) == "one two three "
        assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"
        assert streamed[-1]["usage"] == whole["usage"] | {"total_tokens": 10}
        assert front.engine.running == set()

    with_front(check)


def test_several_answers_have_their_index_and_one_prompt_in_the_usage() -> None:
    async def check(front: Front) -> None:
        body = CHAT | {"n": 2, "seed": 5}
        whole = (await front.ask("POST", "/v1/chat/completions", body).finish()).json()
        streamed = chunks((await front.ask("POST", "/v1/chat/completions", body | {"stream": True}).finish()).events())

        assert [c["index"] for c in whole["choices"]] == [0, 1]
        assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (7, 6)
        assert sorted(r.params.seed for r in front.engine.requests) == [5, 5, 6, 6]
        for index in (0, 1):
            mine = [c["choices"][0] for c in streamed if c["choices"][0]["index"] == index]
            assert "".join(c["delta"].get("content", "") for c in mine) == "one two three "
            assert (mine[0]["delta"]["role"], mine[-1]["finish_reason"]) == ("assistant", "stop")

    with_front(check)


FIVE: dict[str, Any] = {"model": "m", "prompt": ["a", "b", "c", "d", "e"]}


def texts(answer: Exchange) -> dict[int, str]:
    """Return the answers of completions, streamed or whole, by their index."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return {c["index"]: c["text"] for c in answer.json()["choices"]}
    found: dict[int, str] = {}
    for chunk in chunks(answer.events()):
        for choice in chunk["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


def refusals(front: Front) -> float:
    (family,) = front.worker.metrics.requests.collect()
    return sum(s.value for s in family.samples if s.labels.get("outcome") == "ALL_SLOTS_BUSY" and s.name.endswith("_total"))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_more_answers_than_slots_come_one_after_the_other(stream: bool, slots: int) -> None:
    async def check(front: Front) -> None:
        answer = await front.ask("POST", "/v1/completions", FIVE | {"stream": stream}).finish()

        assert answer.status == 200
        assert texts(answer) == dict.fromkeys(range(5), "one two three ")
        assert [r.text for r in front.engine.requests] == ["a", "b", "c", "d", "e"]
        assert front.engine.running == set()
        assert front.worker.active == {}

    with_front(check, saying("one two three", slots=slots))


@pytest.mark.parametrize("stream", [True, False])
def test_several_answers_of_a_worker_without_a_free_slot_are_refused_and_leave_nothing(stream: bool) -> None:
    async def check(front: Front) -> None:
        others = [front.ask("POST", "/v1/chat/completions", CHAT | {"stream": True}) for _ in range(2)]
        await until(lambda: len(front.engine.running) == 2)
        answer = await front.ask("POST", "/v1/chat/completions", CHAT | {"n": 3, "stream": stream}).finish()

        assert (answer.status, answer.error()["code"], answer.error()["type"]) == (503, "ALL_SLOTS_BUSY", "server_error")
        assert refusals(front) == 1
        assert len(front.engine.running) == len(front.worker.active) == 2
        for other in others:
            other.leave()
            await other.finish(1)

    with_front(check, lambda: ScriptedEngine(endless=True))


def test_several_answers_share_what_others_leave() -> None:
    async def check(front: Front) -> None:
        other = front.ask("POST", "/v1/inference", {"prompt": "x", "max_tokens": 1})
        await until(lambda: len(front.engine.running) == 1)
        five = front.ask("POST", "/v1/completions", FIVE)
        await until(lambda: refusals(front) == 1)

        assert len(front.engine.running) == 2
        front.engine.released.set()
        assert texts(await five.finish()) == dict.fromkeys(range(5), "one two three ")
        await other.finish()

    with_front(check, lambda: ScriptedEngine(endless=True))


def test_answers_that_are_left_wait_where_another_client_took_the_slot() -> None:
    async def check(front: Front) -> None:
        two = front.ask("POST", "/v1/completions", FIVE | {"prompt": ["a", "b"], "stream": True})
        await until(lambda: refusals(front) == 1)
        front.engine.slots = 0
        front.engine.released.set()
        await until(lambda: refusals(front) == 3)
        front.engine.slots = 1

        assert texts(await two.finish()) == dict.fromkeys(range(2), "one two three ")

    with_front(check, lambda: ScriptedEngine(slots=1, endless=True))


def test_client_that_leaves_while_answers_wait_for_a_slot_leaves_nothing() -> None:
    async def check(front: Front) -> None:
        for stream in (False, True):
            five = front.ask("POST", "/v1/completions", FIVE | {"stream": stream})
            await until(lambda: refusals(front) > stream)  # noqa: B023
            five.leave()
            await five.finish(1)
            assert front.engine.running == set()
            assert front.worker.active == {}

    with_front(check, lambda: ScriptedEngine(endless=True))


def test_one_answer_that_fails_ends_them_all() -> None:
    async def check(front: Front) -> None:
        front.engine.breaks_after = 2
        whole = await front.ask("POST", "/v1/completions", {"model": "m", "prompt": ["a", "b"]}).finish()
        streamed = await front.ask("POST", "/v1/completions", {"model": "m", "prompt": ["a", "b"], "stream": True}).finish()

        assert (whole.status, whole.error()["code"]) == (502, "WORKER_CRASHED")
        events = chunks(streamed.events())
        assert [e["error"]["code"] for e in events if "error" in e] == ["WORKER_CRASHED"]
        await until(lambda: not front.worker.active)

    with_front(check)


def test_client_that_leaves_frees_all_slots() -> None:
    async def check(front: Front) -> None:
        for stream in (True, False):
            one = front.ask("POST", "/v1/chat/completions", CHAT | {"n": 2, "stream": stream})
            await until(lambda: sum(g.tokens_out for g in front.worker.active.values()) == 6)
            one.leave()
            await one.finish(1)
            assert front.engine.running == set()
            assert front.worker.active == {}

    with_front(check, lambda: ScriptedEngine(endless=True))


def test_prompt_of_token_ids_goes_to_the_engine_as_it_is() -> None:
    async def check(front: Front) -> None:
        await front.ask("POST", "/v1/completions", {"model": "m", "prompt": [5, 6]}).finish()

        assert front.engine.requests[0].prompt_ids == [5, 6]

    with_front(check)


CALL = '<tool_call> {"name": "f", "arguments": {"a": 1}} </tool_call>'


def test_tools_are_told_to_the_model_and_its_calls_come_as_calls() -> None:
    async def check(front: Front) -> None:
        body = CHAT | {"tools": [TOOL]}
        whole = (await front.ask("POST", "/v1/chat/completions", body).finish()).json()
        streamed = chunks((await front.ask("POST", "/v1/chat/completions", body | {"stream": True}).finish()).events())

        assert '"name": "f"' in front.engine.requests[0].text
        (call,) = whole["choices"][0]["message"]["tool_calls"]
        assert (call["type"], call["function"]["name"], json.loads(call["function"]["arguments"])) == ("function", "f", {"a": 1})
        assert (whole["choices"][0]["finish_reason"], whole["choices"][0]["message"]["content"]) == ("tool_calls", "I will.")
        deltas = [c["choices"][0]["delta"] for c in streamed]
        parts = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
        assert (parts[0]["index"], parts[0]["function"]) == (0, {"name": "f", "arguments": ""})
        assert parts[0]["id"].startswith("call_")
        assert json.loads("".join(p["function"]["arguments"] for p in parts)) == {"a": 1}
        assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"

    with_front(check, saying(f"I will. {CALL}"))


def test_tool_choice_none_offers_none_and_reads_none() -> None:
    async def check(front: Front) -> None:
        body = CHAT | {"tools": [TOOL], "tool_choice": "none"}
        whole = (await front.ask("POST", "/v1/chat/completions", body).finish()).json()

        assert whole["choices"][0]["message"]["content"].startswith("<tool_call>")
        assert '"name": "f"' not in front.engine.requests[0].text

    with_front(check, saying(CALL))


def test_one_call_at_a_time_where_the_client_wants_it_so() -> None:
    async def check(front: Front) -> None:
        for parallel, expected in ((True, 2), (False, 1)):
            body = CHAT | {"tools": [TOOL], "parallel_tool_calls": parallel}
            whole = (await front.ask("POST", "/v1/chat/completions", body).finish()).json()
            assert len(whole["choices"][0]["message"]["tool_calls"]) == expected
            assert whole["choices"][0]["finish_reason"] == "tool_calls"

    with_front(check, saying(f"{CALL} {CALL}"))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_unknown_model_is_404_in_openai_s_shape(path: str) -> None:
    async def check(front: Front) -> None:
        body = CHAT | {"prompt": "x", "model": "other"}
        error = (await front.ask("POST", path, body).finish()).error()

        assert (error["code"], error["type"], error["details"]["known"]) == ("MODEL_NOT_FOUND", "invalid_request_error", ["m"])

    with_front(check)


def test_models_are_listed() -> None:
    async def check(front: Front) -> None:
        assert [m["id"] for m in (await front.get("/v1/models")).json()["data"]] == ["m"]
        assert (await front.get("/v1/models/m")).json()["object"] == "model"
        assert (await front.get("/v1/models/x")).error()["type"] == "invalid_request_error"

    with_front(check)


@pytest.mark.parametrize("piece", [1, 1000, 1 << 20])
def test_embeddings_are_the_same_whole_and_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One vector at a time, some, and all at once as a small answer is."""
    monkeypatch.setattr(embeddings, "_PIECE_BYTES", piece)

    async def check(front: Front) -> None:
        body = {"model": "m", "input": ["one"] * 300}
        decimal = await front.ask("POST", "/v1/embeddings", body).finish()
        packed = (await front.ask("POST", "/v1/embeddings", body | {"encoding_format": "base64"}).finish()).json()

        assert decimal.headers["content-type"] == "application/json"
        assert ("content-length" in decimal.headers) == (piece > 1000)
        found = decimal.json()
        assert found["data"] == [{"object": "embedding", "index": i, "embedding": [1, 0]} for i in range(300)]
        assert (found["object"], found["model"], found["usage"]) == ("list", "m", {"prompt_tokens": 300, "total_tokens": 300})
        assert [struct.unpack("<2f", base64.b64decode(one["embedding"])) for one in packed["data"]] == [(1, 0)] * 300
        refused = await front.ask("POST", "/v1/embeddings", body | {"dimensions": 3}).finish()
        assert refused.status == 400

    with_front(check)
