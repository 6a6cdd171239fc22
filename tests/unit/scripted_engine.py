"""An engine that follows a script: for unit tests of the worker's front, which must not depend on a model."""

from __future__ import annotations

import asyncio
import dataclasses
import struct
from collections.abc import AsyncIterator, Callable, Sequence

from rbee_serve.contract.errors import AllSlotsBusy, RbeeError, WorkerCrashed
from rbee_serve.worker.engine.protocol import (
    Embeddings,
    EngineEvent,
    EngineInfo,
    EngineTotals,
    Finished,
    GenerateRequest,
    LoadProgress,
    Queued,
    Started,
    TokenOut,
)

INFO = EngineInfo(
    architecture="llama",
    quantization="Q4_1",
    parameters=1000,
    size_bytes=1000,
    layers=4,
    vocab_size=500,
    context_trained=2048,
    context_tokens=1024,
    slots=2,
    bos_token="<s>",
    eos_token="</s>",
    eos_id=2,
    chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
    backend="cpu",
    devices=["CPU"],
    device_memory_bytes=0,
    threads=1,
    engine_version="scripted",
    continuation_class="c1",
    metadata={"exact_context_tokens": 511},
)


class ScriptedEngine:
    """Gives the words of ``text`` as tokens; with ``endless`` it stays silent after them until it is closed
    or ``released``."""

    def __init__(
        self,
        text: str = "one two three",
        *,
        slots: int = 2,
        endless: bool = False,
        loaded: bool = True,
        template: str | None = INFO.chat_template,
    ) -> None:
        self._template = template
        self.words = [w + " " for w in text.split()]
        self.slots, self.endless = slots, endless
        self.refusal: RbeeError | None = None
        self.breaks_after: int | None = None
        self.requests: list[GenerateRequest] = []
        self.running: set[str] = set()
        self.granted: asyncio.Event | None = None  # requests wait for it before they start
        self.released = asyncio.Event()
        self.at_once = False  # all of an answer comes together
        self.closed = False
        self.age_s = 0.0
        self._progress = LoadProgress("starting")
        self._info: EngineInfo | None = None
        self._news = asyncio.Event()
        self._dead: asyncio.Future[str] | None = None
        if loaded:
            self.load()

    def load(self) -> None:
        self._info = dataclasses.replace(INFO, chat_template=self._template)
        self.report(LoadProgress("ready", INFO.layers, INFO.layers))

    def report(self, progress: LoadProgress) -> None:
        self._progress = progress
        self._news.set()
        self._news = asyncio.Event()

    def die(self, reason: str) -> None:
        self.report(LoadProgress("failed", 0, 0, reason, WorkerCrashed.code))
        if self._dead is not None:
            self._dead.set_result(reason)

    async def start(self) -> None:
        self._dead = asyncio.get_running_loop().create_future()

    @property
    def progress(self) -> LoadProgress:
        return self._progress

    async def wait_progress(self, seen: LoadProgress) -> LoadProgress:
        while self._progress == seen:
            await self._news.wait()
        return self._progress

    @property
    def info(self) -> EngineInfo | None:
        return self._info

    @property
    def slots_busy(self) -> int:
        return len(self.running)

    @property
    def step_age_s(self) -> float:
        return self.age_s

    @property
    def totals(self) -> EngineTotals:
        return EngineTotals(2.0, 1.5, 9, 6)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Sequence[EngineEvent]]:
        if self.refusal is not None:
            raise self.refusal
        if len(self.running) >= self.slots:
            raise AllSlotsBusy("all slots are busy", slots_total=self.slots, slots_busy=len(self.running))
        self.requests.append(request)
        self.running.add(request.request_id)
        try:
            if self.at_once:
                tokens = [TokenOut(i, 100 + i, word) for i, word in enumerate(self.words)]
                yield [Queued(), Started(prompt_tokens=7, cached_tokens=3), *tokens, Finished("EOS", len(tokens), 1.0, 2.0)]
                return
            if self.granted is not None:
                yield [Queued()]
                await self.granted.wait()
            yield [Started(prompt_tokens=7, cached_tokens=3)]
            done = len(request.generated_ids)
            for index, word in enumerate(self.words[: request.params.max_tokens]):
                if self.breaks_after == index:
                    raise WorkerCrashed("the engine process was killed by SIGKILL")
                if index >= done:
                    yield [TokenOut(index, 100 + index, word)]
            if self.endless:
                await self.released.wait()
            yield [Finished("EOS", len(self.words), 1.0, 2.0)]
        finally:
            self.running.discard(request.request_id)

    async def tokenize(self, text: str, *, parse_special: bool, add_bos: bool) -> list[int]:
        return list(range(len(text.split())))

    async def detokenize(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        return " ".join(f"<{i}>" if special else str(i) for i in token_ids)

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> Embeddings:
        if self.refusal is not None:
            raise self.refusal
        sizes = [len(i.split()) if isinstance(i, str) else len(i) for i in inputs]
        return Embeddings([struct.pack("<2f", 1, 0) for _ in inputs], sizes)

    async def wait_dead(self) -> str:
        assert self._dead is not None
        return await asyncio.shield(self._dead)

    async def close(self) -> None:
        self.closed = True


async def until(condition: Callable[[], object], limit_s: float = 5.0) -> None:
    """Return when ``condition`` is true; fail after ``limit_s``."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - what is watched has no event
            await asyncio.sleep(0.001)
