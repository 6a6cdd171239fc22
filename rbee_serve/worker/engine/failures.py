"""Why llama.cpp could not do something, read from what it logs: it returns NULL or ends the process and says no code.

Wordings of llama.cpp's sources: src/llama-model.cpp, src/llama-mmap.cpp, ggml/src/ggml-alloc.c, ggml-backend.cpp, ggml.c,
ggml-cuda/ggml-cuda.cu (which is ROCm as well) and what Vulkan-Hpp's exceptions say. Text in, no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rbee_serve.contract.errors import CudaDeviceFailed, InsufficientRam, InsufficientVram, RbeeError

Failure = type[CudaDeviceFailed] | type[InsufficientRam]

#: The driver or the runtime of a device gave up. "out of memory" is no failure of the device.
_DEVICE = re.compile(
    r"\b(?:CUDA|ROCm) error: (?!out of memory)|cudaMalloc failed: (?!out of memory)|\b(?:cuda|hip)Error(?!OutOfMemory)[A-Z]\w+"
    r"|failed to initialize (?:CUDA|ROCm)\b|\bError(?:DeviceLost|InitializationFailed)\b"
)
#: No room on the device. Its buffers are named after it ("CUDA0", "ROCm1", "Vulkan0"), those in the machine's memory otherwise.
_VRAM = re.compile(
    r"\b(?:CUDA|ROCm) error: out of memory|cudaMalloc failed: out of memory|\bErrorOutOfDeviceMemory\b"
    r"|(?:failed|unable) to allocate (?!CPU|buffer\b)(?!\S+_Host )\S+\d buffer"
)
_RAM = re.compile(
    r"(?:failed|unable) to allocate (?:(?:CPU\w*|\S+_Host) )?buffer(?: of size|$)|failed to allocate +[\d.]+ MB"
    r"|\(attempted to allocate|mmap failed: Cannot allocate memory|std::bad_alloc|\bErrorOutOfHostMemory\b"
)
#: No device is there for this build, and trying again does not help: none at all, or a driver that is too old for it.
_NEVER = re.compile(r"driver version is insufficient|no (?:CUDA|ROCm)-capable device")


def cause(lines: Iterable[str], device: str) -> tuple[Failure, str] | None:
    """Return the error that llama.cpp's log lines tell of and the line that does; None: neither memory nor a device.

    ``device``: llama.cpp's name of what should hold the weights; for the "CPU" whatever a GPU's library complains of is nothing.
    """
    said = [line for line in lines if not _NEVER.search(line)]
    kinds: tuple[tuple[re.Pattern[str], Failure], ...] = (
        (_DEVICE, CudaDeviceFailed),
        (_VRAM, InsufficientVram),
        (_RAM, InsufficientRam),
    )
    for pattern, error in kinds[2:] if device == "CPU" else kinds:
        if line := next((line for line in said if pattern.search(line)), None):
            return error, line
    return None


def loading(lines: Iterable[str], device: str) -> RbeeError | None:
    """Return the error of a model that could not be loaded onto ``device`` for want of memory or a sound device; else None.

    Its message names no path: callers are shown it (SPEC E-29, E-40).
    """
    if (found := cause(lines, device)) is None:
        return None
    error, line = found
    if error is CudaDeviceFailed:
        return error(
            f"the device {device} failed while the model was being loaded: {line}",
            hint="see what its driver says on that machine: journalctl -k -n 50; rbee-ctl hive status",
            device=device,
        )
    what = f"memory of {device}" if error is InsufficientVram else "memory"
    return error(
        f"out of memory, nothing was loaded: llama.cpp could not allocate {what}, though it seemed to be free before: {line}",
        hint="another program took it; or a smaller model, fewer slots or a smaller context_tokens: rbee-ctl worker list",
        device=device,
    )
