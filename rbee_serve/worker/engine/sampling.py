"""Choosing the next token: argmax for plain greedy, llama.cpp's own sampler chain for everything else."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rbee_serve.contract.api import SamplingParams
    from rbee_serve.worker.engine.llama import Model

#: Tokens that repetition_penalty looks back at, prompt included: llama.cpp's own default.
REPETITION_WINDOW = 64
#: Shown in place of minus infinity, which JSON has not; OpenAI does the same.
_NEVER = -9999.0


class Sampler:
    """State of one generation's sampling.

    The random draw for the token at position n depends on (seed, n) alone: the chain draws once per token, and a
    continuation forwards the generator by as many draws as tokens were generated elsewhere. The order of the chain is
    llama-cpp-python's, so that a seed gives the same text here and there.
    """

    def __init__(self, model: Model, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """Build the chain and bring it to the state it had after ``generated``."""
        self._model = model
        self._ban_eog = params.ignore_eos
        self._reported = params.logprobs
        self._bias = np.array(list(params.logit_bias), np.int64), np.array(list(params.logit_bias.values()), np.float32)
        penalties = self._penalties(params, prompt, generated)
        self._chain: Any = None
        if params.temperature > 0 or penalties:
            self._chain = model.ll.llama_sampler_chain_init(model.ll.llama_sampler_chain_default_params())
            for sampler in (*penalties, *self._draw(params, len(generated))):
                model.ll.llama_sampler_chain_add(self._chain, sampler)

    def _penalties(self, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> list[Any]:
        """Repetition counts the prompt's tokens too, presence and frequency (OpenAI) the generated ones alone."""
        ll, n_vocab, made = self._model.ll, self._model.n_vocab, []
        if params.repetition_penalty != 1:
            sampler = ll.llama_sampler_init_penalties(n_vocab, REPETITION_WINDOW, params.repetition_penalty, 0.0, 0.0)
            for token in [*prompt, *generated][-REPETITION_WINDOW:]:
                ll.llama_sampler_accept(sampler, token)
            made.append(sampler)
        if params.frequency_penalty != 0 or params.presence_penalty != 0:
            window = self._model.context_tokens
            sampler = ll.llama_sampler_init_penalties(n_vocab, window, 1.0, params.frequency_penalty, params.presence_penalty)
            for token in generated:
                ll.llama_sampler_accept(sampler, token)
            made.append(sampler)
        return made

    def _draw(self, params: SamplingParams, draws: int) -> list[Any]:
        """Return the samplers that choose; the generator has drawn ``draws`` times."""
        ll = self._model.ll
        if params.temperature == 0:
            return [ll.llama_sampler_init_greedy()]
        made = []
        if params.top_k > 0:
            made.append(ll.llama_sampler_init_top_k(params.top_k))
        if params.typical_p < 1:
            made.append(ll.llama_sampler_init_typical(params.typical_p, 1))
        if params.top_p < 1:
            made.append(ll.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0:
            made.append(ll.llama_sampler_init_min_p(params.min_p, 1))
        dist = ll.llama_sampler_init_dist(params.seed or 0)
        # One candidate: the generator moves on by one draw and nothing else happens (0.6 us each).
        one = ll.llama_token_data(id=0, logit=0.0, p=1.0)
        candidates = ll.llama_token_data_array(data=ctypes.pointer(one), size=1, selected=0, sorted=False)
        for _ in range(draws):
            ll.llama_sampler_apply(dist, ctypes.byref(candidates))
        return [*made, ll.llama_sampler_init_temp(params.temperature), dist]

    def choose(self, row: int) -> tuple[int, dict[str, Any] | None]:
        """Return the next token from the logits of batch row ``row`` (-1: the last kept) and take note of it.

        With it, where asked for, its log probability and those of the likeliest tokens, as contract.events.token has them.
        """
        logits = self._model.logits(row)
        before = None if self._reported is None else logits.copy()
        if len(self._bias[0]):
            logits[self._bias[0]] += self._bias[1]
        if self._ban_eog:
            logits[self._model.eog_ids] = -np.inf
        if self._chain is None:
            token = int(np.argmax(logits))
        else:
            token = int(self._model.ll.llama_sampler_sample(self._chain, self._model.ctx, row))
        return token, None if before is None else self._report(before, token, self._reported or 0)

    def _report(self, logits: NDArray[np.float32], token: int, count: int) -> dict[str, Any]:
        """Logarithms of the probabilities that the model itself gives: before bias, penalties and truncation."""
        highest = float(logits.max())
        total = highest + math.log(float(np.exp(logits - highest, dtype=np.float64).sum()))

        def entry(index: int) -> dict[str, Any]:
            data = self._model.shown(index)
            logprob = max(float(logits[index]) - total, _NEVER)
            return {"piece": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

        top = np.argpartition(logits, -count)[-count:] if count else np.zeros(0, np.int64)
        # Equal ones in the order of their ids: a stream that is continued elsewhere says the same.
        ranked = sorted(map(int, top), key=lambda i: (-float(logits[i]), i))
        return entry(token) | {"top": [{"id": i, **entry(i)} for i in ranked]}

    def close(self) -> None:
        """Free the chain."""
        if self._chain is not None:
            self._model.ll.llama_sampler_free(self._chain)
            self._chain = None
