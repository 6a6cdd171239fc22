"""One try at one worker: open its stream, read its events, tell a dead worker from one that says no.

Every outbound call has explicit limits: connect, first byte, silence within the stream, deadline (SPEC 3.8, E-31).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from rbee_serve.contract.errors import ConnectionTimeout, MalformedResponse, RbeeError, RequestTimeout, WorkerCrashed
from rbee_serve.contract.events import SseParser
from rbee_serve.queen.registry import Worker

#: (payload as the worker sent it, the same decoded); the payload of [DONE] is not among them.
Batch = list[tuple[str, dict[str, Any]]]

_MAX_ERROR_BODY = 65_536


class TryFailedError(Exception):
    """This worker did not serve the request; another one may.

    ``error`` is what the client gets when nobody else can; ``broken`` means that the worker is not fit for routing.
    """

    def __init__(self, error: RbeeError, *, broken: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.broken = broken


class CancelledByRequestError(Exception):
    """``Attempt.cancel`` was called."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds."""

    connect_s: float
    first_byte_s: float
    stall_s: float


def make_client(limits: Limits) -> httpx.AsyncClient:
    """Return the pooled client for all workers. The environment's proxies are not for a private network."""
    return httpx.AsyncClient(
        # Reads are limited here per purpose (first byte, silence, deadline), so httpx need not do it a second time.
        timeout=httpx.Timeout(None, connect=limits.connect_s),
        # Shorter than the workers' own keep-alive time (75 s): who lets go first must be we, or requests meet a closing socket.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=30.0),
        trust_env=False,
        follow_redirects=False,
    )


def _by_code() -> dict[str, type[RbeeError]]:
    found: dict[str, type[RbeeError]] = {}
    todo: list[type[RbeeError]] = [RbeeError]
    while todo:
        cls = todo.pop()
        found.setdefault(cls.code, cls)
        todo += cls.__subclasses__()
    return found


def error_of(status: int, body: bytes, worker_id: str) -> RbeeError:
    """Rebuild the error that a worker answered with; one that is not ours becomes MalformedResponse."""
    try:
        error = orjson.loads(body)["error"]
        cls = _by_code()[error["code"]]
        details = {k: v for k, v in error.get("details", {}).items() if k != "hint"}
        return cls(str(error["message"]), hint=error.get("hint"), **details)
    except (ValueError, KeyError, TypeError, AttributeError):
        return MalformedResponse(f"worker {worker_id} answered HTTP {status} without an error of ours", worker_id=worker_id)


