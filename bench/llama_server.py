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
import tarfile
import tempfile
from pathlib import Path

#: ggml's own feature lists of the variants (ggml/src/CMakeLists.txt), as far as the worker picks them.
FEATURES = {
    "haswell": "SSE42 AVX F16C FMA AVX2 BMI2",
    "skylakex": "SSE42 AVX F16C FMA AVX2 BMI2 AVX512",
    "icelake": "SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VBMI AVX512_VNNI",
    "zen4": "SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16",
}


def build(cache: Path, variant: str) -> Path:
    """Return the server's binary for ``variant``; compiles for about 6 minutes on 2 cores when it is not cached."""
    version = importlib.metadata.version("llama-cpp-python")
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=OFF",
        *(f"-DGGML_{feature}=ON" for feature in FEATURES[variant].split()),
        "-DBUILD_SHARED_LIBS=OFF",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
    ]
    key = hashlib.sha256("\n".join((version, *options)).encode()).hexdigest()[:16]
    target = cache / "bench" / f"llama-server-{key}"
    if target.is_file():
        return target
    cmake = shutil.which("cmake") or "cmake"
    print(f"building llama-server from the sdist of llama-cpp-python {version} ({variant}): about 6 minutes", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="rbee-llama-server-") as folder:
        get = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*get, "-d", folder, f"llama-cpp-python=={version}"], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        source = next(Path(folder).glob("llama_cpp_python-*/vendor/llama.cpp"))
        subprocess.run([cmake, "-S", str(source), "-B", f"{folder}/build", *options], check=True, stdout=subprocess.DEVNULL)
        # Without a number --parallel means no limit at all: dozens of compilers at once.
        jobs = str(len(os.sched_getaffinity(0)))
        make = [cmake, "--build", f"{folder}/build", "--parallel", jobs, "--target", "llama-server"]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(f"{folder}/build/bin/llama-server", target)
    return target
