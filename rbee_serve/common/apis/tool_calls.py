"""Tool calls in a model's text, found while the text arrives: names first, then the arguments piece by piece. Pure.

What looks like a call and turns out not to be one (broken JSON, a tool that was not offered) is given back as the text
that it is: nothing that the model wrote is lost.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rbee_serve.contract.tools import HERMES, LLAMA3, MISTRAL

_ALNUM = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call begins; calls of one answer count from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Found = Text | Call | Arguments


def parser_of(tool_format: object, names: Collection[str]) -> Parser:
    """Return the parser for the format that the worker named in ``started``, the generic one for any other.

    ``names``: the tools that were offered.
    """
    return Parser(str(tool_format) if tool_format in (LLAMA3, MISTRAL) else HERMES, names)


class _CallObject:
    """One ``{"name": ..., "arguments": {...}}``, character by character.

    ``feed`` returns the piece of the arguments that became certain. ``name`` is set once it is known, ``certain`` when it is a
    call (arguments have begun, or it has none), ``done`` at the closing brace, ``bad`` at a character that does not belong to it.
    Of members that come twice the first one counts: its arguments may have been told already.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.raw, self.name, self.done, self.bad = "", "", False, False
        self._names = names
        self._state = "open"
        self._key = self._value = ""
        self._depth = 0
        self._in_string = self._escaped = False
        self._early = ""  # arguments that came before the name
        self._has_arguments = False  # they have been met
        self._is_arguments = False  # the present value is theirs
        self._given = False

    def feed(self, c: str) -> str:
        self.raw += c
        if c == "<" and self._state != "key" and not self._in_string:  # no JSON has it there: a tag
            self.bad = True
            return ""
        step = getattr(self, f"_at_{self._state}")
        piece: str = step(c) or ""
        if self.bad or not self.name:
            self._early += piece
            return ""
        piece, self._early = self._early + piece, ""
        if self.done and not self._given and not piece:
            piece = "{}"
        self._given = self._given or bool(piece)
        return piece

    @property
    def certain(self) -> bool:
        """Whether this is a call of a tool that was offered, with arguments that are an object."""
        return bool(self.name) and (self._given or self.done)

    def _at_open(self, c: str) -> None:
        if c == "{":
            self._state = "next"
        elif not c.isspace():
            self.bad = True

    def _at_next(self, c: str) -> None:
        if c == '"':
            self._key, self._state = "", "key"
        elif c == "}":
            self.done, self.bad = True, not self.name
        elif not c.isspace() and c != ",":
            self.bad = True

    def _at_key(self, c: str) -> None:
        if c == '"':
            self._state = "colon"
        else:
            self._key += c

    def _at_colon(self, c: str) -> None:
        if c == ":":
            self._state = "begin"
        elif not c.isspace():
            self.bad = True

    def _at_begin(self, c: str) -> str:
        if c.isspace():
            return ""
        self._value, self._depth, self._in_string, self._escaped = "", 0, c == '"', False
        self._state = "value"
        self._is_arguments = self._key in ("arguments", "parameters") and not self._has_arguments
        if self._is_arguments:
            self._has_arguments = True
            self.bad = c not in '{"n'  # an object, one that is written as a string, or null: none
        if c in "{[":
            self._depth = 1
        self._value = c
        if c not in '{["':
            self._state = "scalar"
        return c if self._streams else ""

    @property
    def between(self) -> bool:
        """Whether a member is complete and the next one has not begun."""
        return self._state == "next"

    @property
    def _streams(self) -> bool:
        return self._is_arguments and self._value.startswith("{")

    def _at_value(self, c: str) -> str:
        self._value += c
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped, self._in_string = c == "\\", c != '"'
        elif c == '"':
            self._in_string = True
        elif c in "{[":
            self._depth += 1
        elif c in "}]":
            self._depth -= 1
        if self._depth == 0 and not self._in_string:
            return self._complete(c if self._streams else "")
        return c if self._streams else ""

    def _at_scalar(self, c: str) -> str:
        if c in ",}" or c.isspace():
            piece = self._complete("")
            self._at_next(c)
            return piece
        self._value += c
        return ""

    def _complete(self, piece: str) -> str:
        self._state = "next"
        if self._key in ("name", "function") and self._value.startswith('"') and not self.name:
            self.name = str(_loads(self._value) or "")
            self.bad = self.name not in self._names
        elif self._is_arguments and self._value.startswith('"'):
            # Some models write the object as a string.
            inner = _loads(self._value)
            if isinstance(inner, str) and isinstance(_loads(inner), dict):
                return inner
            self.bad = True
        elif self._is_arguments and not self._value.startswith("{"):
            self.bad = self._value != "null"
        return piece


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


