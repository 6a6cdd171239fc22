"""The step loop's brain: slots, admission, prefix reuse, one batched decode per step, prompt blocks in between.

Each step is one call to llama.cpp: one token for every running stream, or one block of one waiting prompt. Prompts
have the time between two tokens of the running streams up to the configured gap, and one block in any case, as small
as the gap asks for: so a burst of newcomers gets its first tokens soon and a long prompt stalls nobody for longer.
Requests that share a prefix evaluate it once, also when they arrive together: one does, the others wait for it and
copy. What makes continuations exact is in blocks.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rbee_serve.contract.errors import InferenceFailed, InvalidRequest, PromptTooLong, RbeeError
from rbee_serve.models.memory import DRAFT_ROWS
from rbee_serve.worker.engine.constraint import Constraint, Constraints
from rbee_serve.worker.engine.lookup import LookUp, rows_each
from rbee_serve.worker.engine.sampling import Sampler
from rbee_serve.worker.engine.text import TextAssembler

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rbee_serve.worker.engine.llama import Model
    from rbee_serve.worker.engine.prefix_store import PrefixStore, StoredPrefix
    from rbee_serve.worker.engine.protocol import GenerateRequest

# Values of contract.api.StopReason; that module is not imported here because pydantic costs a cold start 0.15 s.
EOS, MAX_TOKENS, STOP_SEQUENCE, CANCELLED, ERROR = "EOS", "MAX_TOKENS", "STOP_SEQUENCE", "CANCELLED", "ERROR"
#: llama.INTERRUPTED; that module loads llama.cpp.
_INTERRUPTED = 2
#: Copying a cached prefix from another slot pays from this many tokens on.
_WORTH_COPYING = 32
#: Moving what a slot holds pays for a stream of so many tokens.
_WORTH_MOVING = 16
#: Reading a prefix from disk pays from this many tokens on; shorter ones are not written either.
_WORTH_STORING = 128
#: Steps of the vocabulary's tree that grammars need (a few ms; each token takes two) between two looks at the clock, and the
#: part of a gap that they may take between two calls.
_VOCABULARY_STEPS, _VOCABULARY_GAPS = 1024, 0.2
#: Every so many blocks the prompt that has waited longest comes first, however long it is.
_FAIR_TURN = 4
#: Streams of which none has a second token yet yield for so many gaps to prompts that one block completes.
_BURST_GAPS = 60

Event = tuple[str, str, Any]  # (kind, request id, payload) as process.py reads them


class EngineBroken(RuntimeError):
    """llama.cpp reported an error after which its state can not be trusted: the process must end."""


@dataclass
class Generation:
    """One request that runs or waits."""

    request: GenerateRequest
    prompt: NDArray[np.int32]
    ids: NDArray[np.int32]  # prompt + what was generated elsewhere: all that must be in the cache first
    text: TextAssembler
    generated: int  # tokens given out, here and elsewhere
    constraint: Constraint | None = None  # grammar or JSON schema, in the state after what was generated elsewhere
    sampler: Sampler | None = None  # made when the request gets its slot
    look_up: LookUp | None = None  # made when the first guess might pay
    done: int = 0  # positions evaluated
    made: list[int] = field(default_factory=list)  # tokens generated here
    began: float = field(default_factory=time.monotonic)
    decode_began: float = 0.0

    leader: tuple[Slot, Generation, int] | None = None  # it evaluates so many leading positions of ours: we wait and copy
    copies: bool = False  # a slot holds so much of the prompt that a copy pays: we wait until there is time for it
    cached_from: str = ""  # where the reused part of the prompt came from: "", "memory" or "disk"

    @property
    def waits(self) -> bool:
        """Whether it has its slot, but its beginning is to come from elsewhere."""
        return self.copies or self.leader is not None

    @property
    def filling(self) -> bool:
        """Whether part of the prompt (or of the tokens to replay) is still to be evaluated."""
        return self.done < len(self.ids)


@dataclass
class Slot:
    """One sequence of the KV cache: what it holds and who uses it."""

    seq: int
    cached: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    canonical: int = 0  # leading positions evaluated as part of a long prompt (blocks.py)
    generation: Generation | None = None
    last_used: float = 0.0


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Return how many leading ids are equal."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _rows_of(seqs: set[int]) -> int:
    """Return in how many rows without a gap these sequences are."""
    return sum(seq - 1 not in seqs for seq in seqs)


def prompt_too_long(tokens: int, context_tokens: int, *, counted: bool = True) -> PromptTooLong:
    """Return the error of a prompt of so many tokens, or of at least so many where nobody has ``counted`` them."""
    known: dict[str, int] = {"prompt_tokens": tokens} if counted else {"prompt_tokens_at_least": tokens}
    return PromptTooLong(
        f"prompt: {'' if counted else 'at least '}{tokens} tokens, the context holds {context_tokens} and one must be left to "
        "generate",
        hint="shorten the prompt or give the worker a larger context_tokens",
        field="prompt",
        context_tokens=context_tokens,
        **known,
    )


class Scheduler:
    """Owns the model's sequences. Single-threaded: all methods are called from the engine's loop."""

    def __init__(
        self, model: Model, slots: int, *, gap_s: float = 0.0, store: PrefixStore | None = None, draft_tokens: int = 0
    ) -> None:
        """``gap_s``: longest pause that prompts make in running streams, as far as the smallest block allows; ``store``:
        prefixes kept on disk; ``draft_tokens``: tokens of a stream guessed and checked in one call."""
        self._draft_tokens = draft_tokens if model.can_be_cut else 0
        self._model, self._blocks = model, model.blocks
        self._gap_s, self._store = gap_s, store
        self._token_s = 0.0  # seconds that a prompt token takes, measured; 0: not yet
        self._decoded = time.monotonic()  # when running streams last got their tokens
        self._filled_since = False  # whether a block was evaluated or a prefix copied since then
        self._prompts_next = False  # whether what is evaluated beside has had the last turn that a gap allows in any case
        self._owed_s = 0.0  # what the next call will do beside: copies
        self._step_s = 0.0  # seconds that the last step took, for a token of each stream
        self._loose = False  # whether there may be gaps among the running sequences that nobody has looked at
        self.drafted = self.accepted = 0  # tokens guessed and evaluated; of them what was drawn anyway
        self._constraints = Constraints(model)
        self._slots = [Slot(i) for i in range(slots)]
        self._waiting: deque[Generation] = deque()
        self._turn = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting) or any(s.generation for s in self._slots)

    @property
    def decodes_only(self) -> bool:
        """Whether the next step is a token for every stream and nothing else: short, and followed by another one."""
        running = [s.generation for s in self._slots if s.generation is not None]
        admits = bool(self._waiting) and len(running) < len(self._slots)
        return bool(running) and not admits and not any(g.filling for g in running)

    def submit(self, request: GenerateRequest) -> list[Event]:
        """Take a request; the answer is ``started`` when it gets a slot at once, ``queued`` when it has to wait, or an error."""
        try:
            generation = self._prepare(request)
            reason = self._ended_elsewhere(generation)
        except RbeeError as e:
            return [("error", request.request_id, e.envelope()["error"])]
        if reason:
            n = len(generation.prompt)
            started: Event = ("started", request.request_id, {"prompt_tokens": n, "cached_tokens": n})
            return [started, self._finished(generation, reason)]
        self._waiting.append(generation)
        events = [*self._admit(), *self._catch_up()]
        if ("started", request.request_id) not in [(kind, owner) for kind, owner, _ in events]:
            events.append(("queued", request.request_id, None))
        return events

    def _prepare(self, request: GenerateRequest) -> Generation:
        model = self._model
        if not model.causal:
            raise InvalidRequest("this model gives embeddings alone, it generates no text", hint="POST /v1/embeddings")
        if bad := [i for i in request.generated_ids if not 0 <= i < model.n_vocab]:
            raise InvalidRequest(
                f"continue_from.generated_ids: {bad[0]} is no token of this model, which has {model.n_vocab}",
                field="continue_from.generated_ids",
            )
        if bad := [i for i in request.params.logit_bias if i >= model.n_vocab]:
            raise InvalidRequest(f"logit_bias: {bad[0]} is no token of this model, which has {model.n_vocab}", field="logit_bias")
        prompt = request.prompt_ids
        if prompt is None:
            prompt = model.tokenize(request.text, parse_special=request.parse_special, add_bos=request.add_bos)
        if not prompt:
            raise InvalidRequest("prompt: it has no tokens", field="prompt")
        if len(prompt) + 1 > model.context_tokens:
            raise prompt_too_long(len(prompt), model.context_tokens)
        if bad := [i for i in request.prompt_ids or () if not 0 <= i < model.n_vocab]:
            raise InvalidRequest(f"prompt_ids: {bad[0]} is no token of this model, which has {model.n_vocab}", field="prompt_ids")
        text = TextAssembler(request.params.stop)
        for token in request.generated_ids:
            text.push(model.piece(token))
        constraint = self._constraints.of(request.params)
        for n, token in enumerate(request.generated_ids if constraint is not None else ()):
            if constraint is None or not constraint.allows(token):
                raise InvalidRequest(
                    f"continue_from.generated_ids: token {n} is not what the grammar allows",
                    field="continue_from.generated_ids",
                )
            constraint.accept(token)
        ids = np.array(prompt + request.generated_ids, np.int32)
        return Generation(request, ids[: len(prompt)], ids, text, len(request.generated_ids), constraint)

    def _ended_elsewhere(self, generation: Generation) -> str | None:
        """Why a continuation has nothing left to generate: the other worker went away between its last token and its end.

        Raises PromptTooLong where that one had a larger context: another worker can go on, this one can not.
        """
        ids, params = generation.request.generated_ids, generation.request.params
        if not ids:
            return None
        if generation.text.stopped:
            return STOP_SEQUENCE
        ended = generation.constraint is not None and generation.constraint.must_end
        if ended or (self._model.is_eog(ids[-1]) and not params.ignore_eos):
            return EOS
        if generation.generated >= params.max_tokens:
            return MAX_TOKENS
        if len(generation.ids) > self._model.context_tokens:
            raise PromptTooLong(
                f"continue_from: prompt and generated ids are {len(generation.ids)} tokens, the context holds "
                f"{self._model.context_tokens}",
                hint="continue it at a worker with a larger context_tokens",
                field="continue_from.generated_ids",
                prompt_tokens=len(generation.ids),
                context_tokens=self._model.context_tokens,
            )
        return None

    def cancel(self, request_id: str) -> list[Event]:
        """End a request between two calls to llama.cpp; unknown ids are ignored (it has just ended)."""
        for generation in self._waiting:
            if generation.request.request_id == request_id:
                self._waiting.remove(generation)
                return [self._finished(generation, CANCELLED)]
        for slot in self._slots:
            if slot.generation and slot.generation.request.request_id == request_id:
                return [self._release(slot, slot.generation, CANCELLED), *self._admit()]
        return []

    def step(self, give_out: Callable[[list[Event]], None]) -> None:
        """Make one call to llama.cpp: a token for every running stream, or a block of one prompt.

        ``give_out`` is called with what is there before the call, and with what it brought.
        """
        if events := [*self._admit(), *self._catch_up()]:
            give_out(events)
        running = [(s, s.generation) for s in self._slots if s.generation is not None]
        decoding = [(s, g) for s, g in running if not g.filling]
        self._prepare_grammars(bool(decoding))
        filling = [(s, g) for s, g in running if g.filling and not g.waits and self._may_draw(g)]
        if filling:
            slot, generation = self._next_to_fill(filling)
            total = len(generation.ids)
            end = self._blocks.end(generation.done, len(generation.prompt), total, self._wanted(bool(decoding)))
            gap_s = self._gap_s
            if end == total and self._burst(decoding):
                gap_s *= _BURST_GAPS
            if not decoding or not self._filled_since or self._has_time_for((end - generation.done) * self._token_s, gap_s):
                events = self._fill(slot, generation, end)
                self._owed_s, self._prompts_next = 0.0, False
                # The first streams to run have just got a token: their gap begins here.
                self._filled_since = bool(decoding)
                if not decoding:
                    self._decoded = time.monotonic()
                if events:
                    give_out(events)
                return
        if decoding:
            if self._loose and len(decoding) == len(running) > 1:
                decoding = self._closed_ranks(decoding)
            guesses = self._guesses(decoding) if self._draft_tokens and len(decoding) == len(running) else None
            events = self._decode(decoding, guesses)
            self._decoded, self._filled_since, self._owed_s = time.monotonic(), False, 0.0
            give_out(events)

    def spare(self, least: int, token_s: float) -> int | None:
        """Return how many tokens may be evaluated beside the streams now (embeddings), at ``token_s`` seconds each; None: any
        number, since no stream waits for its next token.

        They share with prompts: what the gap has room for, and where it has none ``least`` in every other gap.
        """
        running = [s.generation for s in self._slots if s.generation is not None]
        if all(g.filling for g in running):
            return None
        if self._prompts_next and any(g.filling for g in running):
            return 0
        left_s = self._gap_s - (time.monotonic() - self._decoded) - self._owed_s
        fitting = int(left_s / token_s) if token_s else 0
        if fitting < least and self._filled_since:
            return 0
        self._filled_since = self._prompts_next = True
        return max(fitting, least)

    def _prepare_grammars(self, decoding: bool) -> None:
        """Go on with what the first grammar needs: all of it takes longer than running streams may wait."""
        part_s = self._gap_s * _VOCABULARY_GAPS
        if decoding and self._filled_since and not self._has_time_for(part_s, self._gap_s):
            return
        until = time.monotonic() + part_s
        while self._constraints.prepare(_VOCABULARY_STEPS) and time.monotonic() < until:
            pass

    def _may_draw(self, generation: Generation) -> bool:
        """Whether what its grammar needs is there: made for all grammars once, a part in each step, so that no stream waits."""
        return generation.constraint is None or self._constraints.prepared

    def _wanted(self, decoding: bool) -> int | None:
        """Return how many tokens fill the gap, where streams wait and the pace is known."""
        return int(self._gap_s / self._token_s) if decoding and self._token_s else None

    @staticmethod
    def _burst(decoding: list[tuple[Slot, Generation]]) -> bool:
        """Whether none of the running streams has a second token yet."""
        return all(g.generated == 1 for _, g in decoding)

    def _has_time_for(self, seconds: float, gap_s: float) -> bool:
        return time.monotonic() - self._decoded + self._owed_s + seconds <= gap_s

    # --- admission and prefix reuse ---------------------------------------------------------------------------

    def _admit(self) -> list[Event]:
        events: list[Event] = []
        while self._waiting and (free := [s for s in self._slots if s.generation is None]):
            events += self._place(self._waiting.popleft(), free)
        return events

    def _reusable(self, slot: Slot, prompt: NDArray[np.int32]) -> int:
        common = common_prefix(slot.cached, prompt)
        share = self._blocks.reusable(common, len(prompt), evaluated_as_prompt=slot.canonical)
        return share if self._whole_or_cut(share, len(slot.cached)) else 0

    def _whole_or_cut(self, share: int, held: int) -> bool:
        """Whether ``share`` of ``held`` positions can be had: of recurrent layers' state all or nothing."""
        return share == held or not self._model.recurrent

    def _place(self, generation: Generation, free: list[Slot]) -> list[Event]:
        """Give a slot and what a cache has of the prompt.

        The free slot that shares most is taken as it is when that costs its cache little; else the least recently used
        one gets what is on disk, or a copy, also from a slot that is busy: in `_catch_up`, when there is time for it.
        """
        prompt = generation.prompt
        oldest = min(free, key=lambda s: s.last_used)
        generation.cached_from = "memory"
        if restored := self._restore(prompt, oldest):
            slot, keep, generation.cached_from = oldest, restored, "disk"
        else:  # now, and not before: what could not be restored has emptied its slot
            shares = {s.seq: self._reusable(s, prompt) for s in self._slots}
            slot = max(free, key=lambda s: (shares[s.seq], -s.last_used))
            keep = shares[slot.seq]
            spoils = len(slot.cached) - keep > keep  # more would be lost than is used
            if keep and spoils and oldest is not slot and self._model.can_be_cut:
                slot, keep = oldest, shares[oldest.seq]
            donor = max(self._slots, key=lambda s: shares[s.seq])
            if donor is not slot and self._pays(len(donor.cached), shares[donor.seq] - keep):
                slot, keep, generation.copies = oldest, shares[oldest.seq], True
            slot = self._beside(generation, free, slot, shares)
            keep = shares[slot.seq]
        self._keep(slot, generation, self._model.cut(slot.seq, keep))
        slot.generation, generation.began, self._loose = generation, time.monotonic(), True
        request = generation.request
        generation.sampler = Sampler(self._model, request.params, prompt.tolist(), request.generated_ids, generation.constraint)
        generation.leader = self._leader_for(slot, generation)
        return [] if generation.waits else [self._started(generation)]

    def _beside(self, generation: Generation, free: list[Slot], chosen: Slot, shares: dict[int, int]) -> Slot:
        """Return the slot that leaves the fewest gaps among the running sequences, of those with about as much of the prompt as
        the chosen one. What else it holds moves to that one, which would have lost its own.

        llama.cpp makes one pass over the weights for each row of sequences without a gap in their numbers: eight streams
        in 0 and 2 to 8 took 25 ms a token where 0 to 7 take 14, in 0, 2, 4 ... 14 even 47.
        """
        alike = [s for s in free if shares[s.seq] > shares[chosen.seq] - _WORTH_COPYING]
        left = generation.request.params.max_tokens - generation.generated
        slot = min(
            (s for s in alike if s is chosen or self._movable(s, shares, left)), key=lambda s: (self._rows(s), s.last_used)
        )
        if self._rows(slot) == self._rows(chosen):
            return chosen
        if self._loses(slot, shares):
            self._owed_s += self._model.copy(slot.seq, chosen.seq, len(slot.cached))
            self._filled_since, self._prompts_next = True, False
            chosen.cached, chosen.canonical, chosen.last_used = slot.cached, slot.canonical, slot.last_used
        return slot

    @staticmethod
    def _loses(slot: Slot, shares: dict[int, int]) -> bool:
        """Whether the slot holds more beyond its share of a prompt than is evaluated as quickly as moved."""
        return len(slot.cached) - shares[slot.seq] >= _WORTH_COPYING

    def _movable(self, slot: Slot, shares: dict[int, int], left: int) -> bool:
        """Whether what the slot would lose can be moved in less time than a stream of ``left`` tokens gains by its place."""
        if not self._loses(slot, shares):
            return True
        held = len(slot.cached)
        quick = self._model.copy_s(held) <= _WORTH_COPYING * self._token_s
        return quick and left >= _WORTH_MOVING and self._model.can_be_cut and self._may_copy(held)

    def _rows(self, slot: Slot) -> int:
        """Return in how many rows of sequences without a gap the running ones would be with one more in ``slot``."""
        return _rows_of({s.seq for s in self._slots if s.generation is not None} | {slot.seq})

    def _closed_ranks(self, decoding: list[tuple[Slot, Generation]]) -> list[tuple[Slot, Generation]]:
        """Move one running stream into a gap that ended ones have left, where that pays for all; return who runs where.

        It changes places with what the free slot holds, so that no cache is lost.
        """
        model, now = self._model, {slot.seq for slot, _ in decoding}
        rows, free = _rows_of(now), [s for s in self._slots if s.generation is None]
        if rows < 2 or not free or not model.can_be_cut:
            self._loose = False
            return decoding
        # What they will really be given nobody knows: half of what they may have.
        left = min(min(g.request.params.max_tokens - g.generated, model.context_tokens - g.done) for _, g in decoding) / 2
        moves = []
        for n, (slot, g) in enumerate(decoding):
            for gap in free:
                cost_s = model.exchange_s(g.done, len(gap.cached))
                after = _rows_of(now - {slot.seq} | {gap.seq}) if cost_s <= self._gap_s else rows
                if cost_s < self._step_s * (1 - after / rows) * left:
                    moves.append((after, cost_s, n, gap))
        if not moves:
            self._loose = not (self._step_s and model.state_settled)  # else it can not be told yet
            return decoding
        _, cost_s, n, gap = min(moves, key=lambda move: move[:3])
        if not self._has_time_for(cost_s, self._gap_s):  # in the next gap
            return decoding
        slot, generation = decoding[n]
        moved, kept = model.exchange(slot.seq, gap.seq)
        if not kept:
            gap.cached, gap.canonical = gap.cached[:0], 0
        if not moved:
            self._loose = False
            return decoding
        slot.cached, gap.cached = gap.cached, slot.cached
        slot.canonical, gap.canonical = gap.canonical, slot.canonical
        slot.last_used, gap.last_used = gap.last_used, slot.last_used
        slot.generation, gap.generation = None, generation
        return [(s, s.generation) for s in self._slots if s.generation is not None]

    def _pays(self, held: int, gained: int) -> bool:
        """Whether copying a sequence of ``held`` positions takes less time than evaluating the ``gained`` ones of them.

        Either way gives the same bits (blocks.py), so time may decide.
        """
        if gained < _WORTH_COPYING or not self._model.can_be_cut:
            return False
        return not self._token_s or self._model.copy_s(held) <= gained * self._token_s

    def _keep(self, slot: Slot, generation: Generation, keep: int) -> None:
        """Note that the slot holds the first ``keep`` tokens of the prompt and nothing else."""
        prompt = generation.prompt
        slot.cached, slot.canonical = prompt[:keep], self._blocks.canonical(keep, len(prompt))
        generation.done = keep

    @staticmethod
    def _started(generation: Generation) -> Event:
        source = generation.cached_from if generation.done else ""
        facts = {"prompt_tokens": len(generation.prompt), "cached_tokens": generation.done, "cached_from": source}
        return "started", generation.request.request_id, facts

    def _leader_for(self, slot: Slot, generation: Generation) -> tuple[Slot, Generation, int] | None:
        """Return who is about to evaluate more of the same beginning than is cached anywhere, and how much of it."""
        best: tuple[Slot, Generation, int] | None = None
        least = generation.done + _WORTH_COPYING
        for other in self._slots:
            busy = other.generation
            if other is slot or busy is None or not busy.filling:
                continue
            common = common_prefix(busy.ids, generation.prompt)
            canonical = self._blocks.canonical(len(busy.prompt), len(busy.prompt))
            share = self._blocks.reusable(common, len(generation.prompt), evaluated_as_prompt=canonical)
            if share >= least and self._pays(share, share - generation.done):
                best, least = (other, busy, share), share + 1
        return best

    def _catch_up(self) -> list[Event]:
        """Give those who wait for a prefix a copy of it: when it is evaluated, or as much as there is when that has ended early.

        As many copies are made in one gap of the running streams as fit into it, and one in any case.
        """
        events: list[Event] = []
        for slot in self._slots:
            generation = slot.generation
            if generation is None or not generation.waits:
                continue
            if generation.leader is not None:
                other, leader, share = generation.leader
                if other.generation is leader and leader.filling and leader.done < share:
                    continue
                generation.leader, generation.copies = None, True
            donor = max((s for s in self._slots if s is not slot), key=lambda s: self._reusable(s, generation.prompt))
            share = self._reusable(donor, generation.prompt)
            if self._pays(len(donor.cached), share - generation.done):
                if not self._may_copy(len(donor.cached)):
                    continue
                self._owed_s += self._model.copy(donor.seq, slot.seq, len(donor.cached))
                self._filled_since, self._prompts_next = True, False
                self._keep(slot, generation, self._model.cut(slot.seq, share))
            generation.copies = False
            events.append(self._started(generation))
        return events

    def _may_copy(self, held: int) -> bool:
        decoding = [(s, s.generation) for s in self._slots if s.generation is not None and not s.generation.filling]
        if not decoding or not self._filled_since:
            return True
        return self._has_time_for(self._model.copy_s(held), self._gap_s * (_BURST_GAPS if self._burst(decoding) else 1))

    # --- prefixes on disk ---------------------------------------------------------------------------------------

    def _restore(self, prompt: NDArray[np.int32], slot: Slot) -> int:
        """Read the prefix that shares most into a slot, if that is much more than is warm; return how much it shares.

        0 where nothing is, or nothing of it could be read: the slot may be empty then.
        """
        store, model = self._store, self._model
        if store is None or not model.state_settled:
            return 0
        while fitting := [e for e in store.entries if len(e.tokens) <= model.context_tokens]:
            share, entry = max(((self._stored_share(e, prompt), e) for e in fitting), key=lambda pair: pair[0])
            if share - max(self._reusable(s, prompt) for s in self._slots) < _WORTH_STORING:
                return 0
            state = store.load(entry)
            if state is None:  # it is not among the entries any more
                continue
            slot.cached, slot.canonical = slot.cached[:0], 0
            if model.load_state(slot.seq, state):
                return share
            store.drop(entry, "llama.cpp refused it")
        return 0

    def _stored_share(self, entry: StoredPrefix, prompt: NDArray[np.int32]) -> int:
        common = common_prefix(entry.tokens, prompt)
        share = self._blocks.reusable(common, len(prompt), evaluated_as_prompt=entry.canonical)
        return share if self._whole_or_cut(share, len(entry.tokens)) else 0

    def park(self) -> None:
        """Write what the slots hold to disk, for the next process: the part that it could reuse. Nothing runs any more."""
        store = self._store
        if store is None or not self._model.state_settled:
            return
        kept: list[NDArray[np.int32]] = []
        for slot in sorted(self._slots, key=lambda s: -len(s.cached)):
            # Where two kernels make different bits only what was evaluated as a prompt is ever reused.
            usable = min(len(slot.cached), slot.canonical) if self._blocks.kind == "tiled" else len(slot.cached)
            tokens = slot.cached[:usable]
            if usable < _WORTH_STORING or any(common_prefix(k, tokens) == usable for k in kept):
                continue
            kept.append(tokens)
            known = [e for e in store.entries if common_prefix(e.tokens, tokens) == usable]
            if known:
                store.touch(known[0])
            elif self._model.cut(slot.seq, usable) == usable and (state := self._model.save_state(slot.seq)):
                store.save(tokens, min(slot.canonical, usable), state)
        store.shrink()

    # --- one step -----------------------------------------------------------------------------------------------

    def _next_to_fill(self, filling: list[tuple[Slot, Generation]]) -> tuple[Slot, Generation]:
        """Shortest rest first: most get their first token soonest; now and then the longest wait, so that none starves."""
        self._turn += 1
        if self._turn % _FAIR_TURN == 0:
            return min(filling, key=lambda pair: pair[1].began)
        rest = {id(g): len(g.ids) - g.done for _, g in filling}
        for slot in self._slots:  # whoever waits for a prompt is as near to its first token as what is left of both
            if slot.generation is not None and slot.generation.leader is not None:
                leader = slot.generation.leader[1]
                if id(leader) in rest:
                    rest[id(leader)] = min(rest[id(leader)], len(slot.generation.ids) - leader.done)
        return min(filling, key=lambda pair: (rest[id(pair[1])], pair[1].began))

    def _fill(self, slot: Slot, generation: Generation, end: int) -> list[Event]:
        """Evaluate a prompt (or tokens generated elsewhere) up to ``end``; its last block gives the first token."""
        start, total, began = generation.done, len(generation.ids), time.monotonic()
        owner = generation.request.request_id
        code = self._model.prefill(generation.ids[start:end], start, slot.seq, owner, logits=end == total)
        if code == _INTERRUPTED:  # its cancellation is the next message
            generation.done = self._model.cut(slot.seq, start)
            slot.cached, slot.canonical = slot.cached[: generation.done], min(slot.canonical, generation.done)
            return []
        if code != 0:
            return self._failed([(slot, generation)], code)
        # A token alone takes several times as long as one of a block; a call that copies as well says nothing.
        if end - start >= _WORTH_COPYING and not self._owed_s:
            pace = (time.monotonic() - began) / (end - start)
            self._token_s = pace if not self._token_s else 0.7 * self._token_s + 0.3 * pace
        generation.done = end
        slot.cached = generation.ids[:end]
        slot.canonical = self._blocks.canonical(end, len(generation.prompt))
        if end < total:
            return []
        generation.decode_began = time.monotonic()
        return self._give_out(slot, generation, -1)

    def _decode(self, decoding: list[tuple[Slot, Generation]], guesses: list[list[int]] | None) -> list[Event]:
        """Evaluate the last token of each stream and what may follow it; keep as many guesses as are what is drawn anyway.

        Each token is drawn once, from the logits of the tokens before it: guessing changes no stream.
        """
        began, each = time.monotonic(), 1
        if guesses is None:
            rows = [(g.made[-1], g.done, s.seq) for s, g in decoding]
        else:
            each += max(map(len, guesses))
            rows = []
            for (slot, g), more in zip(decoding, guesses, strict=True):
                # A stream without a guess has rows that are evaluated for nothing: the others' would else be a call of their own.
                tokens = [g.made[-1], *(more or g.made[-1:] * (each - 1))]
                rows += [(token, g.done + i, slot.seq) for i, token in enumerate(tokens)]
        if (code := self._model.decode_step(rows)) != 0:
            return self._failed(decoding, code)
        if not self._owed_s:
            self._step_s = (time.monotonic() - began) / each
        events: list[Event] = []
        for n, (slot, generation) in enumerate(decoding):
            more, evaluated = guesses[n] if guesses else [], generation.done + each
            for row in range(each):
                generation.done += 1
                events += self._give_out(slot, generation, n * each + row)
                if slot.generation is None or row == len(more) or generation.made[-1] != more[row]:
                    break
                self.accepted += 1
            if generation.done < evaluated:
                self._model.cut(slot.seq, generation.done)
        return events

    def _guesses(self, decoding: list[tuple[Slot, Generation]]) -> list[list[int]] | None:
        """Return what may follow the last token of each stream, as many tokens for each that has a guess; None where guessing
        would not pay."""
        if len(decoding) > DRAFT_ROWS // 2:
            return None
        texts = []
        for _, g in decoding:
            if g.look_up is None:
                g.look_up = LookUp(np.concatenate([g.ids, np.array(g.made, np.int32)]))
            texts.append(g.look_up)
        room = self._model.context_tokens - max(g.done for _, g in decoding)
        count = rows_each(texts, min(1 + self._draft_tokens, room), self._model.row_costs) - 1
        if not count:
            return None
        guesses = [text.guesses(count) for text in texts]
        self.drafted += sum(map(len, guesses))
        return guesses

    def _give_out(self, slot: Slot, generation: Generation, row: int) -> list[Event]:
        """Sample from row ``row``, give out the token, and end the stream where it must end."""
        if generation.sampler is None:
            raise EngineBroken("a generation without a sampler holds a slot")
        request, text, index = generation.request, generation.text, generation.generated
        try:
            token, logprobs = generation.sampler.choose(row)
        except RbeeError as e:  # of the request, not of the engine: what the cache holds is as good as before
            self._release(slot, generation, ERROR)
            return [("error", request.request_id, e.envelope()["error"])]
        if self._model.is_eog(token):
            tail: list[Event] = []
            if held := text.flush():
                generation.generated += 1
                tail = [("token", request.request_id, (index, token, held, logprobs))]
            return [*tail, self._release(slot, generation, EOS)]
        generation.generated += 1
        generation.made.append(token)
        if generation.look_up is not None:
            generation.look_up.add(token)
        certain, reason = text.push(self._model.piece(token)), None
        if text.stopped:
            reason = STOP_SEQUENCE
        elif generation.sampler.must_end:
            reason = EOS
            certain += text.flush()
        elif generation.generated >= request.params.max_tokens or generation.done >= self._model.context_tokens:
            reason = MAX_TOKENS
            certain += text.flush()
        events: list[Event] = [("token", request.request_id, (index, token, certain, logprobs))]
        return [*events, self._release(slot, generation, reason)] if reason else events

    # --- endings ------------------------------------------------------------------------------------------------

    def _release(self, slot: Slot, generation: Generation, reason: str) -> Event:
        """Free the slot; its cache stays for whoever shares the beginning."""
        self._loose = True
        slot.generation, slot.last_used = None, time.monotonic()
        slot.cached = np.concatenate([generation.ids, np.array(generation.made, np.int32)])[: generation.done]
        if generation.constraint is not None:
            self._constraints.tidy()
        return self._finished(generation, reason)

    @staticmethod
    def _finished(generation: Generation, reason: str) -> Event:
        if generation.sampler is not None:
            generation.sampler.close()
        now = time.monotonic()
        decode_began = generation.decode_began or now
        return (
            "finished",
            generation.request.request_id,
            {
                "stop_reason": reason,
                "tokens_out": generation.generated,
                "prompt_ms": (decode_began - generation.began) * 1000,
                "decode_ms": (now - decode_began) * 1000,
                "stop_sequence": generation.text.stopped_by if reason == STOP_SEQUENCE else None,
            },
        )

    def _failed(self, running: list[tuple[Slot, Generation]], code: int) -> list[Event]:
        """llama_decode refused: end these streams with an error and forget what their sequences held."""
        if code < -1:
            raise EngineBroken(f"llama_decode returned {code}")
        error = InferenceFailed(f"llama_decode returned {code}", llama_code=code).envelope()["error"]
        events: list[Event] = []
        for slot, generation in running:
            self._release(slot, generation, ERROR)
            slot.cached, slot.canonical = slot.cached[:0], 0
            self._model.cut(slot.seq, 0)
            events.append(("error", generation.request.request_id, error))
        return events
