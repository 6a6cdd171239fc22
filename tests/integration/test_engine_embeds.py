"""A model that gives embeddings alone: it starts, embeds, says what it can not do, and each text is evaluated whole."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import embedding_model
import numpy as np
import pytest
from engine_bench import ask, running
from gguf import PoolingType

from rbee_serve.common.apis.embeddings import as_floats
from rbee_serve.contract.errors import PromptTooLong, RequestError

pytestmark = pytest.mark.integration

TEXTS = ["bees make honey", "the queen of the hive", "flowers", "honey and bees " * 25, "a " * 90]


def test_engine_embedding_model_starts_and_embeds(tmp_path: Path) -> None:
    path = embedding_model.write(tmp_path / "bert.gguf", PoolingType.CLS)

    async def run() -> None:
        async with running(path, slots=2, queue_max=4) as engine:
            assert engine.info is not None
            assert (engine.info.architecture, engine.info.metadata["generates"]) == ("bert", False)
            assert engine.info.metadata["exact_context_tokens"] == 0
            alone = [as_floats((await engine.embed([text])).vectors[0]) for text in TEXTS]
            together = await engine.embed(TEXTS)
            np.testing.assert_allclose([as_floats(v) for v in together.vectors], alone, atol=1e-3)
            np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)
            assert together.tokens == [len(text.split()) + 2 for text in TEXTS]
            # The first token's vector is the text's: it tells texts apart only because it sees what comes after it.
            assert min(np.abs(np.subtract(a, b)).max() for a, b in itertools.combinations(alone, 2)) > 1e-2
            with pytest.raises(RequestError, match="embeddings alone"):
                await ask(engine, "bees")
            with pytest.raises(PromptTooLong):
                await engine.embed(["bees " * embedding_model.CONTEXT])
            assert as_floats((await engine.embed(["flowers"])).vectors[0]) == alone[2]

    asyncio.run(run())
