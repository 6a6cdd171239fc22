#!/usr/bin/env python3
"""Build the llama-cpp-python wheel once and keep it in a cache; print its path as the last line of stdout.

The wheel runs on any x86-64 machine with glibc as new as the builder's: llama.cpp's CPU kernels are built in every
variant from SSE4.2 to AVX-512 and the best one is loaded at run time (GGML_BACKEND_DL, GGML_CPU_ALL_VARIANTS), which
costs no speed against a native build. It is compiled by the program of ``rbee-ctl runtime build`` (make_runtime.py of
rbee_hive) and carries its record. Standard library only: it runs before anything is installed.

The cache is keyed by everything that goes into the build, so a changed flag or version builds anew and an unchanged
one never does. Two builders of one cache wait for each other.

    build_llama_wheel.py --cache DIR [--python PYTHON]

Exit codes: 0 done, 1 the build failed (log named), 2 usage.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = "0.3.36"

#: Set through CMake's own hook because the package's CMakeLists.txt forces LLAMA_BUILD_COMMON on in the cache; a normal
#: variable wins over it. llama-common is a third of the compile time and nothing in the Python binding uses it.
CMAKE_HOOK = "set(LLAMA_BUILD_COMMON OFF)\n"

CMAKE_ARGS = (
    "-DGGML_NATIVE=OFF",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU_ALL_VARIANTS=ON",
    # Multimodal projectors are not served; they are a sixth of the compile time.
    "-DLLAVA_BUILD=OFF",
    # Without versioned names each library is in the wheel once, not three times (a wheel holds no links), and the
    # binding's own handle of libggml is the one that libllama uses, not a second copy with an empty registry.
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
    # Everything lands where the binding looks; the default puts the CPU variants into site-packages/bin.
    "-DCMAKE_INSTALL_BINDIR=llama_cpp/lib",
    "-DCMAKE_INSTALL_LIBDIR=llama_cpp/lib",
    "-DCMAKE_INSTALL_INCLUDEDIR=llama_cpp/include",
)

#: Compiles, here and on the nodes.
MAKE_RUNTIME = Path(__file__).resolve().parents[2] / "rbee_hive/files/make_runtime.py"

#: Counted up when a wheel of before shall not be used any more: 2 carries the record of its making.
FORM = "2"

MUST_CONTAIN = ("libllama.so", "libggml.so", "libggml-base.so", "libggml-cpu-haswell.so", "libggml-cpu-x64.so")


def cache_key() -> str:
    """Digest of all that the wheel depends on: version, flags, machine, C library."""
    inputs = (FORM, VERSION, CMAKE_HOOK, *CMAKE_ARGS, platform.machine(), *platform.libc_ver())
    return hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; says so when it has to wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("another build of the same wheel is running; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cached_wheel(directory: Path) -> Path | None:
    """Return the finished wheel in ``directory``, if there is one."""
    return next(iter(sorted(directory.glob("llama_cpp_python-*.whl"))), None)


def missing_tools() -> list[str]:
    """Return the Debian packages whose compilers are not there. cmake and ninja come from the build environment."""
    return [package for tool, package in (("gcc", "gcc"), ("g++", "g++"), ("make", "make")) if not shutil.which(tool)]


def fetch_sources(folder: Path, python: str, log_path: Path) -> int:
    """Put the source package and what pip builds it with into ``folder``, with pip's settings of whoever types; return pip's exit
    code. cmake and ninja are for machines without them."""
    pip = [python, "-m", "pip", "download", "--disable-pip-version-check", "--dest", str(folder)]
    source = ["--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}"]
    with log_path.open("w", encoding="utf-8") as log:
        for what in (source, ["--only-binary", ":all:", "scikit-build-core[pyproject]", "cmake", "ninja"]):
            if code := subprocess.run([*pip, *what], stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
                return code
    return 0


def sources(directory: Path) -> Path:
    """Return the cache's folder with what the wheel in ``directory`` was compiled from: it can be done again without network."""
    return directory.parents[1] / "sources" / directory.name


def keep_sources(wheels: Path, directory: Path) -> None:
    """Keep the source package and what pip builds it with."""
    kept = sources(directory)
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    wheels.rename(kept)


