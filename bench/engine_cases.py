"""Cases about the worker: throughput, latency, prefixes, memory, starts. Peers: llama-server and llama_cpp.server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import llama_server, models, peers, servers
from bench.client import Stream, at_once, stream
from bench.prompts import Prompts
from bench.results import Results, Row
from bench.servers import Server

PROMPT, ANSWER = 64, 128


@dataclass
class Run:
    """What all cases share."""

    cache: Path
    results: Results
    rounds: int
    quick: bool
    threads: int
    backend: str
    prompts: Prompts = field(default_factory=lambda: Prompts(time.time_ns()))

    @property
    def answer(self) -> int:
        """Tokens to generate."""
        return 24 if self.quick else ANSWER

    def peer_binary(self) -> Path:
        """llama-server for the instruction set that the worker picks, and the backend asked for."""
        return llama_server.build(self.cache, servers.cpu_variant(), self.backend)


@contextlib.contextmanager
def side_by_side(run: Run, model: Path, slots: int) -> Iterator[tuple[Server, Server]]:
    """A worker and llama-server, both up, both asked once."""
    binary = run.peer_binary()
    with (
        servers.rbee_worker(model, slots, run.threads, backend=run.backend) as ours,
        servers.llama_server(binary, model, slots, run.threads, *servers.gpu_arguments(run.backend)) as peer,
    ):
        for server in (ours, peer):
            _warm(run, server)
        yield ours, peer


def _warm(run: Run, server: Server) -> None:
    asyncio.run(at_once(server, [run.prompts.text(PROMPT)], 8))


def rate(streams: list[Stream], tokens: int) -> float:
    """Aggregate tokens a second, from the first request to the last token."""
    return tokens * len(streams) / (max(s.ended for s in streams) - min(s.sent for s in streams))


def p50_ttft_ms(streams: list[Stream]) -> float:
    """Median time to first token, ms."""
    return statistics.median(s.ttft for s in streams) * 1000


def p99_gap_ms(streams: list[Stream]) -> float:
    """99th percentile of the pauses between tokens, ms."""
    gaps = sorted(g for s in streams for g in s.gaps)
    return gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))] * 1000


def throughput(run: Run) -> None:
    """135 M: 1, 8 and 16 streams beside llama-server; TTFT at 16 and pauses at 8 come from the same runs."""
    _throughput(run, "135M", models.q4_0(run.cache), 16, (1, 8, 16))


def throughput_1b(run: Run) -> None:
    """1.1 B of random weights: 1 and 8 streams beside llama-server."""
    _throughput(run, "1.1B", models.random_1b(run.cache), 8, (1, 8))


def _throughput(run: Run, model: str, file: Path, slots: int, counts: tuple[int, ...]) -> None:
    with (
        side_by_side(run, file, slots) as (ours, peer),
        servers.rbee_worker(file, slots, run.threads, backend=run.backend, draft_tokens=0) as plain,
    ):
        _warm(run, plain)
        _beside_each_other(run, model, (ours, peer, plain), counts)


def _beside_each_other(run: Run, model: str, trio: tuple[Server, Server, Server], counts: tuple[int, ...]) -> None:
    """Measure the worker as it is, llama-server, and the worker without guesses."""
    for count in counts:
        seen: tuple[list[list[Stream]], list[list[Stream]], list[list[Stream]]] = ([], [], [])
        for _ in range(run.rounds if count > 1 else run.rounds + 2):
            for server, into in zip(trio, seen, strict=True):
                prompts = [run.prompts.text(PROMPT) for _ in range(count)]
                into.append(asyncio.run(at_once(server, prompts, run.answer)))

        def values(measure: object, which: int, seen: object = seen) -> list[float]:
            return [measure(streams) for streams in seen[which]]  # type: ignore[index, operator]

        def add(
            key: str, what: str, unit: str, measure: object, goal: float | None, *, at_least: bool = False, ours: int = 0
        ) -> None:
            peer = values(measure, 1)
            run.results.add(Row(key, what, unit, values(measure, ours), goal, at_least, peer, "llama-server"))

        name = f"{model} Q4_0, {count} stream{'s' if count > 1 else ''}"
        tokens = run.answer
        goal = 1.0 if count in (1, 8) else None
        group = "throughput" if model == "135M" else "throughput-1b"
        add(f"{group}/{count}", f"{name}: tokens/s together", "tok/s", lambda s, n=tokens: rate(s, n), goal, at_least=True)
        what = f"{name}, no guesses (draft_tokens = 0): tokens/s together"
        add(f"{group}/plain-{count}", what, "tok/s", lambda s, n=tokens: rate(s, n), goal, at_least=True, ours=2)
        if count == 8:
            add(f"{group}/p99-{count}", f"{name}: pause between tokens, p99", "ms", p99_gap_ms, 1.5)
            add(f"{group}/plain-p99-{count}", f"{name}, no guesses: pause between tokens, p99", "ms", p99_gap_ms, 1.5, ours=2)
        if count > 1:
            ttft_goal = 0.3 if count == 16 else None
            add(f"{group}/ttft-{count}", f"{name} arriving at once: time to first token, p50", "ms", p50_ttft_ms, ttft_goal)


def gap(run: Run) -> None:
    """135 M: four streams run, a prompt of 1,024 tokens arrives: their worst pause until its first token."""
    length = 200 if run.quick else 1024

    async def measure(server: Server) -> float:
        async def one() -> Stream:
            return await stream(
                "127.0.0.1", server.port, server.path, server.body(run.prompts.text(PROMPT), 400), server.token, into=seen
            )

        seen: list[Stream] = []
        tasks = [asyncio.create_task(one()) for _ in range(4)]
        while len(seen) < 4 or min(len(s.tokens) for s in seen) < 24:
            await asyncio.sleep(0.01)
            for task in tasks:
                if task.done():
                    task.result()
        long_one = await stream("127.0.0.1", server.port, server.path, server.body(run.prompts.text(length), 4), server.token)
        began, end = long_one.sent, long_one.tokens[0]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        pauses = [b - a for s in seen for a, b in zip(s.tokens, [*s.tokens[1:], end], strict=True) if b > began and a < end]
        await asyncio.sleep(0.3)  # both servers give up the four cut streams before the next round
        return max(pauses) * 1000

    with side_by_side(run, models.q4_0(run.cache), 8) as (ours, peer):
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(run.rounds):
            for server, into in zip((ours, peer), found, strict=True):
                into.append(asyncio.run(measure(server)))
    what = "135M Q4_0, 4 running streams while a 1,024-token prompt arrives: worst pause"
    run.results.add(Row("gap/4", what, "ms", found[0], 0.2, False, found[1], "llama-server"))


def shared(run: Run) -> None:
    """135 M: eight requests at once that share 1,000 tokens, warm, and cold (extra)."""
    length = 200 if run.quick else 1000
    with side_by_side(run, models.q4_0(run.cache), 8) as pair:
        for warm in (True, False):
            found: tuple[list[float], list[float]] = ([], [])
            for _ in range(run.rounds):
                for server, into in zip(pair, found, strict=True):
                    prefix = run.prompts.text(length)
                    if warm:
                        asyncio.run(at_once(server, [f"{prefix} {run.prompts.text(24)}"], 4))
                    streams = asyncio.run(at_once(server, [f"{prefix} {run.prompts.text(24)}" for _ in range(8)], 24))
                    into.append(p50_ttft_ms(streams))
            how = "warm" if warm else "cold"
            what = f"135M Q4_0, 8 requests at once sharing a {how} 1,000-token prefix: time to first token, p50"
            goal = 0.1 if warm else None
            run.results.add(Row(f"shared/{how}", what, "ms", found[0], goal, False, found[1], "llama-server"))


def binding_server(run: Run) -> None:
    """135 M: 8 and 16 streams beside ``python -m llama_cpp.server``."""
    model, name = models.q4_0(run.cache), "llama_cpp.server"
    python = peers.python_with_llama_cpp_server(run.cache)
    with (
        servers.rbee_worker(model, 16, run.threads, backend=run.backend) as ours,
        servers.llama_cpp_server(python, model, run.threads, backend=run.backend) as peer,
    ):
        for count in (8, 16):
            seen: dict[str, list[list[Stream]]] = {ours.name: [], peer.name: []}
            for _ in range(min(run.rounds, 2)):
                for server in (ours, peer):
                    prompts = [run.prompts.text(PROMPT) for _ in range(count)]
                    seen[server.name].append(asyncio.run(at_once(server, prompts, run.answer)))
            mine, theirs = seen[ours.name], seen[peer.name]
            tokens = run.answer
            key, what = f"binding/{count}", f"135M Q4_0, {count} streams: tokens/s together"
            rates = [rate(s, tokens) for s in mine], [rate(s, tokens) for s in theirs]
            run.results.add(Row(key, what, "tok/s", rates[0], 3, True, rates[1], name))
            key, what = f"binding/ttft-{count}", f"135M Q4_0, {count} streams: time to first token, p50"
            ttfts = [p50_ttft_ms(s) for s in mine], [p50_ttft_ms(s) for s in theirs]
            run.results.add(Row(key, what, "ms", ttfts[0], 0.05, False, ttfts[1], name))


def metrics(server: Server, names: Sequence[str]) -> list[float]:
    """Return figures of a worker's /metrics, of one moment."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/metrics", headers={"Authorization": f"Bearer {server.token}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
    found = {name: re.search(rf"^{name} (\S+)$", text, re.MULTILINE) for name in names}
    if lacking := [name for name, match in found.items() if match is None]:
        raise RuntimeError(f"the worker has no metric {', '.join(lacking)}")
    return [float(match[1]) for match in found.values() if match is not None]


