"""How many requests a caller may get wrong (SPEC E-26): one that sends nothing else is slowed down and told for how long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from rbee_serve.contract.errors import RateLimited

#: What counts as wrong: who is refused for these statuses should look at its requests and not send them again.
STATUSES = frozenset({400, 401, 403, 404, 405, 413, 431})
#: Callers that are remembered at most; the ones heard of longest ago are forgotten.
_CALLERS_MAX = 10_000


class BadRequests:
    """A bucket for each caller: it holds a minute's worth and fills up steadily. ``per_minute`` 0: nobody is counted."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._left: dict[str, tuple[float, float]] = {}  # caller -> (wrong requests that it may still send, since when)

    def check(self, caller: str) -> None:
        """Raise RateLimited for a caller whose bucket is empty. Being refused here empties it no further."""
        if self._per_minute and (left := self._now(caller)) < 1:
            seconds = max(1, math.ceil((1 - left) * 60 / self._per_minute))
            raise RateLimited(
                f"more than {self._per_minute} requests a minute were refused",
                hint="look at the errors they were answered with; bad_requests_per_minute in docs/settings.md",
                limit=self._per_minute,
                retry_after_s=seconds,
            )

    def count(self, caller: str) -> None:
        """The caller has sent a wrong request."""
        if not self._per_minute:
            return
        left = max(0.0, self._now(caller) - 1)
        self._left.pop(caller, None)
        self._left[caller] = (left, self._clock())
        if len(self._left) > _CALLERS_MAX:
            del self._left[next(iter(self._left))]

    def _now(self, caller: str) -> float:
        if (found := self._left.get(caller)) is None:
            return float(self._per_minute)
        left, at = found
        return min(float(self._per_minute), left + (self._clock() - at) * self._per_minute / 60)
