"""Embeddings without llama.cpp: how many tokens a call has, how vectors are sent, and what errors mean."""

from __future__ import annotations

import base64
import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rbee_serve.contract.errors import InferenceFailed, InvalidRequest
from rbee_serve.worker.engine.embedding import FLOATS_MAX, Embedder, pieces
from rbee_serve.worker.engine.scheduler import EngineBroken
from rbee_serve.worker.engine.wire import pack

INT32_P = ctypes.POINTER(ctypes.c_int32)
WIDTH = 2


class LlamaBatch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", INT32_P),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", INT32_P),
        ("n_seq_id", INT32_P),
        ("seq_id", ctypes.POINTER(INT32_P)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Llama:
    """The calls that an Embedder makes; every token's vector is (token, 1)."""

    llama_batch = LlamaBatch

    def __init__(self) -> None:
        self.code = 0
        self.width = WIDTH
        self.calls: list[int] = []  # tokens of each

    def llama_context_default_params(self) -> Any:
        return SimpleNamespace()

    def llama_init_from_model(self, model: Any, params: Any) -> int:
        return 1

    def llama_get_memory(self, ctx: int) -> None:
        return None

    def llama_model_n_embd(self, model: Any) -> int:
        return self.width

    def llama_decode(self, ctx: int, batch: LlamaBatch) -> int:
        self.calls.append(batch.n_tokens)
        self._rows = np.array([(batch.token[n], 1) for n in range(batch.n_tokens)], np.float32)
        return self.code

    def llama_get_embeddings(self, ctx: int) -> Any:
        return self._rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def embedder(ll: Llama) -> Embedder:
    model: Any = SimpleNamespace(
        ll=ll, model=1, causal=True, context_tokens=512, n_vocab=100, threads=1, blocks=SimpleNamespace(capacity=191),
        header=SimpleNamespace(values={}, architecture="llama"), config=SimpleNamespace(backend="cpu"),
        apply_adapters=lambda ctx: None,
    )  # fmt: skip
    return Embedder(model)


def test_embedding_evaluates_no_more_than_it_is_allowed_and_gives_the_same() -> None:
    texts = [list(range(90)), [7] * 300, [3]]
    vectors = []
    for limit in (None, 32, 50):
        ll = Llama()
        one = embedder(ll)
        one.submit(1, texts)
        answers: list[Any] = []
        while one.has_work:
            answers += one.step(limit)
            assert (len(answers) > 0) == (len(ll.calls) * (limit or 191) >= 90), "vectors go as soon as they are there"
        assert {number for number, _ in answers} == {1}
        assert answers.pop()[1] == {"answer": {"tokens": [90, 300, 1]}}
        assert max(ll.calls) == (limit or 191)
        assert sum(ll.calls) == 391
        assert one.token_s > 0
        data = b"".join(base64.b64decode(part["vectors"]) for _, part in answers)
        order = [i for _, part in answers for i in part["of"]]
        assert sorted(order) == [0, 1, 2]
        vectors.append({i: data[n * 4 * WIDTH : (n + 1) * 4 * WIDTH] for n, i in enumerate(order)})
    assert vectors[0] == vectors[1] == vectors[2]


def test_vectors_go_in_messages_of_bounded_size() -> None:
    """A message holds some vectors, one in any case, and says whose they are."""
    for width, together in ((4096, 4), (60_000, 1)):
        vectors = [(2 * i, np.full(width, i, "<f4").tobytes()) for i in range(10)]
        sent = list(pieces(vectors))
        assert [len(part["of"]) for part in sent] == [together] * (10 // together) + [10 % together] * (10 % together > 0)
        assert all(len(pack(part | {"number": 1})) < max(90_000, width * 4 * 1.4) for part in sent)
        data = b"".join(base64.b64decode(part["vectors"]) for part in sent)
        assert [i for part in sent for i in part["of"]] == [i for i, _ in vectors]
        assert data == b"".join(vector for _, vector in vectors)


def test_a_request_may_ask_for_so_many_numbers() -> None:
    ll = Llama()
    one = embedder(ll)
    ll.width = FLOATS_MAX // 4
    assert len(one.tokens([[1]] * 4)) == 4
    with pytest.raises(InvalidRequest, match=r"5 inputs give 5 vectors of 2097152 numbers.*: 4 inputs of this model") as e:
        one.tokens([[1]] * 5)
    assert e.value.details == {"field": "input", "got": 5, "limit": 4}


def test_embedding_errors_of_the_request_are_its_own_and_others_end_the_engine() -> None:
    ll = Llama()
    one = embedder(ll)
    one.submit(1, [[1, 2, 3]])
    ll.code = 1
    ((number, error),) = one.step()
    assert number == 1
    assert isinstance(error, InferenceFailed)
    assert not one.has_work
    one.submit(2, [[1, 2, 3]])
    ll.code = -3
    with pytest.raises(EngineBroken, match="returned -3"):
        one.step()
