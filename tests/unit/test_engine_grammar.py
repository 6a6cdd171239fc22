"""Grammars: what is parsed and what is refused, what a text may go on with, hostile ones, and JSON schemas as grammars."""

from __future__ import annotations

import json
import random
import time
from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_serve.contract.errors import InvalidRequest
from rbee_serve.worker.engine import gbnf, json_schema
from rbee_serve.worker.engine import grammar as grammar_module
from rbee_serve.worker.engine.constraint import Constraints
from rbee_serve.worker.engine.grammar import Automaton, Matcher, Vocabulary


def matcher(grammar: str) -> Matcher:
    return Matcher(Automaton(gbnf.parse(grammar)))


def accepts(grammar: str, text: str) -> bool:
    """Whether the whole text is one that the grammar describes."""
    found = matcher(grammar)
    for char in text:
        if not found.allows(char.encode()):
            return False
        found.accept(char.encode())
    return found.may_end


# --- GBNF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('root ::= "yes" | "no"', ["yes", "no"], ["", "y", "yesno", "maybe"]),
        ('root ::= "a"* "b"+ "c"?', ["b", "aab", "bbc"], ["", "a", "cb", "bcc"]),
        ('root ::= "a"{2} "b"{1,} "c"{0,2}', ["aab", "aabbcc"], ["ab", "aa", "aabccc"]),
        ("root ::= [a-cx] [^a-c] .", ["adé", "x🐝\n"], ["aba", "zzz", "ad"]),
        ('root ::= (\n  item # one\n  ("," item)*\n)?\nitem ::= [0-9]+', ["", "1", "1,22,3"], [",", "1,", "1 2"]),
        (r'root ::= "\"\\\n\x41\u00e9\U0001F41D"', ['"\\\nAé🐝'], ["A"]),
        ('root ::= "(" root ")" | ""', ["", "()", "(())"], ["(", ")", "(()"]),
        ('root ::= a a a\na ::= "x" | ', ["", "x", "xxx"], ["xxxx"]),
        ('root ::= [a-z]* "x" [a-z]{2}', ["xab", "xxxxx"], ["ab", "abx"]),
        ("root ::= [\\]\\[-] [a-]", ["]a", "[-", "-a"], ["a]", "^a"]),
    ],
)
def test_grammar_means_what_it_says(grammar: str, good: list[str], bad: list[str]) -> None:
    for text in good:
        assert accepts(grammar, text), text
    for text in bad:
        assert not accepts(grammar, text), text


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        ("", "no rule named root"),
        ('start ::= "a"', "no rule named root"),
        ("root ::= missing", "'missing' is used but not defined"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 10: rule 'root' is defined twice"),
        ('root ::= "a', "ends within quotes"),
        ("root ::= [a", "ends within quotes or brackets"),
        ('root ::= ("a"', r"expected \)"),
        ('root ::= "a")', "expected a new line"),
        ("root ::= [z-a]", "goes backwards"),
        ('root = "a"', "line 1, column 6: expected ::="),
        (r'root ::= "\q"', r"unknown escape \\q"),
        (r'root ::= "\x4"', "expected 2 hexadecimal digits"),
        ("root ::= *", "nothing stands before"),
        ('root ::= "a"{2,1}', "largest count is under"),
        ('root ::= "a"{x}', "expected {m}"),
        ("root ::= <[7]>", "references to tokens"),
        ('root ::= root "a" | "a"', "left recursion: rule 'root'"),
        ('root ::= a\na ::= b? c\nb ::= "b"\nc ::= root', "left recursion"),
        ('root ::= ("a"*)*', "left recursion"),
        ('root ::= "a"{1000000}', "more than 2000 repetitions"),
        ('root ::= "a"{99999999999999999999}', "more than 2000 repetitions"),
        ("root ::= " + "(" * 60_000, "nested deeper than 64"),
        ('root ::= x\nx ::= "a"{2000} ' * 1 + " ".join(['"b"{2000}'] * 40), "more than 60000 symbols"),
    ],
)
def test_grammar_that_is_wrong_or_hostile_is_refused_at_once(grammar: str, problem: str) -> None:
    began = time.process_time()
    with pytest.raises(gbnf.GrammarError, match=problem):
        gbnf.parse(grammar)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "a" root b | "a" root c | "a"\nb ::= "b"\nc ::= "b" "c"',  # doubles with each character
        "root ::= x{0,2000} x{0,2000} x{0,2000}\nx ::= [a-z]",
        "root ::= " + " | ".join(f'"a{i}"' for i in range(3000)),
        'root ::= "a" (r0 | r1 | r2)\n' + "\n".join(f'r{i} ::= "a" (r0 | r1 | r2) x{i} | "a"\nx{i} ::= "{i}"' for i in range(3)),
    ],
)
def test_grammar_that_can_be_read_in_too_many_ways_ends_its_own_stream(grammar: str) -> None:
    began = time.process_time()

    def read() -> None:
        found = matcher(grammar)
        for _ in range(3000):
            found.accept(b"a")

    with pytest.raises(InvalidRequest, match="too ambiguous"):
        read()
    assert time.process_time() - began < 10


