"""llama.cpp's context over loaded weights: the cache of all slots, LoRA adapters, and what of the model decides about bits.

Apart from llama.py, and without numpy, as the weights are: making it takes 0.1 s of a start, and numpy is imported meanwhile.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbee_serve.contract.errors import ConfigInvalid, InsufficientRam, InsufficientVram, ModelFileInvalid
from rbee_serve.models.memory import output_rows
from rbee_serve.worker.engine import failures, interrupt
from rbee_serve.worker.engine.blocks import Blocks

if TYPE_CHECKING:
    from rbee_serve.worker.engine.weights import Weights

_KV_TYPES = {"f16": 1, "q8_0": 8}  # enum ggml_type
#: Q4_0, Q4_1, Q8_0 (enum ggml_type): their matmul kernels give the same bits whatever the batch, those of K-quants, Q5 and
#: floats do not (one row takes another way than several) or were not measured.
_BATCH_INVARIANT = frozenset({2, 3, 8})
#: Classes of instruction sets (libs.isa_class) in which that was compared bit by bit.
_COMPARED = frozenset({"avx512", "avx2"})
_TYPE_NAMES = {0: "F32", 1: "F16", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}


class Context:
    """``slots`` sequences over one model.

    ``ctx``, ``memory``: llama.cpp's handles; ``context_tokens``: room of each sequence, ``stream_bytes`` of the cache; ``rows``:
    most tokens of a call. ``recurrent``: layers carry one state through the text, which stands for all positions; ``can_be_cut``:
    the last positions of a sequence can be taken back (not with recurrent layers or sliding windows). ``causal``: a token sees
    those before it alone, else a text must be evaluated in one call. ``batch_invariant``: a stream's bits are known not to depend
    on what else is in the batch (kernels that were compared, dense, full attention).
    """

    def __init__(self, weights: Weights, interrupt_: interrupt.Interrupt | None = None) -> None:
        """``interrupt_`` can end the evaluation of a prompt.

        Raises ModelFileInvalid (LoRA adapters), ConfigInvalid (``deterministic`` with a model that can not be),
        InsufficientRam or InsufficientVram (no room), BackendUnavailable (weights not on the device).
        """
        self.weights, self.interrupt = weights, interrupt_ or interrupt.Interrupt()
        self._ll, self._config, self._header, self._log = weights.ll, weights.config, weights.header, weights.log
        ll, model = self._ll, weights.model
        self.recurrent = bool(ll.llama_model_is_recurrent(model) or ll.llama_model_is_hybrid(model))
        self.can_be_cut = not self.recurrent and ll.llama_model_n_swa(model) == 0
        self._load_adapters()
        self.batch_invariant = self._is_batch_invariant()
        self._check_deterministic()
        two_kernels = self.batch_invariant and self._config.kv_type == "f16"
        self.blocks = Blocks(self._config.prompt_block_tokens, two_kernels=two_kernels)
        self._make()
        self._log.check_placed(self._config.backend, weights.device)

    def _is_batch_invariant(self) -> bool:
        experts = self._header.values.get(f"{self._header.architecture}.expert_count", 0)
        usual = self._config.backend == "cpu" and self.can_be_cut and not experts and not self._config.lora
        usual = usual and self.weights.isa in _COMPARED
        return usual and self._header.matrix_types <= _BATCH_INVARIANT

    def _check_deterministic(self) -> None:
        if not self._config.deterministic or self.batch_invariant:
            return
        others = sorted(_TYPE_NAMES.get(t, str(t)) for t in self._header.matrix_types - _BATCH_INVARIANT)
        rest = f"its architecture, LoRA adapters, a GPU, or kernels that nobody compared ({self.weights.isa})"
        reason = f"weights of type {', '.join(others)}" if others else rest
        raise ConfigInvalid(
            f"deterministic: this model can not be evaluated so that a stream's tokens do not depend on the others: {reason}",
            hint="use a Q4_0, Q4_1 or Q8_0 file on a CPU, or set deterministic = false: streams are then continued elsewhere "
            "approximately",
            weights=others,
        )

    def _load_adapters(self) -> None:
        ll = self._ll
        self._adapters: list[Any] = []
        for path, _ in self._config.lora:
            if not Path(path).is_file():
                raise ModelFileInvalid(f"lora: there is no adapter file {path}", path=path)
            adapter = ll.llama_adapter_lora_init(self.weights.model, path.encode())
            if not adapter:
                raise ModelFileInvalid(f"lora: llama.cpp could not load {path} for this model: {self._log.reason}", path=path)
            self._adapters.append(adapter)

    def apply_adapters(self, ctx: Any) -> None:
        """Put the LoRA adapters of the settings on a context; raises ModelFileInvalid."""
        if not self._adapters:
            return
        n = len(self._adapters)
        adapters = (self._ll.llama_adapter_lora_p_ctypes * n)(*self._adapters)
        scales = (ctypes.c_float * n)(*(scale for _, scale in self._config.lora))
        if self._ll.llama_set_adapters_lora(ctx, adapters, n, scales) != 0:
            raise ModelFileInvalid(f"lora: llama.cpp could not apply the adapters: {self._log.reason}")

    def _make(self) -> None:
        ll, config = self._ll, self._config
        trained = ll.llama_model_n_ctx_train(self.weights.model)
        self.context_tokens = min(config.context_tokens, trained) if trained > 0 else config.context_tokens
        params = ll.llama_context_default_params()
        params.n_seq_max = config.slots
        params.n_ctx = self.context_tokens * config.slots
        outputs = output_rows(config.slots, config.draft_tokens)
        self.rows = max(self.blocks.capacity, outputs)
        params.n_batch = params.n_ubatch = self.rows
        params.n_outputs_max = outputs
        params.n_threads = params.n_threads_batch = self.weights.threads
        params.type_k = params.type_v = _KV_TYPES[config.kv_type]
        params.flash_attn_type = 1  # with it off, prompt and decode never agree
        params.kv_unified = False
        params.abort_callback = ll.ggml_abort_callback(interrupt.CALLBACK)
        params.abort_callback_data = self.interrupt.data
        self.ctx = ll.llama_init_from_model(self.weights.model, params)
        if not self.ctx:
            found = failures.cause(self._log.errors, self.weights.device)
            error = found[0] if found else InsufficientRam if config.backend == "cpu" else InsufficientVram
            raise error(
                f"llama.cpp could not make a context of {config.slots} slots x {self.context_tokens} tokens: {self._log.reason}",
                hint='fewer slots, a smaller context_tokens or kv_type = "q8_0" take less memory',
                slots=config.slots,
                context_tokens=self.context_tokens,
            )
        self.context_tokens = min(self.context_tokens, ll.llama_n_ctx_seq(self.ctx))
        self.stream_bytes = self._log.cache_mib * (1 << 20) / config.slots
        self.apply_adapters(self.ctx)
        self.memory = ll.llama_get_memory(self.ctx)
        self.causal = bool(self._header.values.get(f"{self._header.architecture}.attention.causal", True)) and bool(self.memory)
