"""What JSON schemas say together: references, two demands at once, whether a value is valid, whether two exclude each other.

Pure. Each answer is exact or refused: a schema that is weaker than what was asked for never comes of it.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

from rbee_serve.worker.engine.gbnf import DEPTH_MAX, GrammarError, parse
from rbee_serve.worker.engine.grammar import Automaton, Matcher
from rbee_serve.worker.engine.json_text import BASE, FORMATS, Pattern, fail, text_of

UNSUPPORTED = {
    "not", "if", "then", "else", "multipleOf", "uniqueItems", "contains", "minContains", "maxContains", "patternProperties",
    "propertyNames", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies",
    "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef",
}  # fmt: skip
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
#: Keywords that concern one type: they decide for it where ``type`` is not given.
IMPLIES = {
    "properties": "object", "required": "object", "additionalProperties": "object", "items": "array", "prefixItems": "array",
    "minItems": "array", "maxItems": "array", "minLength": "string", "maxLength": "string", "pattern": "string",
}  # fmt: skip
LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
#: Keywords that say what is valid; all others are annotations.
_DEMANDS = {*IMPLIES, *LIMITS, *UNSUPPORTED, "type", "enum", "const", "anyOf", "oneOf", "allOf", "format", "nullable", "$ref"}
_COMPARE = {
    "minimum": operator.ge, "exclusiveMinimum": operator.gt, "minLength": operator.ge, "minItems": operator.ge,
    "maximum": operator.le, "exclusiveMaximum": operator.lt, "maxLength": operator.le, "maxItems": operator.le,
}  # fmt: skip
_OF_OBJECTS, _OF_ARRAYS = ("properties", "additionalProperties"), ("items", "prefixItems")
#: Schemas within schemas that are compared for ``oneOf``.
_COMPARED_DEPTH = 8
#: Keywords, names and values looked at, all in all (about 0.4 s): the engine's one thread does it.
_STEPS_MAX = 200_000

Schema = dict[str, Any]


class NothingValid(GrammarError):
    """No value is valid by a schema: an alternative that can be left out, not a demand that is not understood."""


def nothing(where: str, problem: str) -> NothingValid:
    """Return the error of a schema by which nothing is valid."""
    return NothingValid(f"at {where}: {problem}")


def demands(schema: Schema, *but: str) -> Schema:
    """Return the part of ``schema`` that says what is valid."""
    return {k: v for k, v in schema.items() if k in _DEMANDS and k not in but}


def kinds_of(schema: Schema, where: str) -> list[str] | None:
    """Return the types that are asked for, None where that is left open."""
    kind = schema.get("type")
    if kind is None:
        return None
    kinds = kind if isinstance(kind, list) else [kind]
    if not kinds or any(k not in TYPES for k in kinds):
        fail(where, f"'type' must be of {', '.join(TYPES)}")
    return [*kinds, "null"] if schema.get("nullable") is True and "null" not in kinds else kinds


def written_kinds(schema: Schema, where: str) -> list[str]:
    """Return the types of what is written for ``schema``: where it asks for none, the one that its keywords are for."""
    kinds = kinds_of(schema, where)
    if kinds is not None:
        return kinds
    implied = sorted({IMPLIES[k] for k in schema.keys() & IMPLIES.keys()})
    if len(implied) > 1 or any(k in schema for k in LIMITS):
        fail(where, "'type' is needed to know what the limits are for")
    return implied or list(TYPES)


def same(value: Any) -> Any:
    """Return something that equal JSON values have in common: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, dict):
        return "object", frozenset((k, same(v)) for k, v in value.items())
    if isinstance(value, list):
        return "array", tuple(map(same, value))
    return type(value).__name__ if isinstance(value, bool) or value is None else "", value


def values_of(schema: Schema, where: str) -> list[Any] | None:
    """Return what ``const`` and ``enum`` leave, None where there is neither."""
    if "enum" in schema and (not isinstance(schema["enum"], list) or not schema["enum"]):
        fail(where, "'enum' must be a list with values")
    values = schema.get("enum")
    if "const" in schema:
        fixed = same(schema["const"])
        return [schema["const"]] if values is None or fixed in map(same, values) else []
    return values


