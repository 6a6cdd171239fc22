"""Parts of the benchmark that need no server: what the peer is built with, where figures are kept, when a goal is reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import llama_server
from bench.results import Results, Row
from bench.servers import gpu_arguments


@pytest.mark.parametrize("variant", sorted(llama_server.FEATURES))
def test_bench_peer_has_the_worker_s_instructions_and_no_others(variant: str) -> None:
    options = llama_server.options(variant, "cpu")
    assert "-DGGML_NATIVE=OFF" in options
    assert "-DGGML_AVX2=ON" in options
    assert ("-DGGML_AVX512=ON" in options) is (variant not in ("haswell", "alderlake"))


def test_bench_peer_of_a_gpu_is_built_for_it_and_puts_all_weights_there() -> None:
    options = llama_server.options("builtin", "cuda")
    assert {"-DGGML_CUDA=ON", "-DGGML_NATIVE=ON"} <= set(options)
    assert not [o for o in llama_server.options("haswell", "cpu") if "CUDA" in o]
    assert (gpu_arguments("cuda"), gpu_arguments("cpu")) == (["-ngl", "999"], [])


def test_bench_figures_of_a_gpu_do_not_replace_those_of_the_cpu(tmp_path: Path) -> None:
    cpu, gpu = (Results(tmp_path, quick=False, backend=b, docs=tmp_path) for b in ("cpu", "cuda"))
    cpu.add(Row("throughput/1", "tokens/s", "tok/s", [10.0], 1.0, True, [20.0], "llama-server"))
    gpu.add(Row("throughput/1", "tokens/s", "tok/s", [100.0], 1.0, True, [50.0], "llama-server"))
    assert [r.ours for r in Results(tmp_path, quick=False, docs=tmp_path).rows] == [[10.0]]
    assert (cpu.page_path.name, gpu.page_path.name) == ("benchmarks.md", "benchmarks-cuda.md")
    page = cpu.page(["throughput"])
    assert "**no**" in page
    assert "## Why a goal was missed" in page
    assert "**no**" not in gpu.page(["throughput"])
