"""Progress of a long task as JSON lines in a file: written here, followed by whoever is interested (SPEC 3.5, N-05).

    {"stage": "downloading", "bytes_downloaded": int, "bytes_total": int, "speed_mbps": float, "human": str, "at": float}

``speed_mbps`` is megabits a second, ``at`` seconds since the epoch, ``human`` a line for a person. Stages: ``resolving``,
``waiting``, ``downloading``, ``retrying``, ``verifying``; ``complete`` and ``failed`` are always the last line. While a
transfer lasts there is a line at least once a second, also when no byte comes.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self, TextIO

TERMINAL = ("complete", "failed")


class Progress:
    """Appends lines to ``path`` (emptied first) and shows their words on stderr, which is the journal in a unit."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        self._lock = threading.Lock()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8", buffering=1)

    def line(self, stage: str, human: str, **figures: Any) -> None:
        """Write one line. The journal gets all stages but the many of ``downloading`` and ``verifying``."""
        if self._file:
            record = {"stage": stage, **figures, "human": human, "at": round(time.time(), 3)}
            with self._lock:
                self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if stage not in ("downloading", "verifying"):
            print(human, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


class Meter:
    """Bytes and speed of one transfer, a line every ``interval_s``; use it as a context manager.

    A thread writes the lines, so that they also come while the transfer hangs: they then say for how long.
    """

    def __init__(self, progress: Progress, stage: str, what: str, total: int, start: int = 0, interval_s: float = 0.5) -> None:
        self._progress, self._stage, self._what, self._total, self._interval_s = progress, stage, what, total, interval_s
        self._done = self._last_bytes = start
        self._last_time = self._moved_at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._line(0.0, 0.0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._done != self._last_bytes:
            self._say()

    def at(self, done: int) -> None:
        """Note that ``done`` bytes of the whole are there."""
        self._done, self._moved_at = done, time.monotonic()

    def _run(self) -> None:
        while not self._over.wait(self._interval_s):
            self._say()

    def _say(self) -> None:
        now, done = time.monotonic(), self._done
        speed = (done - self._last_bytes) / max(now - self._last_time, 1e-6)
        self._last_bytes, self._last_time = done, now
        self._line(speed, now - self._moved_at)

    def _line(self, speed: float, silent_s: float) -> None:
        done = self._last_bytes
        percent = f" ({100 * done // self._total} %)" if self._total else ""
        rate = f", {speed / 1e6:.1f} MB/s" if speed else f", no bytes for {silent_s:.0f} s" if silent_s >= 1 else ""
        human = f"{self._stage} {self._what}: {done / 1e6:.1f} of {self._total / 1e6:.1f} MB{percent}{rate}"
        figures = {"bytes_downloaded": done, "bytes_total": self._total, "speed_mbps": round(speed * 8 / 1e6, 3)}
        self._progress.line(self._stage, human, **figures)
