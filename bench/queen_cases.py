"""Cases about the queen."""

from __future__ import annotations

from collections.abc import Callable

from bench.engine_cases import Run

CASES: dict[str, Callable[[Run], None]] = {}
