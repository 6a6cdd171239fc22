"""From token bytes to text: no character is ever cut, no stop string ever shows, not even in part. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextAssembler:
    """Text of one generation, token by token.

    Bytes of an incomplete UTF-8 character are held until it is whole; text that may be the beginning of a stop string
    is held until that is decided. Invalid bytes become U+FFFD.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [s for s in stops if s]
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """Add a token's bytes; return the text that became certain. Sets ``stopped`` when a stop string is complete."""
        return self._advance(self._decoder.decode(piece))

    def flush(self) -> str:
        """Return what is still held: the generation ended without a stop string."""
        text = self._advance(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _advance(self, new: str) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return new
        text = self._held + new
        found = [at for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = self._longest_open_suffix(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _longest_open_suffix(self, text: str) -> int:
        """Length of the longest suffix of ``text`` that a stop string could still grow from."""
        for length in range(min(len(text), max(map(len, self._stops)) - 1), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stops):
                return length
        return 0
