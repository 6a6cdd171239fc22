"""JSON's texts as GBNF: the rules of all values, constants, integers within limits, regular expressions. Pure."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from rbee_serve.worker.engine.gbnf import DEPTH_MAX, LAST_CODE_POINT, GrammarError, Ranges, complement, merged

#: Digits of a number; more are not exact in a double.
DIGITS = 15

BASE = {
    "value": "object | array | string | number | boolean | null",
    "object": r'"{" space (string space? ":" space value ("," space string space? ":" space value)* space)? "}"',
    "array": '"[" space (value ("," space value)* space)? "]"',
    "string": r'"\"" char* "\""',
    "char": r'[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" unit)',
    # What takes two escapes is one character, and half of it none.
    "unit": r'[0-9a-cA-CefEF] hex hex hex | [dD] ([0-7] hex hex | [89abAB] hex hex "\\u" [dD] [c-fC-F] hex hex)',
    "hex": "[0-9a-fA-F]",
    "number": f'integer ("." [0-9]{{1,{DIGITS}}})? ([eE] [-+]? [0-9]{{1,3}})?',
    "integer": f'"-"? ("0" | [1-9] [0-9]{{0,{DIGITS}}})',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "space": r'" "? | "\n" [ \t]{0,20}',
    "date": '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])',
    "time": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,9})? ("Z" | [+-] ([01] [0-9] | "2" [0-3]) '
    '":" [0-5] [0-9])',
    "uuid": '[0-9a-fA-F]{8} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{12}',
}
COMMA, COLON = ' "," space ', 'space? ":" space'
FORMATS = {"date": "date", "time": "time", "date-time": 'date "T" time', "uuid": "uuid"}


def fail(where: str, problem: str) -> NoReturn:
    """Refuse a schema: at which place of it, and why."""
    raise GrammarError(f"at {where}: {problem}")


def literal(text: str) -> str:
    """Return ``text`` in GBNF's quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r") + '"'


def text_of(value: Any) -> str:
    """Return ``value`` as JSON without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def value_literal(value: Any) -> str:
    """Return the text of ``value`` in GBNF's quotes."""
    return literal(text_of(value))


def constant(value: Any) -> str:
    """One value, with white space wherever JSON may have it."""
    if isinstance(value, dict) and value:
        members = (f"{value_literal(k)} {COLON} {constant(v)}" for k, v in value.items())
        return f'"{{" space {COMMA.join(members)} space "}}"'
    if isinstance(value, list) and value:
        return f'"[" space {COMMA.join(map(constant, value))} space "]"'
    return value_literal(value)


# --- integers within limits -------------------------------------------------------------------------------------------


def integers(low: int, high: int) -> str:
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


# --- regular expressions ----------------------------------------------------------------------------------------------

_LINE_ENDS: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))
_DIGIT: Ranges = ((48, 57),)
_WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
#: White space as it may be written, and all that some reader takes for it.
_SPACE: Ranges = ((9, 10), (13, 13), (32, 32))
_SPACES: Ranges = (
    (9, 13), (28, 32), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
    (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
)  # fmt: skip
_CLASSES: dict[str, Ranges] = {
    "d": _DIGIT, "w": _WORD, "s": _SPACE, "D": complement(_DIGIT), "W": complement(_WORD), "S": complement(_SPACES),
}  # fmt: skip
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f"}
#: Characters that are not themselves within JSON's quotes, and those of them that have a short way to be written.
_NEVER_PLAIN: Ranges = ((0, 31), (34, 34), (92, 92), (127, 127), (0xD800, 0xDFFF))
_ESCAPED = '"\\\b\f\n\r\t'


def _chars(ranges: Ranges) -> str:
    """Return the expression of one character out of ``ranges`` within JSON's quotes; empty when none can be written."""
    plain = complement(merged([*complement(ranges), *_NEVER_PLAIN]))
    parts = [f"[{''.join(f'{_code(low)}-{_code(high)}' for low, high in plain)}]"] if plain else []
    parts += [literal(text_of(c)[1:-1]) for c in _ESCAPED if any(low <= ord(c) <= high for low, high in ranges)]
    return f"({' | '.join(parts)})" if parts else ""


def _code(code: int) -> str:
    return chr(code) if chr(code).isascii() and chr(code).isalnum() else f"\\U{min(code, LAST_CODE_POINT):08X}"


def in_set(char: str) -> str:
    """Return ``char`` as it is written in GBNF's square brackets."""
    return "\\" + char if char in '\\]["' else f"\\x{ord(char):02X}" if char in "^-" else char


class Pattern:
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
        fail(self._where, f"'pattern', character {self._at + 1}: {problem}")

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
            return _chars(complement(_LINE_ENDS))
        if char in "*+?{^$":
            self._refuse(f"{char} is not possible here")
        if char == "\\":
            return self._escape()
        return literal(json.dumps(char, ensure_ascii=False)[1:-1])

    def _escape(self) -> str:
        code = self._escaped()
        return _chars(code) if isinstance(code, tuple) else literal(text_of(chr(code))[1:-1])

    def _escaped(self) -> int | Ranges:
        """Return what is meant after a backslash: a character or a class of them."""
        char = self._peek()
        self._at += 1
        if char and char in _CLASSES:
            return _CLASSES[char]
        if char and char in _CONTROL:
            return ord(_CONTROL[char])
        if not char or char.isalnum():
            self._refuse(f"\\{char} is not supported")
        return ord(char)

    def _set(self) -> str:
        negated = self._peek() == "^"
        self._at += negated
        ranges: list[tuple[int, int]] = []
        while self._peek() != "]":
            low = self._member()
            if self._peek() != "-" or self._text[self._at + 1 : self._at + 2] == "]":
                ranges += low if isinstance(low, tuple) else [(low, low)]
                continue
            self._at += 1
            high = self._member()
            if isinstance(low, tuple) or isinstance(high, tuple) or high < low:
                self._refuse("a range in a set must go from one character to a later one")
            ranges.append((low, high))
        self._at += 1
        found = complement(merged(ranges)) if negated else merged(ranges)
        return _chars(found) or self._refuse("nothing is in the set that JSON can write")

    def _member(self) -> int | Ranges:
        char = self._peek()
        if not char:
            self._refuse("a set is not closed")
        self._at += 1
        return self._escaped() if char == "\\" else ord(char)

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
