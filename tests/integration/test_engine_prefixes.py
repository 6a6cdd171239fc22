"""Prefixes: evaluated once for all who share them, kept on disk over the engine's end, and a context that runs full."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from engine_bench import Answer, ask, each, request, running

from rbee_serve.contract.api import StopReason
from rbee_serve.contract.errors import PromptTooLong
from rbee_serve.worker.engine.process import ProcessEngine
from rbee_serve.worker.engine.protocol import Started

pytestmark = pytest.mark.integration

PREFIX = "The old map showed a river, two hills and a tower that nobody had ever seen. " * 8
ENDS = [f"{w} it began " + "with rain " * 45 for w in ("Slowly", "At night", "In May")]


async def one_by_one(engine: ProcessEngine, prompts: list[str]) -> list[Answer]:
    return [await ask(engine, p, max_tokens=12) for p in prompts]


def test_engine_evaluates_a_prefix_once_for_requests_that_arrive_together(model_path: Path) -> None:
    """Nothing is warm: the first evaluates, the others wait and copy. When the first goes away, another takes over."""
    prompts = [PREFIX + end for end in ENDS]

    async def run() -> None:
        async with running(model_path, slots=1) as engine:
            alone = [a.ids for a in await one_by_one(engine, [*prompts, "A word. " + PREFIX])]
        async with running(model_path, slots=4) as engine:
            together = await asyncio.gather(*(ask(engine, p, max_tokens=12) for p in prompts))
            assert [a.ids for a in together] == alone[:3]
            cached = [a.started.cached_tokens for a in together if a.started]
            assert cached[0] == 0
            assert min(cached[1:]) >= 128
            assert {a.started.cached_from for a in together[1:] if a.started} == {"memory"}

            async with aclosing(each(engine, request("A word. " + PREFIX + "gone", max_tokens=12))) as leading:
                assert isinstance(await anext(leading), Started)
                followers = [asyncio.create_task(ask(engine, "A word. " + PREFIX, max_tokens=12)) for _ in range(2)]
                await asyncio.sleep(0)
            for follower in followers:
                assert (await follower).ids == alone[3]
            assert engine.slots_busy == 0

    asyncio.run(run())


def test_engine_finds_its_prefixes_on_disk_again(model_path: Path, tmp_path: Path) -> None:
    """Written when the engine ends; the next one reads them and says the same. A file that is wrong goes and changes nothing."""
    changes = {"slots": 2, "prefix_store_dir": str(tmp_path / "cpu0"), "prefix_store_max_bytes": 1 << 30}
    first, second = (PREFIX + end for end in ENDS[:2])

    def files() -> list[Path]:
        return list((tmp_path / "cpu0").iterdir())

    async def run() -> None:
        async with running(model_path, **changes) as engine:
            plain = await ask(engine, first, max_tokens=12)
        async with running(model_path, slots=1) as engine:
            other = await ask(engine, second, max_tokens=12)
        assert len(files()) == 1

        async with running(model_path, **changes) as engine:
            again = await ask(engine, first, max_tokens=12)
            part = await ask(engine, second, max_tokens=12)
        assert again.started is not None
        assert again.started.cached_from == "disk"
        assert again.started.cached_tokens == again.started.prompt_tokens - 64
        assert part.started is not None
        assert 128 < part.started.cached_tokens < again.started.cached_tokens
        assert (again.ids, part.ids) == (plain.ids, other.ids)

        for path in files():
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        async with running(model_path, **changes) as engine:
            broken = await ask(engine, first, max_tokens=12)
            assert broken.started is not None
            assert (broken.started.cached_tokens, broken.ids) == (0, plain.ids)
        async with running(model_path, **changes | {"slots": 1}):
            assert files() == [], "the state of an engine with other slots"

    asyncio.run(run())


def test_engine_full_contexts_damage_nobody(model_path: Path) -> None:
    """Every slot runs into the end of its context at another time: each ends there, and says what it says alone."""
    prompts = ["word " * n for n in (40, 55, 65)]

    async def run() -> None:
        async with running(model_path, slots=1, context_tokens=80) as engine:
            alone = [await ask(engine, p, max_tokens=500, ignore_eos=True) for p in prompts]
        async with running(model_path, slots=3, context_tokens=80, queue_max=3) as engine:
            assert engine.info is not None
            assert engine.info.context_tokens == 80, "each slot has its own room"
            asked = (ask(engine, p, max_tokens=500, ignore_eos=True) for p in prompts * 2)
            together = await asyncio.gather(*asked)
        assert {a.reason for a in together} == {StopReason.MAX_TOKENS}
        assert [a.ids for a in together] == [a.ids for a in alone] * 2
        lengths = {a.started.prompt_tokens + len(a.tokens) for a in together if a.started}
        assert lengths == {81}  # the last token needs no room itself

    asyncio.run(run())


def test_engine_streams_that_others_leave_alone_say_the_same_and_keep_caches(model_path: Path) -> None:
    """They end one after the other, those between others first, so that running ones change places with what free slots hold."""
    prompts = [f"Item {n} of {n * n}. " + "Once upon a time there was a fox. " * 16 for n in range(6)]
    lengths = (100, 10, 90, 30, 80, 110)

    async def run() -> None:
        async with running(model_path, slots=1, deterministic=True) as engine:
            alone = [await ask(engine, p, max_tokens=n, ignore_eos=True) for p, n in zip(prompts, lengths, strict=True)]
        async with running(model_path, slots=8, deterministic=True) as engine:
            for n in range(8):  # every slot holds something
                await ask(engine, f"{n} bottles. " * 40, max_tokens=2)
            asked = (ask(engine, p, max_tokens=n, ignore_eos=True) for p, n in zip(prompts, lengths, strict=True))
            together = await asyncio.gather(*asked)
            assert [a.ids for a in together] == [a.ids for a in alone]
            again = await asyncio.gather(*(ask(engine, p, max_tokens=5, ignore_eos=True) for p in prompts))
            assert [a.ids for a in again] == [a.ids[:5] for a in alone]
            assert all(a.started and a.started.cached_tokens > 60 for a in again)

    asyncio.run(run())


def test_engine_continues_to_the_end_of_its_context_and_refuses_what_a_larger_one_holds(model_path: Path) -> None:
    """The last token of a full context is not lost; one that the context has no room for must not look like an end."""
    prompt = "word " * 60

    async def run() -> None:
        async with running(model_path, slots=1, context_tokens=80, deterministic=True) as engine:
            whole = (await ask(engine, prompt, max_tokens=500, ignore_eos=True)).ids
            for cut in (len(whole) - 2, len(whole) - 1):
                rest = await ask(engine, prompt, max_tokens=500, ignore_eos=True, generated=whole[:cut])
                assert (rest.ids, rest.reason) == (whole[cut:], StopReason.MAX_TOKENS)
            with pytest.raises(PromptTooLong, match="the context holds 80"):
                await ask(engine, prompt, max_tokens=500, ignore_eos=True, generated=whole)

    asyncio.run(run())
