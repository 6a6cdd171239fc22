"""The queen's HTTP API as the commands need it. Every failure is an RbeeError with the next command to type."""

from __future__ import annotations

import contextlib
import json
import random
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from rbee_ctl.quick_httpx import httpx
from rbee_serve.contract.errors import (
    ConfigInvalid,
    ConnectionTimeout,
    InvalidApiKey,
    MalformedResponse,
    MissingApiKey,
    RbeeError,
    from_envelope,
)
from rbee_serve.contract.events import SseParser

if TYPE_CHECKING:
    from rbee_ctl.config import Settings

REQUEST_ID_HEADER = "X-Request-Id"
#: What may help when the queen's answers are not what they should be (SPEC S-18).
_RESTART = "is queen_url an rbee queen (rbee-ctl config show)? On its host: systemctl restart rbee-queen"


@dataclass(frozen=True)
class Timeouts:
    """Seconds (SPEC 3.8). ``silence_s``: longest pause within a stream; the queen pings every 10 s."""

    connect_s: float = 5.0
    total_s: float = 10.0
    silence_s: float = 60.0
    cancel_s: float = 5.0
    retry_pauses_s: tuple[float, ...] = (0.1, 0.2, 0.4)


def jittered(seconds: float) -> float:
    """Return a pause spread by 0.5 to 1.5, so that many clients do not come back in step (SPEC 3.8)."""
    return seconds * random.uniform(0.5, 1.5)  # noqa: S311 -- no secret


class InferenceStream:
    """An open stream: ``request_id`` is known before the first token, so that it can be cancelled at any time."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.request_id = response.headers.get(REQUEST_ID_HEADER)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events as they come; raises MalformedResponse when the stream breaks off before ``[DONE]``."""
        parser = SseParser()
        try:
            for chunk in self._response.iter_raw():
                for payload in parser.feed(chunk):
                    if payload == "[DONE]":
                        return
                    yield _event(payload)
        except httpx.TimeoutException as e:
            raise ConnectionTimeout(
                "the queen has sent nothing for too long: the stream is given up", hint="rbee-ctl worker list"
            ) from e
        except httpx.HTTPError as e:
            raise MalformedResponse(f"the connection to the queen broke: {e}", hint="rbee-ctl status") from e
        raise MalformedResponse("the stream ended without its last event", hint="rbee-ctl status")


def _event(payload: str) -> dict[str, Any]:
    try:
        event = json.loads(payload)
    except ValueError as e:
        raise MalformedResponse(f"the queen sent an event that is no JSON ({e})", hint=_RESTART) from e
    if not isinstance(event, dict):
        raise MalformedResponse("the queen sent an event that is no object", hint=_RESTART)
    return event


def _trust(base_url: str, ca_file: str | None) -> ssl.SSLContext | bool:
    """Return what proves the queen's identity. Reading all root certificates takes 50 ms: only where TLS is used."""
    if not base_url.startswith("https:"):
        return False
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as e:
        raise ConfigInvalid(f"queen_ca_file: cannot use {ca_file}: {e}", hint="rbee-ctl config show") from e


