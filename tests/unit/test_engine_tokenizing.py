"""Long texts: how many tokens they have at least, where they may be cut, and who waits for the thread that tokenizes them."""

from __future__ import annotations

import queue
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_serve.contract.errors import InvalidRequest
from rbee_serve.worker.engine.tokenizing import IN_LOOP_BYTES, Message, Tokenizing, size
from rbee_serve.worker.engine.vocabulary import LONG_BYTES, Vocabulary, byte_characters, cut_behind, standing_apart

NORMAL, CONTROL, USER_DEFINED, RSTRIP = 4, 8, 16, 256
LONG = "x" * (IN_LOOP_BYTES + 1)


# --- what is known before ---------------------------------------------------------------------------------------


class Tokens:
    """llama.cpp's view of a vocabulary."""

    def __init__(self, tokens: list[tuple[str, int]]) -> None:
        self._tokens = tokens
        self.looked = 0

    def llama_vocab_n_tokens(self, vocab: Any) -> int:
        return len(self._tokens)

    def llama_vocab_get_text(self, vocab: Any, token: int) -> bytes:
        self.looked += 1
        return self._tokens[token][0].encode()

    def llama_vocab_get_attr(self, vocab: Any, token: int) -> int:
        return self._tokens[token][1]


BYTES = [(c, NORMAL) for c in byte_characters().values()]


