"""Prompt look-up: what a text may go on with, read from itself, and how many such guesses pay in a call. Pure.

Source: A. Saxena, "Prompt Lookup Decoding" (2023). New here: each token drawn says whether the guess at it was right, evaluated
or not, so a text that does not repeat itself is never charged for guesses. All of it depends on the texts alone and not on
the clock: the same request has the same calls made for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Tokens of the past that are looked through; up to twice as many are remembered.
_WINDOW = 4096
#: Room for a token's id in a key that stands for several.
_BITS = 21
_PAIR = (1 << 2 * _BITS) - 1
#: What the latest outcome counts in the chance of the next: three right ones in a row, and guesses begin.
_WEIGHT = 0.25
#: What must be gained, as a part, for guessing at all, and how much longer that may make the pauses of several streams.
_LEAST_GAIN, _LONGEST = 1.05, 1.7
#: What a call of 1, 2, 3 ... 16 rows takes, in calls of one row. Measured on two Zen 5 cores with Q4_0 (mean of 135 M and 1.17 B
#: parameters), Q8_0 and Q4_K (1.17 B): llama.cpp's kernels take rows by fours or eights, and the rest row by row.
_Q4_0 = (1.0, 1.7, 2.3, 1.9, 2.65, 3.2, 3.8, 2.85, 3.7, 4.35, 4.9, 4.0, 4.65, 5.25, 5.8, 4.0)
_Q8_0 = (1.0, 2.6, 3.1, 3.6, 4.9, 5.4, 5.8, 3.8, 5.0, 5.5, 5.8, 5.1, 6.4, 6.8, 7.5, 6.0)
_OTHERS = (1.0, 1.7, 2.2, 2.6, 3.3, 3.9, 4.5, 4.5, 5.1, 5.5, 6.0, 5.7, 6.3, 6.7, 7.2, 5.6)


def row_costs(backend: str, matrix_types: frozenset[int] | set[int]) -> tuple[float, ...]:
    """Return what calls of 1, 2, 3 ... rows take; ``matrix_types``: the weights' (enum ggml_type).

    Weights that nobody measured, and GPUs: as Q4_K, more than most take where memory is slower than computing.
    """
    if backend != "cpu":
        return _OTHERS
    return _Q4_0 if 2 in matrix_types else _Q8_0 if matrix_types == {8} else _OTHERS


class LookUp:
    """What followed where the latest tokens of one text stood before."""

    def __init__(self, ids: Sequence[int] | NDArray[np.int32]) -> None:
        """``ids``: the text so far, prompt and all."""
        self.chance = 0.0  # that the next guess is right, by how the last ones were
        self._begin(ids)

    def _begin(self, ids: Sequence[int] | NDArray[np.int32]) -> None:
        known = np.asarray(ids[-_WINDOW:], np.int64)
        self._tokens: list[int] = known.tolist()
        after = range(2, len(known))
        # What follows a pair or three tokens is at these places; of equal ones the last counts. The latest tokens of all are no
        # place yet: nothing follows them.
        pairs = (known[:-1] << _BITS) + known[1:]
        threes = (known[:-2] << 2 * _BITS) + pairs[1:]
        self._pairs: dict[int, int] = dict(zip(pairs[:-1].tolist(), after, strict=True))
        self._threes: dict[int, int] = dict(zip(threes[:-1].tolist(), after[1:], strict=True))
        self._pair: int | None = int(pairs[-1]) if len(pairs) else None  # the latest
        self._three: int | None = int(threes[-1]) if len(threes) else None
        self._next: int | None = self._find()

    def _find(self) -> int | None:
        return self._threes.get(self._three) or self._pairs.get(self._pair)  # type: ignore[arg-type]  # None is not among them

    def add(self, token: int) -> None:
        """Go on by a token."""
        tokens, at = self._tokens, self._next
        here, right = len(tokens), False
        if at is not None:
            right = tokens[at] == token
            self.chance += _WEIGHT * (right - self.chance)
        tokens.append(token)
        if here >= 2 * _WINDOW or self._three is None or self._pair is None:
            self._begin(tokens)
            return
        self._threes[self._three] = self._pairs[self._pair] = here
        self._three = (self._pair << _BITS) + token
        self._pair = self._three & _PAIR
        self._next = at + 1 if at is not None and right else self._find()

    def guesses(self, count: int) -> list[int]:
        """Return up to ``count`` tokens that may follow; a text that repeats its latest ones goes on doing so."""
        at = self._next
        if at is None:
            return []
        known = self._tokens[at : at + count]
        return (known * count)[:count]

    def expected(self, rows: int) -> float:
        """Return how many tokens a call brings whose first row is certain and whose others are guesses."""
        if self._next is None or rows == 1:
            return 1.0
        p = self.chance
        return (1 - p**rows) / (1 - p) if p < 1 else float(rows)


def rows_each(texts: Sequence[LookUp], most: int, costs: Sequence[float]) -> int:
    """Return how many rows each stream gets in the next call: one for its next token and the others for guesses.

    ``most``: of one stream; ``costs``: of a call of 1, 2, 3 ... rows. All get as many: llama.cpp makes a call of its own for
    those with more.
    """
    streams, best = len(texts), 1
    most = min(most, len(costs) // streams)
    if most < 2 or not any(text.chance for text in texts):
        return 1
    usual = costs[streams - 1]
    pace = _LEAST_GAIN * streams / usual
    for rows in range(2, most + 1):
        cost = costs[streams * rows - 1]
        gained = sum(text.expected(rows) for text in texts) / cost
        if gained > pace and (streams == 1 or cost <= _LONGEST * usual):
            best, pace = rows, gained
    return best
