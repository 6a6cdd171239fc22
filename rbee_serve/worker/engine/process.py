"""The front's side of the engine process: spawn, messages, one queue a stream, and an honest obituary."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import logging
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from rbee_serve.contract.api import SamplingParams
from rbee_serve.contract.errors import (
    AllSlotsBusy,
    CudaDeviceFailed,
    InferenceFailed,
    InvalidRequest,
    LoadingTimeout,
    RbeeError,
    WorkerCrashed,
    WorkerLoading,
    from_envelope,
)
from rbee_serve.worker.engine import failures
from rbee_serve.worker.engine.memory import oom_kills
from rbee_serve.worker.engine.protocol import (
    Embeddings,
    EngineConfig,
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
from rbee_serve.worker.engine.spawn import EngineChild, Forked
from rbee_serve.worker.engine.wire import Unpacker, configuration, pack

_log = logging.getLogger(__name__)

#: Seconds that an engine has to write its prefixes to disk before it is killed.
_PARK_S = 10.0


class _Stream:
    """Events of one request between the connection and its consumer. At most max_tokens + 2 are ever held."""

    def __init__(self) -> None:
        self._events: list[EngineEvent] = []
        self._error: RbeeError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: EngineEvent | RbeeError) -> None:
        """Add an event; an error is the last."""
        if isinstance(event, RbeeError):
            self._error = event
        else:
            self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> list[EngineEvent]:
        """Return all that has come since, at least one event; raises the error when nothing comes before it any more."""
        while not self._events:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events = self._events, []
        return events


class _Connection(asyncio.Protocol):
    """The front's end of the engine's connection. What came before a reset is read all the same: an engine that ends at once,
    because the model has no room, leaves what it was told meanwhile unread, and that is a reset."""

    def __init__(self, heard: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        self._heard, self._lost = heard, lost

    def data_received(self, data: bytes) -> None:
        """Pass on what came, in the same turn of the event loop."""
        self._heard(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the end."""
        self._lost()


def _ended(process: subprocess.Popen[bytes] | Forked, loop: asyncio.AbstractEventLoop) -> asyncio.Future[int]:
    """Return the exit code of a process to come."""
    future, fd = loop.create_future(), os.pidfd_open(process.pid)

    def ended() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        future.set_result(process.wait())

    loop.add_reader(fd, ended)
    return future


