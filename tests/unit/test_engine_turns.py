"""Whose turn it is: prompts, bursts of them and running streams share the engine, told by a clock that calls move on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rbee_serve.worker.engine import scheduler
from rbee_serve.worker.engine.blocks import Blocks
from rbee_serve.worker.engine.protocol import GenerateRequest
from rbee_serve.worker.engine.scheduler import Scheduler, look_up

TOKEN_S, STEP_S, GAP_S = 0.001, 0.04, 0.25


class Clock:
    """Seconds that only the model's calls let pass."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Model:
    """llama.Model's place: every call takes its time and is written down, every token is the same."""

    n_vocab, context_tokens = 8, 4096
    causal = can_be_cut = True
    ll = None  # greedy tokens ask llama.cpp for nothing

    def __init__(self, clock: Clock) -> None:
        self.blocks = Blocks(128, two_kernels=True)
        self.calls: list[tuple[str, int]] = []  # ("prompt", tokens) or ("tokens", streams)
        self.began: list[float] = []
        self._clock = clock

    def _took(self, kind: str, size: int, seconds: float) -> int:
        self.calls.append((kind, size))
        self.began.append(self._clock.now)
        self._clock.now += seconds
        return 0

    def prefill(self, tokens: NDArray[np.int32], start: int, seq: int, owner: str, *, logits: bool) -> int:
        return self._took("prompt", len(tokens), TOKEN_S * len(tokens))

    def decode_step(self, rows: list[tuple[int, int, int]]) -> int:
        self.rows = rows
        return self._took("tokens", len(rows), STEP_S)

    def logits(self, index: int) -> NDArray[np.float32]:
        return np.arange(self.n_vocab, dtype=np.float32)

    def cut(self, seq: int, keep: int) -> int:
        self.kept = keep
        return keep

    def piece(self, token: int) -> bytes:
        return b"x"

    def is_eog(self, token: int) -> bool:
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)
    return clock


def asked(name: str, length: int, first: int, answer: int = 50) -> GenerateRequest:
    """A greedy request whose prompt shares nothing with others that begin with another token."""
    params: Any = SimpleNamespace(
        max_tokens=answer, temperature=0.0, seed=0, stop=[], ignore_eos=False, repetition_penalty=1.0, presence_penalty=0.0,
        frequency_penalty=0.0, logit_bias={}, logprobs=None, typical_p=1.0, top_k=0, top_p=1.0, min_p=0.0, grammar=None,
        json_schema=None,
    )  # fmt: skip
    return GenerateRequest(name, "", parse_special=False, add_bos=False, params=params, prompt_ids=[first] * length)


def run(engine: Scheduler, steps: int) -> None:
    for _ in range(steps):
        engine.step(lambda events: None)


def test_turns_a_burst_of_short_prompts_is_read_before_anybody_goes_on(clock: Clock) -> None:
    """Every newcomer has its first token after its own prompt and those before it, and nothing else."""
    model = Model(clock)
    engine = Scheduler(model, 8, gap_s=GAP_S)  # type: ignore[arg-type]
    for n in range(8):
        engine.submit(asked(f"r{n}", 64, n))
    run(engine, 10)
    assert model.calls == [("prompt", 64)] * 8 + [("tokens", 8)] * 2


def test_turns_streams_that_run_are_not_held_up_by_a_burst(clock: Clock) -> None:
    model = Model(clock)
    engine = Scheduler(model, 8, gap_s=GAP_S)  # type: ignore[arg-type]
    engine.submit(asked("early", 64, 7))
    run(engine, 3)
    assert model.calls[-1] == ("tokens", 1)
    for n in range(7):
        engine.submit(asked(f"r{n}", 64, n))
    run(engine, 12)
    steps = [at for at, (kind, _) in zip(model.began, model.calls, strict=True) if kind == "tokens"]
    assert model.calls[3:].count(("prompt", 64)) == 7
    assert max(b - a for a, b in itertools.pairwise(steps)) <= GAP_S + STEP_S + 1e-9


