"""Choosing the next token: argmax for plain greedy, llama.cpp's own sampler chain for everything else."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from rbee_serve.contract.api import SamplingParams

if TYPE_CHECKING:
    from rbee_serve.worker.engine.llama import Model

#: Tokens that penalties look back at, as in llama.cpp's own server.
PENALTY_WINDOW = 64


class Sampler:
    """State of one generation's sampling.

    The random draw for the token at position n depends on (seed, n) alone: the chain draws once per token, and a
    continuation forwards the generator by as many draws as tokens were generated elsewhere.
    """

    def __init__(self, model: Model, params: SamplingParams, prompt: list[int], generated: list[int]) -> None:
        """Build the chain and bring it to the state it had after ``generated``."""
        self._model, self._ll = model, model.sampling
        self._ban_eog = params.ignore_eos
        self._eog = np.fromiter(model.eog, np.int64, len(model.eog))
        penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self._greedy = params.temperature == 0 and not penalised
        self._chain = None if self._greedy else self._make_chain(params, penalised)
        if self._chain is not None:
            for token in (prompt + generated)[-PENALTY_WINDOW:] if penalised else ():
                self._ll.llama_sampler_accept(self._chain, token)
            if params.temperature > 0:
                self._forward(len(generated))

    def _make_chain(self, params: SamplingParams, penalised: bool) -> object:
        ll = self._ll
        chain = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            ll.llama_sampler_chain_add(chain, sampler)

        if penalised:
            add(
                ll.llama_sampler_init_penalties(
                    self._model.n_vocab,
                    PENALTY_WINDOW,
                    params.repetition_penalty,
                    params.frequency_penalty,
                    params.presence_penalty,
                )
            )
        if params.temperature == 0:
            add(ll.llama_sampler_init_greedy())
            return chain
        if params.top_k > 0:
            add(ll.llama_sampler_init_top_k(params.top_k))
        if params.typical_p < 1:
            add(ll.llama_sampler_init_typical(params.typical_p, 1))
        if params.top_p < 1:
            add(ll.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0:
            add(ll.llama_sampler_init_min_p(params.min_p, 1))
        add(ll.llama_sampler_init_temp(params.temperature))
        self._dist = ll.llama_sampler_init_dist(params.seed or 0)
        add(self._dist)
        return chain

    def _forward(self, draws: int) -> None:
        """Let the generator draw ``draws`` times, on a single candidate so that nothing else changes."""
        ll = self._ll
        one = ll.llama_token_data(id=0, logit=0.0, p=1.0)
        candidates = ll.llama_token_data_array(data=ctypes.pointer(one), size=1, selected=0, sorted=False)
        for _ in range(draws):
            ll.llama_sampler_apply(self._dist, ctypes.byref(candidates))

    def choose(self, row: int) -> int:
        """Return the next token from the logits of batch row ``row`` (-1: the last kept) and take note of it."""
        if self._ban_eog:
            self._model.logits(row)[self._eog] = -np.inf
        if self._chain is None:
            return int(np.argmax(self._model.logits(row)))
        return int(self._ll.llama_sampler_sample(self._chain, self._model.ctx, row))

    def close(self) -> None:
        """Free the chain."""
        if self._chain is not None:
            self._ll.llama_sampler_free(self._chain)
            self._chain = None