class ProcessEngine:
    """Implementation of protocol.Engine. It never restarts its process: systemd restarts the worker."""

    def __init__(
        self, config: EngineConfig, queue_max: int = 0, load_timeout_s: float = 300.0, child: EngineChild | None = None
    ) -> None:
        """``queue_max`` requests may wait beyond the slots; loading that takes longer than ``load_timeout_s`` fails.
        ``child``: the process, where it has been begun already."""
        self._config, self._queue_max, self._load_timeout_s = config, queue_max, load_timeout_s
        self._progress = LoadProgress("starting")
        self._progress_changed = asyncio.Event()
        self._info: EngineInfo | None = None
        self._streams: dict[str, _Stream] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._vectors: dict[int, list[bytes]] = {}  # of embedding requests, as far as they are there
        self._embedding = 0
        self._numbers = itertools.count(1)
        self._last_words: deque[str] = deque(maxlen=4)  # of the engine's stderr: an assert says there what it found
        self._heard = time.monotonic()
        self._totals = EngineTotals()
        self._child = child
        self._ended: asyncio.Future[int] | None = None  # the process's exit code
        self._stderr: asyncio.BaseTransport | None = None
        self._connection: asyncio.Transport | None = None
        self._unpacker = Unpacker()
        self._lost = asyncio.Event()
        self._unreadable = False
        self._tasks: list[asyncio.Task[None]] = []
        self._dead: asyncio.Future[str] | None = None
        self._closing = False
        self._oom_kills = oom_kills()

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Spawn the process and begin loading; returns at once."""
        loop = asyncio.get_running_loop()
        child = self._child = self._child or EngineChild()
        self._ended = _ended(child.process, loop)
        self._heard = time.monotonic()
        self._dead = loop.create_future()
        self._connection, _ = await loop.create_connection(lambda: _Connection(self._read, self._lost.set), sock=child.connection)
        errors = asyncio.StreamReader()
        self._stderr, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(errors), child.process.stderr)
        if not child.told:
            self._write(configuration(self._config))
        listener = asyncio.create_task(self._listen(errors))
        self._tasks = [asyncio.create_task(self._bury(listener)), asyncio.create_task(self._limit_loading()), listener]

    async def close(self) -> None:
        """End the process (idempotent): close the connection, wait until it has ended by itself, else kill.

        It has 2 s, and where it writes prefixes to disk as long as that may take.
        """
        self._closing = True
        for task in self._tasks:
            task.cancel()
        if self._connection is not None:
            self._connection.close()
        if self._ended is not None:
            parks = self._config.prefix_store_dir is not None and self._info is not None
            await asyncio.wait({self._ended}, timeout=_PARK_S if parks else 2)
            self._kill()
            await self._ended
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._stderr is not None:
            self._stderr.close()
        self._fail_all(WorkerCrashed("the engine was stopped"))

    async def wait_dead(self) -> str:
        """Return when the process has ended without having been asked to: the reason for a person."""
        if self._dead is None:
            raise RuntimeError("the engine was not started")
        return await asyncio.shield(self._dead)

    @property
    def pid(self) -> int | None:
        """Process id of the engine, once started."""
        return self._child.process.pid if self._child else None

    @property
    def progress(self) -> LoadProgress:
        """Current state of loading. After a crash: stage ``failed`` with the reason."""
        return self._progress

    async def wait_progress(self, seen: LoadProgress) -> LoadProgress:
        """Return the progress as soon as it differs from ``seen``."""
        while self._progress == seen:
            await self._progress_changed.wait()
        return self._progress

    @property
    def info(self) -> EngineInfo | None:
        """What was loaded; None before ``ready``."""
        return self._info

    @property
    def slots_busy(self) -> int:
        """Requests that hold a slot or wait for one."""
        return len(self._streams)

    @property
    def step_age_s(self) -> float:
        """Seconds since the engine's loop last reported that it moves."""
        return time.monotonic() - self._heard

    @property
    def totals(self) -> EngineTotals:
        """What the engine has done, as it said last."""
        return self._totals

    # --- requests -----------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Sequence[EngineEvent]]:
        """Submit and yield what comes of it; see protocol.Engine."""
        self._require_ready()
        total = self._config.slots
        if len(self._streams) >= total + self._queue_max:
            raise AllSlotsBusy(
                f"all {total} slots are busy" + (f" and {self._queue_max} requests wait" if self._queue_max else ""),
                slots_total=total,
                slots_busy=min(total, len(self._streams)),
                queued=self._queue_max,
            )
        if request.request_id in self._streams:
            raise InferenceFailed(f"request id {request.request_id} is already running", request_id=request.request_id)
        body = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
        params = {name: getattr(request.params, name) for name in SamplingParams.model_fields}
        body["params"] = params | {"logit_bias": list(request.params.logit_bias.items())}
        try:
            message = pack({"submit": body})
        except TypeError as e:  # orjson writes 254 levels
            raise InvalidRequest(f"the request can not be passed on to the engine: {e}") from e
        stream = self._streams[request.request_id] = _Stream()
        try:
            self._write(message)
            events: list[EngineEvent] = []
            while not events or not isinstance(events[-1], Finished):
                events = await stream.get()
                yield events
        finally:
            # The slot counts as taken until the engine has said that it is free: admission stays exact.
            if self._streams.get(request.request_id) is stream:
                self._send({"cancel": request.request_id})

    def _require_ready(self) -> None:
        if self._progress.stage == "failed" or self._closing:
            raise WorkerCrashed(self._progress.error or "the engine was stopped")
        if self._info is None:
            raise WorkerLoading("the model is still loading", stage=self._progress.stage)

    async def tokenize(self, text: str, *, parse_special: bool, add_bos: bool) -> list[int]:
        """Return token ids."""
        question = {"text": text, "parse_special": parse_special, "add_bos": add_bos}
        ids: list[int] = await self._ask({"tokenize": question})
        return ids

    async def detokenize(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of token ids; see protocol.Engine."""
        text: str = await self._ask({"detokenize": list(token_ids), "special": special})
        return text

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> Embeddings:
        """Return vectors; see protocol.Engine. Cancelling the call ends the work within one block."""
        limit = self._config.slots + self._queue_max
        if self._embedding >= limit:
            raise AllSlotsBusy(f"{limit} embedding requests are running", slots_total=limit, slots_busy=limit)
        self._embedding += 1
        number = next(self._numbers)
        vectors = self._vectors[number] = [b""] * len(inputs)
        try:
            answer = await self._ask({"embed": list(inputs)}, number)
            return Embeddings(vectors, answer["tokens"])
        finally:
            self._embedding -= 1
            del self._vectors[number]

    async def _ask(self, question: dict[str, Any], number: int | None = None) -> Any:
        """Send a question under a number of its own and return the answer, or raise the error that it is."""
        self._require_ready()
        number = next(self._numbers) if number is None else number
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(question | {"number": number})
            return await future
        finally:
            if not future.done() or future.cancelled():
                self._send({"forget": number})
            self._answers.pop(number, None)

    # --- messages -----------------------------------------------------------------------------------------------

    def _send(self, message: Any) -> None:
        self._write(pack(message))

    def _write(self, data: bytes) -> None:
        if self._connection is not None and not self._connection.is_closing():
            self._connection.write(data)

    def _read(self, data: bytes) -> None:
        if self._unreadable:  # what comes after a message that is missing must not look like the whole
            return
        self._heard = time.monotonic()
        try:
            for message in self._unpacker.feed(data):
                self._dispatch(message)
        except Exception:
            self._unreadable = True
            _log.exception("a message of the engine could not be read; ending it")
            self._kill()

    async def _listen(self, errors: asyncio.StreamReader) -> None:
        """Log what the engine writes on stderr and keep its last lines: they tell why it died."""
        while True:
            try:
                line = await errors.readline()
            except ValueError:  # longer than the reader's buffer, and dropped; unread, the pipe would hold up the engine
                continue
            if not line:
                return
            if text := line.decode("utf-8", "replace").strip():
                _log.warning("%s", text, extra={"source": "engine"})
                self._last_words.append(text)

    def _kill(self) -> None:
        if self._child is not None and self._ended is not None and not self._ended.done():
            self._child.kill()

    def _dispatch(self, message: dict[str, Any]) -> None:
        for kind, request_id, payload in message.get("events", ()):
            self._deliver(kind, request_id, payload)
        if (totals := message.get("totals")) is not None:
            self._totals = EngineTotals(*totals)
        if (load := message.get("load")) is not None:
            self._set_progress(LoadProgress(**load))
        elif (ready := message.get("ready")) is not None:
            self._info = EngineInfo(**ready)
            total = message["layers_total"]
            self._set_progress(LoadProgress("ready", total, total))
        elif (failed := message.get("failed")) is not None:
            required = failed.get("details", {}).get("required_bytes", 0)
            self._set_progress(dataclasses.replace(self._failure(failed["message"], failed["code"]), required_bytes=required))
        elif (vectors := message.get("vectors")) is not None:
            self._take_vectors(self._vectors.get(message["number"]), message["of"], base64.b64decode(vectors))
        elif (number := message.get("number")) is not None:
            future = self._answers.get(number)
            if future is None or future.done():
                return
            if (refused := message.get("refused")) is not None:
                future.set_exception(from_envelope({"error": refused}, fallback="the engine refused"))
            else:
                future.set_result(message["answer"])

    @staticmethod
    def _take_vectors(vectors: list[bytes] | None, indices: list[int], data: bytes) -> None:
        if vectors is None:  # nobody waits for them any more
            return
        width = len(data) // len(indices)
        for n, index in enumerate(indices):
            vectors[index] = data[n * width : (n + 1) * width]

    def _deliver(self, kind: str, request_id: str, payload: Any) -> None:
        stream = self._streams.get(request_id)
        if stream is None:
            return
        if kind == "token":
            stream.put(TokenOut(*payload))
        elif kind == "started":
            stream.put(Started(**payload))
        elif kind == "queued":
            stream.put(Queued())
        elif kind == "finished":
            stream.put(Finished(**payload))
        else:
            stream.put(from_envelope({"error": payload}, fallback="the engine failed"))
        if kind in ("finished", "error"):  # not before: whoever waits must hear of an event that can not be read
            del self._streams[request_id]

    # --- endings ------------------------------------------------------------------------------------------------

    def _failure(self, message: str, code: str) -> LoadProgress:
        now = self._progress
        return LoadProgress("failed", now.layers_loaded, now.layers_total, message, code)

    def _set_progress(self, progress: LoadProgress) -> None:
        self._progress = progress
        self._progress_changed.set()
        self._progress_changed = asyncio.Event()

    async def _limit_loading(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._load_timeout_s):
                while self._progress.stage not in ("ready", "failed"):
                    await self.wait_progress(self._progress)
        except TimeoutError:
            now = self._progress
            error = LoadingTimeout(
                f"model not loaded after {time.monotonic() - began:.0f} s: {now.layers_loaded} of {now.layers_total} layers"
            )
            self._set_progress(self._failure(error.message, error.code))
            self._kill()

    async def _bury(self, listener: asyncio.Task[None]) -> None:
        """When the connection is lost, say why the process ended, to everyone who waits."""
        await self._lost.wait()
        if self._ended is None or self._dead is None or self._closing:
            return
        code = await asyncio.shield(self._ended)
        await asyncio.wait({listener}, timeout=1)
        if code < 0:
            reason = f"the engine process was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL and oom_kills() > self._oom_kills:
                reason = "out of memory: the kernel killed the engine process; the model needs more than MemoryMax= or the RAM"
        else:
            reason = f"the engine process ended with exit code {code}"
        if self._progress.stage == "failed" and self._progress.error:
            reason = self._progress.error
        else:
            if self._last_words:
                reason += f"; its last words: {' | '.join(self._last_words)}"
            self._set_progress(self._failure(reason, self._obituary()))
        self._dead.set_result(reason)
        self._fail_all(WorkerCrashed(reason))

    def _obituary(self) -> str:
        """Return the code of a process that ended without a word of its own: ggml answers a device's error with abort()."""
        found = failures.cause(self._last_words, self._config.backend) if self._config.backend != "cpu" else None
        return CudaDeviceFailed.code if found and found[0] is CudaDeviceFailed else WorkerCrashed.code

    def _fail_all(self, error: RbeeError) -> None:
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()
        for future in self._answers.values():
            if not future.done():
                future.set_exception(error)
