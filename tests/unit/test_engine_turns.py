"""Whose turn it is: prompts, bursts of them and running streams share the engine, told by a clock that calls move on."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from timed_model import GAP_S, STEP_S, TOKEN_S, Clock, Model, asked, run

from rbee_serve.worker.engine import scheduler
from rbee_serve.worker.engine.blocks import Blocks
from rbee_serve.worker.engine.constraint import Constraints
from rbee_serve.worker.engine.prefix_store import PrefixStore
from rbee_serve.worker.engine.protocol import GenerateRequest
from rbee_serve.worker.engine.scheduler import Scheduler


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)
    return clock


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
    for n in range(300):
        engine.submit(asked(f"r{n}", 64, 1 + n % 7, answer=1))
    run(engine, 270)
    assert ("tokens", 1) in model.calls


def test_turns_a_step_is_known_to_be_tokens_alone_and_to_be_followed_by_another(clock: Clock) -> None:
    """What a step brought may wait for the next one only then."""
    engine = Scheduler(Model(clock), 2, gap_s=GAP_S)  # type: ignore[arg-type]
    assert not engine.decodes_only, "nothing to do"
    engine.submit(asked("a", 64, 1, answer=3))
    assert not engine.decodes_only, "a prompt"
    run(engine, 1)
    assert engine.decodes_only
    engine.submit(asked("b", 64, 2))
    assert not engine.decodes_only, "a prompt beside it"
    run(engine, 1)
    engine.submit(asked("c", 64, 3))
    assert engine.decodes_only, "who waits has no slot"
    run(engine, 2)
    assert not engine.decodes_only, "a slot is free for who waits"


def test_turns_who_waits_is_told_so_at_once(clock: Clock) -> None:
    """For a prefix that another evaluates and for a slot: whoever asked knows that the worker lives, before any call is made."""
    model = Model(clock)
    engine = Scheduler(model, 2, gap_s=GAP_S)  # type: ignore[arg-type]

    def kinds(request: GenerateRequest) -> list[str]:
        return [kind for kind, _, _ in engine.submit(request)]

    assert kinds(asked("leads", 600, 1)) == ["started"]
    assert kinds(asked("follows", 600, 1)) == ["queued"]
    assert kinds(asked("waits", 600, 2)) == ["queued"]
    assert model.calls == []
    events: list[Any] = []
    while engine.has_work:
        engine.step(events.extend)
    assert {name: payload["cached_tokens"] for kind, name, payload in events if kind == "started"} == {
        "follows": 536, "waits": 0
    }  # fmt: skip


# --- prefixes: where a prompt's beginning comes from ---------------------------------------------------------------------


def serve(engine: Scheduler, *requests: GenerateRequest) -> dict[str, dict[str, Any]]:
    """Submit, run to the end and return what each was told when it started."""
    events: list[Any] = []
    for request in requests:
        events += engine.submit(request)
    while engine.has_work:
        engine.step(events.extend)
    assert [payload for kind, _, payload in events if kind == "error"] == []
    return {name: payload for kind, name, payload in events if kind == "started"}


def stored(folder: Path, **states: int) -> PrefixStore:
    """A store of prefixes of so many tokens, all 1; the model refuses those whose name begins with "bad"."""
    store = PrefixStore(folder, "class", 1 << 20)
    for name, count in states.items():
        state = (b"!" if name.startswith("bad") else b"s") + b"s" * (count - 1)
        store.save(np.ones(count, np.int32), count, state)
    for entry in store.entries:
        os.utime(entry.path, (1000, 1000))
    return store


def test_prefix_on_disk_that_is_refused_leaves_nothing_behind_that_counts(clock: Clock, tmp_path: Path) -> None:
    """Trying it has emptied the slot: what the slot shared before must not be taken for what it holds now."""
    model = Model(clock)
    store = stored(tmp_path)
    engine = Scheduler(model, 1, gap_s=GAP_S, store=store)  # type: ignore[arg-type]
    serve(engine, asked("warm", 400, 1, answer=2))
    store.entries = stored(tmp_path, bad=1000).entries
    events = engine.submit(asked("next", 1200, 1, answer=2))
    assert model.kept == 0
    assert [payload["cached_tokens"] for kind, _, payload in events if kind == "started"] == [0]
    run(engine, 20)
    assert list(tmp_path.iterdir()) == []


def test_prefix_on_disk_the_best_that_fits_and_is_good_is_taken(clock: Clock, tmp_path: Path) -> None:
    """One that is longer than the context is not even read, one that is refused makes way for the next."""
    store = stored(tmp_path, long=5000, bad=1000, good=900, short=300)
    (long,) = (e.path for e in store.entries if len(e.tokens) == 5000)
    engine = Scheduler(Model(clock), 2, gap_s=GAP_S, store=store)  # type: ignore[arg-type]
    told = serve(engine, asked("one", 1200, 1, answer=2))
    assert (told["one"]["cached_tokens"], told["one"]["cached_from"]) == (900, "disk")
    assert sorted(len(e.tokens) for e in store.entries) == [300, 900, 5000]
    assert long.stat().st_mtime == 1000


@pytest.mark.parametrize(("copying_s", "copies"), [(0.01, 1), (0.3, 0)])
def test_prefix_is_copied_where_that_is_faster_than_evaluating_it(clock: Clock, copying_s: float, copies: int) -> None:
    """llama.cpp moves a slot's whole room, however little of it is shared: 128 tokens are evaluated in 0.128 s."""
    model = Model(clock)
    model.copying_s = copying_s
    engine = Scheduler(model, 2, gap_s=GAP_S)  # type: ignore[arg-type]
    request = asked("long", 2000, 1, answer=2)
    serve(engine, request)
    assert request.prompt_ids is not None
    serve(engine, replace(request, request_id="fork", prompt_ids=[*request.prompt_ids[:128], *[2] * 500]))
    assert len(model.copied) == copies


