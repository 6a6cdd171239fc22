"""Every way to choose a token, against llama.cpp's own chain; what is reported of it; embeddings against llama.cpp's."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from engine_bench import Answer, ask, directly, each, request, running

from rbee_serve.common.apis.embeddings import as_floats
from rbee_serve.contract.errors import PromptTooLong, RequestError
from rbee_serve.worker.engine.protocol import TokenOut

pytestmark = pytest.mark.integration

SHORT = "Once upon a time"
LONG = " ".join(f"Item {i} costs {3 * i} coins." for i in range(20))
HOT = {"temperature": 1.3, "seed": 11}


def test_engine_draws_what_llama_cpp_python_draws(model_path: Path) -> None:
    """Each truncation alone and all together, bias and repetition: same seed, same text as the library's own chain.

    That chain does not count the prompt as repeated where llama.cpp's server (and the engine) does: there the prompt is
    a word that does not come again.
    """
    ours: list[dict[str, Any]] = [
        {**HOT},
        {**HOT, "typical_p": 0.5},
        {**HOT, "min_p": 0.1},
        {**HOT, "top_k": 5},
        {**HOT, "top_p": 0.6},
        {**HOT, "top_k": 40, "typical_p": 0.9, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.3, "prompt": "Once"},
        {**HOT, "logit_bias": {284: 6.0, 260: -100.0}, "min_p": 0.05},
        {"temperature": 0, "logit_bias": {284: 3.5}},
        {"temperature": 0, "repetition_penalty": 1.5, "prompt": "Once"},
    ]
    plain = {"max_tokens": 24, "prompt": SHORT, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 0}
    theirs = [plain | case for case in ours]
    for case in theirs:
        case["repeat_penalty"] = case.pop("repetition_penalty", 1.0)
    expected = directly(model_path, theirs)

    async def texts() -> list[str]:
        async with running(model_path, slots=len(ours)) as engine:
            jobs = (ask(engine, **({"prompt": SHORT, "max_tokens": 24} | case)) for case in ours)
            return [a.text for a in await asyncio.gather(*jobs)]

    assert asyncio.run(texts()) == expected
    assert len(set(expected)) >= len(expected) - 1, "the cases do not differ from each other"


def test_engine_temperature_next_to_nothing_is_none(model_path: Path) -> None:
    """Logits divided by 1e-38 are infinite: such a stream is a greedy one, and the smallest penalty allowed leaves numbers."""

    async def run() -> list[Answer]:
        async with running(model_path, slots=4) as engine:
            cases: list[dict[str, Any]] = [{}, {"temperature": 1e-38, "seed": 3}, {"temperature": 1e-5, "seed": 3}]
            jobs = [ask(engine, SHORT, max_tokens=16, **case) for case in [*cases, {**HOT, "repetition_penalty": 0.01}]]
            return await asyncio.gather(*jobs)

    greedy, coldest, cold, repeated = asyncio.run(run())
    assert coldest.ids == cold.ids == greedy.ids
    assert len(repeated.ids) == 16
    assert 49_151 not in repeated.ids, "the last of the vocabulary is what a chain of NaN chooses"


def test_engine_penalties_and_bias_are_the_formulas(model_path: Path) -> None:
    """Greedy under presence, frequency and bias is the best of the reported logits after the formula, token by token."""
    params = {"presence_penalty": 0.8, "frequency_penalty": 0.6, "logit_bias": {29: 1.5, 28: -2.0}, "logprobs": 20}

    async def run() -> tuple[Answer, Answer]:
        async with running(model_path) as engine:
            return await ask(engine, SHORT, max_tokens=48, **params), await ask(engine, SHORT, max_tokens=48)

    answer, plain = asyncio.run(run())
    assert answer.ids != plain.ids
    counts: dict[int, int] = {}
    for token in answer.tokens:
        assert token.logprobs is not None
        scores = {
            t["id"]: t["logprob"]
            + params["logit_bias"].get(t["id"], 0)  # type: ignore[attr-defined]
            - 0.8 * (t["id"] in counts)
            - 0.6 * counts.get(t["id"], 0)
            for t in token.logprobs["top"]
        }
        assert scores[token.token_id] > max(scores.values()) - 1e-4
        counts[token.token_id] = counts.get(token.token_id, 0) + 1
    assert max(counts.values()) > 1, "nothing was said twice: frequency was not tested"


def test_engine_logprobs_are_those_of_the_model(model_path: Path) -> None:
    """Only where asked for; natural logarithms before sampling; the chosen token's own; characters in parts."""

    async def run() -> tuple[Answer, Answer, Answer, Answer]:
        async with running(model_path) as engine:
            jobs = [
                ask(engine, SHORT, max_tokens=12, logprobs=20),
                ask(engine, SHORT, max_tokens=12, logprobs=0, temperature=2, seed=3),
                ask(engine, SHORT, max_tokens=12),
                ask(engine, "Bees: 🐝🐝🐝🐝🐝", max_tokens=8, logprobs=2),
            ]
            greedy, hot, silent, bees = await asyncio.gather(*jobs)
            return greedy, hot, silent, bees

    greedy, hot, silent, bees = asyncio.run(run())
    assert greedy.ids == silent.ids
    assert {t.logprobs for t in silent.tokens} == {None}
    for token in greedy.tokens:
        lp = token.logprobs
        assert lp is not None
        assert lp["top"][0]["id"] == token.token_id
        assert lp["top"][0] == {"id": token.token_id, **{k: lp[k] for k in ("piece", "logprob", "bytes")}}
        values = [t["logprob"] for t in lp["top"]]
        assert values == sorted(values, reverse=True)
        assert 0.1 < sum(map(math.exp, values)) <= 1.0001
    assert "".join(t.logprobs["piece"] for t in greedy.tokens if t.logprobs) == greedy.text
    assert all(t.logprobs is not None and t.logprobs["top"] == [] and t.logprobs["logprob"] < 0 for t in hot.tokens)
    joined = b"".join(bytes(t.logprobs["bytes"]) for t in bees.tokens if t.logprobs)
    assert joined.decode("utf-8", "ignore").startswith(bees.text)
    assert any("�" in t.logprobs["piece"] for t in bees.tokens if t.logprobs), "no character was split: choose another prompt"


