"""Text that a grammar allows, character by character, as tokens come. Pure; bounded in time and memory.

The state is the set of all places in the grammar where the text so far may be, each place being a stack of what is still
to come. Equal stacks are one number, equal sets are one state, and each step from state to state is worked out once:
a token costs a dictionary look-up a character.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from rbee_serve.contract.errors import InvalidRequest
from rbee_serve.worker.engine.gbnf import LAST_CODE_POINT, Grammar, Ranges

#: Places where a text may be at once. JSON has about ten; over this a grammar is too ambiguous to be of use.
STACKS_MAX = 2000
#: Places looked at for one character, for all tokens that may follow (0.2 s), and for everything that one text or
#: several need (2 s): the engine's one thread does it, between two steps of everybody's streams.
_WORK_CHAR, _WORK_MASK, _WORK_TOTAL = 4 * STACKS_MAX, 150_000, 2_000_000
#: An automaton that has needed this much is not used for further texts: they begin with an empty one.
_WORK_SHARED = 500_000
_MASKS_MAX = 64
#: Memory for each place looked at, about.
_WORK_BYTES = 50
_DEAD = -1


def too_ambiguous() -> InvalidRequest:
    """The error of a stream whose grammar can be read in too many ways."""
    return InvalidRequest(
        f"grammar: it is too ambiguous or too large: more than {STACKS_MAX} ways to read a text, or as much work",
        hint="give each alternative a beginning of its own",
        field="grammar",
    )


class Vocabulary:
    """The tokens of a model as a tree of characters, for finding all that may follow. Grows in parts: see `grow`."""

    def __init__(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """``pieces``: (id, bytes) of all tokens that have bytes and do not end a generation; read as it grows."""
        self.whole = False
        self.partial: list[tuple[int, bytes]] = []  # not whole characters
        # The tree, written down in the order of a walk: ``end`` is where the walk goes on when a branch is dead.
        self.chars: list[str] = []
        self.depth: list[int] = []
        self.end: list[int] = []
        self.tokens: list[list[int] | None] = []
        self._building = self._build(pieces)

    def grow(self, steps: int | None) -> None:
        """Do so many steps, two for each token; None: all that are left."""
        for _ in itertools.islice(self._building, steps):
            pass

    def _build(self, pieces: Iterable[tuple[int, bytes]]) -> Iterator[None]:
        words: dict[str, dict[str, list[int]]] = {}  # by first character: so no sorting takes long
        for token, piece in pieces:
            try:
                word = piece.decode()
                words.setdefault(word[0], {}).setdefault(word, []).append(token)
            except UnicodeDecodeError:
                self.partial.append((token, piece))
            yield
        path: list[int] = []
        before = ""
        for first in sorted(words):
            for word, ids in sorted(words[first].items()):
                common = 0
                for a, b in zip(word, before, strict=False):
                    if a != b:
                        break
                    common += 1
                for node in path[common:]:
                    self.end[node] = len(self.chars)
                del path[common:]
                for depth in range(common, len(word)):
                    path.append(len(self.chars))
                    self.chars.append(word[depth])
                    self.depth.append(depth)
                    self.end.append(0)
                    self.tokens.append(None)
                self.tokens[path[-1]] = ids
                before = word
                yield
        for node in path:
            self.end[node] = len(self.chars)
        self.whole = True


class Automaton:
    """A grammar's states. State 0 is the beginning of the text; may be shared by many matchers."""

    def __init__(self, grammar: Grammar) -> None:
        self._symbols: list[int | Ranges | None] = []  # all alternatives one after the other, each ended by None
        self._starts: list[list[int]] = []
        bounds: set[int] = set()
        for alternatives in grammar.rules:
            starts = []
            for alternative in alternatives:
                starts.append(len(self._symbols))
                self._symbols += [*alternative, None]
                for symbol in alternative:
                    if not isinstance(symbol, int):
                        for low, high in symbol:
                            bounds |= {low, high + 1}
            self._starts.append(starts)
        self._root = grammar.root
        self._bounds = sorted(bounds)  # code points between two of them are the same to every rule
        self._class: dict[str, int] = {}
        self.work = 0
        self._stacks: list[tuple[int, int]] = [(0, 0)]  # (place, what comes after it); 0: nothing comes
        self._stack_ids: dict[tuple[int, int], int] = {}
        self._members: list[tuple[int, ...]] = []
        self._ends: list[bool] = []
        self._state_ids: dict[tuple[tuple[int, ...], bool], int] = {}
        self._steps: list[dict[int, int]] = []
        self.masks: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._close([(start, 0) for start in self._starts[self._root]])

    @property
    def worn(self) -> bool:
        """Whether a new text had better begin with an automaton of its own."""
        return self.work > _WORK_SHARED

    @property
    def size(self) -> int:
        """About how many bytes it takes: what was worked out, and the tokens allowed in its states."""
        return self.work * _WORK_BYTES + sum(mask.nbytes for mask in self.masks.values())

    def step(self, state: int, char: str) -> int:
        """Return the state after one more character, negative when the grammar has no such text."""
        kind = self._class.get(char)
        if kind is None:
            kind = self._class[char] = bisect_right(self._bounds, ord(char))
        following = self._steps[state].get(kind)
        if following is None:
            following = self._steps[state][kind] = self._follow(state, ord(char))
        return following

    def may_end(self, state: int) -> bool:
        """Whether the text so far is complete."""
        return self._ends[state]

    def must_end(self, state: int) -> bool:
        """Whether nothing can follow."""
        return not self._members[state]

    def accepts_within(self, state: int, low: int, high: int) -> bool:
        """Whether some character from ``low`` to ``high`` may follow."""
        for stack in self._members[state]:
            symbol = self._symbols[self._stacks[stack][0]]
            if isinstance(symbol, tuple) and any(a <= high and b >= low for a, b in symbol):
                return True
        return False

    def allowed(self, state: int, vocabulary: Vocabulary) -> list[int]:
        """Return the tokens of whole characters that may follow; raises InvalidRequest when that takes too long."""
        found: list[int] = []
        chars, depth, end, tokens = vocabulary.chars, vocabulary.depth, vocabulary.end, vocabulary.tokens
        states = [state] + [0] * (max(depth, default=0) + 1)
        at, limit = 0, self.work + _WORK_MASK
        while at < len(chars):
            following = self.step(states[depth[at]], chars[at])
            if following < 0:
                at = end[at]
                continue
            if self.work > limit:
                raise too_ambiguous()
            states[depth[at] + 1] = following
            if (ids := tokens[at]) is not None:
                found += ids
            at += 1
        return found

    def _follow(self, state: int, code: int) -> int:
        places = []
        for stack in self._members[state]:
            place, after = self._stacks[stack]
            ranges = self._symbols[place]
            if isinstance(ranges, tuple) and any(low <= code <= high for low, high in ranges):
                places.append((place + 1, after))
        self.work += len(self._members[state])
        return self._close(places) if places else _DEAD

    def _close(self, places: list[tuple[int, int]]) -> int:
        """Return the state of all places where a character is expected that are reached from ``places``."""
        members: set[int] = set()
        ends, seen = False, set(places)
        while places:
            place, after = places.pop()
            symbol = self._symbols[place]
            if symbol is None:
                reached = [self._stacks[after]] if after else []
                ends = ends or not after
            elif isinstance(symbol, int):
                # What ends with another rule leaves nothing behind: else a list would grow with each item.
                rest = after if self._symbols[place + 1] is None else self._stack(place + 1, after)
                reached = [(start, rest) for start in self._starts[symbol]]
            else:
                members.add(self._stack(place, after))
                continue
            for new in reached:
                if new not in seen:
                    seen.add(new)
                    places.append(new)
            if len(seen) > _WORK_CHAR:
                raise too_ambiguous()
        self.work += len(seen)
        if len(members) > STACKS_MAX or self.work > _WORK_TOTAL:
            raise too_ambiguous()
        key = tuple(sorted(members)), ends
        state = self._state_ids.get(key)
        if state is None:
            state = self._state_ids[key] = len(self._members)
            self._members.append(key[0])
            self._ends.append(ends)
            self._steps.append({})
        return state

    def _stack(self, place: int, after: int) -> int:
        key = place, after
        number = self._stack_ids.get(key)
        if number is None:
            number = self._stack_ids[key] = len(self._stacks)
            self._stacks.append(key)
        return number


