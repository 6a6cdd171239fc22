"""From token bytes to text: no character is ever cut, no stop string ever shows, not even in part. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextAssembler:
    """Text of one generation, token by token.

    Bytes of an incomplete UTF-8 character are held until it is whole; text that may be the beginning of a stop string
    is held until that is decided. Invalid bytes become U+FFFD. What comes out, put together, does not depend on how
    the bytes were cut into tokens.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._whole = True  # no character is open
        self._stops = [s for s in stops if s]
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come; ``stopped_by`` is the one."""
        return self.stopped_by is not None

    def push(self, piece: bytes) -> str:
        """Add a token's bytes; return the text that became certain. Sets ``stopped_by`` when a stop string is complete."""
        if self._whole and piece.isascii():
            new = piece.decode("ascii")
        else:
            new = self._decoder.decode(piece)
            self._whole = not self._decoder.getstate()[0]
        if self.stopped:
            return ""
        if not self._stops:
            return new
        text = self._held + new
        # The stop string that is complete first counts, so that the result is the same for one long piece and for many.
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            end, start = min(found)
            self.stopped_by, self._held = text[start:end], ""
            return text[:start]
        certain = len(text) - self._open_suffix(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """Return what is still held: the generation ended without a stop string. A character that never became whole
        is left out."""
        held, self._held = self._held, ""
        return held

    def _open_suffix(self, text: str) -> int:
        """Length of the longest suffix of ``text`` that a stop string could still grow from."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stops):
                return length
        return 0