@pytest.mark.parametrize(
    ("kind", "tokens", "least"),
    [
        ("gpt2", [*BYTES, ("Ġ" * 16, NORMAL)], LONG_BYTES // 16),
        ("gpt2", [*BYTES, ("Ġ" * 16, USER_DEFINED)], LONG_BYTES // 32),
        ("gpt2", [*(b for b in BYTES if b[0] != "Ġ"), ("abcd", NORMAL)], 0),
        ("gpt2", [*BYTES, ("abcd", NORMAL), ("<end>", CONTROL | RSTRIP)], 0),
        ("gpt2", [*BYTES, ("▁abcd", NORMAL)], 0),
        ("gpt2", [*BYTES, ("", CONTROL)], 0),
        ("llama", [("▁▁", NORMAL), ("a", NORMAL)], -(-LONG_BYTES // 6)),
        ("bert", [("▁a", NORMAL)], 0),
    ],
    ids=["characters are bytes", "spelled as it is", "no token", "stripped", "raw", "not known", "spm", "drops what it likes"],
)
def test_a_text_of_spaces_has_so_many_tokens_at_least(kind: str, tokens: list[tuple[str, int]], least: int) -> None:
    assert Vocabulary(Tokens(tokens), 1, kind).at_least(b" " * LONG_BYTES) == least


def test_the_vocabulary_is_looked_at_once_and_only_for_a_long_text() -> None:
    tokens = Tokens(BYTES)
    vocabulary = Vocabulary(tokens, 1, "gpt2")
    assert vocabulary.at_least(b"a" * (LONG_BYTES - 1)) == tokens.looked == 0
    assert [vocabulary.at_least(b"a" * LONG_BYTES) for _ in range(2)] == [LONG_BYTES] * 2
    assert tokens.looked == len(BYTES)


@given(st.text("ab<>", max_size=60), st.sampled_from(["<a>", "a", "ab"]), st.integers(1, 5))
def test_a_text_is_cut_behind_every_so_many_tokens_and_nothing_is_lost(text: str, token: str, every: int) -> None:
    data, cut = text.encode(), token.encode()
    parts = cut_behind(data, cut, every)
    assert b"".join(parts) == data
    assert b"" not in parts
    assert all(part.endswith(cut) and part.count(cut) == every for part in parts[:-1])
    assert all(part.count(cut) <= every for part in parts[-1:])


def test_tokens_that_another_can_overlap_are_no_place_to_cut() -> None:
    assert standing_apart([b"<|im_start|>", b"<|im_end|>", b"[INST]"]) == {b"<|im_start|>", b"<|im_end|>", b"[INST]"}
    assert standing_apart([b"<s>", b"<s>>", b"<e>"]) == {b"<e>"}, "both begin at the same place"
    assert standing_apart([b"<s>", b"a<s>b", b"[e]"]) == {b"[e]"}, "one is part of the other"
    assert standing_apart([b"<s>", b">>", b"[e]"]) == {b"[e]"}, "one ends as the other begins"
    assert standing_apart([b"\n\n", b"[e]"]) == {b"[e]"}, "it overlaps itself"


# --- who waits --------------------------------------------------------------------------------------------------


class Thread:
    """Tokenizing that goes on one message at a time, when the test lets it."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.begun: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._go = threading.Semaphore(0)
        self.texts = Tokenizing(self._prepare, self.told.put)

    def _prepare(self, message: Message) -> Message:
        self.begun.put(message)
        assert self._go.acquire(timeout=60)
        if "embed" in message:
            return message | {"embed": [np.arange(IN_LOOP_BYTES * 2, dtype=np.int32)]}
        if "tokenize" in message:
            raise InvalidRequest("no such text")
        return {"submit": message["submit"] | {"text": "", "prompt_ids": [1, 2]}}

    def next(self) -> Message | None:
        """What is handled of the next message that the thread has done with."""
        self._go.release()
        return self.texts.ready(self.told.get(timeout=60))


def submit(name: str, text: str = LONG) -> Message:
    return {"submit": {"request_id": name, "text": text, "generated_ids": [7], "prompt_ids": None}}


def test_long_texts_wait_for_one_another_and_hold_up_nobody_else() -> None:
    thread = Thread()
    assert not thread.texts.busy
    assert thread.texts.ready(submit("a")) is None
    assert thread.begun.get(timeout=60) == submit("a")
    assert thread.texts.ready({"embed": [LONG], "number": 1}) is None
    assert thread.texts.ready(submit("b")) is None
    for message in (submit("short", "text"), {"cancel": "a"}, {"tokenize": {"text": "short"}, "number": 2}):
        assert thread.texts.ready(message) is message
    first, second, embedded = thread.next(), thread.next(), thread.next()
    assert first == {"submit": {"request_id": "a", "text": "", "generated_ids": [7], "prompt_ids": [1, 2]}}
    assert embedded is not None
    assert len(embedded["embed"][0]) == IN_LOOP_BYTES * 2, "what was tokenized is not taken for long once more"
    assert second is not None
    assert second["submit"]["request_id"] == "b", "prompts come before questions"
    assert not thread.texts.busy


def test_the_thread_ends_when_there_is_nothing_to_do_and_another_begins() -> None:
    thread, before = Thread(), set(threading.enumerate())
    for _ in range(2):
        assert thread.texts.ready(submit("a")) is None
        (tokenizer,) = set(threading.enumerate()) - before
        assert thread.next() is not None
        tokenizer.join(timeout=60)
        assert not tokenizer.is_alive()


def test_who_is_cancelled_is_told_at_once_and_his_text_is_not_begun() -> None:
    thread = Thread()
    for name in ("working", "waiting", "next"):
        assert thread.texts.ready(submit(name)) is None
    assert thread.begun.get(timeout=60)["submit"]["request_id"] == "working"
    for name in ("waiting", "working"):
        ((kind, request_id, facts),) = thread.texts.cancel(name)
        assert (kind, request_id, facts["stop_reason"], facts["tokens_out"]) == ("finished", name, "CANCELLED", 1)
        assert thread.texts.cancel(name) == []
    assert thread.texts.ready(submit("working")) is None, "the same request once more"
    assert thread.next() is None, "the cancelled one's"
    assert thread.texts.ready(thread.told.get(timeout=60)) is None, "it was not begun"
    following = [thread.next(), thread.next()]
    assert [f["submit"]["request_id"] for f in following if f] == ["next", "working"]
    assert [thread.begun.get(timeout=60)["submit"]["request_id"] for _ in range(2)] == ["next", "working"]
    assert thread.begun.empty()


def test_an_error_of_a_text_is_its_own_and_others_end_the_engine() -> None:
    thread = Thread()
    assert thread.texts.ready({"tokenize": {"text": LONG}, "number": 5}) is None
    told = thread.next()
    assert told is not None
    assert (told["number"], str(told["told"])) == (5, "no such text")

    def refuse(message: Message) -> Message:
        raise InvalidRequest("no") if message["submit"]["request_id"] == "bad" else RuntimeError("broken")

    told_to: queue.SimpleQueue[Message] = queue.SimpleQueue()
    texts = Tokenizing(refuse, told_to.put)
    texts.ready(submit("bad"))
    refused = texts.ready(told_to.get(timeout=60))
    assert refused is not None
    assert (refused["refuse"], refused["error"]["code"]) == ("bad", "INVALID_REQUEST")
    texts.ready(submit("worse"))
    with pytest.raises(RuntimeError, match="broken"):
        texts.ready(told_to.get(timeout=60))


@pytest.mark.parametrize(
    ("message", "counts"),
    [
        (submit("a", "bee"), 3),
        (submit("a", "蜂"), 4),
        ({"submit": {"text": "", "prompt_ids": [1] * 9999}}, 0),
        ({"embed": ["a"] * 200, "number": 1}, 200 * 33),
        ({"embed": [[1, 2, 3]], "number": 1}, 35),
        ({"detokenize": [1], "special": False, "number": 1}, 0),
    ],
)
def test_what_a_message_counts_for(message: Message, counts: int) -> None:
    assert size(message) == counts
