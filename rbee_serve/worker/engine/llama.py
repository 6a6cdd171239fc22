"""The only place that knows llama.cpp: loading, batches, KV cache, tokens. Runs in the engine process alone.

Bound to llama-cpp-python's low-level module. A C++ exception or a failed assert ends the process, so nothing unchecked
is passed on: pointers are tested for NULL (a NULL pointer object is not None), lengths are computed here.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rbee_serve.contract.errors import BackendUnavailable, ModelFileInvalid
from rbee_serve.worker.engine.protocol import EngineConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: From this score on a variant uses AMX tiles, whose kernels crash (SIGILL) in OpenMP threads of some virtual machines
#: and give other bits than AVX-512: never chosen by itself, only by `cpu_variant`.
_AMX_SCORE = 2048
_AVX512 = {"skylakex", "cannonlake", "cascadelake", "icelake", "cooperlake", "zen4"}
_AVX2 = {"haswell", "alderlake"}
_KV_TYPES = {"f16": 1, "q8_0": 8}  # enum ggml_type
#: Matmul kernels of these give the same bits whatever the batch; those of K-quants do not.
BATCH_INVARIANT_QUANTS = frozenset({"Q4_0", "Q4_1", "Q8_0"})


def _bindings() -> Any:
    """Import the ctypes module without the package's ``__init__``, which pulls in jinja2, diskcache and more (80 ms)."""
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.submodule_search_locations is None:
            raise BackendUnavailable("llama-cpp-python is not installed in this runtime")
        package = types.ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["llama_cpp"] = package
    import llama_cpp.llama_cpp as bindings

    return bindings


def library_dir() -> Path:
    """Return the folder with llama.cpp's libraries."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable("llama-cpp-python is not installed in this runtime")
    return Path(next(iter(spec.submodule_search_locations))) / "lib"


def load_cpu_variant(ll: Any, wanted: str | None = None) -> str:
    """Load the CPU kernels that suit this machine best (or ``wanted``); return the variant's name.

    A build without variants has its kernels linked in: ``native``. Raises BackendUnavailable when ``wanted`` is not
    there or this CPU can not run it.
    """
    scores: dict[str, int] = {}
    for path in library_dir().glob("libggml-cpu-*.so"):
        score = ctypes.CDLL(str(path)).ggml_backend_score
        score.restype = ctypes.c_int
        scores[path.stem.removeprefix("libggml-cpu-")] = score()
    if not scores:
        return "native"
    runnable = {name: s for name, s in scores.items() if s > 0}
    if wanted is not None and wanted not in runnable:
        raise BackendUnavailable(
            f"cpu_variant {wanted!r} can not run here; this machine runs {', '.join(sorted(runnable))}", wanted=wanted
        )
    best = wanted or max((s, name) for name, s in runnable.items() if s < _AMX_SCORE)[1]
    load = ll._lib.ggml_backend_load
    load.argtypes, load.restype = [ctypes.c_char_p], ctypes.c_void_p
    if not load(str(library_dir() / f"libggml-cpu-{best}.so").encode()):
        raise BackendUnavailable(f"llama.cpp could not load its CPU kernels ({best})")
    return best


def isa_class(variant: str) -> str:
    """Return the class of instruction sets whose kernels give equal bits."""
    return "avx512" if variant in _AVX512 else "avx2" if variant in _AVX2 else variant


def fingerprint(path: Path) -> str:
    """Digest of size and both ends of the file: cheap for any size, differs between models and quantisations."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as f:
        digest.update(f.read(1 << 20))
        f.seek(max(0, size - (1 << 20)))
        digest.update(f.read())
    return digest.hexdigest()


@dataclass
class LoadLog:
    """What llama.cpp says while it loads: where buffers are, and its last error lines."""

    buffers_mib: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    _line: str = ""

    def feed(self, level: int, text: str) -> None:
        """Take one piece of log output (level 3 and up are warnings and errors)."""
        self._line += text
        if not self._line.endswith("\n"):
            return
        line, self._line = self._line.strip(), ""
        if match := re.search(r"(\S+)\s+(?:model|KV|compute|output) buffer size\s*=\s*([\d.]+) MiB", line):
            self.buffers_mib[match[1]] = self.buffers_mib.get(match[1], 0.0) + float(match[2])
        if level >= 3 and line:
            self.errors = [*self.errors[-7:], line]


