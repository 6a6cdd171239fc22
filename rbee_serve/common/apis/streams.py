"""What every API is built on: one generation as a stream of events, read into parts; several of them at once.

Queen and worker give the same interface (``Backend``); everything above it knows neither.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from rbee_serve.common.apis.tool_calls import Arguments, Call, Parser, Text, parser_of
from rbee_serve.common.http import while_connected
from rbee_serve.contract.api import InferenceRequest
from rbee_serve.contract.errors import AllSlotsBusy, RateLimited, RbeeError
from rbee_serve.contract.events import Event

ApiName = Literal["native", "openai", "ollama", "anthropic"]

logger = logging.getLogger(__name__)

#: What is read ahead of several streams together.
_QUEUE_MAX = 64
#: How often a request that has lost its last slot to another client, and has answers to give yet, asks for one.
_ASK_S = 0.1


class Stream(Protocol):
    """One generation at a worker or through the queen. Read ``events`` once; ``aclose`` in any case.

    ``events`` never raises RbeeError: a failure is the last event, and then ``error``.
    """

    id: str
    error: RbeeError | None

    @property
    def model(self) -> str:
        """Id of the model that answers."""

    def events(self) -> AsyncGenerator[Sequence[tuple[Any, Event]], None]:
        """Yield batches of (what the queen passes on, event)."""

    async def aclose(self) -> None:
        """Free what it holds. Idempotent."""


@dataclass(frozen=True)
class Model:
    """A model that can be asked. ``created``: seconds since the epoch; ``info``: WorkerRecord.model_info."""

    id: str
    ref: str | None
    created: int
    context_tokens: int | None
    info: Mapping[str, Any]
    loaded: bool = True
    device_bytes: int = 0  # of accelerators' memory


@dataclass(frozen=True)
class Embeddings:
    """One vector of length 1 an input, in order, as float32 (little-endian); ``headers`` go with the answer."""

    model: str
    vectors: list[bytes]
    prompt_tokens: int
    headers: Mapping[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """Who generates: this worker's engine, or a fleet behind a queen."""

    @property
    def ping_interval_s(self) -> float:
        """Pause between comment pings on a silent stream."""

    async def open(self, http: Request, request: InferenceRequest, api: ApiName) -> Stream:
        """Open a stream while watching the client; raises RbeeError."""

    async def embed(self, http: Request, model: str, inputs: Sequence[str | Sequence[int]], api: ApiName) -> Embeddings:
        """Return a vector for each text or list of token ids, while watching the client; raises RbeeError."""

    async def count(self, http: Request, request: InferenceRequest) -> int:
        """Return how many tokens the prompt of the request has; raises RbeeError."""

    def headers(self, stream: Stream) -> dict[str, str]:
        """Return the headers that go with an answer."""

    def models(self, http: Request | None = None) -> list[Model]:
        """Return what can be asked for, by id; with a request: what its sender may ask for."""

    def model(self, name: str) -> Model:
        """Return one model by any of its names; raises ModelNotFound."""

    def fits(self, model: str) -> int:
        """Return the tokens to ask for when a client names no limit."""


@dataclass(frozen=True, slots=True)
class Began:
    """The generation has its slot; the reading has the figures of its prompt. Comes once, first."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The generation waits: for a slot, or for a worker that loads (the queen's ``queued`` and ``loading`` events)."""

    event: Event


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of text with its log probabilities (``lp`` of contract.events.token)."""

    text: str
    lp: dict[str, Any]


@dataclass(frozen=True, slots=True)
class End:
    """The generation ended well; the figures are those of its reading."""

    stop_reason: str
    stop_sequence: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The generation ended with an error."""

    error: RbeeError


Part = Began | Waiting | Text | Token | Call | Arguments | End | Failed


