"""What both HTTP servers are built from: authentication, correlation ids, body limit, the one error shape, streams.

Pure ASGI throughout: Starlette's BaseHTTPMiddleware runs the endpoint in another task and would hide a client's
leaving from a running stream.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import orjson
from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbee_serve.common import bad_requests
from rbee_serve.common.bad_requests import BadRequests
from rbee_serve.common.log import correlation
from rbee_serve.contract.api import CORRELATION_HEADER, DEADLINE_HEADER
from rbee_serve.contract.errors import (
    BodyTooLarge,
    HeadersTooLarge,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    MissingApiKey,
    Overloaded,
    RbeeError,
    RequestCanceled,
    RequestTimeout,
    RouteNotFound,
)
from rbee_serve.contract.events import PING
from rbee_serve.contract.settings import Settings

# Draining is ours (serving.py): at SIGTERM sse-starlette would cut running streams (measured: 5 of 30 events arrived).
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

PUBLIC_PATHS = frozenset({"/health", "/v1/health"})
#: (token, path) -> who the caller is (then ``request.state.caller``), something false for a token that does not open the
#: path; raises RbeeError for one that no longer does. The comparison inside must take constant time.
Authenticator = Callable[[str, str], object | None]
#: (error, correlation id) -> body. Paths of foreign APIs answer errors as their own clients expect them.
ErrorShape = Callable[[RbeeError, str | None], dict[str, Any]]

_CORRELATION_KEY = CORRELATION_HEADER.lower().encode()
#: RFC 6750's b64token after exactly one space (SPEC E-18: other spellings of the scheme are refused).
_BEARER_RE = re.compile(r"Bearer ([A-Za-z0-9._~+/-]+=*)")
_TOKEN_RE = re.compile(r"[A-Za-z0-9._~+/-]+=*")
#: Deepest nesting of a body. Far over every real schema, far under the recursion limits of what reads it further on.
_DEPTH_MAX = 100
_NEVER_S = 1e8
_CORRELATION_RE = re.compile(r"[A-Za-z0-9._-]{1,128}")


def correlation_id() -> str | None:
    """Return the id of the request that is being handled, None outside of one."""
    return correlation.get()


class JsonResponse(Response):
    """JSON by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return orjson.dumps(content)


def deadline_of(request: Request) -> float | None:
    """Return the deadline that the request's header names, seconds since the epoch; raises InvalidRequest."""
    value = request.headers.get(DEADLINE_HEADER)
    if value is None:
        return None
    try:
        deadline = float(value)
    except ValueError:
        deadline = math.nan
    if not math.isfinite(deadline):
        raise InvalidRequest(f"{DEADLINE_HEADER}: seconds since the epoch expected", field=DEADLINE_HEADER)
    return deadline


def error_headers(error: RbeeError) -> dict[str, str]:
    """Return the headers that belong to an error: how to authenticate, when to come back."""
    headers = {}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS) and error.retryable:
        headers["Retry-After"] = str(error.details.get("retry_after_s", 1))
    if error.status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = str(error.details.get("allowed", ""))
    return headers


def error_response(error: RbeeError, shape: ErrorShape | None = None) -> Response:
    """Return the error in the one shape (SPEC 3.7), or in the one that the clients of the path expect.

    Slot figures stand flat as well (SPEC 3.4).
    """
    body = shape(error, correlation_id()) if shape is not None else _envelope(error)
    return JsonResponse(body, status_code=error.status, headers=error_headers(error))


def _envelope(error: RbeeError) -> dict[str, Any]:
    body = error.envelope(correlation_id())
    for name in ("slots_total", "slots_busy"):
        if name in error.details:
            body["error"][name] = error.details[name]
    return body


