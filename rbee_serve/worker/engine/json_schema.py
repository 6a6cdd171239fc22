"""A JSON schema as a GBNF grammar of the texts that are valid by it. Pure.

What can not be expressed is refused by name and place, never ignored: the answer is promised to follow the schema.
Unknown keywords are annotations, as JSON Schema says, and so are formats but those of `json_text`. Properties come in the
schema's order; where ``properties`` are named and ``additionalProperties`` is not, no others are written. All alternatives
of ``oneOf`` are written as those of ``anyOf`` are, where what is written for one is valid by no other.
"""

from __future__ import annotations

from typing import Any

from rbee_serve.worker.engine.gbnf import DEPTH_MAX, REPETITION_MAX, GrammarError
from rbee_serve.worker.engine.json_logic import (
    LIMITS,
    NothingValid,
    Schema,
    Schemas,
    demands,
    kinds_of,
    nothing,
    values_of,
    written_kinds,
)
from rbee_serve.worker.engine.json_text import (
    BASE,
    COLON,
    COMMA,
    DIGITS,
    FORMATS,
    Pattern,
    constant,
    fail,
    in_set,
    integers,
    literal,
    text_of,
)

#: Schemas within schemas, all in all.
_NODES_MAX = 5000
#: Size of the grammar.
_TEXT_MAX = 500_000
#: Characters of a property's name, where others are allowed beside it.
_NAME_MAX = 300
#: Lengths of the formats that have only one.
_LENGTHS = {"date": 10, "uuid": 36}


def to_gbnf(schema: Any) -> str:
    """Return the grammar of ``schema`` (an object or a boolean); raises GrammarError saying what is wrong and where."""
    converter = _Converter(schema)
    root = converter.visit(schema, "#", 0)
    rules = [f"root ::= {root}", *(f"{name} ::= {body}" for name, body in converter.rules.items())]
    text = "\n".join([*rules, *(f"{name} ::= {body}" for name, body in BASE.items())])
    if len(text) > _TEXT_MAX:
        raise GrammarError(f"the schema becomes a grammar of {len(text)} characters, at most {_TEXT_MAX} are possible")
    return text


