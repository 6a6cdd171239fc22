"""Prompts of an exact number of tokens: each of these words, with its space, is one token of the demonstration model."""

from __future__ import annotations

import random

_TEXT = """
the of and to in is that for it as with was on be at by this have from or had not are but what all were when we there
can an your which their said if do will each about how up out them then she many some so these would other into has more
her two like him see time could no make than first been its who now people my made over did down only way find use may
water long little very after words called just where most know
"""
WORDS = _TEXT.split()


class Prompts:
    """A seeded source: no two prompts share more than a few words."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 -- text for a benchmark

    def text(self, tokens: int) -> str:
        """Return ``tokens`` random words."""
        return " ".join(self._random.choices(WORDS, k=tokens))
