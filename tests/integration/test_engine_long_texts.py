"""Texts of up to a megabyte at a real engine: the same ids as in one call, streams that go on meanwhile, cancelling."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_bench import RecordedEngine, each, gathered, request, running, until, until_free

from rbee_serve.common.apis.embeddings import as_floats
from rbee_serve.contract.api import StopReason
from rbee_serve.contract.errors import PromptTooLong, RequestError
from rbee_serve.worker.engine import vocabulary
from rbee_serve.worker.engine.process import ProcessEngine
from rbee_serve.worker.engine.protocol import TokenOut
from rbee_serve.worker.engine.vocabulary import Vocabulary

pytestmark = pytest.mark.integration

#: What the tokenizer takes longest for: a second on a quick core.
SPACES = " " * 1_000_000
CONTROL = "<|im_start|>" * 80_000


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Iterator[Vocabulary]:
    """The demonstration model's vocabulary, without its weights."""
    import llama_cpp.llama_cpp as ll

    params = ll.llama_model_default_params()
    params.vocab_only = True
    model = ll.llama_model_load_from_file(str(model_path).encode(), params)
    yield Vocabulary(ll, ll.llama_model_get_vocab(model), "gpt2")
    ll.llama_model_free(model)


def test_a_text_in_parts_has_the_ids_of_the_whole(tokenizer: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of special tokens, their pieces and others, cut as often as can be; and never fewer tokens than was said before."""
    monkeypatch.setattr(vocabulary, "LONG_BYTES", 0)
    draw = random.Random(1)  # noqa: S311
    pieces = [*tokenizer.facts.cuts[0], b"<|", b"|>", b"<|im_", b"im_start", b" ", b"  ", b"\n", b"word", b" word", "蜂".encode()]
    assert b"<|im_start|>" in pieces
    for _ in range(500):
        monkeypatch.setattr(vocabulary, "_PART_SPECIALS", draw.choice([1, 20, 50]))
        data = b"".join(draw.choices(pieces, k=draw.randrange(1, 80)))
        for parse_special in (True, False):
            whole = tokenizer.tokenize(data, parse_special=parse_special, add_bos=True)
            parts = tokenizer.tokenize_long(data, parse_special=parse_special, add_bos=True)
            np.testing.assert_array_equal(parts, whole)
            assert tokenizer.at_least(data) <= len(whole)


def test_no_text_is_said_to_have_more_tokens_than_it_has(tokenizer: Vocabulary) -> None:
    """Bytes for which this vocabulary has no token vanish; the longest token is a run of spaces."""
    assert b"\x04" in tokenizer.facts.uncounted
    for text in (SPACES[:200_000], "\x04" * 200_000, "\x04 " * 100_000, "蜂" * 50_000, "\u0301a" * 50_000):
        data = text.encode()
        assert tokenizer.at_least(data) <= len(tokenizer.tokenize(data, parse_special=True, add_bos=False))


def test_a_word_of_a_megabyte_ends_no_process(model_path: Path) -> None:
    """With a pre-tokenizer that is a std::regex; in the main thread, 30 kB are too much for it."""
    program = """
        import queue, sys
        import llama_cpp.llama_cpp as ll
        from rbee_serve.worker.engine.tokenizing import Tokenizing
        from rbee_serve.worker.engine.vocabulary import Vocabulary
        params, other = ll.llama_model_default_params(), (ll.llama_model_kv_override * 2)()
        other[0].key, other[0].tag, other[0].value.val_str = b"tokenizer.ggml.pre", ll.LLAMA_KV_OVERRIDE_TYPE_STR, b"tekken"
        params.vocab_only, params.kv_overrides = True, other
        model = ll.llama_model_load_from_file(sys.argv[1].encode(), params)
        vocabulary = Vocabulary(ll, ll.llama_model_get_vocab(model), "gpt2")
        def count(message):
            ids = vocabulary.tokenize_long(message["tokenize"]["text"].encode(), parse_special=True, add_bos=False)
            return {"told": len(ids), "number": 1}
        told = queue.SimpleQueue()
        texts = Tokenizing(count, told.put)
        texts.ready({"tokenize": {"text": "a" * (1 << 20)}, "number": 1})
        print(texts.ready(told.get(timeout=120)))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(model_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "{'told': 262144, 'number': 1}"), done.stderr[-1000:]


@asynccontextmanager
async def streaming(engine: RecordedEngine) -> AsyncIterator[Any]:
    """A stream that runs; gives a function that says how many tokens it has got."""
    asked = request("Once upon a time", max_tokens=900, ignore_eos=True)
    async with aclosing(each(engine, asked)) as events:
        async for event in events:
            if isinstance(event, TokenOut):
                break
        yield lambda: sum(kind == "token" and owner == asked.request_id for kind, owner, _ in engine.said)


def test_engine_streams_go_on_while_a_long_text_is_tokenized(model_path: Path) -> None:
    """Each of these takes many times as long as a token."""

    async def run() -> None:
        async with running(model_path, slots=2, context_tokens=2048) as engine, streaming(engine) as tokens:
            ids = await engine.tokenize(SPACES, parse_special=False, add_bos=False)
            assert len(ids) == 15625
            assert tokens() > 10, "the stream stood still while a text was tokenized"
            before = tokens()
            with pytest.raises(PromptTooLong, match=r"prompt: \d+ tokens, the context holds 2048") as counted:
                await gathered(engine, request(SPACES[: 2040 * 81], max_tokens=1))  # so many bytes could be 2040 tokens
            assert counted.value.details["prompt_tokens"] > 2048
            assert tokens() > before
            with pytest.raises(PromptTooLong, match=r"input\.1: at least 12346 tokens"):
                await engine.embed(["bees", SPACES])

    asyncio.run(run())


def test_engine_refuses_what_no_tokenizer_could_make_fit(model_path: Path) -> None:
    """How many tokens it would have nobody has counted, and nobody says so."""

    async def run() -> None:
        async with running(model_path, context_tokens=256) as engine:
            with pytest.raises(PromptTooLong, match="prompt: at least 12346 tokens, the context holds 256") as e:
                await gathered(engine, request(SPACES))
            assert e.value.details == {"field": "prompt", "prompt_tokens_at_least": 12346, "context_tokens": 256}
            assert engine.slots_busy == 0

    asyncio.run(run())


def test_engine_long_prompts_are_those_of_their_ids(model_path: Path) -> None:
    """Tokenized in the thread, in parts, or by the front before: the same prompt, found in the cache, and the same answer."""

    async def run() -> None:
        async with running(model_path, slots=1, context_tokens=2048) as engine:
            for text in ("The bees. " * 450, SPACES[:60_000] + CONTROL[: 12 * 500] + "user\nHello"):
                ids = await engine.tokenize(text, parse_special=True, add_bos=True)
                first = await gathered(engine, request(text, max_tokens=4))
                again = await gathered(engine, replace(request("", max_tokens=4), prompt_ids=ids))
                assert first.started is not None
                assert again.started is not None
                assert first.started.prompt_tokens == again.started.prompt_tokens == len(ids)
                assert again.started.cached_tokens > len(ids) - 200
                assert first.ids == again.ids
                assert len(first.ids) == 4

    asyncio.run(run())


def test_engine_cancels_while_a_text_is_tokenized_and_while_it_waits_for_that(model_path: Path) -> None:
    """The slot is free before the tokenizer is, which says nothing of it any more; all others are served in order."""

    async def run() -> None:
        async with running(model_path, slots=2, context_tokens=8192) as engine:
            working = asyncio.create_task(gathered(engine, request(SPACES[: 8100 * 81])))
            waiting = asyncio.create_task(gathered(engine, request("word " * 2000)))
            after = asyncio.create_task(engine.tokenize("word " * 1000, parse_special=False, add_bos=False))
            await until(lambda: engine.slots_busy == 2)
            short = await engine.tokenize("word", parse_special=False, add_bos=False)
            assert len(short) == 1
            assert not after.done(), "what is short waits for nobody"
            for task in (waiting, working):
                task.cancel()
            await until_free(engine)
            assert not after.done(), "they were heard of after the text was tokenized"
            ends = [payload["stop_reason"] for kind, _, payload in engine.said if kind == "finished"]
            assert ends == [StopReason.CANCELLED] * 2
            assert len(await after) == 1001
            assert (await gathered(engine, request("Once", max_tokens=3))).reason == StopReason.MAX_TOKENS
            assert {kind for kind, _, _ in engine.said[:2]} == {"finished"}

    asyncio.run(run())


def test_engine_ends_in_order_while_a_text_is_tokenized(model_path: Path) -> None:
    async def run() -> int:
        async with running(model_path, slots=1) as engine:
            asked = asyncio.create_task(engine.tokenize(SPACES, parse_special=False, add_bos=False))
            await engine.tokenize("word", parse_special=False, add_bos=False)
            assert not asked.done()
            await engine.close()
            await asyncio.wait({asked})
            return await ended(engine)

    async def ended(engine: ProcessEngine) -> int:
        assert engine._ended is not None
        return await engine._ended

    assert asyncio.run(run()) == 0


def test_engine_streams_go_on_while_hundreds_of_texts_are_embedded(model_path: Path) -> None:
    """Their vectors are those of each text alone, and come while others are still evaluated."""
    texts = [f"number {i}" for i in range(400)]

    async def run() -> None:
        async with running(model_path, slots=2) as engine, streaming(engine) as tokens:
            embedding = asyncio.create_task(engine.embed(texts))
            await until(lambda: any(any(vectors) for vectors in engine._vectors.values()))
            assert not embedding.done(), "nothing came before all was there"
            before = tokens()
            found = await embedding
            assert tokens() - before > 20, "the stream stood still while texts were embedded"
            vectors = np.array([as_floats(v) for v in found.vectors])
            assert vectors.shape == (400, 576)
            assert found.tokens == [len(await engine.tokenize(t, parse_special=False, add_bos=True)) for t in texts]
            for i in range(0, 400, 60):
                alone = np.array(as_floats((await engine.embed([texts[i]])).vectors[0]))
                assert alone @ vectors[i] > 0.9995
                assert np.argmax(vectors @ alone) == i, "another text's vector"
            with pytest.raises(RequestError, match="a request may ask for 8388608"):
                await engine.embed(["a"] * (8388608 // 576 + 1))

    asyncio.run(run())