class Reading:
    """One stream while it is read: its figures so far, and its events as parts."""

    def __init__(self, stream: Stream, request: InferenceRequest, *, parallel_calls: bool = True) -> None:
        self.stream = stream
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.tokens_out = 0
        self.prompt_ms = 0.0
        self.decode_ms = 0.0
        self.seed: int | None = request.seed
        self.called = False  # whether it has called a tool
        self._tools = request.tools if request.tool_choice != "none" else None
        self._parallel = parallel_calls
        self._parser: Parser | None = None

    async def parts(self) -> AsyncGenerator[list[Part], None]:
        """Yield what each batch brings; the last part is End or Failed. Closes the stream."""
        try:
            async with aclosing(self.stream.events()) as batches:
                async for batch in batches:
                    parts: list[Part] = []
                    for _, event in batch:
                        parts += self._part(event)
                    if parts:
                        yield parts
                        if isinstance(parts[-1], End | Failed):
                            return
        finally:
            await self.stream.aclose()

    def _part(self, event: Event) -> Sequence[Part]:
        kind = event["type"]
        if kind == "token":
            self.tokens_out += 1
            if self._parser is not None:
                return self._parsed(self._parser.push(event["t"]))
            if (lp := event.get("lp")) is not None:
                return (Token(event["t"], lp),)
            return (Text(event["t"]),) if event["t"] else ()
        if kind == "started":
            self.prompt_tokens = event.get("prompt_tokens", 0)
            self.cached_tokens = event.get("cached_tokens", 0)
            self.seed = event.get("seed", self.seed)
            if self._tools and self._parser is None:
                self._parser = parser_of(event.get("tool_format"), [tool.function.name for tool in self._tools])
            return (Began(),)
        if kind == "end":
            self.tokens_out = event.get("tokens_out", self.tokens_out)
            self.prompt_ms = event.get("prompt_time_ms", 0.0)
            self.decode_ms = event.get("decode_time_ms", 0.0)
            left = self._parsed(self._parser.close()) if self._parser is not None else []
            if left and isinstance(left[-1], End):
                return left
            return [*left, End(str(event["stop_reason"]), event.get("stop_sequence"))]
        if kind == "error":
            return (Failed(self.stream.error or RbeeError(str(event.get("message")))),)
        if kind in ("queued", "loading"):
            return (Waiting(event),)
        return ()

    def _parsed(self, found: list[Text | Call | Arguments]) -> list[Part]:
        parts: list[Part] = []
        for part in found:
            if isinstance(part, Call):
                if self.called and not self._parallel:
                    # The client takes one call at a time: the rest would be of no use to it.
                    return [*parts, End("EOS")]
                self.called = True
            parts.append(part)
        return parts


@dataclass
class Answer:
    """A generation that was read to its end."""

    reading: Reading
    text: str = ""
    tokens: list[dict[str, Any]] = field(default_factory=list)  # lp of each token
    calls: list[dict[str, Any]] = field(default_factory=list)  # id, name, arguments (JSON text)
    stop_reason: str = ""
    stop_sequence: str | None = None  # the one of the client's that has come

    def add(self, parts: Sequence[Part]) -> None:
        """Take in parts; raises the error with which the generation failed, with the partial text."""
        for part in parts:
            if isinstance(part, Text):
                self.text += part.text
            elif isinstance(part, Token):
                self.text += part.text
                self.tokens.append(part.lp)
            elif isinstance(part, Call):
                self.calls.append({"id": part.id, "name": part.name, "arguments": ""})
            elif isinstance(part, Arguments):
                self.calls[part.index]["arguments"] += part.text
            elif isinstance(part, End):
                self.stop_reason, self.stop_sequence = part.stop_reason, part.stop_sequence
            elif isinstance(part, Failed):
                raise part.error.with_details(partial_text=self.text, tokens_out=self.reading.tokens_out)


