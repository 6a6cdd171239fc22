"""The engine as a process: admission, cancelling, leaks, slow readers, bad files, and how it dies."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_bench import ask, config, each, gathered, loaded, request, running, until, until_free
from standing_still import standing_still

from rbee_serve.contract.api import StopReason
from rbee_serve.contract.errors import AllSlotsBusy, PromptTooLong, RequestError, WorkerCrashed, WorkerLoading
from rbee_serve.worker.engine.process import ProcessEngine
from rbee_serve.worker.engine.protocol import EngineConfig, LoadProgress, Queued, Started, TokenOut
from rbee_serve.worker.engine.spawn import EngineChild
from rbee_serve.worker.engine.wire import pack

pytestmark = pytest.mark.integration

LONG = "word " * 900


def test_engine_says_what_was_loaded(model_path: Path) -> None:
    """True progress on the way, then the facts as read back from llama.cpp."""

    seen: list[LoadProgress] = []

    class Recorded(ProcessEngine):
        def _set_progress(self, progress: LoadProgress) -> None:
            seen.append(progress)
            super()._set_progress(progress)

    async def run() -> ProcessEngine:
        engine = Recorded(config(model_path, context_tokens=100_000, slots=1))
        seen.append(engine.progress)
        with pytest.raises(WorkerLoading):
            await ask(engine, "too early")
        await engine.start()
        await loaded(engine)
        await engine.close()
        return engine

    engine = asyncio.run(run())
    assert [p.stage for p in seen][:2] == ["starting", "loading_to_vram"]
    assert {p.layers_total for p in seen[1:]} == {30}
    loaded_layers = [p.layers_loaded for p in seen]
    assert loaded_layers == sorted(loaded_layers)
    assert loaded_layers[-1] == 30
    assert len(set(loaded_layers)) > 10, "progress came in one jump"
    info = engine.info
    assert info is not None
    assert (info.architecture, info.quantization, info.layers, info.vocab_size) == ("llama", "Q4_1", 30, 49152)
    assert info.context_tokens == info.context_trained == 8192, "the context is cut to what the model was trained for"
    assert (info.backend, info.devices, info.device_memory_bytes) == ("cpu", ["CPU"], 0)
    assert (info.bos_token, info.eos_token, info.eos_id) == ("<|im_start|>", "<|im_end|>", 2)
    assert info.chat_template
    assert "<|im_start|>" in info.chat_template
    assert info.metadata["buffers_mib"]["CPU"] > 100, "KV cache of 8192 tokens"


def test_engine_continuation_class_tells_apart_what_differs(model_path: Path) -> None:
    async def classes() -> list[tuple[str, int]]:
        found = []
        for changes in ({}, {"slots": 2}, {"kv_type": "q8_0"}, {"cpu_variant": "haswell"}):
            async with running(model_path, **changes) as engine:
                assert engine.info is not None
                found.append((engine.info.continuation_class, engine.info.metadata["exact_context_tokens"]))
        return found

    base, slots, q8, avx2 = asyncio.run(classes())
    assert base == slots
    assert len({base[0], q8[0], avx2[0]}) == 3
    assert (base[1], q8[1]) == (256, 1024)


def test_engine_admits_slots_and_queue_then_refuses(model_path: Path) -> None:
    """Refusals come before any event; everyone admitted is served; then all is free again."""

    async def run() -> None:
        async with running(model_path, queue_max=1, slots=2) as engine:
            jobs = [asyncio.create_task(ask(engine, "Once upon a time", max_tokens=40)) for _ in range(5)]
            results = await asyncio.gather(*jobs, return_exceptions=True)
            refused = [r for r in results if isinstance(r, AllSlotsBusy)]
            assert len(refused) == 2
            assert refused[0].details == {"slots_total": 2, "slots_busy": 2, "queued": 1}
            texts = {r.text for r in results if not isinstance(r, BaseException)}
            assert len(texts) == 1
            assert engine.slots_busy == 0

    asyncio.run(run())


def test_engine_refuses_what_does_not_fit(model_path: Path) -> None:
    async def run() -> None:
        async with running(model_path, context_tokens=256) as engine:
            with pytest.raises(PromptTooLong) as e:
                await ask(engine, "word " * 400)
            assert (e.value.details["prompt_tokens"], e.value.details["context_tokens"]) == (401, 256)
            with pytest.raises(RequestError) as bad:
                await ask(engine, "Hello", [49152])
            assert bad.value.details == {"field": "continue_from.generated_ids"}
            filled = await ask(engine, "word " * 200, max_tokens=1000, ignore_eos=True)
            assert filled.reason == StopReason.MAX_TOKENS
            assert filled.started is not None
            assert filled.started.prompt_tokens + len(filled.tokens) == 257  # the last token needs no room itself
            exact = await ask(engine, "word" + " word" * 254, max_tokens=5)
            assert exact.started is not None
            assert exact.started.prompt_tokens == 255
            assert engine.slots_busy == 0

    asyncio.run(run())


def test_engine_cancel_frees_the_slot_at_once(model_path: Path) -> None:
    """While decoding, while a long prompt is evaluated, and while waiting: nobody gets what would have come."""

    async def run() -> None:
        async with running(model_path, queue_max=1, slots=1, prompt_block_tokens=32) as engine:
            for prompt, wait_for, most in (("Hi", TokenOut, 900), (LONG, Started, 100)):
                async with aclosing(each(engine, request(prompt, max_tokens=most, ignore_eos=True))) as events:
                    async for event in events:
                        if isinstance(event, wait_for):
                            break
                await until_free(engine)
                ended = engine.said[-1][2]
                assert ended["stop_reason"] == StopReason.CANCELLED
                assert ended["tokens_out"] < most
            engine.said.clear()
            with standing_still(engine.pid):
                running_one = asyncio.create_task(ask(engine, "Once upon a time", max_tokens=30))
                await until(lambda: engine.slots_busy == 1)
                waiting = asyncio.create_task(ask(engine, "never begun"))
                await until(lambda: engine.slots_busy == 2)
                waiting.cancel()
                await asyncio.wait({waiting})
            assert len((await running_one).tokens) == 30
            await until_free(engine)
            ends = [(payload["stop_reason"], payload["tokens_out"]) for kind, _, payload in engine.said if kind == "finished"]
            assert ends == [(StopReason.CANCELLED, 0), (StopReason.MAX_TOKENS, 30)]

    asyncio.run(run())


def test_engine_cancel_ends_the_evaluation_of_a_prompt_within_its_block(model_path: Path) -> None:
    """The prompt is one block of thousands of tokens; what a cancelled evaluation has not finished is not in the cache."""

    async def run() -> None:
        long = "word " * 3000
        async with running(model_path, slots=1, queue_max=1, context_tokens=3200, prompt_block_tokens=3200) as engine:
            before = await ask(engine, "Once upon a time", max_tokens=8)
            async with aclosing(each(engine, request(long, max_tokens=5))) as events:
                assert isinstance(await anext(events), Started)
            again = await ask(engine, long[:600] + "the end", max_tokens=1)
            assert again.started is not None
            assert again.started.cached_tokens == 0, "the whole block was evaluated before the cancellation was heard"
            assert (await ask(engine, "Once upon a time", max_tokens=8)).ids == before.ids

    asyncio.run(run())


def test_engine_running_stream_is_not_held_up_by_a_long_prompt(model_path: Path) -> None:
    """Between any two tokens of a stream lies at most one block of somebody else's prompt."""

    async def run() -> None:
        async with running(model_path, slots=2, prompt_block_tokens=64, stream_gap_s=0.001) as engine:
            stream, newcomer = request("Once upon a time", max_tokens=400, ignore_eos=True), request(LONG, max_tokens=1)
            async with aclosing(each(engine, stream)) as events:
                await anext(events)
                await anext(events)
                assert (await gathered(engine, newcomer)).reason == StopReason.MAX_TOKENS
            told = [(kind, owner) for kind, owner, _ in engine.said]
            begun, ended = told.index(("started", newcomer.request_id)), told.index(("finished", newcomer.request_id))
            during = told[begun:ended].count(("token", stream.request_id))
            assert during >= 900 // (64 + 63), "the stream stood still while the prompt was evaluated"

    asyncio.run(run())


