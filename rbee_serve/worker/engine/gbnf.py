"""GBNF, llama.cpp's grammar notation, parsed into rules. Pure.

llama.cpp's own parser and matcher are not used: nested brackets overflow their stack, an ambiguous grammar lets their
state double with each character, and a token they do not expect aborts the process. Here everything has a bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

#: Brackets within brackets.
DEPTH_MAX = 64
#: Largest count in ``{m,n}``; llama.cpp draws the line there too.
REPETITION_MAX = 2000
#: Symbols of all rules together after repetitions were written out.
SYMBOLS_MAX = 60_000
LAST_CODE_POINT = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]
#: A rule's number, or the code points that one character may be.
Symbol = int | Ranges
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_ANY: Ranges = ((0, LAST_CODE_POINT),)


class GrammarError(ValueError):
    """What is wrong with a grammar, for a person."""


@dataclass(frozen=True)
class Grammar:
    """``rules[i]`` are the alternatives of rule i, each a sequence of symbols; ``root`` is where a text begins."""

    rules: list[list[tuple[Symbol, ...]]]
    names: list[str]
    root: int


def parse(text: str) -> Grammar:
    """Return the rules of ``text``.

    Raises GrammarError: syntax (with line and column), an undefined rule, left recursion, something too large.
    """
    parser = _Parser(text)
    parser.run()
    for name, rule in parser.ids.items():
        if rule not in parser.rules:
            raise GrammarError(f"rule {name!r} is used but not defined")
    if "root" not in parser.ids:
        raise GrammarError("there is no rule named root")
    grammar = Grammar([parser.rules[i] for i in range(parser.count)], _named(parser), parser.ids["root"])
    _refuse_left_recursion(grammar)
    return grammar


def _named(parser: _Parser) -> list[str]:
    names = [""] * parser.count
    for name, rule in parser.ids.items():
        names[rule] = name
    return names


class _Parser:
    """Position in the text; rules by number, those of brackets and repetitions without a name."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._symbols = text, 0, 0
        self.ids: dict[str, int] = {}
        self.rules: dict[int, list[tuple[Symbol, ...]]] = {}
        self.count = 0

    def run(self) -> None:
        self._space(newlines=True)
        while self._at < len(self._text):
            self._rule()

    # --- parts --------------------------------------------------------------------------------------------------

    def _rule(self) -> None:
        name = self._name()
        self._space(newlines=False)
        if not self._text.startswith("::=", self._at):
            self._fail("expected ::=")
        self._at += 3
        self._space(newlines=True)
        number = self._id(name)
        if number in self.rules:
            self._fail(f"rule {name!r} is defined twice")
        self._alternatives(number, depth=0)
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            self._fail("expected a new line or the end")
        self._space(newlines=True)

    def _alternatives(self, number: int, depth: int) -> None:
        if depth > DEPTH_MAX:
            self._fail(f"brackets are nested deeper than {DEPTH_MAX}")
        found = [self._sequence(depth)]
        while self._peek() == "|":
            self._at += 1
            self._space(newlines=True)
            found.append(self._sequence(depth))
        self._define(number, found)

    def _sequence(self, depth: int) -> tuple[Symbol, ...]:
        symbols: list[Symbol] = []
        begin = 0  # where in ``symbols`` the last item begins: what an operator works on
        while char := self._peek():
            if char == '"':
                begin = len(symbols)
                symbols += self._literal()
            elif char == "[":
                begin = len(symbols)
                symbols.append(self._set())
            elif char == ".":
                begin = len(symbols)
                self._at += 1
                symbols.append(_ANY)
            elif char == "(":
                begin = len(symbols)
                symbols.append(self._group(depth))
            elif char.isascii() and (char.isalnum() or char == "-"):
                begin = len(symbols)
                symbols.append(self._id(self._name()))
            elif char in "*+?{":
                if begin == len(symbols):
                    self._fail(f"nothing stands before {char}")
                low, high = self._counts()
                symbols[begin:] = self._repeat(tuple(symbols[begin:]), low, high)
                begin = len(symbols)
            elif char in "<!":
                self._fail("references to tokens are not supported")
            else:
                break
            self._space(newlines=depth > 0)
        return tuple(symbols)

    def _group(self, depth: int) -> int:
        self._at += 1
        self._space(newlines=True)
        number = self._new()
        self._alternatives(number, depth + 1)
        if self._peek() != ")":
            self._fail("expected )")
        self._at += 1
        return number

    def _literal(self) -> list[Symbol]:
        self._at += 1
        symbols: list[Symbol] = []
        while self._peek() != '"':
            code = self._char()
            symbols.append(((code, code),))
        self._at += 1
        return symbols

    def _set(self) -> Ranges:
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        ranges: list[tuple[int, int]] = []
        while self._peek() != "]":
            low = high = self._char()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                high = self._char()
            if high < low:
                self._fail("the range goes backwards")
            ranges.append((low, high))
        self._at += 1
        return complement(merged(ranges)) if negated else merged(ranges)

    def _char(self) -> int:
        char = self._peek()
        if not char:
            self._fail("the text ends within quotes or brackets")
        self._at += 1
        if char != "\\":
            return ord(char)
        kind = self._peek()
        self._at += 1
        if kind in _HEX_ESCAPES and kind:
            digits = self._text[self._at : self._at + _HEX_ESCAPES[kind]]
            self._at += len(digits)
            if len(digits) < _HEX_ESCAPES[kind] or not all(d in "0123456789abcdefABCDEF" for d in digits):
                self._fail(f"expected {_HEX_ESCAPES[kind]} hexadecimal digits")
            return min(int(digits, 16), LAST_CODE_POINT)
        if kind not in _ESCAPES or not kind:
            self._fail(f"unknown escape \\{kind}")
        return ord(_ESCAPES[kind])

    def _counts(self) -> tuple[int, int | None]:
        char = self._peek()
        self._at += 1
        if char != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        end = self._text.find("}", self._at)
        body = self._text[self._at : end] if end >= 0 else ""
        low, comma, high = (part.strip() for part in body.partition(","))
        if not low.isascii() or not low.isdigit() or (high and not (high.isascii() and high.isdigit())):
            self._fail("expected {m}, {m,} or {m,n}")
        if max(len(low), len(high)) > 9 or max(int(low), int(high or 0)) > REPETITION_MAX:
            self._fail(f"more than {REPETITION_MAX} repetitions")
        self._at = end + 1
        least = int(low)
        most = least if not comma else int(high) if high else None
        if most is not None and most < least:
            self._fail("the largest count is under the smallest")
        return least, most

    def _repeat(self, item: tuple[Symbol, ...], low: int, high: int | None) -> list[Symbol]:
        """Write a repetition as rules: ``x{1,3}`` is ``x a``, ``a ::= x b |``, ``b ::= x |``."""
        if len(item) > 1:
            number = self._new()
            self._define(number, [item])
            item = (number,)
        self._grow(low)
        symbols: list[Symbol] = list(item) * low
        if high is None:
            number = self._new()
            self._define(number, [(*item, number), ()])
            symbols.append(number)
        elif high > low:
            last: tuple[Symbol, ...] = ()
            for _ in range(high - low):
                number = self._new()
                self._define(number, [(*item, *last), ()])
                last = (number,)
            symbols += last
        return symbols

    # --- helpers ------------------------------------------------------------------------------------------------

    def _define(self, number: int, alternatives: list[tuple[Symbol, ...]]) -> None:
        self._grow(sum(len(a) + 1 for a in alternatives))
        self.rules[number] = alternatives

    def _grow(self, symbols: int) -> None:
        self._symbols += symbols
        if self._symbols > SYMBOLS_MAX:
            self._fail(f"the grammar has more than {SYMBOLS_MAX} symbols")

    def _new(self) -> int:
        self.count += 1
        return self.count - 1

    def _id(self, name: str) -> int:
        number = self.ids.get(name)
        if number is None:
            number = self.ids[name] = self._new()
        return number

    def _name(self) -> str:
        begin, text = self._at, self._text
        while self._at < len(text) and text[self._at].isascii() and (text[self._at].isalnum() or text[self._at] == "-"):
            self._at += 1
        if self._at == begin:
            self._fail("expected the name of a rule (a-z A-Z 0-9 -)")
        return text[begin : self._at]

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _space(self, *, newlines: bool) -> None:
        text = self._text
        while self._at < len(text):
            char = text[self._at]
            if char == "#":
                while self._at < len(text) and text[self._at] not in "\r\n":
                    self._at += 1
            elif char in " \t" or (newlines and char in "\r\n"):
                self._at += 1
            else:
                return

    def _fail(self, problem: str) -> NoReturn:
        before = self._text[: self._at]
        line, column = before.count("\n") + 1, self._at - (before.rfind("\n") + 1) + 1
        raise GrammarError(f"line {line}, column {column}: {problem}")


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return the same code points in order and without overlaps."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return tuple(found)


