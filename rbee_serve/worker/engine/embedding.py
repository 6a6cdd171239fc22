"""Embeddings beside generation: a context of its own, so that streams keep theirs, evaluated a block at a time.

Token vectors are pooled here and not by llama.cpp, which pools what one call holds: a text may so be longer than a block
and a block may hold several texts. Models whose tokens see those after them too (BERT and its like) need a text whole: there
a block holds as many texts as fit, and none in part.
"""

from __future__ import annotations

import base64
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rbee_serve.contract.errors import (
    InferenceFailed,
    InsufficientRam,
    InsufficientVram,
    InvalidRequest,
    PromptTooLong,
    RbeeError,
)
from rbee_serve.worker.engine.batch import Batch
from rbee_serve.worker.engine.scheduler import EngineBroken

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rbee_serve.worker.engine.llama import Model

    #: A text, its ids, or ids that were looked at already.
    Input = str | Sequence[int] | NDArray[np.int32]

#: Texts evaluated in one call at most; llama.cpp reserves something for each.
_SEQUENCES = 16
#: Numbers that the answer to one request may have, all its vectors together: 32 MiB, which the front holds until all are there.
FLOATS_MAX = 1 << 23
#: Vectors go to the front as they are there, in messages of about so many bytes: a large one would hold up all streams.
_PIECE_BYTES = 1 << 16
#: Fewer tokens in a call cost nearly as much as so many.
LEAST_ROWS = 32
# enum llama_pooling_type, as ``<architecture>.pooling_type`` has it.
_UNSPECIFIED, _NONE, _MEAN, _CLS, _LAST = -1, 0, 1, 2, 3


#: To the request of this number: a part of its message, or the error that ends it.
Answer = tuple[int, dict[str, Any] | RbeeError]


