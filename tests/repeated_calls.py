"""A client that asks a service over and over, so that a moment in which nobody answers is seen."""

from __future__ import annotations

import threading
from typing import Any

import httpx


class Caller:
    """Asks in a thread of its own, each time by a new connection, from ``with`` to its end; ``json``: by POST with that."""

    def __init__(self, url: str, *, json: dict[str, Any] | None = None, headers: dict[str, str] | None = None) -> None:
        self.ended = threading.Event()
        self.request: dict[str, Any] = {"method": "GET" if json is None else "POST", "url": url, "json": json, "headers": headers}
        self.answers: list[int] = []
        self.failed: list[str] = []
        self.thread = threading.Thread(target=self._ask)
        self.thread.start()

    def _ask(self) -> None:
        while not self.ended.is_set():
            try:
                self.answers.append(httpx.request(**self.request, timeout=60, trust_env=False).status_code)
            except httpx.HTTPError as e:
                self.failed.append(repr(e))

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
