"""The registry: who is alive, in what order beats count, and who may use an id."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_serve.contract.api import Heartbeat, WorkerState
from rbee_serve.contract.errors import WorkerAlreadyRegistered, WorkerNotFound
from rbee_serve.queen.registry import BeatOutcome, Registry


def beat(worker_id: str = "lab1-cpu0", *, seq: int = 0, started_at: float = 1000.0, **record: Any) -> Heartbeat:
    """Return a heartbeat of a worker with 4 free slots."""
    worker = {
        "id": worker_id,
        "hive_id": "lab1",
        "name": "cpu0",
        "url": f"http://{worker_id}:8001",
        "model_id": "smollm2",
        "model_ref": "hf:org/smollm2:Q4_1.gguf",
        "backend": "cpu",
        "device": 0,
        "port": 8001,
        "pid": 1,
        "status": "idle",
        "slots_total": 4,
        "slots_available": 4,
        "implementation": "llama-cpp",
        "version": "0.1.0",
        "started_at": started_at,
    } | record
    return Heartbeat.model_validate({"worker": worker, "timestamp": started_at + seq, "seq": seq})


def test_first_beat_registers_and_the_worker_is_routable() -> None:
    registry = Registry()

    assert registry.beat(beat(), 0.0) is BeatOutcome.REGISTERED
    assert registry.routable(registry.get("lab1-cpu0", 0.0), 0.0)


@pytest.mark.X09
@pytest.mark.parametrize(("silent_s", "routable", "known"), [(30, True, 1), (30.1, False, 1), (120, False, 1), (120.1, False, 0)])
def test_silence_ends_routing_after_30_s_and_memory_after_120_s(silent_s: float, routable: bool, known: int) -> None:
    registry = Registry()
    registry.beat(beat(), 0.0)
    (worker,) = registry

    registry.sweep(silent_s)

    assert registry.routable(worker, silent_s) is routable
    assert len(registry) == known


def test_silent_worker_is_hidden() -> None:
    registry = Registry()
    registry.beat(beat(), 0.0)

    assert registry.live(30.1) == []
    with pytest.raises(WorkerNotFound, match="live: none"):
        registry.get("lab1-cpu0", 30.1)


@pytest.mark.E02
def test_older_beat_never_overwrites() -> None:
    registry = Registry()
    registry.beat(beat(seq=5, slots_available=1), 0.0)

    assert registry.beat(beat(seq=4, slots_available=4), 1.0) is BeatOutcome.OUTDATED
    assert registry.get("lab1-cpu0", 1.0).record.slots_available == 1


def test_beat_of_the_previous_process_never_overwrites() -> None:
    registry = Registry()
    registry.beat(beat(seq=0, started_at=2000.0, pid=2), 0.0)

    assert registry.beat(beat(seq=9, started_at=1000.0, pid=1), 1.0) is BeatOutcome.OUTDATED
    assert registry.get("lab1-cpu0", 1.0).record.pid == 2


def test_successor_on_a_machine_whose_clock_was_set_back_is_taken_when_the_old_one_is_silent() -> None:
    registry = Registry()
    registry.beat(beat(started_at=2000.0, pid=1), 0.0)

    assert registry.beat(beat(started_at=1000.0, pid=2), 29.0) is BeatOutcome.OUTDATED
    assert registry.beat(beat(started_at=1000.0, pid=2), 31.0) is BeatOutcome.REGISTERED


@pytest.mark.E01
def test_same_id_from_another_address_is_refused_while_the_first_lives() -> None:
    registry = Registry()
    registry.beat(beat(), 0.0)
    other = beat(started_at=3000.0, url="http://elsewhere:8001", hive_id="lab9")

    with pytest.raises(WorkerAlreadyRegistered, match="lab1-cpu0") as e:
        registry.beat(other, 10.0)

    assert e.value.status == 409
    assert registry.get("lab1-cpu0", 10.0).record.hive_id == "lab1"
    assert registry.beat(other, 41.0) is BeatOutcome.REGISTERED


def test_goodbye_removes_and_an_overtaken_beat_does_not_bring_back() -> None:
    registry = Registry()
    registry.beat(beat(seq=1), 0.0)

    assert registry.beat(beat(seq=3, status="stopped"), 1.0) is BeatOutcome.REMOVED
    assert registry.beat(beat(seq=2), 1.1) is BeatOutcome.OUTDATED
    assert len(registry) == 0
    assert registry.beat(beat(seq=0, started_at=5000.0), 2.0) is BeatOutcome.REGISTERED


def test_goodbye_of_an_impostor_does_not_remove() -> None:
    registry = Registry()
    registry.beat(beat(), 0.0)

    with pytest.raises(WorkerAlreadyRegistered):
        registry.beat(beat(seq=9, status="stopped", url="http://elsewhere:8001"), 1.0)

    assert len(registry) == 1


@pytest.mark.E05
def test_failed_worker_is_not_routed_until_it_beats_again() -> None:
    registry = Registry()
    registry.beat(beat(seq=1), 0.0)
    worker = registry.get("lab1-cpu0", 0.0)

    registry.mark_failed(worker, 1.0)
    assert not registry.routable(worker, 1.0)
    assert worker.state is WorkerState.FAILED

    registry.beat(beat(seq=1), 2.0)  # the beat it had sent before it broke
    assert not registry.routable(worker, 2.0)

    registry.beat(beat(seq=2), 3.0)
    assert registry.routable(worker, 3.0)


def test_successor_of_a_failed_worker_starts_with_empty_books() -> None:
    registry = Registry()
    registry.beat(beat(), 0.0)
    old = registry.get("lab1-cpu0", 0.0)
    registry.acquire(old)
    registry.mark_failed(old, 1.0)

    assert registry.beat(beat(started_at=2000.0, pid=2), 2.0) is BeatOutcome.REGISTERED
    new = registry.get("lab1-cpu0", 2.0)
    registry.release(old)

    assert new is not old
    assert (new.in_flight, new.busy, new.failed) == (0, 0, False)


def test_own_requests_are_not_counted_twice() -> None:
    """The worker reports 3 slots taken, 2 of them by us: the other one is foreign, and stays so when ours end."""
    registry = Registry()
    registry.beat(beat(seq=0), 0.0)
    worker = registry.get("lab1-cpu0", 0.0)
    registry.acquire(worker)
    registry.acquire(worker)

    registry.beat(beat(seq=1, slots_available=1), 1.0)
    assert worker.busy == 3

    registry.release(worker)
    registry.release(worker)
    assert worker.busy == 1


def test_between_beats_idle_and_busy_follow_our_own_requests() -> None:
    registry = Registry()
    registry.beat(beat(slots_total=2, slots_available=2), 0.0)
    worker = registry.get("lab1-cpu0", 0.0)
    seen = [(worker.state, worker.slots_free)]

    for change in (registry.acquire, registry.acquire, registry.release):
        change(worker)
        seen.append((worker.state, worker.slots_free))

    assert seen == [("idle", 2), ("idle", 1), ("busy", 0), ("idle", 1)]


@pytest.mark.parametrize("state", [s for s in WorkerState if s not in ("idle", "busy", "stopped")])
def test_states_that_take_no_requests_are_listed_and_not_routed(state: WorkerState) -> None:
    registry = Registry()
    registry.beat(beat(status=state.value), 0.0)

    assert [w.state for w in registry.live(0.0)] == [state]
    assert not registry.routable(registry.get("lab1-cpu0", 0.0), 0.0)


@pytest.mark.N03
def test_dormant_worker_is_silent_and_not_forgotten() -> None:
    registry = Registry()
    registry.beat(beat(status="dormant"), 0.0)

    assert [w.state for w in registry.live(100_000.0)] == [WorkerState.DORMANT]


@pytest.mark.E01
def test_ten_first_beats_make_ten_records() -> None:
    registry = Registry()
    for n in range(10):
        registry.beat(beat(f"lab{n}-cpu0"), 0.0)

    assert len(registry.live(0.0)) == 10


@pytest.mark.E02
@given(
    st.lists(
        st.tuples(st.sampled_from([1000.0, 2000.0, 3000.0]), st.integers(0, 20), st.booleans()),
        min_size=1,
        max_size=20,
        unique_by=lambda b: b[:2],
    ),
    st.randoms(),
)
def test_whatever_the_order_of_arrival_the_newest_beat_wins(beats: list[tuple[float, int, bool]], rng: Any) -> None:
    registry = Registry()
    newest = max(beats)
    rng.shuffle(beats)

    for now, (started_at, seq, stops) in enumerate(beats):
        status = "stopped" if stops else "idle"
        registry.beat(beat(seq=seq, started_at=started_at, pid=int(started_at), status=status), now / 100)

    seen = [(w.record.started_at, w.order[1], w.record.pid) for w in registry]
    started_at, seq, stops = newest
    assert seen == ([] if stops else [(started_at, seq, int(started_at))])


def test_worker_that_fails_again_and_again_is_judged_by_it_also_after_a_restart_and_not_for_ever() -> None:
    registry = Registry()
    registry.beat(beat(), 0.0)
    penalties = []
    for n in range(1, 4):
        registry.mark_failed(registry.get("lab1-cpu0", float(n)), float(n))
        registry.beat(beat(started_at=1000.0 + n), float(n))
        penalties.append(registry.get("lab1-cpu0", float(n)).penalty(float(n)))

    assert penalties[0] == 0 < penalties[1] < penalties[2]
    assert registry.get("lab1-cpu0", 4.0).penalty(300.0) == 0


def test_dormant_worker_that_comes_back_with_its_clock_set_back_is_taken() -> None:
    registry = Registry()
    registry.beat(beat(status="dormant", started_at=2000.0), 0.0)

    assert registry.beat(beat(started_at=1000.0), 31.0) is BeatOutcome.REGISTERED
