"""Cases about the queen: its own cost before a worker that computes nothing, and what it does for real workers."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from bench import fleets, models, peers
from bench.client import Stream, at_once, stream
from bench.engine_cases import Run, metrics
from bench.results import Row
from bench.servers import Server


async def _paced(server: Server, count: int, per_s: float) -> list[float]:
    """Ask for one token ``per_s`` times a second whatever comes back; return times to first token in ms, sorted."""

    async def one(at: float) -> Stream:
        await asyncio.sleep(at - time.monotonic())
        return await stream("127.0.0.1", server.port, server.path, server.body("Hello", 1))

    began = time.monotonic() + 0.1
    streams = await asyncio.gather(*(one(began + i / per_s) for i in range(count)))
    if bad := [s.error for s in streams if s.error or not s.tokens]:
        raise RuntimeError(f"{server.name}: {bad[0]}")
    return sorted(s.ttft * 1000 for s in streams)


def added_ttft(run: Run) -> None:
    """Queen against worker directly, 50 requests a second: time to first token that the queen adds."""
    p50: list[float] = []
    p99: list[float] = []
    count = 50 if run.quick else 500
    with fleets.stand_in() as worker, fleets.queen() as queen:
        queen.beat(fleets.heartbeat("bench", worker.port, slots=1000, seq=1))
        asyncio.run(_paced(queen.server, 20, 50))
        for n in range(run.rounds):
            queen.beat(fleets.heartbeat("bench", worker.port, slots=1000, seq=2 + n))
            direct, through = (asyncio.run(_paced(s, count, 50)) for s in (worker, queen.server))
            p50.append(through[count // 2] - direct[count // 2])
            p99.append(through[int(count * 0.99)] - direct[int(count * 0.99)])
    run.results.add(Row("queen-ttft/p50", "time to first token that the queen adds at 50 requests/s, p50", "ms", p50, 2))
    run.results.add(Row("queen-ttft/p99", "… p99", "ms", p99, 8))


def _rate(server: Server, prompt: str, tokens: int) -> float:
    """Return the events that 32 streams at once get through a server for a second of its CPU time."""
    before = server.cpu_s
    asyncio.run(at_once(server, [prompt] * 32, tokens))
    return 32 * tokens / (server.cpu_s - before)


def relay(run: Run) -> None:
    """32 streams at once: events relayed for a second of CPU time, as fast as they go and one by one; LiteLLM's proxy beside."""
    tokens = 100 if run.quick else 1000
    paced, ours, alone, chat, peer = 100 if run.quick else 300, list[float](), list[float](), list[float](), list[float]()
    with (
        fleets.stand_in() as worker,
        fleets.queen() as queen,
        fleets.litellm_proxy(peers.litellm(run.cache), worker.port) as proxy,
    ):
        queen.beat(fleets.heartbeat("bench", worker.port, slots=1000, seq=1))
        openai = replace(queen.server, path="/v1/chat/completions")
        for server in (queen.server, openai, proxy):
            asyncio.run(at_once(server, ["Hello"] * 4, 20))
        for n in range(run.rounds):
            queen.beat(fleets.heartbeat("bench", worker.port, slots=1000, seq=2 + n))  # the proxy takes its time: not silent
            ours.append(_rate(queen.server, "Hello", tokens))
            alone.append(_rate(queen.server, "paced", paced))
            chat.append(_rate(openai, "Hello", tokens))
            peer.append(_rate(proxy, "Hello", tokens // 5))
    what = "SSE events relayed for a second of CPU, 32 streams"
    run.results.add(Row("queen-relay/events", f"{what}, as fast as they go", "events/s", ours, 20_000, True))
    run.results.add(Row("queen-relay/paced", f"{what}, each event on its own (50/s a stream)", "events/s", alone))
    what = f"{what}, OpenAI's chat route, same back end"
    run.results.add(Row("queen-relay/litellm", what, "events/s", chat, 5, True, peer, "LiteLLM's proxy"))


def placement(run: Run) -> None:
    """Placement decision with 1,000 workers registered."""
    from rbee_serve.contract.api import Heartbeat
    from rbee_serve.queen.placement import Wanted, pick
    from rbee_serve.queen.registry import Registry

    registry = Registry()
    for i in range(1000):
        beat = Heartbeat.model_validate_json(fleets.heartbeat(f"n{i}", 9000, slots=4, seq=1))
        registry.beat(beat, 0.0)
    p99 = []
    for _ in range(run.rounds):
        times = []
        for _ in range(1000):
            began = time.perf_counter()
            choice = pick(registry, Wanted(model="bench"), 1.0)
            times.append((time.perf_counter() - began) * 1000)
            if choice is None:
                raise RuntimeError("nobody was chosen")
            registry.acquire(choice.worker)
        for worker in registry:
            while worker.in_flight:
                registry.release(worker)
        p99.append(sorted(times)[990])
    run.results.add(Row("queen-placement/p99", "placement decision with 1,000 workers, p99", "ms", p99, 1))


def heartbeats(run: Run) -> None:
    """1,000 workers that beat every 10 s, each beat over a connection of its own: the queen's share of a core."""
    beats, shares = 100 if run.quick else 500, []
    with fleets.queen() as queen:
        for i in range(1000):
            queen.beat(fleets.heartbeat(f"n{i}", 9000, slots=4, seq=1))
        for n in range(run.rounds):
            before = queen.server.cpu_s
            for i in range(beats):
                queen.beat(fleets.heartbeat(f"n{i}", 9000, slots=4, seq=2 + n))
            shares.append((queen.server.cpu_s - before) / beats * 100 * 100)  # 100 beats a second, in per cent
    run.results.add(Row("queen-heartbeats/share", "1,000 workers' heartbeats every 10 s: share of a core", "%", shares, 10))


def idle_streams(run: Run) -> None:
    """Memory of the queen for a stream on which nothing happens."""
    count = 50 if run.quick else 400

    async def hold(server: Server) -> float:
        before = server.pss_mb()
        seen: list[Stream] = []
        body = server.body("hold", 10)
        asked = (stream("127.0.0.1", server.port, server.path, body, into=seen) for _ in range(count))
        tasks = [asyncio.create_task(a) for a in asked]
        async with asyncio.timeout(60):
            while len(seen) < count or not all(s.tokens for s in seen):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        after = server.pss_mb()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return (after - before) * 1000 / count

    with fleets.stand_in() as worker, fleets.queen() as queen:
        queen.beat(fleets.heartbeat("bench", worker.port, slots=1000, seq=1))
        asyncio.run(at_once(queen.server, ["Hello"] * 32, 50))
        size = asyncio.run(hold(queen.server))
    run.results.add(Row("queen-idle/kb", f"the queen's memory for an idle stream ({count} open)", "KB", [size], 64))


def affinity(run: Run) -> None:
    """Chats that share one of 8 system prompts, 4 workers: the queen's placement against round robin."""
    rounds, chats, length = (1, 2, 100) if run.quick else (min(run.rounds, 2), 6, 400)
    rng = random.Random(1)  # noqa: S311

    async def play(server: Server, workers: list[str] | None) -> float:
        """Four clients ask one after another; with ``workers`` each request is pinned to the next of them."""
        systems = [run.prompts.text(length) for _ in range(8)]
        todo = [f"{system} {run.prompts.text(70)}" for system in systems for _ in range(chats)]
        rng.shuffle(todo)
        done: list[Stream] = []

        async def client() -> None:
            while todo:
                prompt = todo.pop()
                body = server.body(prompt, 8)
                if workers is not None:
                    body["worker_id"] = workers[len(todo) % len(workers)]
                done.append(await stream("127.0.0.1", server.port, server.path, body))

        await asyncio.gather(*(client() for _ in range(4)))
        if bad := [s.error for s in done if s.error or not s.tokens]:
            raise RuntimeError(str(bad[0]))
        return statistics.median(s.ttft for s in done) * 1000

    ours, robin = [], []
    with fleets.fleet(models.q4_0(run.cache), 4, threads=1, slots=4) as (queen, workers):
        for _ in range(rounds):
            ours.append(asyncio.run(play(queen.server, None)))
            robin.append(asyncio.run(play(queen.server, sorted(workers))))
    what = f"8 system prompts x {chats} chats on 4 workers: time to first token, p50"
    run.results.add(Row("queen-affinity/ttft", what, "ms", ours, 0.5, False, robin, "round robin"))


def kill_gap(run: Run) -> None:
    """A worker is killed (-9) in the middle of a stream: the pause at the client beyond evaluating what was there."""
    tokens, extra = 60, []
    for _ in range(1 if run.quick else min(run.rounds, 2)):
        with fleets.fleet(models.q4_0(run.cache), 2, threads=1, slots=4) as (queen, workers):
            extra.append(asyncio.run(_killed(run, queen.server, workers, tokens)))
    what = "worker killed -9 at half of 60 tokens: pause beyond evaluating prompt and tokens again"
    run.results.add(Row("queen-kill/gap", what, "ms", extra, 250))


async def _killed(run: Run, server: Server, workers: dict[str, Server], tokens: int) -> float:
    prompt, seen = run.prompts.text(64), list[Stream]()
    body = server.body(prompt, tokens)
    task = asyncio.create_task(stream("127.0.0.1", server.port, server.path, body, into=seen))
    while not seen or len(seen[0].tokens) < tokens // 2:
        await asyncio.sleep(0.001)
        if task.done():
            break
    before = len(seen[0].tokens)
    busy = [name for name, w in workers.items() if _busy(w)]
    if len(busy) != 1:
        raise RuntimeError(f"one worker should be busy, got {busy}")
    os.kill(workers[busy[0]].pid, signal.SIGKILL)
    result = await task
    if result.error or len(result.tokens) != tokens:
        raise RuntimeError(f"the stream did not survive: {result.error} {len(result.tokens)}")
    gap = max(result.gaps[before - 2 :])
    (other,) = (w for name, w in workers.items() if name != busy[0])
    # The same length cold on the survivor: what evaluating takes there.
    again = await stream("127.0.0.1", other.port, other.path, other.body(run.prompts.text(64 + before), 1), other.token)
    return (gap - again.ttft) * 1000


def _busy(worker: Server) -> bool:
    return metrics(worker, ["worker_slots_busy"])[0] > 0


CASES: dict[str, Callable[[Run], None]] = {
    "queen-ttft": added_ttft,
    "queen-relay": relay,
    "queen-placement": placement,
    "queen-heartbeats": heartbeats,
    "queen-idle": idle_streams,
    "queen-affinity": affinity,
    "queen-kill": kill_gap,
}
