"""roles/rbee_hive/files/make_runtime.py as a node runs it: a wheel from a file, an address and an index, and real compilers.

A compile of llama.cpp takes minutes; a few lines of C with its name and its one entry point go the same way in a second.
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import http.server
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from source_package import BACKEND, GOOD_BACKEND, source_package

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "roles/rbee_hive/files/make_runtime.py"


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "requirements-worker.txt").write_text("llama_cpp_python==0.3.36\n")
    return folder


class Made:
    def __init__(self, code: int, lines: list[dict[str, Any]], home: Path) -> None:
        self.code, self.lines, self.home = code, lines, home

    @property
    def last(self) -> dict[str, Any]:
        return self.lines[-1]


def command_of(tmp_path: Path, wheels: Path, **options: str | bool) -> list[str]:
    values = {
        "type": "cpu",
        "install-path": str(tmp_path / "opt"),
        "wheels": str(wheels),
        "work": str(tmp_path / "work"),
        "progress-file": str(tmp_path / "progress.jsonl"),
        "rbee-version": "0.1.0",
        "base": "base",
        "llama-version": "0.3.36",
        "user": getpass.getuser(),
    } | {k.replace("_", "-"): v for k, v in options.items()}
    flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items()]
    return [sys.executable, str(SCRIPT), *flags]


def make(tmp_path: Path, wheels: Path, **options: str | bool) -> Made:
    command = command_of(tmp_path, wheels, **options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert not (tmp_path / "work").exists()
    assert [p for p in (tmp_path / "opt").rglob("*") if not p.is_dir()] == [] or done.returncode == 0  # nothing half-registered
    return Made(done.returncode, lines, tmp_path / "opt")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server and its folder."""
    root = tmp_path / "site"
    root.mkdir()
    handler = functools.partial(_Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", root
        server.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def fake_wheel(path: Path, *libraries: str) -> Path:
    """A zip file that is called like a wheel; it could not be installed."""
    with zipfile.ZipFile(path / "llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl", "w") as archive:
        for name in libraries:
            archive.writestr(f"llama_cpp/lib/{name}", b"x")
    return next(path.glob("*.whl"))


@pytest.mark.parametrize(("kind", "tool"), [("cuda", "nvcc"), ("rocm", "hipcc"), ("vulkan", "glslc")])
def test_a_missing_toolkit_is_named_before_anything_is_done(tmp_path: Path, wheels: Path, kind: str, tool: str) -> None:
    """SPEC EH-020a: looked for in an empty folder, so that it holds on machines that have them."""
    made = make(tmp_path, wheels, type=kind, build=True, tool_path=str(tmp_path), include_path=str(tmp_path))
    headers = ["Vulkan headers >= 1.3.272"] if kind == "vulkan" else []
    assert (made.code, made.last["stage"], made.last["code"]) == (1, "failed", "MISSING_DEPENDENCY")
    assert tool in made.last["message"]
    assert made.last["details"]["missing"] == sorted(["gcc", "g++", "make", tool, *headers])
    assert "runtime download" in made.last["hint"]
    assert len(made.lines) == 1


def test_vulkan_headers_that_are_too_old_are_said_before_ten_minutes_of_compiling(tmp_path: Path, wheels: Path) -> None:
    """Debian 12's: everything compiles but the last file."""
    for tool in ("gcc", "g++", "make", "glslc"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    header = tmp_path / "vulkan/vulkan_core.h"
    header.parent.mkdir()
    header.write_text("// Version of this file\n#define VK_HEADER_VERSION 239\n")
    made = make(tmp_path, wheels, type="vulkan", build=True, tool_path=str(tmp_path), include_path=str(tmp_path))
    assert (made.last["code"], made.last["details"]["missing"]) == (
        "MISSING_DEPENDENCY",
        ["Vulkan headers >= 1.3.272 (here 1.3.239)"],
    )
    assert "Debian 13" in made.last["hint"]


def test_a_rocm_that_is_too_old_is_said_before_anything_is_done(tmp_path: Path, wheels: Path) -> None:
    """Debian 12's and 13's: llama.cpp refuses it."""
    for tool, says in (("gcc", ""), ("g++", ""), ("make", ""), ("hipcc", ""), ("hipconfig", "echo 5.7.31921-0")):
        (tmp_path / tool).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / tool).chmod(0o755)
    made = make(tmp_path, wheels, type="rocm", build=True, tool_path=str(tmp_path))
    assert (made.last["code"], made.last["details"]["missing"]) == ("MISSING_DEPENDENCY", ["ROCm >= 6.1 (here 5.7)"])
    assert "Debian 14" in made.last["hint"]


LINES = (
    (
        "g++ ggml-cpu/unary-ops.cpp",
        "/usr/bin/g++ -DA -I/x/include -O3 -o CMakeFiles/a.o -c /work/llama.cpp/ggml-cpu/unary-ops.cpp",
    ),
    ("nvcc ggml-cuda/argmax.cu", "/usr/bin/nvcc -DA -O3 -x cu -c /work/src/ggml-cuda/argmax.cu -o CMakeFiles/argmax.cu.o"),
    ("clang++ ggml-cuda/argmax.cu", "/usr/bin/clang++ -DA -O3 -o CMakeFiles/argmax.cu.o -x hip -c /work/src/ggml-cuda/argmax.cu"),
    ("linking", ": && /usr/bin/cmake -E rm -f libggml.a && /usr/bin/ar qc libggml.a a.o b.o && /usr/bin/ranlib libggml.a && :"),
)


@pytest.mark.parametrize(("short", "rest"), LINES, ids=[line[0].split()[0] for line in LINES])
def test_a_compiler_s_line_is_short_for_people_and_whole_in_the_journal(
    tmp_path: Path, wheels: Path, short: str, rest: str
) -> None:
    line = f"[23/650] {rest}"
    backend = GOOD_BACKEND.replace("{go!r}", repr(str(tmp_path))).replace("{{", "{").replace("}}", "}")
    source_package(wheels, backend.replace("def build_wheel", f"print({line!r}, flush=True)\ndef build_wheel"))
    done = subprocess.run(command_of(tmp_path, wheels, build=True), capture_output=True, text=True, timeout=120, check=False)
    said = [json.loads(text)["human"] for text in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert f"[23/650] {short}" in said
    assert line in done.stderr


@pytest.mark.parametrize("wrong", ["--trace", "-DX='a", "-DX", "-P/tmp/x.cmake"])
def test_what_is_no_setting_of_cmake_is_refused_before_anything_is_done(tmp_path: Path, wheels: Path, wrong: str) -> None:
    made = make(tmp_path, wheels, build=True, cmake_args=f"-DGGML_NATIVE=OFF {wrong}")
    assert (made.code, made.last["code"]) == (1, "INVALID_REQUEST")
    assert wrong in made.last["message"].replace('"', "'")
    assert len(made.lines) == 1


def test_settings_of_cmake_reach_the_build_as_a_shell_has_them(tmp_path: Path, wheels: Path) -> None:
    shown = "import os, shlex; print('given', shlex.split(os.environ['CMAKE_ARGS'])[:2], flush=True)\n"
    source_package(wheels, shown + BACKEND)
    made = make(tmp_path, wheels, build=True, cmake_args="-DCMAKE_CXX_FLAGS='-O2 -g' -DA=;b")
    assert any("given ['-DCMAKE_CXX_FLAGS=-O2 -g', '-DA=;b']" in line["human"] for line in made.lines)


def test_an_index_that_pip_does_not_trust_is_said_to_be_that(tmp_path: Path, wheels: Path) -> None:
    """pip asks another machine by https alone; its last line says no more than that there is no such version."""
    made = make(tmp_path, wheels, build=True, index="http://192.0.2.1/simple/")
    assert (made.code, made.last["code"]) == (1, "DOWNLOAD_FAILED")
    assert "not a trusted or secure host" in made.last["message"]


def test_a_compiler_that_fails_is_heard_while_it_works_and_its_last_lines_are_kept(tmp_path: Path, wheels: Path) -> None:
    """SPEC OP-02: a real gcc, a real error; lines arrive as they are printed."""
    source_package(wheels, BACKEND)
    made = make(tmp_path, wheels, build=True)
    assert (made.code, made.last["code"]) == (1, "BUILD_FAILED")
    assert any("nothing_like_this" in line for line in made.last["details"]["journal"])
    compiling = [line["at"] for line in made.lines if "] compiling" in line["human"]]
    assert len(compiling) == 6
    assert compiling[-1] - compiling[0] > 1.0


def test_a_wheel_is_checked_by_digest_content_and_type(tmp_path: Path, wheels: Path) -> None:
    wheel = fake_wheel(tmp_path, "libllama.so", "libggml-cpu-haswell.so")
    wrong = make(tmp_path, wheels, wheel=str(wheel), sha256="0" * 64)
    assert (wrong.code, wrong.last["code"]) == (1, "CHECKSUM_MISMATCH")
    other = make(tmp_path, wheels, wheel=str(wheel), type="cuda")
    assert (other.code, other.last["code"]) == (1, "BACKEND_UNAVAILABLE")
    assert "libggml-cuda" in other.last["message"]
    gone = make(tmp_path, wheels, wheel=str(tmp_path / "none.whl"))
    assert (gone.code, gone.last["code"]) == (1, "DOWNLOAD_FAILED")
    wheel.write_bytes(b"no zip")
    broken = make(tmp_path, wheels, wheel=str(wheel))
    assert (broken.code, broken.last["code"]) == (1, "CHECKSUM_MISMATCH")


def test_a_wheel_that_can_not_be_installed_leaves_nothing(tmp_path: Path, wheels: Path) -> None:
    made = make(tmp_path, wheels, wheel=str(fake_wheel(tmp_path, "libllama.so")))
    assert (made.code, made.last["code"]) == (1, "BUILD_FAILED")
    assert made.last["details"]["journal"]


def test_an_address_and_an_index_that_do_not_have_it_are_named(tmp_path: Path, wheels: Path, site: tuple[str, Path]) -> None:
    url, root = site
    gone = make(tmp_path, wheels, wheel=f"{url}/none.whl", sha256="0" * 64)
    assert (gone.code, gone.last["code"]) == (1, "DOWNLOAD_FAILED")
    assert "none.whl" in gone.last["message"]
    (root / "simple/llama-cpp-python").mkdir(parents=True)
    (root / "simple/llama-cpp-python/index.html").write_text("<html></html>")
    empty = make(tmp_path, wheels, index=f"{url}/simple/")
    assert (empty.code, empty.last["code"]) == (1, "DOWNLOAD_FAILED")
    assert f"{url}/simple/" in empty.last["message"]


def test_an_address_without_a_digest_is_not_even_asked(tmp_path: Path, wheels: Path, site: tuple[str, Path]) -> None:
    """As for a model: where a wheel lies says nothing of what it is."""
    url, root = site
    wheel = fake_wheel(root, "libllama.so")
    refused = make(tmp_path, wheels, wheel=f"{url}/{wheel.name}")
    assert (refused.code, refused.last["code"]) == (1, "INVALID_REQUEST")
    assert "--sha256" in refused.last["hint"]
    assert not [line for line in refused.lines if line["stage"] == "downloading"]
    other = make(tmp_path, wheels, wheel=f"{url}/{wheel.name}#sha256={'1' * 64}")
    assert other.last["code"] == "CHECKSUM_MISMATCH"


def test_a_wheel_of_an_index_and_of_an_address_becomes_a_runtime_that_imports_llama_cpp(
    tmp_path: Path, wheels: Path, site: tuple[str, Path]
) -> None:
    """The real wheel of the cache, offered by an index as pip knows it; a second time nothing is made."""
    cache = Path(os.environ.get("RBEE_CACHE", Path.home() / ".cache/rbee"))
    real = next(iter(sorted((cache / "wheels").glob("*/llama_cpp_python-*.whl"))), None)
    assert real is not None, "no llama.cpp wheel in the cache; run: make setup"
    url, root = site
    folder = root / "simple/llama-cpp-python"
    folder.mkdir(parents=True)
    (folder / real.name).symlink_to(real)
    (folder / "index.html").write_text(f'<html><body><a href="{real.name}">{real.name}</a></body></html>')
    made = make(tmp_path, wheels, index=f"{url}/simple/")
    assert made.code == 0, made.last
    runtime = made.last["runtime"]
    home = made.home / "runtimes/cpu" / runtime["version"]
    metadata = json.loads((home / "metadata.yaml").read_text())
    assert (metadata["worker_type"], metadata["llama_cpp_python"]) == ("cpu-llm-worker", "0.3.36")
    assert "cpu-haswell" in metadata["features"]
    assert metadata["source"] == f"{url}/simple/"
    again = make(tmp_path, wheels, wheel=f"{url}/simple/llama-cpp-python/{real.name}", sha256=metadata["sha256"])
    assert (again.code, again.last["runtime"]["made"], again.last["runtime"]["version"]) == (0, False, runtime["version"])
    assert len(list((made.home / "runtimes/cpu").iterdir())) == 1  # one build, one entry, wherever it is fetched from


def begin_to_build(tmp_path: Path, wheels: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a real compile and return when its first line has come; it goes on when the path that is returned is there."""
    go, progress = tmp_path / "go", tmp_path / "progress.jsonl"
    source_package(wheels, GOOD_BACKEND.format(go=str(go)))
    process = subprocess.Popen(
        command_of(tmp_path, wheels, build=True), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 60
    while "[1/3] gcc" not in (progress.read_text() if progress.is_file() else ""):
        assert process.poll() is None, progress.read_text()
        assert time.monotonic() < end, "the compiler is not heard"
        time.sleep(0.02)
    assert "[2/3] gcc" not in progress.read_text()  # heard as it is said: the compile is waiting here
    return process, go


def test_a_compile_is_heard_as_it_goes_and_its_runtime_loads(tmp_path: Path, wheels: Path) -> None:
    """SPEC OP-02: the whole way, from the source package by a real gcc to a registered runtime whose library was loaded."""
    process, go = begin_to_build(tmp_path, wheels)
    go.touch()
    assert process.wait(120) == 0
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    said = [line["human"].strip() for line in lines if line["stage"] == "building"]
    assert [s for s in said if s.startswith("[")] == [f"[{n + 1}/3] gcc -c part{n}.c" for n in range(3)]
    assert any("llama.cpp of this test" in line["human"] for line in lines)
    runtime = lines[-1]["runtime"]
    assert (lines[-1]["stage"], runtime["source"], runtime["made"]) == ("complete", "built here", True)
    assert lines[0]["human"] == "compiling llama_cpp_python-0.3.36.tar.gz for cpu"
    home = tmp_path / "opt/runtimes/cpu" / runtime["version"]
    assert json.loads((home / "metadata.yaml").read_text())["worker_type"] == "cpu-llm-worker"
    assert (home / "bin/python").exists()
    sources = {path.stem for path in home.rglob("site-packages/llama_cpp/*.py")}
    assert {path.name.split(".")[0] for path in home.rglob("site-packages/llama_cpp/__pycache__/*.pyc")} == sources != set()
    assert not (tmp_path / "work").exists()


def test_the_source_of_an_index_is_compiled_once_and_the_runtime_tells_of_it(
    tmp_path: Path, wheels: Path, site: tuple[str, Path]
) -> None:
    url, root = site
    folder = root / "simple/llama-cpp-python"
    folder.mkdir(parents=True)
    (tmp_path / "go").touch()
    source_package(folder, GOOD_BACKEND.format(go=str(tmp_path / "go")))
    (package,) = folder.iterdir()
    (folder / "index.html").write_text(f'<html><body><a href="{package.name}">{package.name}</a></body></html>')
    made = make(tmp_path, wheels, build=True, index=f"{url}/simple/", cmake_args="-DGGML_NATIVE=OFF")
    assert made.code == 0, made.last
    said = [line["human"].strip() for line in made.lines if "] gcc -c " in line["human"]]
    assert said == [f"[{n + 1}/3] gcc -c part{n}.c" for n in range(3)]
    (path,) = made.home.rglob("llama_cpp_python-*.dist-info/rbee-build.json")
    record = json.loads(path.read_text())
    assert (record["backend"], record["cmake_args"]) == ("cpu", ["-DGGML_NATIVE=OFF"])
    assert (record["source"], record["source_sha256"]) == (package.name, hashlib.sha256(package.read_bytes()).hexdigest())
    assert "rbee-build.json,sha256=" in (path.parent / "RECORD").read_text()


def test_a_compile_that_is_killed_registers_nothing_and_the_next_one_succeeds(tmp_path: Path, wheels: Path) -> None:
    process, go = begin_to_build(tmp_path, wheels)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not list((tmp_path / "opt").rglob("metadata.yaml"))
    go.touch()
    again = make(tmp_path, wheels, build=True)
    assert again.code == 0, again.last
    assert len(list((tmp_path / "opt/runtimes/cpu").glob("*/metadata.yaml"))) == 1


def release_build() -> ModuleType:
    """What makes the wheel of every release."""
    spec = importlib.util.spec_from_file_location("build_llama_wheel", ROOT / "roles/rbee_wheels/files/build_llama_wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(2400)  # without what ccache has kept it takes as long as the first compile
def test_the_wheel_in_use_is_what_this_program_compiles(tmp_path: Path) -> None:
    """SPEC OP-02: llama.cpp itself. The release's wheel was made by this program (it says from what and how), and the program
    makes the same libraries again: the compiler's cache knows every file, all else is done anew."""
    cache = Path(os.environ.get("RBEE_CACHE", Path.home() / ".cache/rbee"))
    llama = release_build()
    directory = cache / "wheels" / f"llama-{llama.cache_key()}"
    sources, wheel = llama.sources(directory), llama.cached_wheel(directory)
    assert wheel is not None, "no llama.cpp wheel in the cache; run: make setup"
    record = json.loads(metadata.distribution("llama-cpp-python").read_text("rbee-build.json") or "{}")
    package = sources / record["source"]
    assert (record["backend"], record["source"]) == ("cpu", f"llama_cpp_python-{llama.VERSION}.tar.gz")
    assert record["source_sha256"] == hashlib.sha256(package.read_bytes()).hexdigest()
    assert {"-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON"} < set(record["cmake_args"])
    assert (record["cmake_args"], record["cmake_hook"]) == (list(llama.CMAKE_ARGS), llama.CMAKE_HOOK)

    wheels = tmp_path / "wheels"
    shutil.copytree(sources, wheels, copy_function=os.symlink)
    (wheels / "requirements-worker.txt").write_text(f"llama_cpp_python=={llama.VERSION}\n")
    given = [a for a in llama.arguments(wheels, tmp_path, cache) if not a.startswith("--wheel-to")]
    runtime = [f"--install-path={tmp_path}/opt", "--rbee-version=0.1.0", "--base=base"]
    command = [sys.executable, str(SCRIPT), *given, *runtime]
    with llama.lock(llama.compiling(cache).with_suffix(".lock")):
        done = subprocess.run(command, capture_output=True, text=True, timeout=2300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    compiled = [line["human"] for line in lines if re.match(r"\[\d+/\d+\] ", line["human"].strip())]
    assert len(compiled) > 200
    assert [line["human"] for line in lines if line["human"].startswith("llama.cpp ")]  # it was loaded
    home = tmp_path / "opt/runtimes/cpu" / lines[-1]["runtime"]["version"]
    (again,) = home.glob("lib/python3*/site-packages/llama_cpp_python-*.dist-info/rbee-build.json")
    assert json.loads(again.read_text()) == record
    with zipfile.ZipFile(wheel) as made:
        made.extractall(tmp_path / "release")
    assert exported(tmp_path / "release/llama_cpp/lib") == exported(next(home.glob("lib/python3*/site-packages/llama_cpp/lib")))


def exported(folder: Path) -> dict[str, list[str]]:
    """Return what each library of a folder offers; all else in them may differ by the names of the folders they were made in."""
    listing = {path.name: ["nm", "--dynamic", "--defined-only", "--format=posix", str(path)] for path in folder.glob("*.so")}
    said = {name: subprocess.run(argv, check=True, capture_output=True, text=True).stdout for name, argv in listing.items()}
    return {name: sorted(line.split()[0] for line in text.splitlines()) for name, text in said.items()}
