"""The queue: order, fairness between keys, bounds, and that a slot goes to the next in line."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_queen_placement import fleet

from rbee_serve.contract.errors import AllSlotsBusy
from rbee_serve.queen.placement import Wanted
from rbee_serve.queen.queue import Queue, Ticket
from rbee_serve.queen.registry import Worker

MODEL = "smollm2"


class Line:
    """A queue before one worker of ``slots``, all taken by ``holder`` at first."""

    def __init__(self, slots: int = 1, queue_max: int = 100, holder: str = "holder") -> None:
        self.registry = fleet({"slots_total": slots, "slots_available": slots})
        (self.worker,) = self.registry
        self.queue = Queue(self.registry, lambda: 0.0, queue_max)
        self.running: list[tuple[str, Worker]] = []
        for _ in range(slots):
            self.registry.acquire(self.worker)
            self.queue.started(MODEL, holder)
            self.running.append((holder, self.worker))
        self.tickets: list[Ticket] = []

    def enter(self, key: str = "", priority: int = 0, **more: Any) -> Ticket:
        ticket = self.queue.enter(MODEL, more.pop("wanted", Wanted(model=MODEL)), key=key, priority=priority, **more)
        self.tickets.append(ticket)
        return ticket

    def free(self) -> Ticket | None:
        """End the oldest running request; return who got its slot."""
        before = {t for t in self.tickets if t.granted.done()}
        key, worker = self.running.pop(0)
        self.queue.ended(MODEL, key, 1.0)
        self.registry.release(worker)
        new = [t for t in self.tickets if t.granted.done() and t not in before]
        assert len(new) <= 1
        if not new:
            return None
        self.running.append((new[0].key, new[0].granted.result().worker))
        return new[0]


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


@in_loop
async def test_first_come_first_served_within_a_key() -> None:
    line = Line()
    tickets = [line.enter() for _ in range(4)]

    assert [line.queue.position(t) for t in tickets] == [1, 2, 3, 4]
    assert [line.free() for _ in range(4)] == tickets
    assert line.queue.depth() == {}


@in_loop
async def test_greater_priority_goes_first_within_a_key() -> None:
    line = Line()
    low, high, also_high = line.enter(priority=0), line.enter(priority=5), line.enter(priority=5)

    assert [line.free() for _ in range(3)] == [high, also_high, low]


@in_loop
async def test_key_that_shouts_does_not_crowd_out_another() -> None:
    """Key a asks ten times at the highest priority before key b asks once."""
    line = Line(holder="a")
    many = [line.enter("a", 10) for _ in range(10)]
    one = line.enter("b", -10)

    assert line.queue.position(one) == 1
    assert [line.free(), line.free()] == [one, many[0]]


@in_loop
async def test_keys_take_turns() -> None:
    line = Line()
    for key in ("a", "a", "a", "b", "b", "b", "c"):
        line.enter(key)

    served = [t.key for t in (line.free() for _ in range(7)) if t is not None]

    assert Counter(served[:3]) == Counter("abc")
    assert Counter(served[3:5]) == Counter("ab")


@in_loop
async def test_stream_that_lost_its_worker_goes_before_all() -> None:
    line = Line(queue_max=1)
    line.enter("a", 10)
    lost = line.enter("b", 0, front=True)

    assert line.queue.position(lost) == 1
    assert line.free() is lost


@in_loop
async def test_full_queue_refuses_and_says_when_to_come_back() -> None:
    line = Line(slots=2, queue_max=2)
    for _ in range(2):
        line.enter()
    with pytest.raises(AllSlotsBusy) as e:
        line.enter()

    assert e.value.details.items() >= {"slots_total": 2, "slots_busy": 2, "queued": 2}.items()
    assert 1 <= e.value.details["retry_after_s"] <= 60


@in_loop
async def test_who_leaves_moves_the_others_up_and_wastes_no_slot() -> None:
    line = Line()
    first, second = line.enter(), line.enter()
    line.queue.leave(first)
    line.queue.leave(first)

    assert line.queue.position(second) == 1
    assert line.free() is second


@in_loop
async def test_waiting_for_another_machine_holds_nobody_up() -> None:
    line = Line()
    elsewhere = line.enter(wanted=Wanted(model=MODEL, node="nowhere"))
    here = line.enter()

    assert line.free() is here
    assert not elsewhere.granted.done()
    line.queue.leave(elsewhere)


@in_loop
async def test_place_in_line_is_kept_by_one_that_was_refused() -> None:
    line = Line()
    first, second = line.enter(), line.enter()
    assert line.free() is first
    again = line.enter(before=first)

    assert [line.queue.position(again), line.queue.position(second)] == [1, 2]
    line.queue.leave(again)
    line.queue.leave(second)


@in_loop
async def test_slot_that_nobody_tells_of_is_found() -> None:
    """The worker refused as busy, so it counts as full; nobody says that it no longer is."""
    line = Line()
    now = [0.0]
    line.queue.clock = lambda: now[0]
    ticket = line.enter()
    line.registry.mark_full(line.worker, 0.0)
    line.queue.ended(MODEL, "holder", 1.0)
    line.registry.release(line.worker)
    assert not ticket.granted.done()

    now[0] = 1.0
    choice = await asyncio.wait_for(ticket.granted, 5)
    assert (choice.worker, choice.reason) == (line.worker, "probe")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 2)), max_size=20),
    st.lists(st.booleans(), max_size=40),
    st.integers(1, 3),
)
def test_positions_tell_the_truth_and_nobody_is_lost(asked: list[tuple[str, int]], leave: list[bool], slots: int) -> None:
    """Whoever has position 1 gets the next slot; each gets exactly one; slots in use never exceed the worker's."""

    async def play() -> None:
        line = Line(slots)
        waiting = [line.enter(key, priority) for key, priority in asked]
        assert sorted(line.queue.position(t) for t in waiting) == list(range(1, len(waiting) + 1))
        leaving = iter(leave)
        served = 0
        while waiting:
            if next(leaving, False):
                line.queue.leave(waiting.pop())
                continue
            first = min(waiting, key=line.queue.position)
            got = line.free()
            assert got is not None
            # A request of a running key that has just ended may change whose turn it is, never against the rule.
            held = Counter(key for key, _ in line.running[:-1])
            assert held[got.key] <= min(held[t.key] for t in waiting)
            assert got.key != first.key or got is first
            waiting.remove(got)
            served += 1
            assert line.worker.in_flight == slots
        assert line.queue.depth() == {}

    asyncio.run(play())
