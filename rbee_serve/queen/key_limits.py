"""What one client key may use at a time: models, requests a minute, requests at once (contract.keys.ClientKey)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from rbee_serve.contract.errors import ModelAccessDenied, RateLimited
from rbee_serve.contract.keys import ClientKey


@dataclass(slots=True)
class _Usage:
    """Of one key. ``tokens``: requests that it may make now (token bucket that holds one minute's worth)."""

    tokens: float
    filled_at: float
    running: int = 0


class Lease:
    """A request that counts against its key until ``release`` (idempotent)."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the place back."""
        release, self._release = self._release, None
        if release is not None:
            release()


@dataclass(slots=True)
class KeyLimits:
    """Usage of all keys. Belongs to the event loop; ``clock``: monotonic seconds."""

    clock: Callable[[], float]
    _usage: dict[str, _Usage] = field(default_factory=dict)

    def admit(self, key: ClientKey, model: str | None) -> Lease:
        """Count one request; raises ModelAccessDenied or RateLimited, and then nothing was counted.

        ``model`` None: the request named none, and the model that answers is checked with ``check_model``.
        """
        if model is not None:
            self.check_model(key, model)
        now = self.clock()
        usage = self._usage.get(key.id)
        if usage is None:
            usage = self._usage[key.id] = _Usage(float(key.requests_per_minute or 0), now)
        if key.concurrent_requests is not None and usage.running >= key.concurrent_requests:
            raise RateLimited(
                f"key {key.name!r} has {usage.running} requests running, {key.concurrent_requests} are allowed at once",
                hint="wait for one to end, or raise the limit: rbee-ctl key create --concurrent N",
                limit=key.concurrent_requests,
                retry_after_s=1,
            )
        if key.requests_per_minute is not None:
            rate = key.requests_per_minute / 60
            usage.tokens = min(float(key.requests_per_minute), usage.tokens + (now - usage.filled_at) * rate)
            usage.filled_at = now
            if usage.tokens < 1:
                raise RateLimited(
                    f"key {key.name!r} has used its {key.requests_per_minute} requests a minute",
                    hint="wait as long as Retry-After says",
                    limit=key.requests_per_minute,
                    retry_after_s=math.ceil((1 - usage.tokens) / rate),
                )
            usage.tokens -= 1
        usage.running += 1

        def release() -> None:
            usage.running -= 1

        return Lease(release)

    @staticmethod
    def check_model(key: ClientKey, model: str) -> None:
        """Raise ModelAccessDenied unless the key may use ``model``."""
        if not key.allows(model):
            raise ModelAccessDenied(
                f"key {key.name!r} may not use model {model!r}",
                hint=f"models of this key: {', '.join(key.models or ()) or 'none'}",
                model=model,
            )
