"""Is this the llama.cpp that the engine was written for, and can this CPU run it? Asked before anything is loaded.

A struct of another shape or an instruction that the CPU lacks would not raise an error but end the process, or worse, not.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

from rbee_serve.contract.errors import BackendUnavailable

#: The pinned release (pyproject.toml), what it says of itself, and the sizes of the structs that are filled here, bytes.
PACKAGE_VERSION = "0.3.36"
LLAMA_VERSION = "0.5.0-dev"
STRUCTS = {
    "llama_model_params": 80,
    "llama_context_params": 160,
    "llama_batch": 56,
    "llama_token_data": 12,
    "llama_token_data_array": 32,
    "llama_sampler_chain_params": 1,
}
#: What the library itself writes into its parameters: shows whether both sides mean the same bytes.
DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "type_k": 1, "type_v": 1, "n_samplers": 0}
_HINT = "install the runtime that belongs to this release of rbee: rbee-ctl hive install"
#: What llama.cpp says it was compiled with -> the flag of /proc/cpuinfo.
_FLAGS = {
    "SSE3": "pni", "SSSE3": "ssse3", "AVX": "avx", "AVX2": "avx2", "F16C": "f16c", "FMA": "fma", "BMI2": "bmi2",
    "AVX_VNNI": "avx_vnni", "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16", "AMX_INT8": "amx_int8",
}  # fmt: skip


def check_abi(ll: Any, package_version: str) -> None:
    """Raise BackendUnavailable unless bindings and library are the pinned ones; ``ll``: the bindings."""
    found = ll.llama_version().decode()
    if package_version != PACKAGE_VERSION or found != LLAMA_VERSION:
        raise BackendUnavailable(
            f"this runtime has llama-cpp-python {package_version} with llama.cpp {found}, "
            f"the engine needs {PACKAGE_VERSION} with {LLAMA_VERSION}",
            hint=_HINT,
        )
    for name, expected in STRUCTS.items():
        size = ctypes.sizeof(getattr(ll, name))
        if size != expected:
            raise BackendUnavailable(f"{name} of llama-cpp-python has {size} bytes, expected {expected}", hint=_HINT)
    params = ll.llama_context_default_params()
    values = {name: int(getattr(params, name)) for name in DEFAULTS}
    if values != DEFAULTS:
        raise BackendUnavailable(f"llama.cpp's library and bindings do not fit: it has {values}, expected {DEFAULTS}", hint=_HINT)


def check_instructions(built_with: str, cpuinfo: str | None = None) -> None:
    """Raise BackendUnavailable when the kernels need instructions that this CPU has not.

    ``built_with``: llama_print_system_info's text; ``cpuinfo``: /proc/cpuinfo's. CPUs without ``flags`` (not x86) are
    not looked at.
    """
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace") if cpuinfo is None else cpuinfo
    match = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if match is None:
        return
    has = set(match[1].split())
    wanted = re.findall(r"(\w+) = 1", built_with)
    missing = [name for name in wanted if name in _FLAGS and _FLAGS[name] not in has]
    if missing:
        raise BackendUnavailable(
            f"this build of llama.cpp needs {', '.join(missing)}, which this CPU has not",
            hint="install a runtime with kernels for every CPU: rbee-ctl hive install",
            missing=missing,
        )
