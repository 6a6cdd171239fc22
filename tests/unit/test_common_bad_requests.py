"""Callers whose requests are wrong again and again."""

from __future__ import annotations

import pytest

from rbee_serve.common.bad_requests import BadRequests
from rbee_serve.contract.errors import RateLimited


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minute_s_worth_is_borne_and_then_as_many_as_the_time_gives_back() -> None:
    clock = Clock()
    bad = BadRequests(60, clock)
    for _ in range(60):
        bad.check("a")
        bad.count("a")

    with pytest.raises(RateLimited) as refused:
        bad.check("a")
    assert refused.value.details["retry_after_s"] == 1
    bad.check("b")  # nobody else is held up
    clock.now += 0.9
    with pytest.raises(RateLimited):
        bad.check("a")
    clock.now += 0.2
    bad.check("a")
    bad.count("a")
    with pytest.raises(RateLimited):
        bad.check("a")
    clock.now += 3600
    for _ in range(60):  # what was saved up is no more than a minute's worth
        bad.check("a")
        bad.count("a")
    with pytest.raises(RateLimited):
        bad.check("a")


def test_zero_counts_nobody() -> None:
    bad = BadRequests(0)
    for _ in range(1000):
        bad.count("a")
    bad.check("a")
    assert not bad._left


def test_memory_is_bounded() -> None:
    bad = BadRequests(10, lambda: 0.0)
    for n in range(10_050):
        bad.count(str(n))

    assert len(bad._left) == 10_000