def complement(ranges: Ranges) -> Ranges:
    """Return all other code points."""
    found, at = [], 0
    for low, high in ranges:
        if low > at:
            found.append((at, low - 1))
        at = high + 1
    if at <= LAST_CODE_POINT:
        found.append((at, LAST_CODE_POINT))
    return tuple(found)


def _refuse_left_recursion(grammar: Grammar) -> None:
    """Raise GrammarError for a rule that can begin with itself: matching it would never end."""
    nullable = _nullable(grammar)
    begins: list[set[int]] = []
    for alternatives in grammar.rules:
        first: set[int] = set()
        for alternative in alternatives:
            for symbol in alternative:
                if not isinstance(symbol, int):
                    break
                first.add(symbol)
                if symbol not in nullable:
                    break
        begins.append(first)
    state = [0] * len(begins)  # 1: on the path, 2: done
    for start in range(len(begins)):
        path = [(start, iter(begins[start]))] if not state[start] else []
        state[start] = state[start] or 1
        while path:
            rule, rest = path[-1]
            following = next(rest, None)
            if following is None:
                state[rule] = 2
                path.pop()
            elif state[following] == 1:
                known = [grammar.names[r] for r, _ in path if grammar.names[r]]
                raise GrammarError(f"left recursion: rule {(known or ['root'])[-1]!r} can begin with itself")
            elif not state[following]:
                state[following] = 1
                path.append((following, iter(begins[following])))


def _nullable(grammar: Grammar) -> set[int]:
    """Rules that can be empty: found backwards from the empty alternatives, each symbol being looked at once."""
    users: dict[int, list[tuple[int, int]]] = {}  # rule -> (rule, alternative) that have it
    open_symbols: dict[tuple[int, int], int] = {}
    todo: list[int] = []
    nullable: set[int] = set()
    for rule, alternatives in enumerate(grammar.rules):
        for number, alternative in enumerate(alternatives):
            if all(isinstance(s, int) for s in alternative):
                open_symbols[rule, number] = len(alternative)
                for symbol in alternative:
                    users.setdefault(symbol, []).append((rule, number))  # type: ignore[arg-type]
                if not alternative and rule not in nullable:
                    nullable.add(rule)
                    todo.append(rule)
    while todo:
        for use in users.get(todo.pop(), ()):
            open_symbols[use] -= 1
            if open_symbols[use] == 0 and use[0] not in nullable:
                nullable.add(use[0])
                todo.append(use[0])
    return nullable
