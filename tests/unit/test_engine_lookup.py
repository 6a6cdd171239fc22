"""Prompt look-up: what is guessed, when it pays, and that it changes nothing but the number of calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from timed_model import GAP_S, Clock, Model, asked, run

from rbee_serve.models.memory import DRAFT_ROWS
from rbee_serve.worker.engine import lookup, scheduler
from rbee_serve.worker.engine.lookup import LookUp, row_costs, rows_each
from rbee_serve.worker.engine.scheduler import Scheduler

COSTS = row_costs("cpu", {2})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)
    return clock


class Counting(Model):
    """Says 0 1 2 3 0 1 2 3 ... up to ``until`` and 7 from there on, whatever the guess was that a row stood for."""

    until = 10_000

    def logits(self, index: int) -> NDArray[np.float32]:
        token, position, _ = self.rows[index] if index >= 0 else (3, 0, 0)
        return np.eye(self.n_vocab, dtype=np.float32)[(token + 1) % 4 if position < self.until else 7]


def answers(model: Model, streams: int, guessed: int, *, answer: int = 40) -> dict[str, list[tuple[int, int]]]:
    """What each stream says, with the tokens' numbers."""
    engine = Scheduler(model, streams, gap_s=GAP_S, draft_tokens=guessed)  # type: ignore[arg-type]
    said: dict[str, list[tuple[int, int]]] = {}
    ended: list[str] = []

    def collect(events: list[Any]) -> None:
        for kind, owner, payload in events:
            if kind == "token":
                said.setdefault(owner, []).append((payload[0], payload[1]))
            elif kind == "finished":
                ended.append(owner)

    for n in range(streams):
        engine.submit(asked(f"r{n}", 64, 7 - n, answer=answer))
    while engine.has_work:
        engine.step(collect)
    assert sorted(ended) == sorted(said)
    assert 0 <= engine.accepted <= engine.drafted
    assert bool(engine.drafted) == (guessed > 0)
    return said


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 5])
def test_lookup_saves_calls_and_changes_no_token(clock: Clock, streams: int) -> None:
    calls = []
    for guessed in (0, 7):
        model = Counting(clock)
        said = answers(model, streams, guessed)
        assert said == {f"r{n}": [(i, i % 4) for i in range(40)] for n in range(streams)}
        calls.append([size for kind, size in model.calls if kind == "tokens"])
    assert calls[0] == [streams] * 39
    assert max(calls[1]) <= 16
    if streams <= 2:
        assert len(calls[1]) < 30
        assert {size % streams for size in calls[1]} == {0}


def test_lookup_takes_back_what_was_wrong(clock: Clock) -> None:
    """The text stops repeating itself: what was evaluated for the guesses is cut off, and guessing ends."""
    model = Counting(clock)
    model.until = 64 + 30
    said = answers(model, 1, 3, answer=50)["r0"]
    assert [token for _, token in said[:31]] == [i % 4 for i in range(31)]
    assert {token for _, token in said[32:]} == {7}
    assert model.holds[0] == 64 + 49, "the last token is not evaluated, and no guess is left"


def test_lookup_goes_no_further_than_the_context(clock: Clock) -> None:
    model = Counting(clock)
    model.context_tokens = 64 + 30
    said = answers(model, 2, 7, answer=500)
    assert [len(tokens) for tokens in said.values()] == [31, 31]
    assert max(model.holds.values()) <= model.context_tokens


def test_lookup_waits_while_a_prompt_is_evaluated(clock: Clock) -> None:
    model = Counting(clock)
    engine = Scheduler(model, 2, gap_s=GAP_S, draft_tokens=3)  # type: ignore[arg-type]
    engine.submit(asked("one", 64, 7, answer=200))
    run(engine, 25)
    assert model.calls[-1] == ("tokens", 4)
    engine.submit(replace(asked("two", 2000, 6), prompt_ids=list(range(7)) * 300))
    before = len(model.calls)
    while ("tokens", 8) not in model.calls[before:]:
        run(engine, 1)
    since = model.calls[before:]
    last = max(i for i, (kind, _) in enumerate(since) if kind == "prompt")
    assert {size for kind, size in since[:last] if kind == "tokens"} == {1}


def test_lookup_is_not_charged_to_texts_that_do_not_repeat() -> None:
    text = LookUp([1, 2, 3, 1, 2])
    assert text.guesses(2) == [3, 1]
    assert rows_each([text], 8, COSTS) == 1, "nothing is known of its chance yet"
    for token in (3, 1, 2, 3):
        text.add(token)
    assert rows_each([text], 8, COSTS) > 1
    for token in (9, 8, 7, 3):
        text.add(token)
    assert rows_each([text], 8, COSTS) == 1


@pytest.mark.parametrize(
    ("backend", "types", "chance", "rows"),
    [
        ("cpu", {2, 8}, 1.0, {1: 8, 2: 4, 3: 3, 4: 2, 8: 2, 9: 1, 64: 1}),
        ("cpu", {2}, 0.4, {1: 1, 2: 2, 8: 1}),
        ("cpu", {8}, 1.0, {1: 8, 4: 4, 8: 2}),
        ("cpu", {8}, 0.7, {1: 1, 4: 2}),
        ("cpu", {12, 14}, 1.0, {1: 8, 2: 2, 4: 1, 8: 2}),
        ("cuda", {2}, 0.6, {1: 1, 2: 1}),
    ],
)
def test_lookup_has_as_many_rows_as_pay(backend: str, types: set[int], chance: float, rows: dict[int, int]) -> None:
    """Single streams take all that is likely, several as many as their pauses may grow, many none."""
    text = LookUp([1, 2, 1, 2])
    text.chance = chance
    costs = row_costs(backend, types)
    assert {n: rows_each([text] * n, 8, costs) for n in rows} == rows


def test_lookup_costs_go_as_far_as_rows_are_kept() -> None:
    assert {len(row_costs(backend, {n})) for backend in ("cpu", "cuda") for n in (2, 8, 12)} == {DRAFT_ROWS}


def test_lookup_goes_on_round_a_loop() -> None:
    assert LookUp([9, 5, 5, 5]).guesses(4) == [5, 5, 5, 5]
    assert LookUp([1, 2, 3, 1, 2]).guesses(7) == [3, 1, 2, 3, 1, 2, 3]
    assert LookUp([]).guesses(3) == LookUp([1]).guesses(3) == LookUp([1, 2]).guesses(3) == []


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_lookup_guesses_what_followed_the_same_tokens(before: list[int], after: list[int], count: int) -> None:
    """Grown token by token or made at once: a guess is what followed an earlier place of the last two tokens, and of the last
    place of the last three where the text has just begun or the last guess was wrong."""
    text, ids = LookUp(before), [*before, *after]
    for token in after:
        text.add(token)
        assert 0.0 <= text.chance < 1.0
    for guesses, made in ((text.guesses(count), "grown"), (LookUp(ids).guesses(count), "at once")):
        followers = [i + 2 for i in range(len(ids) - 2) if ids[i : i + 2] == ids[-2:]]
        if not followers:
            assert guesses == [], made
        else:
            assert len(guesses) == count
            assert any((ids[i:] * count)[:count] == guesses for i in followers), made
    threes = [i + 3 for i in range(len(ids) - 3) if ids[i : i + 3] == ids[-3:]]
    if threes:
        assert LookUp(ids).guesses(1) == [ids[threes[-1]]]


def test_lookup_remembers_a_bounded_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_WINDOW", 50)
    text = LookUp(list(range(1000)))
    for token in range(2000):
        text.add(token % 70)
        assert len(text._tokens) <= 101
        assert len(text._pairs) <= 101
