"""Text that a grammar allows, character by character, as tokens come. Pure; bounded in time and memory.

The state is the set of all places in the grammar where the text so far may be, each place being a stack of what is still
to come. Equal stacks are one number, equal sets are one state, and each step from state to state is worked out once:
a token costs a dictionary look-up a character.

What is worked out is shared by all texts of a grammar and forgotten when it is too much; each text pays for what it makes
necessary, by the character: however long it is and whoever else writes by the same grammar, one that is not ambiguous
goes on.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from rbee_serve.contract.errors import InvalidRequest
from rbee_serve.worker.engine.gbnf import LAST_CODE_POINT, Grammar, Ranges

#: Places where a text may be at once. JSON has about ten; over this a grammar is too ambiguous to be of use.
STACKS_MAX = 2000
#: Places looked at for one character, and for one token or all that may follow (50 ms): the engine's one thread does it,
#: between two steps of everybody's streams.
_WORK_CHAR, _WORK_TOKEN = 4 * STACKS_MAX, 100_000
#: Places that a text may have looked at before its first byte and at most (0.2 s), and that each byte adds (0.9 ms): an
#: object with 1500 properties that may all be left out needs 900.
_CREDIT, _CREDIT_CHAR = 500_000, 2000
#: Places looked at since an automaton was last emptied before that is done again (20 ms).
_WORK_HELD = 200_000
_MASKS_MAX = 64
#: Memory for each place looked at, about.
_WORK_BYTES = 60
_DEAD = -1
#: Entries of a table over all steps of a level; a larger one would take longer than sorting.
_TABLE_MAX = 1 << 20


def too_ambiguous() -> InvalidRequest:
    """The error of a stream whose grammar can be read in too many ways."""
    return InvalidRequest(
        f"grammar: it is too ambiguous or too large: more than {STACKS_MAX} ways to read a text, or as much work",
        hint="give each alternative a beginning of its own",
        field="grammar",
    )


@dataclass(frozen=True)
class Level:
    """All beginnings of tokens of one length: the last character of each (a number of a letter) and what is before it."""

    parents: NDArray[np.int32]  # where in the level before
    letters: NDArray[np.int32]
    tokens: NDArray[np.int32]  # those that end here
    nodes: NDArray[np.int32]  # and at which beginning


def _common(a: str, b: str) -> int:
    """Return how many characters both begin with."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


