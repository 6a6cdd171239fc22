"""Models of random weights in the shapes of six architectures, 100 to 160 MB each: what llama.cpp takes depends on that alone.

They have no vocabulary of words: llama.cpp is told how many tokens there are and gets ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

VOCAB = 32_000
CONTEXT = 8192
EMBEDDING, LAYERS, HEADS, KV_HEADS, HEAD, FFN = 1024, 6, 8, 2, 128, 3072


class _Writer:
    """Tensors of random Q8_0 blocks (an fp16 scale and 32 bytes for each 32 weights), and norms of ones."""

    def __init__(self, path: Path, arch: str, values: dict[str, Any]) -> None:
        self.path, self.rng = path, np.random.default_rng(1)
        self.gguf = GGUFWriter(path, arch)
        common = {
            "context_length": CONTEXT, "embedding_length": EMBEDDING, "block_count": LAYERS, "feed_forward_length": FFN,
            "attention.head_count": HEADS, "vocab_size": VOCAB,
        }  # fmt: skip
        for key, value in (common | values).items():
            (self.gguf.add_float32 if isinstance(value, float) else self.gguf.add_uint32)(f"{arch}.{key}", value)
        self.gguf.add_tokenizer_model("no_vocab")
        self.gguf.add_file_type(7)

    def matrix(self, name: str, *shape: int) -> None:
        """``shape``: slowest dimension first."""
        blocks = self.rng.integers(0, 256, size=(*shape[:-1], shape[-1] // 32, 34), dtype=np.uint8)
        scale = np.full(blocks.shape[:-1], 1 / (74 * shape[-1] ** 0.5), dtype=np.float16)
        blocks[..., :2] = scale.view(np.uint8).reshape(*blocks.shape[:-1], 2)
        data = blocks.reshape(*shape[:-1], -1)
        self.gguf.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType.Q8_0)

    def norm(self, name: str, size: int = EMBEDDING) -> None:
        self.gguf.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    def bias(self, name: str, size: int) -> None:
        self.gguf.add_tensor(f"{name}.bias", np.zeros(size, np.float32))

    def close(self) -> Path:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()
        return self.path


_RMS = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0, "attention.head_count_kv": KV_HEADS}
_WIDE = {"attention.key_length": HEAD, "attention.value_length": HEAD}


def _attention(w: _Writer, at: str, *, norms: bool = False) -> None:
    w.norm(f"{at}.attn_norm")
    for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS), ("attn_v", KV_HEADS)):
        w.matrix(f"{at}.{name}", heads * HEAD, EMBEDDING)
    w.matrix(f"{at}.attn_output", EMBEDDING, HEADS * HEAD)
    if norms:
        w.norm(f"{at}.attn_q_norm", HEAD)
        w.norm(f"{at}.attn_k_norm", HEAD)


def _gated(w: _Writer, at: str) -> None:
    w.norm(f"{at}.ffn_norm")
    w.matrix(f"{at}.ffn_gate", FFN, EMBEDDING)
    w.matrix(f"{at}.ffn_up", FFN, EMBEDDING)
    w.matrix(f"{at}.ffn_down", EMBEDDING, FFN)


def qwen3(path: Path) -> Path:
    """Norms on queries and keys, an output matrix of its own."""
    w = _Writer(path, "qwen3", _RMS | _WIDE)
    w.matrix("token_embd", VOCAB, EMBEDDING)
    w.norm("output_norm")
    w.matrix("output", VOCAB, EMBEDDING)
    for i in range(LAYERS):
        _attention(w, f"blk.{i}", norms=True)
        _gated(w, f"blk.{i}")
    return w.close()


def gemma3(path: Path) -> Path:
    """Five layers of six see a window of 512 tokens; the token embedding is the output matrix too."""
    w = _Writer(path, "gemma3", _RMS | _WIDE | {"attention.sliding_window": 512})
    w.matrix("token_embd", VOCAB, EMBEDDING)
    w.norm("output_norm")
    for i in range(LAYERS):
        _attention(w, f"blk.{i}", norms=True)
        w.norm(f"blk.{i}.post_attention_norm")
        _gated(w, f"blk.{i}")
        w.norm(f"blk.{i}.post_ffw_norm")
    return w.close()


def phi3(path: Path) -> Path:
    """Queries, keys and values in one matrix, gate and up in another."""
    w = _Writer(path, "phi3", _RMS | {"rope.dimension_count": HEAD})
    w.matrix("token_embd", VOCAB, EMBEDDING)
    w.norm("output_norm")
    w.matrix("output", VOCAB, EMBEDDING)
    for i in range(LAYERS):
        w.norm(f"blk.{i}.attn_norm")
        w.matrix(f"blk.{i}.attn_qkv", (HEADS + 2 * KV_HEADS) * HEAD, EMBEDDING)
        w.matrix(f"blk.{i}.attn_output", EMBEDDING, HEADS * HEAD)
        w.norm(f"blk.{i}.ffn_norm")
        w.matrix(f"blk.{i}.ffn_up", 2 * FFN, EMBEDDING)
        w.matrix(f"blk.{i}.ffn_down", EMBEDDING, FFN)
    return w.close()


def qwen3moe(path: Path) -> Path:
    """Eight experts, of which a token takes two."""
    experts, width = 8, 512
    values = {"expert_count": experts, "expert_used_count": 2, "expert_feed_forward_length": width}
    w = _Writer(path, "qwen3moe", _RMS | _WIDE | values)
    w.matrix("token_embd", VOCAB, EMBEDDING)
    w.norm("output_norm")
    w.matrix("output", VOCAB, EMBEDDING)
    for i in range(LAYERS):
        _attention(w, f"blk.{i}", norms=True)
        w.norm(f"blk.{i}.ffn_norm")
        w.gguf.add_tensor(f"blk.{i}.ffn_gate_inp.weight", w.rng.standard_normal((experts, EMBEDDING), dtype=np.float32))
        for name, rows, columns in (("gate", width, EMBEDDING), ("up", width, EMBEDDING), ("down", EMBEDDING, width)):
            w.matrix(f"blk.{i}.ffn_{name}_exps", experts, rows, columns)
    return w.close()


def gpt2(path: Path) -> Path:
    """No rotation but positions, no grouped heads, biases everywhere."""
    w = _Writer(path, "gpt2", {"attention.layer_norm_epsilon": 1e-5, "feed_forward_length": 4 * EMBEDDING})
    w.matrix("token_embd", VOCAB, EMBEDDING)
    w.gguf.add_tensor("position_embd.weight", w.rng.standard_normal((CONTEXT, EMBEDDING), dtype=np.float32))
    w.norm("output_norm")
    w.bias("output_norm", EMBEDDING)
    for i in range(LAYERS):
        shapes = (("attn_qkv", 3 * EMBEDDING, EMBEDDING), ("attn_output", EMBEDDING, EMBEDDING))
        for name, rows, columns in (*shapes, ("ffn_up", 4 * EMBEDDING, EMBEDDING), ("ffn_down", EMBEDDING, 4 * EMBEDDING)):
            w.matrix(f"blk.{i}.{name}", rows, columns)
            w.bias(f"blk.{i}.{name}", rows)
        for name in ("attn_norm", "ffn_norm"):
            w.norm(f"blk.{i}.{name}")
            w.bias(f"blk.{i}.{name}", EMBEDDING)
    return w.close()


def deepseek2(path: Path) -> Path:
    """Latent attention: a token's keys and values are one vector for all heads."""
    latent, rope, nope, value, queries = 512, 64, 128, 128, 256
    values = {
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0, "attention.head_count_kv": 1,
        "attention.q_lora_rank": queries,
        "attention.kv_lora_rank": latent, "attention.key_length": latent + rope, "attention.value_length": latent,
        "attention.key_length_mla": nope + rope, "attention.value_length_mla": value, "rope.dimension_count": rope,
        "leading_dense_block_count": LAYERS, "expert_count": 0, "expert_used_count": 0, "expert_shared_count": 0,
        "expert_feed_forward_length": FFN, "expert_weights_scale": 1.0,
    }  # fmt: skip
    w = _Writer(path, "deepseek2", values)
    w.matrix("token_embd", VOCAB, EMBEDDING)
    w.norm("output_norm")
    w.matrix("output", VOCAB, EMBEDDING)
    for i in range(LAYERS):
        at = f"blk.{i}"
        w.norm(f"{at}.attn_norm")
        w.matrix(f"{at}.attn_q_a", queries, EMBEDDING)
        w.norm(f"{at}.attn_q_a_norm", queries)
        w.matrix(f"{at}.attn_q_b", HEADS * (nope + rope), queries)
        w.matrix(f"{at}.attn_kv_a_mqa", latent + rope, EMBEDDING)
        w.norm(f"{at}.attn_kv_a_norm", latent)
        w.matrix(f"{at}.attn_k_b", HEADS, latent, nope)
        w.matrix(f"{at}.attn_v_b", HEADS, value, latent)
        w.matrix(f"{at}.attn_output", EMBEDDING, HEADS * value)
        _gated(w, at)
    return w.close()


MAKERS = {maker.__name__: maker for maker in (qwen3, gemma3, phi3, qwen3moe, gpt2, deepseek2)}