def python_share(run: Run) -> None:
    """135 M, 8 streams that all run: what the engine process does in a decode step besides waiting for llama.cpp's decode."""
    names = "worker_engine_busy_seconds_total", "worker_engine_decode_seconds_total"
    shares = []

    async def measure(server: Server) -> float:
        async with asyncio.TaskGroup() as group:
            group.create_task(at_once(server, [run.prompts.text(PROMPT) for _ in range(8)], 100 if run.quick else 400))
            await asyncio.sleep(0.5 if run.quick else 1.5)  # prompts are read; the engine reports its times twice a second
            before = await asyncio.to_thread(metrics, server, names)
            await asyncio.sleep(0.6 if run.quick else 3)
            after = await asyncio.to_thread(metrics, server, names)
        busy, decode = (a - b for a, b in zip(after, before, strict=True))
        return (1 - decode / busy) * 100

    with servers.rbee_worker(models.q4_0(run.cache), 8, run.threads, backend=run.backend) as ours:
        asyncio.run(at_once(ours, [run.prompts.text(PROMPT)], 8))
        shares += [asyncio.run(measure(ours)) for _ in range(run.rounds)]
    run.results.add(Row("python/8", "135M Q4_0, 8 streams: Python's share of a decode step", "%", shares, 2))


def memory(run: Run) -> None:
    """135 M, 8 slots: resident memory of front and engine beyond weights and KV cache, after 8 streams."""
    slots, values = 8, []
    with servers.rbee_worker(models.q4_0(run.cache), slots, run.threads, backend=run.backend) as ours:
        asyncio.run(at_once(ours, [run.prompts.text(PROMPT) for _ in range(slots)], run.answer))
        kv = slots * servers.CONTEXT_TOKENS * models.kv_bytes_per_token(models.q4_0(run.cache))
        weights = models.q4_0(run.cache).stat().st_size
        values.append(ours.pss_mb() - (kv + weights) / 1e6)
        total = ours.pss_mb()
    run.results.add(Row("memory/total", "135M Q4_0, 8 slots of 2,048 tokens: memory of front and engine (PSS)", "MB", [total]))
    run.results.add(Row("memory/above", "… of it beyond model file and KV cache", "MB", values, 120))


