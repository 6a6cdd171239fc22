"""The engine's loop: what it tells the front, and when."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rbee_serve.worker.engine import child
from rbee_serve.worker.engine.child import HOLD_S, EngineLoop
from rbee_serve.worker.engine.wire import Unpacker


class Heard:
    """A loop without an engine, a clock, and what the front got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(child, "time", SimpleNamespace(monotonic=lambda: self.now))
        self._front, theirs = socket.socketpair()
        self._front.setblocking(False)
        self.loop, self._unpacker = EngineLoop(theirs), Unpacker()
        self._closing = theirs

    def since(self) -> list[list[tuple[str, int]]]:
        """Kind and number of the events of each message since the last look."""
        try:
            data = self._front.recv(1 << 16)
        except BlockingIOError:
            return []
        return [[(kind, number) for kind, _, number in message["events"]] for message in self._unpacker.feed(data)]

    def close(self) -> None:
        self._front.close()
        self._closing.close()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    found = Heard(monkeypatch)
    yield found
    found.close()


def events(kind: str, *numbers: int) -> list[tuple[str, str, Any]]:
    return [(kind, "r", n) for n in numbers]


def test_tokens_of_quick_steps_are_told_together(heard: Heard) -> None:
    heard.loop.hold(events("token", 0))
    assert heard.since() == [[("token", 0)]], "the first waits for nobody"
    for n in range(1, 3):
        heard.now += HOLD_S * 0.4
        heard.loop.hold(events("token", n))
        assert heard.since() == []
    heard.now += HOLD_S * 0.4
    heard.loop.hold(events("token", 3))
    assert heard.since() == [[("token", 1), ("token", 2), ("token", 3)]]


def test_tokens_of_slow_steps_are_told_one_by_one(heard: Heard) -> None:
    for n in range(3):
        heard.now += HOLD_S
        heard.loop.hold(events("token", n))
        assert heard.since() == [[("token", n)]]


def test_an_end_waits_for_nothing_and_comes_after_what_was_held(heard: Heard) -> None:
    heard.loop.hold(events("token", 0))
    heard.loop.hold(events("token", 1))
    heard.loop.hold([*events("token", 2), *events("finished", 3)])
    assert heard.since() == [[("token", 0)], [("token", 1), ("token", 2), ("finished", 3)]]


def test_what_is_held_is_told_before_the_engine_does_something_else(heard: Heard) -> None:
    heard.loop.hold(events("token", 0))
    heard.loop.hold(events("token", 1))
    heard.since()
    heard.loop.give_out([])
    assert heard.since() == [[("token", 1)]]
    heard.loop.give_out([])
    assert heard.since() == []
