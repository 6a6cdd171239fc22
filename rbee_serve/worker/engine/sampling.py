"""Choosing the next token: argmax for plain greedy, llama.cpp's own sampler chain for everything else."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rbee_serve.contract.api import SamplingParams
    from rbee_serve.worker.engine.llama import Model

#: Tokens that repetition_penalty looks back at, prompt included: llama.cpp's own default.
REPETITION_WINDOW = 64


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

    def choose(self, row: int) -> int:
        """Return the next token from the logits of batch row ``row`` (-1: the last kept) and take note of it."""
        if self._ban_eog:
            self._model.logits(row)[self._model.eog_ids] = -np.inf
        if self._chain is None:
            return int(np.argmax(self._model.logits(row)))
        return int(self._model.ll.llama_sampler_sample(self._chain, self._model.ctx, row))

    def close(self) -> None:
        """Free the chain."""
        if self._chain is not None:
            self._model.ll.llama_sampler_free(self._chain)
            self._chain = None
