"""Sequences that llama.cpp can not cut or does not have: nothing is reused that is not there, and every stream says what it
says alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uncut_models
from engine_bench import Answer, gathered, request, running

from rbee_serve.worker.engine.process import ProcessEngine

pytestmark = pytest.mark.integration

BASE = [3 + n * 7 % 250 for n in range(400)]


async def ask_ids(engine: ProcessEngine, ids: Sequence[int]) -> Answer:
    asked = replace(request("", max_tokens=8, ignore_eos=True), prompt_ids=list(ids))
    return await gathered(engine, asked)


@pytest.mark.parametrize("write", [uncut_models.recurrent, uncut_models.windowed])
@pytest.mark.parametrize("stored", [False, True], ids=["", "stored"])
def test_engine_models_that_can_not_be_cut_say_what_they_say_alone(
    tmp_path: Path, write: Callable[[Path], Path], stored: bool
) -> None:
    """A conversation that goes on, forks of it, the same again, and all of them together."""
    path = write(tmp_path / "tiny.gguf")
    store: dict[str, Any] = {"prefix_store_dir": str(tmp_path / "store"), "prefix_store_max_bytes": 1 << 30} if stored else {}

    async def run() -> None:
        async with running(path, slots=1) as engine:
            first = await ask_ids(engine, BASE)
            prompts = [BASE, [*BASE, *first.ids, *range(10, 60)], [*BASE[:300], *range(20, 90)], BASE[:200], [9, *BASE[:350]]]
            alone = []
            for prompt in prompts:
                await ask_ids(engine, [200, 201, 202])  # so that nothing of the one before is in the slot
                alone.append((await ask_ids(engine, prompt)).ids)
        assert alone[0] == first.ids
        assert len({tuple(ids) for ids in alone}) == len(prompts)
        for _ in range(2 if stored else 1):
            async with running(path, slots=3, queue_max=len(prompts), **store) as engine:
                one_by_one = [await ask_ids(engine, prompt) for prompt in prompts]
                assert [a.ids for a in one_by_one] == alone
                assert one_by_one[1].started is not None
                assert one_by_one[1].started.cached_tokens >= len(BASE) + 7, "the conversation goes on where it was"
                together = await asyncio.gather(*(ask_ids(engine, prompt) for prompt in prompts))
                assert [a.ids for a in together] == alone
                assert engine.slots_busy == 0

    asyncio.run(run())


def test_engine_cuts_what_is_there_and_copies_the_same_bits_either_way(model_path: Path, tmp_path: Path) -> None:
    """In a process of its own: positions before and after cuts, and logits after a copy of a room and of what is in it."""
    program = """
        import json, sys
        from pathlib import Path
        import numpy as np
        from engine_bench import config
        from rbee_serve.worker.engine import llama
        from rbee_serve.worker.engine.context import Context
        from rbee_serve.worker.engine.model_file import read_header
        from rbee_serve.worker.engine.weights import Weights

        path = Path(sys.argv[1])
        weights = Weights(config(path, slots=3, context_tokens=2048), read_header(path), lambda done: None)
        model = llama.Model(Context(weights))
        cuts = [model.cut(0, 5)]
        ids = np.arange(100, 164, dtype=np.int32)
        assert model.prefill(ids, 0, 0, "r", logits=True) == 0
        cuts += [model.cut(0, 64), model.cut(0, 70)]
        assert model.prefill(ids, 0, 0, "r", logits=True) == 0
        cuts += [model.cut(0, 40)]
        owed = [model.copy(0, 1, 40), model.copy(0, 2, 2048)] if sys.argv[2] == "copy" else []
        rows = [(77, 40, seq) for seq in range(3 if owed else 1)] if cuts[-1] else []
        assert not rows or model.decode_step(rows) == 0
        same = [bool((model.logits(n) == model.logits(0)).all()) for n in range(len(rows))]
        rows = [(500, 41, 2), (9000, 41, 0), (70, 41, 1)] if owed else []
        assert not rows or model.decode_step(rows) == 0
        best = [[model.best(n) for n in range(len(rows))], [int(model.logits(n).argmax()) for n in range(len(rows))]]
        places = []
        for first, second in ([(0, 1), (1, 0)] if owed else []):
            if places:
                cuts_back = [model.cut(0, 42), model.cut(1, 42)]
                exchanged = model.exchange(0, 1)
            assert model.decode_step([(100, 42, first), (100, 42, second)]) == 0
            places.append([model.logits(n).copy() for n in range(2)])
        if owed:
            equal = [bool((a == b).all()) for a, b in zip(*places)]
            differ = bool((places[0][0] != places[0][1]).any())
            model.cut(2, 0)
            swaps = [cuts_back, exchanged, equal, differ, model.exchange(0, 2), model.cut(0, 43), model.cut(2, 43)]
            swaps += [model.exchange_s(40, 0) < model.exchange_s(40, 40) < model.exchange_s(2048, 10**6)]
        print(json.dumps([cuts, owed, same, model.copy_s(40), model.copy_s(2048), best, swaps if owed else None]))
    """

    def done(path: Path, what: str) -> Any:
        command = [sys.executable, "-c", textwrap.dedent(program), str(path), what]
        return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120, cwd=Path(__file__).parent).stdout)

    cuts, owed, same, few_s, all_s, best, swaps = done(model_path, "copy")
    assert (cuts, same) == ([0, 64, 0, 40], [True, True, True])
    assert owed == [0.0, all_s], "few positions at once, a whole room with the next call"
    assert 0 < few_s < all_s
    assert best[0] == best[1], "the likeliest of all rows together are those of the rows, whatever order llama.cpp took them in"
    assert len(set(best[0])) == 3, best
    back, exchanged, equal, differ, into_empty, *rest = swaps
    assert (back, exchanged) == ([42, 42], [True, True])
    assert (equal, differ) == ([True, True], True), "two that have changed places give the same bits as before"
    assert (into_empty, rest) == ([True, False], [0, 43, True])
    assert done(uncut_models.recurrent(tmp_path / "recurrent.gguf"), "")[0] == [0, 64, 0, 0]
    assert done(uncut_models.windowed(tmp_path / "windowed.gguf"), "")[0] == [0, 64, 0, 40]
