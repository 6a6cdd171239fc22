"""JSON schemas whose keywords stand beside each other: nothing is weakened, and what is valid may be written."""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_serve.contract.errors import InvalidRequest
from rbee_serve.worker.engine import gbnf, json_schema
from rbee_serve.worker.engine.grammar import Automaton, Matcher, Vocabulary
from rbee_serve.worker.engine.json_logic import NothingValid


def automaton_of(schema: Any) -> Automaton:
    return Automaton(gbnf.parse(json_schema.to_gbnf(schema)))


def accepts(automaton: Automaton, text: str) -> bool:
    found = Matcher(automaton)
    if not found.allows(text.encode()):
        return False
    found.accept(text.encode())
    return found.may_end


def is_valid(value: Any, schema: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}, "tail": {"type": "boolean"}}, "required": ["kind"]}
#: As pydantic writes a tagged union whose tags have defaults: no tag is required.
PETS = {
    "$defs": {
        "Cat": {"type": "object", "properties": {"kind": {"const": "cat", "default": "cat", "type": "string"}, "n": {}}},
        "Dog": {
            "type": "object",
            "properties": {
                "kind": {"enum": ["dog", "wolf"], "type": "string"},
                "pup": {"anyOf": [{"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}, {"type": "null"}]},
            },
        },
    },
    "discriminator": {"mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}, "propertyName": "kind"},
    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
}
BESIDE: list[tuple[Any, list[str], list[str]]] = [
    ({"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 5}, ["5", "77"], ["4", "-1"]),
    ({"$defs": {"n": {"type": "integer", "minimum": 3}}, "allOf": [{"$ref": "#/$defs/n"}], "minimum": 1}, ["3"], ["2"]),
    ({"type": "integer", "minimum": 5, "anyOf": [{"maximum": 10}, {"minimum": 20}]}, ["5", "10", "20"], ["-999", "4", "15"]),
    ({"type": "integer", "allOf": [{"minimum": 5}, {"minimum": 7, "maximum": 9}, {"maximum": 20}]}, ["7", "9"], ["5", "10"]),
    ({"type": "string", "enum": ["a", 1]}, ['"a"'], ["1"]),
    ({"enum": [1, True, 0, False], "type": "boolean"}, ["true", "false"], ["1", "0"]),
    ({"enum": [1, 5, 9], "const": 5}, ["5"], ["1", "9"]),
    ({"enum": ["ab", "abc", "2024-01-01"], "maxLength": 3, "pattern": "c$"}, ['"abc"'], ['"ab"', '"2024-01-01"']),
    ({"enum": [{"a": 1}, {"b": 1}, [1]], "required": ["b"]}, ['{"b":1}', "[1]"], ['{"a":1}']),
    ({"enum": [1, 2, "x"], "anyOf": [{"minimum": 2}, {"type": "string"}]}, ["2", '"x"'], ["1"]),
    ({"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}], "maximum": 2}, ["2"], ["1", "3", "4"]),
    ({"type": ["integer", "string"], "allOf": [{"type": ["number", "null"]}]}, ["1"], ['"x"', "null", "1.5"]),
    ({"type": "string", "pattern": "^.$"}, ['"x"', '"\\""'], ['"\\n"', '"\\u000a"', '"\\r"', '"\u2028"']),
    ({"type": "string", "pattern": "^[ -~]+$"}, ['"a\\"b\\\\ ~"'], ['"a"b"', '"é"']),
    ({"type": "string", "pattern": r"^[^\s\d]\S$"}, ['"ab"'], ['"1b"', '"a\u00a0"', '" b"', '"a\\n"']),
    ({"type": "string", "pattern": r"^[\w.-]+[\]\-]$"}, ['"a_.-]"', '"a-"'], ['"a]b"', '"`-"']),
    (
        {"type": "string", "minLength": 2},
        ['"ab"', '"\\ud83d\\udc1da"', '"\\u00e9x"'],
        ['"\\ud83d\\udc1d"', '"\\ud83d"', '"\\ud83dab"'],
    ),
    ({"type": "string", "format": "uuid", "minLength": 36, "maxLength": 36}, [f'"{"0" * 8}-0000-0000-0000-{"0" * 12}"'], ['"x"']),
    (
        {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"a": {"maximum": 3}, "b": {}}}]},
        ['{"a":3,"b":4}'],
        ['{"a":4}', '{"a":"x"}'],
    ),
    (
        {"allOf": [{"properties": {"a": {}}, "additionalProperties": False}, {"properties": {"b": {}}}]},
        ['{"a":1}', "{}"],
        ['{"b":1}', '{"a":1,"b":1}'],
    ),
    ({"allOf": [{"properties": {"a": {}}}, {"additionalProperties": {"type": "null"}}]}, ['{"a":null,"z":null}'], ['{"a":1}']),
    (
        {
            "allOf": [{"prefixItems": [{"type": "integer"}]}, {"items": {"type": ["integer", "string"], "maximum": 5}}],
            "type": "array",
        },
        ["[5,1]"],
        ["[6]", '["a"]'],
    ),
    ({"type": "object", "properties": {"a": False, "b": {"type": "null"}}}, ["{}", '{"b":null}'], ['{"a":1}']),
    ({"type": "array", "items": False}, ["[]"], ["[1]"]),
    ({"type": "object", "required": ["b"], "properties": {"a": {}}}, ['{"b":1}', '{"a":1,"b":2}'], ["{}", '{"a":1}']),
    (
        {"type": "object", "properties": {"n" * 90: {"type": "null"}}, "additionalProperties": {"type": "integer"}},
        ['{"%s":null}' % ("n" * 90), '{"%s":1}' % ("n" * 89), '{"%s":1}' % ("n" * 91)],
        ['{"%s":1}' % ("n" * 90)],
    ),
    # oneOf
    ({"oneOf": [{"type": "string"}, {"type": "null"}, {"type": "array"}]}, ['"a"', "null", "[]"], ["1"]),
    ({"oneOf": [{"const": 1}, {"enum": ["a", True]}]}, ["1", '"a"', "true"], ["2"]),
    ({"type": "integer", "oneOf": [{"maximum": 3}, {"minimum": 8}]}, ["3", "-5", "8"], ["4"]),
    ({"oneOf": [CAT, DOG]}, ['{"kind":"cat","lives":9}', '{"kind":"dog"}'], ["{}", '{"kind":"cow"}', '{"kind":"dog","lives":9}']),
    (
        PETS,
        ['{"kind":"wolf","pup":{"kind":"cat","n":1}}', '{"kind":"dog","pup":null}'],
        ["{}", '{"n":1}', '{"kind":"dog","pup":{}}'],
    ),
    (
        {"oneOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}]},
        ['{"a":1}', '{"b":1}'],
        ["{}", '{"a":1,"b":1}'],
    ),
    ({"oneOf": [{"type": "array", "maxItems": 1}, {"type": "array", "minItems": 2}]}, ["[]", "[1,2]"], ["1"]),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}], "type": "integer"}, ["1"], ['"a"']),
]


@pytest.mark.parametrize(("schema", "good", "bad"), BESIDE, ids=lambda v: json.dumps(v)[:50])
def test_keywords_beside_each_other_are_all_kept(schema: Any, good: list[str], bad: list[str]) -> None:
    automaton = automaton_of(schema)
    for text in good:
        assert accepts(automaton, text), text
        assert is_valid(json.loads(text), schema), text
    for text in bad:
        assert not accepts(automaton, text), text


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"exclusiveMinimum": 5}, "'type' is needed"),
        ({"exclusiveMaximum": 5, "type": "number"}, "supported for integers only"),
        ({"type": "string", "enum": [1]}, "no value of 'enum' or 'const'"),
        ({"allOf": [{"const": 1}, {"const": True}]}, "have no value in common"),
        ({"type": "string", "format": "date", "pattern": "^2"}, "'format' 'date' together with 'pattern'"),
        ({"type": "string", "format": "date-time", "maxLength": 20}, "'format' 'date-time' together with a length"),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}], "type": "string"}, "two different 'pattern'"),
        ({"anyOf": [{"type": "string"}], "type": "integer"}, "two different 'type'"),
        ({"type": "string", "pattern": r"[_-\w]"}, "a range in a set"),
        ({"type": "object", "dependencies": {"a": ["b"]}}, "'dependencies' is not supported"),
        ({"enum": [1], "not": {}}, "'not' is not supported"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "round in circles"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "alternatives 0 and 1 at once; write 'anyOf'"),
        ({"oneOf": [{"type": "null"}, {"type": "string"}, {"minLength": 3}]}, "alternatives 0 and 2 at once"),
        ({"oneOf": [{"const": 1}, {"enum": [2, 1]}]}, "write 'anyOf'"),
        ({"oneOf": [CAT, {**DOG, "properties": {"kind": {"type": "string"}}}]}, "write 'anyOf'"),
        ({"oneOf": [{"type": "object"}, CAT]}, "write 'anyOf'"),
        ({"oneOf": [{"type": "string", "pattern": f"{i}"} for i in range(300)]}, "write 'anyOf'"),
    ],
)
def test_what_can_not_be_kept_is_refused(schema: Any, problem: str) -> None:
    with pytest.raises(gbnf.GrammarError, match=problem):
        json_schema.to_gbnf(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": list(range(20_000)), "anyOf": [{"const": -i} for i in range(20_000)]},
        {"enum": list(range(20_000)), "allOf": [{"enum": list(range(20_000))}, {"anyOf": [{"enum": list(range(20_000))}] * 9}]},
        {"oneOf": [{"type": "object", "required": [f"{i}"], "properties": {f"{i}": {}}} for i in range(2000)]},
        {"properties": {f"{i}": {} for i in range(3000)}, "anyOf": [{"required": [f"{i}"]} for i in range(3000)]},
        {"$defs": {"a": {"oneOf": [{"properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}] * 9}}, "$ref": "#/$defs/a"},
    ],
    ids=["values", "lists", "alternatives", "names", "circle"],
)
def test_schema_whose_parts_are_too_many_to_compare_is_refused_in_time(schema: Any) -> None:
    began = time.process_time()
    with pytest.raises(gbnf.GrammarError):
        json_schema.to_gbnf(schema)
    assert time.process_time() - began < 8


# --- any keywords beside each other -----------------------------------------------------------------------------------

NAMES = ["a", "b", "c"]
numbers = st.integers(-3, 6)
counts = st.integers(0, 3)
scalars = st.sampled_from([None, True, False, -3, -1, 0, 1, 2, 5, 2.5, "", "a", "ab", "abc", "b1", "x", "é"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "z"]), inner, max_size=3),
    max_leaves=5,
)
PATTERNS = ["^a", "b$", "^.$", "[ab]+", r"^\w?$", "^[^a]*$", "^(a|ab)c?$"]


def schemas(*, loose: bool) -> st.SearchStrategy[Any]:
    """Schemas of keywords that know nothing of each other; not ``loose``: those of which all that is valid can be written."""

    def around(inner: st.SearchStrategy[Any], refs: str = "xy") -> st.SearchStrategy[Any]:
        some = st.lists(inner, min_size=1, max_size=3)
        kinds = st.sampled_from(["object", "array", "string", "integer", "boolean", "null", *(["number"] if loose else [])])
        extra = inner | st.booleans()
        parts: dict[str, st.SearchStrategy[Any]] = {
            "minimum": numbers, "maximum": numbers, "exclusiveMinimum": numbers, "exclusiveMaximum": numbers,
            "minLength": counts, "maxLength": counts, "enum": st.lists(values, min_size=1, max_size=4), "const": values,
            "items": inner, "prefixItems": st.lists(inner, max_size=2), "minItems": counts, "maxItems": counts,
            "required": st.lists(st.sampled_from(NAMES), unique=True, max_size=2),
            "properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
            "anyOf": some, "allOf": some, "$ref": st.sampled_from([f"#/$defs/{name}" for name in refs]),
        }  # fmt: skip
        kind = kinds | st.lists(kinds, min_size=1, max_size=3, unique=True)
        if loose:
            parts |= {"type": kind, "oneOf": some, "pattern": st.sampled_from(PATTERNS), "additionalProperties": extra}
            always = {}
        else:
            always = {"type": kind, "additionalProperties": extra}

        def chosen(keys: list[str]) -> st.SearchStrategy[Any]:
            return st.fixed_dictionaries(always | {key: parts[key] for key in keys})

        return st.lists(st.sampled_from(sorted(parts)), max_size=4, unique=True).flatmap(chosen)

    leaf = st.fixed_dictionaries({"type": st.sampled_from(["string", "integer", "null", "boolean"])}) | st.booleans()
    whole = around(leaf | around(leaf | around(leaf)))
    return st.builds(lambda schema, x, y: {**schema, "$defs": {"x": x, "y": y}}, whole, leaf, around(leaf, "x"))


PIECES = [*'"{}[]:, -.0123456789eabcxé\\nu', "true", "false", "null", '"a":', '"b":', '"c":']
VOCABULARY = Vocabulary((i, piece.encode()) for i, piece in enumerate(PIECES))


def texts_of(automaton: Automaton, rng: random.Random, count: int) -> list[str]:
    """Whole texts, at random out of what is allowed."""
    texts = []
    for _ in range(count):
        found, text = Matcher(automaton), ""
        while len(text) < 150 and not found.must_end and not (found.may_end and rng.random() < 0.5):
            ids = found.allowed(VOCABULARY).tolist()
            closing = [i for i in ids if PIECES[i] in '"}]' and len(text) > 25]
            if not ids:
                break
            piece = PIECES[rng.choice(closing or ids)]
            text += piece
            found.accept(piece.encode())
        texts += [text] * found.may_end
    return texts


def orders(value: Any) -> list[Any]:
    """The same value with its properties in each order."""
    if isinstance(value, list):
        return [list(items) for items in itertools.product(*map(orders, value))]
    if isinstance(value, dict):
        found = []
        for names in itertools.permutations(value):
            found += [dict(zip(names, items, strict=True)) for items in itertools.product(*(orders(value[n]) for n in names))]
        return found
    return [value]


@settings(max_examples=500, deadline=None)
@given(schemas(loose=True), st.integers(0, 2**32), st.lists(values, max_size=8))
def test_whatever_is_let_through_is_valid(schema: Any, seed: int, some: list[Any]) -> None:
    """Random texts and given values; JSON Schema's own validator is the judge."""
    try:
        automaton = automaton_of(schema)
        texts = texts_of(automaton, random.Random(seed), 8)  # noqa: S311
        texts += [text for text in map(json.dumps, some) if accepts(automaton, text)]
    except (gbnf.GrammarError, InvalidRequest):
        return
    for text in texts:
        assert is_valid(json.loads(text), schema), text


@settings(max_examples=500, deadline=None)
@given(schemas(loose=False), st.lists(values, min_size=3, max_size=12))
def test_whatever_is_valid_is_let_through_or_the_schema_refused(schema: Any, some: list[Any]) -> None:
    """In one order of the properties."""
    valid = [value for value in some if is_valid(value, schema)]
    try:
        automaton = automaton_of(schema)
    except NothingValid:
        assert not valid
        return
    except gbnf.GrammarError:
        return
    for value in valid:
        assert any(accepts(automaton, json.dumps(v, ensure_ascii=False)) for v in orders(value)), value