def start(run: Run) -> None:
    """135 M: exec of the worker to the first token at the client, page cache warm."""
    values = [_started(run, models.q4_0(run.cache), run.prompts.text(8), None)[0] for _ in range(run.rounds + 1)][1:]
    run.results.add(Row("start/135M", "135M Q4_0, 4 slots: exec to first token at the client", "s", values, 0.5))


def woken(run: Run) -> None:
    """135 M and 1.1 B: exec of a worker to the first token, against loading the model and evaluating the prompt alone."""
    for name, model in (("135M", models.q4_0(run.cache)), ("1.1B", models.random_1b(run.cache))):
        ours, bare = [], []
        for n in range(run.rounds + 1):
            prompt = run.prompts.text(PROMPT)
            command = [sys.executable, "-m", "bench.bare", str(model), str(run.threads), prompt]
            alone = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            took = _started(run, model, prompt, None)[0]
            if n:  # the first round warms the page cache
                ours.append(took)
                bare.append(alone)
        what = f"{name} Q4_0, woken with a 64-token prompt: exec to first token, against model load and prompt alone"
        run.results.add(Row(f"woken/{name}", what, "s", ours, 1.3, False, bare, "llama-cpp-python, imported"))


def wake(run: Run) -> None:
    """135 M and 1.1 B: start to first token of a known 1,000-token prompt, prefix restored from disk against not."""
    length = 200 if run.quick else 1000
    for name, model in (("135M", models.q4_0(run.cache)), ("1.1B", models.random_1b(run.cache))):
        ours, without = [], []
        for _ in range(run.rounds):
            with tempfile.TemporaryDirectory(prefix="rbee-prefixes-") as store:
                prefix = run.prompts.text(length)
                _started(run, model, prefix, store)
                again, cached = _started(run, model, f"{prefix} {run.prompts.text(8)}", store)
                if not cached:
                    raise RuntimeError("the prefix did not come back from disk")
                ours.append(again)
                without.append(_started(run, model, f"{prefix} {run.prompts.text(8)}", None)[0])
        what = f"{name} Q4_0, wake with a 1,000-token prompt: exec to first token, prefix from disk"
        run.results.add(Row(f"wake/{name}", what, "s", ours, 0.2, False, without, "without"))


