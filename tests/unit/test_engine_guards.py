"""The engine's checks before it loads anything, and settings that only make sense together."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from rbee_serve.contract.errors import BackendUnavailable, ConfigInvalid
from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker.engine import guards

CPU = "processor\t: 0\nflags\t\t: fpu pni ssse3 avx avx2 f16c fma bmi2\nbogomips : 5000\n"


def bindings(**changes: Any) -> SimpleNamespace:
    """What check_abi looks at, as the pinned release has it."""
    structs = {
        name: type(name, (ctypes.Structure,), {"_fields_": [("x", ctypes.c_byte * n)]}) for name, n in guards.STRUCTS.items()
    }
    values: dict[str, Any] = {
        "llama_version": lambda: guards.LLAMA_VERSION.encode(),
        "llama_context_default_params": lambda: SimpleNamespace(**guards.DEFAULTS),
        **structs,
    }
    return SimpleNamespace(**values | changes)


def test_the_pinned_bindings_pass() -> None:
    guards.check_abi(bindings(), guards.PACKAGE_VERSION)


@pytest.mark.parametrize(
    ("changes", "version", "problem"),
    [
        ({}, "0.3.37", r"0\.3\.37 .* needs 0\.3\.36"),
        ({"llama_version": lambda: b"0.6.0"}, guards.PACKAGE_VERSION, r"llama\.cpp 0\.6\.0"),
        ({"llama_batch": ctypes.c_int64}, guards.PACKAGE_VERSION, "llama_batch of llama-cpp-python has 8 bytes, expected 56"),
        (
            {"llama_context_default_params": lambda: SimpleNamespace(**guards.DEFAULTS | {"n_batch": 7})},
            guards.PACKAGE_VERSION,
            "library and bindings do not fit",
        ),
    ],
)
def test_other_bindings_are_refused_with_both_values(changes: dict[str, Any], version: str, problem: str) -> None:
    with pytest.raises(BackendUnavailable, match=problem) as e:
        guards.check_abi(bindings(**changes), version)
    assert "hive install" in str(e.value.hint)


def test_instructions_that_the_cpu_lacks_are_named() -> None:
    guards.check_instructions("CPU : SSE3 = 1 | AVX2 = 1 | FMA = 1 | AVX512 = 0 | LLAMAFILE = 1 | REPACK = 1 |", CPU)
    with pytest.raises(BackendUnavailable, match="needs AVX512, AVX512_VNNI, which this CPU has not"):
        guards.check_instructions("CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1 |", CPU)
    guards.check_instructions("CPU : NEON = 1 | AVX512 = 1 |", "Features : asimd\n")


def worker(**values: Any) -> WorkerSettings:
    base = {"name": "cpu0", "hive": "lab1", "model_id": "m", "model_path": "/m.gguf"}
    return WorkerSettings.from_values(base | values, {}, origin="cpu0.toml")


def test_adapters_have_a_path_and_a_scale() -> None:
    settings = worker(lora=["/a.gguf", "/b.gguf:0.5", "/with:colon.gguf"])
    assert settings.adapters == [("/a.gguf", 1.0), ("/b.gguf", 0.5), ("/with:colon.gguf", 1.0)]
    assert worker(lora="/a.gguf, /b.gguf:2").adapters == [("/a.gguf", 1.0), ("/b.gguf", 2.0)]
    assert worker().adapters == []
    for wrong in ("relative.gguf", "/a.gguf:nan", "/a.gguf:inf"):
        with pytest.raises(ConfigInvalid, match="absolute path"):
            worker(lora=[wrong])


def test_deterministic_refuses_an_f16_cache_that_was_asked_for() -> None:
    assert worker(deterministic=True).deterministic
    assert worker(deterministic=True, kv_type="q8_0").kv_type == "q8_0"
    with pytest.raises(ConfigInvalid, match="deterministic = true needs"):
        worker(deterministic=True, kv_type="f16")