class Generations:
    """One generation or several of one HTTP request, each placed, queued and failed over on its own.

    Of several the first needs a slot at once, as one alone does. The others begin in turn, as slots become free: at the latest
    when one of them ends. ``open`` first, then ``parts``; ``aclose`` in any case.
    """

    def __init__(
        self, backend: Backend, http: Request, requests: Sequence[InferenceRequest], api: ApiName, *, parallel_calls: bool = True
    ) -> None:
        self._backend, self._http, self._requests, self._api = backend, http, requests, api
        self._parallel_calls = parallel_calls
        self.readings: dict[int, Reading] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[tuple[int, list[Part]]] = asyncio.Queue(_QUEUE_MAX)
        self._news = asyncio.Event()
        self._failure: RbeeError | None = None
        self._running = self._ended = 0  # of several: that have begun and not ended, and that have ended

    async def open(self) -> Stream:
        """Return the first stream; raises what kept it from being opened.

        Several are read as soon as they are open, or those that wait in a queue would wait for those that nobody reads.
        """
        if len(self._requests) == 1:
            return (await self._open(0)).stream
        self._tasks = [asyncio.create_task(self._begin_all())]
        await self._until(lambda: self._failure is not None or not self._queue.empty())
        if self._failure is not None:
            raise self._failure
        return self.readings[0].stream

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    async def _begin_all(self) -> None:
        """Let one begin after the other: at most one of them waits in a queue, where it would be in others' way."""
        n = 0
        try:
            while n < len(self._requests):
                if await self._begin(n):
                    n += 1
                else:
                    await self._one_ends()
        except Exception as e:
            await self._fail(n, e)

    async def _begin(self, n: int) -> bool:
        """Return when it has its slot or has ended, False where it was refused one that another of us gives back in time."""
        try:
            reading = await self._open(n)
        except (AllSlotsBusy, RateLimited) as e:
            if self._may_wait(e):
                return False
            raise
        begun: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._tasks.append(asyncio.create_task(self._run(n, reading, begun)))
        return await begun

    def _may_wait(self, refusal: RbeeError) -> bool:
        if isinstance(refusal, AllSlotsBusy):
            return self._running + self._ended > 0
        return isinstance(refusal, RateLimited) and self._running > 0  # by what a key may run at once

    async def _one_ends(self) -> None:
        if not self._running:  # somebody else was faster when the last one ended
            await asyncio.sleep(_ASK_S)
            return
        ended = self._ended
        await self._until(lambda: self._ended > ended)

    async def _open(self, n: int) -> Reading:
        request = self._requests[n]
        stream = await self._backend.open(self._http, request, self._api)
        self.readings[n] = Reading(stream, request, parallel_calls=self._parallel_calls)
        return self.readings[n]

    async def _run(self, n: int, reading: Reading, begun: asyncio.Future[bool]) -> None:
        try:
            async with aclosing(reading.parts()) as batches:
                async for parts in batches:
                    last = parts[-1]
                    if not begun.done():
                        if isinstance(last, Failed) and self._may_wait(last.error):
                            del self.readings[n]
                            begun.set_result(False)
                            return
                        if not isinstance(last, Waiting):
                            self._running += 1
                            begun.set_result(True)
                    await self._queue.put((n, parts))
                    self._news.set()
        except Exception as e:
            await self._fail(n, e)
        finally:
            if not begun.done():
                begun.set_result(True)
            elif begun.result():
                self._running -= 1
                self._ended += 1
                self._news.set()

    async def _fail(self, n: int, error: Exception) -> None:
        if not isinstance(error, RbeeError):
            logger.error("one generation of several failed", exc_info=error)
            error = RbeeError("internal error; the log of the service has the details under this correlation id")
        self._failure = error
        self._news.set()
        await self._queue.put((n, [Failed(error)]))

    async def parts(self) -> AsyncGenerator[tuple[int, list[Part]], None]:
        """Yield (which generation, what came) until all have ended, or one has failed."""
        if not self._tasks:
            async with aclosing(self.readings[0].parts()) as batches:
                async for parts in batches:
                    yield 0, parts
            return
        running = len(self._requests)
        while running:
            n, parts = await self._queue.get()
            yield n, parts
            if isinstance(parts[-1], Failed):
                return
            if isinstance(parts[-1], End):
                running -= 1

    async def collect(self) -> list[Answer]:
        """Read all to their ends; raises the first failure."""
        answers: dict[int, Answer] = {}
        async with aclosing(self.parts()) as batches:
            async for n, parts in batches:
                if n not in answers and n in self.readings:
                    answers[n] = Answer(self.readings[n])
                if n not in answers:
                    raise self._failure or RbeeError("a generation gave an answer before it was opened")
                answers[n].add(parts)
        return [answers[n] for n in sorted(answers)]

    async def aclose(self) -> None:
        """End what still runs and free all. Idempotent."""
        for task in self._tasks:  # the first begins the others
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for reading in self.readings.values():
            await reading.stream.aclose()


async def opened(
    backend: Backend, http: Request, requests: Sequence[InferenceRequest], api: ApiName, *, parallel_calls: bool = True
) -> tuple[Generations, Stream]:
    """Return opened generations and the first of their streams, while watching the client; raises RbeeError."""
    generations = Generations(backend, http, requests, api, parallel_calls=parallel_calls)
    try:
        # One alone is watched by the backend.
        first = await generations.open() if len(requests) == 1 else await while_connected(http, generations.open())
    except BaseException:
        await generations.aclose()
        raise
    return generations, first


class Closing:
    """A response that closes its generations in any case, also when not one byte of it was read."""

    def __init__(self, response: ASGIApp, generations: Generations) -> None:
        self._response, self._generations = response, generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await self._response(scope, receive, send)
        finally:
            await self._generations.aclose()
