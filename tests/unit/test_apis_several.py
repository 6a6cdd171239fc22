"""Several answers of one request over a backend that lets them wait or refuses them, as a queen does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import pytest
from starlette.requests import Request

from rbee_serve.common.apis.streams import Answer, Backend, End, Failed, Generations, Part, Reading, Text
from rbee_serve.contract import events
from rbee_serve.contract.api import InferenceRequest, Tool
from rbee_serve.contract.errors import AllSlotsBusy, RateLimited, RbeeError, RequestTimeout
from rbee_serve.contract.events import Event

STARTED = events.started("r", "m", seed=1, prompt_tokens=1, cached_tokens=0, worker_id="w")
END = events.end(1, "EOS", prompt_ms=1, decode_ms=1, prompt_tokens=1)


def http(**headers: str) -> Request:
    named = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": named})


class Places:
    """A backend with one place. Others wait in line for it, or are refused by ``refusal``: at once or while they wait."""

    request_timeout_s: float | None = None

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
        generations = Generations(cast(Backend, places), http(), requests, "openai")
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
        generations = Generations(cast(Backend, places), http(), [InferenceRequest(prompt="x")] * 3, "openai")
        with pytest.raises(type(refusal)):
            await generations.open()
        await generations.aclose()
        assert places.refused == 1

    async def later() -> None:
        places = Places(refusal)
        await places.place.acquire()
        generations = Generations(cast(Backend, places), http(), [InferenceRequest(prompt="x")] * 3, "openai")
        await generations.open()
        seen = [part async for _, parts in generations.parts() for part in parts]
        assert seen[-1] == Failed(refusal)
        await generations.aclose()

    asyncio.run(asyncio.wait_for(at_once(), 10))
    asyncio.run(asyncio.wait_for(later(), 10))


@pytest.mark.parametrize(
    "refusal", [AllSlotsBusy("busy"), RateLimited("a minute's", retry_after_s=0.2)], ids=lambda e: str(e.code)
)
def test_one_whose_place_another_client_has_taken_asks_now_and_then(refusal: RbeeError) -> None:
    async def run() -> None:
        places = Places(refusal, at_once=True)
        generations = Generations(cast(Backend, places), http(), [InferenceRequest(prompt="x")] * 2, "openai")
        await generations.open()

        async def other() -> None:
            async with places.place:
                await asyncio.sleep(0.8)

        taken = asyncio.create_task(other())
        ended = [k async for k, parts in generations.parts() for part in parts if isinstance(part, End)]
        await generations.aclose()
        await taken
        assert ended == [0, 1]
        assert places.refused <= 6  # asked at once, when the first ended, and then less and less often

    asyncio.run(asyncio.wait_for(run(), 10))


@pytest.mark.E31
@pytest.mark.parametrize("refusal", [AllSlotsBusy("busy"), RateLimited("never", retry_after_s=600)], ids=lambda e: str(e.code))
@pytest.mark.parametrize("named", ["timeout_s", "header", "settings"])
def test_all_together_have_the_time_of_one(named: str, refusal: RbeeError) -> None:
    async def run() -> None:
        places = Places(refusal, at_once=True)
        places.request_timeout_s = 0.2 if named == "settings" else 60.0
        request = InferenceRequest(prompt="x", timeout_s=0.2 if named == "timeout_s" else None)
        headers = {"X_Request_Deadline": str(time.time() + 0.2)} if named == "header" else {}
        generations = Generations(cast(Backend, places), http(**headers), [request] * 2, "openai")
        await generations.open()
        other = asyncio.create_task(places.place.acquire())
        with pytest.raises(RequestTimeout, match="1 of 2 answers"):
            await generations.collect()
        await generations.aclose()
        await other

    asyncio.run(asyncio.wait_for(run(), 10))


def test_none_begins_after_one_has_failed() -> None:
    broken = RbeeError("broken")

    class Broken(Places):
        opened = 0

        async def open(self, http: object, request: InferenceRequest, api: str) -> Any:
            self.opened += 1
            return Batches([[STARTED], [events.error(broken)]], broken)

    places = Broken()

    assert read(places) == ([], [broken])
    assert places.opened == 1


class Batches:
    """A stream of given batches."""

    id = model = "x"

    def __init__(self, batches: list[list[Event]], error: RbeeError | None = None) -> None:
        self.batches, self.error = batches, error

    async def events(self) -> AsyncGenerator[Sequence[tuple[str, Event]], None]:
        for batch in self.batches:
            yield [("", event) for event in batch]

    async def aclose(self) -> None:
        """Nothing to free."""


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
def test_after_the_one_call_that_is_wanted_nothing_comes_however_many_tokens_arrive_at_once(size: int) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    request = InferenceRequest(messages=[{"role": "user", "content": "x"}], tools=[Tool.model_validate(tool)])  # type: ignore[list-item]
    call = ["<tool_call>", '{"name": "f", ', '"arguments": {', '"a": 1', "}}", "</tool_call>"]
    tokens = [events.token(text, n, n) for n, text in enumerate(["I will.", *call, *call, "Done."])]
    rest = [*tokens, END]
    batches = [[STARTED], *(rest[n : n + size] for n in range(0, len(rest), size))]

    async def run() -> tuple[Answer, list[Part]]:
        reading = Reading(Batches(batches), request, parallel_calls=False)
        answer, seen = Answer(reading), list[Part]()
        async for parts in reading.parts():
            answer.add(parts)
            seen += parts
        return answer, seen

    answer, seen = asyncio.run(run())

    assert [(call["name"], call["arguments"]) for call in answer.calls] == [("f", '{"a": 1}')]
    assert answer.text == "I will."
    assert [n for n, part in enumerate(seen) if isinstance(part, End)] == [len(seen) - 1]
    assert not isinstance(seen[-2], Text)
