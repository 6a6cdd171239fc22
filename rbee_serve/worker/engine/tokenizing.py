"""Long texts are tokenized in a thread beside the loop, so that no stream waits for it: a megabyte takes up to a second.

What comes of a message goes to the loop as one more message: the same one with token ids in place of its texts, which is then
handled as if the front had sent those, or the answer to it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from rbee_serve.contract.errors import RbeeError
from rbee_serve.worker.engine.scheduler import CANCELLED, Event, prompt_too_long

if TYPE_CHECKING:
    from rbee_serve.worker.engine.embedding import Embedder
    from rbee_serve.worker.engine.llama import Model

Message = dict[str, Any]

#: Texts of so many bytes altogether are tokenized by the loop itself: 3 ms where they are nothing but spaces.
IN_LOOP_BYTES = 4096
#: What an input of many counts for beside its bytes: each is looked at in Python.
_INPUT_BYTES = 32
#: The thread's stack, the first size that can be had; it takes of it what it needs. The pre-tokenizers of some models (Mistral's,
#: DeepSeek's, gpt-oss's) are a std::regex, which goes some 300 bytes deeper for each letter of a word: one of 30 kB ended the
#: process that has 8 MiB.
_STACKS_BYTES = (1 << 30, 256 << 20, 64 << 20, 0)


def size(message: Message) -> int:
    """Return how many bytes of text, or ids, are to be looked at for a message: no fewer than there are."""
    if (request := message.get("submit")) is not None:
        return 0 if request.get("prompt_ids") is not None else _bytes(request["text"])
    if (question := message.get("tokenize")) is not None:
        return _bytes(question["text"])
    if (inputs := message.get("embed")) is not None:
        return sum(_INPUT_BYTES + (_bytes(value) if isinstance(value, str) else len(value)) for value in inputs)
    return 0


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)


def without_texts(message: Message, model: Model, embedder: Embedder) -> Message:
    """Return what takes the place of a message once its texts are tokenized; raises RbeeError. Thread-safe."""
    if (request := message.get("submit")) is not None:
        ids = _prompt_ids(model, request) if model.causal else []
        return {"submit": request | {"text": "", "prompt_ids": ids}}
    if (question := message.get("tokenize")) is not None:
        wanted = {"parse_special": question["parse_special"], "add_bos": question["add_bos"]}
        return {"told": model.vocabulary.tokenize_long(question["text"].encode(), **wanted).tolist(), "number": message["number"]}
    return message | {"embed": embedder.tokens(message["embed"])}


def _prompt_ids(model: Model, request: dict[str, Any]) -> list[int]:
    """Return a prompt's ids; raises PromptTooLong, without tokenizing it where no tokenizer could make it fit."""
    vocabulary, data = model.vocabulary, request["text"].encode()
    if (least := vocabulary.at_least(data)) >= model.context_tokens:
        raise prompt_too_long(least, model.context_tokens, counted=False)
    found = vocabulary.tokenize_long(data, parse_special=request["parse_special"], add_bos=request["add_bos"])
    if len(found) >= model.context_tokens:
        raise prompt_too_long(len(found), model.context_tokens)
    ids: list[int] = found.tolist()
    return ids


@dataclass(eq=False)
class _Job:
    """A message in work; ``key``: who asked, a request's id or a question's number."""

    key: str | int
    message: Message | None  # None: nobody waits for it any more
    result: Message | Exception | None = None
    began: float = field(default_factory=time.monotonic)


_PROMPTS, _QUESTIONS, _END = 0, 1, 2
_Queue = queue.PriorityQueue[tuple[int, int, _Job | None]]


class Tokenizing:
    """The thread and who waits for it: first come, first served, but prompts before questions. All methods are the loop's, and
    none of them waits. The thread ends when there is nothing to do, so that its stack takes no memory."""

    def __init__(self, prepare: Callable[[Message], Message], tell: Callable[[Message], None]) -> None:
        """``prepare`` makes of a message one without texts, in the thread; ``tell`` hands a message to the loop."""
        self._prepare, self._tell = prepare, tell
        self._jobs: dict[str | int, _Job] = {}
        self._queue: _Queue = queue.PriorityQueue()  # of the thread that runs
        self._given, self._left = 0, 0  # jobs, ever and with the thread

    @property
    def busy(self) -> bool:
        """Whether the thread works, perhaps for somebody who does not wait any more."""
        return self._left > 0

    def ready(self, message: Message) -> Message | None:
        """Return what is to be handled now; None: its texts are long, and it comes back, or nobody waits for it any more."""
        job: _Job | None = message.get("tokenized")
        if job is not None:
            return self._result(job)
        if size(message) <= IN_LOOP_BYTES:
            return message
        request = message.get("submit")
        key = request["request_id"] if request is not None else message["number"]
        job = self._jobs[key] = _Job(key, message)
        if not self.busy:
            self._queue = queue.PriorityQueue()
            _start(partial(self._run, self._queue))
        self._given += 1
        self._left += 1
        self._queue.put((_PROMPTS if request is not None else _QUESTIONS, self._given, job))
        return None

    def _result(self, job: _Job) -> Message | None:
        self._left -= 1
        if not self._left:
            self._queue.put((_END, 0, None))
        if self._jobs.get(job.key) is not job:
            return None
        del self._jobs[job.key]
        if isinstance(job.result, RbeeError):
            if isinstance(job.key, str):
                return {"refuse": job.key, "error": job.result.envelope()["error"]}
            return {"told": job.result, "number": job.key}
        if isinstance(job.result, Exception):
            raise job.result
        return job.result

    def cancel(self, key: str | int) -> list[Event]:
        """Forget a request or a question; unknown ones are ignored. The text that is in work is not interrupted."""
        job = self._jobs.pop(key, None)
        message = job.message if job is not None else None
        if job is None or message is None:
            return []
        job.message = None
        if (request := message.get("submit")) is None:
            return []
        facts = {"stop_reason": CANCELLED, "tokens_out": len(request.get("generated_ids", ())), "stop_sequence": None}
        return [
            ("finished", request["request_id"], facts | {"prompt_ms": (time.monotonic() - job.began) * 1000, "decode_ms": 0.0})
        ]

    def _run(self, waiting: _Queue) -> None:
        while (job := waiting.get()[2]) is not None:
            try:
                if (message := job.message) is not None:
                    job.result = self._prepare(message)
            except Exception as e:  # the request's, or the end of the engine: that is for the loop
                job.result = e
            self._tell({"tokenized": job})


def _start(work: Callable[[], None]) -> None:
    for stack in _STACKS_BYTES:
        before = threading.stack_size(stack)
        try:
            threading.Thread(target=work, name="tokenizer", daemon=True).start()
            return
        except RuntimeError:  # no room for such a stack
            if stack == _STACKS_BYTES[-1]:
                raise
        finally:
            threading.stack_size(before)