def test_grammar_as_large_as_the_contract_allows_is_quick() -> None:
    chain = "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(3800)) + '\nr3800 ::= "a"'
    words = "root ::= " + " | ".join(f'"{chr(97 + i % 26)}{i:05}"' for i in range(1900))
    nested = "root ::= " + "(" * 60 + '"a"' + ")*" * 1 + ")" * 59
    for grammar in (chain, words, nested):
        began = time.process_time()
        assert matcher(grammar).allows(b"a")
        assert time.process_time() - began < 1


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='ro:=ab "[]()|*+?{}0123,\\\n-^.#x', max_size=60))
def test_no_text_breaks_parser_or_matcher(tail: str) -> None:
    """Whatever stands there is refused with a reason or matched: no other error, no endless loop."""
    try:
        found = matcher('root ::= "a" ' + tail)
    except gbnf.GrammarError:
        return
    for char in (b"a", b"x", b"b", b"0"):
        if found.allows(char):
            found.accept(char)
    assert found.may_end or not found.must_end


def test_characters_in_parts_are_followed_byte_by_byte() -> None:
    found = matcher('root ::= "é" [🐝-🐟] "\\u0800" "."')
    assert not found.allows(b"\xc3\xa8")
    for byte in "é🐝\u0800.".encode():
        assert not found.may_end
        assert found.allows(bytes([byte]))
        found.accept(bytes([byte]))
    assert found.must_end
    begun = matcher('root ::= "🐝"')
    begun.accept(b"\xf0\x9f")
    assert [begun.allows(b) for b in (b"\x90\x9d", b"\x90")] == [True, True]
    assert [begun.allows(b) for b in (b"\x91", b"a", b"\x90\x9dx", b"")] == [False] * 4
    with pytest.raises(ValueError, match="does not allow"):
        begun.accept(b"\x91")


ENDS = ("", "a", '"', "1", "}", "🐝x")
PIECES = [*(f"{a}{b}" for a in ' abcdé{}[]",:01\n' for b in ENDS), "true", "null", ' "', '": ', "aaaa"]


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False))
def test_all_tokens_found_at_once_are_those_that_are_allowed_one_by_one(rng: random.Random) -> None:
    """Whole characters, characters in parts, and the state in the middle of one."""
    tokens = [piece.encode() for piece in PIECES] + [b"\xf0\x9f", b"\x90\x9d", b"\xc3", b"\xa9", b"\xff", b"\xf0"]
    vocabulary = Vocabulary(enumerate(tokens))
    found = matcher(json_schema.to_gbnf({}))
    for _ in range(12):
        ids = set(found.allowed(vocabulary).tolist())
        assert ids == {i for i, piece in enumerate(tokens) if found.allows(piece)}
        if not ids:
            break
        found.accept(tokens[rng.choice(sorted(ids))])


# --- many texts of one grammar ----------------------------------------------------------------------------------------


def listed(count: int, items: int) -> Any:
    """The schema of a list of objects whose properties may all be left out: each name can follow each before it."""
    properties = {f"property_{i}": {"type": "string"} for i in range(count)}
    return {"type": "array", "maxItems": items, "items": {"type": "object", "properties": properties}}


def written(rng: random.Random, count: int, items: int, share: float = 1.0) -> bytes:
    return json.dumps(
        [{f"property_{i}": str(rng.random()) for i in range(count) if rng.random() < share} for _ in range(items)]
    ).encode()


def follow(matchers: list[Matcher], texts: list[bytes]) -> None:
    """All at once, byte by byte."""
    for at in range(max(map(len, texts))):
        for found, text in zip(matchers, texts, strict=True):
            if at < len(text):
                found.accept(text[at : at + 1])


