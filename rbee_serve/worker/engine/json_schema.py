"""A JSON schema as a GBNF grammar of the texts that are valid by it. Pure.

What can not be expressed is refused by name and place, never ignored: the answer is promised to follow the schema.
Unknown keywords are annotations, as JSON Schema says. Properties come in the schema's order; where ``properties`` are named
and ``additionalProperties`` is not, no others are written.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from rbee_serve.worker.engine.gbnf import DEPTH_MAX, REPETITION_MAX, GrammarError

#: Schemas within schemas, all in all.
_NODES_MAX = 5000
#: Size of the grammar.
_TEXT_MAX = 500_000
_UNSUPPORTED = {
    "not", "if", "then", "else", "multipleOf", "uniqueItems", "contains", "minContains", "maxContains", "patternProperties",
    "propertyNames", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "unevaluatedProperties",
    "unevaluatedItems", "$dynamicRef", "$recursiveRef",
}  # fmt: skip
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
#: Keywords that concern one type: they decide for it where ``type`` is not given.
_IMPLIES = {
    "properties": "object", "required": "object", "additionalProperties": "object", "items": "array", "prefixItems": "array",
    "minItems": "array", "maxItems": "array", "minLength": "string", "maxLength": "string", "pattern": "string",
}  # fmt: skip
#: Digits of a number; more are not exact in a double.
_DIGITS = 15

_BASE = {
    "value": "object | array | string | number | boolean | null",
    "object": r'"{" space (string space? ":" space value ("," space string space? ":" space value)* space)? "}"',
    "array": '"[" space (value ("," space value)* space)? "]"',
    "string": r'"\"" char* "\""',
    "char": r'[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "number": f'integer ("." [0-9]{{1,{_DIGITS}}})? ([eE] [-+]? [0-9]{{1,3}})?',
    "integer": f'"-"? ("0" | [1-9] [0-9]{{0,{_DIGITS}}})',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "space": r'" "? | "\n" [ \t]{0,20}',
    "date": '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])',
    "time": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,9})? ("Z" | [+-] ([01] [0-9] | "2" [0-3]) '
    '":" [0-5] [0-9])',
    "uuid": '[0-9a-fA-F]{8} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{12}',
}
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COMMA, _COLON = ' "," space ', 'space? ":" space'
_FORMATS = {"date": "date", "time": "time", "date-time": 'date "T" time', "uuid": "uuid"}


def to_gbnf(schema: Any) -> str:
    """Return the grammar of ``schema`` (an object or a boolean); raises GrammarError saying what is wrong and where."""
    converter = _Converter(schema)
    root = converter.visit(schema, "#", 0)
    rules = [f"root ::= {root}", *(f"{name} ::= {body}" for name, body in converter.rules.items())]
    text = "\n".join([*rules, *(f"{name} ::= {body}" for name, body in _BASE.items())])
    if len(text) > _TEXT_MAX:
        raise GrammarError(f"the schema becomes a grammar of {len(text)} characters, at most {_TEXT_MAX} are possible")
    return text


def _fail(where: str, problem: str) -> NoReturn:
    raise GrammarError(f"at {where}: {problem}")


def literal(text: str) -> str:
    """Return ``text`` in GBNF's quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r") + '"'


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _json(value: Any) -> str:
    return literal(_text(value))


def _constant(value: Any) -> str:
    """One value, with white space wherever JSON may have it."""
    if isinstance(value, dict) and value:
        members = (f"{_json(k)} {_COLON} {_constant(v)}" for k, v in value.items())
        return f'"{{" space {_COMMA.join(members)} space "}}"'
    if isinstance(value, list) and value:
        return f'"[" space {_COMMA.join(map(_constant, value))} space "]"'
    return _json(value)


