"""Cases about the llama.cpp build that nodes get: one wheel with the kernels of every CPU, against a build for this CPU alone."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.engine_cases import Run
from bench.models import q4_0
from bench.results import Row

#: AMX is left out on both sides: the worker never takes it by itself (its kernels died with SIGILL in virtual machines).
_FLAGS = (
    "-DGGML_NATIVE=ON",
    *(f"-DCMAKE_{language}_FLAGS=-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" for language in ("C", "CXX")),
)
_HOOK = "set(LLAMA_BUILD_COMMON OFF)\n"


def native(cache: Path) -> Path:
    """Return a folder for PYTHONPATH with llama-cpp-python built for this machine; compiles for some minutes once."""
    version = importlib.metadata.version("llama-cpp-python")
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "flags"))][:2]
    key = hashlib.sha256("\n".join((version, _HOOK, *_FLAGS, *cpu)).encode())
    target = cache / "bench" / f"native-{key.hexdigest()[:16]}"
    if target.is_dir():
        return target
    print(f"building llama-cpp-python {version} for this CPU: about 4 minutes", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="rbee-native-") as folder:
        hook = Path(folder, "hook.cmake")
        hook.write_text(_HOOK)
        flags = [*_FLAGS, "-DLLAVA_BUILD=OFF", f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={hook}"]
        get = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
        environ = os.environ | {"CMAKE_ARGS": shlex.join(flags)}
        subprocess.run([*get, "-w", folder, f"llama-cpp-python=={version}"], check=True, env=environ)
        wheel = next(Path(folder).glob("llama_cpp_python-*.whl"))
        put = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", f"{folder}/installed", str(wheel)]
        subprocess.run(put, check=True)
        part = target.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(f"{folder}/installed", part)
        part.rename(target)
    return target


def portable(run: Run) -> None:
    """The wheel that is built once and runs everywhere, against a native build: prompt and decode."""
    model, folder = q4_0(run.cache), native(run.cache)
    speeds: dict[str, list[dict[str, float]]] = {"": [], str(folder): []}
    for _ in range(run.rounds):
        for path, rows in speeds.items():
            command = [sys.executable, "-m", "bench.speed", str(model), str(run.threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
            rows.append(json.loads(done.stdout))
    ours, theirs = speeds.values()
    for what, name in (("prompt", "512 prompt tokens"), ("decode", "128 tokens one by one")):
        row = [[r[what] for r in rows] for rows in (ours, theirs)]
        shown = f"135M Q4_0, {name}: the wheel with all kernels"
        run.results.add(Row(f"portable/{what}", shown, "tok/s", row[0], 0.95, True, row[1], "llama.cpp built for this CPU"))


CASES = {"portable": portable}
