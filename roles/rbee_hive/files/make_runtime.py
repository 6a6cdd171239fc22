#!/usr/bin/env python3
"""Make one runtime on this machine: a virtual environment with rbee and one build of llama-cpp-python.

The build comes from a wheel (``--wheel``), from a package index (``--index``) or from a compiler here (``--build``). The
wheels of everything else lie in ``--wheels`` already. Progress goes to ``--progress-file`` as JSON lines, the compiler's
output line by line; the last one is ``complete`` or ``failed``. ``metadata.yaml`` is written last and a failure removes
the directory: there is no half of a runtime. Standard library only, run by the system's Python in a transient unit.

A wheel that is compiled carries what it was made from and how, in ``*.dist-info/rbee-build.json``: whoever has the wheel,
or a runtime with it, can tell. With ``--wheel-to DIR`` the wheel is all that is made; so comes the one of every release
(build_llama_wheel.py).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

_ROCM = "ROCm 6.1 or newer (AMD's package rocm-hip-sdk; Debian 14: hipcc libhipblas-dev librocblas-dev)"
#: CMake's switch of each type, and what compiles it: tool -> what has it.
TYPES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "cpu": ((), {}),
    "cuda": (("-DGGML_CUDA=ON",), {"nvcc": "the CUDA toolkit (Debian: nvidia-cuda-toolkit)"}),
    "rocm": (("-DGGML_HIP=ON",), {"hipcc": _ROCM}),
    "vulkan": (("-DGGML_VULKAN=ON",), {"glslc": "the Vulkan SDK (Debian: glslc libvulkan-dev)"}),
}
COMPILERS = {"gcc": "gcc", "g++": "g++", "make": "make"}
#: The machine's own certificates (Debian, Fedora): an index inside an organisation is signed by its own authority, and pip
#: by itself knows the public ones alone.
CERTIFICATES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
TOOL_PATHS = "/usr/local/cuda/bin:/opt/rocm/bin:/usr/local/bin:/usr/bin:/bin"
#: Library that a wheel of the type must hold beside libllama.so; one that only seemed to be built is refused.
LIBRARIES = {"cuda": "libggml-cuda", "rocm": "libggml-hip", "vulkan": "libggml-vulkan"}
#: ninja's count of a step that is a shell's: libraries are put together.
LINK_LINE = re.compile(r"\s*(\[\d+/\d+\]) : && ")
TAIL_LINES = 25
#: In a wheel's .dist-info: how it was compiled.
BUILD_RECORD = "rbee-build.json"
#: ninja's count, the compiler, and the source file with its folder; nvcc is told after it what to write.
COMPILER_LINE = re.compile(r"\s*(\[\d+/\d+\]) (?:\S*/)?(\S+) .* -c (?:\S*/)?([^/\s]+/[^/\s]+)(?: -o \S+)?$")
#: Where headers are looked for, and the first Vulkan headers with all that llama.cpp uses (VK_EXT_layer_settings).
INCLUDE_PATHS = "/usr/local/include:/usr/include"
VULKAN_HEADERS = 272
#: The first ROCm that llama.cpp takes.
ROCM = (6, 1)
#: Loads llama.cpp from the environment, without the packages around it.
LOADS = (
    "import ctypes, importlib.util as i\n"
    "lib = ctypes.CDLL(i.find_spec('llama_cpp').submodule_search_locations[0] + '/lib/libllama.so')\n"
    "lib.llama_version.restype = ctypes.c_char_p\n"
    "print('llama.cpp', lib.llama_version().decode())\n"
)


class FailError(Exception):
    """What ends the making; ``code`` is one of rbee_serve.contract.errors."""

    def __init__(self, code: str, message: str, hint: str | None = None, **details: object) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.details = code, message, hint, details


class Progress:
    """JSON lines, and the same words in the journal."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def line(self, stage: str, human: str, **figures: object) -> None:
        """Write one line; of a compiler's, people get which file and the journal gets all of it."""
        record = {"stage": stage, **figures, "human": brief(human), "at": round(time.time(), 3)}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(human, file=sys.stderr, flush=True)


