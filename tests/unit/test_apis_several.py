"""Several answers of one request over a backend that lets them wait or refuses them, as a queen does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import pytest

from rbee_serve.common.apis.streams import Backend, End, Failed, Generations
from rbee_serve.contract import events
from rbee_serve.contract.api import InferenceRequest
from rbee_serve.contract.errors import AllSlotsBusy, RateLimited, RbeeError
from rbee_serve.contract.events import Event

STARTED = events.started("r", "m", seed=1, prompt_tokens=1, cached_tokens=0, worker_id="w")
END = events.end(1, "EOS", prompt_ms=1, decode_ms=1, prompt_tokens=1)


class Places:
    """A backend with one place. Others wait in line for it, or are refused by ``refusal``: at once or while they wait."""

    def __init__(self, refusal: RbeeError | None = None, *, at_once: bool = False) -> None:
        self.refusal, self.at_once = refusal, at_once
        self.place = asyncio.Lock()
        self.waiting = self.most_waiting = self.refused = 0

    async def open(self, http: object, request: InferenceRequest, api: str) -> Any:
        if self.at_once and self.place.locked():
            assert self.refusal is not None
            self.refused += 1
            raise self.refusal
        return Place(self)


class Place:
    """One stream of ``Places``."""

    id = model = "x"

    def __init__(self, places: Places) -> None:
        self.error: RbeeError | None = None
        self._places = places
        self._has_place = False

    async def events(self) -> AsyncGenerator[Sequence[tuple[str, Event]], None]:
        places = self._places
        if places.place.locked():
            places.waiting += 1
            places.most_waiting = max(places.most_waiting, places.waiting)
            yield [("", events.queued(1, 0))]
            if places.refusal is not None:
                places.refused += 1
                places.waiting -= 1
                self.error = places.refusal
                yield [("", events.error(places.refusal))]
                return
        await places.place.acquire()
        places.waiting = 0
        self._has_place = True
        yield [("", STARTED)]
        for n in range(3):
            await asyncio.sleep(0)
            yield [("", events.token("t", n, n))]
        yield [("", END)]

    async def aclose(self) -> None:
        if self._has_place:
            self._has_place = False
            self._places.place.release()


def read(places: Places, n: int = 4) -> tuple[list[int], list[RbeeError]]:
    """Return which answers ended, in order, and what failed."""

    async def run() -> tuple[list[int], list[RbeeError]]:
        requests = [InferenceRequest(prompt="x")] * n
        generations = Generations(cast(Backend, places), cast(Any, None), requests, "openai")
        ended: list[int] = []
        failed: list[RbeeError] = []
        try:
            await generations.open()
            async for k, parts in generations.parts():
                ended += [k for part in parts if isinstance(part, End)]
                failed += [part.error for part in parts if isinstance(part, Failed)]
        finally:
            await generations.aclose()
        assert not places.place.locked()
        return ended, failed

    return asyncio.run(asyncio.wait_for(run(), 10))


def test_at_most_one_of_them_waits_in_line() -> None:
    places = Places()

    assert read(places) == ([0, 1, 2, 3], [])
    assert places.most_waiting == 1


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("refusal", [AllSlotsBusy("busy"), RateLimited("one at once")], ids=lambda e: str(e.code))
def test_one_that_is_refused_asks_again_when_another_has_ended(refusal: RbeeError, at_once: bool) -> None:
    places = Places(refusal, at_once=at_once)

    assert read(places) == ([0, 1, 2, 3], [])
    assert places.refused == 3


@pytest.mark.parametrize("refusal", [AllSlotsBusy("busy"), RateLimited("one at once")], ids=lambda e: str(e.code))
def test_the_first_is_refused_as_one_alone_would_be(refusal: RbeeError) -> None:
    async def at_once() -> None:
        places = Places(refusal, at_once=True)
        await places.place.acquire()
        generations = Generations(cast(Backend, places), cast(Any, None), [InferenceRequest(prompt="x")] * 3, "openai")
        with pytest.raises(type(refusal)):
            await generations.open()
        await generations.aclose()
        assert places.refused == 1

    async def later() -> None:
        places = Places(refusal)
        await places.place.acquire()
        generations = Generations(cast(Backend, places), cast(Any, None), [InferenceRequest(prompt="x")] * 3, "openai")
        await generations.open()
        seen = [part async for _, parts in generations.parts() for part in parts]
        assert seen[-1] == Failed(refusal)
        await generations.aclose()

    asyncio.run(asyncio.wait_for(at_once(), 10))
    asyncio.run(asyncio.wait_for(later(), 10))