class Matcher:
    """One text that must follow a grammar."""

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self._state = 0
        self._open = b""  # bytes of a character that is not whole yet

    @property
    def may_end(self) -> bool:
        """Whether the text so far is complete."""
        return not self._open and self._automaton.may_end(self._state)

    @property
    def must_end(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        return self.may_end and self._automaton.must_end(self._state)

    def allows(self, piece: bytes) -> bool:
        """Whether a token's bytes may follow. Raises InvalidRequest when the grammar is too ambiguous."""
        return self._after(piece) is not None

    def accept(self, piece: bytes) -> None:
        """Go on by a token's bytes; ValueError when they may not follow."""
        after = self._after(piece)
        if after is None:
            raise ValueError("the grammar does not allow this token here")
        self._state, self._open = after

    def allowed(self, vocabulary: Vocabulary) -> NDArray[np.int64]:
        """Return the ids of all tokens that may follow, but for those that end the text."""
        automaton, key = self._automaton, self._state
        whole = automaton.masks.get(key) if not self._open else None
        if whole is None:
            vocabulary.grow(None)
            found = [] if self._open else automaton.allowed(self._state, vocabulary)
            found += [token for token, piece in vocabulary.partial if self._after(piece) is not None]
            whole = np.array(sorted(found), np.int64)
            if not self._open:
                automaton.masks[key] = whole
                while len(automaton.masks) > _MASKS_MAX:
                    automaton.masks.popitem(last=False)
        return whole

    def _after(self, piece: bytes) -> tuple[int, bytes] | None:
        data = self._open + piece
        if not piece:
            return None
        try:
            text, rest = data.decode(), b""
        except UnicodeDecodeError as e:
            if e.reason != "unexpected end of data":
                return None
            text, rest = data[: e.start].decode(), data[e.start :]
        state = self._state
        for char in text:
            state = self._automaton.step(state, char)
            if state < 0:
                return None
        if rest and not self._automaton.accepts_within(state, *_completions(rest)):
            return None
        return state, rest


def _completions(begun: bytes) -> tuple[int, int]:
    """Return the smallest and largest character that begins with these bytes, which UTF-8 allows to be one's beginning."""
    lead = begun[0]
    size = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    low, high = bytearray(begun), bytearray(begun)
    while len(low) < size:
        second = len(low) == 1
        low.append({0xE0: 0xA0, 0xF0: 0x90}.get(lead, 0x80) if second else 0x80)
        high.append({0xED: 0x9F, 0xF4: 0x8F}.get(lead, 0xBF) if second else 0xBF)
    return ord(low.decode()), min(ord(high.decode()), LAST_CODE_POINT)