def test_engine_slow_reader_slows_nobody(model_path: Path) -> None:
    """A stream that is not read at all neither blocks the others nor loses its own tokens."""

    async def run() -> None:
        async with running(model_path, slots=2) as engine:
            slow = each(engine, request("Once upon a time", max_tokens=60))
            assert isinstance(await anext(slow), Started)
            fast = await ask(engine, "Once upon a time", max_tokens=60)
            await until_free(engine)  # the unread stream ends as well
            rest = [event.token_id async for event in slow if isinstance(event, TokenOut)]
            assert rest == fast.ids

    asyncio.run(run())


def usage(engine: ProcessEngine) -> list[tuple[int, int]]:
    """Threads and descriptors of the front and of the engine."""
    assert engine.pid is not None
    return [(p.num_threads(), p.num_fds()) for p in (psutil.Process(), psutil.Process(engine.pid))]


def test_engine_fifty_cancels_leave_nothing(model_path: Path) -> None:
    async def run() -> None:
        async with running(model_path) as engine:
            await asyncio.gather(*(ask(engine, f"Number {i}", temperature=1, max_tokens=4) for i in range(4)))
            before, tasks, memory = usage(engine), len(asyncio.all_tasks()), psutil.Process(engine.pid).memory_info().rss
            for i in range(50):
                async with aclosing(each(engine, request(f"Story {i}", temperature=1, max_tokens=100))) as events:
                    async for event in events:
                        if isinstance(event, TokenOut) or i % 2:
                            break
                await until_free(engine)
            await until(lambda: (usage(engine), len(asyncio.all_tasks())) == (before, tasks))
            assert psutil.Process(engine.pid).memory_info().rss - memory < 8 << 20

    asyncio.run(run())