def pieces(vectors: list[tuple[int, bytes]]) -> Iterator[dict[str, Any]]:
    """Yield vectors, each with the index of its input, as parts of messages that are all small."""
    size = max(1, _PIECE_BYTES // len(vectors[0][1]))
    for i in range(0, len(vectors), size):
        indices, data = zip(*vectors[i : i + size], strict=True)
        yield {"vectors": base64.b64encode(b"".join(data)).decode(), "of": indices}


@dataclass
class _Job:
    """One request: its texts and what is known of their vectors."""

    number: int
    tokens: list[NDArray[np.int32]]
    left: int  # texts whose vectors are not there yet


@dataclass
class _Text:
    """A text that is being evaluated in sequence ``seq``."""

    job: _Job
    index: int
    seq: int
    done: int = 0
    vector: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def tokens(self) -> NDArray[np.int32]:
        return self.job.tokens[self.index]


class Embedder:
    """All embedding requests of one model. ``step`` advances them by one block; answers go by the request's number."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._ctx: Any = None
        self._waiting: deque[tuple[_Job, int]] = deque()
        self._running: list[_Text] = []
        self._free = list(range(_SEQUENCES))
        self.token_s = 0.0  # seconds that a token takes, measured; 0: not yet

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running)

    def tokens(self, inputs: Sequence[Input]) -> list[NDArray[np.int32]]:
        """Return the ids of each input, texts and ids alike; raises InvalidRequest or PromptTooLong. Thread-safe."""
        width = self._model.ll.llama_model_n_embd(self._model.model)
        if len(inputs) * width > FLOATS_MAX:
            raise InvalidRequest(
                f"input: {len(inputs)} inputs give {len(inputs)} vectors of {width} numbers, a request may ask for {FLOATS_MAX} "
                f"numbers: {FLOATS_MAX // width} inputs of this model",
                hint="send the inputs in several requests",
                field="input",
                got=len(inputs),
                limit=FLOATS_MAX // width,
            )
        return [self._tokens(i, value) for i, value in enumerate(inputs)]

    def submit(self, number: int, inputs: Sequence[Input]) -> None:
        """Take a request: texts, token ids as they are, or what `tokens` made of them.

        Raises InvalidRequest, PromptTooLong, InsufficientRam or InsufficientVram (no room for a second context).
        """
        self._check_possible()
        tokens = self.tokens(inputs)
        if self._ctx is None:
            self._make_context()
        job = _Job(number, tokens, len(tokens))
        self._waiting.extend((job, i) for i in range(len(tokens)))

    def cancel(self, number: int) -> None:
        """Forget a request; unknown numbers are ignored."""
        self._waiting = deque((job, i) for job, i in self._waiting if job.number != number)
        for text in [t for t in self._running if t.job.number == number]:
            self._leave(text)

    def step(self, rows_max: int | None = None) -> list[Answer]:
        """Evaluate one block, of ``rows_max`` tokens at most; return what it brought, by the requests' numbers.

        Vectors come as they are there, then ``{"answer": {"tokens": [int]}}``, or an error alone. Vectors have length one. A
        limit is for causal models alone: the others take a text whole. Raises EngineBroken.
        """
        capacity = self._batch.capacity
        rows, began = self._fill(capacity if rows_max is None else min(rows_max, capacity)), time.monotonic()
        code = self._model.ll.llama_decode(self._ctx, self._batch.struct)
        if code != 0:
            return self._failed(code)
        pointer = self._model.ll.llama_get_embeddings(self._ctx)
        if not pointer:
            return self._failed(code)
        if self._batch.size >= LEAST_ROWS:
            pace = (time.monotonic() - began) / self._batch.size
            self.token_s = pace if not self.token_s else 0.7 * self.token_s + 0.3 * pace
        vectors = np.ctypeslib.as_array(pointer, shape=(self._batch.size, self._size))
        found: dict[int, list[tuple[int, bytes]]] = {}
        completed: list[_Job] = []
        for text, first, count in rows:
            self._pool(text, vectors[first : first + count])
            if text.done == len(text.tokens):
                job = text.job
                found.setdefault(job.number, []).append((text.index, self._unit(text)))
                self._leave(text)
                job.left -= 1
                if not job.left:
                    completed.append(job)
        parts: list[Answer] = [(number, piece) for number, done in found.items() for piece in pieces(done)]
        return [*parts, *((job.number, {"answer": {"tokens": [len(t) for t in job.tokens]}}) for job in completed)]

    # --- preparation --------------------------------------------------------------------------------------------

    def _check_possible(self) -> None:
        header = self._model.header
        pooling = header.values.get(f"{header.architecture}.pooling_type", _UNSPECIFIED)
        if pooling not in (_UNSPECIFIED, _NONE, _MEAN, _CLS, _LAST):
            raise InvalidRequest("input: this model ranks pairs of texts, it gives no embeddings", field="input")
        self._pooling = _MEAN if pooling in (_UNSPECIFIED, _NONE) else pooling

    def _tokens(self, index: int, value: Input) -> NDArray[np.int32]:
        if isinstance(value, np.ndarray):
            return value
        model, name = self._model, f"input.{index}"
        if isinstance(value, str):
            data = value.encode()
            if (least := model.vocabulary.at_least(data)) > model.context_tokens:
                raise self._too_long(name, least, counted=False)
            ids = model.vocabulary.tokenize_long(data, parse_special=False, add_bos=True)
        else:
            ids = np.array(value, np.int64)
        if not len(ids):
            raise InvalidRequest(f"{name}: it has no tokens", field="input")
        if len(ids) > model.context_tokens:
            raise self._too_long(name, len(ids))
        if len(bad := ids[(ids < 0) | (ids >= model.n_vocab)]):
            raise InvalidRequest(f"{name}: {bad[0]} is no token of this model, which has {model.n_vocab}", field="input")
        return ids.astype(np.int32)

    def _too_long(self, name: str, tokens: int, *, counted: bool = True) -> PromptTooLong:
        context_tokens = self._model.context_tokens
        known: dict[str, int] = {"prompt_tokens": tokens} if counted else {"prompt_tokens_at_least": tokens}
        return PromptTooLong(
            f"{name}: {'' if counted else 'at least '}{tokens} tokens, the context holds {context_tokens}",
            hint="split the text or give the worker a larger context_tokens",
            field="input",
            context_tokens=context_tokens,
            **known,
        )

    def _make_context(self) -> None:
        model, ll = self._model, self._model.ll
        params = ll.llama_context_default_params()
        params.n_seq_max = _SEQUENCES
        params.n_ctx = model.context_tokens
        params.n_batch = params.n_ubatch = model.blocks.capacity if model.causal else model.context_tokens
        params.n_threads = params.n_threads_batch = model.threads
        params.embeddings, params.pooling_type = True, _NONE
        params.kv_unified = True  # else each text has a part of the context only
        params.flash_attn_type = 1
        ctx = ll.llama_init_from_model(model.model, params)
        if not ctx:
            error = InsufficientRam if model.config.backend == "cpu" else InsufficientVram
            raise error(
                f"llama.cpp could not make a context of {model.context_tokens} tokens for embeddings: {model.log.reason}",
                hint="fewer slots or a smaller context_tokens leave memory for it",
            )
        model.apply_adapters(ctx)
        self._ctx, self._memory = ctx, ll.llama_get_memory(ctx)
        self._batch = Batch(ll, params.n_batch)
        self._size: int = ll.llama_model_n_embd(model.model)

    # --- one step -----------------------------------------------------------------------------------------------

    def _fill(self, capacity: int) -> list[tuple[_Text, int, int]]:
        """Fill up to ``capacity`` rows of the batch; return (text, first row, rows): what runs goes on, new ones come in while
        there is room."""
        batch, at, rows = self._batch, 0, []
        while self._waiting and self._free and self._has_room(len(self._waiting[0][0].tokens[self._waiting[0][1]])):
            job, index = self._waiting.popleft()
            self._running.append(_Text(job, index, self._free.pop()))
        for text in self._running:
            count = min(len(text.tokens) - text.done, capacity - at)
            if count == 0:
                break
            batch.tokens[at : at + count] = text.tokens[text.done : text.done + count]
            batch.pos[at : at + count] = np.arange(text.done, text.done + count, dtype=np.int32)
            batch.seq[at : at + count] = text.seq
            rows.append((text, at, count))
            at += count
        batch.logits[:at] = 1
        batch.size = at
        return rows

    def _has_room(self, tokens: int) -> bool:
        """Whether a text fits into the context beside those that run, and may begin with the next block."""
        held = sum(len(t.tokens) for t in self._running)
        begun = sum(len(t.tokens) - t.done for t in self._running)
        least = 1 if self._model.causal else tokens
        return held + tokens <= self._model.context_tokens and begun + least <= self._batch.capacity

    def _pool(self, text: _Text, block: NDArray[np.float32]) -> None:
        if self._pooling == _LAST:
            text.vector = block[-1].astype(np.float64)
        elif text.done == 0:
            text.vector = block[0].astype(np.float64) if self._pooling == _CLS else block.sum(axis=0, dtype=np.float64)
        elif self._pooling == _MEAN:
            text.vector = text.vector + block.sum(axis=0, dtype=np.float64)
        text.done += len(block)

    @staticmethod
    def _unit(text: _Text) -> bytes:
        """The length is one, so neither the number of tokens nor a mean's divisor is left in it."""
        length = float(np.linalg.norm(text.vector))
        vector = text.vector / length if length > 0 else text.vector
        return vector.astype("<f4").tobytes()

    def _leave(self, text: _Text) -> None:
        if self._memory:  # encoders keep nothing
            self._model.ll.llama_memory_seq_rm(self._memory, text.seq, -1, -1)
        self._running.remove(text)
        self._free.append(text.seq)

    def _failed(self, code: int) -> list[Answer]:
        if code < -1:
            raise EngineBroken(f"llama_decode returned {code} for embeddings")
        error = InferenceFailed(f"llama_decode returned {code} for embeddings", llama_code=code)
        numbers = {text.job.number for text in self._running}
        for number in numbers:
            self.cancel(number)
        return [(number, error) for number in sorted(numbers)]
