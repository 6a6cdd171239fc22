"""The step loop's brain: slots, admission, prefix reuse, one batched decode per step, prompt blocks in between.

Each step: one token for every running stream in one call, emitted at once; then at most one block of one waiting
prompt, so that a long prompt never stalls running streams for longer than one block.

What makes continuations exact (measured): a prompt is always evaluated in the same blocks, at multiples of the block
size and in calls of their own; tokens generated elsewhere are re-evaluated in short blocks; a reused prefix ends at a
block border of a prompt.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rbee_serve.contract.api import StopReason
from rbee_serve.contract.errors import InferenceFailed, PromptTooLong, RbeeError
from rbee_serve.worker.engine.protocol import GenerateRequest
from rbee_serve.worker.engine.sampling import Sampler
from rbee_serve.worker.engine.text import TextAssembler

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rbee_serve.worker.engine.llama import Model

#: Tokens generated elsewhere are re-evaluated in blocks of fewer than 64: llama.cpp's attention switches kernels there.
CONTINUATION_BLOCK = 32

Event = tuple[str, str, Any]  # (kind, request id, payload) as process.py reads them


@dataclass
class Generation:
    """One running request."""

    request: GenerateRequest
    prompt: list[int]
    ids: NDArray[np.int32]  # prompt + what was generated elsewhere: all that must be in the cache first
    sampler: Sampler
    text: TextAssembler
    done: int = 0  # positions evaluated
    generated: int = 0
    next_token: int = 0
    began: float = field(default_factory=time.monotonic)
    decode_began: float = 0.0


@dataclass
class Slot:
    """One sequence of the KV cache: what it holds and who uses it."""

    seq: int
    cached: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    canonical: int = 0  # leading positions evaluated in whole prompt blocks: what others may reuse
    generation: Generation | None = None
    last_used: float = 0.0


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Return how many leading ids are equal."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


class Scheduler:
    """Owns the model's sequences. Single-threaded: all methods are called from the engine's loop."""

    def __init__(self, model: Model, slots: int, block: int) -> None:
        self._model, self._block = model, block
        self._slots = [Slot(i) for i in range(slots)]
        self._waiting: deque[Generation] = deque()
        self._turn = 0
        self.steps = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting) or any(s.generation for s in self._slots)

    def submit(self, request: GenerateRequest) -> list[Event]:
        """Take a request; the answer is ``started`` when it gets a slot at once, or an error."""
        try:
            prompt = self._model.tokenize(request.text, parse_special=request.parse_special, add_bos=request.add_bos)
            if not prompt:
                raise InferenceFailed("the prompt has no tokens")
            needed, room = len(prompt) + len(request.generated_ids) + 1, self._model.context_tokens
            if needed > room:
                raise PromptTooLong(
                    f"prompt: {len(prompt)} tokens, the context holds {room} and one must be left to generate",
                    hint="shorten the prompt or give the worker a larger context_tokens",
                    field="prompt",
                    prompt_tokens=len(prompt),
                    context_tokens=room,
                )
            sampler = Sampler(self._model, request.params, prompt, request.generated_ids)
        except RbeeError as e:
            return [("error", request.request_id, e.envelope()["error"])]
        text = TextAssembler(request.params.stop)
        for token in request.generated_ids:
            text.push(self._model.piece(token))
        ids = np.array(prompt + request.generated_ids, np.int32)
        generation = Generation(request, prompt, ids, sampler, text, generated=len(request.generated_ids))
        if reason := self._ended_elsewhere(generation):
            sampler.close()
            started = {"prompt_tokens": len(prompt), "cached_tokens": len(prompt)}
            return [("started", request.request_id, started), self._finished(generation, reason)]
        self._waiting.append(generation)
        return self._admit()

    def _ended_elsewhere(self, generation: Generation) -> StopReason | None:
        """Why a continuation has nothing left to generate: the other worker went away between its last token and its end."""
        request = generation.request
        if generation.text.stopped:
            return StopReason.STOP_SEQUENCE
        if request.generated_ids and request.generated_ids[-1] in self._model.eog:
            return StopReason.EOS
        return StopReason.MAX_TOKENS if generation.generated >= request.params.max_tokens else None

    def cancel(self, request_id: str) -> list[Event]:
        """End a request between two calls to llama.cpp; unknown ids are ignored (it has just ended)."""
        for generation in self._waiting:
            if generation.request.request_id == request_id:
                self._waiting.remove(generation)
                generation.sampler.close()
                return [self._finished(generation, StopReason.CANCELLED)]
        for slot in self._slots:
            if slot.generation and slot.generation.request.request_id == request_id:
                return [self._release(slot, StopReason.CANCELLED), *self._admit()]
        return []

    def step(self) -> list[Event]:
        """Advance every running stream by one token and at most one prompt by one block."""
        self.steps += 1
        events = self._admit()
        decoding = [s for s in self._slots if s.generation and s.generation.done >= len(s.generation.ids)]
        if decoding:
            events += self._decode(decoding)
        filling = [s for s in self._slots if s.generation and s.generation.done < len(s.generation.ids)]
        if filling:
            self._turn += 1
            events += self._fill(filling[self._turn % len(filling)])
        return events

    # --- admission and prefix reuse ---------------------------------------------------------------------------

    def _admit(self) -> list[Event]:
        events: list[Event] = []
        while self._waiting and (free := [s for s in self._slots if s.generation is None]):
            events.append(self._place(self._waiting.popleft(), free))
        return events

    def _reusable(self, slot: Slot, prompt: NDArray[np.int32]) -> int:
        """Leading tokens of ``prompt`` that the slot's cache can give: whole blocks, and never the last token."""
        n = min(common_prefix(slot.cached, prompt), slot.canonical, len(prompt) - 1)
        return n - n % self._block

    def _place(self, generation: Generation, free: list[Slot]) -> Event:
        """Give a slot: the free one that shares most; when another slot (free or busy) shares more, copy from it."""
        prompt = np.array(generation.prompt, np.int32)
        best = max(free, key=lambda s: (self._reusable(s, prompt), -s.last_used))
        donor = max(self._slots, key=lambda s: self._reusable(s, prompt))
        keep = self._reusable(best, prompt)
        if self._reusable(donor, prompt) > keep:
            best = min(free, key=lambda s: s.last_used)
            keep = self._reusable(donor, prompt)
            if donor is not best:
                self._model.copy(donor.seq, best.seq)
        keep = self._model.cut(best.seq, keep)
        best.generation, best.cached, best.canonical = generation, generation.ids[:keep], keep
        generation.done = keep
        generation.began = time.monotonic()
        return (
            "started",
            generation.request.request_id,
            {"prompt_tokens": len(generation.prompt), "cached_tokens": min(keep, len(generation.prompt))},
        )

    # --- one step -----------------------------------------------------------------------------------------------

    def _fill(self, slot: Slot) -> list[Event]:
        """Evaluate the next block of a slot's prompt (or of tokens generated elsewhere)."""
        generation = slot.generation
        if generation is None:
            return []
        start, prompt_end = generation.done, len(generation.prompt)
        if start < prompt_end:
            end = min(start - start % self._block + self._block, prompt_end)
        else:
            end = min(start + CONTINUATION_BLOCK, len(generation.ids))
        last = end == len(generation.ids)
        code = self._model.prefill(generation.ids[start:end], start, slot.seq, logits=last)
        if code != 0:
            return self._failed([slot], code)
        generation.done = end
        slot.cached = generation.ids[:end]
        if end <= prompt_end and end % self._block == 0:
            slot.canonical = end
        if not last:
            return []
        generation.decode_began = time.monotonic()
        return self._emit(slot, -1)

    def _decode(self, slots: list[Slot]) -> list[Event]:
        rows = [(s.generation.next_token, s.generation.done, s.seq) for s in slots if s.generation]
        code = self._model.decode_step(rows)
        if code != 0:
            return self._failed(slots, code)
        events: list[Event] = []
        for row, slot in enumerate(slots):
            if slot.generation is not None:
                slot.generation.done += 1
                events += self._emit(slot, row)
        return events

    def _emit(self, slot: Slot, row: int) -> list[Event]:
        """Sample from row ``row``, give out the token, and end the stream where it must end."""
        generation = slot.generation
        if generation is None:
            return []
        request = generation.request
        token = generation.sampler.choose(row)
        index = generation.generated
        if token in self._model.eog:
            held = generation.text.flush()
            generation.generated += bool(held)
            tail: list[Event] = [("token", request.request_id, (index, token, held))] if held else []
            return [*tail, self._release(slot, StopReason.EOS)]
        text = generation.text.push(self._model.piece(token))
        generation.generated += 1
        generation.next_token = token
        reason = None
        if generation.text.stopped:
            reason = StopReason.STOP_SEQUENCE
        elif generation.generated >= request.params.max_tokens or generation.done + 1 > self._model.context_tokens:
            reason = StopReason.MAX_TOKENS
            text += generation.text.flush()
            if generation.text.stopped:
                reason = StopReason.STOP_SEQUENCE
        events: list[Event] = [("token", request.request_id, (index, token, text))]
        if reason:
            events.append(self._release(slot, reason))
        return events

    # --- endings ------------------------------------------------------------------------------------------------

    def _release(self, slot: Slot, reason: StopReason) -> Event:
        """Free the slot; its cache stays for whoever shares the prompt."""
        generation = slot.generation
        if generation is None:
            raise RuntimeError(f"slot {slot.seq} is already free")
        slot.generation, slot.last_used = None, time.monotonic()
        generation.sampler.close()
        return self._finished(generation, reason)

    @staticmethod
    def _finished(generation: Generation, reason: StopReason) -> Event:
        now = time.monotonic()
        began = generation.decode_began or now
        return (
            "finished",
            generation.request.request_id,
            {
                "stop_reason": reason.value,
                "tokens_out": generation.generated,
                "prompt_ms": (began - generation.began) * 1000,
                "decode_ms": (now - began) * 1000,
            },
        )

    def _failed(self, slots: list[Slot], code: int) -> list[Event]:
        """llama_decode refused: end these streams with an error and forget what their sequences held."""
        error = InferenceFailed(f"llama_decode returned {code}", llama_code=code).envelope()["error"]
        events: list[Event] = []
        for slot in slots:
            if slot.generation is not None:
                request_id = slot.generation.request.request_id
                self._release(slot, StopReason.ERROR)
                events.append(("error", request_id, error))
            slot.canonical = 0
            self._model.cut(slot.seq, 0)
        return events