def test_engine_two_hundred_random_requests_and_cancels_leave_nothing(model_path: Path) -> None:
    """Prompts that share beginnings, all ways to choose a token, left at any moment: texts, slots, threads, memory."""
    rng = random.Random(3)  # noqa: S311
    beginning = " ".join(f"Item {i} costs {3 * i} coins." for i in range(12))
    prompts = ["Once upon a time", f"{beginning} The total is", f"{beginning} The shop", "Bees"]
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 1.1, "seed": 3, "top_p": 0.9},
        {"repetition_penalty": 1.2, "logprobs": 2},
        {"json_schema": {"type": "object"}, "temperature": 1, "seed": 2},
        {"grammar": "root ::= [a-z ]*", "stop": ["e"]},
    ]

    async def run() -> None:
        async with running(model_path, queue_max=200, slots=4, context_tokens=256, kv_type="q8_0") as engine:
            cases = [(p, w) for p in prompts for w in range(len(ways))]
            answers = await asyncio.gather(*(ask(engine, p, max_tokens=6, **ways[w]) for p, w in cases))
            expected = dict(zip(cases, (a.ids for a in answers), strict=True))
            before, memory = usage(engine), psutil.Process(engine.pid).memory_info().rss

            async def one(prompt: str, way: int, leave_after: int) -> None:
                ids = []
                async with aclosing(each(engine, request(prompt, max_tokens=6, **ways[way]))) as events:
                    async for event in events:
                        if isinstance(event, TokenOut):
                            ids.append(event.token_id)
                        if len(ids) == leave_after:
                            break
                whole = expected[prompt, way]
                assert ids == whole[: min(leave_after, len(whole))]

            picked = [(*rng.choice(cases), rng.choice([0, 0, 1, 2, 99])) for _ in range(200)]
            await asyncio.gather(*(one(*p) for p in picked))
            await until_free(engine)
            await until(lambda: usage(engine) == before)
            assert psutil.Process(engine.pid).memory_info().rss - memory < 16 << 20
            assert (await ask(engine, prompts[0], max_tokens=6)).ids == expected[prompts[0], 0]

    asyncio.run(run())


