"""Build llama.cpp's own server from the source that the llama-cpp-python sdist vendors, once, into the cache.

Same source, same compiler, same kernels as the worker's: one CPU variant is compiled in, the one that the worker picks
on this machine, so that neither side has better instructions.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

#: ggml's own feature lists of the variants (ggml/src/CMakeLists.txt), as far as the worker picks them.
FEATURES = {
    "haswell": "SSE42 AVX F16C FMA AVX2 BMI2",
    "alderlake": "SSE42 AVX F16C FMA AVX2 BMI2 AVX_VNNI",
    "skylakex": "SSE42 AVX F16C FMA AVX2 BMI2 AVX512",
    "cannonlake": "SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VBMI",
    "cascadelake": "SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VNNI",
    "cooperlake": "SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VNNI AVX512_BF16",
    "icelake": "SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VBMI AVX512_VNNI",
    "zen4": "SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16",
}


#: What the backend's build is asked for.
_GPU = {"cuda": "-DGGML_CUDA=ON", "rocm": "-DGGML_HIP=ON", "vulkan": "-DGGML_VULKAN=ON"}


def options(variant: str, backend: str) -> list[str]:
    """Return cmake's options. A build without variants (``builtin``) was made for its machine: so is the peer then."""
    cpu = [f"-DGGML_{feature}=ON" for feature in FEATURES.get(variant, "").split()]
    return [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DGGML_NATIVE={'OFF' if cpu else 'ON'}",
        *cpu,
        "-DBUILD_SHARED_LIBS=OFF",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        *([_GPU[backend]] if backend != "cpu" else []),
    ]


def build(cache: Path, variant: str, backend: str = "cpu") -> Path:
    """Return the server's binary; compiles for about 6 minutes on 2 cores (CUDA: much longer) when it is not cached."""
    version, wanted = importlib.metadata.version("llama-cpp-python"), options(variant, backend)
    key = hashlib.sha256("\n".join((version, *wanted)).encode()).hexdigest()[:16]
    target = cache / "bench" / f"llama-server-{key}"
    if target.is_file():
        return target
    cmake = shutil.which("cmake") or "cmake"
    print(
        f"building llama-server from the sdist of llama-cpp-python {version} ({variant}, {backend}): about 6 minutes",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(prefix="rbee-llama-server-") as folder:
        get = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*get, "-d", folder, f"llama-cpp-python=={version}"], check=True)
        subprocess.run(["tar", "-xzf", str(next(Path(folder).glob("*.tar.gz"))), "-C", folder], check=True)
        source = next(Path(folder).glob("llama_cpp_python-*/vendor/llama.cpp"))
        subprocess.run([cmake, "-S", str(source), "-B", f"{folder}/build", *wanted], check=True, stdout=subprocess.DEVNULL)
        # Without a number --parallel means no limit at all: dozens of compilers at once.
        jobs = str(len(os.sched_getaffinity(0)))
        make = [cmake, "--build", f"{folder}/build", "--parallel", jobs, "--target", "llama-server"]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(f"{folder}/build/bin/llama-server", target)
    return target
