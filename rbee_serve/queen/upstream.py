"""One try at one worker: open its stream, read its events, tell a dead worker from one that says no.

Every outbound call has explicit limits: connect, first byte, silence within the stream, deadline (SPEC 3.8, E-31).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import orjson

from rbee_serve.contract.api import REQUEST_ID_HEADER
from rbee_serve.contract.errors import BY_CODE, ConnectionTimeout, MalformedResponse, RbeeError, RequestTimeout, WorkerCrashed
from rbee_serve.contract.events import Event
from rbee_serve.queen.http_client import Answer, BrokenError, Client, WokenError
from rbee_serve.queen.registry import Worker

#: (frame as the worker sent it, the event in it); [DONE] and comments are not among them.
Batch = list[tuple[bytes, Event]]

_MAX_ERROR_BODY = 65_536
#: A frame that is longer is no event of ours.
_MAX_FRAME = 4_194_304
#: How long a worker that has taken a request may take to say what it found in its cache. It is there at once, but for a prompt
#: whose beginning is being evaluated for another request; who waited longer would delay the answer's headers.
_FIRST_EVENT_S = 0.25


class TryFailedError(Exception):
    """This worker did not serve the request; another one may.

    ``error`` is what the client gets when nobody else can; ``broken`` means that the worker is not fit for routing.
    """

    def __init__(self, error: RbeeError, *, broken: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.broken = broken


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds."""

    connect_s: float
    first_byte_s: float
    stall_s: float


def error_of(status: int, body: bytes, worker_id: str) -> RbeeError:
    """Rebuild the error that a worker answered with; one that is not ours becomes MalformedResponse."""
    try:
        error = orjson.loads(body)["error"]
        cls = BY_CODE[error["code"]]
        details = {k: v for k, v in error.get("details", {}).items() if k != "hint"}
        return cls(str(error["message"]), hint=error.get("hint"), **details)
    except (ValueError, KeyError, TypeError, AttributeError):
        return MalformedResponse(f"worker {worker_id} answered HTTP {status} without an error of ours", worker_id=worker_id)


