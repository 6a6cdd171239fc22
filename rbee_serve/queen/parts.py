"""What all streams share: registry, queue, connections, limits, metrics. One object a queen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rbee_serve.queen.http_client import Client
from rbee_serve.queen.metrics import Metrics
from rbee_serve.queen.prefix import PrefixIndex
from rbee_serve.queen.queue import Queue
from rbee_serve.queen.registry import Registry
from rbee_serve.queen.upstream import Limits
from rbee_serve.queen.waking import Waker


@dataclass(slots=True)
class Parts:
    """``clock`` is the registry's monotonic clock, times are seconds; ``token``: the fleet token, replaced by a reload."""

    registry: Registry
    client: Client
    token: str | None
    limits: Limits
    metrics: Metrics
    request_timeout_s: float
    clock: Callable[[], float]
    queue_max: int = 0
    queue_timeout_s: float = 60.0
    load_timeout_s: float = 300.0
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    queue: Queue = field(init=False)
    waker: Waker = field(init=False)

    def __post_init__(self) -> None:
        self.queue = Queue(self.registry, self.clock, self.queue_max)
        self.waker = Waker(self.registry, self.client, lambda: self.token, self.clock, self.load_timeout_s)