def test_engine_serves_eight_clients_for_as_long_as_they_like(model_path: Path) -> None:
    """Each client asks, reads, embeds and leaves in turns; every answer is the one that it got alone.

    RBEE_SOAK_ROUNDS lengthens it.
    """
    rounds = int(os.environ.get("RBEE_SOAK_ROUNDS", "2"))
    ways: list[dict[str, Any]] = [{}, {"temperature": 1, "seed": 9}, {"json_schema": {}}, {"stop": [" the"]}]

    async def run() -> None:
        async with running(model_path, queue_max=8, slots=4, kv_type="q8_0") as engine:
            prompts = [f"Client {n} wants to know" for n in range(8)]
            alone = [await ask(engine, p, max_tokens=8, **ways[n % 4]) for n, p in enumerate(prompts)]
            await engine.embed(["bees"])
            before = usage(engine)

            async def client(n: int) -> None:
                for turn in range(rounds):
                    answer = await ask(engine, prompts[n], max_tokens=8, **ways[n % 4])
                    assert answer.ids == alone[n].ids
                    if (n + turn) % 3 == 0:
                        async with aclosing(each(engine, request(LONG, max_tokens=50))) as events:
                            assert isinstance(await anext(events), Queued | Started)
                    elif n % 2:
                        assert len((await engine.embed([prompts[n]])).vectors) == 1

            await asyncio.gather(*(client(n) for n in range(8)))
            await until_free(engine)
            await until(lambda: usage(engine) == before)

    asyncio.run(run())


def test_engine_reports_that_its_loop_moves(model_path: Path) -> None:
    """Idle or busy the step age begins anew, again and again; a stopped process lets it grow."""

    async def renewed(engine: ProcessEngine) -> None:
        """Return when the engine has been heard of once more."""
        heard = time.monotonic() - engine.step_age_s
        await until(lambda: time.monotonic() - engine.step_age_s > heard + 0.05)

    async def run() -> None:
        async with running(model_path) as engine:
            for _ in range(3):
                await renewed(engine)
            busy = asyncio.create_task(ask(engine, "Hi", max_tokens=60, ignore_eos=True))
            await renewed(engine)
            await busy
            with standing_still(engine.pid):
                await until(lambda: engine.step_age_s > 1.5)
            await renewed(engine)
            assert (await ask(engine, "Hi", max_tokens=2)).tokens

    asyncio.run(run())


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGABRT, signal.SIGILL])
def test_engine_death_reaches_every_stream(model_path: Path, sig: signal.Signals) -> None:
    async def run() -> None:
        async with running(model_path, slots=2, queue_max=1) as engine:
            streams = [asyncio.create_task(ask(engine, "Once upon a time", max_tokens=1000, ignore_eos=True)) for _ in range(3)]
            await until(lambda: engine.slots_busy == 3)
            assert engine.pid is not None
            os.kill(engine.pid, sig)
            async with asyncio.timeout(60):
                reason = await engine.wait_dead()
                results = await asyncio.gather(*streams, return_exceptions=True)
            assert sig.name in reason
            assert [str(r) for r in results if isinstance(r, WorkerCrashed)] == [reason] * 3
            assert (engine.progress.stage, engine.progress.error) == ("failed", reason)
            assert engine.slots_busy == 0
            with pytest.raises(WorkerCrashed):
                await ask(engine, "after the end")

    asyncio.run(run())


def test_engine_close_ends_the_process_and_is_idempotent(model_path: Path) -> None:
    async def run() -> None:
        async with running(model_path) as engine:
            stream = asyncio.create_task(ask(engine, LONG))
            await until(lambda: engine.slots_busy == 1)
            async with asyncio.timeout(60):
                await engine.close()
                await engine.close()
            assert engine.pid is not None
            assert not psutil.pid_exists(engine.pid)
            with pytest.raises(WorkerCrashed):
                await stream

    asyncio.run(run())