def compiling(cache: Path) -> Path:
    """Return where it is compiled, by one at a time: names of folders get into what is compiled, and ccache finds it by them."""
    return cache / "compile"


def arguments(wheels: Path, scratch: Path, cache: Path) -> list[str]:
    """Return the arguments of make_runtime.py for this wheel; what ccache keeps lies in ``cache`` and is used where ccache is."""
    named = {
        "type": "cpu",
        "llama-version": VERSION,
        "cmake-args": " ".join(CMAKE_ARGS),
        "cmake-hook": CMAKE_HOOK,
        "wheels": wheels,
        "work": compiling(cache),
        "progress-file": scratch / "progress.jsonl",
        "ccache": cache / "ccache",
        "wheel-to": scratch / "out",
        "user": "",
    }
    return ["--build", *(f"--{name}={value}" for name, value in named.items())]


def run_build(command: list[str], log_path: Path) -> int:
    """Run the build, copy its output to ``log_path`` and show ``compiled n of m`` on stderr; return the exit code."""
    began = shown_at = time.monotonic()
    terminal = sys.stderr.isatty()
    pause_s = 0.5 if terminal else 15.0
    with (
        log_path.open("a", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process,
    ):
        if process.stdout is None:  # never: PIPE was asked for
            raise RuntimeError("no output pipe")
        for line in process.stdout:
            log.write(line)
            step = re.match(r"\s*\[(\d+)/(\d+)\]", line)
            now = time.monotonic()
            if step and (now - shown_at >= pause_s or step[1] == step[2]):
                shown_at = now
                text = f"llama.cpp: compiled {step[1]:>4} of {step[2]} files, {now - began:4.0f} s"
                print(f"\r{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)
        code = process.wait()
    if terminal:
        print(file=sys.stderr)
    return code


def check_contents(wheel: Path) -> None:
    """Raise SystemExit when the wheel lacks a library: a build that only seemed to work must not be cached."""
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("llama_cpp/lib/")}
    if missing := [name for name in MUST_CONTAIN if name not in names]:
        raise SystemExit(f"{wheel.name} lacks {', '.join(missing)}; not cached")


def build(directory: Path, python: str) -> Path:
    """Build into a fresh folder beside ``directory``, check, and move it into place in one step."""
    if tools := missing_tools():
        raise SystemExit(f"no compiler: {', '.join(tools)} missing; next: apt-get install {' '.join(tools)}")
    print(
        f"building llama-cpp-python {VERSION} for every x86-64 CPU: once, about {14 / (os.cpu_count() or 1):.0f} minutes here",
        file=sys.stderr,
        flush=True,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    log_path = directory.parent / f"{directory.name}.log"
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        out, wheels = Path(scratch, "out"), Path(scratch, "wheels")
        out.mkdir()
        code = fetch_sources(wheels, python, log_path)
        cache = directory.parents[1]
        if code == 0:
            with lock(compiling(cache).with_suffix(".lock")):
                code = run_build([python, str(MAKE_RUNTIME), *arguments(wheels, Path(scratch), cache)], log_path)
        wheel = cached_wheel(out) if code == 0 else None
        if wheel is None:
            tail = "".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-25:])
            raise SystemExit(f"{tail}\nbuild of llama-cpp-python {VERSION} failed (exit {code}); whole log: {log_path}")
        check_contents(wheel)
        keep_sources(wheels, directory)
        out.rename(directory)
    log_path.unlink()
    return directory / wheel.name


def main() -> None:
    """Parse the command line, build when the cache has no such wheel, print the wheel's path."""
    default_cache = os.environ.get("RBEE_CACHE") or str(Path.home() / ".cache/rbee")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(default_cache), help="cache directory")
    parser.add_argument("--python", default=sys.executable, help="interpreter with pip that runs the build")
    options = parser.parse_args()
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise SystemExit(f"this recipe is for Linux on x86_64, this is {platform.system()} on {platform.machine()}")
    directory = options.cache.expanduser() / "wheels" / f"llama-{cache_key()}"
    wheel = cached_wheel(directory)
    if wheel is None:
        with lock(directory.parent / f"{directory.name}.lock"):
            wheel = cached_wheel(directory) or build(directory, options.python)
    print(wheel)


if __name__ == "__main__":
    main()
