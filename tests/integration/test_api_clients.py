"""The official clients of OpenAI, Ollama and Anthropic against a real queen, a real worker and the real model."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
from fleet import MODEL, Fleet

pytestmark = pytest.mark.integration

USER: Any = [{"role": "user", "content": "Name a colour."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"type": "string", "maxLength": 12}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "n"],
    "additionalProperties": False,
}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Fleet]:
    running = Fleet(tmp_path_factory.mktemp("clients"), model_path)
    try:
        running.start_queen()
        with model_path.open("rb") as file:
            running.add_worker("lab1", slots=4, model_sha256=hashlib.file_digest(file, "sha256").hexdigest())
        running.wait_ready()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def ai(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.queen.url}/v1", api_key=fleet.key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def direct(fleet: Fleet) -> Iterator[openai.OpenAI]:
    """OpenAI's client at the worker itself."""
    url = f"{fleet.workers['lab1-cpu0'].url}/v1"
    with openai.OpenAI(base_url=url, api_key=fleet.token, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llama(fleet: Fleet) -> Iterator[ollama.Client]:
    client = ollama.Client(fleet.queen.url, headers={"Authorization": f"Bearer {fleet.key}"})
    yield client
    client._client.close()


@pytest.fixture(scope="module")
def claude(fleet: Fleet) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=fleet.queen.url, api_key=fleet.key, max_retries=0) as client:
        yield client


# --- OpenAI: chat and completions -------------------------------------------------------------------------------------


def test_chat_says_the_same_at_queen_and_worker_streamed_and_whole(ai: openai.OpenAI, direct: openai.OpenAI) -> None:
    texts = []
    messages: Any = [{"role": "system", "content": "Be brief. " * 100}, *USER]  # long enough to be found in the cache
    common: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 12, "temperature": 0}
    for client in (ai, direct):
        whole = client.chat.completions.create(**common)
        streamed = client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True})
        chunks = list(streamed)
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 12
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
        assert chunks[-1].usage.prompt_tokens_details is not None
        assert (chunks[-1].usage.prompt_tokens_details.cached_tokens or 0) > 0  # the same prompt once more
        texts += [whole.choices[0].message.content, "".join(c.choices[0].delta.content or "" for c in chunks[:-1])]
    assert len(set(texts)) == 1
    assert texts[0]


def test_n_answers_are_those_of_seeds_that_count_up(ai: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 8, "temperature": 1.0}
    alone = [ai.chat.completions.create(**common, seed=7 + k).choices[0].message.content for k in range(3)]
    together = ai.chat.completions.create(**common, seed=7, n=3)
    streamed: dict[int, str] = dict.fromkeys(range(3), "")
    for chunk in ai.chat.completions.create(**common, seed=7, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""

    assert [c.message.content for c in together.choices] == alone
    assert list(streamed.values()) == alone
    assert together.usage is not None
    assert together.usage.completion_tokens <= 24


@pytest.mark.parametrize("where", ["ai", "direct"])
def test_more_answers_than_slots_follow_one_another(where: str, request: pytest.FixtureRequest) -> None:
    client: openai.OpenAI = request.getfixturevalue(where)
    common: dict[str, Any] = {"model": MODEL, "max_tokens": 4, "temperature": 0}
    prompts = [f"The number {word} is" for word in ("one", "two", "three", "four", "five", "six", "seven")]
    alone = [client.completions.create(**common, prompt=prompt).choices[0].text for prompt in prompts]

    whole = client.completions.create(**common, prompt=prompts)
    streamed = dict.fromkeys(range(len(prompts)), "")
    for chunk in client.completions.create(**common, prompt=prompts, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text

    assert [c.text for c in whole.choices] == list(streamed.values()) == alone


def test_log_probabilities_of_chat_and_completions(ai: openai.OpenAI) -> None:
    chat = ai.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}
    )
    scored = chat.choices[0].logprobs
    assert scored is not None
    assert scored.content is not None
    for token in scored.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(t.logprob for t in token.top_logprobs) <= 0  # greedy
    assert "".join(t.token for t in scored.content).startswith(chat.choices[0].message.content or "")
    counting: dict[str, Any] = {"model": MODEL, "prompt": "One, two, three,", "max_tokens": 3, "temperature": 0, "logprobs": 2}
    older = ai.completions.create(**counting)
    values = older.choices[0].logprobs
    assert values is not None
    assert values.tokens is not None
    assert "".join(values.tokens) == older.choices[0].text
    assert all(len(top) == 2 for top in values.top_logprobs or [])
    streamed = list(ai.completions.create(**counting, stream=True))
    found = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs is not None]
    assert [t for lp in found for t in lp.tokens or []] == values.tokens


