"""A deterministic worker: batched equals alone, and a stream cut anywhere goes on token for token, whatever it was asked for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_bench import Answer, ask, config, loaded, running, until
from gguf import GGUFWriter

from rbee_serve.contract.api import StopReason
from rbee_serve.worker.engine.process import ProcessEngine

pytestmark = pytest.mark.integration

EXACT = {"deterministic": True, "kv_type": "q8_0"}
CHAT = "<|im_start|>user\nDescribe a bee as JSON.<|im_end|>\n<|im_start|>assistant\n"
ITEMS = " ".join(f"Item {i} costs {3 * i} coins." for i in range(26)) + " The total"  # over the 256 tokens of an f16 cache
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "legs": {"type": "integer"}}}
HOT: dict[str, Any] = {"temperature": 1.2, "seed": 5}
#: Ten runs: prompt, parameters.
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("Once upon a time", {}),
    (ITEMS, {}),
    ("Once upon a time", {**HOT, "seed": 2**32 - 1, "top_k": 40, "top_p": 0.9, "min_p": 0.02}),  # llama.cpp's "any"
    (ITEMS, {**HOT, "typical_p": 0.8}),
    (CHAT, {**HOT, "repetition_penalty": 1.2, "presence_penalty": 0.6, "frequency_penalty": 0.4}),
    ("Émile said: 🐝🐝🐝 means bees, and 🌻", {"stop": ["never to be seen", "\n\n\n\n"], "logprobs": 3}),
    ("The capital of France is", {"logit_bias": {7042: 2.0, 28: -3.0}, "ignore_eos": True}),
    (CHAT, {**HOT, "json_schema": SCHEMA}),
    (CHAT, {**HOT, "grammar": 'root ::= ("- " [a-zé ]{2,9} "\\n")*', "logprobs": 1}),
    (CHAT, {"json_schema": {}, "ignore_eos": True}),
]
TOKENS = 10


def said(answer: Answer) -> list[tuple[int, int, str, Any]]:
    return [(t.index, t.token_id, t.text, t.logprobs) for t in answer.tokens]


@pytest.mark.parametrize("kind", [{"kv_type": "f16"}, EXACT], ids=["f16", "deterministic"])
def test_engine_guesses_change_no_token(model_path: Path, kind: dict[str, Any]) -> None:
    """Prompt look-up on: ten runs alone and together, whole and continued, whatever was guessed, drawn, forbidden or reported;
    an f16 cache within the positions that it is exact for."""
    runs = RUNS if kind is EXACT else [(prompt, params) for prompt, params in RUNS if prompt != ITEMS]

    async def asked_all(engine: ProcessEngine) -> list[Answer]:
        return await asyncio.gather(*(ask(engine, prompt, max_tokens=40, **params) for prompt, params in runs))

    async def run() -> None:
        async with running(model_path, slots=1, queue_max=len(runs), **kind) as engine:
            whole = await asked_all(engine)
        for slots in (1, 4):
            async with running(model_path, slots=slots, queue_max=len(runs), draft_tokens=7, **kind) as engine:
                assert [said(answer) for answer in await asked_all(engine)] == [said(answer) for answer in whole]
                for (prompt, params), expected in zip(runs, whole, strict=True):
                    rest = await ask(engine, prompt, expected.ids[:4], max_tokens=40, **params)
                    assert said(rest) == said(expected)[4:]
                    assert rest.reason == expected.reason
                await until(lambda: engine.totals.accepted > 0)
                assert engine.totals.accepted <= engine.totals.drafted

    asyncio.run(run())


def test_engine_deterministic_goes_on_exactly_from_every_cut(model_path: Path) -> None:
    """Ten runs alone on one worker, then every cut of each on another, eight at a time in whatever batch that gives."""

    async def run() -> None:
        async with running(model_path, slots=1, **EXACT) as engine:
            assert engine.info is not None
            facts = engine.info.metadata
            assert (facts["exact_context_tokens"], facts["kv_type"], facts["deterministic"]) == (1024, "q8_0", True)
            whole = [await ask(engine, prompt, max_tokens=TOKENS, **params) for prompt, params in RUNS]
        cuts = [(n, cut) for n, answer in enumerate(whole) for cut in range(1, len(answer.tokens))]
        assert len(cuts) > 70
        async with running(model_path, slots=8, queue_max=len(cuts), **EXACT) as other:
            together = await asyncio.gather(*(ask(other, p, max_tokens=TOKENS, **params) for p, params in RUNS))
            assert [said(a) for a in together] == [said(a) for a in whole], "batched differs from alone"

            async def rest(n: int, cut: int) -> Answer:
                prompt, params = RUNS[n]
                return await ask(other, prompt, whole[n].ids[:cut], max_tokens=TOKENS, **params)

            for (n, cut), answer in zip(cuts, await asyncio.gather(*(rest(*c) for c in cuts)), strict=True):
                assert said(answer) == said(whole[n])[cut:], (RUNS[n], cut)
                assert answer.reason == whole[n].reason

    asyncio.run(run())


def test_engine_f16_goes_on_exactly_from_every_cut_it_promises(model_path: Path) -> None:
    """The default cache: long runs alone on one worker, eight tokens from every cut of each on another with guesses."""
    runs = [run for run in RUNS if run[0] != ITEMS][:2]  # greedy and drawn
    length, more = 70, 5

    async def run() -> None:
        async with running(model_path, slots=1, kv_type="f16") as engine:
            assert engine.info is not None
            assert engine.info.metadata["exact_context_tokens"] == 256
            whole = [await ask(engine, prompt, max_tokens=length, **params) for prompt, params in runs]
        cuts = [(n, cut) for n, answer in enumerate(whole) for cut in range(1, len(answer.tokens))]
        assert len(cuts) > 100
        async with running(model_path, slots=8, queue_max=len(cuts), kv_type="f16", draft_tokens=7) as other:

            async def rest(n: int, cut: int) -> Answer:
                prompt, params = runs[n]
                return await ask(other, prompt, whole[n].ids[:cut], max_tokens=min(cut + more, length), **params)

            for (n, cut), answer in zip(cuts, await asyncio.gather(*(rest(*c) for c in cuts)), strict=True):
                assert said(answer) == said(whole[n])[cut : cut + more], (runs[n], cut)

    asyncio.run(run())


def _k_quant(model: Path, target: Path) -> Path:
    """The demonstration model with its weights in another format, as llama.cpp itself converts them."""
    program = """
        import ctypes, sys
        import llama_cpp.llama_cpp as ll
        from rbee_serve.worker.engine import libs
        libs.load_cpu_variant(ll)
        params = ll.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = 15, True, 1
        sys.exit(ll.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(model), str(target)], check=True, capture_output=True, timeout=120
    )
    return target


