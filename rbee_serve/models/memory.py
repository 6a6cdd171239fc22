"""What a model takes in memory, reckoned from the figures of its header before anything is loaded. Standard library only
(also used on the nodes, like store.py).

    weights   the tensors as they are in the file: llama.cpp maps or copies them, repacked ones keep their size
    kv        layers x context x (key + value) of each KV head, for each slot; the context is rounded up to 256
    compute   activations of the largest batch, and its attention mask
    process   Python, numpy and llama.cpp's code: the front and the engine

Compared with what llama.cpp allocates (the buffer sizes of its log) this is within 4 % for llama (135 M and 1.1 B, several
quantisations), qwen3, gemma3, phi3, qwen3moe, gpt2 and deepseek2; a test loads them and compares. Layers with a sliding window
count in full, since the engine's context keeps all of it. None where the header does not tell enough, and for recurrent
models: then the rule of 1.2 times the file is all there is.
"""

from __future__ import annotations

from typing import Any

#: Bytes of an element of the KV cache, by kv_type.
KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}
#: The worker's two processes beside llama.cpp's buffers: measured 100 MB front, 65 MB engine.
PROCESS_BYTES = 170_000_000
#: On an accelerator instead: the driver's context and libraries.
DEVICE_BYTES = 400_000_000
#: On the machine's side of an accelerator: the driver's libraries and pinned buffers, besides PROCESS_BYTES.
HOST_DRIVER_BYTES = 300_000_000
#: Types (enum ggml_type) that llama.cpp repacks when it loads for a CPU: Q4_0, Q4_K, IQ4_NL. Such a file is copied,
#: and its pages are let go after that.
REPACKED = frozenset({2, 12, 20})
#: llama.cpp rounds the context of a sequence up to this.
_CONTEXT_STEP = 256
#: Rows of a call in which tokens are guessed, of all streams together: with more a CPU's time is all computing.
DRAFT_ROWS = 16
#: Prompts whose rest is shorter than this join the block before (engine/blocks.py).
_BLOCK_REST = 63

#: Defaults of the worker's settings (contract/settings.py).
DEFAULTS = {"slots": 4, "context_tokens": 4096, "prompt_block_tokens": 128, "kv_type": "f16", "draft_tokens": 7}

Facts = dict[str, Any]


def need(facts: Facts, settings: Facts, *, on_device: bool = False) -> dict[str, int] | None:
    """Return ``{"weights", "kv", "compute", "process", "total"}`` in bytes; None where the header does not tell enough.

    ``facts`` is a catalog entry's ``metadata``; ``settings`` may have ``slots``, ``context_tokens``, ``kv_type``,
    ``deterministic``, ``draft_tokens`` and ``prompt_block_tokens``. ``on_device``: what lies on an accelerator that has all
    layers.
    """
    figures = facts.get("memory") or {}
    layers, embedding, weights = (
        _count(v) for v in (facts.get("layers"), figures.get("embedding_length"), figures.get("weight_bytes"))
    )
    if figures.get("recurrent") or not (layers and embedding and weights):
        return None
    heads_of = _per_layer(figures.get("heads"), layers)
    kv_heads_of = _per_layer(figures.get("heads_kv") or figures.get("heads"), layers)
    if not heads_of or not kv_heads_of or not max(heads_of):
        return None
    per_head = embedding // max(heads_of)
    key = figures.get("key_length") or per_head
    value = figures.get("value_length") or per_head
    if figures.get("latent"):  # multi-head latent attention: values are read from the same vector as keys
        value = 0
    chosen = {**DEFAULTS, **{k: v for k, v in settings.items() if v is not None and k in DEFAULTS}}
    if settings.get("deterministic"):
        chosen["kv_type"] = "q8_0"  # what the worker takes then, whatever its settings say
    context = min(chosen["context_tokens"], facts.get("context_trained") or chosen["context_tokens"])
    context = -(-context // _CONTEXT_STEP) * _CONTEXT_STEP
    kv = int(sum(kv_heads_of) * (key + value) * KV_BYTES[chosen["kv_type"]] * context * chosen["slots"])
    batch = max(chosen["prompt_block_tokens"] + _BLOCK_REST, chosen["slots"])
    widest = max(_per_layer(figures.get("feed_forward_length"), layers) or [4 * embedding])
    compute = batch * (4 * (2 * widest + 7 * embedding) + 2 * context)
    compute += 4 * output_rows(chosen["slots"], chosen["draft_tokens"]) * int(facts.get("vocab_size") or 0)
    if on_device and not figures.get("tied"):
        weights -= int(figures.get("embedding_bytes") or 0)  # the token embedding stays in the machine's own memory
    process = DEVICE_BYTES if on_device else PROCESS_BYTES
    parts = {"weights": weights, "kv": kv, "compute": compute, "process": process}
    return {**parts, "total": sum(parts.values())}


def host_need(facts: Facts, settings: Facts) -> int:
    """Return the bytes of the machine's own memory that a worker on an accelerator takes.

    The token embedding, which llama.cpp leaves there, a prompt block on its way in, the logits on their way out, and the
    processes with the driver's libraries. Weights pass through the page cache and are dropped.
    """
    figures = facts.get("memory") or {}
    chosen = {**DEFAULTS, **{k: v for k, v in settings.items() if v is not None and k in DEFAULTS}}
    block = 4 * (int(chosen["prompt_block_tokens"]) + _BLOCK_REST) * _count(figures.get("embedding_length"))
    logits = 4 * output_rows(int(chosen["slots"]), int(chosen["draft_tokens"])) * _count(facts.get("vocab_size"))
    return PROCESS_BYTES + HOST_DRIVER_BYTES + _count(figures.get("embedding_bytes")) + block + logits


def output_rows(slots: int, draft_tokens: int) -> int:
    """Return of how many rows of a call llama.cpp keeps the logits."""
    return max(slots, DRAFT_ROWS if draft_tokens else 1)


def is_mapped(facts: Facts) -> bool:
    """Return whether a worker on a CPU maps the file, so that all who use it share it. False where that is not known."""
    types = (facts.get("memory") or {}).get("matrix_types") or []
    return bool(types) and not REPACKED & set(types)


def _count(value: Any) -> int:
    """Return a positive number, 0 for anything else."""
    return value if isinstance(value, int) and value > 0 else 0


def _per_layer(value: Any, layers: int) -> list[int]:
    """Return a figure of each layer, which a header tells once for all or one by one; empty if it does not tell."""
    if count := _count(value):
        return [count] * layers
    if isinstance(value, list) and len(value) == layers and all(isinstance(v, int) for v in value):
        return [int(v) for v in value]
    return []