class _Converter:
    """Rules made so far. ``visit`` returns an expression that may stand anywhere in a rule."""

    def __init__(self, root: Any) -> None:
        self._root, self._nodes = root, 0
        self.rules: dict[str, str] = {}
        self._refs: dict[str, str] = {}

    def _rule(self, body: str) -> str:
        name = f"r{len(self.rules)}"
        self.rules[name] = body
        return name

    def visit(self, schema: Any, where: str, depth: int) -> str:
        """Return the expression of one schema. ``where`` is its JSON pointer."""
        self._nodes += 1
        if depth > DEPTH_MAX or self._nodes > _NODES_MAX:
            _fail(where, f"more than {DEPTH_MAX} schemas within each other or {_NODES_MAX} in all")
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            _fail(where, "nothing is valid here" if schema is False else "a schema is an object or a boolean")
        if unsupported := sorted(_UNSUPPORTED & schema.keys()):
            _fail(where, f"{unsupported[0]!r} is not supported")
        if "$ref" in schema:
            return self._ref(schema, where, depth)
        if "const" in schema:
            return self._rule(_constant(schema["const"]))
        if "enum" in schema:
            if not isinstance(schema["enum"], list) or not schema["enum"]:
                _fail(where, "'enum' must be a list with values")
            return self._rule(" | ".join(dict.fromkeys(map(_constant, schema["enum"]))))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._either(schema, key, where, depth)
        if "allOf" in schema:
            return self.visit(self._all(schema, where), where, depth + 1)
        return self._typed(schema, where, depth)

    # --- combinations -------------------------------------------------------------------------------------------

    def _ref(self, schema: dict[str, Any], where: str, depth: int) -> str:
        ref = schema["$ref"]
        target = self._target(ref, where)
        beside = {k: v for k, v in schema.items() if k in _IMPLIES or k in ("type", "enum", "const", "anyOf", "oneOf", "allOf")}
        if beside:
            return self.visit(self._merge(target, beside, where), where, depth + 1)
        if ref not in self._refs:
            # The name is there before the body: a schema may contain itself.
            self._refs[ref] = name = self._rule("")
            self.rules[name] = self.visit(target, ref, depth + 1)
        return self._refs[ref]

    def _target(self, ref: Any, where: str) -> Any:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            _fail(where, f"$ref {ref!r} does not point into this schema (#/...)")
        target = self._root
        for part in ref.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and key in target:
                target = target[key]
            elif isinstance(target, list) and key.isascii() and key.isdigit() and int(key) < len(target):
                target = target[int(key)]
            else:
                _fail(where, f"$ref {ref!r} points at nothing")
        return target

    def _either(self, schema: dict[str, Any], key: str, where: str, depth: int) -> str:
        alternatives = schema[key]
        if not isinstance(alternatives, list) or not alternatives:
            _fail(where, f"{key!r} must be a list with schemas")
        rest = {k: v for k, v in schema.items() if k != key and (k in _IMPLIES or k in ("type", "anyOf", "oneOf", "allOf"))}
        found = []
        for i, alternative in enumerate(alternatives):
            merged = self._merge(alternative, rest, where) if rest else alternative
            found.append(self.visit(merged, f"{where}/{key}/{i}", depth + 1))
        return self._rule(" | ".join(dict.fromkeys(found)))

    def _all(self, schema: dict[str, Any], where: str) -> dict[str, Any]:
        if not isinstance(schema["allOf"], list):
            _fail(where, "'allOf' must be a list of schemas")
        merged = {k: v for k, v in schema.items() if k != "allOf"}
        for part in schema["allOf"]:
            merged = self._merge(part, merged, where)
        return merged

    def _merge(self, one: Any, other: dict[str, Any], where: str) -> dict[str, Any]:
        """Return a schema that demands what both demand; only what can be put side by side is."""
        for _ in range(DEPTH_MAX):
            if not (isinstance(one, dict) and "$ref" in one):
                break
            one = {**{k: v for k, v in one.items() if k != "$ref"}, **self._object(self._target(one["$ref"], where), where)}
        else:
            _fail(where, "$ref goes round in circles")
        one = {} if one is True else self._object(one, where)
        merged = dict(one)
        for key, value in other.items():
            if key not in merged or merged[key] == value or key in ("title", "description", "default", "examples", "$defs"):
                merged[key] = value
            elif key == "properties" and isinstance(value, dict) and not merged[key].keys() & value.keys():
                merged[key] = value | merged[key]
            elif key == "required":
                merged[key] = list(dict.fromkeys([*merged[key], *value]))
            else:
                _fail(where, f"two different {key!r} are demanded at once; write one schema for both")
        return merged

    @staticmethod
    def _object(schema: Any, where: str) -> dict[str, Any]:
        if not isinstance(schema, dict):
            _fail(where, "a schema that is combined with others must be an object")
        return schema

    # --- types --------------------------------------------------------------------------------------------------

    def _typed(self, schema: dict[str, Any], where: str, depth: int) -> str:
        kind = schema.get("type")
        if kind is None:
            implied = {_IMPLIES[k] for k in schema.keys() & _IMPLIES.keys()}
            if "minimum" in schema or "maximum" in schema or len(implied) > 1:
                _fail(where, "'type' is needed to know what the limits are for")
            if not implied:
                return "value"
            kind = implied.pop()
        kinds = kind if isinstance(kind, list) else [kind]
        if not kinds or any(k not in _TYPES for k in kinds):
            _fail(where, f"'type' must be of {', '.join(_TYPES)}")
        if schema.get("nullable") is True and "null" not in kinds:
            kinds = [*kinds, "null"]
        found = [self._one_type(k, schema, where, depth) for k in kinds]
        return found[0] if len(found) == 1 else self._rule(" | ".join(found))

    def _one_type(self, kind: str, schema: dict[str, Any], where: str, depth: int) -> str:
        if kind == "object":
            return self._members(schema, where, depth)
        if kind == "array":
            return self._array(schema, where, depth)
        if kind == "string":
            return self._string(schema, where)
        limits = {k: v for k, v in schema.items() if k in _LIMITS}
        if kind == "integer" and limits:
            return self._rule(_integers(*_bounds(limits, where)))
        if kind == "number" and limits:
            _fail(where, f"{next(iter(limits))!r} is supported for integers only")
        return kind

    def _members(self, schema: dict[str, Any], where: str, depth: int) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            _fail(where, "'properties' must be an object and 'required' a list")
        extra = schema.get("additionalProperties", not properties)
        if missing := [k for k in required if k not in properties]:
            if extra is False or not all(isinstance(k, str) for k in missing):
                _fail(where, f"{missing[0]!r} is required and can not be there")
            properties = properties | dict.fromkeys(missing, extra)
        if not properties and extra is True:
            return "object"
        pairs = []
        for name, sub in properties.items():
            value = self.visit(sub, f"{where}/properties/{name}", depth + 1)
            pairs.append((self._rule(f"{literal(_text(name)[1:])} {_COLON} {value}"), name in required))
        # What may come after the quote that begins a name, and after a property: the comma, white space and the quote
        # belong to all alternatives, of which only the names are many. Two rules a property.
        keys = later = ""
        left_out = True  # whether all that follow may be
        if extra is not False:
            value = self.visit(extra, f"{where}/additionalProperties", depth + 1)
            pair = self._rule(f"{self._other_key(list(properties))} {_COLON} {value}")
            later = self._rule(f'({_COMMA} "\\"" {pair})*')
            keys = f"{pair} {later}"
        for pair, needed in reversed(pairs):
            keys = self._rule(f"{pair} {later} | {keys}" if keys and not needed else f"{pair} {later}")
            left_out = left_out and not needed
            later = self._rule(f'({_COMMA} "\\"" {keys}){"?" if left_out else ""}')
        members = f'("\\"" {keys}){"?" if left_out else ""}' if keys else ""
        return self._rule(f'"{{" space {members} space "}}"')

    def _other_key(self, names: list[str]) -> str:
        """Return the expression of a string that is none of ``names``, without its first quote."""
        if not names:
            return r'char* "\""'
        tree: dict[str, Any] = {}
        for name in names:
            node = tree
            for char in json.dumps(name, ensure_ascii=False)[1:-1]:
                node = node.setdefault(char, {})
            node[""] = {}

        def rest(node: dict[str, Any], level: int) -> str:
            if level > DEPTH_MAX:
                return "char*"  # two names that differ late: the difference is before
            chars = [c for c in node if c]
            outside = "".join(_in_set(c) for c in chars)
            parts = [f"{literal(c)} ({rest(node[c], level + 1)})" for c in chars]
            parts.append(rf'[^{outside}"\\\x7F\x00-\x1F] char*')
            return " | ".join(parts if "" in node else [*parts, '""'])

        return self._rule(rf'({rest(tree, 0)}) "\""')

    def _array(self, schema: dict[str, Any], where: str, depth: int) -> str:
        low, high = _counts(schema, "minItems", "maxItems", where)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            _fail(where, "'prefixItems' must be a list of schemas")
        heads = [self.visit(s, f"{where}/prefixItems/{i}", depth + 1) for i, s in enumerate(first)]
        items = schema.get("items", True)
        if items is False or (high is not None and high <= len(heads)):
            high = len(heads) if high is None else min(high, len(heads))
            item = ""
        else:
            item = self.visit(items, f"{where}/items", depth + 1)
        if high is not None and low > high:
            _fail(where, f"at least {low} and at most {high} items")
        return self._rule(f'"[" space {self._list(heads, item, low, high)} space "]"')

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

    def _string(self, schema: dict[str, Any], where: str) -> str:
        low, high = _counts(schema, "minLength", "maxLength", where)
        pattern, form = schema.get("pattern"), schema.get("format")
        if pattern is not None:
            if "minLength" in schema or "maxLength" in schema:
                _fail(where, "'pattern' together with a length is not supported")
            if not isinstance(pattern, str):
                _fail(where, "'pattern' must be a string")
            return self._rule(rf'"\"" ({_Pattern(pattern, where).expression()}) "\""')
        if isinstance(form, str) and form in _FORMATS:
            return self._rule(rf'"\"" {_FORMATS[form]} "\""')
        if low == 0 and high is None:
            return "string"
        return self._rule(rf'"\"" char{{{low},{"" if high is None else high}}} "\""')


