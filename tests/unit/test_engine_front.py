"""The front's side of the engine's connection, without a process: what comes of the bytes that arrive."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from rbee_serve.contract.errors import WorkerCrashed
from rbee_serve.worker.engine.process import ProcessEngine, _Stream
from rbee_serve.worker.engine.protocol import Embeddings, EngineConfig, TokenOut
from rbee_serve.worker.engine.wire import pack

CONFIG = EngineConfig("/m.gguf", None, "cpu", 0, slots=1, context_tokens=64, threads=1, prompt_block_tokens=32, kv_type="f16")


def token(index: int) -> tuple[str, str, Any]:
    return ("token", "r", (index, 100 + index, "a", None))


def engine() -> tuple[ProcessEngine, _Stream]:
    found, stream = ProcessEngine(CONFIG), _Stream()
    found._streams["r"] = stream
    return found, stream


def test_what_came_before_an_error_is_given_first_and_together() -> None:
    async def run() -> None:
        front, stream = engine()
        front._read(pack({"events": [token(0)]}) + pack({"events": [token(1), token(2)]})[:9])
        assert [e.index for e in await stream.get() if isinstance(e, TokenOut)] == [0]
        waiting = asyncio.ensure_future(stream.get())
        await asyncio.sleep(0)
        front._read(pack({"events": [token(1), token(2)]})[9:])
        front._fail_all(WorkerCrashed("it died"))
        assert [e.index for e in await waiting if isinstance(e, TokenOut)] == [1, 2]
        with pytest.raises(WorkerCrashed):
            await stream.get()

    asyncio.run(run())


def test_vectors_are_put_together_and_those_that_nobody_waits_for_are_dropped() -> None:
    """They come out of order, in pieces, among those of others and of a request that was given up."""

    async def run() -> None:
        front = ProcessEngine(CONFIG, queue_max=2)
        front._require_ready = lambda: None  # type: ignore[method-assign]
        given_up = asyncio.ensure_future(front.embed(["x"]))
        first, second = asyncio.ensure_future(front.embed(["a", "b", "c"])), asyncio.ensure_future(front.embed(["d"]))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait({given_up})
        for number, indices, data in ((2, [2, 0], b"ccccaaaa"), (1, [0], b"xxxx"), (3, [0], b"dddd"), (2, [1], b"bbbb")):
            front._read(pack({"vectors": base64.b64encode(data).decode(), "of": indices, "number": number}))
        for number, tokens in ((3, [4]), (1, [9]), (2, [1, 2, 3])):
            front._read(pack({"answer": {"tokens": tokens}, "number": number}))
        assert await first == Embeddings([b"aaaa", b"bbbb", b"cccc"], [1, 2, 3])
        assert await second == Embeddings([b"dddd"], [4])
        assert front._vectors == front._answers == {}

    asyncio.run(run())


def test_after_a_message_that_can_not_be_read_nothing_looks_like_the_whole() -> None:
    async def run() -> None:
        front, stream = engine()
        end = {"stop_reason": "EOS", "tokens_out": 3, "prompt_ms": 1.0, "decode_ms": 1.0, "stop_sequence": None}
        front._read(pack({"events": [token(0)]}))
        front._read(pack({"events": [("token", "r", (1, 101))]}))
        front._read(pack({"events": [token(2), ("finished", "r", end)]}))
        front._fail_all(WorkerCrashed("ended for a message that can not be read"))
        assert await stream.get() == [TokenOut(0, 100, "a", None)]
        with pytest.raises(WorkerCrashed):
            await stream.get()

    asyncio.run(run())
