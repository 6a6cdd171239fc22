"""Translation between OpenAI's shapes and ours; the official client's own models judge what we send."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from rbee_serve.contract.api import ChatCompletionRequest, CompletionRequest, StopReason, parse
from rbee_serve.contract.errors import AllSlotsBusy, InvalidApiKey, InvalidRequest, ModelAccessDenied, ModelNotFound, RbeeError
from rbee_serve.queen.openai_shapes import (
    COMPLETION_MAX_TOKENS,
    ChatShape,
    CompletionShape,
    Shape,
    error_body,
    finish_reason,
    refuse_unsupported,
    to_inference,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**more: Any) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, CHAT | more)


def completion(**more: Any) -> CompletionRequest:
    return parse(CompletionRequest, {"model": "m", "prompt": "hi"} | more)


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
        ({"n": 2}, "n"),
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
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"logprobs": 0},
        {"top_logprobs": 5},
        {"logit_bias": {"1": 5}},
        {"best_of": 2},
        {"suffix": "x"},
        {"audio": {}},
    ],
)
def test_what_would_have_to_be_ignored_is_refused_by_name(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not supported") as e:
        refuse_unsupported(CHAT | body)

    assert e.value.details["field"] in body


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"tools": None},
        {"tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logprobs": False},
        {"logit_bias": {}},
        {"user": "me", "metadata": {"a": "b"}, "store": True},
    ],
)
def test_what_changes_nothing_is_accepted(body: dict[str, Any]) -> None:
    refuse_unsupported(CHAT | body)


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
    (plain,) = data_of(shape_of("1", "m", 5).closing("MAX_TOKENS", 7, 3))
    finish, usage = data_of(shape_of("1", "m", 5, include_usage=True).closing("MAX_TOKENS", 7, 3))

    assert "usage" not in plain
    assert (finish["choices"][0]["finish_reason"], finish["usage"]) == ("length", None)
    assert (usage["choices"], usage["usage"]) == ([], {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10})


def test_whole_answers_are_what_the_client_expects() -> None:
    answer = ChatCompletion.model_validate(ChatShape("1", "m", 5).whole("hello", "EOS", 7, 3))
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hello", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 10

    older = Completion.model_validate(CompletionShape("1", "m", 5).whole("hello", "MAX_TOKENS", 7, 3))
    assert (older.choices[0].text, older.choices[0].finish_reason) == ("hello", "length")


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