async def read_json(request: Request) -> dict[str, Any]:
    """Return the body as an object; raises InvalidRequest saying where it is wrong, BodyTooLarge, RequestCanceled."""
    try:
        data = await request.body()
    except ClientDisconnect:
        raise RequestCanceled("the client closed the connection while sending") from None
    try:
        # Not orjson: it would answer NaN and lone surrogates with a position, where the model's check names the field.
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise InvalidRequest(f"body: not UTF-8 at byte {e.start}", field="body") from None
    except json.JSONDecodeError as e:
        raise InvalidRequest(f"body: invalid JSON at line {e.lineno}, column {e.colno}: {e.msg}", field="body") from None
    except RecursionError:
        raise InvalidRequest("body: JSON nested too deeply", field="body") from None
    except ValueError as e:  # NaN and its like, a number of thousands of digits
        raise InvalidRequest(f"body: invalid JSON: {e}", field="body") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"body: a JSON object expected, got {type(value).__name__}", field="body")
    if data.count(b"{") + data.count(b"[") > _DEPTH_MAX and _deeper_than(value, _DEPTH_MAX):
        raise InvalidRequest(f"body: JSON nested more than {_DEPTH_MAX} deep", field="body")
    try:
        # Whatever is passed on must be strict JSON: no half surrogate pair, no number beyond 64 bits.
        orjson.dumps(value)
    except TypeError as e:
        raise InvalidRequest(f"{_unwritable(value)}: {e}", field=_unwritable(value)) from None
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [v for c in level for v in (c.values() if isinstance(c, dict) else c if isinstance(c, list) else ())]
        if not level:
            return False
    return True


def _unwritable(body: Mapping[str, Any]) -> str:
    """Return the field of ``body`` that is no strict JSON."""
    for name, value in body.items():
        try:
            orjson.dumps({name: value})
        except TypeError:
            return name if name.isascii() else "body"
    return "body"


async def while_connected(request: Request, work: Coroutine[Any, Any, _T] | asyncio.Future[_T]) -> _T:
    """Return the result of ``work``; when the client leaves first, cancel it, wait for its end and raise RequestCanceled.

    The body must have been read: from here on the only message that can come from the client is its leaving.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        raise RequestCanceled("the client closed the connection")
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may be. ``receive_timeout_s``: for the whole body; the head is the server's to watch (serving.py), and
    so is ``unread_timeout_s``, in which a client has to take something of its answer."""

    body_max_bytes: int
    headers_max_bytes: int
    receive_timeout_s: float
    requests_max: int
    unread_timeout_s: float = 300.0
    bad_per_minute: int = 0  # refused requests of one caller (bad_requests.py); 0: not counted

    @classmethod
    def of(cls, settings: Settings) -> RequestLimits:
        """Take the limits from a service's settings."""
        s = settings
        bad = getattr(s, "bad_requests_per_minute", 0)  # the queen's: a worker hears the mistakes of all from one caller
        return cls(s.body_max_bytes, s.headers_max_bytes, s.receive_timeout_s, s.requests_max, s.unread_timeout_s, bad)


