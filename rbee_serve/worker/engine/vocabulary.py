"""From texts to token ids, and what can be said of a text before: how many tokens it has at least, and where it may be cut.

Any thread may use this while others compute: ctypes gives the interpreter's lock away for the call, a vocabulary does not change
once it is loaded, and llama.cpp keeps all state of a call in the call (llama-vocab.cpp: ``tokenize`` is const, and makes its
session itself; tables of unicode.cpp are made once, as C++ makes statics, and then only read).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_IDS = ctypes.POINTER(ctypes.c_int32)
#: Tokenizers (``tokenizer.ggml.model``) that leave out nothing of a text, and treat what follows a special token as a beginning.
_SPM, _BPE = "llama", "gpt2"
#: Begins characters that stand for no byte (`byte_characters`), and the blank of vocabularies that have texts as they are.
_RAW = b"\xe2"
# enum llama_token_attr
_UNKNOWN, _NORMAL, _CONTROL, _USER_DEFINED, _STRIPS = 1, 4, 8, 16, 128 | 256
#: What C's isspace() knows: special tokens that strip swallow any number of it.
_SPACES = b" \t\n\v\f\r"
#: Special tokens in a part of a text, about. llama.cpp counts from the beginning of its list for each one that it finds: 240 kB
#: of ``<|im_start|>`` took 0.7 s, 1 MB 10.5 s.
_PART_SPECIALS = 2048
#: A text of so many bytes is worth `Facts`: what is shorter takes about as long at most.
LONG_BYTES = 65536


@dataclass(frozen=True)
class Facts:
    """What takes a look at each token (30 ms for 50 000), so is known only once it is asked for.

    ``longest``: bytes of a text that one token stands for, at most; 0: not known. ``uncounted``: bytes that may vanish.
    ``cuts``: special tokens after which a text may be cut; the second: where control tokens are not parsed.
    """

    longest: int
    uncounted: bytes
    cuts: tuple[list[bytes], list[bytes]]


class Vocabulary:
    """The tokenizer of a loaded model; ``kind``: ``tokenizer.ggml.model``."""

    def __init__(self, ll: Any, handle: Any, kind: object) -> None:
        self._ll, self._handle, self._kind = ll, handle, kind

    def tokenize(self, data: bytes, *, parse_special: bool, add_bos: bool) -> NDArray[np.int32]:
        """Return the token ids of a text, in one call."""
        room = len(data) + 8
        for _ in range(2):
            buffer = np.empty(room, np.int32)
            n = self._ll.llama_tokenize(self._handle, data, len(data), buffer.ctypes.data_as(_IDS), room, add_bos, parse_special)
            if n >= 0:
                return buffer[:n]
            room = -n
        raise RuntimeError("llama_tokenize asked for more room twice")

    def tokenize_long(self, data: bytes, *, parse_special: bool, add_bos: bool) -> NDArray[np.int32]:
        """Return the same, in a time that grows no faster than the text does."""
        if len(data) < LONG_BYTES:
            return self.tokenize(data, parse_special=parse_special, add_bos=add_bos)
        ids, first = [], True
        for part in self._parts(data, parse_special=parse_special, add_special=add_bos):
            ids.append(self.tokenize(part, parse_special=parse_special, add_bos=add_bos and first))
            first = False
        return np.concatenate(ids)

    def at_least(self, data: bytes) -> int:
        """Return how many tokens a text has at least, without tokenizing it; 0 where that would not pay."""
        if len(data) < LONG_BYTES or not (facts := self.facts).longest:
            return 0
        counted = len(data.translate(None, facts.uncounted)) if facts.uncounted else len(data)
        return -(-counted // facts.longest)

    def _parts(self, data: bytes, *, parse_special: bool, add_special: bool) -> list[bytes]:
        """Cut a text behind special tokens, so that the parts' ids are the whole's."""
        if add_special and self._ll.llama_vocab_get_add_eos(self._handle):
            return [data]  # the first part would get it
        parts, cuts = [data], self.facts.cuts[not parse_special]
        for text in cuts:
            if text in data:
                every = max(1, _PART_SPECIALS // len(cuts))
                parts = [piece for part in parts for piece in cut_behind(part, text, every)]
        return parts

    @functools.cached_property
    def facts(self) -> Facts:
        """What is to be known of a long text's tokens."""
        if self._kind not in (_SPM, _BPE):
            return Facts(0, b"", ([], []))
        longest, special, user_defined, strips = 0, [], [], False
        characters: set[bytes] = set()
        for text, attributes in self._tokens():
            if not text:  # not what it is: C strings end at a zero
                return Facts(0, b"", ([], []))
            encoded = self._kind == _BPE and attributes & _NORMAL  # a character for each byte
            if encoded and _RAW in text:  # or not: such vocabularies lose what they have no token for
                return Facts(0, b"", ([], []))
            if len(text) > longest:
                longest = max(longest, len(text.decode("utf-8", "replace")) if encoded else len(text))
            if len(text) <= 2:
                characters.add(text)
            if attributes & (_CONTROL | _USER_DEFINED | _UNKNOWN):
                special.append(text)
                if not attributes & (_CONTROL | _UNKNOWN):
                    user_defined.append(text)
            strips = strips or bool(attributes & _STRIPS)
        lost = bytes(b for b, c in byte_characters().items() if c.encode() not in characters) if self._kind == _BPE else b""
        if strips:
            return Facts(longest, lost + _SPACES, ([], []))
        apart = standing_apart(special)
        return Facts(longest, lost, ([t for t in special if t in apart], [t for t in user_defined if t in apart]))

    def _tokens(self) -> Iterator[tuple[bytes, int]]:
        ll, handle = self._ll, self._handle
        for token in range(ll.llama_vocab_n_tokens(handle)):
            yield ll.llama_vocab_get_text(handle, token), ll.llama_vocab_get_attr(handle, token)


def cut_behind(data: bytes, text: bytes, every: int) -> list[bytes]:
    """Cut ``data`` behind each ``every``-th occurrence of ``text``."""
    between = data.split(text)
    full = (len(between) - 1) // every
    parts = [text.join(between[i * every : (i + 1) * every]) + text for i in range(full)]
    rest = text.join(between[full * every :])
    return [*parts, rest] if rest else parts


def standing_apart(special: list[bytes]) -> set[bytes]:
    """Return the special tokens that no other occurrence of one can overlap, its own included.

    llama.cpp then finds each of their occurrences, in whatever order it looks for them: a cut behind one changes nothing. Of two
    occurrences that overlap, one begins within the other, or both begin at the same place.
    """
    begins = {text[0] for text in special}
    within = {byte for text in special for byte in text[1:]}
    found = {text for text in special if text[0] not in within and begins.isdisjoint(text[1:])}
    return {text for text in found if not any(t != text and (t.startswith(text) or text.startswith(t)) for t in special)}


def byte_characters() -> dict[int, str]:
    """Return the character that stands for each byte in vocabularies of this kind: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
