"""What llama.cpp's libraries offer on this machine: kernels for its CPU, devices, and what they say while loading.

Functions take the bindings (``ll``) as an argument; only weights.py imports them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rbee_serve.contract.errors import BackendUnavailable

#: From this score on a variant uses AMX tiles: its kernels died with SIGILL in worker threads of a virtual machine that
#: reports AMX, and they give other bits than AVX-512. Taken only when `cpu_variant` asks for it.
_AMX_SCORE = 2048
#: rbee's backend -> (name that llama.cpp's devices begin with, its library in a build with loadable backends)
_GPU = {"cuda": ("CUDA", "cuda"), "rocm": ("ROCm", "hip"), "vulkan": ("Vulkan", "vulkan")}
_GGML_INFO, _GGML_ERROR, _GGML_CONT = 2, 4, 5


def library_dir() -> Path:
    """Return the folder with llama.cpp's libraries."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable("llama-cpp-python is not installed in this runtime", python=sys.executable)
    return Path(next(iter(spec.submodule_search_locations))) / "lib"


def version() -> str:
    """Return llama-cpp-python's version, from the name of the folder in which pip keeps what it knows of it.

    ``importlib.metadata`` would say the same; importing it takes 20 ms of a start. Raises BackendUnavailable.
    """
    site = library_dir().parents[1]
    for folder in site.glob("llama_cpp_python-*.dist-info"):
        return folder.name.removeprefix("llama_cpp_python-").removesuffix(".dist-info")
    raise BackendUnavailable(f"{site} has llama_cpp, but not llama-cpp-python's metadata", python=sys.executable)


def _load_backend(ll: Any, path: Path) -> bool:
    load = ll._lib.ggml_backend_load
    load.argtypes, load.restype = [ctypes.c_char_p], ctypes.c_void_p
    return bool(load(str(path).encode()))


def load_cpu_variant(ll: Any, wanted: str | None = None) -> str:
    """Load the CPU kernels that suit this machine best (or ``wanted``); return the variant's name.

    A build without variants has its kernels linked in: ``builtin``. Raises BackendUnavailable when ``wanted`` is not
    there or this CPU can not run it.
    """
    scores: dict[str, int] = {}
    for path in library_dir().glob("libggml-cpu-*.so"):
        score = ctypes.CDLL(str(path)).ggml_backend_score
        score.restype = ctypes.c_int
        scores[path.stem.removeprefix("libggml-cpu-")] = score()
    runnable = {name: s for name, s in scores.items() if s > 0}
    if wanted is not None and wanted not in runnable:
        raise BackendUnavailable(
            f"cpu_variant {wanted!r} can not run here; this machine runs {', '.join(sorted(runnable)) or 'builtin only'}",
            hint="take cpu_variant out of the worker's settings: the best one is chosen by itself",
            wanted=wanted,
        )
    if not scores:
        return "builtin"
    candidates = [(s, name) for name, s in runnable.items() if s < _AMX_SCORE]
    if not candidates:
        raise BackendUnavailable("no CPU kernels of this build run on this machine", built=sorted(scores))
    best = wanted or max(candidates)[1]
    if not _load_backend(ll, library_dir() / f"libggml-cpu-{best}.so"):
        raise BackendUnavailable(f"llama.cpp could not load its CPU kernels ({best})")
    return best


def isa_class(ll: Any) -> str:
    """Return the class of instruction sets whose kernels give equal bits, as llama.cpp reports what it uses."""
    info = ll.llama_print_system_info().decode()
    features = set(re.findall(r"(\w+) = 1", info))
    if "AMX_INT8" in features:
        return "amx"
    if "AVX512" in features:
        return "avx512"
    return "avx2" if {"AVX2", "FMA"} <= features else "-".join(sorted(features)).lower()


def select_device(ll: Any, backend: str, index: int) -> tuple[int | None, str]:
    """Return (handle, name) of the device that must hold the weights; (None, "CPU") for the CPU.

    Raises BackendUnavailable saying which devices llama.cpp sees.
    """
    if backend == "cpu":
        return None, "CPU"
    prefix, library = _GPU[backend]
    path = library_dir() / f"libggml-{library}.so"
    lib = ll._lib
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.argtypes, lib.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    lib.ggml_backend_dev_name.argtypes, lib.ggml_backend_dev_name.restype = [ctypes.c_void_p], ctypes.c_char_p

    def devices() -> dict[str, int]:
        handles = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
        return {lib.ggml_backend_dev_name(h).decode(): h for h in handles}

    if not any(name.startswith(prefix) for name in devices()) and path.is_file():
        _load_backend(ll, path)
    seen = devices()
    fitting = [name for name in seen if name.startswith(prefix)]
    if index >= len(fitting):
        raise BackendUnavailable(
            f"backend {backend}, device {index}: llama.cpp sees {len(fitting)} such devices here "
            f"(all it sees: {', '.join(seen) or 'none'}); it does not fall back to the CPU",
            hint=f"check the driver on this machine and that its runtime is the {backend} one: rbee-ctl hive status",
            backend=backend,
            device=index,
            seen=list(seen),
        )
    return seen[fitting[index]], fitting[index]