def test_a_bias_decides_the_token(ai: openai.OpenAI, fleet: Fleet) -> None:
    with fleet.worker_client("lab1-cpu0") as worker:
        (ident,) = worker.post("/v1/tokenize", json={"text": " blue", "add_bos": False}).json()["token_ids"]
    biased = ai.completions.create(model=MODEL, prompt="The sky is", max_tokens=3, logit_bias={str(ident): 100})

    assert biased.choices[0].text == " blue blue blue"


def test_prompts_as_lists_and_as_token_ids(ai: openai.OpenAI, fleet: Fleet) -> None:
    common: dict[str, Any] = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    one = ai.completions.create(prompt="One, two, three,", **common).choices[0].text
    with fleet.worker_client("lab1-cpu0") as worker:
        ids = worker.post("/v1/tokenize", json={"text": "One, two, three,"}).json()["token_ids"]
        assert worker.post("/v1/detokenize", json={"token_ids": ids}).json()["text"].strip() == "One, two, three,"
        assert worker.post("/v1/detokenize", json={"token_ids": [10**6]}).status_code == 400
        template = worker.post("/v1/apply-template", json={"messages": USER}).json()
    assert "Name a colour." in template["prompt"]
    assert template["count"] > 5

    several = ai.completions.create(prompt=["One, two, three,", "The sky is"], **common)
    assert [c.index for c in several.choices] == [0, 1]
    assert several.choices[0].text == one
    assert ai.completions.create(prompt=ids, **common).choices[0].text == one
    assert ai.completions.create(prompt=[ids, ids], **common).choices[1].text == one


@pytest.mark.parametrize("where", ["ai", "direct"])
def test_wrong_model_wrong_key_and_what_we_do_not_have(where: str, request: pytest.FixtureRequest) -> None:
    client: openai.OpenAI = request.getfixturevalue(where)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=USER)
    assert missing.value.code == "MODEL_NOT_FOUND"
    assert MODEL in missing.value.message
    with pytest.raises(openai.AuthenticationError) as unknown:
        client.with_options(api_key="wrong").models.list()
    assert (unknown.value.code, unknown.value.type) == ("INVALID_API_KEY", "authentication_error")
    refused: list[dict[str, Any]] = [{"audio": {"voice": "x", "format": "wav"}}, {"web_search_options": {}}, {"n": 17}]
    for body in refused:
        with pytest.raises(openai.BadRequestError) as e:
            client.chat.completions.create(model=MODEL, messages=USER, **body)
        assert e.value.param in body
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model=MODEL, prompt="x", echo=True)


# --- OpenAI: embeddings -----------------------------------------------------------------------------------------------


