"""A client that asks a service over and over, so that a moment in which nobody answers is seen."""

from __future__ import annotations

import threading

import httpx


class Caller:
    """Asks for ``url`` in a thread of its own, each time by a new connection, from ``with`` to its end."""

    def __init__(self, url: str) -> None:
        self.url, self.ended = url, threading.Event()
        self.answers: list[int] = []
        self.failed: list[str] = []
        self.thread = threading.Thread(target=self._ask)
        self.thread.start()

    def _ask(self) -> None:
        while not self.ended.is_set():
            try:
                self.answers.append(httpx.get(self.url, timeout=30, trust_env=False).status_code)
            except httpx.HTTPError as e:
                self.failed.append(repr(e))

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
