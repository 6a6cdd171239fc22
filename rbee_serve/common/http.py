"""What both HTTP servers are built from: authentication, correlation ids, body limit, the one error shape, streams.

Pure ASGI throughout: Starlette's BaseHTTPMiddleware runs the endpoint in another task and would hide a client's
leaving from a running stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbee_serve.contract.api import CORRELATION_HEADER
from rbee_serve.contract.errors import (
    BodyTooLarge,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    MissingApiKey,
    RbeeError,
    RequestCanceled,
    RouteNotFound,
)
from rbee_serve.contract.events import PING

logger = logging.getLogger(__name__)

PUBLIC_PATHS = frozenset({"/health", "/v1/health"})
#: (token, path) -> whether the token opens the path. The comparison inside must take constant time.
Authenticator = Callable[[str, str], bool]

_correlation: contextvars.ContextVar[str | None] = contextvars.ContextVar("correlation_id", default=None)
_CORRELATION_RE = re.compile(r"[A-Za-z0-9._-]{1,128}")


def correlation_id() -> str | None:
    """Return the id of the request that is being handled, None outside of one."""
    return _correlation.get()


class JsonResponse(Response):
    """JSON by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return orjson.dumps(content)


def error_headers(error: RbeeError) -> dict[str, str]:
    """Return the headers that belong to an error: how to authenticate, when to come back."""
    headers = {}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE and error.retryable:
        headers["Retry-After"] = str(error.details.get("retry_after_s", 1))
    return headers


def error_response(error: RbeeError) -> Response:
    """Return the one error shape (SPEC 3.7). Slot figures stand flat as well (SPEC 3.4)."""
    body = error.envelope(correlation_id())
    for name in ("slots_total", "slots_busy"):
        if name in error.details:
            body["error"][name] = error.details[name]
    return JsonResponse(body, status_code=error.status, headers=error_headers(error))


async def read_json(request: Request) -> dict[str, Any]:
    """Return the body as an object; raises InvalidRequest saying where it is wrong, BodyTooLarge, RequestCanceled."""
    try:
        data = await request.body()
    except ClientDisconnect:
        raise RequestCanceled("the client closed the connection while sending") from None
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise InvalidRequest(f"body: not UTF-8 at byte {e.start}", field="body") from None
    except json.JSONDecodeError as e:
        raise InvalidRequest(f"body: invalid JSON at line {e.lineno}, column {e.colno}: {e.msg}", field="body") from None
    except RecursionError:
        raise InvalidRequest("body: JSON nested too deeply", field="body") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"body: a JSON object expected, got {type(value).__name__}", field="body")
    return value


class _Gate:
    """Outermost middleware: correlation id, authentication, body limit, and the answer to whatever went wrong."""

    def __init__(self, app: ASGIApp, authenticate: Authenticator | None, public: frozenset[str], body_max_bytes: int) -> None:
        self._app, self._authenticate, self._public, self._limit = app, authenticate, public, body_max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; lifespan passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(CORRELATION_HEADER.lower().encode(), b"").decode("latin-1")
        ident = given if _CORRELATION_RE.fullmatch(given) else str(uuid.uuid4())
        reset = _correlation.set(ident)
        began = False

        async def send_with_id(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                message["headers"] = [*message.get("headers", ()), (CORRELATION_HEADER.lower().encode(), ident.encode())]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(receive, headers), send_with_id)
        except RbeeError as e:
            if not began:
                await error_response(e)(scope, receive, send_with_id)
        except Exception:
            logger.exception("request failed: %s %s", scope["method"], scope["path"])
            if not began:
                error = RbeeError("internal error; the log of the service has the details under this correlation id")
                await error_response(error)(scope, receive, send_with_id)
        finally:
            _correlation.reset(reset)

    def _check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        if scope["path"] not in self._public and self._authenticate is not None:
            token = bearer_token(headers.get(b"authorization"))
            if not self._authenticate(token, scope["path"]):
                raise InvalidApiKey("the API key is not known here", hint="see api_key_file in `rbee-ctl config show`")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            raise BodyTooLarge(f"body of {int(length)} bytes, at most {self._limit} are accepted", limit_bytes=self._limit)

    def _limited(self, receive: Receive, headers: Mapping[bytes, bytes]) -> Receive:
        """Count the bytes of a chunked body, whose length no header tells."""
        if b"content-length" in headers:
            return receive
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise BodyTooLarge(f"body of more than {self._limit} bytes", limit_bytes=self._limit)
            return message

        return counted