class QueenClient:
    """One queen. Use as a context manager."""

    def __init__(
        self, base_url: str, api_key: str | None, timeouts: Timeouts | None = None, *, ca_file: str | None = None
    ) -> None:
        """``ca_file``: certificates to trust for an https queen instead of the system's; raises ConfigInvalid for a bad one."""
        self.base_url = base_url
        self.timeouts = timeouts or Timeouts()
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy for the internet has no business between us and our own queen: trust_env=False.
        self._http = httpx.Client(
            base_url=base_url,
            headers=headers,
            timeout=httpx.Timeout(self.timeouts.total_s, connect=self.timeouts.connect_s),
            trust_env=False,
            verify=_trust(base_url, ca_file),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, params: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the decoded answer; tries again when the queen can not be reached (it may be restarting)."""
        pauses = iter(self.timeouts.retry_pauses_s)
        while True:
            try:
                with self._reaching():
                    response = self._http.get(path, params=dict(params or {}))
                break
            except ConnectionTimeout:
                if (pause := next(pauses, None)) is None:
                    raise
                time.sleep(jittered(pause))
        if response.is_error:
            raise self._refusal(response)
        try:
            body = response.json()
        except ValueError as e:
            raise MalformedResponse(f"GET {path}: the answer is no JSON ({e})", hint=_RESTART) from e
        if not isinstance(body, dict):
            raise MalformedResponse(f"GET {path}: an object expected, got {type(body).__name__}", hint=_RESTART)
        return body

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the decoded answer, {} for an empty one; never repeated: what was asked for may have been done."""
        with self._reaching():
            response = self._http.post(path, json=dict(body or {}))
        if response.is_error:
            raise self._refusal(response)
        try:
            found = response.json() if response.content else {}
        except ValueError as e:
            raise MalformedResponse(f"POST {path}: the answer is no JSON ({e})", hint=_RESTART) from e
        return found if isinstance(found, dict) else {}

    def workers(self, **filters: str | None) -> list[dict[str, Any]]:
        """Return the live workers' records; ``filters`` are node, model and state."""
        found = self.get("/v1/workers", {k: v for k, v in filters.items() if v is not None}).get("workers")
        if not isinstance(found, list):
            raise MalformedResponse("GET /v1/workers: no list of workers in the answer", hint="rbee-ctl version")
        return found

    @contextlib.contextmanager
    def infer(self, body: Mapping[str, Any]) -> Iterator[InferenceStream]:
        """Open a stream; raises what the queen refuses it with. Leaving the block closes the connection."""
        t = self.timeouts
        timeout = httpx.Timeout(t.silence_s, connect=t.connect_s)
        with contextlib.ExitStack() as stack:
            with self._reaching():
                response = stack.enter_context(self._http.stream("POST", "/v1/inference", json=dict(body), timeout=timeout))
                if response.is_error:
                    response.read()
            if response.is_error:
                raise self._refusal(response)
            yield InferenceStream(response)

    def cancel(self, request_id: str) -> None:
        """Cancel a request; failures are of no consequence, since closing the connection cancels as well."""
        with contextlib.suppress(httpx.HTTPError):
            self._http.delete(f"/v1/inference/{request_id}", timeout=self.timeouts.cancel_s)

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn what httpx raises into ConnectionTimeout, with where to look."""
        try:
            yield
        except httpx.HTTPError as e:
            what = "did not answer in time" if isinstance(e, httpx.TimeoutException) else f"does not answer ({e})"
            raise ConnectionTimeout(
                f"the queen at {self.base_url} {what}",
                hint="on the queen's host: systemctl status rbee-queen; here: rbee-ctl config show",
                url=self.base_url,
            ) from e

    def _refusal(self, response: httpx.Response) -> RbeeError:
        try:
            body = response.json()
        except ValueError:
            body = None
        error = from_envelope(body, fallback=f"{response.request.url} answered {response.status_code} without an error envelope")
        if isinstance(error, MissingApiKey | InvalidApiKey):
            error.hint = "rbee-ctl config show (api_key_file); the key of a fleet is <state_dir>/secrets/client-key"
        elif isinstance(error, MalformedResponse):
            error.hint = f"is {self.base_url} an rbee queen? rbee-ctl config show"
        return error


def workers_at_once(settings: Settings, limit_s: float) -> list[dict[str, Any]]:
    """Return the live workers if the queen says so within ``limit_s``; none where it does not or nothing names it."""
    if settings.queen_url.value is None:
        return []
    hurry = Timeouts(connect_s=limit_s, total_s=limit_s, retry_pauses_s=())
    try:
        with QueenClient(settings.queen, settings.api_key(), hurry, ca_file=settings.queen_ca_file.value) as queen:
            return queen.workers()
    except (RbeeError, OSError):
        return []