def test_prefix_copies_keep_the_gap_of_running_streams(clock: Clock) -> None:
    model = Model(clock)
    model.copying_s = 0.1
    engine = Scheduler(model, 7, gap_s=GAP_S)  # type: ignore[arg-type]
    serve(engine, asked("warm", 2000, 1, answer=1))
    engine.submit(asked("runs", 64, 7, answer=90))
    run(engine, 4)
    before = len(model.calls)
    for n in range(5):  # the first takes the slot that has it
        engine.submit(asked(f"r{n}", 1990 - n, 1, answer=1))
    run(engine, 60)
    assert len(model.copied) == 4
    calls = list(zip(model.ended, model.calls, strict=True))[before - 1 :]
    steps = [at for at, (kind, _) in calls if kind == "tokens"]
    assert max(b - a for a, b in itertools.pairwise(steps)) <= GAP_S + STEP_S + 1e-9


def test_prefix_takes_the_slot_used_longest_ago_and_spoils_no_long_one(clock: Clock) -> None:
    """A slot with much more than is shared stays as it is; without anything shared the least recently used one goes."""
    model = Model(clock)
    model.copying_s = 10.0  # nothing is worth a copy
    engine = Scheduler(model, 3, gap_s=GAP_S)  # type: ignore[arg-type]
    for name, length, first in (("a", 600, 1), ("b", 700, 2), ("c", 800, 3)):
        clock.now += 1
        serve(engine, asked(name, length, first, answer=1))
    held = dict(model.holds)
    clock.now += 1
    request = replace(asked("fork", 0, 0, answer=1), prompt_ids=[3] * 200 + [5] * 100)
    assert serve(engine, request)["fork"]["cached_tokens"] == 0
    assert [seq for seq in held if model.holds[seq] != held[seq]] == [0], "a was used longest ago"
    clock.now += 1
    assert serve(engine, asked("again", 790, 3, answer=1))["again"]["cached_tokens"] == 726
    clock.now += 1
    serve(engine, asked("new", 100, 6, answer=1))
    assert model.holds[1] == 100, "b was used longest ago by then"