def device_free(ll: Any, device: int) -> int:
    """Return the bytes that are free on a device; 0 where its driver does not tell."""
    ask = ll._lib.ggml_backend_dev_memory
    ask.argtypes, ask.restype = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)], None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ask(device, ctypes.byref(free), ctypes.byref(total))
    return free.value if total.value else 0


def cpu_limit() -> int:
    """Return how many threads can compute at once: CPUs this process may use, and its control group's quota.

    One thread too many costs much: ggml's barriers spin.
    """
    allowed = float(len(os.sched_getaffinity(0)))
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").rpartition("::")[2].strip()
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        for place in (folder, *folder.parents):
            if (file := place / "cpu.max").is_file():
                quota, period = file.read_text(encoding="ascii").split()
                if quota != "max":
                    allowed = min(allowed, int(quota) / int(period))
    except (OSError, ValueError):
        pass  # no version 2 control groups here: affinity alone counts
    return max(1, math.floor(allowed))


@dataclass
class LoadLog:
    """What llama.cpp says while it loads: where its buffers are, and its last error lines."""

    buffers_mib: dict[str, float] = field(default_factory=dict)  # all buffers by the device's name
    weights_mib: dict[str, float] = field(default_factory=dict)  # weights alone
    cache_mib: float = 0.0  # of the slots: keys and values, states of recurrent layers
    offloaded: tuple[int, int] | None = None  # layers on the GPU, of
    errors: list[str] = field(default_factory=list)
    _line: str = ""
    _level: int = 0

    def feed(self, level: int, text: bytes) -> None:
        """Take one piece of log output (``enum ggml_log_level``; 5 continues the line before)."""
        if level != _GGML_CONT:
            self._level = level
        if self._level < _GGML_INFO:
            return
        self._line += text.decode("utf-8", "replace")
        if not self._line.endswith("\n"):
            return
        line, self._line = self._line.strip(), ""
        if match := re.search(r"(\S+)\s+(model|KV|compute|output|RS) buffer size\s*=\s*([\d.]+) MiB", line):
            name, mib = match[1], float(match[3])
            self.buffers_mib[name] = round(self.buffers_mib.get(name, 0.0) + mib, 2)
            self.cache_mib += mib if match[2] in ("KV", "RS") else 0.0
            if match[2] == "model":
                self.weights_mib[name] = round(self.weights_mib.get(name, 0.0) + mib, 2)
        elif match := re.search(r"offloaded (\d+)/(\d+) layers", line):
            self.offloaded = int(match[1]), int(match[2])
        if self._level == _GGML_ERROR and line:
            self.errors = [*self.errors[-3:], line]
            print(f"llama.cpp: {line}", file=sys.stderr, flush=True)

    def count_once(self) -> None:
        """Note that what was repacked does not stay in memory as a mapping of the file as well."""
        copied = self.weights_mib.get("CPU_REPACK", 0.0)
        for figures in (self.buffers_mib, self.weights_mib):
            if "CPU_Mapped" in figures:
                figures["CPU_Mapped"] = round(max(0.0, figures["CPU_Mapped"] - copied), 2)

    @property
    def reason(self) -> str:
        """The last errors in one line."""
        return "; ".join(self.errors) or "it gave no reason"

    def check_placed(self, backend: str, device: str) -> None:
        """Raise BackendUnavailable unless the weights are on ``device``, all of them: read from what was done."""
        if backend == "cpu":
            elsewhere = [name for name in self.buffers_mib if not name.startswith("CPU")]
            if elsewhere:
                raise BackendUnavailable(
                    f"asked for the CPU, but llama.cpp has buffers on {', '.join(elsewhere)}", backend=backend
                )
            return
        on_device = self.weights_mib.get(device, 0.0)
        if on_device < 1 or self.offloaded is None or self.offloaded[0] < self.offloaded[1]:
            raise BackendUnavailable(
                f"asked for {device}, but llama.cpp put the weights on {self.weights_mib or 'nothing it named'} (MiB), "
                f"layers there: {self.offloaded[0] if self.offloaded else 0} of {self.offloaded[1] if self.offloaded else '?'}",
                hint="free memory on the device, or choose a smaller model or quantisation",
                backend=backend,
                device=device,
            )

    def device_bytes(self) -> int:
        """Return the memory taken on the device: weights, KV cache and compute buffers; 0 on the CPU."""
        return int(sum(m for n, m in self.buffers_mib.items() if not n.startswith("CPU") and not n.endswith("_Host")) * (1 << 20))

    def weight_devices(self) -> list[str]:
        """Return the names of the devices that hold weights (``CPU_Mapped``, ``CPU_REPACK`` are the CPU)."""
        return sorted({"CPU" if n.startswith("CPU") else n for n, m in self.weights_mib.items() if m > 0})
