"""Counters of one worker in Prometheus' text form (SPEC E-32)."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rbee_serve.worker.engine.protocol import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class WorkerMetrics:
    """One registry a worker; nothing global."""

    def __init__(self, engine: Engine, slots: int) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("worker_requests", "requests by how they ended", ["outcome"], registry=registry)
        self.tokens_out = Counter("worker_tokens_generated", "tokens generated", registry=registry)
        self.tokens_in = Counter("worker_tokens_in", "prompt tokens", registry=registry)
        self.tokens_cached = Counter(
            "worker_prompt_tokens_cached", "prompt tokens taken from the prefix cache", registry=registry
        )
        self.duration = Histogram(
            "worker_inference_duration_ms",
            "milliseconds from acceptance to the end",
            buckets=(50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000),
            registry=registry,
        )
        began = time.monotonic()
        Gauge("worker_uptime_seconds", "seconds since start", registry=registry).set_function(lambda: time.monotonic() - began)
        Gauge("worker_vram_bytes", "device memory in use", registry=registry).set_function(
            lambda: float(engine.info.device_memory_bytes) if engine.info else 0.0
        )
        Gauge("worker_slots", "parallel streams possible", registry=registry).set(slots)
        Gauge("worker_slots_busy", "streams running or waiting", registry=registry).set_function(lambda: float(engine.slots_busy))

    def render(self) -> bytes:
        """Return the exposition."""
        return generate_latest(self._registry)