class Rows(Model):
    """Notes how many passes over the weights each step would take llama.cpp, and which tokens each sequence holds."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.passes: list[int] = []
        self.streams: list[int] = []
        self.tokens: dict[int, list[int]] = {}

    def prefill(self, tokens: NDArray[np.int32], start: int, seq: int, owner: str, *, logits: bool) -> int:
        self.tokens[seq] = [*self.tokens.get(seq, [])[:start], *tokens.tolist()]
        return super().prefill(tokens, start, seq, owner, logits=logits)

    def decode_step(self, rows: list[tuple[int, int, int]]) -> int:
        seqs = [seq for _, _, seq in rows]
        self.streams.append(len(rows))
        self.passes.append(1 + sum(b != a + 1 for a, b in itertools.pairwise(seqs)))
        for token, position, seq in rows:
            self.tokens[seq] = [*self.tokens[seq][:position], token]
        return super().decode_step(rows)

    def copy(self, source: int, target: int, held: int) -> float:
        self.tokens[target] = self.tokens[source][:held]
        return super().copy(source, target, held)

    def agrees_with(self, engine: Scheduler) -> bool:
        """Whether each sequence holds what its slot is said to."""
        return all(self.tokens.get(s.seq, [])[: len(s.cached)] == s.cached.tolist() for s in engine._slots)


def mixed(name: str, number: int) -> GenerateRequest:
    """A prompt of 300 tokens that shares at most one with that of another number below 64."""
    return replace(asked(name, 0, 0), prompt_ids=[number // 8, number % 8] * 150)


def test_streams_run_in_slots_without_a_gap_and_what_those_held_is_kept(clock: Clock) -> None:
    model = Rows(clock)
    engine = Scheduler(model, 6, gap_s=GAP_S)  # type: ignore[arg-type]
    serve(engine, mixed("first", 63))
    for turn in range(4):
        serve(engine, *[mixed(f"r{turn}-{n}", turn * 3 + n) for n in range(3)])
        assert model.agrees_with(engine)
    assert {passes for streams, passes in zip(model.streams, model.passes, strict=True) if streams == 3} == {1}
    assert model.copied, "the oldest slot alone is not always beside the others"
    told = serve(engine, *[mixed(f"again-{number}", number) for number in range(7, 12)])
    assert [facts["cached_tokens"] > 200 for facts in told.values()] == [True] * 5, "the last prompts are still there"


def test_a_stream_takes_the_place_of_one_that_has_ended(clock: Clock) -> None:
    model = Rows(clock)
    engine = Scheduler(model, 5, gap_s=GAP_S)  # type: ignore[arg-type]
    for first, answer in ((1, 90), (2, 2), (3, 90)):
        engine.submit(asked(f"r{first}", 64, first, answer=answer))
    run(engine, 8)
    assert model.passes[-1] == 2, "r2 has ended between them"
    engine.submit(asked("newcomer", 64, 4, answer=40))
    run(engine, 4)
    assert model.passes[-1] == 1


class Exchanging(Rows):
    """Two sequences change places; ``answer``: whether the first one moves, and whether the second one's is kept."""

    exchanging_s = 0.001  # a position
    answer = True, True

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.exchanged: list[tuple[int, int]] = []

    def exchange_s(self, first_held: int, second_held: int) -> float:
        return (first_held + second_held) * self.exchanging_s

    def exchange(self, first: int, second: int) -> tuple[bool, bool]:
        self.exchanged.append((first, second))
        moved, kept = self.answer
        ours, theirs = (self.tokens.get(seq, []) for seq in (first, second))
        held = self.holds.get(first, 0), self.holds.get(second, 0)
        if moved:
            self.tokens[second], self.holds[second] = ours, held[0]
            self.tokens[first], self.holds[first] = (theirs, held[1]) if kept else ([], 0)
        else:
            self.tokens[second], self.holds[second] = [], 0
        return self.answer


def ends_between(model: Exchanging, **answers: int) -> tuple[Scheduler, dict[str, list[int]]]:
    """Run three streams in slots 0 to 2, of which the middle one ends first; slots 3 and 4 hold prompts of before."""
    engine = Scheduler(model, 5, gap_s=GAP_S)  # type: ignore[arg-type]
    serve(engine, *[mixed(f"before{n}", n) for n in range(5)])
    told: dict[str, list[int]] = {}

    def collect(events: list[Any]) -> None:
        for kind, name, payload in events:
            if kind == "token":
                told.setdefault(name, []).append(payload[0])

    for n, name in enumerate(("a", "b", "c")):
        engine.submit(replace(mixed(name, n), params=asked(name, 0, 0, answer=answers.get(name, 90)).params))
    while engine.has_work:
        engine.step(collect)
    return engine, told


