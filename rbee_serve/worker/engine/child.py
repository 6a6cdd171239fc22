"""The engine process: loads the model, then one loop of reading messages and stepping. Started by process.py.

Everything happens in one thread, so what it reports (a tick at least once a second) is proof that generation moves.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from rbee_serve.contract.api import SamplingParams
from rbee_serve.contract.errors import InferenceFailed, RbeeError
from rbee_serve.worker.engine import llama
from rbee_serve.worker.engine.gguf_header import read_header
from rbee_serve.worker.engine.protocol import EngineConfig, GenerateRequest
from rbee_serve.worker.engine.scheduler import Scheduler
from rbee_serve.worker.engine.wire import Unpacker, pack

TICK_S = 0.5
_FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S"}
_FILE_TYPES |= {12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16"}


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the worker's front goes: no orphan may hold the model's memory."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() == 1:
        raise SystemExit("the worker's front is gone")


class EngineLoop:
    """Connection to the front, and the loop."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unpacker = Unpacker()
        self._ticked = 0.0

    def send(self, message: Any) -> None:
        """Send; ends the process when the front is gone."""
        try:
            self._connection.sendall(pack(message))
        except OSError:
            raise SystemExit(0) from None

    def receive(self, timeout_s: float) -> list[Any]:
        """Return the messages that have arrived, waiting up to ``timeout_s`` for the first."""
        readable, _, _ = select.select([self._connection], [], [], timeout_s)
        if not readable:
            return []
        data = self._connection.recv(1 << 20)
        if not data:
            raise SystemExit(0)
        return list(self._unpacker.feed(data))

    def load(self, config: EngineConfig) -> tuple[llama.Model, Scheduler]:
        """Load and prove that a token can be generated; progress goes to the front as it happens."""
        header = read_header(Path(config.model_path))
        architecture = str(header.get("general.architecture", "unknown"))
        layers = int(header.get(f"{architecture}.block_count", 0))
        seen = -1

        def progress(value: float) -> None:
            nonlocal seen
            loaded = min(layers, int(value * layers))
            now = time.monotonic()
            if loaded != seen or now - self._ticked > TICK_S:
                seen, self._ticked = loaded, now
                self.send({"load": {"stage": "loading_to_vram", "layers_loaded": loaded, "layers_total": layers}})

        progress(0.0)
        model = llama.Model(config, progress)
        scheduler = Scheduler(model, config.slots, config.prompt_block_tokens)
        self_test(scheduler)
        quantization = _FILE_TYPES.get(int(header.get("general.file_type", -1)), "unknown")
        self.send({"ready": self._info(config, model, header, architecture, quantization), "layers_total": layers})
        return model, scheduler

    @staticmethod
    def _info(
        config: EngineConfig, model: llama.Model, header: dict[str, Any], architecture: str, quantization: str
    ) -> dict[str, Any]:
        facts = model.facts()
        digest = config.model_sha256 or llama.fingerprint(Path(config.model_path))
        build = model.build()
        parts = (digest, build, llama.isa_class(model.variant), quantization, config.kv_type, config.prompt_block_tokens)
        gpu = config.backend != "cpu"
        on_device = sum(mib for name, mib in model.log.buffers_mib.items() if gpu and not name.startswith("CPU"))
        batch_invariant = quantization in llama.BATCH_INVARIANT_QUANTS and not gpu
        return {
            "architecture": architecture,
            "quantization": quantization,
            "parameters": facts["parameters"],
            "size_bytes": facts["size_bytes"],
            "layers": facts["layers"],
            "vocab_size": model.n_vocab,
            "context_trained": facts["context_trained"],
            "context_tokens": model.context_tokens,
            "slots": config.slots,
            "bos_token": facts["bos_token"],
            "eos_token": facts["eos_token"],
            "eos_id": facts["eos_id"],
            "chat_template": facts["chat_template"],
            "backend": config.backend,
            "devices": sorted(model.log.buffers_mib),
            "device_memory_bytes": int(on_device * (1 << 20)),
            "threads": model.threads,
            "engine_version": build,
            "continuation_class": hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16],
            "metadata": {
                "description": facts["description"],
                "cpu_variant": model.variant,
                "model_digest": digest,
                "buffers_mib": model.log.buffers_mib,
                # Positions up to which equal classes give equal bits; beyond it f16 attention may switch kernels.
                "exact_context_tokens": (model.context_tokens if config.kv_type == "q8_0" else 511) if batch_invariant else 0,
                **{k: v for k, v in header.items() if k in ("general.name", "general.license", "general.size_label")},
            },
        }

    def run(self, model: llama.Model, scheduler: Scheduler) -> None:
        """Step for ever: as fast as possible while there is work, else wait for a message."""
        while True:
            events: list[Any] = []
            for message in self.receive(0.0 if scheduler.has_work else TICK_S):
                events += self._handle(message, model, scheduler)
            if scheduler.has_work:
                events += scheduler.step()
            now = time.monotonic()
            if events or now - self._ticked >= TICK_S:
                self._ticked = now
                self.send({"events": events})

    def _handle(self, message: dict[str, Any], model: llama.Model, scheduler: Scheduler) -> list[Any]:
        if (request := message.get("submit")) is not None:
            params = SamplingParams.model_validate(request.pop("params"))
            return list(scheduler.submit(GenerateRequest(params=params, **request)))
        if (request_id := message.get("cancel")) is not None:
            return list(scheduler.cancel(request_id))
        if (question := message.get("tokenize")) is not None:
            ids = model.tokenize(question["text"], parse_special=question["parse_special"], add_bos=question["add_bos"])
            self.send({"tokens": ids, "number": question["number"]})
        return []


def self_test(scheduler: Scheduler) -> None:
    """Generate one token; raises InferenceFailed when that does not work."""
    params = SamplingParams.model_validate({"max_tokens": 1, "temperature": 0})
    events = scheduler.submit(GenerateRequest("self-test", "a", False, True, params))
    while scheduler.has_work:
        events += scheduler.step()
    kinds = [kind for kind, _, _ in events]
    if "finished" not in kinds:
        raise InferenceFailed(f"self test of one token failed: {events}")


def main() -> None:
    """Entry: ``child FD``; the first message is the configuration."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # else an assert starts gdb first
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C in a terminal reaches the whole group; the front decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loop = EngineLoop(socket.socket(fileno=int(sys.argv[1])))
    config: EngineConfig | None = None
    while config is None:
        for message in loop.receive(60.0):
            config = EngineConfig(**message["config"])
    try:
        model, scheduler = loop.load(config)
    except RbeeError as e:
        loop.send({"failed": e.envelope()["error"]})
        raise SystemExit(1) from None
    loop.run(model, scheduler)


if __name__ == "__main__":
    main()