@pytest.mark.parametrize(
    ("count", "items", "texts"),
    [(120, 200, [(3, 0.4)] * 8), (120, 50, [(20, 1.0)]), (1500, 50, [(1, 0.1)])],
    ids=["together", "long", "wide"],
)
def test_streams_of_one_grammar_that_is_not_ambiguous_all_reach_their_end(
    count: int, items: int, texts: list[tuple[int, float]]
) -> None:
    """Whatever they need together: what is worked out is forgotten on the way, and takes no more memory than is said."""
    rng = random.Random(1)  # noqa: S311
    automaton = Automaton(gbnf.parse(json_schema.to_gbnf(listed(count, items))))
    matchers = [Matcher(automaton) for _ in texts]
    follow(matchers, [written(rng, count, *text) for text in texts])
    assert automaton.work > 200_000
    assert automaton.size < 20_000_000
    assert all(found.must_end or found.may_end for found in matchers)


def test_text_that_is_too_ambiguous_ends_alone() -> None:
    """Others that write by the same grammar go on, and begin."""
    grammar = 'root ::= "?" bad | "!" good*\nbad ::= x{0,600} x{0,600} x{0,600} "!"\nx ::= [^!]\ngood ::= [a-z]'
    automaton = Automaton(gbnf.parse(grammar))
    running = Matcher(automaton)
    running.accept(b"!")
    for _ in range(3):
        began = time.process_time()
        with pytest.raises(InvalidRequest, match="too ambiguous"):
            follow([Matcher(automaton), running], [b"?" + b"ab" * 900, b"a" * 1800])
        assert time.process_time() - began < 5
        running.accept(b"z")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60))
def test_room_is_made_without_a_text_noticing(seed: int, held: int) -> None:
    """Texts that share an automaton, which forgets all the time, may go on with what those of one that never does may."""
    grammar = gbnf.parse(json_schema.to_gbnf(TREE))
    rng = random.Random(seed)  # noqa: S311
    shared, vocabulary = Automaton(grammar), Vocabulary(enumerate(piece.encode() for piece in PIECES))
    pairs = [(Matcher(shared), Matcher(Automaton(grammar))) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(20):
            one, other = rng.choice(pairs)
            patch.setattr(grammar_module, "_WORK_HELD", held)
            ids = one.allowed(vocabulary).tolist()
            patch.undo()
            assert ids == other.allowed(vocabulary).tolist()
            assert (one.may_end, one.must_end) == (other.may_end, other.must_end)
            if ids:
                piece = PIECES[rng.choice(ids)].encode()
                one.accept(piece)
                other.accept(piece)


def test_all_tokens_that_may_follow_are_found_within_what_one_token_may_cost() -> None:
    """In a wide object, at each place of it and with many tokens that end elsewhere in the names."""
    pieces = [f"{a}{b}" for a in [f"property_{i}"[:n] for i in range(0, 400, 7) for n in range(1, 13)] for b in ENDS] + PIECES
    vocabulary = Vocabulary((i, piece.encode()) for i, piece in enumerate(dict.fromkeys(pieces)))
    automaton = Automaton(gbnf.parse(json_schema.to_gbnf(listed(400, 9))))
    found, most = Matcher(automaton), 0
    for byte in written(random.Random(2), 400, 1, 0.1):  # noqa: S311
        before = automaton.work
        found.allowed(vocabulary)
        most = max(most, automaton.work - before)
        found.accept(bytes([byte]))
    assert most < 20_000
    assert found.must_end or found.may_end


# --- JSON schema ------------------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "number"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: list[tuple[Any, list[Any], list[Any]]] = [
    ({}, [1, -2.5e3, "a", None, True, [], {"a": [1, {"b": None}]}], []),
    (True, [{"x": 1}], []),
    (
        PERSON,
        [{"name": 'é🐝"\\', "age": 7}, {"name": "", "age": 120, "email": "x"}],
        [{}, {"name": "x"}, {"name": "x", "age": 121}, {"name": "x", "age": 1, "z": 1}],
    ),
    (TREE, [{}, {"v": 1, "kids": [{}, {"kids": []}]}], [{"kids": [1]}, {"v": "x"}]),
    ({"enum": ["red", 'a "b" \\', 3, None, {"x": 1}]}, ["red", 'a "b" \\', 3, None, {"x": 1}], ["blue", 4]),
    ({"const": [1, "two"]}, [[1, "two"]], [[1]]),
    ({"type": ["integer", "null"]}, [0, -17, None], [1.5, "x"]),
    ({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "boolean"}]}, ["ab", True], ["abc", 1]),
    (
        {"oneOf": [{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}, {"type": "null"}]},
        [{"a": 1}, None],
        [{}],
    ),
    (
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"b": {"type": "null"}}},
            ]
        },
        [{"a": 1}, {"a": 1, "b": None}],
        [{"b": None}],
    ),
    ({"type": "string", "minLength": 1, "maxLength": 3}, ["a", "ééé"], ["", "abcd"]),
    ({"type": "string", "pattern": r"^[a-z]{2,3}-\d+(\.\d)?$"}, ["ab-1", "abc-22.3"], ["a-1", "ab-", "AB-1", "ab-1.22"]),
    ({"type": "string", "pattern": r"(foo|\"q\")\s?[^xyz]"}, ["foo a", 'xx "q"!b', "fooa"], ["fox", "foo"]),
    (
        {"type": "string", "format": "date-time"},
        ["2024-02-29T23:59:59.123Z", "2024-12-01T00:00:00+02:00"],
        ["2024-13-01T00:00:00Z", "x"],
    ),
    ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    ({"type": "string", "format": "email"}, ["anything"], [1]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}, [[1], [1, 2, 3]], [[], [1, 2, 3, 4], ["x"]]),
    ({"type": "array", "items": {"type": "integer"}, "maxItems": 0}, [[]], [[1]]),
    ({"type": "array", "items": {"type": "null"}, "minItems": 2}, [[None] * 2, [None] * 5], [[None], []]),
    (
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "minItems": 1},
        [["a"], ["a", 1]],
        [[], [1], ["a", 1, 2]],
    ),
    (
        {"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "null"}, "minItems": 2},
        [["a", None]],
        [["a"], ["a", 1]],
    ),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"a": 1, "b": 2}], [{"a": "x"}]),
    (
        {"properties": {"ab": {"type": "integer"}, "a": {"type": "null"}}, "additionalProperties": {"type": "string"}},
        [{"ab": 1}, {"a": None, "x": "y"}, {"abc": "y", "b": ""}],
        [{"ab": "x"}, {"a": "x"}, {"x": 1}],
    ),
    ({"type": "object", "required": ["z"]}, [{"z": 1}, {"z": [], "y": 2}], [{}, {"y": 2}]),
    ({"type": "integer", "minimum": -15, "exclusiveMaximum": 205}, [-15, -9, 0, 7, 99, 100, 204], [-16, 205, 1000, -99]),
    ({"type": "integer", "exclusiveMinimum": 0}, [1, 10, 999], [0, -1]),
    ({"type": "integer", "maximum": -3}, [-3, -40], [-2, 0, 5]),
    ({"type": "string", "nullable": True}, ["x", None], [1]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), SCHEMAS, ids=lambda v: json.dumps(v)[:40])
