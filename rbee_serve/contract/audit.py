"""The audit log's form (SPEC E-30): JSON lines, each sealed with the hash of the one before it. No I/O.

A line is ``{"seq", "at", "event", ...facts, "prev", "hash"}``; ``hash`` is the SHA-256 of the line without it, ``prev`` the hash
of the line before (64 zeros for the very first). Whoever changes, removes or inserts a line breaks the chain from there on;
only a cut at the end goes unseen, unless the last hash is kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ORIGIN = "0" * 64


class ChainBrokenError(ValueError):
    """The line ``number`` (from 1) of ``where`` does not follow from the one before it."""

    def __init__(self, where: str, number: int, reason: str) -> None:
        super().__init__(f"{where}, line {number}: {reason}")
        self.where, self.number, self.reason = where, number, reason


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass
class Chain:
    """Where a log stands: ``seq`` of its last line (0: none) and that line's hash."""

    seq: int = 0
    last: str = ORIGIN

    def seal(self, event: str, at: str, facts: Mapping[str, Any]) -> str:
        """Return the next line, without its end. ``at``: ISO 8601."""
        record = {"seq": self.seq + 1, "at": at, "event": event, **facts, "prev": self.last}
        digest = _digest(record)
        self.seq, self.last = self.seq + 1, digest
        return json.dumps({**record, "hash": digest}, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def after(cls, line: str) -> Chain:
        """Return the chain whose last line is ``line``; raises ValueError for what is no line of an audit log."""
        record = json.loads(line)
        if not (isinstance(record, dict) and isinstance(record.get("seq"), int) and isinstance(record.get("hash"), str)):
            raise ValueError("no line of an audit log")
        return cls(record["seq"], record["hash"])

    def check(self, lines: Iterable[str], where: str) -> int:
        """Follow ``lines`` and return how many there were; raises ChainBrokenError at the first that does not follow.

        A log whose beginning was rotated away starts in the middle: the first line that a fresh chain sees is taken as it is.
        """
        number = 0
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                digest = record.pop("hash")
                seq, prev = record["seq"], record["prev"]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ChainBrokenError(where, number, "no line of an audit log") from None
            if _digest(record) != digest:
                raise ChainBrokenError(where, number, "changed after it was written")
            begins = self.seq == 0 and self.last == ORIGIN
            if not begins and (seq, prev) != (self.seq + 1, self.last):
                raise ChainBrokenError(where, number, f"follows line {seq - 1}, got it after line {self.seq}: lines are missing")
            self.seq, self.last = seq, digest
        return number