def brief(line: str) -> str:
    """Return ``[23/650] g++ ggml-cpu/unary-ops.cpp`` for a compiler's command line, other lines as they are."""
    if found := COMPILER_LINE.match(line):
        return "{} {} {}".format(*found.groups())
    return f"{found[1]} linking" if (found := LINK_LINE.match(line)) else line


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def environment(**more: str) -> dict[str, str]:
    """Return the environment of every program run here: nobody's own pip settings, the machine's certificates, English."""
    quiet = {"PIP_CONFIG_FILE": "/dev/null", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    if bundle := next((path for path in CERTIFICATES if Path(path).is_file()), None):
        quiet["PIP_CERT"] = bundle
    return {"PATH": TOOL_PATHS, "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", **quiet, **more}


def run(command: list[str], progress: Progress, stage: str, *, user: str | None = None, **env: str) -> tuple[int, list[str]]:
    """Run a program, each line of its output as it comes; returns exit code and last lines."""
    tail: list[str] = []
    identity: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user else {}
    with subprocess.Popen(
        command,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        **identity,
    ) as process:
        for line in process.stdout or ():
            if text := re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip():
                tail = [*tail[1 - TAIL_LINES :], text]
                progress.line(stage, text)
        return process.wait(), tail


def missing(kind: str, path: str, include_path: str) -> dict[str, str]:
    """Return what a build of this type lacks here, with what has it: tools, and headers that are too old."""
    needed = {**COMPILERS, **TYPES[kind][1]}
    lacking = {tool: package for tool, package in needed.items() if not shutil.which(tool, path=path)}
    if kind == "vulkan" and (found := vulkan_headers(include_path)) < VULKAN_HEADERS:
        what = f"Vulkan headers >= 1.3.{VULKAN_HEADERS}{f' (here 1.3.{found})' if found else ''}"
        lacking[what] = "libvulkan-dev of Debian 13 or newer, or the Vulkan SDK"
    if kind == "rocm" and (rocm := rocm_version(path)) and rocm < ROCM:
        lacking[f"ROCm >= {ROCM[0]}.{ROCM[1]} (here {rocm[0]}.{rocm[1]})"] = _ROCM
    return lacking


def rocm_version(path: str) -> tuple[int, int] | None:
    """Return what hipconfig says; None where it does not say."""
    if (tool := shutil.which("hipconfig", path=path)) is None:
        return None
    said = subprocess.run([tool, "--version"], env=environment(), capture_output=True, text=True, check=False).stdout
    found = re.match(r"(\d+)\.(\d+)", said.strip())
    return (int(found[1]), int(found[2])) if found else None


def vulkan_headers(include_path: str) -> int:
    """Return the third part of the headers' version, which counts on through 1.3 and 1.4; 0 where there are none."""
    for folder in include_path.split(":"):
        header = Path(folder, "vulkan/vulkan_core.h")
        if header.is_file() and (found := re.search(r"^#define VK_HEADER_VERSION (\d+)", header.read_text(), re.MULTILINE)):
            return int(found[1])
    return 0


def build(options: argparse.Namespace, work: Path, progress: Progress) -> Path:
    """Compile the wheel as an unprivileged user and return its path."""
    flags = [*cmake_settings(options.cmake_args), *TYPES[options.type][0]]
    if lacking := missing(options.type, options.tool_path, options.include_path):
        verb = "is" if len(lacking) == 1 else "are"
        raise FailError(
            "MISSING_DEPENDENCY",
            f"a {options.type} build needs {', '.join(lacking)}, which {verb} not on this machine",
            f"install {', '.join(lacking.values())}; or build elsewhere and use rbee-ctl runtime download",
            missing=sorted(lacking),
        )
    out, source = work / "out", work / "source"
    for owned in (work, out, source):
        owned.mkdir(exist_ok=True)
        if options.user:
            shutil.chown(owned, options.user, options.user)
    user, home = options.user or None, {"HOME": str(work), "TMPDIR": str(work)}
    package = source_package(options, work, progress)
    progress.line("building", f"compiling {package.name} for {options.type}")
    unpack = ["tar", "--extract", "--no-same-owner", "--strip-components=1", f"--directory={source}", f"--file={package}"]
    hook = work / "hook.cmake"
    hook.write_text(options.cmake_hook, encoding="utf-8")
    # The folders of the build have the same names each time, seen from each other: a compiler cache knows the files again.
    home["SKBUILD_BUILD_DIR"] = str(work / "compiled")
    if options.ccache:
        home |= {"CCACHE_DIR": options.ccache, "CCACHE_BASEDIR": str(work), "CCACHE_NOHASHDIR": "1"}
    home["CMAKE_ARGS"] = shlex.join([*flags, f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={hook}"])
    pip = [pip_python(work), "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir", *where(options)]
    code, tail = run(unpack, progress, "building", user=user, **home)
    if code == 0:
        code, tail = run([*pip, "--wheel-dir", str(out), str(source)], progress, "building", user=user, **home)
    wheels = sorted(out.glob("llama_cpp_python-*.whl"))
    if code != 0 or not wheels:
        raise FailError(
            "BUILD_FAILED",
            f"the {options.type} build of {package.name} ended with exit code {code}",
            "read the compiler's last lines above; all of them: journalctl -u 'rbee-runtime-*' on the node",
            exit_code=code,
            journal=tail,
        )
    compiler = subprocess.run(["g++", "--version"], env=environment(), capture_output=True, text=True, check=False).stdout
    record = {
        "backend": options.type,
        "source": package.name,
        "source_sha256": sha256(package),
        "cmake_args": flags,
        "cmake_hook": options.cmake_hook,
        "compiler": compiler.split("\n", 1)[0],
    }
    return with_record(wheels[0], work / wheels[0].name, record)


def cmake_settings(text: str) -> list[str]:
    """Return the words of ``text``, as a shell has them; raises FailError unless each is -DNAME=VALUE."""
    try:
        words = shlex.split(text)
    except ValueError:  # a quotation mark alone
        words = [text]
    if wrong := [w for w in words if not re.fullmatch(r"-D\w+(:\w+)?=[^'\"\n]*", w)]:
        raise FailError(
            "INVALID_REQUEST",
            f"{wrong[0]!r} is no setting of CMake: -DNAME=VALUE expected",
            "mend --cmake-args (rbee_runtime_cmake_args), as -DCMAKE_CUDA_ARCHITECTURES=86; spaces go into quotation marks",
            field="cmake_args",
        )
    return words


def where(options: argparse.Namespace) -> list[str]:
    """Return pip's arguments for where packages come from."""
    return ["--index-url", options.index] if options.index else ["--no-index", "--find-links", options.wheels]


def source_package(options: argparse.Namespace, work: Path, progress: Progress) -> Path:
    """Return the file with llama.cpp's source: the one that is named or lies with the wheels, else the index's."""
    beside = Path(options.wheels, f"llama_cpp_python-{options.llama_version}.tar.gz")
    if options.sdist or beside.is_file():
        return Path(options.sdist or beside)
    what, folder = f"llama-cpp-python=={options.llama_version}", work / "package"
    folder.mkdir()
    if options.user:
        shutil.chown(folder, options.user, options.user)
    command = ["-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python", *where(options)]
    home = {"HOME": str(work), "TMPDIR": str(work)}
    arguments = [pip_python(work), *command, "--dest", str(folder), what]
    code, tail = run(arguments, progress, "downloading", user=options.user or None, **home)
    found = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
    if code != 0 or not found:
        raise FailError(
            "DOWNLOAD_FAILED",
            f"{options.index or options.wheels} gave no source of {what}: {refused(tail)}",
            "check --source, and that this machine reaches it; or build elsewhere and use rbee-ctl runtime download",
            exit_code=code,
        )
    return found[0]


def refused(tail: list[str]) -> str:
    """Return what pip said of an index: its last line, or why it did not even ask (plain http to another machine)."""
    return next((line for line in tail if "not a trusted" in line), tail[-1] if tail else "it said nothing")


def with_record(wheel: Path, target: Path, record: dict[str, Any]) -> Path:
    """Write ``wheel`` to ``target`` with the record of its making, as installers want it: named in RECORD, with its digest."""
    text = json.dumps(record, indent=2).encode() + b"\n"
    digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        listing = next(n for n in old.namelist() if n.endswith(".dist-info/RECORD"))
        name = f"{listing.rpartition('/')[0]}/{BUILD_RECORD}"
        for item in old.infolist():
            if item.filename != listing:
                new.writestr(item, old.read(item), item.compress_type)
        epoch = (1980, 1, 1, 0, 0, 0)  # the same contents are the same file
        new.writestr(zipfile.ZipInfo(name, epoch), text)
        rows = old.read(listing).decode().rstrip("\n")
        new.writestr(zipfile.ZipInfo(listing, epoch), f"{rows}\n{name},sha256={digest},{len(text)}\n", zipfile.ZIP_DEFLATED)
    return target


def pip_python(work: Path) -> str:
    """Return an interpreter with pip: Debian's has none outside of an environment."""
    tools = work / "tools"
    if not tools.exists():
        subprocess.run([sys.executable, "-m", "venv", str(tools)], check=True, env=environment(), capture_output=True)
    return str(tools / "bin/python")


def fetch(options: argparse.Namespace, work: Path, progress: Progress) -> Path:
    """Return the wheel from a path, an address or an index."""
    if options.wheel.startswith(("http://", "https://")):
        if not re.fullmatch(r"[0-9a-f]{64}", options.sha256):
            raise FailError(
                "INVALID_REQUEST",
                f"{options.wheel} comes without a digest: what lies there could be anything",
                "give --sha256 DIGEST (rbee_runtime_sha256), or append #sha256=DIGEST to the address",
                field="sha256",
            )
        return download(options.wheel, work, progress)
    if options.wheel:
        return Path(options.wheel)
    out = work / "out"
    out.mkdir()
    command = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--index-url", options.index, "--dest", str(out)]
    what = f"llama-cpp-python=={options.llama_version}"
    code, tail = run([pip_python(work), *command, what], progress, "downloading", HOME=str(work))
    found = sorted(out.glob("llama_cpp_python-*.whl"))
    if code != 0 or not found:
        raise FailError(
            "DOWNLOAD_FAILED",
            f"the index {options.index} gave no wheel of {what}: {refused(tail)}",
            "check --source, or build it: rbee-ctl runtime build",
            exit_code=code,
        )
    return found[0]


def download(address: str, work: Path, progress: Progress) -> Path:
    """Fetch one file."""
    target = work / address.split("?")[0].rsplit("/", 1)[-1]
    progress.line("downloading", f"fetching {address}")
    try:
        with urllib.request.urlopen(address, timeout=60) as answer, target.open("wb") as f:  # noqa: S310 -- http(s) alone
            total, done, said = int(answer.headers.get("Content-Length") or 0), 0, time.monotonic()
            while chunk := answer.read(1 << 18):
                f.write(chunk)
                done += len(chunk)
                if time.monotonic() - said >= 0.5:
                    said = time.monotonic()
                    progress.line("downloading", f"downloading {target.name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB")
    except OSError as e:
        raise FailError("DOWNLOAD_FAILED", f"{address}: {e}", "check --source and repeat the command") from e
    return target


def check(options: argparse.Namespace, wheel: Path) -> tuple[str, list[str]]:
    """Return digest and libraries of the wheel; raises FailError when it is not what it shall be."""
    if not wheel.is_file():
        raise FailError("DOWNLOAD_FAILED", f"no wheel at {wheel}", "check --source")
    got = sha256(wheel)
    if options.sha256 and got != options.sha256:
        raise FailError(
            "CHECKSUM_MISMATCH",
            f"SHA-256 of {wheel.name} is {got}, expected {options.sha256}",
            "check --sha256, or where the wheel comes from",
            got=got,
            expected=options.sha256,
        )
    try:
        names = [n.rsplit("/", 1)[-1] for n in zipfile.ZipFile(wheel).namelist() if n.startswith("llama_cpp/lib/")]
    except zipfile.BadZipFile as e:
        raise FailError("CHECKSUM_MISMATCH", f"{wheel.name} is no wheel: {e}", "check --source", got=got) from e
    wanted = ["libllama", *([LIBRARIES[options.type]] if options.type in LIBRARIES else [])]
    if lacking := [w for w in wanted if not any(n.startswith(w) for n in names)]:
        raise FailError(
            "BACKEND_UNAVAILABLE",
            f"{wheel.name} has no {', '.join(lacking)}: it is no {options.type} build",
            f"take a wheel that was built for {options.type}",
            lacking=lacking,
        )
    return got, sorted(n for n in names if ".so" in n)


def install(options: argparse.Namespace, wheel: Path, home: Path, progress: Progress) -> None:
    """Make the environment from the wheels that are here, without network, and try it."""
    wheels = Path(options.wheels)
    listed = (wheels / "requirements-worker.txt").read_text(encoding="utf-8").split()
    others = [line for line in listed if not line.startswith("llama_cpp_python")]
    python = str(home / "bin/python")
    progress.line("installing", f"making {home}")
    quiet = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--find-links", str(wheels)]
    steps = [
        [sys.executable, "-m", "venv", str(home)],
        [python, "-m", "pip", "install", *quiet, *others, str(wheel)],
        # Nobody who runs it may write there: without this each start would compile numpy and the engine again.
        [python, "-m", "compileall", "-q", "--invalidation-mode=unchecked-hash", str(home / "lib")],
        [python, "-c", LOADS],
    ]
    for step in steps:
        code, tail = run(step, progress, "installing")
        if code != 0:
            raise FailError(
                "BUILD_FAILED",
                f"{' '.join(step[:4])} ended with exit code {code}",
                "the wheel does not go together with this machine or this version of rbee",
                exit_code=code,
                journal=tail,
            )


def features(libraries: list[str]) -> list[str]:
    """Return what a build can do, from its libraries: ``cpu-haswell``, ``cuda``, ..."""
    found = {re.sub(r"^libggml-|\.so.*$", "", name) for name in libraries if name.startswith("libggml-")}
    return sorted(found - {"base"}) or ["cpu"]


def make(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Make the runtime and return its metadata; raises FailError and leaves nothing then."""
    root, work = Path(options.install_path, "runtimes", options.type), Path(options.work)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        wheel = build(options, work, progress) if options.build else fetch(options, work, progress)
        digest, libraries = check(options, wheel)
        if options.wheel_to:
            shutil.copyfile(wheel, Path(options.wheel_to, wheel.name))
            return {"worker_type": f"{options.type}-llm-worker", "version": wheel.name, "sha256": digest, "made": True}
        version = f"{options.rbee_version}-{hashlib.sha256((options.base + digest).encode()).hexdigest()[:8]}"
        home = root / version
        if (home / "metadata.yaml").is_file():
            return {**json.loads((home / "metadata.yaml").read_text(encoding="utf-8")), "made": False}
        shutil.rmtree(home, ignore_errors=True)  # half of one, from a crash
        root.mkdir(parents=True, exist_ok=True)
        try:
            install(options, wheel, home, progress)
            metadata = {
                "worker_type": f"{options.type}-llm-worker",
                "version": version,
                "rbee_version": options.rbee_version,
                "python": f"{sys.version_info.major}.{sys.version_info.minor}",
                "llama_cpp_python": wheel.name.split("-")[1],
                "source": "built here" if options.build else options.wheel or options.index,
                "sha256": digest,
                "features": features(libraries),
                "built_at_unix": int(time.time()),
            }
            part = home / ".metadata"
            part.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
            part.chmod(0o644)
            part.replace(home / "metadata.yaml")
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise
        return {**metadata, "made": True}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> int:
    """Parse, make, say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for name in ("--type", "--wheels", "--work", "--progress-file", "--llama-version"):
        parser.add_argument(name, required=True, choices=list(TYPES) if name == "--type" else None)
    parser.add_argument("--user", default="rbee", help="who compiles; empty: who runs this")
    parser.add_argument("--wheel-to", default="", metavar="DIR", help="put the wheel there, and make no runtime")
    parser.add_argument("--ccache", default="", metavar="DIR", help="what ccache keeps, where that is installed")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--tool-path", default=TOOL_PATHS, help="where compilers are looked for")
    parser.add_argument("--include-path", default=INCLUDE_PATHS, help="where headers are looked for")
    of_runtime = ("--install-path", "--rbee-version", "--base")
    for name in (*of_runtime, "--cmake-args", "--cmake-hook", "--sdist", "--wheel", "--index", "--sha256"):
        parser.add_argument(name, default="")
    options = parser.parse_args()
    if not options.wheel_to and not (options.install_path and options.rbee_version and options.base):
        parser.error(f"a runtime needs {', '.join(of_runtime)}; a wheel alone: --wheel-to DIR")
    address, _, digest = options.wheel.partition("#sha256=")
    options.wheel, options.sha256 = address, (options.sha256 or digest).lower()
    os.umask(0o022)
    progress = Progress(Path(options.progress_file))
    try:
        metadata = make(options, progress)
    except FailError as e:
        progress.line("failed", e.message, code=e.code, message=e.message, hint=e.hint, details=e.details)
        return 1
    except Exception as e:
        message = f"{type(e).__name__}: {e}"
        hint = "journalctl -u 'rbee-runtime-*' on the node"
        progress.line("failed", message, code="BUILD_FAILED", message=message, hint=hint, details={})
        raise
    words = f"{metadata['worker_type']} {metadata['version']}: {'made' if metadata['made'] else 'here already'}"
    progress.line("complete", words, runtime=metadata)
    return 0


if __name__ == "__main__":
    sys.exit(main())
