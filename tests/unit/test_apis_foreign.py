"""Ollama's, Anthropic's and OpenAI's Responses API over a scripted engine; the official clients' models judge the answers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, cast

import anthropic.types
import ollama
import openai.types.responses as responses
import pytest
from asgi import Exchange
from pydantic import TypeAdapter
from scripted_engine import ScriptedEngine, until
from test_worker_app import Front, with_front

from rbee_serve.common.apis import anthropic_api, ollama_api, responses_api
from rbee_serve.common.apis.responses_api import ResponseShape
from rbee_serve.common.apis.responses_messages import ResponsesRequest
from rbee_serve.common.apis.streams import Reading
from rbee_serve.common.http import RequestLimits, create_base_app
from rbee_serve.contract.api import InferenceRequest
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.backend import WorkerBackend
from rbee_serve.worker.inference import InferenceApi

APIS = (anthropic_api, ollama_api, responses_api)
CALL = '<tool_call> {"name": "f", "arguments": {"a": 1}} </tool_call>'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
USER = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"model": "m", "messages": USER}
MESSAGE: dict[str, Any] = CHAT | {"max_tokens": 10}
PATHS = {"/api/chat": CHAT, "/v1/messages": MESSAGE, "/v1/responses": {"model": "m", "input": "Hi"}}


class Apis:
    """The routes over the front of a worker."""

    def __init__(self, front: Front) -> None:
        self.front, self.engine = front, front.engine
        backend = WorkerBackend(front.worker, InferenceApi(front.worker))
        settings: WorkerSettings = front.settings
        self._app = create_base_app(
            [route for api in APIS for route in api.routes(backend)],
            authenticate=None,
            limits=RequestLimits.of(settings),
            error_shapes={path: shape for api in APIS for path, shape in api.ERROR_SHAPES.items()},
        )

    def begin(self, path: str, body: Any) -> Exchange:
        return Exchange(self._app, "POST", path, body=[json.dumps(body).encode()]).start()

    async def post(self, path: str, body: Any) -> Exchange:
        return await self.begin(path, body).finish()

    async def stream(self, path: str, body: Any) -> list[dict[str, Any]]:
        """Return the stream's events, or lines."""
        answer = await self.post(path, body | {"stream": True})
        assert answer.status == 200, answer.body
        if answer.headers["content-type"].startswith("application/x-ndjson"):
            return [json.loads(line) for line in answer.body.splitlines()]
        return answer.events()


def with_apis(test: Callable[[Apis], Awaitable[None]], text: str = "one two three", **engine: Any) -> None:
    async def check(front: Front) -> None:
        await test(Apis(front))

    with_front(check, lambda: ScriptedEngine(text, **engine))


# --- Anthropic --------------------------------------------------------------------------------------------------------

ANTHROPIC_EVENT: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)
CLAUDES_TOOL = {"name": "f", "input_schema": SCHEMA}


def test_anthropic_text_whole_and_streamed() -> None:
    async def check(apis: Apis) -> None:
        whole = anthropic.types.Message.model_validate((await apis.post("/v1/messages", MESSAGE)).json())
        events = [ANTHROPIC_EVENT.validate_python(e) for e in await apis.stream("/v1/messages", MESSAGE)]

        assert [b.type for b in whole.content] == ["text"]
        assert (whole.stop_reason, whole.usage.output_tokens) == ("end_turn", 3)
        assert (whole.usage.input_tokens, whole.usage.cache_read_input_tokens) == (4, 3)
        assert [e.type for e in events] == [
            *("message_start", "content_block_start", "content_block_delta", "content_block_delta", "content_block_delta"),
            *("content_block_stop", "message_delta", "message_stop"),
        ]
        assert events[-2].usage.output_tokens == 3

    with_apis(check)


