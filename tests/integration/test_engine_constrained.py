"""Grammars and JSON schemas with the real model: the text follows, ends where it is complete, and hostile ones hurt nobody."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engine_bench import Answer, ask, running

from rbee_serve.contract.api import StopReason
from rbee_serve.contract.errors import RequestError

pytestmark = pytest.mark.integration

CHAT = "<|im_start|>user\nDescribe a person as JSON.<|im_end|>\n<|im_start|>assistant\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["kind", "tall", "old"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
}
LIST = 'root ::= item{4}\nitem ::= "- " [a-zé ]{3,12} "\\n"'


def test_engine_text_follows_grammar_and_schema(model_path: Path) -> None:
    """Greedy and hot, also where the model is made to babble and where it may not stop; complete means EOS."""
    cases: list[dict[str, Any]] = [
        {"json_schema": SCHEMA},
        {"json_schema": SCHEMA, "ignore_eos": True},
        *({"json_schema": SCHEMA, "temperature": 1.8, "seed": n} for n in range(4)),
        {"json_schema": SCHEMA, "temperature": 1.5, "seed": 1, "typical_p": 0.5, "top_k": 9, "min_p": 0.1, "top_p": 0.9},
        {"json_schema": SCHEMA, "repetition_penalty": 1.3, "presence_penalty": 1.0},
        {"json_schema": {}, "temperature": 1.2, "seed": 3},
        {"grammar": LIST},
        {"grammar": LIST, "temperature": 2, "seed": 1},
        {"grammar": 'root ::= "yes" | "no"', "ignore_eos": True},
        {"grammar": 'root ::= "🐝🐝" [é-ü]', "temperature": 1, "seed": 2, "logprobs": 2},
    ]

    async def run() -> list[Answer]:
        async with running(model_path, slots=len(cases)) as engine:
            return await asyncio.gather(*(ask(engine, CHAT, max_tokens=200, **case) for case in cases))

    for case, answer in zip(cases, asyncio.run(run()), strict=True):
        if case.get("json_schema"):
            jsonschema.validate(json.loads(answer.text), SCHEMA)
        elif "json_schema" in case:
            assert answer.reason == StopReason.MAX_TOKENS or json.loads(answer.text) is not NotImplemented
            continue
        elif case["grammar"] == LIST:
            assert re.fullmatch(r"(- [a-zé ]{3,12}\n){4}", answer.text)
        else:
            assert re.fullmatch("yes|no|🐝🐝[é-ü]", answer.text)
        assert answer.reason == StopReason.EOS, case


def test_engine_cut_within_json_is_max_tokens(model_path: Path) -> None:
    async def run() -> tuple[Answer, Answer]:
        async with running(model_path) as engine:
            cut = await ask(engine, CHAT, max_tokens=5, json_schema=SCHEMA)
            stopped = await ask(engine, CHAT, max_tokens=100, json_schema=SCHEMA, stop=['"age'])
            return cut, stopped

    cut, stopped = asyncio.run(run())
    assert (cut.reason, len(cut.tokens)) == (StopReason.MAX_TOKENS, 5)
    assert stopped.reason == StopReason.STOP_SEQUENCE
    assert stopped.text.rstrip().endswith(",")


def test_engine_grammar_changes_nothing_that_it_allows(model_path: Path) -> None:
    """Where the model does what it is allowed to anyway, text and draws are those of the stream without a grammar."""

    async def run() -> None:
        async with running(model_path) as engine:
            for params in ({}, {"temperature": 1.1, "seed": 8, "top_p": 0.9}):
                free = await ask(engine, "Once upon a time", max_tokens=24, **params)
                bound = await ask(engine, "Once upon a time", max_tokens=24, grammar="root ::= .*", **params)
                assert bound.ids == free.ids
                assert bound.reason == StopReason.MAX_TOKENS

    asyncio.run(run())


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"grammar": "root ::= root"}, "grammar: left recursion"),
    ({"grammar": "root ::= " + "(" * 65_000}, "grammar: line 1.*nested deeper"),
    ({"grammar": 'root ::= "a"{1000000}'}, "grammar: .*repetitions"),
    ({"grammar": 'root ::= ("a" | "a'}, "grammar: line 1"),
    ({"grammar": "root ::= x\x00"}, "grammar: "),
    ({"json_schema": {"type": "string", "maxLength": 10**9}}, "json_schema: at #: 'maxLength'"),
    ({"json_schema": {"$ref": "#"}}, "json_schema: left recursion"),
    ({"json_schema": {"not": {}}}, "json_schema: at #: 'not' is not supported"),
]


def test_engine_lives_through_hostile_grammars(model_path: Path) -> None:
    """Refused before they begin, or ended alone when they become too much; whoever runs beside them is not held up."""
    doubling = 'root ::= "a" root b | "a" root c | "a"\nb ::= "b"\nc ::= "b" "c"'
    slow = 'root ::= x{0,2000} x{0,2000} x{0,2000} "\\n"\nx ::= [^\\n]'

    async def run() -> None:
        async with running(model_path, slots=2) as engine:
            alone = await ask(engine, "Once upon a time", max_tokens=40)
            pid = engine.pid
            for params, problem in HOSTILE:
                with pytest.raises(RequestError, match=problem) as e:
                    await ask(engine, "Hi", **params)
                assert e.value.details["field"] in params
            stream = asyncio.create_task(ask(engine, "Once upon a time", max_tokens=40))
            (letter,) = await engine.tokenize("a", parse_special=False, add_bos=False)
            with pytest.raises(RequestError, match="too ambiguous"):
                await ask(engine, "Hi", max_tokens=100, grammar=doubling, logit_bias={letter: 100.0})
            ended = (await asyncio.gather(ask(engine, "Hi", max_tokens=60, grammar=slow), return_exceptions=True))[0]
            assert isinstance(ended, Answer) or "too ambiguous" in str(ended)
            assert (await stream).ids == alone.ids
            assert (await ask(engine, "Once upon a time", max_tokens=40)).ids == alone.ids
            assert (engine.pid, engine.slots_busy) == (pid, 0)

    asyncio.run(run())


def test_engine_refuses_a_continuation_that_breaks_the_grammar(model_path: Path) -> None:
    async def run() -> None:
        async with running(model_path) as engine:
            with pytest.raises(RequestError, match="token 0 is not what the grammar allows"):
                await ask(engine, CHAT, [1000], json_schema=SCHEMA)
            whole = await ask(engine, CHAT, max_tokens=100, json_schema=SCHEMA)
            done = await ask(engine, CHAT, whole.ids, max_tokens=100, json_schema=SCHEMA)
            assert (done.tokens, done.reason) == ([], StopReason.EOS)

    asyncio.run(run())
