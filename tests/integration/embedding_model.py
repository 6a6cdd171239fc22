"""A tiny model that gives embeddings alone: BERT's shape, random weights, a vocabulary of a few words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, PoolingType

WORDS = ["bees", "honey", "queen", "hive", "flowers", "a", "the", "and", "make", "of"]
CONTEXT = 96


def write(path: Path, pooling: PoolingType = PoolingType.MEAN, width: int = 64, layers: int = 2, ffn: int = 128) -> Path:
    """Write it and return the path."""
    rng = np.random.default_rng(1)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"\u2581{w}" for w in WORDS)]
    writer = GGUFWriter(path, "bert")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_file_type(0)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 2, 3, 3] + [1] * len(WORDS))
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)  # [CLS], as llama.cpp reads it
    writer.add_sep_token_id(3)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, rng.standard_normal((rows, columns), dtype=np.float32) / columns**0.5)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(width, np.float32))

    matrix("token_embd.weight", len(tokens), width)
    matrix("token_types.weight", 2, width)
    matrix("position_embd.weight", CONTEXT, width)
    norm("token_embd_norm")
    for i in range(layers):
        shapes = {"attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width), "attn_output": (width, width)}
        for name, (rows, columns) in (shapes | {"ffn_up": (ffn, width), "ffn_down": (width, ffn)}).items():
            matrix(f"blk.{i}.{name}.weight", rows, columns)
            writer.add_tensor(f"blk.{i}.{name}.bias", np.zeros(rows, np.float32))
        norm(f"blk.{i}.attn_output_norm")
        norm(f"blk.{i}.layer_output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