def test_anthropic_tools_whole_and_streamed() -> None:
    async def check(apis: Apis) -> None:
        body = MESSAGE | {"tools": [CLAUDES_TOOL], "max_tokens": 20}
        whole = anthropic.types.Message.model_validate((await apis.post("/v1/messages", body)).json())
        events = [ANTHROPIC_EVENT.validate_python(e) for e in await apis.stream("/v1/messages", body)]

        assert [b.type for b in whole.content] == ["text", "tool_use"]
        assert whole.content[1].type == "tool_use"
        assert (whole.content[1].name, whole.content[1].input, whole.stop_reason) == ("f", {"a": 1}, "tool_use")
        starts = [e for e in events if e.type == "content_block_start"]
        assert [(s.index, s.content_block.type) for s in starts] == [(0, "text"), (1, "tool_use")]
        pieces = [e.delta.partial_json for e in events if e.type == "content_block_delta" and e.index == 1]
        assert json.loads("".join(pieces)) == {"a": 1}
        assert [e.index for e in events if e.type == "content_block_stop"] == [0, 1]

    with_apis(check, f"I will. {CALL}")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [*USER, {"role": "assistant", "content": "I"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.str"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"tools": [{"type": "web_search", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [CLAUDES_TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [CLAUDES_TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"tools": [CLAUDES_TOOL], "output_config": {"format": {"type": "json_schema", "schema": {}}}}, "output_config"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
    ],
)
def test_anthropic_refuses_by_name_in_its_own_shape(body: dict[str, Any], field: str) -> None:
    async def check(apis: Apis) -> None:
        answer = await apis.post("/v1/messages", MESSAGE | body)

        error = answer.json()
        assert (answer.status, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error")
        assert error["error"]["details"]["field"] == field

    with_apis(check)


# --- Ollama -----------------------------------------------------------------------------------------------------------


def test_ollama_lines_and_whole_answers() -> None:
    async def check(apis: Apis) -> None:
        whole = ollama.ChatResponse.model_validate((await apis.post("/api/chat", CHAT | {"stream": False})).json())
        lines = [ollama.ChatResponse.model_validate(line) for line in await apis.stream("/api/chat", CHAT)]
        prompt = {"model": "m", "prompt": "Hi", "system": "S", "stream": False, "options": {"num_predict": 2, "seed": 3}}
        generated = ollama.GenerateResponse.model_validate((await apis.post("/api/generate", prompt)).json())

        assert (whole.message.content, whole.done, whole.done_reason) == ("one two three ", True, "stop")
        assert (whole.prompt_eval_count, whole.eval_count, whole.eval_duration) == (7, 3, 2_000_000)
        assert [line.done for line in lines] == [False, False, False, True]
        assert "".join(line.message.content or "" for line in lines) == whole.message.content
        assert generated.response == "one two "
        asked = apis.engine.requests[-1]
        assert (asked.text, asked.params.seed, asked.params.max_tokens) == ("<system>S<user>Hi<assistant>", 3, 2)
        assert (asked.params.temperature, asked.params.top_k, asked.params.top_p) == (0.8, 40, 0.9)

    with_apis(check)


def test_ollama_calls_come_whole() -> None:
    async def check(apis: Apis) -> None:
        body = CHAT | {"tools": [TOOL]}
        whole = ollama.ChatResponse.model_validate((await apis.post("/api/chat", body | {"stream": False})).json())
        lines = [ollama.ChatResponse.model_validate(line) for line in await apis.stream("/api/chat", body)]

        for calls in (whole.message.tool_calls, [c for line in lines for c in line.message.tool_calls or []]):
            assert [(c.function.name, c.function.arguments) for c in calls or []] == [("f", {"a": 1})] * 2

    with_apis(check, f"{CALL} {CALL}")


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/api/chat", {"options": {"mirostat": 1}}, "options.mirostat"),
        ("/api/chat", {"options": {"num_ctx": 4096}}, "options.num_ctx"),
        ("/api/chat", {"options": {"top_k": "many"}}, "top_k"),
        ("/api/chat", {"options": {"wat": 1}}, "options.wat"),
        ("/api/chat", {"options": [1]}, "options"),
        ("/api/chat", {"think": True}, "think"),
        ("/api/chat", {"format": "xml"}, "format"),
        ("/api/chat", {"tools": [TOOL], "format": "json"}, "format"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["a"]}]}, "images"),
        ("/api/generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
        ("/api/generate", {"prompt": "x", "raw": True, "system": "s"}, "system"),
        ("/api/embed", {"input": []}, "input"),
        ("/api/show", {"model": None}, "model"),
    ],
)
def test_ollama_refuses_by_name_in_its_own_shape(path: str, body: dict[str, Any], word: str) -> None:
    async def check(apis: Apis) -> None:
        answer = await apis.post(path, CHAT | body)

        assert answer.status == 400
        assert word in answer.json()["error"]

    with_apis(check)


