"""Models to measure with: the demonstration model as Q4_0, and a 1.1 B model of random weights in Q4_0."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from rbee_ctl import demo_model


def _part(target: Path) -> Path:
    """Return a name for a file in the making that no other process writes to."""
    return target.with_name(f"{target.name}.{os.getpid()}.part")


def q4_0(cache: Path) -> Path:
    """Return SmolLM2-135M requantised to Q4_0 (llama.cpp's own quantize call), made once."""
    target = cache / "bench" / "SmolLM2-135M-Q4_0.gguf"
    if not target.is_file():
        import llama_cpp.llama_cpp as ll

        target.parent.mkdir(parents=True, exist_ok=True)
        params = ll.llama_model_quantize_default_params()
        params.ftype = ll.LLAMA_FTYPE_MOSTLY_Q4_0
        params.allow_requantize = True
        part = _part(target)
        code = ll.llama_model_quantize(str(demo_model.ensure(cache)).encode(), str(part).encode(), ctypes.byref(params))
        if code != 0:
            raise RuntimeError(f"llama_model_quantize returned {code}")
        part.replace(target)
    return target


def random_1b(cache: Path, seed: int = 1) -> Path:
    """Return a TinyLlama-shaped model (1.17 B parameters) of random Q4_0 weights with the demo model's tokenizer."""
    target = cache / "bench" / "random-1.1B-Q4_0.gguf"
    if target.is_file():
        return target
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

    target.parent.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(demo_model.ensure(cache))
    rng = np.random.default_rng(seed)
    embd, layers, heads, kv_heads, ffn = 2048, 22, 32, 4, 5632
    part = _part(target)
    writer = GGUFWriter(part, arch="llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(embd)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    vocab = 0
    for name, entry in reader.fields.items():
        if name.startswith("tokenizer."):
            value = entry.contents()
            vocab = len(value) if name == "tokenizer.ggml.tokens" else vocab
            writer.add_key_value(name, value, entry.types[0], entry.types[1] if len(entry.types) > 1 else None)
    writer.add_vocab_size(vocab)

    def q4(name: str, rows: int, cols: int) -> None:
        """Add a matrix of random Q4_0 blocks: an fp16 scale and 16 bytes of nibbles for each 32 weights."""
        blocks = rng.integers(0, 256, size=(rows, cols // 32, 18), dtype=np.uint8)
        scale = np.full((rows, cols // 32), 1 / (4.6 * cols**0.5), dtype=np.float16)
        blocks[:, :, :2] = scale.view(np.uint8).reshape(rows, cols // 32, 2)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=GGMLQuantizationType.Q4_0)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(embd, dtype=np.float32))

    q4("token_embd.weight", vocab, embd)
    norm("output_norm.weight")
    q4("output.weight", vocab, embd)
    kv = embd // heads * kv_heads
    for i in range(layers):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        for tensor, rows, cols in (
            ("attn_q", embd, embd),
            ("attn_k", kv, embd),
            ("attn_v", kv, embd),
            ("attn_output", embd, embd),
            ("ffn_gate", ffn, embd),
            ("ffn_up", ffn, embd),
            ("ffn_down", embd, ffn),
        ):
            q4(f"blk.{i}.{tensor}.weight", rows, cols)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(target)
    return target


def kv_bytes_per_token(model: Path) -> int:
    """Return how many bytes of an f16 KV cache a token takes."""
    from gguf import GGUFReader

    fields = GGUFReader(model).fields

    def number(name: str) -> int:
        return int(fields[f"llama.{name}"].contents())

    head = number("embedding_length") // number("attention.head_count")
    return 2 * 2 * number("block_count") * number("attention.head_count_kv") * head