def test_schema_takes_what_is_valid_and_nothing_else(schema: Any, good: list[Any], bad: list[Any]) -> None:
    grammar = json_schema.to_gbnf(schema)
    for value in good:
        for text in (json.dumps(value, ensure_ascii=False), json.dumps(value, separators=(",", ":"))):
            assert accepts(grammar, text), text
    for value in bad:
        assert not accepts(grammar, json.dumps(value, ensure_ascii=False)), value


@pytest.mark.parametrize("schema", [s for s, _, _ in SCHEMAS if "(foo" not in str(s)], ids=lambda v: json.dumps(v)[:40])
def test_whatever_the_grammar_lets_through_is_valid(schema: Any) -> None:
    """Random texts, character by character out of what is allowed; JSON Schema's own validator is the judge."""
    chars = '"{}[]:, -.0123456789eE+abcdefghiklmnoqrstuvwxyzTZ\\/_é🐝'
    vocabulary = Vocabulary((i, c.encode()) for i, c in enumerate(chars))
    automaton = Automaton(gbnf.parse(json_schema.to_gbnf(schema)))
    rng, whole = random.Random(5), 0  # noqa: S311
    for _ in range(60):
        found, text = Matcher(automaton), ""
        while len(text) < 300 and not found.must_end and not (found.may_end and rng.random() < 0.5):
            ids = found.allowed(vocabulary).tolist()
            closing = [i for i in ids if chars[i] in '"}]' and len(text) > 40]
            text += chars[rng.choice(closing or ids)]
            found.accept(text[-1].encode())
        if found.may_end:
            whole += 1
            checked = {k: v for k, v in schema.items() if k != "nullable"} if isinstance(schema, dict) else schema
            if not (isinstance(schema, dict) and schema.get("nullable") and text == "null"):
                jsonschema.validate(json.loads(text), checked)
    assert whole > 5