class _Converter:
    """Rules made so far. ``visit`` returns an expression that may stand anywhere in a rule."""

    def __init__(self, root: Any) -> None:
        self._schemas, self._nodes = Schemas(root), 0
        self.rules: dict[str, str] = {}
        self._refs: dict[str, str] = {}

    def _rule(self, body: str) -> str:
        name = f"r{len(self.rules)}"
        self.rules[name] = body
        return name

    def visit(self, schema: Any, where: str, depth: int) -> str:
        """Return the expression of one schema. ``where`` is its JSON pointer. NothingValid when nothing is valid by it."""
        self._nodes += 1
        if depth > DEPTH_MAX or self._nodes > _NODES_MAX:
            fail(where, f"more than {DEPTH_MAX} schemas within each other or {_NODES_MAX} in all")
        if isinstance(schema, dict) and "$ref" in schema:
            return self._ref(schema, where, depth)
        plain = self._schemas.plain(schema, where)
        if not plain:
            return "value"
        values = values_of(plain, where)
        if values is not None:
            rest = demands(plain, "enum", "const")
            valid = [v for v in values if not rest or self._schemas.is_valid(v, rest, where)]
            if not valid:
                raise nothing(where, "no value of 'enum' or 'const' is what the other keywords demand")
            return self._rule(" | ".join(dict.fromkeys(map(constant, valid))))
        for key in ("anyOf", "oneOf"):
            if key in plain:
                return self._either(plain, key, where, depth)
        return self._typed(plain, where, depth)

    # --- combinations -------------------------------------------------------------------------------------------

    def _ref(self, schema: Schema, where: str, depth: int) -> str:
        """A rule for what is pointed at, together with what stands beside it: a schema may contain itself."""
        wanted = demands(schema)
        key = text_of(wanted)
        if key not in self._refs:
            known = dict(self._refs)
            # The name is there before the body.
            self._refs[key] = name = self._rule("")
            try:
                if len(wanted) == 1:
                    self.rules[name] = self.visit(self._schemas.target(schema["$ref"], where), schema["$ref"], depth + 1)
                else:
                    self.rules[name] = self.visit(self._schemas.plain(wanted, where), where, depth + 1)
            except NothingValid:
                self._refs, self.rules[name] = known, '""'  # no rule may use this one
                raise
        return self._refs[key]

    def _either(self, schema: Schema, key: str, where: str, depth: int) -> str:
        alternatives = schema[key]
        if not isinstance(alternatives, list) or not alternatives:
            fail(where, f"{key!r} must be a list with schemas")
        rest = demands(schema, key)
        if rest:
            alternatives = [_beside(rest, alternative) for alternative in alternatives]
        if key == "oneOf" and len(alternatives) > 1:
            alternatives = self._schemas.disjoint(alternatives, where)
        found, empty = [], None
        for i, alternative in enumerate(alternatives):
            try:
                found.append(self.visit(alternative, f"{where}/{key}/{i}", depth + 1))
            except NothingValid as e:
                empty = e
        if not found and empty is not None:
            raise empty
        return self._rule(" | ".join(dict.fromkeys(found)))

    # --- types --------------------------------------------------------------------------------------------------

    def _typed(self, schema: Schema, where: str, depth: int) -> str:
        kinds = written_kinds(schema, where)
        if kinds_of(schema, where) is None and len(kinds) > 1:
            return "value"
        found, empty = [], None
        for kind in kinds:
            try:
                found.append(self._one_type(kind, schema, where, depth))
            except NothingValid as e:
                empty = e
        if not found and empty is not None:
            raise empty
        return found[0] if len(found) == 1 else self._rule(" | ".join(found))

    def _one_type(self, kind: str, schema: Schema, where: str, depth: int) -> str:
        if kind == "object":
            return self._members(schema, where, depth)
        if kind == "array":
            return self._array(schema, where, depth)
        if kind == "string":
            return self._string(schema, where)
        limits = {k: v for k, v in schema.items() if k in LIMITS}
        if kind == "integer" and limits:
            return self._rule(integers(*_bounds(limits, where)))
        if kind == "number" and limits:
            fail(where, f"{next(iter(limits))!r} is supported for integers only")
        return kind

    def _members(self, schema: Schema, where: str, depth: int) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            fail(where, "'properties' must be an object and 'required' a list")
        extra = schema.get("additionalProperties", not properties)
        if missing := [k for k in required if k not in properties]:
            others = schema.get("additionalProperties", True)
            if others is False or not all(isinstance(k, str) for k in missing):
                raise nothing(where, f"{missing[0]!r} is required and can not be there")
            properties = properties | dict.fromkeys(missing, others)
        if not properties and extra is True:
            return "object"
        pairs = []
        for name, sub in properties.items():
            try:
                value = self.visit(sub, f"{where}/properties/{name}", depth + 1)
            except NothingValid:
                if name in required:
                    raise
                continue  # it may not be there
            pairs.append((self._rule(f"{literal(text_of(name)[1:])} {COLON} {value}"), name in required))
        # What may come after the quote that begins a name, and after a property: the comma, white space and the quote
        # belong to all alternatives, of which only the names are many. Two rules a property.
        keys = later = ""
        left_out = True  # whether all that follow may be
        other = self._or_none(extra, f"{where}/additionalProperties", depth)
        if other is not None:
            pair = self._rule(f"{self._other_key(list(properties))} {COLON} {other}")
            later = self._rule(f'({COMMA} "\\"" {pair})*')
            keys = f"{pair} {later}"
        for pair, needed in reversed(pairs):
            keys = self._rule(f"{pair} {later} | {keys}" if keys and not needed else f"{pair} {later}")
            left_out = left_out and not needed
            later = self._rule(f'({COMMA} "\\"" {keys}){"?" if left_out else ""}')
        members = f'("\\"" {keys}){"?" if left_out else ""}' if keys else ""
        return self._rule(f'"{{" space {members} space "}}"')

    def _or_none(self, schema: Any, where: str, depth: int) -> str | None:
        """Return the expression of what may be left out; None where nothing is valid there."""
        try:
            return self.visit(schema, where, depth + 1)
        except NothingValid:
            return None

    def _other_key(self, names: list[str]) -> str:
        """Return the expression of a string that is none of ``names``, without its first quote."""
        if not names:
            return r'char* "\""'
        tree: dict[str, Any] = {}
        for name in names:
            node = tree
            text = text_of(name)[1:-1]
            if len(text) > _NAME_MAX:
                raise GrammarError(f"a property's name of {len(text)} characters is too long beside additionalProperties")
            for char in text:
                node = node.setdefault(char, {})
            node[""] = {}

        def rest(node: dict[str, Any]) -> str:
            chars = [c for c in node if c]
            outside = "".join(in_set(c) for c in chars)
            parts = [f"{literal(c)} {rest(node[c])}" for c in chars]
            parts.append(rf'[^{outside}"\\\x7F\x00-\x1F] char*')
            return self._rule(" | ".join(parts if "" in node else [*parts, '""']))

        return self._rule(rf'{rest(tree)} "\""')

    def _array(self, schema: Schema, where: str, depth: int) -> str:
        low, high = _counts(schema, "minItems", "maxItems", where)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            fail(where, "'prefixItems' must be a list of schemas")
        heads: list[str] = []
        for i, head in enumerate(first[:high]):
            found = self._or_none(head, f"{where}/prefixItems/{i}", depth)
            if found is None:
                high = i  # no array is that long
                break
            heads.append(found)
        item = None
        if high is None or high > len(heads):
            item = self._or_none(schema.get("items", True), f"{where}/items", depth)
        if item is None:
            high = len(heads) if high is None else min(high, len(heads))
        if high is not None and low > high:
            raise nothing(where, f"at least {low} and at most {high} items")
        return self._rule(f'"[" space {self._list(heads, item or "", low, high)} space "]"')

    def _list(self, heads: list[str], item: str, low: int, high: int | None) -> str:
        """Items with commas: the fixed ones, then as many of ``item`` as the counts leave room for."""
        tail = ""
        if item:
            fixed = len(heads)
            least = max(0, low - fixed)
            most = "" if high is None else str(high - fixed)
            if heads:
                tail = f'("," space {item}){{{least},{most}}}'
            elif high == 0:
                return ""
            else:
                rest = f'("," space {item}){{{max(0, least - 1)},{"" if high is None else high - 1}}}'
                return f"{item} {rest}" if least else f"({item} {rest})?"
        for i in reversed(range(len(heads) if high is None else min(high, len(heads)))):
            text = f"{literal(',') + ' space ' if i else ''}{heads[i]} {tail}"
            tail = text if i < low else f"({text})?"
            if i % 8 == 0:
                tail = self._rule(tail)
        return tail

    def _string(self, schema: Schema, where: str) -> str:
        low, high = _counts(schema, "minLength", "maxLength", where)
        pattern, form = schema.get("pattern"), schema.get("format")
        if pattern is not None and not isinstance(pattern, str):
            fail(where, "'pattern' must be a string")
        if form not in FORMATS:
            form = None
        elif form in _LENGTHS and low <= _LENGTHS[form] and (high is None or high >= _LENGTHS[form]):
            low, high = 0, None
        asked = [f"'format' {form!r}"] * (form is not None) + ["'pattern'"] * (pattern is not None)
        asked += ["a length"] * (low > 0 or high is not None)
        if len(asked) > 1:
            fail(where, f"{asked[0]} together with {asked[1]} is not supported; leave one of them out")
        if pattern is not None:
            return self._rule(rf'"\"" ({Pattern(pattern, where).expression()}) "\""')
        if form is not None:
            return self._rule(rf'"\"" {FORMATS[form]} "\""')
        if low == 0 and high is None:
            return "string"
        return self._rule(rf'"\"" char{{{low},{"" if high is None else high}}} "\""')