def bearer_token(header: bytes | None) -> str:
    """Return the token of an ``Authorization`` header; raises MissingApiKey unless it is exactly ``Bearer TOKEN``."""
    hint = "send the header `Authorization: Bearer KEY`; `rbee-ctl env` prints the key"
    if header is None:
        raise MissingApiKey("no API key in the request", hint=hint)
    match = re.fullmatch(r"[Bb]earer ([!-~]+)", header.decode("latin-1"))
    if match is None:
        raise MissingApiKey("the Authorization header is not of the form `Bearer KEY`", hint=hint)
    return match[1]


async def _http_error(request: Request, error: Exception) -> Response:
    """Give the framework's own refusals the one shape."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        ours: RbeeError = MethodNotAllowed(f"{request.method} is not allowed here; allowed: {allowed}", allowed=allowed)
    elif error.status_code == HTTPStatus.NOT_FOUND:
        ours = RouteNotFound("no such path; /v1/info names the API")
    else:
        ours = InvalidRequest(str(error.detail))
    response = error_response(ours)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _rbee_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, RbeeError):
        raise error
    return error_response(error)


def create_base_app(
    routes: Sequence[BaseRoute],
    *,
    authenticate: Authenticator | None,
    body_max_bytes: int,
    lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None = None,
    public_paths: frozenset[str] = PUBLIC_PATHS,
) -> Starlette:
    """Return an application whose every path and method, unknown ones too, asks for a key but ``public_paths``.

    ``authenticate`` None opens everything (loopback without keys).
    """
    gate = Middleware(_Gate, authenticate=authenticate, public=public_paths, body_max_bytes=body_max_bytes)
    return Starlette(
        routes=list(routes),
        middleware=[gate],
        exception_handlers={HTTPException: _http_error, RbeeError: _rbee_error},
        lifespan=lifespan,
    )


class sse:
    """An event-stream response over an async generator of ready-made bytes.

    Not sse-starlette's EventSourceResponse: that one takes events apart and encodes each anew on the hot path. As it
    does, a comment ping goes out when the generator is silent for ``ping_interval_s`` and a client that leaves is
    noticed at once, also while nothing is sent; then the generator is closed, which frees whatever it holds.
    """

    def __init__(
        self, body: AsyncGenerator[bytes, None], *, ping_interval_s: float, headers: Mapping[str, str] | None = None
    ) -> None:
        self._body, self._ping_s, self._headers = body, ping_interval_s, headers or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; returns when it ended or the client left."""
        fixed = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache, no-store",
            "x-accel-buffering": "no",
        }
        headers = [(k.lower().encode(), v.encode("latin-1")) for k, v in {**fixed, **self._headers}.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        sender = asyncio.create_task(self._send(send))
        watcher = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watcher.cancel()
            if not sender.done():
                sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sender

    async def _send(self, send: Send) -> None:
        iterator = self._body.__aiter__()
        pending: asyncio.Future[bytes] | None = None
        try:
            while True:
                pending = asyncio.ensure_future(_next(iterator))
                while not (await asyncio.wait((pending,), timeout=self._ping_s))[0]:
                    await send({"type": "http.response.body", "body": PING, "more_body": True})
                try:
                    data = pending.result()
                except _End:
                    break
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if pending is not None and not pending.done():
                pending.cancel()
                await asyncio.wait((pending,))
            await self._body.aclose()


async def _next(iterator: AsyncIterator[bytes]) -> bytes:
    try:
        return await anext(iterator)
    except StopAsyncIteration:
        raise _End from None


class _End(Exception):
    """Stands for StopAsyncIteration, which may not leave a task."""


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
