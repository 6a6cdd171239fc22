"""What a failed load is told as, by the lines that llama.cpp really logs (SPEC E-38, E-40, 3.7)."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from typing import Any

import pytest

from rbee_serve.contract.errors import CudaDeviceFailed, ExitCode, InsufficientRam, InsufficientVram, RbeeError
from rbee_serve.worker.engine import failures, libs
from rbee_serve.worker.engine.process import ProcessEngine
from rbee_serve.worker.engine.protocol import EngineConfig, LoadProgress

LOADING = "llama_model_load: error loading model: "
ENDS = "llama_model_load_from_file_impl: failed to load model\n"
MALLOC = "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 92.10 MiB on device 0: cudaMalloc failed: "
NO_BUFFER = "alloc_tensor_range: failed to allocate {0} buffer of size 96573696\n"
NO_BUFFER += LOADING + "unable to allocate {0} buffer\n" + ENDS
NO_HOST_BUFFER = (
    "ggml_aligned_malloc: insufficient memory (attempted to allocate  92.10 MB)\n"
    "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 96573696\n"
)
NO_GPU = "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected\n"
CUDA_ABORT = (
    "CUDA error: {}\n  current device: 0, in function ggml_backend_cuda_buffer_set_tensor at /src/ggml-cuda.cu:812\n"
    "  cudaStreamSynchronize(((cudaStream_t)0x2))\n/src/ggml-cuda.cu:109: CUDA error\n"
)


def logged(text: str) -> list[str]:
    log = libs.LoadLog()
    for line in text.splitlines(keepends=True):
        log.feed(4, line.encode())
    return log.errors


@pytest.mark.E40
@pytest.mark.parametrize(
    ("device", "text", "expected"),
    [
        ("CUDA0", MALLOC + "out of memory\n" + NO_BUFFER.format("CUDA0"), InsufficientVram),
        ("ROCm0", NO_BUFFER.format("ROCm0"), InsufficientVram),
        ("Vulkan0", NO_BUFFER.format("Vulkan0"), InsufficientVram),
        ("Vulkan0", LOADING + "vk::Device::allocateMemory: ErrorOutOfDeviceMemory\n" + ENDS, InsufficientVram),
        ("CUDA0", CUDA_ABORT.format("out of memory"), InsufficientVram),
        ("CPU", NO_HOST_BUFFER + NO_BUFFER.format("CPU"), InsufficientRam),
        ("CPU", NO_HOST_BUFFER + NO_BUFFER.format("CPU_REPACK"), InsufficientRam),
        ("CPU", LOADING + "mmap failed: Cannot allocate memory\n" + ENDS, InsufficientRam),
        ("CPU", LOADING + "std::bad_alloc\n" + ENDS, InsufficientRam),
        ("CUDA0", NO_HOST_BUFFER + NO_BUFFER.format("CUDA_Host"), InsufficientRam),
        ("CUDA0", MALLOC + "unspecified launch failure\n" + NO_BUFFER.format("CUDA0"), CudaDeviceFailed),
        ("CUDA0", CUDA_ABORT.format("an illegal memory access was encountered"), CudaDeviceFailed),
        ("cuda:0", "ggml_cuda_init: failed to initialize CUDA: system not yet initialized\n", CudaDeviceFailed),
        ("Vulkan0", LOADING + "vk::Queue::submit: ErrorDeviceLost\n" + ENDS, CudaDeviceFailed),
    ],
)
def test_memory_and_devices_are_told_apart_and_may_be_tried_again(device: str, text: str, expected: type[RbeeError]) -> None:
    error = failures.loading(logged(text), device)
    assert type(error) is expected
    assert error.details == {"device": device}
    assert error.exit_code is not ExitCode.CONFIG, "systemd would not start the worker again"
    assert "/" not in error.message, "callers are shown it"
    assert (device in error.message) is (expected is not InsufficientRam)


@pytest.mark.E40
@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("CPU", LOADING + "tensor 'blk.29.ffn_up.weight' data is not within the file bounds, model is corrupted\n" + ENDS),
        ("CUDA0", LOADING + "missing tensor 'output_norm.weight'\n" + ENDS),
        ("CUDA0", LOADING + "unknown model architecture: 'x'\n" + ENDS),
        ("CPU", LOADING + "mmap failed: No such device\n" + ENDS),
        # A build for GPUs that is to compute on the CPU: the GPU that is not there is no reason.
        (
            "CPU",
            NO_GPU + LOADING + "bad magic\n" + ENDS,
        ),
        ("cuda:0", "ggml_cuda_init: failed to initialize CUDA: CUDA driver version is insufficient for CUDA runtime version\n"),
        ("cuda:0", NO_GPU),
        ("rocm:0", NO_GPU.replace("CUDA", "ROCm")),
        ("CPU", ""),
    ],
)
def test_what_only_a_person_can_put_right_is_neither(device: str, text: str) -> None:
    """It stays MODEL_FILE_INVALID, or BACKEND_UNAVAILABLE where no device was found: exit 78."""
    assert failures.loading(logged(text), device) is None


class Aborting:
    """A process in the engine's place that says what ggml says before it calls abort(), and does so."""

    told = True

    def __init__(self, words: str) -> None:
        self.connection, theirs = socket.socketpair()
        self.process = subprocess.Popen(["sh", "-c", 'printf %s "$0" >&2; kill -ABRT $$', words], stderr=subprocess.PIPE)
        theirs.close()

    def kill(self) -> None:
        self.process.kill()


def buried(words: str, backend: str) -> LoadProgress:
    """Return how the end of such a process is told."""
    config = EngineConfig("/m.gguf", None, backend, 0, 1, 512, 1, 256, "f16")

    async def run() -> LoadProgress:
        child: Any = Aborting(words)
        engine = ProcessEngine(config, child=child)
        await engine.start()
        try:
            await asyncio.wait_for(engine.wait_dead(), 60)
            return engine.progress
        finally:
            await engine.close()

    return asyncio.run(run())


@pytest.mark.E40
def test_a_device_that_made_the_engine_abort_is_told_by_its_last_words() -> None:
    words = CUDA_ABORT.format("unspecified launch failure")
    failed = buried(words, "cuda")
    assert (failed.stage, failed.error_code) == ("failed", "CUDA_DEVICE_FAILED")
    assert "killed by SIGABRT" in str(failed.error)
    assert "CUDA error: unspecified launch failure" in str(failed.error)
    assert buried("ggml.c:1: GGML_ASSERT(x) failed\n", "cuda").error_code == "WORKER_CRASHED"
    assert buried(words, "cpu").error_code == "WORKER_CRASHED"
