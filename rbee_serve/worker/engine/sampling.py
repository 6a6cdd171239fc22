"""Choosing the next token: argmax for plain greedy, llama.cpp's own sampler chain for everything else."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rbee_serve.contract.errors import InferenceFailed
from rbee_serve.contract.sampling import REPETITION_WINDOW

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rbee_serve.contract.api import SamplingParams
    from rbee_serve.worker.engine.constraint import Constraint
    from rbee_serve.worker.engine.llama import Model


#: Shown in place of minus infinity, which JSON has not; OpenAI does the same.
_NEVER = -9999.0
#: Below this a temperature is none: divided by it logits would leave the range of their type.
_COLDEST = 1e-6
#: Tokens that a grammar refuses before all that it allows are looked for: 3 ms, up to 40 where the ways to go on are many.
_TRIES = 6
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Sampler:
    """State of one generation's sampling.

    The random draw for the token at position n depends on (seed, n) alone: the chain draws once per token, and a
    continuation forwards the generator by as many draws as tokens were generated elsewhere. The order of the chain is
    llama-cpp-python's, so that a seed gives the same text here and there.

    A grammar is looked at after the draw: a refused token is taken out and the draw repeated, which gives each allowed
    token the probability that it has among the allowed ones, and costs next to nothing while the model writes what it
    should.
    """

    def __init__(
        self,
        model: Model,
        params: SamplingParams,
        prompt: Sequence[int],
        generated: Sequence[int],
        constraint: Constraint | None = None,
    ) -> None:
        """Build the chain and bring it to the state it had after ``generated``; ``constraint`` is in that state."""
        self._model, self._constraint = model, constraint
        self._ban_eog, self._random = params.ignore_eos, params.temperature >= _COLDEST
        self._reported = params.logprobs
        self._bias = np.array(list(params.logit_bias), np.int64), np.array(list(params.logit_bias.values()), np.float32)
        # llama.cpp takes 2**32 - 1 for "choose a seed yourself": neither repeatable nor continued exactly.
        self._seed, self._position = min(params.seed or 0, 2**32 - 2), len(generated)
        # llama.cpp's typical sampling makes nothing but NaN of a token whose probability is zero: such are left out.
        self._by_hand = constraint is not None or params.typical_p < 1
        self._chain: Any = None
        self._last: Any = None
        samplers = [*self._penalties(params, prompt, generated), *self._truncations(params)]
        if self._random or samplers:
            ll = model.ll
            self._chain = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
            for sampler in samplers:
                ll.llama_sampler_chain_add(self._chain, sampler)
            self._last = self._dist(self._seed, len(generated)) if self._random else ll.llama_sampler_init_greedy()
            if not self._by_hand:
                ll.llama_sampler_chain_add(self._chain, self._last)
        #: The likeliest token it is, as the model gives it; which ones end a text is asked for only where one would.
        self._plain = self._chain is None and not self._by_hand and self._reported is None and not params.logit_bias

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

    def _truncations(self, params: SamplingParams) -> list[Any]:
        ll, made = self._model.ll, []
        if not self._random:
            return []
        if params.top_k > 0:
            made.append(ll.llama_sampler_init_top_k(params.top_k))
        if params.typical_p < 1:
            made.append(ll.llama_sampler_init_typical(params.typical_p, 1))
        if params.top_p < 1:
            made.append(ll.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0:
            made.append(ll.llama_sampler_init_min_p(params.min_p, 1))
        return [*made, ll.llama_sampler_init_temp(params.temperature)]

    def _dist(self, seed: int, draws: int) -> Any:
        """Return the sampler that draws, after ``draws`` draws."""
        ll = self._model.ll
        dist = ll.llama_sampler_init_dist(seed)
        # One candidate: the generator moves on by one draw and nothing else happens (0.6 us each).
        one = ll.llama_token_data(id=0, logit=0.0, p=1.0)
        candidates = ll.llama_token_data_array(data=ctypes.pointer(one), size=1, selected=0, sorted=False)
        for _ in range(draws):
            ll.llama_sampler_apply(dist, ctypes.byref(candidates))
        return dist

    @property
    def must_end(self) -> bool:
        """Whether the grammar leaves nothing to say."""
        return self._constraint is not None and self._constraint.must_end

    def choose(self, row: int) -> tuple[int, dict[str, Any] | None]:
        """Return the next token from the logits of batch row ``row`` (-1: the last kept) and take note of it.

        With it, where asked for, its log probability and those of the likeliest tokens, as contract.events.token has them.
        Raises InvalidRequest or InferenceFailed when the grammar allows no token.
        """
        if self._plain:
            token = self._model.best(row)
            if not (self._ban_eog and self._model.is_eog(token)):
                self._position += 1
                return token, None
        logits = self._model.logits(row)
        before = None if self._reported is None else logits.copy()
        if len(self._bias[0]):
            logits[self._bias[0]] += self._bias[1]
        if self._ban_eog:
            logits[self._model.eog_ids] = -np.inf
        if self._by_hand:
            token = self._choose_by_hand(logits)
        elif self._chain is None:
            token = int(np.argmax(logits))
        else:
            token = int(self._model.ll.llama_sampler_sample(self._chain, self._model.ctx, row))
        self._position += 1
        return token, None if before is None else self._report(before, token, self._reported or 0)

    # --- with a grammar -----------------------------------------------------------------------------------------

    def _choose_by_hand(self, logits: NDArray[np.float32]) -> int:
        constraint = self._constraint
        token = self._draw(logits, self._last)
        if constraint is not None and not constraint.allows(token):
            token = self._draw_again(logits, token, constraint)
        if constraint is not None:
            constraint.accept(token)
        if self._chain is not None:
            self._model.ll.llama_sampler_accept(self._chain, token)
        return token

    def _draw_again(self, logits: NDArray[np.float32], refused: int, constraint: Constraint) -> int:
        for attempt in range(1, _TRIES):
            logits[refused] = -np.inf
            refused = self._draw_apart(logits, attempt)
            if constraint.allows(refused):
                return refused
        allowed = constraint.allowed()
        possible = allowed[np.isfinite(logits[allowed])]
        if len(possible):
            masked = np.full_like(logits, -np.inf)
            masked[possible] = logits[possible]
            return self._draw_apart(masked, _TRIES)
        if constraint.may_end:  # only the end is left, also where ignore_eos has banned it
            return int(self._model.eog_ids[0])
        raise InferenceFailed("the grammar allows no token of this model here", field="grammar")

    def _draw_apart(self, logits: NDArray[np.float32], attempt: int) -> int:
        """Draw with a generator of its own, so that the stream's own draws once per token whatever happens."""
        if not self._random:
            return self._draw(logits, self._last)
        ll = self._model.ll
        mixed = (self._seed * 0x9E3779B1 + self._position * 0x85EBCA6B + attempt * 0xC2B2AE35) & 0xFFFFFFFF
        dist = ll.llama_sampler_init_dist(min(mixed, 2**32 - 2))
        try:
            return self._draw(logits, dist)
        finally:
            ll.llama_sampler_free(dist)

    def _draw(self, logits: NDArray[np.float32], last: Any) -> int:
        """Return a token by the chain and then ``last``, of those that are possible at all."""
        if self._chain is None:
            return int(np.argmax(logits))
        ll = self._model.ll
        ids = np.flatnonzero(logits > -np.inf)
        table = np.zeros(len(ids), _CANDIDATE)
        table["id"], table["logit"] = ids, logits[ids]
        pointer = ctypes.cast(table.ctypes.data, ctypes.POINTER(ll.llama_token_data))
        candidates = ll.llama_token_data_array(data=pointer, size=len(ids), selected=-1, sorted=False)
        ll.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        ll.llama_sampler_apply(last, ctypes.byref(candidates))
        if not 0 <= candidates.selected < candidates.size:
            raise InferenceFailed("llama.cpp's samplers chose no token")
        return int(candidates.data[candidates.selected].id)

    # --- what is reported ---------------------------------------------------------------------------------------

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
        ll = self._model.ll
        if self._chain is not None:
            if self._by_hand:
                ll.llama_sampler_free(self._last)
            ll.llama_sampler_free(self._chain)
            self._chain = self._last = None
