"""Loading the weights: what takes longest of a start, and needs nothing but the standard library and llama.cpp's bindings.

Apart from llama.py so that the engine process loads before the rest of it is imported, numpy first of all.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbee_serve.contract.errors import BackendUnavailable, ModelFileInvalid
from rbee_serve.models.memory import REPACKED
from rbee_serve.worker.engine import failures, guards, libs, mapping, room
from rbee_serve.worker.engine.model_file import other_parts

if TYPE_CHECKING:
    from rbee_serve.models import gguf
    from rbee_serve.worker.engine.protocol import EngineConfig


def bindings() -> Any:
    """Import the ctypes module without the package's ``__init__``, which pulls in jinja2, diskcache and more (80 ms)."""
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.submodule_search_locations is None:
            raise BackendUnavailable("llama-cpp-python is not installed in this runtime", python=sys.executable)
        package = types.ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["llama_cpp"] = package
    import llama_cpp.llama_cpp as ll

    return ll


class Weights:
    """The loaded model, before it has a context. ``ll``: the bindings; ``model``, ``vocab``: llama.cpp's handles."""

    def __init__(self, config: EngineConfig, header: gguf.Header, on_progress: Callable[[float], None]) -> None:
        """Load; ``on_progress`` gets 0..1.

        Raises BackendUnavailable (device not there), ModelFileInvalid (llama.cpp refused the file), InsufficientRam or
        InsufficientVram (no room for the weights), CudaDeviceFailed (the device gave up).
        """
        ll = self.ll = bindings()
        self.config, self.header, self.log = config, header, libs.LoadLog()
        self._log_callback = ll.llama_log_callback(lambda level, text, _: self.log.feed(level, text))
        ll.llama_log_set(self._log_callback, ctypes.c_void_p())
        guards.check_abi(ll, libs.version())
        self.variant = libs.load_cpu_variant(ll, config.cpu_variant)
        guards.check_instructions(ll.llama_print_system_info().decode())
        ll.llama_backend_init()
        self.isa = libs.isa_class(ll)
        device, self.device = self._select_device()
        if device is not None:
            room.check_device(config, header, self.device, libs.device_free(ll, device))
        self.threads = config.threads or libs.cpu_limit()
        self._load_model(device, on_progress)

    def _select_device(self) -> tuple[int | None, str]:
        backend, index = self.config.backend, self.config.device
        try:
            return libs.select_device(self.ll, backend, index)
        except BackendUnavailable as e:  # a driver that fails shows no devices
            if (failed := failures.loading(self.log.errors, f"{backend}:{index}")) is not None:
                raise failed from e
            raise

    def _load_model(self, device: int | None, on_progress: Callable[[float], None]) -> None:
        ll, path = self.ll, self.config.model_path
        params = ll.llama_model_default_params()
        # An explicit list, empty for the CPU: nothing is offloaded by itself, nothing falls back by itself.
        self._devices = (ctypes.c_void_p * 2)(device, None)
        params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        params.n_gpu_layers = 0 if device is None else -1
        params.split_mode, params.main_gpu = ll.LLAMA_SPLIT_MODE_NONE, 0
        # Also where weights are repacked (AVX): reading them into buffers first takes up to four times as long.
        params.load_mode = ll.LLAMA_LOAD_MODE_MMAP

        def progress(value: float, _: Any) -> bool:
            on_progress(value)
            return True

        self._progress_callback = ll.llama_progress_callback(progress)
        params.progress_callback = self._progress_callback
        self.model = ll.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            if (failed := failures.loading(self.log.errors, self.device)) is not None:
                raise failed
            raise ModelFileInvalid(f"llama.cpp could not load {path}: {self.log.reason}", path=path)
        repacked = device is None and self.header.matrix_types & REPACKED
        if repacked and mapping.let_go([Path(path), *other_parts(Path(path), self.header)]):  # else both copies count
            self.log.count_once()
        self.vocab = ll.llama_model_get_vocab(self.model)
