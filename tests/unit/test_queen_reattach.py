"""Coming back for the rest of a stream."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from test_queen_relay import END, STARTED, Bench, Body, Reply, stream_of, text_of, tokens, whole

from rbee_serve.contract import events
from rbee_serve.contract.errors import InvalidRequest, RequestNotFound
from rbee_serve.contract.events import SseParser
from rbee_serve.queen.reattach import Tape, Tapes


def frames_of(data: bytes) -> list[tuple[int, bytes]]:
    """Return (number, frame) of each numbered frame."""
    found = []
    for frame in data.split(b"\n\n")[:-1]:
        if frame.startswith(b"id: "):
            number, _, rest = frame.partition(b"\n")
            found.append((int(number[4:]), rest + b"\n\n"))
    return found


async def read(tape: Tape, first: int, count: int | None = None) -> bytes:
    """Attach, read ``count`` frames or all, leave."""
    tape.attach()
    data = b""
    try:
        async for piece in tape.read(first):
            data += piece
            if count is not None and len(frames_of(data)) >= count:
                break
    finally:
        tape.detach()
    return data


def slow(_: dict[str, Any]) -> Reply:
    return Reply(200, Body(STARTED, *tokens(0, 3), 0.05, *tokens(3), END, events.DONE))


def payloads(data: bytes) -> list[Any]:
    import json

    return [p if p == "[DONE]" else json.loads(p) for p in SseParser().feed(data)]


@pytest.mark.parametrize("leave_after", [1, 2, 4, 9])
def test_client_that_comes_back_gets_the_rest_and_each_event_once(leave_after: int) -> None:
    async def run() -> None:
        bench = Bench(slow)
        tapes = Tapes(60.0)
        tape = tapes.record(await bench.open(), 30.0)
        assert tape is not None
        before = await read(tape, 0, leave_after)
        last = frames_of(before)[-1][0]
        after = await read(tapes.find(tape.stream.id, ""), last + 1)

        numbers = [n for n, _ in frames_of(before) + frames_of(after)]
        assert numbers == list(range(12))  # started, ten tokens, end
        seen = payloads(before + after)
        assert seen.count("[DONE]") == 1
        assert seen[-1] == "[DONE]"
        assert text_of([e for e in seen if e != "[DONE]"]) == "".join(t for t in ("Once upon a time, é… [DONE] end",))
        await tapes.aclose()
        bench.check_settled()

    asyncio.run(run())


def test_rest_is_there_also_when_the_worker_has_changed_meanwhile() -> None:
    async def run() -> None:
        bench = Bench(stream_of(STARTED, *tokens(0, 3), 0.02, events.encode(events.error(_crashed()))), whole)
        tapes = Tapes(60.0)
        tape = tapes.record(await bench.open(), 30.0)
        assert tape is not None
        before = await read(tape, 0, 2)
        await asyncio.sleep(0.1)  # nobody is attached while the worker dies
        after = await read(tape, len(frames_of(before)))
        seen = [e for e in payloads(before + after) if e != "[DONE]"]
        assert [e["worker_id"] for e in seen if e["type"] == "resumed"] == ["lab1-cpu0"]
        assert len([e for e in seen if e["type"] == "token"]) == 10
        await tapes.aclose()
        bench.check_settled()

    def _crashed() -> Any:
        from rbee_serve.contract.errors import WorkerCrashed

        return WorkerCrashed("engine died")

    asyncio.run(run())


def test_stream_nobody_comes_back_for_ends_and_frees_its_slot() -> None:
    async def run() -> None:
        bench = Bench(stream_of(STARTED, *tokens(0, 3), 30.0), stall_s=60.0)
        tapes = Tapes(0.05)
        tape = tapes.record(await bench.open(), tapes.wanted_s("600") or 0)
        assert tape is not None
        await read(tape, 0, 2)
        assert next(iter(bench.registry)).in_flight == 1
        end = asyncio.get_running_loop().time() + 5
        while next(iter(bench.registry)).in_flight and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        bench.check_settled()
        with pytest.raises(RequestNotFound):
            tapes.find(tape.stream.id, "")
        await tapes.aclose()

    asyncio.run(run())


def test_two_readers_at_once_see_the_same_and_another_key_sees_nothing() -> None:
    async def run() -> None:
        bench = Bench(slow)
        tapes = Tapes(60.0)
        tape = tapes.record(await bench.open(), 30.0)
        assert tape is not None
        one, two = await asyncio.gather(read(tape, 0), read(tape, 0))
        assert one == two
        with pytest.raises(RequestNotFound):
            tapes.find(tape.stream.id, "another key")
        await tapes.aclose()

    asyncio.run(run())


def test_memory_is_bounded_and_the_wish_must_be_a_time() -> None:
    async def run() -> None:
        bench = Bench(slow)
        tapes = Tapes(60.0, max_bytes=100)
        first = tapes.record(await bench.open(), 30.0)
        assert first is not None
        await read(first, 0)
        second = await bench.open()
        assert tapes.record(second, 30.0) is None
        await second.aclose()
        await tapes.aclose()
        bench.check_settled()

    asyncio.run(run())
    assert Tapes(60.0).wanted_s(None) is None
    assert Tapes(60.0).wanted_s("5") == 5.0
    for wrong in ("x", "0", "-1", "nan", "inf"):
        with pytest.raises(InvalidRequest):
            Tapes(60.0).wanted_s(wrong)