def test_embeddings_of_every_form_are_the_same_vectors(ai: openai.OpenAI, direct: openai.OpenAI, fleet: Fleet) -> None:
    texts = ["The sky is blue.", "Stock prices fell.", "Blue is the colour of the sky."]
    vectors = [d.embedding for d in ai.embeddings.create(model=MODEL, input=texts, encoding_format="float").data]
    packed = ai.embeddings.create(model=MODEL, input=texts[0])  # the client asks for base64 and unpacks it
    with fleet.client() as client:
        raw = client.post("/v1/embeddings", json={"model": MODEL, "input": texts[0], "encoding_format": "base64"})
    own = direct.embeddings.create(model=MODEL, input=texts[0], encoding_format="float").data[0].embedding
    with fleet.worker_client("lab1-cpu0") as worker:
        ids = worker.post("/v1/tokenize", json={"text": texts[0]}).json()["token_ids"]
    by_ids = ai.embeddings.create(model=MODEL, input=[ids], encoding_format="float").data[0].embedding

    def product(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert all(math.isclose(product(v, v), 1, rel_tol=1e-4) for v in vectors)
    assert product(vectors[0], vectors[1]) < 0.99  # another text, another vector
    for same in (packed.data[0].embedding, own, by_ids):
        assert product(same, vectors[0]) > 0.9999
    bytes_ = base64.b64decode(raw.json()["data"][0]["embedding"])
    assert len(struct.unpack(f"<{len(bytes_) // 4}f", bytes_)) == len(vectors[0])
    assert packed.usage.prompt_tokens == len(ids)
    many = ai.embeddings.create(model=MODEL, input=texts * 100, encoding_format="float").data  # in pieces, from end to end
    assert [d.index for d in many] == list(range(300))
    assert all(product(d.embedding, vectors[d.index % 3]) > 0.9995 for d in many)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        ai.embeddings.create(model=MODEL, input="x", dimensions=8)
    with pytest.raises(openai.NotFoundError):
        ai.embeddings.create(model="gpt-9", input="x")


# --- OpenAI: responses ------------------------------------------------------------------------------------------------


def test_responses_whole_and_streamed(ai: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": MODEL, "max_output_tokens": 10, "temperature": 0, "store": False}
    whole = ai.responses.create(input="Name a colour.", instructions="Be brief.", **common)
    with ai.responses.stream(
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "Name a colour."}]},
        ],
        **common,
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()

    assert whole.output_text
    assert whole.status in ("completed", "incomplete")
    assert whole.usage is not None
    assert whole.usage.output_tokens <= 10
    assert final.output_text == whole.output_text
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds[-1] == f"response.{whole.status}"
    refused: list[dict[str, Any]] = [{"store": True}, {"previous_response_id": "resp_1"}, {"background": True}]
    for body in refused:
        with pytest.raises(openai.BadRequestError) as e:
            ai.responses.create(model=MODEL, input="x", **body)
        assert e.value.param in body


# --- Ollama -----------------------------------------------------------------------------------------------------------


def test_ollama_tells_the_digest_of_the_file(llama: ollama.Client, model_path: Path) -> None:
    with model_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    assert [m.digest for m in llama.list().models] == [digest]
    assert [m.digest for m in llama.ps().models] == [digest]


def test_ollama_lists_and_shows(llama: ollama.Client) -> None:
    (listed,) = llama.list().models
    (loaded,) = llama.ps().models
    shown = llama.show(f"{MODEL}:latest")

    assert (listed.model, loaded.model) == (MODEL, MODEL)
    assert listed.details is not None
    assert listed.details.family == "llama"
    assert "completion" in (shown.capabilities or [])
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 8192


def test_ollama_chat_and_generate_streamed_and_whole(llama: ollama.Client, ai: openai.OpenAI) -> None:
    options = {"temperature": 0, "num_predict": 10, "repeat_penalty": 1.0, "num_ctx": 512, "num_thread": 2}
    whole = llama.chat(MODEL, USER, options=options, keep_alive="5m")
    streamed = list(llama.chat(MODEL, USER, options=options, stream=True))
    prompt = llama.generate(MODEL, "Name a colour.", options=options)
    lines = list(llama.generate(MODEL, "Name a colour.", options=options, stream=True))
    reference = ai.chat.completions.create(model=MODEL, messages=USER, max_tokens=10, temperature=0)

    assert whole.message.content == reference.choices[0].message.content == prompt.response
    assert "".join(c.message.content or "" for c in streamed) == whole.message.content
    assert "".join(line.response or "" for line in lines) == whole.message.content
    assert (streamed[-1].done, streamed[-1].done_reason) == (True, whole.done_reason)
    assert streamed[-1].eval_count == whole.eval_count == (reference.usage and reference.usage.completion_tokens)
    assert whole.total_duration is not None
    assert whole.eval_duration is not None
    assert whole.total_duration >= whole.eval_duration > 0
    raw = llama.generate(MODEL, "One, two, three,", raw=True, options=options)
    plain = ai.completions.create(model=MODEL, prompt="One, two, three,", max_tokens=10, temperature=0)
    assert raw.response == plain.choices[0].text
    assert llama.generate(MODEL, "").done_reason == "load"


