"""What a client key may do: models, requests a minute, requests at once, expiry."""

from __future__ import annotations

import time

import pytest

from rbee_serve.contract.errors import ModelAccessDenied, RateLimited
from rbee_serve.contract.keys import ClientKey
from rbee_serve.queen.key_limits import KeyLimits


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def key(**limits: object) -> ClientKey:
    return ClientKey.model_validate({"id": "k1", "name": "laptop", "sha256": "0" * 64} | limits)


@pytest.mark.parametrize(
    ("models", "model", "allowed"),
    [
        (None, "any", True),
        ([], "any", False),
        (["a", "b"], "b", True),
        (["a"], "ab", False),
        (["smol*"], "smollm2", True),
        (["smol*"], "llama", False),
        (["*"], "llama", True),
    ],
)
def test_models_of_a_key(models: list[str] | None, model: str, allowed: bool) -> None:
    limits = KeyLimits(Clock())

    if allowed:
        limits.admit(key(models=models), model).release()
    else:
        with pytest.raises(ModelAccessDenied, match="laptop"):
            limits.admit(key(models=models), model)


def test_requests_at_once_are_given_back_once() -> None:
    limits = KeyLimits(Clock())
    two = key(concurrent_requests=2)
    first, _ = limits.admit(two, None), limits.admit(two, None)

    with pytest.raises(RateLimited, match="2 requests running"):
        limits.admit(two, None)
    first.release()
    first.release()

    limits.admit(two, None)
    with pytest.raises(RateLimited):
        limits.admit(two, None)


def test_requests_a_minute_come_back_with_time_and_the_error_says_when() -> None:
    clock = Clock()
    limits = KeyLimits(clock)
    thirty = key(requests_per_minute=30)
    for _ in range(30):
        limits.admit(thirty, None).release()

    with pytest.raises(RateLimited) as e:
        limits.admit(thirty, None)
    assert e.value.details["retry_after_s"] == 2

    clock.now += 2
    limits.admit(thirty, None)
    with pytest.raises(RateLimited):
        limits.admit(thirty, None)
    clock.now += 3600
    for _ in range(30):
        limits.admit(thirty, None)
    with pytest.raises(RateLimited):
        limits.admit(thirty, None)


def test_a_refused_request_costs_nothing() -> None:
    limits = KeyLimits(Clock())
    one = key(requests_per_minute=1, models=["a"], concurrent_requests=1)

    with pytest.raises(ModelAccessDenied):
        limits.admit(one, "b")

    limits.admit(one, "a")


def test_keys_are_counted_apart() -> None:
    limits = KeyLimits(Clock())
    limits.admit(key(concurrent_requests=1), None)

    limits.admit(key(id="k2", concurrent_requests=1), None)


def test_expiry_is_in_epoch_seconds() -> None:
    assert key(expires_at=time.time()).expires_at is not None
    with pytest.raises(ValueError, match="expires_at"):
        key(expires_at=-1)
