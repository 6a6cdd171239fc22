"""Tool calls found in a model's text, however it is cut into tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_serve.common.apis.tool_calls import Arguments, Call, Found, Parser, Text, parser_of
from rbee_serve.contract.tools import HERMES, LLAMA3, MISTRAL

NAMES = {"weather", "add"}
WEATHER = {"city": 'Pa}r"i]s{\\', "days": [1, {"a": None}], "é": "…"}
ADD = {"a": 1, "b": -2.5}


def written(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


def read(parser: Parser, pieces: list[str]) -> tuple[str, list[tuple[str, Any]], list[Found]]:
    """Return text, calls and everything that was found; calls are checked to come name first."""
    found = [f for piece in pieces for f in parser.push(piece)] + parser.close()
    text, calls, arguments = "", [], {}
    for part in found:
        if isinstance(part, Text):
            text += part.text
        elif isinstance(part, Call):
            assert part.index == len(calls)
            calls.append(part.name)
            arguments[part.index] = ""
        else:
            arguments[part.index] += part.text
    return text, [(name, json.loads(arguments[i])) for i, name in enumerate(calls)], found


TWO = [("weather", WEATHER), ("add", ADD)]
UNOFFERED = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
CASES = [
    (HERMES, f"<tool_call>\n{written('weather', WEATHER)}\n</tool_call>", "", TWO[:1]),
    (
        HERMES,
        f"Let me see. \n<tool_call>{written('weather', WEATHER)}</tool_call>\n<tool_call>\n{written('add', ADD)}</tool_call>\n",
        "Let me see.",
        TWO,
    ),
    (HERMES, f"<tool_call>{written('weather', WEATHER)}", "", TWO[:1]),  # the closing tag is missing
    (HERMES, f"<tool_call>{written('add', json.dumps(ADD))}</tool_call>", "", TWO[1:]),  # arguments as text
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", {"a": 1})]),
    (HERMES, '<tool_call>{"name": "add"}</tool_call>', "", [("add", {})]),
    (HERMES, "no call at all, 1 < 2 and <tool", "no call at all, 1 < 2 and <tool", []),
    (HERMES, "the <tool_call> tag itself", "the <tool_call> tag itself", []),
    (HERMES, '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
    (
        HERMES,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [],
    ),
    # a brace is missing
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', "", [("add", {"a": 1})]),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}\n</tool_call> Well.', "Well.", [("add", {"a": 1})]),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}x</tool_call>', "x</tool_call>", [("add", {"a": 1})]),
    (
        HERMES,
        f'<tool_call>{{"name": "add", "arguments": {{"a": 1}}</tool_call><tool_call>{written("weather", WEATHER)}</tool_call>',
        "",
        [("add", {"a": 1}), ("weather", WEATHER)],
    ),
    (
        LLAMA3,
        f'{{"name": "add", "parameters": {{"a": 1}}; {written("weather", WEATHER, "parameters")}',
        "",
        [("add", {"a": 1}), ("weather", WEATHER)],
    ),
    (HERMES, '<tool_call>{"name": "add"</tool_call>', '<tool_call>{"name": "add"</tool_call>', []),
    # what is no call may have one behind it
    (HERMES, f'<tool_call>{{"name":<tool_call>{written("add", ADD)}</tool_call>', '<tool_call>{"name":', TWO[1:]),
    # arguments that are no object
    *[
        (tool_format, f"{tag}{written('add', arguments)}{closer}", f"{tag}{written('add', arguments)}{closer}", [])
        for tool_format, tag, closer in ((HERMES, "<tool_call>", "</tool_call>"), (LLAMA3, "", ""), (MISTRAL, "[TOOL_CALLS]", ""))
        for arguments in ([1, 2], 7, True, "a", "[1]", -1)
    ],
    (HERMES, '<tool_call>{"arguments": [1], "name": "add"}', '<tool_call>{"arguments": [1], "name": "add"}', []),
    (HERMES, '<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", {})]),
    # the first one counts
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}, "arguments": {"b": 1}}</tool_call>', "", [("add", {"a": 1})]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "parameters": {"b": 1}, "name": "add"}</tool_call>', "", [("add", {"a": 1})]),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}, "arguments": [1]}</tool_call>', "", [("add", {"a": 1})]),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}, "name": "rm"}</tool_call>', "", [("add", {"a": 1})]),
    (LLAMA3, written("weather", WEATHER, "parameters"), "", TWO[:1]),
    (LLAMA3, f"<|python_tag|>{written('weather', WEATHER, 'parameters')}; {written('add', ADD, 'parameters')}", "", TWO),
    (LLAMA3, '{"type": "function", "name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    (LLAMA3, '{"answer": 42, "name": 7}', '{"answer": 42, "name": 7}', []),
    (LLAMA3, "Paris is {nice}.", "Paris is {nice}.", []),
    (LLAMA3, " \n", " \n", []),
    (LLAMA3, " {", " {", []),
    (LLAMA3, '\n{"name": "nobody"}', '\n{"name": "nobody"}', []),
    (LLAMA3, f" {written('weather', WEATHER, 'parameters')}", "", TWO[:1]),
    (MISTRAL, f"[TOOL_CALLS][{written('weather', WEATHER)}, {written('add', ADD)}]", "", TWO),
    (MISTRAL, f"[{written('weather', WEATHER)}]", "", TWO[:1]),  # the tag is a control token that shows no text
    (MISTRAL, f"Sure.[TOOL_CALLS]add[ARGS]{json.dumps(ADD)}", "Sure.", TWO[1:]),
    (MISTRAL, "[1, 2] is a list", "[1, 2] is a list", []),
    (MISTRAL, "plain [TOOL", "plain [TOOL", []),
    (MISTRAL, " [ {1}]", " [ {1}]", []),
    (MISTRAL, "[TOOL_CALLS] [ {1}]", "[TOOL_CALLS] [ {1}]", []),
    (HERMES, "<tool_call>\n{1}", "<tool_call>\n{1}", []),
    (HERMES, "<tool_call>\n", "<tool_call>\n", []),
]


@pytest.mark.parametrize(("tool_format", "text", "said", "calls"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_are_found_wherever_the_text_is_cut(
    tool_format: str, text: str, said: str, calls: list[tuple[str, Any]], size: int
) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]

    assert read(parser_of(tool_format, NAMES), pieces)[:2] == (said, calls)


@given(st.text(), st.sampled_from([HERMES, LLAMA3, MISTRAL]), st.integers(1, 5))
def test_text_without_calls_comes_through_whole(text: str, tool_format: str, size: int) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]

    said, calls, _ = read(parser_of(tool_format, NAMES), pieces)

    assert (said, calls) == (text, [])


def test_the_name_comes_first_and_arguments_while_they_are_written() -> None:
    parser = parser_of(HERMES, NAMES)

    assert parser.push('<tool_call>{"name": "weather", "arg') == []  # who knows what the arguments are
    call, first = parser.push('uments": {"ci')
    assert isinstance(call, Call)
    assert (call.index, call.name) == (0, "weather")
    assert first == Arguments(0, '{"ci')
    assert parser.push('ty": "Paris"') == [Arguments(0, 'ty": "Paris"')]
    assert parser.push("}}</tool_call>") == [Arguments(0, "}")]
    assert parser.close() == []


def test_a_call_that_is_cut_short_stays_as_far_as_it_came() -> None:
    parser = parser_of(HERMES, NAMES)
    found = parser.push('<tool_call>{"name": "add", "arguments": {"a": ') + parser.close()

    assert [type(f) for f in found] == [Call, Arguments]
    braceless = parser_of(HERMES, NAMES)
    found = braceless.push('<tool_call>{"name": "add", "arguments": {"a": [1</tool_call>Well.') + braceless.close()
    assert [f for f in found if not isinstance(f, Call)] == [Arguments(0, '{"a": [1'), Text("Well.")]
    unnamed = parser_of(HERMES, NAMES)
    assert unnamed.push('<tool_call>{"na') + unnamed.close() == [Text('<tool_call>{"na')]


def test_ids_differ_and_are_such_as_mistral_s_templates_take() -> None:
    _, _, found = read(parser_of(MISTRAL, NAMES), [f"[{written('add', ADD)}, {written('add', ADD)}]"])
    ids = [f.id for f in found if isinstance(f, Call)]

    assert len(set(ids)) == 2
    assert all(len(i) == 9 and i.isalnum() for i in ids)