class Attempt:
    """A request at one worker. ``deadline`` is a time of the running loop's clock."""

    def __init__(self, client: Client, token: str | None, limits: Limits, worker: Worker, deadline: float) -> None:
        self.worker = worker
        self._client = client
        self._token = token
        self._limits = limits
        self._deadline = deadline
        self._answer: Answer | None = None
        self._first: Batch | None = None  # read while opening
        self._rest = b""  # an event that is not complete yet
        self._silent_s = 0.0  # waited for since the last sign of progress
        self._decoding = False

    async def open(self, body: bytes, headers: dict[str, str]) -> None:
        """Send the request and wait for the answer's headers: the worker has taken it then.

        ``headers`` are added to those of content and authentication. Raises TryFailedError, RequestTimeout, or the
        worker's own error when the request is at fault.
        """
        headers = headers | {"content-type": "application/json", "accept": "text/event-stream"}
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token}"
        try:
            answer = await self._send(body, headers)
            if answer.status != 200:
                await self._refused(answer)
            await self._read_first(answer)
        except BaseException:
            self.close()
            raise

    async def _send(self, body: bytes, headers: dict[str, str]) -> Answer:
        url = f"{self.worker.record.url.rstrip('/')}/v1/inference"
        loop = asyncio.get_running_loop()
        for fresh in (False, True):
            until = min(self._deadline, loop.time() + self._limits.connect_s + self._limits.first_byte_s)
            try:
                async with asyncio.timeout_at(until):
                    self._answer = await self._client.send("POST", url, body, headers, fresh=fresh)
                await self._answer.head(until)
                return self._answer
            except TimeoutError as e:
                raise self._out_of_time(until, "did not answer", self._limits.first_byte_s) from e
            except BrokenError as e:
                # A kept connection that the worker had just closed looks the same as a worker that died: ask once more
                # on a fresh one. Nothing was delivered yet, so nothing can be delivered twice. By another name: a worker that
                # was cut off has the request still, until it sees that nobody listens.
                if fresh or not e.stale:
                    raise self._broken("did not answer", e) from e
                self.close()
                if REQUEST_ID_HEADER in headers:
                    headers = headers | {REQUEST_ID_HEADER: f"{headers[REQUEST_ID_HEADER]}-again"}
        raise AssertionError("unreachable")

    async def _read_first(self, answer: Answer) -> None:
        """Read the first event, which says how much of the prompt was cached; without it if it is late."""
        now = asyncio.get_running_loop().time()
        try:
            data = await answer.read(min(self._deadline, now + _FIRST_EVENT_S))
            if not data:
                raise self._broken("closed the stream", BrokenError("before its first event"))
            self._first = self._parse(data)
        except TimeoutError:
            self._silent_s = _FIRST_EVENT_S
        except BrokenError as e:
            raise self._broken("broke off the stream", e) from e

    async def _refused(self, answer: Answer) -> None:
        until = min(self._deadline, asyncio.get_running_loop().time() + self._limits.first_byte_s)
        body = b""
        try:
            while (piece := await answer.read(until)) and len(body) <= _MAX_ERROR_BODY:
                body += piece
        except TimeoutError as e:
            raise self._out_of_time(until, "did not finish its answer", self._limits.first_byte_s) from e
        except BrokenError as e:
            raise self._broken("broke off its answer", e) from e
        error = error_of(answer.status, body, self.worker.id)
        if answer.status in (401, 403):
            refused = MalformedResponse(
                f"worker {self.worker.id} refused the queen's fleet token",
                hint="queen and workers hold different tokens; run site.yml again to bring them in line",
                worker_id=self.worker.id,
            )
            raise TryFailedError(refused, broken=True)
        if answer.status >= 500 or isinstance(error, MalformedResponse):
            raise TryFailedError(error, broken=False)
        raise error

    @property
    def first(self) -> Batch:
        """Events that came while opening; ``batch`` returns them again."""
        return self._first or []

    async def batch(self) -> Batch | None:
        """Return the next events, at least one; None when the worker has closed the stream.

        A worker that evaluates a prompt shows life by pings; one that decodes only by events, so that a front cannot hide
        an engine that hangs. Raises TryFailedError, RequestTimeout and WokenError (by ``wake``; nothing is lost).
        """
        answer, stall_s = self._answer, self._limits.stall_s
        assert answer is not None  # noqa: S101 -- open() comes first
        if self._first:
            first, self._first = self._first, None
            return first
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            until = min(self._deadline, began + stall_s - self._silent_s)
            try:
                data = await answer.read(until)
            except WokenError:
                self._silent_s += loop.time() - began
                raise
            except TimeoutError as e:
                raise self._out_of_time(until, "made no token" if self._decoding else "sent nothing", stall_s) from e
            except BrokenError as e:
                raise self._broken("broke off the stream", e) from e
            if not data:
                return None
            batch = self._parse(data)
            # Time in which nobody asked (a slow client) does not count.
            self._silent_s = 0.0 if batch or not self._decoding else self._silent_s + loop.time() - began
            if batch:
                return batch

    def _parse(self, data: bytes) -> Batch:
        *frames, self._rest = (self._rest + data if self._rest else data).split(b"\n\n")
        if len(self._rest) > _MAX_FRAME:
            raise self._malformed("sent an event without an end")
        batch: Batch = []
        try:
            for frame in frames:
                # Ours are "event: TYPE\ndata: JSON"; comments begin with a colon.
                at = frame.find(b"data: ")
                if at < 0 or frame.startswith(b":") or frame.startswith(b"[DONE]", at + 6):
                    continue
                event = orjson.loads(frame[at + 6 :])
                batch.append((frame + b"\n\n", event))
                if event["type"] == "token":
                    self._decoding = True
        except (orjson.JSONDecodeError, TypeError, KeyError) as e:
            raise self._malformed("sent an event that cannot be read") from e
        return batch

    def wake(self) -> None:
        """Make whoever waits for the worker, or waits next, get WokenError."""
        if self._answer is not None:
            self._answer.wake()

    def close(self) -> None:
        """Close the connection; the worker frees the slot (SPEC CAP-76). Idempotent."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()

    def _out_of_time(self, until: float, what: str, limit_s: float) -> Exception:
        """Return whose time is up: the request's own, or the worker's. Not asked of the clock: a timer may be early by less
        than the clock can tell, and a worker must not count as failed because a client was in a hurry."""
        if until >= self._deadline:
            return RequestTimeout("the deadline of the request has passed", hint="ask for fewer tokens or a longer timeout_s")
        error = ConnectionTimeout(f"worker {self.worker.id} {what} for {limit_s:g} s", worker_id=self.worker.id)
        return TryFailedError(error, broken=True)

    def _malformed(self, what: str) -> TryFailedError:
        return TryFailedError(MalformedResponse(f"worker {self.worker.id} {what}", worker_id=self.worker.id), broken=True)

    def _broken(self, what: str, cause: BrokenError) -> TryFailedError:
        error = WorkerCrashed(
            f"worker {self.worker.id} {what} ({cause})",
            hint=f"rbee-ctl worker get {self.worker.id}; its journal says why",
            worker_id=self.worker.id,
        )
        return TryFailedError(error, broken=True)