def test_ollama_embeddings(llama: ollama.Client, ai: openai.OpenAI) -> None:
    vectors = llama.embed(MODEL, ["a", "b"]).embeddings
    reference = ai.embeddings.create(model=MODEL, input=["a", "b"], encoding_format="float").data

    assert [list(v) for v in vectors] == [d.embedding for d in reference]
    assert list(llama.embeddings(MODEL, "a").embedding) == list(vectors[0])


def test_ollama_errors_are_texts(llama: ollama.Client, fleet: Fleet) -> None:
    with pytest.raises(ollama.ResponseError, match="gpt-9") as missing:
        llama.chat("gpt-9", USER)
    assert missing.value.status_code == 404
    for options in ({"mirostat": 2}, {"num_ctx": 10**6}, {"temperature": "hot"}, {"nonsense": 1}):
        with pytest.raises(ollama.ResponseError, match=next(iter(options))) as wrong:
            llama.chat(MODEL, USER, options=options)
        assert wrong.value.status_code == 400
    stranger = ollama.Client(fleet.queen.url, headers={"Authorization": "Bearer wrong"})
    with pytest.raises(ollama.ResponseError, match="key") as unknown:
        stranger.list()
    stranger._client.close()
    assert unknown.value.status_code == 401


# --- Anthropic --------------------------------------------------------------------------------------------------------


def test_anthropic_messages_whole_and_streamed(claude: anthropic.Anthropic, ai: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": MODEL, "max_tokens": 10, "system": "Be brief.", "messages": USER}
    common["extra_body"] = {"temperature": 0}
    whole = claude.messages.create(**common)
    with claude.messages.stream(**common) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    reference = ai.chat.completions.create(
        model=MODEL, messages=[{"role": "system", "content": "Be brief."}, *USER], max_tokens=10, temperature=0
    )

    assert whole.content[0].type == "text"
    assert whole.content[0].text == reference.choices[0].message.content
    assert final.content[0].type == "text"
    assert final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert reference.usage is not None
    assert whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) == reference.usage.prompt_tokens
    assert (kinds[0], kinds[1], kinds[-1]) == ("message_start", "content_block_start", "message_stop")
    counted = claude.messages.count_tokens(model=MODEL, system="Be brief.", messages=USER)
    assert counted.input_tokens == reference.usage.prompt_tokens
    stopped = claude.messages.create(**common | {"stop_sequences": [whole.content[0].text[3:6]]})
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", whole.content[0].text[3:6])
    several = common | {"stop_sequences": ["nowhere in it", whole.content[0].text[3:6], "nor this"]}
    assert claude.messages.create(**several).stop_sequence == whole.content[0].text[3:6]
    with claude.messages.stream(**several) as stream:
        assert stream.get_final_message().stop_sequence == whole.content[0].text[3:6]
    assert claude.messages.create(**common | {"stop_sequences": ["nowhere in it"]}).stop_sequence is None


def test_anthropic_errors(claude: anthropic.Anthropic) -> None:
    common: dict[str, Any] = {"model": MODEL, "max_tokens": 5, "messages": USER}
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(**common | {"model": "claude-9"})
    assert isinstance(missing.value.body, dict)
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="wrong").messages.create(**common)
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        claude.messages.create(**common, thinking={"type": "enabled", "budget_tokens": 1024})
    image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        claude.messages.create(**common | {"messages": [{"role": "user", "content": [image]}]})


# --- tool history and keys --------------------------------------------------------------------------------------------


def test_a_conversation_with_calls_and_results_is_understood_by_all(
    ai: openai.OpenAI, llama: ollama.Client, claude: anthropic.Anthropic
) -> None:
    """The same history in three spellings is the same prompt."""
    arguments = {"city": "Paris", "days": 1}
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}
    history: Any = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    chat = ai.chat.completions.create(model=MODEL, messages=history, tools=[TOOL], max_tokens=1, temperature=0)
    responses = ai.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": "Weather in Paris?"},
            {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": json.dumps(arguments)},
            {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
        ],
        tools=[{"type": "function", "strict": False, **TOOL["function"]}],
        max_output_tokens=1,
    )
    spoken = llama.chat(
        MODEL,
        [
            {"role": "user", "content": "Weather in Paris?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]},
            {"role": "tool", "tool_name": "weather", "content": "sunny"},
        ],
        tools=[TOOL],
        options={"num_predict": 1},
    )
    message = claude.messages.create(
        model=MODEL,
        max_tokens=1,
        messages=[
            {"role": "user", "content": "Weather in Paris?"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "call_1", "name": "weather", "input": arguments}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}]},
        ],
        tools=[{"name": "weather", "description": "Weather of a city", "input_schema": PARAMETERS}],
    )

    assert chat.usage is not None
    assert responses.usage is not None
    assert responses.usage.input_tokens == chat.usage.prompt_tokens
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens
    assert spoken.prompt_eval_count is not None
    assert spoken.prompt_eval_count > 150  # Ollama's client leaves out parts of the schema