class _Gate:
    """Outermost middleware: correlation id, authentication, limits, and the answer to whatever went wrong."""

    def __init__(
        self,
        app: ASGIApp,
        authenticate: Authenticator | None,
        public: frozenset[str],
        limits: RequestLimits,
        error_shapes: Mapping[str, ErrorShape],
        on_error: Callable[[RbeeError], None],
    ) -> None:
        self._app, self._authenticate, self._public, self._limits = app, authenticate, public, limits
        self._shapes = tuple(error_shapes.items())
        self._bad = BadRequests(limits.bad_per_minute)
        self._on_error = on_error
        self._in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; lifespan passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope["headers"])
        given = headers.get(_CORRELATION_KEY, b"").decode("latin-1")
        ident = given if _CORRELATION_RE.fullmatch(given) else str(uuid.uuid4())
        reset = correlation.set(ident)
        began = False

        async def send_with_id(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                message["headers"] = [*message.get("headers", ()), (_CORRELATION_KEY, ident.encode())]
            await send(message)

        self._in_progress += 1
        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(receive), send_with_id)
        except RbeeError as e:
            level = logging.WARNING if e.status >= HTTPStatus.INTERNAL_SERVER_ERROR else logging.INFO
            logger.log(level, "%s", e.message, extra=_facts(scope) | {"code": e.code})
            self._on_error(e)
            if e.status in bad_requests.STATUSES:
                self._bad.count(_caller(scope))
            if began:
                raise
            await error_response(e, self._shape(scope["path"]))(scope, receive, send_with_id)
        except Exception:
            logger.exception("request failed", extra=_facts(scope))
            if began:  # the server then closes the connection: an unfinished answer must not look like a whole one
                raise
            error = RbeeError("internal error; the log of the service has the details under this correlation id")
            self._on_error(error)
            await error_response(error, self._shape(scope["path"]))(scope, receive, send_with_id)
        finally:
            self._in_progress -= 1
            correlation.reset(reset)

    def _shape(self, path: str) -> ErrorShape | None:
        for prefix, shape in self._shapes:
            if path == prefix or path.startswith(prefix + "/"):
                return shape
        return None

    def _check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        limits = self._limits
        head = len(scope.get("raw_path") or b"") + len(scope["query_string"]) + sum(len(k) + len(v) for k, v in scope["headers"])
        if head > limits.headers_max_bytes:
            raise HeadersTooLarge(
                f"request line and headers of {head} bytes, at most {limits.headers_max_bytes} are accepted",
                limit_bytes=limits.headers_max_bytes,
            )
        if scope["path"] not in self._public:
            self._admit(scope, headers)
        if self._in_progress > limits.requests_max and scope["path"] not in self._public:
            raise Overloaded(
                f"{limits.requests_max} requests are in progress, which is the limit",
                hint="try again in a moment, or raise requests_max (docs/settings.md)",
                limit=limits.requests_max,
                retry_after_s=1,
            )
        length, largest = headers.get(b"content-length", b"0"), limits.body_max_bytes
        if length.isdigit() and int(length) > largest:
            raise BodyTooLarge(f"body of {int(length)} bytes, at most {largest} are accepted", limit_bytes=largest)

    def _admit(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Find out who the caller is; raises MissingApiKey, InvalidApiKey, and RateLimited for one that gets nothing right.

        Whoever knows a key is not held up by others at its address who know none.
        """
        if self._authenticate is None:
            self._bad.check(_caller(scope))
            return
        try:
            caller = self._authenticate(_token(headers), scope["path"])
            if not caller:
                raise InvalidApiKey("the API key is not known here", hint="see api_key_file in `rbee-ctl config show`")
        except (MissingApiKey, InvalidApiKey):
            self._bad.check(_caller(scope))
            raise
        scope.setdefault("state", {})["caller"] = caller
        if hasattr(caller, "id"):
            self._bad.check(_caller(scope))

    def _limited(self, receive: Receive) -> Receive:
        """Count the bytes of the body, a chunked one has no length that a header tells, and the time that it takes.

        Not Starlette's max_body_size: that answers in plain text, and 413 to whoever sends a large body without a key.
        """
        limits, seen, whole = self._limits, 0, False
        until = asyncio.get_running_loop().time() + limits.receive_timeout_s

        async def counted() -> Message:
            nonlocal seen, whole
            if whole:  # what comes now is the client's leaving, which may take as long as it likes
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeout(
                    f"the body did not arrive within {limits.receive_timeout_s:g} s", limit_s=limits.receive_timeout_s
                ) from None
            seen += len(message.get("body", b""))
            if seen > limits.body_max_bytes:
                raise BodyTooLarge(f"body of more than {limits.body_max_bytes} bytes", limit_bytes=limits.body_max_bytes)
            whole = not message.get("more_body", False)
            return message

        return counted


def _headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return headers by name; repeated ones joined, so that two Authorization headers are no valid one."""
    headers: dict[bytes, bytes] = {}
    for name, value in raw:
        headers[name] = headers[name] + b", " + value if name in headers else value
    return headers


def _facts(scope: Scope) -> dict[str, str]:
    return {"method": scope["method"], "path": scope["path"]}


def _caller(scope: Scope) -> str:
    """Return whom the gate counts: the key, or without one the address."""
    key = getattr(scope.get("state", {}).get("caller"), "id", None)
    client = scope.get("client")
    return f"key {key}" if key is not None else f"address {client[0] if client else ''}"


def _token(headers: Mapping[bytes, bytes]) -> str:
    """Return the caller's token: a bearer token, or where there is none Anthropic's ``x-api-key``."""
    key = headers.get(b"x-api-key", b"").decode("latin-1")
    if b"authorization" not in headers and _TOKEN_RE.fullmatch(key):
        return key
    return bearer_token(headers.get(b"authorization"))


def bearer_token(header: bytes | None) -> str:
    """Return the token of an ``Authorization`` header; raises MissingApiKey unless it is exactly ``Bearer TOKEN``."""
    hint = "send the header `Authorization: Bearer KEY`; `rbee-ctl env` prints the key"
    if header is None:
        raise MissingApiKey("no API key in the request", hint=hint)
    match = _BEARER_RE.fullmatch(header.decode("latin-1"))
    if match is None:
        raise MissingApiKey("the Authorization header is not of the form `Bearer KEY`", hint=hint)
    return match[1]


async def _http_error(_: Request, error: Exception) -> Response:
    """Give the framework's own refusals a code of ours; the gate answers in the shape of the path."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        raise MethodNotAllowed(f"this method is not allowed here; allowed: {allowed}", allowed=allowed) from None
    if error.status_code == HTTPStatus.NOT_FOUND:
        raise RouteNotFound("no such path; docs/http_api.md lists them") from None
    raise InvalidRequest(str(error.detail)) from None


def create_base_app(
    routes: Sequence[BaseRoute],
    *,
    authenticate: Authenticator | None,
    limits: RequestLimits,
    lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None = None,
    public_paths: frozenset[str] = PUBLIC_PATHS,
    error_shapes: Mapping[str, ErrorShape] | None = None,
    on_error: Callable[[RbeeError], None] = lambda _: None,
) -> Starlette:
    """Return an application whose every path and method, unknown ones too, asks for a key but ``public_paths``.

    ``authenticate`` None opens everything (loopback without keys). ``error_shapes``: path -> shape of the errors on it and
    on what is under it; the first that fits counts. ``on_error``: told of each error that is answered.
    """
    gate = Middleware(
        _Gate,
        authenticate=authenticate,
        public=public_paths,
        limits=limits,
        error_shapes=error_shapes or {},
        on_error=on_error,
    )
    app = Starlette(
        routes=list(routes),
        middleware=[gate],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # an unknown path is a 404, not a guess
    return app


class _EventStream(EventSourceResponse):
    """sse-starlette's response over ready-made bytes, which it passes on as they are.

    It notices a client that leaves at once, also while nothing is sent, and cancels the generator where it waits.
    """

    def __init__(
        self,
        body: AsyncGenerator[bytes, None],
        ping_interval_s: float,
        headers: Mapping[str, str],
        alive: Callable[[], bool],
        media_type: str = "text/event-stream",
    ) -> None:
        super().__init__(body, ping=ping_interval_s, sep="\n", headers=headers, media_type=media_type)
        self._body, self._alive = body, alive

    async def _stream_response(self, send: Send) -> None:
        """Send the body as it comes: without the encoding and the deadline a piece that ready-made bytes have no use for."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._body:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        async with self._send_lock:
            self.active = False
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        while self.active:
            await asyncio.sleep(self._ping_interval)
            if self._alive():
                async with self._send_lock:
                    if self.active:
                        await send({"type": "http.response.body", "body": PING, "more_body": True})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; returns when it ended or the client left, with the generator closed in any case."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._body.aclose()


def sse(
    body: AsyncGenerator[bytes, None],
    *,
    ping_interval_s: float,
    headers: Mapping[str, str] | None = None,
    alive: Callable[[], bool] = lambda: True,
) -> Response:
    """Return an event-stream response; a comment ping goes out every ``ping_interval_s`` (seconds) while ``alive()``.

    ``body`` yields whole events as bytes and handles its own errors. A generator that was never begun runs no ``finally``:
    what it would free must be freed by whoever opened it.
    """
    return _EventStream(body, ping_interval_s, headers or {}, alive)


def ndjson(body: AsyncGenerator[bytes, None], *, headers: Mapping[str, str] | None = None) -> Response:
    """Return a stream of JSON lines. Such a stream has no comments, so nothing keeps it alive while it is silent."""
    return _EventStream(body, _NEVER_S, headers or {}, lambda: False, "application/x-ndjson")