def test_engine_dies_with_its_parent(model_path: Path) -> None:
    program = """
        import asyncio, sys
        sys.path.insert(0, sys.argv[2])
        from engine_bench import config, loaded
        from rbee_serve.worker.engine.process import ProcessEngine

        async def main():
            engine = ProcessEngine(config(sys.argv[1]))
            await engine.start()
            await loaded(engine)
            print(engine.pid, flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(model_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        engine.wait(timeout=60)


def _failed(config_: EngineConfig, load_timeout_s: float = 60) -> LoadProgress:
    async def run() -> LoadProgress:
        engine = ProcessEngine(config_, load_timeout_s=load_timeout_s)
        await engine.start()
        try:
            progress = await loaded(engine)
            assert await asyncio.wait_for(engine.wait_dead(), 60) == progress.error
            return progress
        finally:
            await engine.close()

    return asyncio.run(run())


def _says(progress: LoadProgress, code: str, words: Iterable[str]) -> None:
    assert (progress.stage, progress.error_code) == ("failed", code)
    for word in words:
        assert word in str(progress.error)


@pytest.mark.S29
def test_engine_bad_model_file_says_path_and_reason(model_path: Path, tmp_path: Path) -> None:
    missing, text, header, cut = (tmp_path / name for name in ("missing.gguf", "text.gguf", "header.gguf", "cut.gguf"))
    whole = model_path.read_bytes()
    text.write_text("I am no model")
    header.write_bytes(whole[:1000])
    cut.write_bytes(whole[: len(whole) // 2])
    cases: list[tuple[Path, list[Any]]] = [
        (missing, ["No such file"]),
        (text, ["not a GGUF", "b'I am'", "b'GGUF'"]),
        (header, ["header"]),
        (cut, ["not within the file bounds"]),
    ]
    for path, words in cases:
        _says(_failed(config(path)), "MODEL_FILE_INVALID", [str(path), *words])


@pytest.mark.E40
def test_engine_never_falls_back_to_the_cpu(model_path: Path) -> None:
    """This build has no CUDA: the engine must say so, not run on the CPU."""
    _says(_failed(config(model_path, backend="cuda", device=1)), "BACKEND_UNAVAILABLE", ["cuda, device 1", "sees 0", "CPU"])
    _says(_failed(config(model_path, cpu_variant="pentium")), "BACKEND_UNAVAILABLE", ["pentium", "haswell"])


def test_engine_loading_has_a_limit(model_path: Path) -> None:
    _says(_failed(config(model_path), load_timeout_s=0.01), "LOADING_TIMEOUT", ["not loaded after"])


def test_what_an_engine_says_right_before_its_end_is_heard(model_path: Path) -> None:
    """It has failed before the front listens, and has not read all that it was told: the kernel calls that a reset."""
    words = pack({"failed": {"message": "no room", "code": "INSUFFICIENT_RAM"}})
    script = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).sendall(bytes.fromhex(sys.argv[2])); sys.exit(1)"
    child = EngineChild.__new__(EngineChild)
    child.connection, theirs = socket.socketpair()
    child.connection.sendall(b"unread")
    with theirs:
        fd = theirs.fileno()
        child.process = subprocess.Popen(
            [sys.executable, "-c", script, str(fd), words.hex()], pass_fds=[fd], stderr=subprocess.PIPE
        )
    child.told = True
    os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOWAIT)

    async def run() -> LoadProgress:
        engine = ProcessEngine(config(model_path), child=child)
        await engine.start()
        async with asyncio.timeout(60):
            await engine.wait_dead()
        await engine.close()
        return engine.progress

    progress = asyncio.run(run())
    assert (progress.stage, progress.error_code, progress.error) == ("failed", "INSUFFICIENT_RAM", "no room")