def _counts(schema: dict[str, Any], least: str, most: str, where: str) -> tuple[int, int | None]:
    low, high = schema.get(least, 0), schema.get(most)
    for name, value in ((least, low), (most, high)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= REPETITION_MAX):
            _fail(where, f"{name!r} must be a whole number up to {REPETITION_MAX}")
    if high is not None and low > high:
        _fail(where, f"{least!r} is over {most!r}")
    return low, high


# --- integers within limits ---------------------------------------------------------------------------------------


def _bounds(limits: dict[str, Any], where: str) -> tuple[int, int]:
    far = 10 ** (_DIGITS + 1) - 1
    low, high = -far, far
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or abs(value) > far:
            _fail(where, f"{name!r} must be a whole number of up to {_DIGITS} digits")
        number = int(value)
        if name.endswith("inimum"):
            low = max(low, number + name.startswith("exclusive"))
        else:
            high = min(high, number - name.startswith("exclusive"))
    if low > high:
        _fail(where, f"no integer is between {low} and {high}")
    return low, high


def _integers(low: int, high: int) -> str:
    """Return the expression of all integers from ``low`` to ``high``."""
    parts = []
    if low < 0:
        parts += [f'"-" ({p})' for p in _naturals(max(1, -high), -low)]
    if high >= 0:
        parts += _naturals(max(0, low), high)
    return " | ".join(parts)