class Parser:
    """The calls in one answer, in one format. Tags may be cut anywhere."""

    def __init__(self, tool_format: str, names: Collection[str]) -> None:
        self._format, self._names = tool_format, names
        self._opener = {HERMES: "<tool_call>", MISTRAL: "[TOOL_CALLS]", LLAMA3: "<|python_tag|>"}[tool_format]
        self._held = ""
        self._mode = "start"
        self._calls = 0
        self._object: _CallObject | None = None
        self._announced = False
        self._found: list[Found] = []
        self._tag = ""  # an opening tag that may yet turn out to be text
        self._bare = False  # the object has no brace of its own around it

    def push(self, text: str) -> list[Found]:
        """Return what became certain with ``text``."""
        self._held += text
        while self._step():
            pass
        found, self._found = self._found, []
        return found

    def close(self) -> list[Found]:
        """Return what was held: the answer has ended. A call that was cut short stays as far as it came."""
        if self._mode == "object" and self._object is not None:
            if not self._announced:
                self._say(self._tag + self._object.raw)
        elif self._mode in ("start", "text", "name") or (self._mode == "between" and self._tag):
            self._say(self._tag + self._held)
        found, self._found, self._held, self._mode = self._found, [], "", "plain"
        return found

    def _say(self, text: str) -> None:
        if text:
            self._found.append(Text(text))

    def _step(self) -> bool:
        """Do one thing with what is held; False when more text is needed."""
        return bool(self._held) and bool(getattr(self, f"_in_{self._mode}")())

    def _in_plain(self) -> bool:
        self._say(self._held)
        self._held = ""
        return False

    def _in_start(self) -> bool:
        """The answer's first characters: a call without a tag, where the tag is a token that shows no text."""
        rest = self._held.lstrip()
        bare = {LLAMA3: "{", MISTRAL: "["}.get(self._format, "")
        if not rest:
            return False
        if self._opener.startswith(rest) and len(rest) < len(self._opener):
            return False
        if bare and rest.startswith(bare):
            if bare == "[":
                if len(rest.rstrip()) < 2:
                    return False
                if rest[1:].lstrip()[0] != "{":
                    self._mode = "text"
                    return True
                rest = rest[1:]
            self._tag = self._before(rest)
            self._begin(rest)
            return True
        if self._format == LLAMA3 and not rest.startswith(self._opener):
            self._mode = "plain"
            return True
        self._mode = "text"
        return True

    def _in_text(self) -> bool:
        at = self._held.find(self._opener)
        if at >= 0:
            said = self._held[:at].rstrip()
            self._say(said)
            end = at + len(self._opener)
            self._held, self._tag = self._held[end:], self._held[len(said) : end]
            self._mode = "name" if self._format == MISTRAL else "between"
            return True
        # Held back: what may be the beginning of the tag, and blanks, which are dropped where a tag follows.
        keep = next((n for n in range(len(self._opener) - 1, 0, -1) if self._held.endswith(self._opener[:n])), 0)
        certain = self._held[: len(self._held) - keep].rstrip()
        self._say(certain)
        self._held = self._held[len(certain) :]
        return False

    def _in_name(self) -> bool:
        """Mistral: a list of calls, or ``name[ARGS]{...}``."""
        rest = self._held.lstrip()
        if not rest:
            return False
        if rest[0] in "[{":
            calls = rest.removeprefix("[")
            self._tag += self._before(calls)
            self._held, self._mode = calls, "between"
            return True
        at = rest.find("{")
        if at < 0:
            return False
        name = rest[:at].partition("[ARGS]")[0].partition("[CALL_ID]")[0].strip()
        if name not in self._names:
            self._mode = "text"
            self._say(self._tag + self._held[: self._held.find("{")])
            self._held, self._tag = self._held[self._held.find("{") :], ""
            return True
        self._begin('{"name": ' + json.dumps(name) + ', "arguments": ' + rest[at:])
        self._bare = True
        return True

    def _in_between(self) -> bool:
        """Behind a tag, or behind a call: another one, the end of them, or text."""
        rest = self._held.lstrip(" \t\r\n,;")
        if not rest:
            return False
        if rest[0] == "{":
            self._tag += self._before(rest)
            self._begin(rest)
            return True
        closer = "</tool_call>" if self._format == HERMES else "]" if self._format == MISTRAL else self._opener
        if closer.startswith(rest) and len(rest) < len(closer):
            return False
        if rest.startswith(closer):
            self._held = rest[len(closer) :]
            self._mode = "between" if self._format == LLAMA3 else "after"
            self._tag = ""
            return True
        self._say(self._tag)
        self._tag = ""
        self._mode = "text" if self._format != LLAMA3 else "plain"
        return True

    def _in_after(self) -> bool:
        """Behind a closing tag: blanks are dropped."""
        self._held = self._held.lstrip()
        if self._held:
            self._mode = "text"
        return bool(self._held)

    def _before(self, rest: str) -> str:
        """Return what stands before the rest of what is held: text, should no call follow."""
        return self._held[: len(self._held) - len(rest)]

    def _begin(self, rest: str) -> None:
        self._object, self._announced = _CallObject(self._names), False
        self._bare = False
        self._held, self._mode = rest, "object"

    def _in_object(self) -> bool:
        call = self._object
        assert call is not None  # noqa: S101 -- _begin came first
        pieces = ""
        for position, c in enumerate(self._held):
            pieces += call.feed(c)
            if call.bad:
                self._give_back(call, pieces, self._held[position:])
                return True
            # `name[ARGS]{...}` has no brace of its own around it: the arguments end the call.
            ends = call.done or (self._bare and call.name and call.between and pieces)
            if call.certain and not self._announced:
                self._announced, self._tag = True, ""
                self._found.append(Call(self._calls, self._new_id(), call.name))
            if ends:
                if pieces:
                    self._found.append(Arguments(self._calls, pieces))
                self._calls += 1
                self._held = self._held[position + 1 :]
                self._mode = "text" if self._bare else "between"
                return True
        if pieces:
            self._found.append(Arguments(self._calls, pieces))
        self._held = ""
        return False

    def _give_back(self, call: _CallObject, pieces: str, rest: str) -> None:
        """Go on with the rest: its first character does not belong to the call. It may begin a tag."""
        self._held = rest
        if self._announced:  # a brace is missing at the end
            if pieces:
                self._found.append(Arguments(self._calls, pieces))
            self._calls += 1
            self._mode = "text" if self._bare else "between"
            return
        self._say(self._tag + call.raw[:-1])
        self._tag = ""
        self._mode = "plain" if self._format == LLAMA3 else "text"

    def _new_id(self) -> str:
        # Mistral's templates insist on nine letters and digits when the call comes back as history.
        if self._format == MISTRAL:
            return "".join(secrets.choice(_ALNUM) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"
