"""Streams that outlive their connection: a client that lost it fetches the rest (``Last-Event-ID``).

Only for requests that ask for it (``X-Rbee-Reattach: SECONDS``): for all others a client that leaves means that nobody
wants the answer, and its slot is freed at once. A stream that may be fetched again is read by a task of its own onto a tape
and sent from there to whoever is attached, numbered by ``id:`` lines. It ends when nobody was attached for that long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from rbee_serve.contract.errors import InvalidRequest, RequestNotFound
from rbee_serve.contract.events import DONE
from rbee_serve.queen.relay import Stream

logger = logging.getLogger(__name__)


class Tape:
    """The frames of one stream from its first on. Frame n has ``id: n``, counted from 0."""

    def __init__(self, tapes: Tapes, stream: Stream, keep_s: float) -> None:
        self.stream, self.keep_s = stream, keep_s
        self.size = 0
        self._tapes = tapes
        self._frames: list[bytes] = []
        self._done = False
        self._more = asyncio.Event()
        self._readers = 0
        self._timer: asyncio.TimerHandle | None = None
        self._recorder = asyncio.ensure_future(self._record())

    async def _record(self) -> None:
        try:
            async with contextlib.aclosing(self.stream.events()) as batches:
                async for batch in batches:
                    for frame, _ in batch:
                        self._add(b"id: %d\n%b" % (len(self._frames), frame))
        finally:
            self._add(DONE)
            self._done = True

    def _add(self, frame: bytes) -> None:
        self._frames.append(frame)
        self.size += len(frame)
        self._more.set()
        self._more = asyncio.Event()

    def attach(self) -> None:
        """Somebody reads; ``detach`` must follow."""
        self._readers += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def detach(self) -> None:
        """A reader has gone; when it was the last one and nobody comes in time, the stream ends and is forgotten."""
        self._readers -= 1
        if not self._readers:
            self._timer = asyncio.get_running_loop().call_later(self.keep_s, self._tapes.drop, self)

    async def read(self, first: int) -> AsyncGenerator[bytes]:
        """Yield what there is from frame ``first`` on, as it comes."""
        while True:
            more, done, count = self._more, self._done, len(self._frames)
            if first < count:
                yield b"".join(self._frames[first:count])
                first = count
            elif done:
                return
            else:
                await more.wait()

    async def aclose(self) -> None:
        """End the stream; its worker's slot is free."""
        if self._timer is not None:
            self._timer.cancel()
        self._recorder.cancel()
        await asyncio.wait((self._recorder,))
        await self.stream.aclose()


@dataclass(slots=True)
class Tapes:
    """All tapes; together at most ``max_bytes``, beyond which no request gets one."""

    max_keep_s: float
    max_bytes: int = 67_108_864
    _tapes: dict[str, Tape] = field(default_factory=dict)
    _closing: set[asyncio.Task[None]] = field(default_factory=set)

    def wanted_s(self, header: str | None) -> float | None:
        """Return for how long the client wants its stream kept, at most as long as the queen allows."""
        if header is None:
            return None
        try:
            seconds = float(header)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < 86_400:
            raise InvalidRequest("X-Rbee-Reattach: seconds expected, more than 0", field="X-Rbee-Reattach")
        return min(seconds, self.max_keep_s)

    def record(self, stream: Stream, keep_s: float) -> Tape | None:
        """Put the stream onto a tape; None when there is no room, and then it ends with its connection as others do."""
        if sum(t.size for t in self._tapes.values()) >= self.max_bytes:
            logger.warning("no room to keep a stream for its client", extra={"request_id": stream.id})
            return None
        tape = self._tapes[stream.id] = Tape(self, stream, keep_s)
        return tape

    def find(self, request_id: str, key: str) -> Tape:
        """Return a tape of this key's; raises RequestNotFound, also for another key's."""
        tape = self._tapes.get(request_id)
        if tape is None or tape.stream.key != key:
            raise RequestNotFound(
                "no stream of this id is kept",
                hint="send X-Rbee-Reattach with the request, and come back within that time",
                request_id=request_id,
            )
        return tape

    def drop(self, tape: Tape) -> None:
        """Forget a tape and end its stream."""
        self._tapes.pop(tape.stream.id, None)
        task = asyncio.ensure_future(tape.aclose())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def aclose(self) -> None:
        """Forget all."""
        for tape in list(self._tapes.values()):
            self.drop(tape)
        await asyncio.gather(*self._closing, return_exceptions=True)


class Attached:
    """A response that reads from a tape, and has left it when it ends, also when not one byte was read."""

    def __init__(self, response: ASGIApp, tape: Tape) -> None:
        self._response, self._tape = response, tape
        tape.attach()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await self._response(scope, receive, send)
        finally:
            self._tape.detach()