def test_streams_close_ranks_when_one_between_them_ends_and_no_cache_is_lost(clock: Clock) -> None:
    model = Exchanging(clock)
    model.exchanging_s = 0.0001
    engine, told = ends_between(model, b=5)
    assert told == {"a": [*range(90)], "b": [*range(5)], "c": [*range(90)]}
    assert len(model.exchanged) == 1
    two = [passes for streams, passes in zip(model.streams, model.passes, strict=True) if streams == 2]
    assert two[:2] == [1, 1], "before the next token"
    assert set(two) == {1}
    assert model.agrees_with(engine)
    again = serve(engine, *[mixed(f"again{n}", n) for n in range(5)])
    assert [facts["cached_tokens"] > 200 for facts in again.values()] == [True] * 5


@pytest.mark.parametrize(
    ("cost_s", "left"), [(0.0001, 6), (0.002, 90)], ids=["for a few tokens", "where it takes longer than the gap"]
)
def test_ranks_stay_open_where_closing_them_does_not_pay(clock: Clock, cost_s: float, left: int) -> None:
    model = Exchanging(clock)
    model.exchanging_s = cost_s
    _, told = ends_between(model, a=left, b=5, c=left)
    assert model.exchanged == []
    assert len(told["c"]) == left


@pytest.mark.parametrize("answer", [(False, False), (True, False)])
def test_an_exchange_that_llama_cpp_refuses_harms_no_stream(clock: Clock, answer: tuple[bool, bool]) -> None:
    model = Exchanging(clock)
    model.exchanging_s, model.answer = 0.0001, answer
    engine, told = ends_between(model, b=5)
    assert told == {"a": [*range(90)], "b": [*range(5)], "c": [*range(90)]}
    assert len(model.exchanged) == 1, "it is not tried again and again"
    assert model.agrees_with(engine)


def test_ranks_are_closed_in_the_next_gap_where_this_one_has_no_time_left(clock: Clock) -> None:
    model = Exchanging(clock)
    model.exchanging_s = 0.0001
    engine = Scheduler(model, 5, gap_s=GAP_S)  # type: ignore[arg-type]
    for name, first, answer in (("a", 1, 90), ("b", 2, 5), ("c", 3, 90)):
        engine.submit(asked(name, 64, first, answer=answer))
    engine._has_time_for = lambda seconds, gap_s: False  # type: ignore[method-assign]
    while (2, 2) not in zip(model.streams, model.passes, strict=True):  # streams, passes of a step
        run(engine, 1)
    run(engine, 2)
    assert model.passes[-3:] == [2, 2, 2]
    del engine._has_time_for  # type: ignore[method-assign]
    run(engine, 2)
    assert model.passes[-2:] == [1, 1]


def test_a_stream_that_begins_apart_from_the_others_joins_them(clock: Clock) -> None:
    """In the slot that has most of its prompt; its place there is no reason to stay."""
    model = Exchanging(clock)
    model.exchanging_s = 0.0001
    engine = Scheduler(model, 6, gap_s=GAP_S)  # type: ignore[arg-type]
    serve(engine, *[mixed(f"before{n}", n) for n in range(6)])
    for n in (0, 1, 4):
        engine.submit(replace(mixed(f"on{n}", n), params=asked("", 0, 0, answer=200).params))
    run(engine, 20)
    assert model.streams[-1] == 3
    assert model.passes[-1] == 1
    assert model.agrees_with(engine)


def test_moves_keep_the_gap_of_running_streams_and_are_not_made_for_a_few_tokens(clock: Clock) -> None:
    model = Rows(clock)
    model.copying_s = 0.03
    gap_s = 0.1  # three moves, not six
    engine = Scheduler(model, 8, gap_s=gap_s)  # type: ignore[arg-type]
    for number in range(8):
        serve(engine, mixed(f"warm{number}", number))
        clock.now += 1
    engine.submit(replace(asked("runs", 0, 0, answer=300), prompt_ids=[0, 4] * 160))  # goes on in slot 4
    run(engine, 4)
    before, copied = len(model.calls), len(model.copied)
    for n in range(6):
        engine.submit(replace(asked(f"brief{n}", 0, 0, answer=2), prompt_ids=[6, n] * 150))
    run(engine, 40)
    assert len(model.copied) == copied, "two tokens are not worth a move"
    for n in range(6):
        engine.submit(replace(asked(f"long{n}", 0, 0, answer=40), prompt_ids=[5, n] * 150))
    run(engine, 60)
    assert len(model.copied) > copied
    assert model.agrees_with(engine)
    calls = list(zip(model.ended, model.calls, strict=True))[before - 1 :]
    steps = [at for at, (kind, _) in calls if kind == "tokens"]
    assert max(b - a for a, b in itertools.pairwise(steps)) <= gap_s + STEP_S + 1e-9


