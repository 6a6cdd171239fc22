"""A real engine process on the demonstration model, for the tests beside this file."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rbee_serve.contract.api import SamplingParams
from rbee_serve.worker.engine.process import ProcessEngine
from rbee_serve.worker.engine.protocol import (
    EngineConfig,
    EngineEvent,
    Finished,
    GenerateRequest,
    LoadProgress,
    Started,
    TokenOut,
)


def config(model: Path, **changes: Any) -> EngineConfig:
    """One thread: the number does not change any bit, and tests keep their speed on a busy machine."""
    base = EngineConfig(
        str(model), None, "cpu", 0, slots=4, context_tokens=1024, threads=1, prompt_block_tokens=128, kv_type="f16"
    )
    return replace(base, **changes)


async def loaded(engine: ProcessEngine) -> LoadProgress:
    """Return the state in which loading ended."""
    progress = engine.progress
    while progress.stage not in ("ready", "failed"):
        progress = await engine.wait_progress(progress)
    return progress


class RecordedEngine(ProcessEngine):
    """Keeps what the engine said of its requests, in the order in which it said it: how late we hear it changes nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.said: list[tuple[str, str, Any]] = []

    def _deliver(self, kind: str, request_id: str, payload: Any) -> None:
        self.said.append((kind, request_id, payload))
        super()._deliver(kind, request_id, payload)


@asynccontextmanager
async def running(model: Path, queue_max: int = 0, **changes: Any) -> AsyncIterator[RecordedEngine]:
    """A loaded engine, ended afterwards."""
    engine = RecordedEngine(config(model, **changes), queue_max)
    await engine.start()
    try:
        progress = await loaded(engine)
        assert progress.stage == "ready", progress
        yield engine
    finally:
        await engine.close()


@dataclass
class Answer:
    """What one generation gave."""

    started: Started | None = None
    tokens: list[TokenOut] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def text(self) -> str:
        return "".join(t.text for t in self.tokens)

    @property
    def ids(self) -> list[int]:
        return [t.token_id for t in self.tokens]

    @property
    def reason(self) -> str | None:
        return self.finished.stop_reason if self.finished else None


_numbers = iter(range(1, 1 << 30))


def request(prompt: str, generated: Sequence[int] = (), **params: Any) -> GenerateRequest:
    """A request with a fresh id; greedy unless said otherwise."""
    values = {"max_tokens": 32, "temperature": 0, "seed": 1, **params}
    return GenerateRequest(f"r{next(_numbers)}", prompt, True, True, SamplingParams(**values), list(generated))


async def each(engine: ProcessEngine, asked: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
    """Yield the events of a request one by one."""
    async with aclosing(engine.generate(asked)) as batches:
        async for batch in batches:
            for event in batch:
                yield event


async def ask(engine: ProcessEngine, prompt: str, generated: Sequence[int] = (), **params: Any) -> Answer:
    """Run one generation to its end."""
    return await gathered(engine, request(prompt, generated, **params))


async def gathered(engine: ProcessEngine, asked: GenerateRequest) -> Answer:
    """Run a request to its end."""
    answer = Answer()
    async for event in each(engine, asked):
        if isinstance(event, Started):
            answer.started = event
        elif isinstance(event, TokenOut):
            answer.tokens.append(event)
        elif isinstance(event, Finished):
            answer.finished = event
    return answer


async def until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    """Wait for a condition that no event announces."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def until_free(engine: ProcessEngine) -> None:
    """Wait for the engine to say that all slots are free."""
    await until(lambda: engine.slots_busy == 0)


def directly(model: Path, cases: Sequence[dict[str, Any]]) -> list[str]:
    """Texts that llama-cpp-python's high-level class gives, in a process of its own with the same CPU kernels.

    A case is the arguments of ``create_completion``; flash attention is on, as in the engine.
    """
    program = """
        import json, sys
        import llama_cpp
        from rbee_serve.worker.engine import libs
        libs.load_cpu_variant(llama_cpp.llama_cpp)
        texts = []
        llm = llama_cpp.Llama(sys.argv[1], n_ctx=1024, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)
        for case in json.load(sys.stdin):
            llm.reset()  # nothing of the case before is reused: that would change bits
            texts.append(llm.create_completion(**case)["choices"][0]["text"])
        json.dump(texts, sys.stdout)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(model)]
    done = subprocess.run(command, input=json.dumps(list(cases)), capture_output=True, text=True, check=True, timeout=240)
    texts: list[str] = json.loads(done.stdout)
    return texts