def test_a_key_may_come_as_anthropic_s_clients_send_it(fleet: Fleet) -> None:
    for headers, status in (({"x-api-key": fleet.key}, 200), ({"x-api-key": "wrong"}, 401), ({"x-api-key": ""}, 401)):
        assert httpx.get(f"{fleet.queen.url}/v1/models", headers=headers, timeout=60, trust_env=False).status_code == status
    both = {"x-api-key": fleet.key, "Authorization": "Bearer wrong"}
    assert httpx.get(f"{fleet.queen.url}/v1/models", headers=both, timeout=60, trust_env=False).status_code == 401


# --- what is enforced: tool calls and schemas -------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_call_that_is_required_comes_in_every_api(
    ai: openai.OpenAI, llama: ollama.Client, claude: anthropic.Anthropic, choice: Any
) -> None:
    def fits(arguments: Any) -> bool:
        return arguments["city"] in ("Paris", "Rome") and arguments["days"] in range(10) and len(arguments) == 2

    common: dict[str, Any] = {"model": MODEL, "messages": USER, "tools": [TOOL], "max_tokens": 100, "seed": 3}
    whole = ai.chat.completions.create(**common, tool_choice=choice).choices[0]
    calls: dict[str, str] = {}
    names = []
    for chunk in ai.chat.completions.create(**common, tool_choice=choice, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.function is not None and call.function.name:
                names.append(call.function.name)
            calls[str(call.index)] = calls.get(str(call.index), "") + ((call.function and call.function.arguments) or "")
    response = ai.responses.create(
        model=MODEL,
        input="Weather?",
        tools=[{"type": "function", "strict": True, **TOOL["function"]}],
        tool_choice="required",
    )
    message = claude.messages.create(
        model=MODEL,
        max_tokens=100,
        messages=USER,
        tools=[{"name": "weather", "input_schema": PARAMETERS}],
        tool_choice={"type": "any"},
    )

    assert whole.finish_reason == "tool_calls"
    assert whole.message.tool_calls is not None
    assert whole.message.tool_calls[0].type == "function"
    assert fits(json.loads(whole.message.tool_calls[0].function.arguments))
    assert (names, list(calls)) == (["weather"], ["0"])
    assert json.loads(calls["0"]) == json.loads(whole.message.tool_calls[0].function.arguments)  # same seed
    (item,) = response.output
    assert item.type == "function_call"
    assert fits(json.loads(item.arguments))
    (block,) = message.content
    assert block.type == "tool_use"
    assert fits(block.input)
    assert message.stop_reason == "tool_use"


def test_a_schema_is_kept_in_every_api(ai: openai.OpenAI, llama: ollama.Client, claude: anthropic.Anthropic) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    chat = ai.chat.completions.create(model=MODEL, messages=USER, max_tokens=100, response_format=wanted)
    response = ai.responses.create(
        model=MODEL, input="A colour?", text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    )
    spoken = llama.chat(MODEL, USER, format=SCHEMA)
    message = claude.messages.create(
        model=MODEL,
        max_tokens=100,
        messages=USER,
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )
    assert message.content[0].type == "text"
    for text in (chat.choices[0].message.content, response.output_text, spoken.message.content, message.content[0].text):
        value = json.loads(text or "")
        assert value.keys() == {"colour", "n"}
        assert len(value["colour"]) <= 12
        assert value["n"] in range(10)
    broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}}
    with pytest.raises(openai.BadRequestError) as e:
        ai.chat.completions.create(model=MODEL, messages=USER, response_format=broken)
    assert e.value.code == "INVALID_REQUEST"