def _started(run: Run, model: Path, prompt: str, store: str | None) -> tuple[float, int]:
    """Start a worker, ask at once, end it; return seconds from exec to the first token, and cached tokens."""
    settings: dict[str, object] = {"prefix_store_dir": store} if store else {}
    with servers.rbee_worker(model, 4, run.threads, wait=False, backend=run.backend, **settings) as server:
        first, cached = _first_token(server, prompt)
        return first - server.began, cached


def _first_token(server: Server, prompt: str) -> tuple[float, int]:
    """Wake a worker as the queen does: follow its loading, then ask. Return when the first token came and what was cached."""
    end = time.monotonic() + 120
    while True:  # cheaply: what the client takes of the cores the worker lacks
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", server.port)):
            break
        if time.monotonic() > end:
            raise RuntimeError("the worker does not listen")
        time.sleep(0.005)
    stages = [event["stage"] for event in _events(server, "/v1/loading/progress", None)]
    if stages[-1:] != ["ready"]:
        raise RuntimeError(f"the worker did not become ready: {stages[-1:]}")
    first, cached = 0.0, 0
    for event in _events(server, "/v1/inference", server.body(prompt, 4)):
        if event["type"] == "started":
            cached = event.get("cached_tokens", 0)
        elif event["type"] == "token" and not first:
            first = time.monotonic()
    if not first:
        raise RuntimeError("the worker gave no token")
    return first, cached


def _events(server: Server, path: str, body: dict[str, object] | None) -> Iterator[dict[str, Any]]:
    """Yield the events of an answer as they come."""
    headers = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


CASES = {
    "throughput": throughput,
    "binding": binding_server,
    "gap": gap,
    "shared": shared,
    "python": python_share,
    "memory": memory,
    "start": start,
    "woken": woken,
    "wake": wake,
    "throughput-1b": throughput_1b,
}
