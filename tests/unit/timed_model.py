"""A stand-in for llama.Model whose calls take their time by a clock of their own, and write down what they were."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbee_serve.worker.engine.blocks import Blocks
from rbee_serve.worker.engine.lookup import row_costs
from rbee_serve.worker.engine.protocol import GenerateRequest
from rbee_serve.worker.engine.scheduler import Scheduler

TOKEN_S, STEP_S, GAP_S = 0.001, 0.04, 0.25


class Clock:
    """Seconds that only the model's calls let pass."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Model:
    """llama.Model's place: every call takes its time and is written down, every token is the same."""

    n_vocab, context_tokens = 8, 4096
    causal = can_be_cut = state_settled = True
    row_costs = row_costs("cpu", {2})
    recurrent = False
    copying_s = 0.01  # of any sequence, within the next call
    ll = None  # greedy tokens ask llama.cpp for nothing

    def __init__(self, clock: Clock) -> None:
        self.blocks = Blocks(128, two_kernels=True)
        self.calls: list[tuple[str, int]] = []  # ("prompt", tokens) or ("tokens", streams)
        self.began: list[float] = []
        self.ended: list[float] = []
        self.copied: list[tuple[int, int]] = []  # from, to
        self.holds: dict[int, int] = {}  # positions of each sequence
        self.owed_s = 0.0
        self._clock = clock

    def took(self, kind: str, size: int, seconds: float) -> int:
        self.calls.append((kind, size))
        self.began.append(self._clock.now)
        self._clock.now += seconds + self.owed_s
        self.ended.append(self._clock.now)
        self.owed_s = 0.0
        return 0

    def prefill(self, tokens: NDArray[np.int32], start: int, seq: int, owner: str, *, logits: bool) -> int:
        assert self.holds.get(seq, 0) == start, "a position is missing before those that are evaluated"
        self.holds[seq] = start + len(tokens)
        return self.took("prompt", len(tokens), TOKEN_S * len(tokens))

    def decode_step(self, rows: list[tuple[int, int, int]]) -> int:
        self.rows = rows
        for _, position, seq in rows:
            assert self.holds[seq] == position
            self.holds[seq] += 1
        return self.took("tokens", len(rows), STEP_S)

    def logits(self, index: int) -> NDArray[np.float32]:
        return np.arange(self.n_vocab, dtype=np.float32)

    def best(self, index: int) -> int:
        return int(self.logits(index).argmax())

    def cut(self, seq: int, keep: int) -> int:
        self.kept = keep
        if self.holds.get(seq, 0) < keep or (self.recurrent and self.holds.get(seq, 0) != keep):
            self.holds[seq] = 0
        else:
            self.holds[seq] = keep
        return self.holds[seq]

    def copy_s(self, held: int) -> float:
        return self.copying_s

    def copy(self, source: int, target: int, held: int) -> float:
        self.copied.append((source, target))
        self.holds[target] = self.holds[source]
        self.owed_s += self.copying_s
        return self.copying_s

    def exchange_s(self, first_held: int, second_held: int) -> float:
        return math.inf

    def load_state(self, seq: int, state: memoryview) -> bool:
        self.holds[seq] = len(state)
        if bytes(state[:1]) == b"!":
            self.holds[seq] = 0
        return bool(self.holds[seq])

    def piece(self, token: int) -> bytes:
        return b"x"

    def is_eog(self, token: int) -> bool:
        return False


def asked(name: str, length: int, first: int, answer: int = 50) -> GenerateRequest:
    """A greedy request whose prompt shares nothing with others that begin with another token."""
    params: Any = SimpleNamespace(
        max_tokens=answer, temperature=0.0, seed=0, stop=[], ignore_eos=False, repetition_penalty=1.0, presence_penalty=0.0,
        frequency_penalty=0.0, logit_bias={}, logprobs=None, typical_p=1.0, top_k=0, top_p=1.0, min_p=0.0, grammar=None,
        json_schema=None,
    )  # fmt: skip
    return GenerateRequest(name, "", parse_special=False, add_bos=False, params=params, prompt_ids=[first] * length)


def run(engine: Scheduler, steps: int) -> None:
    for _ in range(steps):
        engine.step(lambda events: None)
