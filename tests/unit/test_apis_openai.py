"""Translation between OpenAI's shapes and ours; the official client's own models judge what we send."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from rbee_serve.common.apis.openai_messages import ChatCompletionRequest, CompletionRequest, refuse
from rbee_serve.common.apis.openai_shapes import (
    COMPLETION_MAX_TOKENS,
    ChatShape,
    CompletionShape,
    Shape,
    error_body,
    finish_reason,
    to_inferences,
    usage,
)
from rbee_serve.common.apis.streams import Answer, Reading
from rbee_serve.common.apis.tool_calls import Arguments, Call
from rbee_serve.contract.api import InferenceRequest, StopReason, parse
from rbee_serve.contract.errors import AllSlotsBusy, InvalidApiKey, InvalidRequest, ModelAccessDenied, ModelNotFound, RbeeError

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**more: Any) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, CHAT | more)


def completion(**more: Any) -> CompletionRequest:
    return parse(CompletionRequest, {"model": "m", "prompt": "hi"} | more)


def to_inference(request: ChatCompletionRequest | CompletionRequest, *, fits: int) -> InferenceRequest:
    """Return the native request of a request for one answer."""
    (one,) = to_inferences(request, fits=fits)
    return one


def read(text: str = "hello", stop_reason: str = "EOS", **more: Any) -> Answer:
    """Return an answer that was read to its end."""
    reading = Reading(cast(Any, None), InferenceRequest(prompt="x"))
    return Answer(reading, text=text, stop_reason=stop_reason, **more)


def data_of(chunks: bytes) -> list[dict[str, Any]]:
    """Return the JSON of each event."""
    found = []
    for event in chunks.decode().split("\n\n")[:-1]:
        assert event.startswith("data: ")
        found.append(json.loads(event.removeprefix("data: ")))
    return found


def test_absent_parameters_get_openai_s_defaults_not_ours() -> None:
    request = to_inference(chat(), fits=300)

    assert (request.temperature, request.top_p, request.max_tokens, request.seed) == (1.0, 1.0, 300, None)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [({"max_tokens": 5}, 5), ({"max_completion_tokens": 6}, 6), ({"max_tokens": 5, "max_completion_tokens": 6}, 6), ({}, 300)],
)
def test_chat_limit(given_: dict[str, int], expected: int) -> None:
    assert to_inference(chat(**given_), fits=300).max_tokens == expected


@pytest.mark.parametrize(("given_", "expected"), [({"max_tokens": 5}, 5), ({}, COMPLETION_MAX_TOKENS)])
def test_completion_limit(given_: dict[str, int], expected: int) -> None:
    assert to_inference(completion(**given_), fits=300).max_tokens == expected


def test_named_parameters_are_passed_on() -> None:
    given_ = {"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "seed": 9}

    request = to_inference(chat(**given_, stop="END"), fits=1)

    assert {name: getattr(request, name) for name in given_} == given_
    assert request.stop == ["END"]
    assert request.prompt is None
    assert request.messages is not None
    assert request.messages[0].content == "hi"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stream": "maybe"}, "stream"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_wrong_value_is_named(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as e:
        parse(ChatCompletionRequest, CHAT | body)

    assert e.value.details["field"].startswith(field)


def test_limit_beyond_every_model_is_named() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens"):
        to_inference(chat(max_tokens=2_000_000), fits=1)


@pytest.mark.parametrize(
    "body",
    [
        {"functions": [{"name": "f"}]},
        {"function_call": "auto!"},
        {"echo": True},
        {"prediction": {"type": "content", "content": "x"}},
        {"best_of": 2},
        {"suffix": "x"},
        {"audio": {}},
    ],
)
def test_what_would_have_to_be_ignored_is_refused_by_name(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not supported") as e:
        refuse(CHAT | body)

    assert e.value.details["field"] in body


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"functions": None},
        {"function_call": "none"},
        {"echo": False, "best_of": 1, "suffix": ""},
        {"modalities": ["text"]},
        {"user": "me", "metadata": {"a": "b"}, "store": True},
    ],
)
def test_what_changes_nothing_is_accepted(body: dict[str, Any]) -> None:
    refuse(CHAT | body)


@pytest.mark.parametrize(
    ("reason", "finish"), [("EOS", "stop"), ("STOP_SEQUENCE", "stop"), ("MAX_TOKENS", "length"), ("CANCELLED", "stop")]
)
def test_finish_reason(reason: str, finish: str) -> None:
    assert finish_reason(reason) == finish


def test_every_stop_reason_has_a_finish_reason() -> None:
    assert {finish_reason(reason) for reason in StopReason} <= {"stop", "length"}


@given(st.text(min_size=1), st.booleans())
def test_chat_chunk_carries_any_text(text: str, include_usage: bool) -> None:
    (data,) = data_of(ChatShape("1", "m", 5, include_usage=include_usage).token(text))

    chunk = ChatCompletionChunk.model_validate(data)
    assert chunk.choices[0].delta.content == text
    assert (chunk.id, chunk.model, chunk.created, chunk.choices[0].finish_reason) == ("chatcmpl-1", "m", 5, None)
    assert ("usage" in data) is include_usage


@given(st.text(min_size=1))
def test_completion_chunk_carries_any_text(text: str) -> None:
    (data,) = data_of(CompletionShape("1", "m", 5).token(text))

    assert Completion.model_validate(data | {"choices": [data["choices"][0] | {"finish_reason": "stop"}]}).choices[0].text == text
    assert data["choices"][0]["finish_reason"] is None


@pytest.mark.parametrize("shape_of", [ChatShape, CompletionShape])
def test_token_without_text_yet_makes_no_chunk(shape_of: type[Shape]) -> None:
    assert shape_of("1", "m", 5).token("") == b""


def test_chat_opens_with_the_role() -> None:
    (data,) = data_of(ChatShape("1", "m", 5).opening())

    assert ChatCompletionChunk.model_validate(data).choices[0].delta.role == "assistant"


@pytest.mark.parametrize("shape_of", [ChatShape, CompletionShape])
def test_usage_comes_last_and_only_when_asked_for(shape_of: type[Shape]) -> None:
    used = usage(7, 3, 5)
    plain, asked = shape_of("1", "m", 5), shape_of("1", "m", 5, include_usage=True)

    (end,) = data_of(plain.closing("MAX_TOKENS"))
    finish, last = data_of(asked.closing("MAX_TOKENS") + asked.final(used))
    assert plain.final(used) == b""
    assert "usage" not in end
    assert (finish["choices"][0]["finish_reason"], finish["usage"]) == ("length", None)
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 10)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}


def test_whole_answers_are_what_the_client_expects() -> None:
    answer = ChatCompletion.model_validate(ChatShape("1", "m", 5).whole([read(), read("two")], usage(7, 3)))
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hello", "stop")
    assert [(c.index, c.message.content) for c in answer.choices] == [(0, "hello"), (1, "two")]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 10

    older = Completion.model_validate(CompletionShape("1", "m", 5).whole([read("hello", "MAX_TOKENS")], usage(7, 3)))
    assert (older.choices[0].text, older.choices[0].finish_reason) == ("hello", "length")


LP = {
    "piece": "hé",
    "logprob": -0.5,
    "bytes": [104, 195, 169],
    "top": [
        {"id": 1, "piece": "hé", "logprob": -0.5, "bytes": [104, 195, 169]},
        {"id": 2, "piece": "x", "logprob": -2.0, "bytes": [120]},
    ],
}


def test_log_probabilities_have_the_shapes_that_the_client_expects() -> None:
    answer = read("héhé", tokens=[LP, LP])
    chat = ChatCompletion.model_validate(ChatShape("1", "m", 5).whole([answer], usage(7, 2))).choices[0].logprobs
    older = Completion.model_validate(CompletionShape("1", "m", 5).whole([answer], usage(7, 2))).choices[0].logprobs
    (chunk,) = data_of(ChatShape("1", "m", 5).scored("", LP))
    shape = CompletionShape("1", "m", 5)
    pieces = [data_of(shape.scored("hé", LP))[0]["choices"][0]["logprobs"] for _ in range(2)]

    assert chat is not None
    assert chat.content is not None
    assert [(t.token, t.logprob, t.bytes, len(t.top_logprobs)) for t in chat.content] == [("hé", -0.5, [104, 195, 169], 2)] * 2
    assert older is not None
    assert (older.tokens, older.token_logprobs, older.text_offset) == (["hé", "hé"], [-0.5, -0.5], [0, 2])
    assert older.top_logprobs == [{"hé": -0.5, "x": -2.0}] * 2
    assert ChatCompletionChunk.model_validate(chunk).choices[0].logprobs is not None
    assert [p["text_offset"] for p in pieces] == [[0], [2]]


def test_tool_calls_have_the_shapes_that_the_client_expects() -> None:
    shape = ChatShape("1", "m", 5, index=1)
    begin, piece = data_of(shape.call(Call(0, "call_1", "f")) + shape.arguments(Arguments(0, '{"a"')))
    answer = ChatCompletion.model_validate(
        ChatShape("1", "m", 5).whole([read("", calls=[{"id": "call_1", "name": "f", "arguments": "{}"}])], usage(7, 3))
    )

    first = ChatCompletionChunk.model_validate(begin).choices[0]
    assert first.index == 1
    assert first.delta.tool_calls is not None
    call = first.delta.tool_calls[0]
    assert call.function is not None
    assert (call.index, call.id, call.type, call.function.name, call.function.arguments) == (0, "call_1", "function", "f", "")
    more = ChatCompletionChunk.model_validate(piece).choices[0].delta.tool_calls
    assert more is not None
    assert more[0].function is not None
    assert (more[0].index, more[0].id, more[0].function.arguments) == (0, None, '{"a"')
    assert data_of(shape.closing("EOS", called=True))[0]["choices"][0]["finish_reason"] == "tool_calls"
    assert data_of(shape.closing("MAX_TOKENS", called=True))[0]["choices"][0]["finish_reason"] == "length"
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    assert answer.choices[0].message.tool_calls is not None


def test_n_answers_have_seeds_that_count_up() -> None:
    wanted = to_inferences(completion(prompt=["a", "b"], n=2, seed=2**32 - 1), fits=1)

    assert [(w.prompt, w.seed) for w in wanted] == [("a", 2**32 - 1), ("a", 0), ("b", 2**32 - 1), ("b", 0)]
    assert [w.seed for w in to_inferences(chat(n=2), fits=1)] == [None, None]
    with pytest.raises(InvalidRequest, match="more than 16"):
        to_inferences(completion(prompt=["a", "b"], n=9), fits=1)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2], [(None, [1, 2])]),
        ([[1], [2]], [(None, [1]), (None, [2])]),
    ],
)
def test_prompts_of_every_form(prompt: Any, expected: list[Any]) -> None:
    assert [(w.prompt, w.prompt_ids) for w in to_inferences(completion(prompt=prompt), fits=1)] == expected


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}, SCHEMA),
    ],
)
def test_response_format_becomes_a_schema(given_: dict[str, Any], expected: Any) -> None:
    assert to_inference(chat(response_format=given_), fits=1).json_schema == expected


def test_log_probabilities_are_asked_for_with_the_number_of_others() -> None:
    assert to_inference(chat(logprobs=True), fits=1).logprobs == 0
    assert to_inference(chat(logprobs=True, top_logprobs=3), fits=1).logprobs == 3
    assert to_inference(chat(logprobs=False), fits=1).logprobs is None
    assert to_inference(completion(logprobs=2), fits=1).logprobs == 2


TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL], "logprobs": True}, "logprobs"),
        ({"tool_choice": "required"}, "body"),
        ({"max_tokens": 2_000_000}, "max_tokens"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as e:
        to_inferences(chat(**body), fits=1)

    assert e.value.details["field"] == field


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("temperature: too hot", field="temperature"), "invalid_request_error"),
        (ModelNotFound("no such model"), "invalid_request_error"),
        (InvalidApiKey("wrong"), "authentication_error"),
        (ModelAccessDenied("no"), "permission_error"),
        (AllSlotsBusy("busy"), "server_error"),
        (RbeeError("boom"), "server_error"),
    ],
)
def test_error_shape(error: RbeeError, kind: str) -> None:
    body = error_body(error, "c-1")["error"]

    assert (body["type"], body["code"], body["message"], body["correlation_id"]) == (kind, error.code, error.message, "c-1")
    assert body["param"] == error.details.get("field")
