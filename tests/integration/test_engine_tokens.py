"""What the engine says equals what llama-cpp-python says, alone and in any batch, whole and continued."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engine_bench import Answer, ask, directly, running

from rbee_serve.contract.api import StopReason

pytestmark = pytest.mark.integration

SHORT = "Once upon a time"
CHAT = "<|im_start|>user\nWrite a poem about bees.<|im_end|>\n<|im_start|>assistant\n"
ENDS = "List three colours:\n1."
PROMPTS = {
    SHORT: 48,
    CHAT: 64,
    ENDS: 64,
    "def fibonacci(n):": 1,
    " ".join(f"Item {i} costs {3 * i} coins." for i in range(7)) + " The total": 24,  # 64 < tokens < one block
    " ".join(f"Item {i} costs {3 * i} coins." for i in range(15)) + " The total": 24,  # a block and a short rest
    " ".join(f"Item {i} costs {3 * i} coins." for i in range(30)) + " The total": 24,  # several blocks
    "Émile said: 🐝🐝🐝 means bees, and 🌻": 24,  # characters of several tokens
}
SEEDED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "seed": 7}


def test_engine_text_equals_llama_cpp_python(model_path: Path) -> None:
    """Greedy for several prompts and lengths, and a seeded draw; the engine gets them all at once."""
    cases = [{"prompt": p, "max_tokens": n, "temperature": 0} for p, n in PROMPTS.items()]
    cases.append({"prompt": SHORT, "max_tokens": 32, **SEEDED})
    expected = directly(model_path, cases)

    async def engine_texts() -> list[Answer]:
        async with running(model_path, slots=len(cases)) as engine:
            return await asyncio.gather(*(ask(engine, **case) for case in cases))

    answers = asyncio.run(engine_texts())
    assert [a.text for a in answers] == expected
    assert expected[0].startswith(", the city of New Haven"), "the reference itself has changed"
    for answer, case in zip(answers, cases, strict=True):
        assert [t.index for t in answer.tokens] == list(range(len(answer.tokens)))
        assert answer.finished is not None
        assert answer.finished.tokens_out == len(answer.tokens) <= case["max_tokens"]
        assert answer.reason == (StopReason.MAX_TOKENS if len(answer.tokens) == case["max_tokens"] else StopReason.EOS)
    assert {a.reason for a in answers} == {StopReason.MAX_TOKENS, StopReason.EOS}


def test_engine_continuation_equals_the_undisturbed_run(model_path: Path) -> None:
    """Cut anywhere, alone and beside others, by token ids alone; text held back at the cut is not lost."""
    long_prompt = " ".join(f"Item {i} costs {3 * i} coins." for i in range(15)) + " The total"
    ways: list[dict[str, Any]] = [{}, SEEDED, {**SEEDED, "repetition_penalty": 1.2, "presence_penalty": 0.5}]
    asked = [(prompt, {"max_tokens": 24, "stop": ["never to be seen"], **way}) for prompt in (CHAT, long_prompt) for way in ways]

    async def run() -> None:
        async with running(model_path, slots=1) as engine:
            wholes = [await ask(engine, prompt, **params) for prompt, params in asked]
        cuts = [(n, cut) for n, w in enumerate(wholes) for cut in {1, 2, 9, len(w.ids) // 2, len(w.ids) - 1}]
        async with running(model_path, slots=6, queue_max=len(cuts)) as other:

            async def check(n: int, cut: int) -> None:
                (prompt, params), whole = asked[n], wholes[n]
                rest = await ask(other, prompt, whole.ids[:cut], **params)
                assert whole.ids[:cut] + rest.ids == whole.ids, (n, cut)
                assert "".join(t.text for t in whole.tokens[:cut]) + rest.text == whole.text, (n, cut)
                assert rest.tokens[0].index == cut
                assert rest.finished is not None
                assert whole.finished is not None
                assert rest.finished.tokens_out == whole.finished.tokens_out

            for alone in cuts[:: len(cuts) // 3]:
                await check(*alone)
            await asyncio.gather(*(check(*cut) for cut in cuts))

    asyncio.run(run())


def test_engine_continuation_that_had_ended_ends_at_once(model_path: Path) -> None:
    async def run() -> None:
        async with running(model_path) as engine:
            whole = await ask(engine, SHORT, max_tokens=10)
            done = await ask(engine, SHORT, whole.ids, max_tokens=10)
            assert (done.tokens, done.reason) == ([], StopReason.MAX_TOKENS)
            eos = engine.info.eos_id if engine.info else -1
            assert (await ask(engine, SHORT, [*whole.ids, eos], max_tokens=20)).reason == StopReason.EOS
            stopped = await ask(engine, SHORT, whole.ids, max_tokens=20, stop=["city"])
            assert (stopped.tokens, stopped.reason) == ([], StopReason.STOP_SEQUENCE)

    asyncio.run(run())


def test_engine_seed_decides_the_text(model_path: Path) -> None:
    async def run() -> tuple[list[str], list[str]]:
        async with running(model_path) as engine:
            same = [(await ask(engine, SHORT, temperature=1, seed=5)).text for _ in range(2)]
            others = [(await ask(engine, SHORT, temperature=1, seed=n)).text for n in (6, 7)]
            return same, others

    same, others = asyncio.run(run())
    assert same[0] == same[1]
    assert len({same[0], *others}) == 3


def test_engine_stop_string_never_shows_in_part(model_path: Path) -> None:
    """The stop string lies across tokens; what comes out is exactly the text before it."""

    async def run() -> tuple[Answer, Answer, Answer]:
        async with running(model_path) as engine:
            whole = await ask(engine, SHORT, max_tokens=48)
            stop = whole.text[20:31]
            assert len([t for t in whole.tokens if t.text in stop]) > 1, "the stop string spans no tokens"
            stopped = await ask(engine, SHORT, max_tokens=48, stop=[stop, "unseen"])
            never = await ask(engine, SHORT, max_tokens=48, stop=[whole.text[20:31] + "?"])
            return whole, stopped, never

    whole, stopped, never = asyncio.run(run())
    assert stopped.text == whole.text[:20]
    assert stopped.reason == StopReason.STOP_SEQUENCE
    assert never.text == whole.text
    assert len(never.tokens) == len(whole.tokens)


def test_engine_ignore_eos_goes_on(model_path: Path) -> None:
    async def run() -> tuple[Answer, Answer]:
        async with running(model_path) as engine:
            return await ask(engine, ENDS, max_tokens=64), await ask(engine, ENDS, max_tokens=64, ignore_eos=True)

    ended, went_on = asyncio.run(run())
    assert ended.reason == StopReason.EOS
    assert len(ended.tokens) < 64
    assert went_on.reason == StopReason.MAX_TOKENS
    assert len(went_on.tokens) == 64


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_engine_reused_prefix_changes_no_token(model_path: Path, kv_type: str) -> None:
    """Cold, from the same slot, from a busy slot's copy: always the same text, and the reuse is reported."""
    common = " ".join(f"Item {i} costs {3 * i} coins." for i in range(18))
    prompts = [f"{common} The {word} is" for word in ("total", "name of the shop", "average")]

    async def run() -> None:
        async with running(model_path, kv_type=kv_type) as warm:
            cold = []
            for prompt in prompts:
                async with running(model_path, kv_type=kv_type) as fresh:
                    cold.append(await ask(fresh, prompt, max_tokens=16))
            first = await ask(warm, prompts[0], max_tokens=16)
            together = await asyncio.gather(*(ask(warm, p, max_tokens=16) for p in prompts))
            assert first.ids == cold[0].ids
            assert [a.ids for a in together] == [a.ids for a in cold]
            for answer in together:
                assert answer.started is not None
                assert 100 < answer.started.cached_tokens < answer.started.prompt_tokens
            assert first.started is not None
            assert first.started.cached_tokens == 0

    asyncio.run(run())