class Vocabulary:
    """The tokens of a model as a tree of characters, for finding all that may follow. Grows in parts: see `grow`."""

    def __init__(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """``pieces``: (id, bytes) of all tokens that have bytes and do not end a generation; read as it grows."""
        self.whole = False
        self.partial: list[tuple[int, bytes]] = []  # not whole characters
        #: The tree by depth, for following all branches at once; ``letters``: the code points that occur in it.
        self.levels: list[Level] = []
        self.letters = np.zeros(0, np.int64)
        self._building = self._build(pieces)

    def grow(self, steps: int | None) -> None:
        """Do so many steps, two for each token; None: all that are left."""
        for _ in itertools.islice(self._building, steps):
            pass

    def _build(self, pieces: Iterable[tuple[int, bytes]]) -> Iterator[None]:
        words: dict[str, dict[str, list[int]]] = {}  # by their beginning: so no sorting takes long
        for token, piece in pieces:
            try:
                word = piece.decode()
                words.setdefault(word[:2], {}).setdefault(word, []).append(token)
            except UnicodeDecodeError:
                self.partial.append((token, piece))
            yield
        # Sorted words have their common beginnings together: a node is made where a word leaves the one before it.
        # What a level consists of is kept as numbers from the beginning: nothing is left to do that takes long.
        nodes: list[tuple[array[int], array[int], array[int], array[int]]] = []
        letters: dict[str, int] = {}
        path: list[int] = []
        before = ""
        for beginning in sorted(words):
            for word in sorted(words[beginning]):
                ids = words[beginning][word]
                common = _common(word, before)
                del path[common:]
                for depth in range(common, len(word)):
                    if depth == len(nodes):
                        nodes.append((array("i"), array("i"), array("i"), array("i")))
                    path.append(len(nodes[depth][0]))
                    nodes[depth][0].append(path[depth - 1] if depth else 0)
                    nodes[depth][1].append(letters.setdefault(word[depth], len(letters)))
                nodes[len(word) - 1][2].extend(ids)
                nodes[len(word) - 1][3].extend([path[-1]] * len(ids))
                before = word
                yield
        self.letters = np.array([ord(char) for char in letters], np.int64)
        for level in nodes:
            self.levels.append(Level(*(np.array(part, np.int32) for part in level)))
            yield
        self.whole = True


@dataclass(frozen=True, slots=True)
class Exits:
    """Where the places of a state lead: by the one character that each takes, and by the characters where it takes several."""

    single: dict[int, list[tuple[int, int]]]
    wide: dict[Ranges, list[tuple[int, int]]]


def _different(values: NDArray[np.int64], end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the different ones of ``values`` (from 0 to ``end``), sorted, and for each value which of them it is."""
    if end > _TABLE_MAX:
        different, which = np.unique(values, return_inverse=True)
        return different, which
    table = np.zeros(end, np.int64)
    table[values] = 1
    different = np.flatnonzero(table)
    table[different] = np.arange(len(different))
    return different, table[values]


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
        self._bounds = sorted(bounds)  # code points between two of them are one class: the same to every rule
        self._letters: tuple[Vocabulary, NDArray[np.int64]] | None = None
        self._matchers: WeakSet[Matcher] = WeakSet()
        #: Places looked at, and how many may be.
        self.work, self.limit = 0, _WORK_TOKEN
        self._clear()

    def _clear(self) -> None:
        """Begin with nothing worked out but state 0."""
        self._class: dict[str, int] = {}
        self._stacks: list[tuple[int, int]] = [(0, 0)]  # (place, what comes after it); 0: nothing comes
        self._stack_ids: dict[tuple[int, int], int] = {}
        self._members: list[tuple[int, ...]] = []
        self._ends: list[bool] = []
        self._state_ids: dict[tuple[tuple[int, ...], bool], int] = {}
        self._steps: list[dict[int, int]] = []
        self._exits: list[Exits | None] = []
        self.masks: OrderedDict[int, NDArray[np.int32]] = OrderedDict()
        self._held_from = self.work
        self._close([(start, 0) for start in self._starts[self._root]])

    @property
    def size(self) -> int:
        """About how many bytes it takes: what was worked out, and the tokens allowed in its states."""
        return (self.work - self._held_from) * _WORK_BYTES + sum(mask.nbytes for mask in self.masks.values())

    def add(self, matcher: Matcher) -> None:
        """Note who has a state of this automaton."""
        self._matchers.add(matcher)

    def make_room(self) -> None:
        """Forget what was worked out, when it is too much, but for the states where texts are. Numbers of states change."""
        if self.work - self._held_from <= _WORK_HELD:
            return
        stacks, members, ends = self._stacks, self._members, self._ends
        self.limit = self.work + _WORK_TOKEN
        self._clear()
        moved = {0: 0}
        for matcher in self._matchers:
            kept = []
            for stack in members[matcher.state]:
                path = []
                while stack not in moved:
                    path.append(stack)
                    stack = stacks[stack][1]
                for number in reversed(path):
                    place, after = stacks[number]
                    moved[number] = self._stack(place, moved[after])
                kept.append(moved[path[0] if path else stack])
            matcher.state = self._state(kept, ends=ends[matcher.state])

    def step(self, state: int, char: str) -> int:
        """Return the state after one more character, negative when the grammar has no such text."""
        kind = self._class.get(char)
        if kind is None:
            kind = self._class[char] = bisect_right(self._bounds, ord(char))
        following = self._steps[state].get(kind)
        if following is None:
            following = self._steps[state][kind] = self._follow(state, kind)
        return following

    def may_end(self, state: int) -> bool:
        """Whether the text so far is complete."""
        return self._ends[state]

    def must_end(self, state: int) -> bool:
        """Whether nothing can follow."""
        return not self._members[state]

    def accepts_within(self, state: int, low: int, high: int) -> bool:
        """Whether some character from ``low`` to ``high`` may follow."""
        exits = self._exits_of(state)
        return any(low <= code <= high for code in exits.single) or any(
            a <= high and b >= low for ranges in exits.wide for a, b in ranges
        )

    def allowed(self, state: int, vocabulary: Vocabulary) -> list[NDArray[np.int32]]:
        """Return the tokens of whole characters that may follow; raises InvalidRequest when that takes too long."""
        if self._letters is None or self._letters[0] is not vocabulary:
            self._letters = vocabulary, np.searchsorted(self._bounds, vocabulary.letters, side="right")
        classes, count = self._letters[1], len(self._bounds) + 1
        found: list[NDArray[np.int32]] = []
        states = [state]
        reached = np.zeros(1, np.int64)  # for each beginning of a level: which of ``states``, or dead
        for level in vocabulary.levels:
            before = reached[level.parents]
            alive = np.flatnonzero(before >= 0)
            if not len(alive):
                break
            steps = before[alive] * count + classes[level.letters[alive]]
            # Each step that occurs is looked up once, whatever the number of beginnings that take it.
            different, which = _different(steps, len(states) * count)
            states, following = self._follow_all(states, different, count)
            reached = np.full(len(level.parents), _DEAD, np.int64)
            reached[alive] = following[which]
            found.append(level.tokens[reached[level.nodes] >= 0])
        return found

    def _follow_all(self, states: list[int], steps: NDArray[np.int64], count: int) -> tuple[list[int], NDArray[np.int64]]:
        """Return the states that ``steps`` (index of a state, class) lead to, and for each step which of them."""
        numbers: dict[int, int] = {_DEAD: _DEAD}
        following = []
        for step in steps.tolist():
            index, kind = divmod(step, count)
            state = self._steps[states[index]].get(kind)
            if state is None:
                state = self._steps[states[index]][kind] = self._follow(states[index], kind)
            following.append(numbers.setdefault(state, len(numbers) - 1))
        return list(numbers)[1:], np.array(following, np.int64)

    def _follow(self, state: int, kind: int) -> int:
        exits = self._exits_of(state)
        code = self._bounds[kind - 1] if kind else 0
        places = list(exits.single.get(code, ()))
        for ranges, reached in exits.wide.items():
            if any(low <= code <= high for low, high in ranges):
                places += reached
        self._spend(len(exits.wide) + 1)
        return self._close(places) if places else _DEAD

    def _exits_of(self, state: int) -> Exits:
        exits = self._exits[state]
        if exits is None:
            exits = self._exits[state] = Exits({}, {})
            for stack in self._members[state]:
                place, after = self._stacks[stack]
                ranges = self._symbols[place]
                if not isinstance(ranges, tuple):
                    continue
                if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
                    exits.single.setdefault(ranges[0][0], []).append((place + 1, after))
                else:
                    exits.wide.setdefault(ranges, []).append((place + 1, after))
            self._spend(len(self._members[state]))
        return exits

    def _spend(self, places: int) -> None:
        self.work += places
        if self.work > self.limit:
            raise too_ambiguous()

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
        self._spend(len(seen))
        if len(members) > STACKS_MAX:
            raise too_ambiguous()
        return self._state(members, ends=ends)

    def _state(self, members: Iterable[int], *, ends: bool) -> int:
        key = tuple(sorted(members)), ends
        state = self._state_ids.get(key)
        if state is None:
            state = self._state_ids[key] = len(self._members)
            self._members.append(key[0])
            self._ends.append(ends)
            self._steps.append({})
            self._exits.append(None)
        return state

    def _stack(self, place: int, after: int) -> int:
        key = place, after
        number = self._stack_ids.get(key)
        if number is None:
            number = self._stack_ids[key] = len(self._stacks)
            self._stacks.append(key)
        return number


class Matcher:
    """One text that must follow a grammar. Its methods but ``may_end`` raise InvalidRequest when that is too ambiguous."""

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        #: Of the automaton, which changes it when it makes room.
        self.state = 0
        self._open = b""  # bytes of a character that is not whole yet
        self._credit = _CREDIT
        automaton.add(self)

    @property
    def may_end(self) -> bool:
        """Whether the text so far is complete."""
        return not self._open and self._automaton.may_end(self.state)

    @property
    def must_end(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        return self.may_end and self._automaton.must_end(self.state)

    def allows(self, piece: bytes) -> bool:
        """Whether a token's bytes may follow."""
        with self._paying():
            return self._after(piece) is not None

    def accept(self, piece: bytes) -> None:
        """Go on by a token's bytes; ValueError when they may not follow."""
        with self._paying():
            after = self._after(piece)
        if after is None:
            raise ValueError("the grammar does not allow this token here")
        self.state, self._open = after
        self._credit = min(self._credit + _CREDIT_CHAR * len(piece), _CREDIT)

    def allowed(self, vocabulary: Vocabulary) -> NDArray[np.int32]:
        """Return the ids of all tokens that may follow, but for those that end the text."""
        vocabulary.grow(None)
        with self._paying():
            automaton, state = self._automaton, self.state
            if not self._open and (known := automaton.masks.get(state)) is not None:
                return known
            found = [] if self._open else automaton.allowed(state, vocabulary)
            in_parts = [token for token, piece in vocabulary.partial if self._after(piece) is not None]
            whole = np.sort(np.concatenate([*found, np.array(in_parts, np.int32)]))
            if not self._open:
                automaton.masks[state] = whole
                while len(automaton.masks) > _MASKS_MAX:
                    automaton.masks.popitem(last=False)
            return whole

    @contextmanager
    def _paying(self) -> Iterator[None]:
        """Let the automaton do as much as one token may need and this text has left, and note what it has done."""
        automaton = self._automaton
        automaton.make_room()
        before = automaton.work
        automaton.limit = before + min(_WORK_TOKEN, self._credit)
        try:
            yield
        finally:
            self._credit -= automaton.work - before

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
        state = self.state
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