def test_engine_deterministic_refuses_weights_that_can_not_be(model_path: Path, tmp_path: Path) -> None:
    """K-quants depend on the batch: refused by name when exactness is demanded, marked when it is not."""
    path = _k_quant(model_path, tmp_path / "k.gguf")

    async def run() -> None:
        refused = ProcessEngine(config(path, **EXACT))
        await refused.start()
        try:
            progress = await loaded(refused)
            assert (progress.stage, progress.error_code) == ("failed", "CONFIG_INVALID")
            assert "deterministic" in str(progress.error)
            assert "Q5_0" in str(progress.error)
        finally:
            await refused.close()
        async with running(path, slots=1) as engine:
            assert engine.info is not None
            assert engine.info.metadata["exact_context_tokens"] == 0

    asyncio.run(run())


def _adapter(path: Path, rank: int = 4) -> Path:
    """A LoRA adapter on the first layer's query matrix, large enough to change the text."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    writer.add_tensor("blk.0.attn_q.weight.lora_a", rng.standard_normal((rank, 576), dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", rng.standard_normal((576, rank), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_engine_lora_adapters_change_the_text_and_the_class(model_path: Path, tmp_path: Path) -> None:
    adapter, bad = _adapter(tmp_path / "a.gguf"), tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF nothing else")

    async def ask_with(*lora: tuple[str, float]) -> tuple[str, str, int, list[str]]:
        async with running(model_path, slots=1, lora=list(lora)) as engine:
            assert engine.info is not None
            answer = await ask(engine, "Once upon a time", max_tokens=12)
            facts = engine.info.metadata
            return answer.text, engine.info.continuation_class, facts["exact_context_tokens"], facts["lora"]

    async def failed(path: Path) -> str:
        engine = ProcessEngine(config(model_path, lora=[(str(path), 1.0)]))
        await engine.start()
        try:
            progress = await loaded(engine)
            assert progress.error_code == "MODEL_FILE_INVALID"
            return str(progress.error)
        finally:
            await engine.close()

    async def run() -> None:
        plain = await ask_with()
        full = await ask_with((str(adapter), 1.0))
        none = await ask_with((str(adapter), 0.0))
        assert full[0] != plain[0]
        assert none[0] == plain[0]
        assert len({plain[1], full[1], none[1]}) == 3
        assert (plain[2], full[2]) == (256, 0)
        assert full[3] == ["a.gguf:1"]
        assert str(bad) in await failed(bad)
        assert "there is no adapter file" in await failed(tmp_path / "missing.gguf")

    asyncio.run(run())


def test_engine_deterministic_ends_where_the_whole_run_ended(model_path: Path) -> None:
    """A continuation that has all ids ends at once, with the reason of the whole run."""

    async def run() -> None:
        async with running(model_path, slots=2, **EXACT) as engine:
            for prompt, params in ((CHAT, {"json_schema": SCHEMA}), ("Once upon a time", {"stop": ["city"]})):
                whole = await ask(engine, prompt, max_tokens=60, **params)
                assert whole.reason in (StopReason.EOS, StopReason.STOP_SEQUENCE)
                done = await ask(engine, prompt, whole.ids, max_tokens=60, **params)
                assert (done.tokens, done.reason) == ([], whole.reason)

    asyncio.run(run())