def test_of_two_neighbours_the_one_whose_cache_moves_quickly_is_taken(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Rows(clock)
    monkeypatch.setattr(model, "copy_s", lambda held: held * TOKEN_S / 10)
    engine = Scheduler(model, 5, gap_s=GAP_S)  # type: ignore[arg-type]
    for number, length in enumerate((300, 900, 64, 100, 64)):  # slots 0 to 4
        serve(engine, replace(mixed(f"warm{number}", number), prompt_ids=[6, number] * (length // 2)))
        clock.now += 1
    running = replace(mixed("goes on", 2), prompt_ids=[6, 2] * 200)  # in slot 2, which has its beginning
    engine.submit(running)
    run(engine, 6)
    engine.submit(mixed("newcomer", 30))
    run(engine, 6)
    assert model.passes[-1] == 1
    assert model.copied == [(3, 0)], "not 900 tokens"


def test_a_cache_that_takes_long_to_move_stays_where_it_is(clock: Clock) -> None:
    model = Rows(clock)
    model.copying_s = 10.0
    engine = Scheduler(model, 4, gap_s=GAP_S)  # type: ignore[arg-type]
    for first in range(1, 5):
        serve(engine, asked(f"r{first}", 300, first))
        clock.now += 1
    serve(engine, asked("x", 300, 2))
    clock.now += 1
    serve(engine, asked("y", 300, 7), asked("z", 300, 6))
    assert model.copied == []
    assert {model.holds[seq] > 0 for seq in range(4)} == {True}


def test_prefix_of_a_recurrent_model_is_taken_whole_or_not_at_all(clock: Clock) -> None:
    """Its state can not be cut: nobody waits for it, nothing of it is copied, and a conversation goes on where it was."""
    model = Model(clock)
    model.recurrent, model.can_be_cut, model.blocks = True, False, Blocks(128, two_kernels=False)
    engine = Scheduler(model, 2, gap_s=GAP_S)  # type: ignore[arg-type]
    told = serve(engine, asked("one", 600, 1, answer=1), asked("two", 600, 1, answer=1))
    assert [t["cached_tokens"] for t in told.values()] == [0, 0]
    told = serve(engine, asked("goes-on", 900, 1, answer=1), asked("shorter", 500, 1, answer=1))
    assert {name: t["cached_tokens"] for name, t in told.items()} == {"goes-on": 600, "shorter": 0}
    assert model.copied == []


# --- beside the streams: embeddings, and what grammars need ---------------------------------------------------------------


def embed_beside(engine: Scheduler, model: Model, clock: Clock, steps: int, token_s: float = TOKEN_S) -> list[int | None]:
    """Do as the engine's loop does while embeddings are asked for without end; return how many tokens each time."""
    given = []
    for _ in range(steps):
        if engine.has_work:
            engine.step(lambda events: None)
        rows = engine.spare(32, token_s)
        given.append(rows)
        if rows != 0:
            size = 191 if rows is None else min(rows, 191)
            model.took("embed", size, size * TOKEN_S)
    return given


def pauses(model: Model) -> list[float]:
    steps = [at for at, (kind, _) in zip(model.ended, model.calls, strict=True) if kind == "tokens"]
    return [b - a for a, b in itertools.pairwise(steps)]


@pytest.mark.parametrize("pace", [0.2, 1.0, 10.0], ids=["quick", "usual", "slow"])
def test_turns_embeddings_keep_the_gap_of_running_streams(clock: Clock, monkeypatch: pytest.MonkeyPatch, pace: float) -> None:
    """They get what a gap has room for, on a slow machine their smallest block; without streams as much as they like."""
    monkeypatch.setitem(globals(), "TOKEN_S", TOKEN_S * pace)
    model = Model(clock)
    engine = Scheduler(model, 2, gap_s=GAP_S)  # type: ignore[arg-type]
    assert embed_beside(engine, model, clock, 2, TOKEN_S) == [None, None]
    engine.submit(asked("runs", 64, 7, answer=90))
    embed_beside(engine, model, clock, 30, TOKEN_S)
    assert max(pauses(model)) <= max(GAP_S, 32 * TOKEN_S) + STEP_S + 1e-9
    assert ("embed", 32) in model.calls or pace < 10
    assert sum(kind == "embed" for kind, _ in model.calls) > 8


def test_turns_embeddings_and_a_long_prompt_take_turns(clock: Clock) -> None:
    """With a gap in which either fits, but not both: neither starves, and the streams wait for one of them at a time."""
    model = Model(clock)
    engine = Scheduler(model, 2, gap_s=0.07)  # type: ignore[arg-type]
    engine.submit(asked("runs", 64, 7, answer=90))
    run(engine, 3)
    engine.submit(asked("long", 3000, 1))
    embed_beside(engine, model, clock, 60)
    kinds = [kind for kind, _ in model.calls[4:]]
    assert kinds.count("prompt") > 10
    assert kinds.count("embed") > 10
    assert max(pauses(model)[3:]) <= 0.07 + STEP_S + 1e-9


def test_turns_embeddings_without_end_do_not_keep_a_prefix_from_being_copied(clock: Clock) -> None:
    model = Model(clock)
    model.copying_s = 0.06
    engine = Scheduler(model, 4, gap_s=0.07)  # type: ignore[arg-type]
    engine.submit(asked("runs", 2000, 1, answer=200))
    embed_beside(engine, model, clock, 40)
    for n in range(2):
        engine.submit(asked(f"r{n}", 1990 - n, 1, answer=1))
    embed_beside(engine, model, clock, 40)
    assert len(model.copied) == 2


class Spelling(Model):
    """Has words, and says which were read between two calls."""

    n_vocab = 20_000

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.read: list[int] = []

    def piece(self, token: int) -> bytes:
        self.read.append(len(self.calls))
        self._clock.now += 0.00002  # 0.4 s for all
        return b"%d" % token

    @property
    def eog_ids(self) -> NDArray[np.int64]:
        return np.zeros(0, np.int64)


def test_turns_the_first_grammar_is_prepared_between_the_tokens_of_running_streams(clock: Clock) -> None:
    """All tokens are read and sorted before its first draw, a part at a time: at no time do streams wait for all of them."""
    model = Spelling(clock)
    engine = Scheduler(model, 2, gap_s=GAP_S)  # type: ignore[arg-type]
    engine.submit(asked("runs", 64, 7, answer=200))
    run(engine, 4)
    request = asked("constrained", 64, 6, answer=3)
    request.params.grammar = 'root ::= "12" "3"*'
    events: list[Any] = engine.submit(request)
    while ("finished", "constrained") not in [(kind, name) for kind, name, _ in events]:
        engine.step(events.extend)
    assert (
        b"".join(payload[2].encode() for kind, name, payload in events if (kind, name) == ("token", "constrained"))[:3] == b"123"
    )
    assert len(model.read) >= model.n_vocab
    a_call = [model.read.count(n) for n in range(len(model.calls))]
    assert max(a_call) < model.n_vocab / 5
    assert max(pauses(model)) <= GAP_S + STEP_S + 1e-9


def test_automata_of_too_many_bytes_are_forgotten(clock: Clock) -> None:
    constraints = Constraints(Spelling(clock))  # type: ignore[arg-type]
    params = asked("one", 1, 1).params
    made = []
    for n in range(3):
        params.grammar = f'root ::= "{n}"'
        constraint = constraints.of(params)
        assert constraint is not None
        made.append(weakref.ref(constraint._matcher._automaton))
    del constraint
    automata = [automaton() for automaton in made]
    assert None not in automata
    automata[1].masks[0] = np.zeros(20_000_000, np.int32)  # type: ignore[union-attr]
    automata.clear()
    constraints.tidy()
    gc.collect()
    assert [automaton() is not None for automaton in made] == [False, False, True]
