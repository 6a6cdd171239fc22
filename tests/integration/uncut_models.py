"""Tiny models of random weights whose text can not be taken back at will: one state for all of it, or a sliding window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

WIDTH, CONTEXT, WINDOW = 64, 1024, 64


def recurrent(path: Path) -> Path:
    """Write a Mamba of two layers."""
    inner, state, rank, kernel = 2 * WIDTH, 16, 4, 4
    writer = GGUFWriter(path, "mamba")
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)

    def layer(name: str, matrix: Callable[[str, int, int], None]) -> None:
        writer.add_tensor(f"{name}.attn_norm.weight", np.ones(WIDTH, np.float32))
        matrix(f"{name}.ssm_in.weight", 2 * inner, WIDTH)
        matrix(f"{name}.ssm_conv1d.weight", inner, kernel)
        writer.add_tensor(f"{name}.ssm_conv1d.bias", np.zeros(inner, np.float32))
        matrix(f"{name}.ssm_x.weight", rank + 2 * state, inner)
        matrix(f"{name}.ssm_dt.weight", inner, rank)
        writer.add_tensor(f"{name}.ssm_dt.bias", np.full(inner, -2, np.float32))
        writer.add_tensor(f"{name}.ssm_a", -np.tile(np.arange(1, state + 1, dtype=np.float32) / 64, (inner, 1)))
        writer.add_tensor(f"{name}.ssm_d", np.ones(inner, np.float32))
        matrix(f"{name}.ssm_out.weight", WIDTH, inner)

    return _write(writer, path, layer)


def windowed(path: Path) -> Path:
    """Write a Gemma 2 of two layers, of which one sees WINDOW tokens back."""
    heads, ffn = 4, 128
    writer = GGUFWriter(path, "gemma2")
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_key_length(WIDTH // heads)
    writer.add_value_length(WIDTH // heads)
    writer.add_sliding_window(WINDOW)

    def layer(name: str, matrix: Callable[[str, int, int], None]) -> None:
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            writer.add_tensor(f"{name}.{norm}.weight", np.ones(WIDTH, np.float32))
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{name}.{part}.weight", WIDTH, WIDTH)
        matrix(f"{name}.ffn_gate.weight", ffn, WIDTH)
        matrix(f"{name}.ffn_up.weight", ffn, WIDTH)
        matrix(f"{name}.ffn_down.weight", WIDTH, ffn)

    return _write(writer, path, layer)


def _write(writer: GGUFWriter, path: Path, layer: Callable[[str, Callable[[str, int, int], None]], None]) -> Path:
    rng = np.random.default_rng(7)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [6] * 256)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name: str, rows: int, columns: int) -> None:
        values: NDArray[np.float32] = rng.standard_normal((rows, columns), dtype=np.float32)
        writer.add_tensor(name, values / columns**0.5)

    matrix("token_embd.weight", len(tokens), WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for n in range(2):
        layer(f"blk.{n}", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