@settings(max_examples=60, deadline=None)
@given(st.integers(-3000, 3000), st.integers(0, 3000), st.lists(st.integers(-7000, 7000), max_size=20))
def test_integers_within_limits_are_exactly_those(low: int, width: int, others: list[int]) -> None:
    high = low + width
    grammar = json_schema.to_gbnf({"type": "integer", "minimum": low, "maximum": high})
    for value in {low - 1, low, low + 1, high - 1, high, high + 1, 0, *others}:
        assert accepts(grammar, str(value)) == (low <= value <= high), value


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        (False, "at #: nothing is valid"),
        ({"properties": {"a": {"not": {}}}}, "at #/properties/a: 'not' is not supported"),
        ({"type": "number", "minimum": 0}, "'minimum' is supported for integers only"),
        ({"minimum": 0}, "'type' is needed"),
        ({"type": "thing"}, "'type' must be of"),
        ({"$ref": "https://example.org/x"}, "does not point into this schema"),
        ({"$ref": "#/$defs/none"}, "points at nothing"),
        ({"$ref": "#"}, "left recursion"),
        ({"enum": []}, "'enum' must be a list"),
        ({"anyOf": []}, "'anyOf' must be a list"),
        ({"type": "string", "maxLength": 1_000_000}, "'maxLength' must be a whole number up to 2000"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "'minLength' is over"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "string", "pattern": "(a"}, "not closed"),
        ({"type": "string", "pattern": "a)"}, "closed that was not opened"),
        ({"type": "string", "pattern": "(" * 5000}, "nested too deeply"),
        ({"type": "string", "pattern": "a{1000000}"}, "more than 2000 repetitions"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "no integer is between 5 and 3"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "two different 'type'"),
        ({"required": ["a"], "properties": {"b": {}}, "additionalProperties": False}, "'a' is required and can not be"),
        ({"anyOf": [{"enum": [f"{i}" * 40 for i in range(400)]}] * 400}, "characters, at most"),
    ],
)
def test_schema_that_can_not_be_kept_is_refused_with_its_place(schema: Any, problem: str) -> None:
    with pytest.raises(gbnf.GrammarError, match=problem):
        gbnf.parse(json_schema.to_gbnf(schema))


def test_schema_of_great_depth_or_width_is_bounded() -> None:
    deep: Any = {}
    for _ in range(500):
        deep = {"type": "array", "items": deep}
    with pytest.raises(gbnf.GrammarError, match="within each other"):
        json_schema.to_gbnf(deep)
    wide = {"properties": {f"name{i}": {"type": "integer"} for i in range(400)}}
    began = time.process_time()
    assert accepts(json_schema.to_gbnf(wide), '{"name3": 1, "name399": 2}')
    assert time.process_time() - began < 2
    with pytest.raises(gbnf.GrammarError, match="5000 in all"):
        json_schema.to_gbnf({"anyOf": [{"type": "null"}] * 6000})


WORDS = ["type", "properties", "required", "items", "prefixItems", "enum", "const", "anyOf", "allOf", "oneOf", "$ref", "pattern"]
WORDS += ["additionalProperties", "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum", "format", "nullable"]
VALUES = ["object", "array", "string", "integer", "#", "#/properties", "^a$", "(", "a", 0, 1, -3, 2.5, True, False, None]
anything = st.recursive(
    st.sampled_from(VALUES),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*WORDS, "a", "b"]), inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS), anything, max_size=4))
def test_no_schema_does_more_than_be_refused(schema: dict[str, Any]) -> None:
    """Whatever JSON a client calls a schema: a grammar comes of it or InvalidRequest, which ends that request alone."""
    constraints = Constraints(cast("Any", SimpleNamespace()))
    try:
        found = constraints.of(cast("Any", SimpleNamespace(grammar=None, json_schema=schema)))
    except InvalidRequest as e:
        refused = e.details
    else:
        refused = {"field": "json_schema"}
        assert found is not None
    assert refused["field"] in ("json_schema", "grammar")


def test_schema_nested_beyond_pythons_own_limit_is_refused() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(InvalidRequest, match="json_schema: "):
        Constraints(cast("Any", SimpleNamespace())).of(cast("Any", SimpleNamespace(grammar=None, json_schema=deep)))
