"""Prefix affinity: whom it finds, that it never overloads anybody, that its memory is bounded."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from test_queen_placement import fleet

from rbee_serve.contract.api import InferenceRequest
from rbee_serve.queen.placement import AFFINITY_SPREAD, Wanted, pick
from rbee_serve.queen.prefix import BLOCK_CHARS, PrefixIndex, chain

SYSTEM = "You are a helpful assistant of the harbour office. " * 40


def asked(text: str, **more: Any) -> list[int]:
    return chain(InferenceRequest(messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}], **more))


def test_same_beginning_same_hashes() -> None:
    one, other = asked("When is high water?"), asked("Who is on duty?" * 30)
    shared = len(SYSTEM) // BLOCK_CHARS

    assert one[:shared] == other[:shared]
    assert one[shared + 1 :] != other[shared + 1 :]
    assert chain(InferenceRequest(prompt="short")) == []
    assert not set(one) & set(asked("When is high water?", model="another"))
    assert len(chain(InferenceRequest(prompt="x" * 32_000))) == 32_000 // BLOCK_CHARS


def test_worker_that_has_seen_the_beginning_is_preferred_until_it_is_much_busier() -> None:
    registry = fleet(*({"slots_total": 4, "slots_available": 4} for _ in range(3)))
    index, hashes = PrefixIndex(), asked("x")
    knows = registry.get("lab2-cpu0", 0.0)
    index.remember(hashes, knows)
    got = []
    for _ in range(6):
        choice = pick(registry, Wanted(), 0.0, affinity=index.match(hashes))
        assert choice is not None
        registry.acquire(choice.worker)
        got.append((choice.worker.id == "lab2-cpu0", choice.reason))

    # Up to half its slots more than the least busy one, then others come in.
    assert got[:3] == [(True, "prefix")] * 3
    assert got[3] == (False, "least-loaded")


def test_longest_match_wins_and_a_wrong_guess_is_corrected() -> None:
    registry = fleet({}, {})
    some, more = registry
    index = PrefixIndex()
    index.remember(asked("a" * 600)[:3], some)
    index.remember(asked("a" * 600), more)

    found = index.match(asked("a" * 600))
    assert found == {some: 3, more: len(asked("a" * 600))}
    assert pick(registry, Wanted(), 0.0, affinity=found).worker is more  # type: ignore[union-attr]
    index.forget(asked("a" * 600), more)
    assert index.match(asked("a" * 600)) == {some: 3}


def test_successor_of_a_worker_knows_nothing() -> None:
    registry = fleet({}, {})
    old = registry.get("lab1-cpu0", 0.0)
    index = PrefixIndex()
    index.remember(asked("x"), old)
    from test_queen_registry import beat

    registry.beat(beat("lab1-cpu0", started_at=2000.0, hive_id="lab1"), 1.0)

    choice = pick(registry, Wanted(), 1.0, affinity=index.match(asked("x")))
    assert choice is not None
    assert choice.reason == "least-loaded"


def test_memory_is_bounded() -> None:
    registry = fleet(*({} for _ in range(20)))
    index = PrefixIndex(blocks_max=100)
    for n in range(200):
        for worker in registry:
            index.remember([n], worker)

    assert len(index) == 100
    assert len(index.match([199])) <= 8


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 4), st.sampled_from(["idle", "draining", "loading"])), min_size=1, max_size=6
    ),
    st.dictionaries(st.integers(0, 5), st.integers(1, 9)),
)
def test_affinity_never_overloads_and_never_breaks_a_rule(workers: list[tuple[int, int, str]], knowing: dict[int, int]) -> None:
    """Whoever is chosen for the prefix has a free slot, takes requests, and is at most the allowed share busier than the best."""
    registry = fleet(*({"slots_total": 5, "slots_available": 5, "status": s} for _, _, s in workers))
    everyone = list(registry)
    for worker, (ours, foreign, _) in zip(everyone, workers, strict=True):
        worker.in_flight, worker.foreign = ours, min(foreign, 5 - ours)
    affinity = {everyone[n]: blocks for n, blocks in knowing.items() if n < len(everyone)}

    without = pick(registry, Wanted(), 0.0)
    choice = pick(registry, Wanted(), 0.0, affinity=affinity)

    assert (choice is None) == (without is None)
    if choice is not None and without is not None and choice.reason == "prefix":
        assert choice.worker in affinity
        assert registry.routable(choice.worker, 0.0)
        assert choice.worker.slots_free > 0
        assert choice.worker.busy / 5 - without.worker.busy / 5 <= AFFINITY_SPREAD
