"""The engine's loop: what it tells the front, and when."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rbee_serve.worker.engine import child, embedding
from rbee_serve.worker.engine.child import HOLD_S, EngineLoop, FrontGone
from rbee_serve.worker.engine.scheduler import EngineBroken
from rbee_serve.worker.engine.wire import Unpacker


class Heard:
    """A loop without an engine, a clock, and what the front got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(child, "time", SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now))
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
        told = [message["events"] for message in self._unpacker.feed(data) if "events" in message]
        return [[(kind, number) for kind, _, number in events] for events in told]

    def send(self, message: Any) -> None:
        """What the front would send, as if it had been read; None: it is gone."""
        self.loop._messages.put(message)

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
        heard.now += HOLD_S * 0.3
        heard.loop.hold(events("token", n))
        assert heard.since() == []
    heard.now += HOLD_S * 0.3
    heard.loop.hold(events("token", 3))
    assert heard.since() == [[("token", 1), ("token", 2), ("token", 3)]]


@pytest.mark.parametrize("step", [0.6, 1.0, 5.0])
def test_tokens_of_slow_steps_are_told_one_by_one_so_that_no_pause_doubles(heard: Heard, step: float) -> None:
    for n in range(3):
        heard.now += HOLD_S * step
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


class Steps:
    """Scheduler, model and embedder of a loop whose steps give one token each; ``after`` says what happens after one."""

    decode_s, drafted, accepted = 0.0, 0, 0
    has_work, decodes_only = True, True

    def __init__(self, after: Callable[[int], None]) -> None:
        self.made, self._after = 0, after
        self.asked: list[str] = []

    def step(self, give_out: Callable[[Any], None]) -> None:
        give_out(events("token", self.made))
        self.made += 1
        self._after(self.made)

    def tokenize(self, text: str, **_: bool) -> list[int]:
        self.asked.append(text)
        return []


class Embedder:
    """Has work while something is asked for."""

    token_s = 0.0
    has_work = False

    def __init__(self, model: Any) -> None:
        pass


def run(heard: Heard, steps: Steps, monkeypatch: pytest.MonkeyPatch, embedder: type = Embedder) -> None:
    monkeypatch.setattr(embedding, "Embedder", embedder)
    heard.loop.run(cast("Any", steps), cast("Any", steps))


def test_tokens_do_not_wait_for_what_a_message_asks_for(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still: nothing but the message lets them go."""
    told: list[Any] = []

    def after(made: int) -> None:
        if made == 3:
            told.extend(heard.since())
            heard.send({"tokenize": {"text": "long", "parse_special": False, "add_bos": True}, "number": 1})
        if made == 4:
            heard.send(None)

    class Asked(Steps):
        def tokenize(self, text: str, **_: bool) -> list[int]:
            told.extend(heard.since())
            return super().tokenize(text)

    steps = Asked(after)
    with pytest.raises(FrontGone):
        run(heard, steps, monkeypatch)
    assert steps.asked == ["long"]
    assert told == [[("token", 0)], [("token", 1), ("token", 2)]]


def test_tokens_do_not_wait_for_embeddings_nor_for_a_prompt(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    def after(made: int) -> None:
        if made == 2:
            steps.decodes_only = False
        if made == 4:
            Busy.has_work, steps.decodes_only = True, True
        if made == 6:
            heard.send(None)

    class Busy(Embedder):
        def step(self, rows: int) -> list[tuple[int, Any]]:
            return []

    steps = Steps(after)
    monkeypatch.setattr(Steps, "spare", lambda *_: 1, raising=False)
    with pytest.raises(FrontGone):
        run(heard, steps, monkeypatch, Busy)
    assert heard.since() == [[("token", n)] for n in range(6)]


def test_tokens_that_were_made_are_told_before_the_engine_breaks(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    def after(made: int) -> None:
        if made == 3:
            raise EngineBroken

    with pytest.raises(EngineBroken):
        run(heard, Steps(after), monkeypatch)
    assert heard.since() == [[("token", 0)], [("token", 1), ("token", 2)]]
