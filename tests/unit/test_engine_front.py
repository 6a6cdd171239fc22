"""The front's side of the engine's connection, without a process: what comes of the bytes that arrive."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rbee_serve.contract.errors import WorkerCrashed
from rbee_serve.worker.engine.process import ProcessEngine, _Stream
from rbee_serve.worker.engine.protocol import EngineConfig, TokenOut
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
