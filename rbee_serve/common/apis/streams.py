"""What every API is built on: one generation as a stream of events, read into parts; several of them at once.

Queen and worker give the same interface (``Backend``); everything above it knows neither.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from rbee_serve.common.apis.tool_calls import Arguments, Call, Parser, Text, parser_of
from rbee_serve.common.http import deadline_of, while_connected
from rbee_serve.contract.api import InferenceRequest
from rbee_serve.contract.errors import AllSlotsBusy, RateLimited, RbeeError, RequestTimeout
from rbee_serve.contract.events import Event

ApiName = Literal["native", "openai", "ollama", "anthropic"]

logger = logging.getLogger(__name__)

#: What is read ahead of several streams together.
_QUEUE_MAX = 64
#: Pauses in which an answer that was refused a slot asks again, seconds: the first, and the longest of those that double.
#: Each time is a whole request to whoever places it.
_ASK_S, _ASK_MAX_S = 0.1, 2.0


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

    @property
    def request_timeout_s(self) -> float | None:
        """Longest time for a request that names none; None: there is no limit."""

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
        """Yield what each batch brings; the very last part is End or Failed. Closes the stream."""
        try:
            async with aclosing(self.stream.events()) as batches:
                async for batch in batches:
                    parts: list[Part] = []
                    for _, event in batch:
                        parts += self._part(event)
                        if _is_last(parts):  # also before the stream's own end: what follows is not for the client
                            break
                    if parts:
                        yield parts
                        if _is_last(parts):
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


def _is_last(parts: Sequence[Part]) -> bool:
    return bool(parts) and isinstance(parts[-1], End | Failed)


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
    when one of them ends. All of them together have the time that one alone has. ``open`` first, then ``parts``; ``aclose`` in
    any case.
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
        self._tasks = [asyncio.create_task(self._run_all(self._deadline()))]
        await self._until(lambda: self._failure is not None or not self._queue.empty())
        if self._failure is not None and 0 not in self.readings:
            raise self._failure
        return self.readings[0].stream

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    def _deadline(self) -> float | None:
        """Return when one answer alone would have to be complete, by the clock of the running loop."""
        timeout_s = self._requests[0].timeout_s
        left = [self._backend.request_timeout_s if timeout_s is None else timeout_s]
        if (deadline := deadline_of(self._http)) is not None:
            left.append(deadline - time.time())
        left_s = min((s for s in left if s is not None), default=None)
        return None if left_s is None else asyncio.get_running_loop().time() + left_s

    async def _run_all(self, deadline: float | None) -> None:
        limit = asyncio.timeout_at(deadline)
        try:
            async with limit:
                await self._begin_all()
                await self._until(lambda: self._failure is not None or self._ended == len(self._requests))
        except Exception as e:
            await self._fail(self._late() if limit.expired() else e)

    def _late(self) -> RbeeError:
        n = len(self._requests)
        return RequestTimeout(
            f"the deadline of the request has passed after {self._ended} of {n} answers",
            hint="ask for fewer answers at once, for fewer tokens, or with a later deadline",
        )

    async def _begin_all(self) -> None:
        """Let one begin after the other: at most one of them waits in a queue, where it would be in others' way."""
        n, pause_s = 0, _ASK_S
        while n < len(self._requests) and self._failure is None:
            refusal = await self._begin(n)
            if refusal is None:
                n, pause_s = n + 1, _ASK_S
                continue
            least_s = refusal.details.get("retry_after_s", 0) if isinstance(refusal, RateLimited) else 0
            await self._one_ends(max(pause_s, least_s))
            pause_s = min(2 * pause_s, _ASK_MAX_S)

    async def _begin(self, n: int) -> RbeeError | None:
        """Return when it has its slot or has ended; or why it was refused one that it may get later."""
        try:
            reading = await self._open(n)
        except RbeeError as e:
            if self._may_wait(e):
                return e
            raise
        begun: asyncio.Future[RbeeError | None] = asyncio.get_running_loop().create_future()
        self._tasks.append(asyncio.create_task(self._run(n, reading, begun)))
        return await begun

    def _may_wait(self, refusal: RbeeError) -> bool:
        """Whether an answer may ask again: the first is refused as one alone is, the others take what becomes free."""
        return isinstance(refusal, AllSlotsBusy | RateLimited) and self._running + self._ended > 0

    async def _one_ends(self, within_s: float) -> None:
        ended = self._ended
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._until(lambda: self._failure is not None or self._ended > ended)

    async def _open(self, n: int) -> Reading:
        request = self._requests[n]
        stream = await self._backend.open(self._http, request, self._api)
        self.readings[n] = Reading(stream, request, parallel_calls=self._parallel_calls)
        return self.readings[n]

    async def _run(self, n: int, reading: Reading, begun: asyncio.Future[RbeeError | None]) -> None:
        """Read it; ``begun``: None, or why it was refused a slot that it may get later."""
        try:
            async with aclosing(reading.parts()) as batches:
                async for parts in batches:
                    last = parts[-1]
                    if not begun.done():
                        if isinstance(last, Failed) and self._may_wait(last.error):
                            del self.readings[n]
                            begun.set_result(last.error)
                            return
                        if not isinstance(last, Waiting):
                            self._running += 1
                            begun.set_result(None)
                    if isinstance(last, Failed):
                        self._failure = self._failure or last.error  # no other one begins
                    await self._queue.put((n, parts))
                    self._news.set()
        except Exception as e:
            await self._fail(e, n)
        finally:
            if not begun.done():
                begun.set_result(None)
            elif not begun.cancelled() and begun.result() is None:
                self._running -= 1
                self._ended += 1
                self._news.set()

    async def _fail(self, error: Exception, n: int = 0) -> None:
        """End all with the failure of one; what concerns none more than the others is told as the first one's."""
        if not isinstance(error, RbeeError):
            logger.error("one generation of several failed", exc_info=error)
            error = RbeeError("internal error; the log of the service has the details under this correlation id")
        self._failure = self._failure or error
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
                if isinstance(parts[-1], Waiting):  # it may be refused yet, and ask again
                    continue
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