def _beside(rest: Schema, alternative: Any) -> Any:
    """Return an alternative together with what is demanded of all: beside a reference, so that it stays one."""
    if isinstance(alternative, dict) and demands(alternative).keys() == {"$ref"}:
        return {**rest, "$ref": alternative["$ref"]}
    return {"allOf": [rest, alternative]}


def _counts(schema: Schema, least: str, most: str, where: str) -> tuple[int, int | None]:
    low, high = schema.get(least, 0), schema.get(most)
    for name, value in ((least, low), (most, high)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= REPETITION_MAX):
            fail(where, f"{name!r} must be a whole number up to {REPETITION_MAX}")
    if high is not None and low > high:
        raise nothing(where, f"{least!r} is over {most!r}")
    return low, high


def _bounds(limits: Schema, where: str) -> tuple[int, int]:
    far = 10 ** (DIGITS + 1) - 1
    low, high = -far, far
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or abs(value) > far:
            fail(where, f"{name!r} must be a whole number of up to {DIGITS} digits")
        number = int(value)
        if name.endswith("inimum"):
            low = max(low, number + name.startswith("exclusive"))
        else:
            high = min(high, number - name.startswith("exclusive"))
    if low > high:
        raise nothing(where, f"no integer is between {low} and {high}")
    return low, high
