"""A source package of llama-cpp-python that a real compiler makes in a second, and that compiler for machines that have none."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from pathlib import Path

#: A source package whose build backend lies in the package: it compiles a file that is wrong, after some output.
BACKEND = """
import subprocess, sys, time
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    for n in range(6):
        print(f"[{n}/6] compiling", flush=True)
        time.sleep(0.5)
    sys.exit(subprocess.run(["gcc", "-c", "broken.c", "-o", "broken.o"]).returncode)
"""


#: One that succeeds: compiles three real C files into a library, waiting behind the first until the file ``go`` is there.
GOOD_BACKEND = """
import base64, hashlib, pathlib, subprocess, time, zipfile
GO = pathlib.Path({go!r})
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    for n in range(3):
        source = f"part{{n}}.c"
        pathlib.Path(source).write_text(
            'const char *llama_version(void) {{ return "of this test"; }}' if n == 2 else f"int part{{n}};"
        )
        print(f"[{{n + 1}}/3] gcc -c {{source}}", flush=True)
        subprocess.run(["gcc", "-fPIC", "-c", source], check=True)
        while n == 0 and not GO.exists():
            time.sleep(0.02)
    subprocess.run(["gcc", "-shared", "-nostdlib", "-o", "libllama.so", "part0.o", "part1.o", "part2.o"], check=True)
    name = "llama_cpp_python-0.3.36-py3-none-any.whl"
    info = "llama_cpp_python-0.3.36.dist-info"
    files = {{
        "llama_cpp/__init__.py": b"",
        "llama_cpp/lib/libllama.so": pathlib.Path("libllama.so").read_bytes(),
        f"{{info}}/METADATA": b"Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 0.3.36\\n",
        f"{{info}}/WHEEL": b"Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }}
    with zipfile.ZipFile(pathlib.Path(wheel_directory, name), "w") as wheel:
        for path, data in files.items():
            wheel.writestr(path, data)
        wheel.writestr(f"{{info}}/RECORD", "".join(f"{{path}},,\\n" for path in files))
    return name
"""


#: Asked for when the package is fetched from an index; without it pip would compile to know it.
METADATA = """
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    import pathlib
    info = pathlib.Path(metadata_directory, "llama_cpp_python-0.3.36.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 0.3.36\\n")
    return info.name
"""


def source_package(wheels: Path, backend: str) -> None:
    """Put a source package with this build backend where pip looks."""
    source = wheels.parent / "llama_cpp_python-0.3.36"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "llama-cpp-python"\nversion = "0.3.36"\n'
    )
    (source / "backend.py").write_text(backend + METADATA)
    (source / "broken.c").write_text("int main(void) { return nothing_like_this; }\n")
    with tarfile.open(wheels / "llama_cpp_python-0.3.36.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)


def compiler(folder: Path, home: str) -> None:
    """Put this machine's C compiler into ``folder``, to be used as ``home`` on a machine with other libraries.

    Each program is started by the loader and with the libraries that it was linked against here; ``bin`` is for PATH.
    """
    libraries, programs, started = (folder / name for name in ("lib", "programs", "bin"))
    for made in (libraries, programs, started):
        made.mkdir(parents=True)

    def gcc(what: str, name: str) -> Path:
        done = subprocess.run(["gcc", f"-print-{what}-name={name}"], check=True, capture_output=True, text=True)
        return Path(shutil.which(done.stdout.strip()) or done.stdout.strip()).resolve()

    found = {name: gcc("prog", name) for name in ("cc1", "collect2", "as", "ld")}
    found |= {name: Path(shutil.which(name) or name).resolve() for name in ("gcc", "g++", "make")}
    plugin = gcc("file", "liblto_plugin.so")
    for path in (*found.values(), plugin):
        linked = subprocess.run(["ldd", str(path)], check=True, capture_output=True, text=True).stdout
        for library in re.findall(r"(/\S+) \(0x", linked):
            shutil.copy(library, libraries)
    loader = next(libraries.glob("ld-linux*")).name
    for name, path in found.items():
        shutil.copy(path, programs / name)
        more = f" -B{home}/bin/" if name in ("gcc", "g++") else ""
        run = f'exec {home}/lib/{loader} --library-path {home}/lib {home}/programs/{name}{more} "$@"'
        (started / name).write_text(f"#!/bin/sh\n{run}\n")
        (started / name).chmod(0o755)
    shutil.copy(plugin, started / "liblto_plugin.so")