def test_engine_refuses_a_bias_on_no_token(model_path: Path) -> None:
    async def run() -> None:
        async with running(model_path) as engine:
            with pytest.raises(RequestError, match="logit_bias: 49152 is no token") as e:
                await ask(engine, SHORT, logit_bias={49152: 1.0})
            assert e.value.details == {"field": "logit_bias"}
            forced = await ask(engine, SHORT, max_tokens=4, temperature=1, logit_bias={1000: 100.0})
            assert forced.ids == [1000] * 4

    asyncio.run(run())


def _mean_embeddings(model: Path, texts: list[str]) -> list[list[float]]:
    program = """
        import json, sys
        import llama_cpp, numpy
        from rbee_serve.worker.engine import libs
        libs.load_cpu_variant(llama_cpp.llama_cpp)
        llm = llama_cpp.Llama(sys.argv[1], n_ctx=1024, n_batch=1024, n_ubatch=1024, n_threads=1, n_threads_batch=1,
                              embedding=True, pooling_type=1, verbose=False)
        print(json.dumps([llm.embed(t, normalize=True) for t in json.load(sys.stdin)]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(model)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True, timeout=240)
    vectors: list[list[float]] = json.loads(done.stdout)
    return vectors


def test_engine_embeddings_equal_those_of_llama_cpp(model_path: Path) -> None:
    """Short and long ones at once, beside a stream that keeps its text; unit length; token counts."""
    texts = ["bees", "The bee is an insect.", LONG, "Paris is the capital of France.", *(f"number {i}" for i in range(18))]
    expected = _mean_embeddings(model_path, texts)

    async def run() -> None:
        async with running(model_path, slots=2) as engine:
            alone = await ask(engine, SHORT, max_tokens=40)
            stream = asyncio.create_task(ask(engine, SHORT, max_tokens=40))
            result = await engine.embed(texts)
            assert (await stream).ids == alone.ids
            assert result.tokens == [len(await engine.tokenize(t, parse_special=False, add_bos=True)) for t in texts]
            vectors = [as_floats(v) for v in result.vectors]
            for vector, reference in zip(vectors, expected, strict=True):
                assert math.isclose(math.hypot(*vector), 1.0, abs_tol=1e-5)
                assert sum(a * b for a, b in zip(vector, reference, strict=True)) > 0.9995
            ids = await engine.tokenize(texts[1], parse_special=False, add_bos=True)
            by_ids = await engine.embed([ids])
            assert sum(a * b for a, b in zip(as_floats(by_ids.vectors[0]), vectors[1], strict=True)) > 0.9995
            assert len(set(result.vectors)) == len(texts)

    asyncio.run(run())


def test_engine_embeddings_are_refused_and_cancelled_without_harm(model_path: Path) -> None:
    async def run() -> None:
        async with running(model_path, slots=1) as engine:
            with pytest.raises(PromptTooLong) as e:
                await engine.embed(["bees", LONG * 8])
            assert e.value.details["context_tokens"] == 1024
            with pytest.raises(RequestError, match=r"input\.0: 50000 is no token"):
                await engine.embed([[50000]])
            with pytest.raises(RequestError, match=r"input\.1: it has no tokens"):
                await engine.embed(["bees", []])
            endless = asyncio.create_task(engine.embed([LONG] * 500))
            await asyncio.wait({endless}, timeout=0.3)
            endless.cancel()
            await asyncio.wait({endless})
            async with asyncio.timeout(120):
                assert len((await engine.embed(["bees"])).vectors) == 1

    asyncio.run(run())


def test_engine_detokenize_gives_back_the_text(model_path: Path) -> None:
    async def run() -> None:
        async with running(model_path) as engine:
            text = "Émile said: 🐝 and\n\tleft"
            ids = await engine.tokenize(text, parse_special=False, add_bos=False)
            assert await engine.detokenize(ids) == text
            marked = await engine.tokenize("<|im_start|>user", parse_special=True, add_bos=False)
            assert await engine.detokenize(marked) == "user"
            assert await engine.detokenize(marked, special=True) == "<|im_start|>user"
            with pytest.raises(RequestError, match="token_ids: -1 is no token"):
                await engine.detokenize([-1])

    asyncio.run(run())


def test_engine_logprobs_of_a_continuation_are_the_same(model_path: Path) -> None:
    async def run() -> None:
        async with running(model_path) as engine:
            whole = await ask(engine, SHORT, max_tokens=20, logprobs=3, temperature=1, seed=4, logit_bias={28: 2.0})
            again = request(SHORT, whole.ids[:9], max_tokens=20, logprobs=3, temperature=1, seed=4, logit_bias={28: 2.0})
            rest = [event async for event in each(engine, again) if isinstance(event, TokenOut)]
            assert [(t.token_id, t.logprobs) for t in rest] == [(t.token_id, t.logprobs) for t in whole.tokens[9:]]

    asyncio.run(run())
