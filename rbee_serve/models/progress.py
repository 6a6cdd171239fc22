"""Progress of a long task as JSON lines in a file: written here, followed by whoever is interested (SPEC 3.5, N-05).

    {"stage": "downloading", "bytes_downloaded": int, "bytes_total": int, "speed_mbps": float, "human": str, "at": float}

``speed_mbps`` is megabits a second, ``at`` seconds since the epoch, ``human`` a line for a person. Stages: ``resolving``,
``waiting``, ``downloading``, ``retrying``, ``verifying``; ``complete`` and ``failed`` are always the last line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

TERMINAL = ("complete", "failed")


class Progress:
    """Appends lines to ``path`` (emptied first) and shows their words on stderr, which is the journal in a unit."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8", buffering=1)

    def line(self, stage: str, human: str, **figures: Any) -> None:
        """Write one line. The journal gets all stages but the many of ``downloading`` and ``verifying``."""
        if self._file:
            record = {"stage": stage, **figures, "human": human, "at": round(time.time(), 3)}
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if stage not in ("downloading", "verifying"):
            print(human, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


class Meter:
    """Bytes and speed of one transfer, at most one line every ``interval_s``."""

    def __init__(self, progress: Progress, stage: str, what: str, total: int, start: int = 0, interval_s: float = 0.5) -> None:
        self._progress, self._stage, self._what, self._total, self._interval_s = progress, stage, what, total, interval_s
        self._last_bytes, self._last_time = start, time.monotonic()
        self._line(start, 0.0)

    def at(self, done: int) -> None:
        """Say that ``done`` bytes of the whole are there."""
        elapsed = time.monotonic() - self._last_time
        if elapsed >= self._interval_s or done == self._total != self._last_bytes:
            self._line(done, (done - self._last_bytes) / max(elapsed, 1e-6))
            self._last_bytes, self._last_time = done, time.monotonic()

    def _line(self, done: int, speed: float) -> None:
        percent = f" ({100 * done // self._total} %)" if self._total else ""
        rate = f", {speed / 1e6:.1f} MB/s" if speed else ""
        human = f"{self._stage} {self._what}: {done / 1e6:.1f} of {self._total / 1e6:.1f} MB{percent}{rate}"
        figures = {"bytes_downloaded": done, "bytes_total": self._total, "speed_mbps": round(speed * 8 / 1e6, 3)}
        self._progress.line(self._stage, human, **figures)