def _naturals(low: int, high: int) -> list[str]:
    """Return expressions, one for each number of digits."""
    parts = []
    for size in range(len(str(low)), len(str(high)) + 1):
        least, most = 10 ** (size - 1) if size > 1 else 0, 10**size - 1
        parts.append(_same_size(str(max(low, least)), str(min(high, most))))
    return parts


def _same_size(low: str, high: str) -> str:
    """Digits from ``low`` to ``high``, both of one length."""
    if not low:
        return '""'
    rest = len(low) - 1
    if low == "0" * len(low) and high == "9" * len(high):
        return f"[0-9]{{{len(low)}}}"
    if low[0] == high[0]:
        return f'"{low[0]}" ({_same_size(low[1:], high[1:])})' if rest else f'"{low[0]}"'
    if not rest:
        return f"[{low}-{high}]"
    parts = [f'"{low[0]}" ({_same_size(low[1:], "9" * rest)})']
    if int(high[0]) - int(low[0]) > 1:
        parts.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}] [0-9]{{{rest}}}")
    parts.append(f'"{high[0]}" ({_same_size("0" * rest, high[1:])})')
    return " | ".join(parts)


# --- regular expressions --------------------------------------------------------------------------------------------

_SHORT = {"d": "0-9", "w": "a-zA-Z0-9_", "s": " "}  # other white space is never itself within JSON's quotes
_CONTROL = {"n": "\\\\n", "t": "\\\\t", "r": "\\\\r"}  # as JSON writes them in a string, in GBNF's quotes