class Schemas:
    """A schema and all that it contains."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._depth = self._steps = 0
        self._texts: dict[str, Automaton] = {}

    def _spend(self, steps: int, where: str) -> None:
        self._steps += steps
        if self._steps > _STEPS_MAX:
            fail(where, f"the schemas that are combined here are too large: more than {_STEPS_MAX} steps to compare them")

    # --- references and demands at once -------------------------------------------------------------------------

    def target(self, ref: Any, where: str) -> Any:
        """Return what a reference points at."""
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            fail(where, f"$ref {ref!r} does not point into this schema (#/...)")
        target = self._root
        for part in ref.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and key in target:
                target = target[key]
            elif isinstance(target, list) and key.isascii() and key.isdigit() and int(key) < len(target):
                target = target[int(key)]
            else:
                fail(where, f"$ref {ref!r} points at nothing")
        return target

    def plain(self, schema: Any, where: str) -> Schema:
        """Return what ``schema`` demands without references and ``allOf``; raises NothingValid."""
        if schema is True:
            return {}
        if schema is False:
            raise nothing(where, "nothing is valid here")
        if not isinstance(schema, dict):
            fail(where, "a schema is an object or a boolean")
        self._spend(1 + len(schema), where)
        found = demands(schema)
        if unsupported := sorted(UNSUPPORTED & found.keys()):
            fail(where, f"{unsupported[0]!r} is not supported")
        if "nullable" in found and found.pop("nullable") is True and "type" in found:
            found["type"] = kinds_of({**found, "nullable": True}, where)
        if "$ref" not in found and "allOf" not in found:
            return found
        self._depth += 1
        if self._depth > DEPTH_MAX:
            fail(where, "$ref goes round in circles")
        try:
            parts = [self.target(found.pop("$ref"), where)] if "$ref" in found else []
            listed = found.pop("allOf", [])
            if not isinstance(listed, list):
                fail(where, "'allOf' must be a list of schemas")
            # What the parts name comes in the order in which they name it.
            for part in [*parts, *listed]:
                found = self._merged(found, self.plain(part, where), where)
        finally:
            self._depth -= 1
        return found

    def both(self, one: Any, other: Any, where: str) -> Schema:
        """Return a schema that demands what both demand; only what can be put side by side is."""
        return self._merged(self.plain(one, where), self.plain(other, where), where)

    def _merged(self, one: Schema, other: Schema, where: str) -> Schema:
        self._spend(sum(len(v) for schema in (one, other) for v in schema.values() if isinstance(v, list | dict)), where)
        found = {**other, **one}
        for key in one.keys() & other.keys():
            if one[key] != other[key] or isinstance(one[key], bool) != isinstance(other[key], bool):
                found[key] = self._merged_keyword(key, one, other, where)
        for keys, merge in ((_OF_OBJECTS, self._merged_objects), (_OF_ARRAYS, self._merged_arrays)):
            if all(any(k in schema for k in keys) for schema in (one, other)):
                found = {k: v for k, v in found.items() if k not in keys} | merge(one, other)
        return found

    def _merged_keyword(self, key: str, one: Schema, other: Schema, where: str) -> Any:
        a, b = one[key], other[key]
        if key in (*_OF_OBJECTS, *_OF_ARRAYS):
            return a
        if key in _COMPARE:
            if any(isinstance(v, bool) or not isinstance(v, int | float) for v in (a, b)):
                fail(where, f"{key!r} must be a number")
            return max(a, b) if _COMPARE[key] in (operator.ge, operator.gt) else min(a, b)
        if key == "type":
            return _merged_kinds(one, other, where)
        if key in ("enum", "const"):
            return _merged_values(key, a, b, where)
        if key == "required" and isinstance(a, list) and isinstance(b, list):
            return list(dict.fromkeys([*a, *b]))
        if key == "anyOf" and isinstance(a, list) and isinstance(b, list):
            return [{"allOf": [alternative, {"anyOf": b}]} for alternative in a]
        if key == "format" and (a not in FORMATS or b not in FORMATS):
            return b if b in FORMATS else a
        raise GrammarError(f"at {where}: two different {key!r} are demanded at once; write one schema for both")

    @staticmethod
    def _merged_objects(one: Schema, other: Schema) -> Schema:
        """A property follows both schemas, each of which may name it or say what all others are."""
        names = [*one.get("properties", {}), *other.get("properties", {})]
        found: Schema = {}
        sides = [(s.get("properties", {}), s.get("additionalProperties", True)) for s in (one, other)]
        if names:
            found["properties"] = {n: _all_of(*(named.get(n, others) for named, others in sides)) for n in names}
        if any("additionalProperties" in s for s in (one, other)):
            found["additionalProperties"] = _all_of(*(others for _, others in sides))
        return found

    @staticmethod
    def _merged_arrays(one: Schema, other: Schema) -> Schema:
        sides = [(s.get("prefixItems", []), s.get("items", True)) for s in (one, other)]
        pairs = itertools.zip_longest(*(first for first, _ in sides))
        first = [_all_of(*(s[1] if v is None else v for s, v in zip(sides, pair, strict=True))) for pair in pairs]
        return {**({"prefixItems": first} if first else {}), "items": _all_of(sides[0][1], sides[1][1])}

    # --- values -------------------------------------------------------------------------------------------------

    def is_valid(self, value: Any, schema: Any, where: str) -> bool:
        """Whether ``value`` is valid by ``schema`` as JSON Schema says."""
        try:
            found = self.plain(schema, where)
        except NothingValid:
            return False
        kind = _kind(value)
        kinds = kinds_of(found, where)
        if kinds is not None and kind not in kinds and not (kind == "integer" and "number" in kinds):
            return False
        values = values_of(found, where)
        self._spend(len(values or ()), where)
        if values is not None and same(value) not in map(same, values):
            return False
        if "anyOf" in found and not any(self.is_valid(value, s, where) for s in found["anyOf"]):
            return False
        if "oneOf" in found and sum(self.is_valid(value, s, where) for s in found["oneOf"]) != 1:
            return False
        if kind == "object":
            return self._is_valid_object(value, found, where)
        if kind == "array":
            first = found.get("prefixItems", [])
            schemas = itertools.chain(first, itertools.repeat(found.get("items", True)))
            return _within(len(value), found, "Items", where) and all(map(self.is_valid, value, schemas, itertools.repeat(where)))
        if kind == "string":
            return _within(len(value), found, "Length", where) and self._is_valid_string(value, found, where)
        return kind in ("boolean", "null") or _within(value, found, "imum", where)

    def _is_valid_object(self, value: dict[str, Any], schema: Schema, where: str) -> bool:
        named, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(name in value for name in schema.get("required", [])) and all(
            self.is_valid(v, named.get(name, others), where) for name, v in value.items()
        )

    def _is_valid_string(self, value: str, schema: Schema, where: str) -> bool:
        rules = [FORMATS[schema["format"]]] if schema.get("format") in FORMATS else []
        rules += [Pattern(schema["pattern"], where).expression()] if isinstance(schema.get("pattern"), str) else []
        for rule in rules:
            automaton = self._texts.get(rule)
            if automaton is None:
                base = "\n".join(f"{name} ::= {body}" for name, body in BASE.items())
                automaton = self._texts[rule] = Automaton(parse(f'root ::= "\\"" ({rule}) "\\""\n{base}'))
            text, piece = Matcher(automaton), text_of(value).encode()
            if not text.allows(piece):
                return False
            text.accept(piece)
            if not text.may_end:
                return False
        return True

    # --- alternatives of which one must be valid ----------------------------------------------------------------

    def disjoint(self, alternatives: list[Any], where: str) -> list[Any]:
        """Return ``alternatives`` so that what is written for one is valid by no other; raises GrammarError.

        A property that tells them apart is then always written, also where the schema lets it be left out.
        """
        tagged = self._tagged(alternatives, where)
        if tagged is not None:
            return tagged
        for (i, one), (j, other) in itertools.permutations(enumerate(alternatives), 2):
            if not self._excludes(one, other, where, 0):
                fail(
                    where,
                    f"'oneOf': a value may be valid by alternatives {min(i, j)} and {max(i, j)} at once; "
                    "write 'anyOf', or a required property with another 'const' in each",
                )
        return alternatives

    def _tagged(self, alternatives: list[Any], where: str) -> list[Any] | None:
        """Return the alternatives with a property of which each has values of its own; None where there is none."""
        found = [plain for s in alternatives if (plain := self._plain_or_none(s, where)) is not None]
        if any(written_kinds(s, where) != ["object"] or not isinstance(s.get("properties"), dict) for s in found):
            return None
        tags: dict[str, set[Any]] = {name: set() for name in found[0]["properties"]} if found else {}
        for schema in found:
            own: dict[str, set[Any]] = {}
            for name in tags.keys() & schema["properties"].keys():
                values = values_of(self._plain_or_none(schema["properties"][name], where) or {}, where)
                if values is not None and not tags[name] & (mine := set(map(same, values))):
                    own[name] = tags[name] | mine
            tags = own
        if not tags:
            return None
        tag = max(sorted(tags), key=lambda name: sum(name in s.get("required", []) for s in found))
        return [self._requiring(schema, tag, where) for schema in alternatives]

    def _requiring(self, schema: Any, name: str, where: str) -> Any:
        plain = self._plain_or_none(schema, where)
        if plain is None or name in plain.get("required", []):
            return schema
        return {**schema, "required": [*schema.get("required", []), name]}

    def _plain_or_none(self, schema: Any, where: str) -> Schema | None:
        try:
            return self.plain(schema, where)
        except NothingValid:
            return None

    def _excludes(self, one: Any, other: Any, where: str, depth: int) -> bool:
        """Whether no text that is written for ``one`` is valid by ``other``. False where that is not sure."""
        if depth > _COMPARED_DEPTH:
            return False
        a, b = self._plain_or_none(one, where), self._plain_or_none(other, where)
        if a is None or b is None:
            return True
        for found in (values_of(a, where), values_of(b, where)):
            if found is not None:
                return not any(self.is_valid(v, a, where) and self.is_valid(v, b, where) for v in found)
        for key in ("anyOf", "oneOf"):
            if isinstance(a.get(key), list):
                rest = demands(a, key)
                return all(self._excludes({"allOf": [rest, s]}, b, where, depth + 1) for s in a[key])
            if isinstance(b.get(key), list):
                rest = demands(b, key)
                return all(self._excludes(a, {"allOf": [rest, s]}, where, depth + 1) for s in b[key])
        read = kinds_of(b, where) or list(TYPES)
        return all(self._exclude_as(k, a, b, where, depth) for k in written_kinds(a, where) if _overlaps(k, read))

    def _exclude_as(self, kind: str, a: Schema, b: Schema, where: str, depth: int) -> bool:
        if kind == "object":
            return self._exclude_as_objects(a, b, where, depth)
        if kind in ("array", "string"):
            of = "Items" if kind == "array" else "Length"
            least = max(a.get(f"min{of}", 0), b.get(f"min{of}", 0))
            return any(f"max{of}" in s and s[f"max{of}"] < least for s in (a, b))
        if kind in ("number", "integer"):
            lows = [s[k] for s in (a, b) for k in ("minimum", "exclusiveMinimum") if k in s]
            highs = [s[k] for s in (a, b) for k in ("maximum", "exclusiveMaximum") if k in s]
            return bool(lows and highs) and max(lows) > min(highs)
        return False

    def _exclude_as_objects(self, a: Schema, b: Schema, where: str, depth: int) -> bool:
        """Whether some property can not be as both want it. Where ``a`` leaves it open, others than named are not written."""
        named, allowed = a.get("properties", {}), b.get("properties", {})
        always, needed = a.get("required", []), b.get("required", [])
        others = a.get("additionalProperties", not named)
        for name in dict.fromkeys([*always, *needed]):
            missing = True if name in always and "additionalProperties" not in a else others
            wanted = allowed.get(name, b.get("additionalProperties", True))
            if self._excludes(named.get(name, missing), wanted, where, depth + 1):
                return True
        return False


def _merged_kinds(one: Schema, other: Schema, where: str) -> list[str]:
    first, second = kinds_of(one, where) or [], kinds_of(other, where) or []
    kinds = [k for k in first if k in second or (k == "integer" and "number" in second)]
    kinds += [k for k in second if k == "integer" and k not in kinds and "number" in first]
    if not kinds:
        raise nothing(where, f"two different 'type' are demanded at once: {one['type']} and {other['type']}")
    return kinds


def _merged_values(key: str, one: Any, other: Any, where: str) -> Any:
    allowed = set(map(same, values_of({key: other}, where) or []))
    values = [v for v in values_of({key: one}, where) or [] if same(v) in allowed]
    if not values:
        raise nothing(where, f"two {key!r} are demanded at once that have no value in common")
    return values if key == "enum" else values[0]


def _all_of(one: Any, other: Any) -> Any:
    if one is True or one == other:
        return other
    return one if other is True else {"allOf": [one, other]}


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    return {float: "number", str: "string", list: "array", dict: "object"}[type(value)]


def _overlaps(kind: str, kinds: list[str]) -> bool:
    return kind in kinds or (kind == "integer" and "number" in kinds) or (kind == "number" and "integer" in kinds)


def _within(value: float, schema: Schema, of: str, where: str) -> bool:
    """Whether the number, or the count of items or characters, is within its limits (keywords that end with ``of``)."""
    for key, holds in _COMPARE.items():
        if key.endswith(of) and (limit := schema.get(key)) is not None:
            if isinstance(limit, bool) or not isinstance(limit, int | float):
                fail(where, f"{key!r} must be a number")
            if not holds(value, limit):
                return False
    return True
