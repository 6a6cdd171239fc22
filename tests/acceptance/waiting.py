"""Waiting for conditions, never for times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, limit_s: float = 60.0, pause_s: float = 0.1) -> T:
    """Return the first truthy answer of ``condition``; fails the test with ``what`` and the last answer when time is up."""
    end = time.monotonic() + limit_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"not within {limit_s} s: {what}; last seen: {answer!r}")
        time.sleep(pause_s)
