"""What a worker counts (SPEC E-32). One registry an application, nothing global, no unbounded label."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from rbee_serve.worker.engine.protocol import EngineTotals

CONTENT_TYPE = CONTENT_TYPE_LATEST

_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000, 300_000)


class Metrics:
    """Counters of one worker; ``render`` takes the figures that are read off its state."""

    def __init__(self) -> None:
        self.collector = CollectorRegistry()
        self._began = time.monotonic()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"worker_{name}", text, labels, registry=self.collector)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"worker_{name}", text, registry=self.collector)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"worker_{name}", text, buckets=_MS, registry=self.collector)

        self.requests = counter("requests", "inference requests ended, by stop reason or error code", "outcome")
        self.tokens_generated = counter("tokens_generated", "tokens sampled for clients")
        self.tokens_in = counter("tokens_in", "prompt tokens of accepted requests")
        self.tokens_cached = counter("tokens_cached", "prompt tokens that needed no evaluation")
        self.prefix_hits = counter("prefix_hits", "requests of which part of the prompt was cached, by where", "source")
        self.heartbeats = counter("heartbeats", "heartbeats sent, by result", "result")
        self.duration_ms = histogram("inference_duration_ms", "from acceptance to the last event, milliseconds")
        self.first_token_ms = histogram("time_to_first_token_ms", "from acceptance to the first token, milliseconds")
        self._uptime = gauge("uptime_seconds", "age of the process")
        self._vram = gauge("vram_bytes", "device memory held by weights, KV cache and buffers; 0 on a CPU")
        self._engine_busy = gauge("engine_busy_seconds_total", "time that the engine has worked")
        self._engine_decode = gauge("engine_decode_seconds_total", "of it in llama.cpp's decode; the rest is Python")
        self._drafted = gauge("draft_tokens_total", "tokens guessed and evaluated (prompt look-up)")
        self._accepted = gauge("draft_tokens_accepted_total", "of them what came anyway")
        self._slots_total = gauge("slots_total", "streams decoded in parallel")
        self._slots_busy = gauge("slots_busy", "slots taken")

    def render(self, *, slots_total: int, slots_busy: int, vram_bytes: int, engine: EngineTotals) -> bytes:
        """Return everything in Prometheus' text format."""
        self._uptime.set(time.monotonic() - self._began)
        self._vram.set(vram_bytes)
        self._engine_busy.set(engine.busy_s)
        self._engine_decode.set(engine.decode_s)
        self._drafted.set(engine.drafted)
        self._accepted.set(engine.accepted)
        self._slots_total.set(slots_total)
        self._slots_busy.set(slots_busy)
        return generate_latest(self.collector)