def test_ollama_s_requests_without_a_prompt_say_that_the_model_is_there() -> None:
    async def check(apis: Apis) -> None:
        assert (await apis.post("/api/generate", {"model": "m"})).json()["done_reason"] == "load"
        assert (await apis.post("/api/chat", {"model": "m:latest", "keep_alive": 0})).json()["done_reason"] == "unload"
        assert (await apis.post("/api/chat", {"model": "other"})).status == 404
        assert apis.engine.requests == []

    with_apis(check)


# --- Responses --------------------------------------------------------------------------------------------------------

RESPONSE_EVENT: TypeAdapter[Any] = TypeAdapter(responses.ResponseStreamEvent)


def test_responses_of_text_and_calls() -> None:
    async def check(apis: Apis) -> None:
        tool = {"type": "function", "name": "f", "parameters": SCHEMA}
        body = {"model": "m", "input": [{"role": "user", "content": "Hi"}], "tools": [tool], "max_output_tokens": 20}
        whole = responses.Response.model_validate((await apis.post("/v1/responses", body)).json())
        events = [RESPONSE_EVENT.validate_python(e) for e in await apis.stream("/v1/responses", body)]

        assert [item.type for item in whole.output] == ["message", "function_call"]
        assert whole.output_text == "I will."
        call = whole.output[1]
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments), call.status) == ("f", {"a": 1}, "completed")
        assert [e.sequence_number for e in events] == list(range(len(events)))
        kinds = [e.type for e in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
        assert kinds[-1] == "response.completed"
        final = events[-1].response
        assert [item.type for item in final.output] == ["message", "function_call"]
        pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert json.loads("".join(pieces)) == {"a": 1}

    with_apis(check, f"I will. {CALL}")


def test_a_response_that_is_cut_is_incomplete() -> None:
    shape = ResponseShape("1", "m", ResponsesRequest(model="m", input="Hi"), 5.0)
    shape.text("Once")
    last = shape.finish(Reading(cast(Any, None), InferenceRequest(prompt="x")), "MAX_TOKENS")

    body = responses.Response.model_validate(shape.response())
    assert body.status == body.output[0].status == "incomplete"
    assert body.incomplete_details is not None
    assert body.incomplete_details.reason == "max_output_tokens"
    assert b"event: response.incomplete" in last


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input.0.role"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ],
)
def test_responses_refuse_by_name(body: dict[str, Any], field: str) -> None:
    async def check(apis: Apis) -> None:
        answer = await apis.post("/v1/responses", {"model": "m", "input": "Hi"} | body)

        assert (answer.status, answer.json()["error"]["param"]) == (400, field)

    with_apis(check)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_failure_within_a_stream_is_told_in_the_api_s_own_way(path: str) -> None:
    async def check(apis: Apis) -> None:
        apis.engine.breaks_after = 1
        whole = await apis.post(path, PATHS[path] | {"stream": False})
        events = await apis.stream(path, PATHS[path])

        assert whole.status == 502
        assert "WORKER_CRASHED" in json.dumps(events)
        assert "error" in events[-1] or events[-1]["type"] == "response.failed"
        assert apis.engine.running == set()

    with_apis(check)


@pytest.mark.parametrize("path", PATHS)
def test_client_that_leaves_frees_the_slot_in_every_api(path: str) -> None:
    async def check(apis: Apis) -> None:
        for stream in (True, False):
            one = apis.begin(path, PATHS[path] | {"stream": stream})
            await until(lambda: any(g.tokens_out == 3 for g in apis.front.worker.active.values()))
            one.leave()
            await one.finish(1)
            assert apis.engine.running == set()

    with_apis(check, endless=True)