def test_turns_a_long_prompt_waits_for_streams_that_have_just_begun(clock: Clock) -> None:
    """One block would not complete it, so the bound on the pause holds from the first token on."""
    model = Model(clock)
    engine = Scheduler(model, 2, gap_s=GAP_S)  # type: ignore[arg-type]
    engine.submit(asked("short", 64, 1))
    engine.submit(asked("long", 3000, 2))
    run(engine, 30)
    steps = [at for at, (kind, _) in zip(model.began, model.calls, strict=True) if kind == "tokens"]
    assert len(steps) > 3
    first_token = model.began[0] + TOKEN_S * 64
    assert steps[0] - first_token <= GAP_S + 1e-9


def test_turns_a_burst_without_end_does_not_hold_up_for_ever(clock: Clock) -> None:
    """Streams that end with their first token make room for others: whoever wants a second one gets it all the same."""
    model = Model(clock)
    engine = Scheduler(model, 2, gap_s=GAP_S)  # type: ignore[arg-type]
    engine.submit(asked("stays", 64, 0))
    for n in range(200):
        engine.submit(asked(f"r{n}", 64, 1 + n % 7, answer=1))
    run(engine, 180)
    assert ("tokens", 1) in model.calls


class Counting(Model):
    """Says 0 1 2 3 0 1 2 3 ..., whatever the guess was that a row stood for."""

    def logits(self, index: int) -> NDArray[np.float32]:
        token, _, _ = self.rows[index] if index >= 0 else (3, 0, 0)
        return np.eye(self.n_vocab, dtype=np.float32)[(token + 1) % 4]


def test_turns_guesses_save_calls_and_change_no_token(clock: Clock) -> None:
    given: list[tuple[int, int]] = []

    def collect(events: list[Any]) -> None:
        given.extend((payload[0], payload[1]) for kind, _, payload in events if kind == "token")

    calls = []
    for guessed in (0, 3):
        model = Counting(clock)
        engine = Scheduler(model, 2, gap_s=GAP_S, draft_tokens=guessed)  # type: ignore[arg-type]
        engine.submit(asked("one", 64, 7, answer=30))
        given.clear()
        while engine.has_work:
            engine.step(collect)
        assert given == [(n, n % 4) for n in range(30)]
        calls.append([size for kind, size in model.calls if kind == "tokens"])
    assert calls[0] == [1] * 29
    assert len(calls[1]) < 15
    assert sum(calls[1]) > 29 - 1
    assert max(calls[1]) == 4


def test_turns_wrong_guesses_are_taken_back(clock: Clock) -> None:
    """The model goes on counting where its prompt did not: what was evaluated for the guess is cut off."""
    model = Counting(clock)
    engine = Scheduler(model, 1, gap_s=GAP_S, draft_tokens=3)  # type: ignore[arg-type]
    request = asked("one", 1, 0, answer=40)
    engine.submit(replace(request, prompt_ids=[0, 1, 5, 6, 7, 3] * 12))
    run(engine, 3)
    assert [size for kind, size in model.calls[1:]] == [4, 1]
    assert model.kept == 72 + 2, "the prompt, the token before and the one that the guess stood beside"


def test_turns_streams_together_are_not_guessed_for(clock: Clock) -> None:
    model = Counting(clock)
    engine = Scheduler(model, 2, gap_s=GAP_S, draft_tokens=3)  # type: ignore[arg-type]
    for n in range(2):
        engine.submit(asked(f"r{n}", 64, 7 - n))
    run(engine, 30)
    assert {size for kind, size in model.calls if kind == "tokens"} == {2}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 5))
def test_guesses_are_what_followed_last_time(ids: list[int], count: int) -> None:
    expected: list[int] = []
    for length in (3, 2):
        places = [i for i in range(len(ids) - length) if ids[i : i + length] == ids[-length:]]
        if places and count:
            expected = ids[places[-1] + length :][:count]
            break
    assert look_up(np.array(ids, np.int32), count) == expected