class Attempt:
    """A request at one worker. ``deadline`` is a time of the running loop's clock."""

    def __init__(self, client: httpx.AsyncClient, token: str | None, limits: Limits, worker: Worker, deadline: float) -> None:
        self.worker = worker
        self._client = client
        self._token = token
        self._limits = limits
        self._deadline = deadline
        self._response: httpx.Response | None = None
        self._waiting: asyncio.Timeout | None = None
        self._cancelled = False
        self._complete = False

    async def open(self, body: bytes, headers: dict[str, str]) -> None:
        """Send the request and wait for the answer's headers: the worker has a slot for it then.

        ``headers`` are added to those of content and authentication. Raises TryFailedError, RequestTimeout,
        CancelledByRequestError, or the worker's own error when the request is at fault.
        """
        headers = headers | {"content-type": "application/json", "accept": "text/event-stream"}
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token}"
        response = await self._send(body, headers)
        if response.status_code != 200:
            try:
                await self._refused(response)
            finally:
                await self.aclose()

    async def _send(self, body: bytes, headers: dict[str, str]) -> httpx.Response:
        url = f"{self.worker.record.url.rstrip('/')}/v1/inference"
        for again in (True, False):
            request = self._client.build_request("POST", url, content=body, headers=headers)
            try:
                async with self._limit(self._limits.connect_s + self._limits.first_byte_s):
                    self._response = await self._client.send(request, stream=True)
                return self._response
            except TimeoutError as e:
                raise self._out_of_time("did not answer", self._limits.first_byte_s) from e
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as e:
                # A kept connection that the worker had just closed looks the same as a worker that died: ask once more
                # on a fresh one. Nothing was delivered yet, so nothing can be delivered twice.
                if not again:
                    raise self._broken("closed the connection without an answer", e) from e
            except httpx.HTTPError as e:
                raise self._broken("could not be reached", e) from e
        raise AssertionError("unreachable")

    async def _refused(self, response: httpx.Response) -> None:
        try:
            async with self._limit(self._limits.first_byte_s):
                body = b""
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > _MAX_ERROR_BODY:
                        break
        except TimeoutError as e:
            raise self._out_of_time("did not finish its answer", self._limits.first_byte_s) from e
        except httpx.HTTPError as e:
            raise self._broken("broke off its answer", e) from e
        error = error_of(response.status_code, body, self.worker.id)
        if response.status_code in (401, 403):
            refused = MalformedResponse(
                f"worker {self.worker.id} refused the queen's fleet token",
                hint="queen and workers hold different tokens; run site.yml again to bring them in line",
                worker_id=self.worker.id,
            )
            raise TryFailedError(refused, broken=True)
        if response.status_code >= 500 or isinstance(error, MalformedResponse):
            raise TryFailedError(error, broken=False)
        raise error

    async def batches(self) -> AsyncGenerator[Batch]:
        """Yield the events of each piece that arrives; an empty batch is a sign of life (a ping).

        Ends when the worker closes the stream. Raises TryFailedError, RequestTimeout and CancelledByRequestError.
        """
        assert self._response is not None  # noqa: S101 -- open() comes first
        parser = SseParser()
        pieces = self._response.aiter_raw()
        stall_s = self._limits.stall_s
        while True:
            try:
                async with self._limit(stall_s):
                    piece = await anext(pieces)
            except StopAsyncIteration:
                self._complete = True
                return
            except TimeoutError as e:
                raise self._out_of_time("sent nothing", stall_s) from e
            except httpx.HTTPError as e:
                raise self._broken("broke off the stream", e) from e
            try:
                batch = [(payload, orjson.loads(payload)) for payload in parser.feed(piece) if payload != "[DONE]"]
            except orjson.JSONDecodeError as e:
                raise self._broken("sent an event that is not JSON", e) from e
            yield batch

    def cancel(self) -> None:
        """End the attempt from outside: whoever waits for the worker gets CancelledByRequestError at once."""
        self._cancelled = True
        if self._waiting is not None:
            with contextlib.suppress(RuntimeError):  # that wait is over: the next one looks at the flag
                self._waiting.reschedule(0.0)

    async def aclose(self) -> None:
        """Close the connection; the worker frees the slot (SPEC CAP-76). Idempotent."""
        response, self._response = self._response, None
        if response is not None:
            # In a task of its own: a second cancellation (the client leaves while its DELETE is being carried out) would
            # end httpcore's clean-up half-way, with everything marked closed but the socket.
            await asyncio.shield(asyncio.ensure_future(self._close(response)))

    async def _close(self, response: httpx.Response) -> None:
        await response.aclose()
        stream = response.extensions.get("network_stream")
        if stream is not None and not self._complete:  # a socket that goes back to the pool must stay open
            await stream.aclose()

    def _limit(self, seconds: float) -> asyncio.Timeout:
        if self._cancelled:
            raise CancelledByRequestError
        self._waiting = asyncio.timeout_at(min(self._deadline, asyncio.get_running_loop().time() + seconds))
        return self._waiting

    def _out_of_time(self, what: str, limit_s: float) -> Exception:
        if self._cancelled:
            return CancelledByRequestError()
        if asyncio.get_running_loop().time() >= self._deadline:
            return RequestTimeout("the deadline of the request has passed", hint="ask for fewer tokens or a longer timeout_s")
        error = ConnectionTimeout(f"worker {self.worker.id} {what} for {limit_s:g} s", worker_id=self.worker.id)
        return TryFailedError(error, broken=True)

    def _broken(self, what: str, cause: Exception) -> TryFailedError:
        error = WorkerCrashed(
            f"worker {self.worker.id} {what} ({type(cause).__name__})",
            hint=f"rbee-ctl worker get {self.worker.id}; its journal says why",
            worker_id=self.worker.id,
        )
        return TryFailedError(error, broken=True)
