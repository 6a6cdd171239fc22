"""What the queen counts (SPEC E-32). One registry an application, nothing global; labels are bounded (no ids but workers')."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from rbee_serve.contract.api import WorkerState
from rbee_serve.queen.registry import Registry

CONTENT_TYPE = CONTENT_TYPE_LATEST

_MS = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000)


class Metrics:
    """Counters of one queen; ``render`` adds the gauges that are read off the registry."""

    def __init__(self) -> None:
        self.collector = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"queen_{name}", text, labels, registry=self.collector)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"queen_{name}", text, buckets=_MS, registry=self.collector)

        self.requests = counter("requests", "inference requests ended, by API and outcome", "api", "outcome")
        self.key_requests = counter("key_requests", "inference requests accepted, by name of the client key", "key")
        self.key_tokens = counter("key_tokens", "tokens of ended requests, by name of the client key and kind", "key", "kind")
        self.errors = counter("errors", "errors answered or sent in streams, by code", "code")
        self.dispatches = counter("dispatches", "requests sent to workers, by result", "result")
        self.failovers = counter(
            "failovers", "streams moved to another worker, by cause and mode of the continuation", "cause", "mode"
        )
        self.prefix = counter("prefix", "requests sent where their prompt's beginning should be cached, by result", "result")
        self.tokens_relayed = counter("tokens_relayed", "token events passed on to clients")
        self.heartbeats = counter("heartbeats", "heartbeats received, by outcome", "outcome")
        self._jobs = counter(
            "jobs", "operations of the fleet ended (downloads, playbook runs), by name and state", "operation", "state"
        )
        self.scheduling_ms = histogram("scheduling_latency_ms", "time to choose a worker, milliseconds")
        self.first_token_ms = histogram("time_to_first_token_ms", "from acceptance to the first token, milliseconds")
        self.queue_wait_ms = histogram("queue_wait_ms", "time in the queue before the first worker, milliseconds")
        self.connections = Gauge("queen_connections", "inference requests in progress", registry=self.collector)
        self._workers = Gauge("queen_workers", "live workers by state", ["state"], registry=self.collector)
        self._waiting = Gauge("queen_queue_depth", "requests that wait for a slot, by model", ["model"], registry=self.collector)
        self._slots = Gauge("queen_slots", "slots of routable workers", ["kind"], registry=self.collector)

    def job_ended(self, operation: str, state: str) -> None:
        """Count a job."""
        self._jobs.labels(operation=operation, state=state).inc()

    def render(self, registry: Registry, waiting: Mapping[str, int], now: float) -> bytes:
        """Return everything in Prometheus' text format. ``waiting``: requests in the queue, by model."""
        self._waiting.clear()
        for model in {w.model_id for w in registry} | waiting.keys():
            self._waiting.labels(model=model).set(waiting.get(model, 0))
        live = registry.live(now)
        states = Tally(w.state for w in live)
        for state in WorkerState:
            self._workers.labels(state=state.value).set(states[state])
        routable = [w for w in live if registry.routable(w, now)]
        self._slots.labels(kind="total").set(sum(w.record.slots_total for w in routable))
        self._slots.labels(kind="busy").set(sum(min(w.busy, w.record.slots_total) for w in routable))
        return generate_latest(self.collector)
