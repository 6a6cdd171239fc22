"""The only place that knows llama.cpp, with weights.py and context.py: batches, cache, tokens. In the engine process alone.

Bound to llama-cpp-python's low-level module. A C++ exception or a failed assert ends the process, so nothing unchecked
is passed on: pointers are tested for NULL (a NULL pointer object is not None), lengths are computed here.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rbee_serve.worker.engine import libs
from rbee_serve.worker.engine.batch import Batch
from rbee_serve.worker.engine.lookup import row_costs
from rbee_serve.worker.engine.model_file import fingerprint
from rbee_serve.worker.engine.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rbee_serve.worker.engine.context import Context

#: An f16 cache of this many positions and more is read by another kernel when exactly one stream decodes.
_F16_EXACT_TOKENS = 256

#: Bytes a second, for reckoning what a copy costs: of a slot's whole room by llama.cpp, of a saved state in and out again, and of
#: a slot's room on an accelerator. Measured 2.6 and 0.4 GB/s on a busy Zen 4 with one thread.
_STREAM_BYTES_S, _STATE_BYTES_S, _DEVICE_BYTES_S = 2e9, 0.3e9, 1e11
#: A saved state needs its size in memory: larger ones are copied by llama.cpp, room and all.
_STATE_BYTES_MAX = 64 << 20

#: What `prefill` returns when it was interrupted (llama_decode's "aborted").
INTERRUPTED = 2


class Model:
    """A loaded model with its context. Not thread-safe: the engine's loop owns it, all but ``vocabulary``.

    ``ll``: the bindings; ``vocab``: llama.cpp's handle; the rest is the context's (context.py).
    """

    def __init__(self, context: Context) -> None:
        weights = context.weights
        ll = self.ll = weights.ll
        self.config, self.header, self.log = weights.config, weights.header, weights.log
        self.variant, self.isa, self.device, self.threads = weights.variant, weights.isa, weights.device, weights.threads
        self.model, self.vocab = weights.model, weights.vocab
        self._context, self._interrupt = context, context.interrupt
        self.ctx, self.memory, self.context_tokens = context.ctx, context.memory, context.context_tokens
        self.recurrent, self.can_be_cut, self.causal = context.recurrent, context.can_be_cut, context.causal
        self.batch_invariant, self.blocks = context.batch_invariant, context.blocks
        self.stream_bytes = context.stream_bytes
        #: What calls of 1, 2, 3 ... rows take, in calls of one row.
        self.row_costs = row_costs(self.config.backend, self.header.matrix_types)
        self._batch = Batch(ll, context.rows)
        self.n_vocab: int = ll.llama_vocab_n_tokens(self.vocab)
        self.vocabulary = Vocabulary(ll, self.vocab, self.header.values.get("tokenizer.ggml.model"))
        self._pieces: dict[int, bytes] = {}
        self._views: dict[tuple[int, int], NDArray[np.float32]] = {}
        self._best: list[int] | None = None  # of the last call
        self._eog: dict[int, bool] = {}
        self._eog_ids: NDArray[np.int64] | None = None
        self._copies_pending = False
        self.decode_s = 0.0  # seconds spent in llama_decode

    def apply_adapters(self, ctx: Any) -> None:
        """Put the LoRA adapters of the settings on another context; raises ModelFileInvalid."""
        self._context.apply_adapters(ctx)

    # --- decoding -----------------------------------------------------------------------------------------------

    def decode_step(self, rows: list[tuple[int, int, int]]) -> int:
        """Evaluate tokens, ``(token, position, sequence)``, one of each sequence or a few of one; all get logits, in order."""
        n, batch = len(rows), self._batch
        table = np.array(rows, np.int32)
        batch.tokens[:n], batch.pos[:n], batch.seq[:n] = table[:, 0], table[:, 1], table[:, 2]
        batch.logits[:n] = 1
        batch.size = n
        return self._call()

    def prefill(self, tokens: NDArray[np.int32], start: int, seq: int, owner: str, *, logits: bool) -> int:
        """Evaluate a block of one sequence from position ``start``; with ``logits`` those of its last token are kept.

        `INTERRUPTED` when request ``owner`` was cancelled meanwhile: the block is then not in the cache.
        """
        n, batch = len(tokens), self._batch
        batch.tokens[:n] = tokens
        batch.pos[:n] = np.arange(start, start + n, dtype=np.int32)
        batch.seq[:n] = seq
        batch.logits[:n] = 0
        batch.logits[n - 1] = logits
        batch.size = n
        self._interrupt.watch(owner)
        try:
            return self._call()
        finally:
            self._interrupt.rest()

    def _call(self) -> int:
        began = time.perf_counter()
        code = int(self.ll.llama_decode(self.ctx, self._batch.struct))
        self.decode_s += time.perf_counter() - began
        self._copies_pending, self._best = False, None
        return code

    def logits(self, index: int) -> NDArray[np.float32]:
        """Return a view (no copy) on the logits of batch row ``index`` of the last call; -1: the last one kept."""
        row: NDArray[np.float32] = self._view(self.ll.llama_get_logits_ith(self.ctx, index), 1)[0]
        return row

    def best(self, index: int) -> int:
        """Return the likeliest token of row ``index`` of the last `decode_step`, or of the last row kept (-1).

        Asked for before anybody changes the row's logits. All rows are looked at together: one by one they take twice as long.
        """
        if index < 0:
            return int(self.logits(index).argmax())
        best = self._best
        if best is None:
            rows = self._view(self.ll.llama_get_logits(self.ctx), self._batch.size)
            best = self._best = list(map(int, rows.argmax(axis=1)))
        return best[index]

    def _view(self, pointer: Any, rows: int) -> NDArray[np.float32]:
        if not pointer:
            raise RuntimeError("llama.cpp has no logits for this row")
        # The rows stay in one buffer, as a rule for as long as the context lives: a view is made once (2.5 us saved).
        key = ctypes.addressof(pointer.contents), rows
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = np.ctypeslib.as_array(pointer, shape=(rows, self.n_vocab))
        return view

    # --- KV cache -----------------------------------------------------------------------------------------------

    def cut(self, seq: int, keep: int) -> int:
        """Keep the first ``keep`` positions of a sequence; return how many really are left: all, or none where they are not
        there (llama.cpp removes nothing of an empty sequence and says so with success) or the model can not be cut in part
        (recurrent layers, sliding windows that have moved on)."""
        if keep and self.ll.llama_memory_seq_rm(self.memory, seq, keep, -1) and self._holds(seq, keep):
            return keep
        self.ll.llama_memory_seq_rm(self.memory, seq, -1, -1)
        return 0

    def _holds(self, seq: int, keep: int) -> bool:
        """Whether a sequence has the positions before ``keep`` and no others, as far as they are still looked at."""
        ll = self.ll
        if ll.llama_memory_seq_pos_max(self.memory, seq) != keep - 1:
            return False
        if self.recurrent:  # one state stands for all positions
            return True
        window = ll.llama_model_n_swa(self.model)
        first = max(0, keep - window) if window else 0
        return bool(ll.llama_memory_seq_pos_min(self.memory, seq) <= first)

    def copy_s(self, held: int) -> float:
        """Return the seconds that copying a sequence of ``held`` positions takes, reckoned from the bytes that are moved."""
        if self.config.backend != "cpu":
            return self.stream_bytes / _DEVICE_BYTES_S
        if self._as_state(held) and self.state_settled:
            return self._state_bytes(held) / _STATE_BYTES_S
        return self.stream_bytes / _STREAM_BYTES_S

    def _state_bytes(self, held: int) -> float:
        return self.stream_bytes * held / self.context_tokens

    def _as_state(self, held: int) -> bool:
        """Whether the positions that are there are copied by themselves: cheaper where they are few, and takes memory."""
        few = self._state_bytes(held) / _STATE_BYTES_S < self.stream_bytes / _STREAM_BYTES_S
        return few and self.config.backend == "cpu" and self._state_bytes(held) <= _STATE_BYTES_MAX

    def copy(self, source: int, target: int, held: int) -> float:
        """Copy a sequence of ``held`` positions; return the seconds that it will still take, within the next call.

        With separate streams llama.cpp copies no part of one: it moves the whole room of a slot, however little is in it, and
        not before the next call. A saved state has only what is there.
        """
        if self._as_state(held) and self.state_settled and (state := self.save_state(source)) and self.load_state(target, state):
            return 0.0
        self.ll.llama_memory_seq_rm(self.memory, target, -1, -1)
        self.ll.llama_memory_seq_cp(self.memory, source, target, -1, -1)
        self._copies_pending = True
        return self.copy_s(self.context_tokens)

    def exchange_s(self, first_held: int, second_held: int) -> float:
        """Return the seconds that exchanging two sequences of so many positions takes; infinite where it is not done: on a GPU,
        of large ones, of models whose states can not be cut, and while a copy is owed."""
        size = self._state_bytes(first_held) + self._state_bytes(second_held)
        done = self.config.backend == "cpu" and self.can_be_cut and self.state_settled and size <= _STATE_BYTES_MAX
        return size / _STATE_BYTES_S if done else math.inf

    def exchange(self, first: int, second: int) -> tuple[bool, bool]:
        """Exchange what two sequences hold; return whether the first one's moved, else it is where it was, and whether the second
        one's was kept, else it is gone. By saved states: their bits stay what they are."""
        state = self.save_state(first)
        other = self.save_state(second) if self.ll.llama_memory_seq_pos_max(self.memory, second) >= 0 else None
        if not state or not self.load_state(second, state):
            self.cut(second, 0)
            return False, False
        if other:
            return True, self.load_state(first, other)
        self.cut(first, 0)
        return True, False

    @property
    def state_settled(self) -> bool:
        """Whether states may be saved and loaded: llama.cpp moves the data of a copy only with the next call."""
        return not self._copies_pending

    def save_state(self, seq: int) -> memoryview:
        """Return what llama.cpp keeps of a sequence; empty when it refuses."""
        size = self.ll.llama_state_seq_get_size(self.ctx, seq)
        buffer = np.empty(size, np.uint8)
        pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return buffer.data[: self.ll.llama_state_seq_get_data(self.ctx, pointer, size, seq)]

    def load_state(self, seq: int, state: memoryview) -> bool:
        """Replace a sequence by a saved one of the same `state_fingerprint`; False, and the sequence empty, when refused."""
        self.cut(seq, 0)
        pointer = np.frombuffer(state, np.uint8).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if self.ll.llama_state_seq_set_data(self.ctx, pointer, len(state), seq) == len(state):
            return True
        self.cut(seq, 0)
        return False

    # --- text ---------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, parse_special: bool, add_bos: bool) -> list[int]:
        """Return token ids of ``text``; ``add_bos`` adds what the model's tokenizer wants at the beginning."""
        ids: list[int] = self.vocabulary.tokenize(text.encode(), parse_special=parse_special, add_bos=add_bos).tolist()
        return ids

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token (control tokens: none)."""
        cached = self._pieces.get(token)
        if cached is None:
            buffer = ctypes.create_string_buffer(256)
            n = self.ll.llama_token_to_piece(self.vocab, token, buffer, 256, 0, False)
            if n < 0:
                buffer = ctypes.create_string_buffer(-n)
                n = self.ll.llama_token_to_piece(self.vocab, token, buffer, -n, 0, False)
            cached = self._pieces[token] = buffer.raw[:n]
        return cached

    def shown(self, token: int) -> bytes:
        """Return the bytes of a token as people name it: a control token by its spelling."""
        return self.piece(token) or self.token_text(token).encode()

    def token_text(self, token: int) -> str:
        """Return the spelling of a (special) token, empty when the model has none."""
        text = self.ll.llama_vocab_get_text(self.vocab, token) if token >= 0 else None
        return text.decode("utf-8", "replace") if text else ""

    def is_eog(self, token: int) -> bool:
        """Return whether the token ends a generation."""
        known = self._eog.get(token)
        if known is None:
            known = self._eog[token] = bool(self.ll.llama_vocab_is_eog(self.vocab, token))
        return known

    @property
    def eog_ids(self) -> NDArray[np.int64]:
        """All tokens that end a generation; asked for only where one is to be forbidden (20 ms the first time)."""
        if self._eog_ids is None:
            self._eog_ids = np.array([i for i in range(self.n_vocab) if self.is_eog(i)], np.int64)
        return self._eog_ids

    # --- what was loaded ----------------------------------------------------------------------------------------

    def _identity(self) -> tuple[str, str, str]:
        """Return digest of the model, engine build, and the class of workers that compute the same bits."""
        config = self.config
        digest = config.model_sha256 or fingerprint(Path(config.model_path))
        build = f"llama-cpp-python {libs.version()} (llama.cpp {self.ll.llama_version().decode()})"
        same = [digest, build, config.backend, self.isa, self.header.quantization, config.kv_type, self.blocks.kind]
        same += [f"{fingerprint(Path(path))} {scale}" for path, scale in config.lora]
        return digest, build, hashlib.sha256("\n".join(same).encode()).hexdigest()[:16]

    @property
    def state_fingerprint(self) -> str:
        """What must be equal for `load_state`: what makes bits equal, and the number of sequences (llama.cpp's format)."""
        return f"{self._identity()[2]}-{self.config.slots}"

    def facts(self) -> dict[str, Any]:
        """Return the fields of protocol.EngineInfo."""
        ll, config, header = self.ll, self.config, self.header
        bos, eos = ll.llama_vocab_bos(self.vocab), ll.llama_vocab_eos(self.vocab)
        template = ll.llama_model_chat_template(self.model, None)
        digest, build, same_bits = self._identity()
        exact = 0
        if self.batch_invariant and self.causal:
            exact = min(_F16_EXACT_TOKENS, self.context_tokens) if config.kv_type == "f16" else self.context_tokens
        return {
            "architecture": header.architecture,
            "quantization": header.quantization,
            "parameters": ll.llama_model_n_params(self.model),
            "size_bytes": ll.llama_model_size(self.model),
            "layers": ll.llama_model_n_layer(self.model),
            "vocab_size": self.n_vocab,
            "context_trained": ll.llama_model_n_ctx_train(self.model),
            "context_tokens": self.context_tokens,
            "slots": config.slots,
            "bos_token": self.token_text(bos),
            "eos_token": self.token_text(eos),
            "eos_id": eos,
            "chat_template": template.decode("utf-8", "replace") if template else None,
            "backend": config.backend,  # check_placed has seen that it holds all weights
            "devices": self.log.weight_devices(),
            "device_memory_bytes": self.log.device_bytes(),
            "threads": self.threads,
            "engine_version": build,
            "continuation_class": same_bits,
            "metadata": {
                "cpu_variant": self.variant,
                "isa_class": self.isa,
                "model_digest": digest,
                "kv_type": config.kv_type,
                "deterministic": config.deterministic,
                "generates": self.causal,  # False: embeddings alone
                "lora": [f"{Path(path).name}:{scale:g}" for path, scale in config.lora],
                "buffers_mib": self.log.buffers_mib,
                # Length of prompt + answer up to which equal classes give equal bits in any batch; 0: they do not.
                "exact_context_tokens": exact,
                **{k: v for k, v in header.values.items() if k in ("general.name", "general.license", "general.size_label")},
            },
        }
