"""What the preflight reckons against what llama.cpp takes: real loads of seven architectures, in several quantisations."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import random_models

from rbee_serve.models import gguf, memory

pytestmark = pytest.mark.integration

#: Loads a model as the worker does, evaluates a block of each slot, prints llama.cpp's buffers and this process's memory.
PROGRAM = r"""
import json, re, sys
from pathlib import Path
import numpy as np
from rbee_serve.models import gguf
from rbee_serve.worker.engine.context import Context
from rbee_serve.worker.engine.llama import Model
from rbee_serve.worker.engine.protocol import EngineConfig
from rbee_serve.worker.engine.weights import Weights
config = EngineConfig(**json.loads(sys.argv[1]))
model = Model(Context(Weights(config, gguf.read(config.model_path), lambda share: None)))
for slot in range(config.slots):
    model.prefill(np.ones(64, np.int32), 0, slot, "", logits=True)
rollup = Path("/proc/self/smaps_rollup").read_text()
print(json.dumps({"buffers": sum(model.log.buffers_mib.values()) * 2**20,
                  "resident": int(re.search(r"Rss:\s+(\d+)", rollup)[1]) * 1024}))
"""


def requantised(source: Path, target: Path, kind: str) -> Path:
    """Return ``target``, made from ``source`` with llama.cpp's own quantize call (a second each)."""
    from rbee_serve.worker.engine.weights import bindings

    ll = bindings()

    params = ll.llama_model_quantize_default_params()
    params.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    assert ll.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return target


def measured(path: Path, settings: dict[str, Any]) -> dict[str, float]:
    base = {"model_path": str(path), "backend": "cpu", "device": 0, "threads": 1, "model_sha256": "0" * 64}
    config = {**base, **memory.DEFAULTS, **settings}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(config)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Q4_1", {"slots": 4, "context_tokens": 4096}),
        ("Q4_0", {"slots": 1, "context_tokens": 512}),
        ("Q8_0", {"slots": 8, "context_tokens": 1000, "kv_type": "q8_0"}),
        ("1.1B", {"slots": 2, "context_tokens": 2048}),
        ("qwen3", {"slots": 2, "context_tokens": 4096}),
        ("gemma3", {"slots": 4, "context_tokens": 4096}),
        ("phi3", {"slots": 2, "context_tokens": 2048, "kv_type": "q8_0"}),
        ("qwen3moe", {"slots": 4, "context_tokens": 2048}),
        ("gpt2", {"slots": 2, "context_tokens": 2048}),
        ("deepseek2", {"slots": 4, "context_tokens": 4096}),
    ],
)
def test_the_reckoning_is_within_15_per_cent_of_what_llama_cpp_takes(
    kind: str, settings: dict[str, Any], model_path: Path, tmp_path: Path
) -> None:
    """Buffers as llama.cpp tells them, and the process as the kernel sees it; it is never below the first."""
    if kind == "1.1B":
        from bench.models import random_1b

        path = random_1b(Path(os.environ.get("RBEE_CACHE", Path.home() / ".cache/rbee")))
    elif kind in random_models.MAKERS:
        path = random_models.MAKERS[kind](tmp_path / f"{kind}.gguf")
        assert gguf.facts(path)["architecture"] == kind
        assert path.stat().st_size > 100_000_000
    else:
        path = model_path if kind == "Q4_1" else requantised(model_path, tmp_path / f"{kind}.gguf", kind)
    reckoned = memory.need(gguf.facts(path), settings)
    assert reckoned is not None
    buffers = reckoned["total"] - reckoned["process"]
    real = measured(path, settings)
    assert 0.99 <= buffers / real["buffers"] <= 1.15, (buffers, real)
    # The engine's own part of the process allowance is 65 MB; the front is another process.
    assert abs((buffers + 65_000_000) / real["resident"] - 1) < 0.15, (reckoned, real)
    if path.parent == tmp_path:
        path.unlink()  # nine of them would fill a small disk


def test_what_can_not_be_reckoned_is_said_and_not_guessed(model_path: Path) -> None:
    facts = gguf.facts(model_path)
    assert memory.need({**facts, "memory": {**facts["memory"], "recurrent": True}}, {}) is None
    assert memory.need({**facts, "memory": {**facts["memory"], "heads": None}}, {}) is None
    assert memory.need({"layers": 3}, {}) is None
    assert memory.need({}, {}) is None


def test_heads_may_differ_by_layer() -> None:
    figures = {"weight_bytes": 1, "embedding_length": 64, "heads": [4, 4], "heads_kv": [2, 1], "feed_forward_length": [8, 8]}
    one = memory.need({"layers": 2, "memory": figures}, {"slots": 1, "context_tokens": 256})
    assert one is not None
    assert one["kv"] == (2 + 1) * (16 + 16) * 2 * 256


def test_a_deterministic_worker_has_the_cache_that_it_takes(model_path: Path) -> None:
    facts = gguf.facts(model_path)
    asked = memory.need(facts, {"deterministic": True, "kv_type": "f16"})
    assert asked == memory.need(facts, {"kv_type": "q8_0"})
    assert asked != memory.need(facts, {})