def _in_set(char: str) -> str:
    return "\\" + char if char in '\\]["' else f"\\x{ord(char):02X}" if char in "^-" else char


class _Pattern:
    """A regular expression (the part of ECMA 262 that has no look-around and no back-references) within JSON's quotes."""

    def __init__(self, pattern: str, where: str) -> None:
        self._text, self._at, self._where = pattern, 0, where

    def expression(self) -> str:
        """Return the expression; where it is not anchored any characters may stand before and after."""
        before = "" if self._text.startswith("^") else "char* "
        self._at = 0 if before else 1
        anchored = self._text.endswith("$") and not re.search(r"(?<!\\)(\\\\)*\\\$$", self._text)
        if anchored:
            self._text = self._text[:-1]
        body = self._alternatives(0)
        if self._at < len(self._text):
            self._refuse("a bracket is closed that was not opened")
        return f"{before}({body})" + ("" if anchored else " char*")

    def _refuse(self, problem: str) -> NoReturn:
        _fail(self._where, f"'pattern', character {self._at + 1}: {problem}")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _alternatives(self, depth: int) -> str:
        if depth > DEPTH_MAX // 2:
            self._refuse("brackets are nested too deeply")
        parts = [self._sequence(depth)]
        while self._peek() == "|":
            self._at += 1
            parts.append(self._sequence(depth))
        return " | ".join(parts)

    def _sequence(self, depth: int) -> str:
        parts: list[str] = []
        while (char := self._peek()) and char not in "|)":
            parts.append(self._atom(depth) + self._quantifier())
        return " ".join(parts) or '""'

    def _atom(self, depth: int) -> str:
        char = self._peek()
        self._at += 1
        if char == "(":
            if self._text.startswith("?:", self._at):
                self._at += 2
            elif self._peek() == "?":
                self._refuse("look-around and named groups are not supported")
            body = self._alternatives(depth + 1)
            if self._peek() != ")":
                self._refuse("a bracket is not closed")
            self._at += 1
            return f"({body})"
        if char == "[":
            return self._set()
        if char == ".":
            return "char"
        if char in "*+?{^$":
            self._refuse(f"{char} is not possible here")
        if char == "\\":
            return self._escape()
        return literal(json.dumps(char, ensure_ascii=False)[1:-1])

    def _escape(self) -> str:
        char = self._peek()
        self._at += 1
        if char in ("d", "w"):
            return f"[{_SHORT[char]}]"
        if char == "s":
            return r'(" " | "\\" [tnr])'
        if char in ("D", "W", "S"):
            return rf'[^{_SHORT[char.lower()]}"\\\x7F\x00-\x1F]'
        if char in _CONTROL and char:
            return f'"{_CONTROL[char]}"'
        if not char or char.isalnum():
            self._refuse(f"\\{char} is not supported")
        return literal(json.dumps(char, ensure_ascii=False)[1:-1])

    def _set(self) -> str:
        negated = self._peek() == "^"
        self._at += negated
        body = ""
        while (char := self._peek()) != "]":
            if not char:
                self._refuse("a set is not closed")
            self._at += 1
            if char == "\\":
                char = self._peek()
                self._at += 1
                if char in _SHORT and char:
                    body += _SHORT[char]
                    continue
                if not char or char.isalnum():
                    self._refuse(f"\\{char} in a set is not supported")
            elif char == "-" and body and self._peek() != "]":
                body += "-"
                continue
            if not negated and char in '"\\':
                self._refuse('a set with " or \\ is not supported')
            body += _in_set(char) if char in '\\]["^-' else char
        self._at += 1
        return rf'[^{body}"\\\x7F\x00-\x1F]' if negated else f"[{body}]"

    def _quantifier(self) -> str:
        char = self._peek()
        if char in ("*", "+", "?"):
            self._at += 1
            found = char
        elif char == "{":
            match = re.compile(r"\{\d+(,\d*)?\}").match(self._text, self._at)
            if match is None:
                self._refuse("expected {m}, {m,} or {m,n}")
            self._at = match.end()
            found = match[0]
        else:
            return ""
        if self._peek() == "?" or self._peek() == "+":
            self._refuse("lazy and possessive repetitions are not supported")
        return found
