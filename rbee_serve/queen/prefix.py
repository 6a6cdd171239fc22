"""Which worker has seen the beginning of a prompt: its cache then saves that part of the evaluation.

A prompt is cut into blocks of characters (the queen has no tokenizer) and each block's hash includes the one before it, so
equal hashes mean equal beginnings. The index is a guess that costs nothing when it is wrong; a worker that says that it
had less cached corrects it. Memory is bounded: the blocks used least recently are dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from rbee_serve.contract.api import InferenceRequest
from rbee_serve.queen.registry import Worker

#: Characters of a block, about 64 tokens. What is shorter than a block is evaluated in no time.
BLOCK_CHARS = 256
_BLOCKS_MAX = 256  # of one prompt
_OWNERS_MAX = 8  # workers remembered for one block


def chain(request: InferenceRequest) -> list[int]:
    """Return the hashes of the whole blocks with which the prompt begins."""
    if request.messages is None:
        text = request.prompt or ""
    else:
        # Templates put the tools first.
        parts = [repr(request.tools)] if request.tools else []
        length = 0
        for message in request.messages:
            part = f"{message.role}\0{message.content}\0"
            parts.append(part)
            if (length := length + len(part)) > BLOCK_CHARS * _BLOCKS_MAX:
                break
        text = "".join(parts)
    hashes: list[int] = []
    last = hash(request.model)
    for at in range(0, min(len(text), BLOCK_CHARS * _BLOCKS_MAX) - BLOCK_CHARS + 1, BLOCK_CHARS):
        last = hash((last, text[at : at + BLOCK_CHARS]))
        hashes.append(last)
    return hashes


@dataclass(slots=True)
class PrefixIndex:
    """Block hash -> the workers that have evaluated it lately. At most ``blocks_max`` blocks."""

    blocks_max: int = 32_768
    _owners: OrderedDict[int, dict[Worker, None]] = field(default_factory=OrderedDict)

    def match(self, hashes: list[int]) -> dict[Worker, int]:
        """Return, for each worker that has seen the first block, how many blocks it has seen without a gap."""
        found: dict[Worker, int] = {}
        for n, block in enumerate(hashes):
            owners = self._owners.get(block)
            if owners is None:
                break
            if n == 0:
                found = dict.fromkeys(owners, 1)
                continue
            going_on = False
            for worker in owners:
                if found.get(worker) == n:
                    found[worker] = n + 1
                    going_on = True
            if not going_on:
                break
        return found

    def remember(self, hashes: list[int], worker: Worker) -> None:
        """The worker evaluates this prompt."""
        for block in hashes:
            owners = self._owners.get(block)
            if owners is None:
                owners = self._owners[block] = {}
            else:
                self._owners.move_to_end(block)
                owners.pop(worker, None)
            owners[worker] = None
            if len(owners) > _OWNERS_MAX:
                del owners[next(iter(owners))]
        while len(self._owners) > self.blocks_max:
            self._owners.popitem(last=False)

    def forget(self, hashes: list[int], worker: Worker) -> None:
        """The worker has not (any more) what it was thought to have."""
        for block in hashes:
            if (owners := self._owners.get(block)) is not None:
                owners.pop(worker, None)

    def __len__(self) -> int:
        return len(self._owners)


class Expectation:
    """Where one prompt's beginning is thought to be, and whether it was there."""

    def __init__(self, index: PrefixIndex, request: InferenceRequest) -> None:
        self._index, self._chain = index, chain(request)
        self._expected = 0  # blocks, at the worker that got the request last

    def affinity(self) -> dict[Worker, int]:
        """Return how many blocks each worker should have."""
        return self._index.match(self._chain) if self._chain else {}

    def sent(self, worker: Worker) -> None:
        """The worker has taken the request."""
        if self._chain:
            self._expected = self.affinity().get(worker, 0)
            self._index.remember(self._chain, worker)

    def told(self, worker: Worker, cached_tokens: int) -> bool | None:
        """The worker has said what it had; returns whether the guess was right, None where there was none."""
        if not self._expected:
            return None
        if not cached_tokens:
            # Only this prompt is certain to be there soon; what it was thought to have had is gone.
            self._index.forget(self._chain[: self._expected], worker)
            self._index.remember(self._chain, worker)
        return bool(cached_tokens)