class Model:
    """A loaded model with one context of ``slots`` sequences. Not thread-safe: the engine's loop owns it."""

    def __init__(self, config: EngineConfig, on_progress: Callable[[float], None]) -> None:
        """Load; ``on_progress`` gets 0..1.

        Raises BackendUnavailable (device not there, weights not on it) and ModelFileInvalid (llama.cpp refused the file).
        """
        ll = self._ll = _bindings()
        self.log = LoadLog()
        self._log_callback = ll.llama_log_callback(lambda level, text, _: self.log.feed(level, text.decode("utf-8", "replace")))
        ll.llama_log_set(self._log_callback, ctypes.c_void_p())
        self.variant = load_cpu_variant(ll, config.cpu_variant)
        ll.llama_backend_init()
        self.threads = config.threads or len(os.sched_getaffinity(0))
        self._load_model(config, on_progress)
        self._make_context(config)
        self._check_device(config)
        self._pieces: dict[int, bytes] = {}
        self.n_vocab = ll.llama_vocab_n_tokens(self.vocab)
        self.eog = frozenset(i for i in range(self.n_vocab) if ll.llama_vocab_is_eog(self.vocab, i))

    # --- loading ------------------------------------------------------------------------------------------------

    def _load_model(self, config: EngineConfig, on_progress: Callable[[float], None]) -> None:
        ll = self._ll
        params = ll.llama_model_default_params()
        gpu = config.backend != "cpu"
        if gpu and not ll.llama_supports_gpu_offload():
            raise BackendUnavailable(
                f"this build of llama.cpp has no {config.backend} support",
                backend=config.backend,
                hint="install the runtime for it",
            )
        params.n_gpu_layers = 999 if gpu else 0
        params.main_gpu = config.device
        params.split_mode = 0  # one device holds all
        # Q4_0 weights are repacked at load: with mmap both copies would stay mapped (ENGINE: 1.3 GB for a 0.6 GB model).
        params.load_mode = 0 if self._repacked(Path(config.model_path)) and not gpu else 1

        def progress(value: float, _: Any) -> bool:
            on_progress(value)
            return True

        self._progress_callback = ll.llama_progress_callback(progress)
        params.progress_callback = self._progress_callback
        self.model = ll.llama_model_load_from_file(config.model_path.encode(), params)
        if not self.model:
            reason = "; ".join(self.log.errors) or "no reason given"
            raise ModelFileInvalid(f"llama.cpp could not load {config.model_path}: {reason}", path=config.model_path)
        self.vocab = ll.llama_model_get_vocab(self.model)

    @staticmethod
    def _repacked(path: Path) -> bool:
        from rbee_serve.worker.engine.gguf_header import read_header

        return read_header(path).get("general.file_type") == 2  # mostly Q4_0

    def _make_context(self, config: EngineConfig) -> None:
        ll = self._ll
        trained = ll.llama_model_n_ctx_train(self.model)
        self.context_tokens = min(config.context_tokens, trained) if trained > 0 else config.context_tokens
        params = ll.llama_context_default_params()
        params.n_seq_max = config.slots
        params.n_ctx = self.context_tokens * config.slots
        params.n_batch = params.n_ubatch = max(config.prompt_block_tokens, config.slots)
        params.n_outputs_max = config.slots
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = _KV_TYPES[config.kv_type]
        params.flash_attn_type = 1
        params.kv_unified = False
        self.ctx = ll.llama_init_from_model(self.model, params)
        if not self.ctx:
            reason = "; ".join(self.log.errors) or "no reason given"
            raise ModelFileInvalid(
                f"llama.cpp could not make a context of {config.slots} x {self.context_tokens} tokens: {reason}",
                hint="fewer slots, a smaller context_tokens or kv_type = 'q8_0' take less memory",
                slots=config.slots,
                context_tokens=self.context_tokens,
            )
        self.memory = ll.llama_get_memory(self.ctx)
        self._make_batch(params.n_batch)

    def _check_device(self, config: EngineConfig) -> None:
        """Refuse a model that is not where it was asked to be: a worker that claims a GPU must be on it."""
        if config.backend == "cpu":
            return
        prefix = {"cuda": "CUDA", "rocm": "ROCm", "vulkan": "Vulkan"}[config.backend]
        on_device = {name: mib for name, mib in self.log.buffers_mib.items() if name.startswith(prefix)}
        if not on_device or max(on_device.values()) < 1:
            raise BackendUnavailable(
                f"asked for {config.backend} device {config.device}, but llama.cpp put the weights on "
                f"{', '.join(sorted(self.log.buffers_mib)) or 'nothing it named'}",
                backend=config.backend,
                device=config.device,
            )

    def _make_batch(self, capacity: int) -> None:
        """Own the arrays that the batch points to: a step then fills slices instead of calling ctypes per token."""
        self._tokens = np.zeros(capacity, np.int32)
        self._pos = np.zeros(capacity, np.int32)
        self._n_seq = np.ones(capacity, np.int32)
        self._seq = np.zeros(capacity, np.int32)
        self._logits = np.zeros(capacity, np.int8)
        int32_p = ctypes.POINTER(ctypes.c_int32)
        base = self._seq.ctypes.data
        self._seq_pointers = (int32_p * capacity)(*(ctypes.cast(base + 4 * i, int32_p) for i in range(capacity)))
        batch = self._batch = self._ll.llama_batch()
        batch.token = self._tokens.ctypes.data_as(int32_p)
        batch.embd = None
        batch.pos = self._pos.ctypes.data_as(int32_p)
        batch.n_seq_id = self._n_seq.ctypes.data_as(int32_p)
        batch.seq_id = ctypes.cast(self._seq_pointers, type(batch.seq_id))
        batch.logits = self._logits.ctypes.data_as(type(batch.logits))

    # --- decoding -----------------------------------------------------------------------------------------------

    def decode_step(self, rows: list[tuple[int, int, int]]) -> int:
        """Evaluate one token of each of several sequences, ``(token, position, sequence)``; all get logits, in order."""
        n = len(rows)
        table = np.array(rows, np.int32)
        self._tokens[:n], self._pos[:n], self._seq[:n] = table[:, 0], table[:, 1], table[:, 2]
        self._logits[:n] = 1
        self._batch.n_tokens = n
        return int(self._ll.llama_decode(self.ctx, self._batch))

    def prefill(self, tokens: NDArray[np.int32], start: int, seq: int, *, logits: bool) -> int:
        """Evaluate a block of one sequence from position ``start``; with ``logits`` those of its last token are kept."""
        n = len(tokens)
        self._tokens[:n] = tokens
        self._pos[:n] = np.arange(start, start + n, dtype=np.int32)
        self._seq[:n] = seq
        self._logits[:n] = 0
        self._logits[n - 1] = logits
        self._batch.n_tokens = n
        return int(self._ll.llama_decode(self.ctx, self._batch))

    def logits(self, index: int) -> NDArray[np.float32]:
        """Return a view (no copy) on the logits of batch row ``index`` of the last call; -1: the last one kept."""
        pointer = self._ll.llama_get_logits_ith(self.ctx, index)
        if not pointer:
            raise RuntimeError(f"llama.cpp has no logits for row {index}")
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))

    # --- KV cache -----------------------------------------------------------------------------------------------

    def cut(self, seq: int, keep: int) -> int:
        """Keep the first ``keep`` positions of a sequence; return how many really are left (0 where the model can not
        be cut in part: sliding windows, recurrent layers)."""
        if self._ll.llama_memory_seq_rm(self.memory, seq, keep if keep else -1, -1):
            return keep
        self._ll.llama_memory_seq_rm(self.memory, seq, -1, -1)
        return 0

    def copy(self, source: int, target: int) -> None:
        """Copy a whole sequence (with separate streams llama.cpp copies no part of one)."""
        self._ll.llama_memory_seq_rm(self.memory, target, -1, -1)
        self._ll.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    # --- text ---------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, parse_special: bool, add_bos: bool) -> list[int]:
        """Return token ids of ``text``; ``add_bos`` adds what the model's tokenizer wants at the beginning."""
        data = text.encode("utf-8")
        room = len(data) + 8
        for _ in range(2):
            buffer = (ctypes.c_int32 * room)()
            n = self._ll.llama_tokenize(self.vocab, data, len(data), buffer, room, add_bos, parse_special)
            if n >= 0:
                return list(buffer[:n])
            room = -n
        raise RuntimeError("llama_tokenize asked for more room twice")

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token (control tokens: none)."""
        cached = self._pieces.get(token)
        if cached is None:
            buffer = ctypes.create_string_buffer(256)
            n = self._ll.llama_token_to_piece(self.vocab, token, buffer, 256, 0, False)
            if n < 0:
                buffer = ctypes.create_string_buffer(-n)
                n = self._ll.llama_token_to_piece(self.vocab, token, buffer, -n, 0, False)
            cached = self._pieces[token] = buffer.raw[:n]
        return cached

    def token_text(self, token: int) -> str:
        """Return the spelling of a (special) token, empty when the model has none."""
        text = self._ll.llama_vocab_get_text(self.vocab, token) if token >= 0 else None
        return text.decode("utf-8", "replace") if text else ""

    def meta(self, key: str) -> str | None:
        """Return a metadata value as text."""
        size = 256
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            n = self._ll.llama_model_meta_val_str(self.model, key.encode(), buffer, size)
            if n < 0:
                return None
            if n < size:
                return buffer.value.decode("utf-8", "replace")
            size = n + 1
        return None

    def facts(self) -> dict[str, Any]:
        """Return what llama.cpp says of the loaded model: counts, special tokens, template."""
        ll = self._ll
        bos, eos = ll.llama_vocab_bos(self.vocab), ll.llama_vocab_eos(self.vocab)
        template = ll.llama_model_chat_template(self.model, None)
        description = ctypes.create_string_buffer(256)
        ll.llama_model_desc(self.model, description, 256)
        return {
            "parameters": ll.llama_model_n_params(self.model),
            "size_bytes": ll.llama_model_size(self.model),
            "layers": ll.llama_model_n_layer(self.model),
            "context_trained": ll.llama_model_n_ctx_train(self.model),
            "bos_token": self.token_text(bos),
            "eos_token": self.token_text(eos),
            "eos_id": eos,
            "chat_template": template.decode("utf-8", "replace") if template else None,
            "description": description.value.decode("utf-8", "replace"),
        }

    @property
    def sampling(self) -> Any:
        """The bindings and vocabulary that sampler chains are made of."""
        return self._ll

    @staticmethod
    def build() -> str:
        """Return the version of binding and llama.cpp."""
        ll = _bindings()
        return f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')} llama.cpp {ll.llama_version().decode()}"
