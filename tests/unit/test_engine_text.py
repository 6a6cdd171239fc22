"""Text from token bytes: whole characters, no part of a stop string, whatever the cuts."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from rbee_serve.worker.engine.text import TextAssembler


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut ``data`` at the given places."""
    places = sorted({c % (len(data) + 1) for c in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def assemble(parts: list[bytes], stops: list[str]) -> tuple[str, bool]:
    assembler = TextAssembler(stops)
    text = "".join(assembler.push(p) for p in parts)
    return (text if assembler.stopped else text + assembler.flush()), assembler.stopped


def longest_stop(rest: str, stops: list[str]) -> str:
    """The stop string with which ``rest`` begins that is complete first."""
    return min((s for s in stops if rest.startswith(s)), key=len)


def first_stop(text: str, stops: list[str]) -> str | None:
    """The text before the stop string that is complete first, found one character after the other."""
    for end in range(len(text) + 1):
        ends = [s for s in stops if text[:end].endswith(s)]
        if ends:
            return text[: end - max(map(len, ends))]
    return None


cuts = st.lists(st.integers(0, 200), max_size=30)
small = st.text(alphabet="ab é🐝", max_size=30)


@given(st.text(max_size=60), cuts)
def test_text_is_the_same_however_bytes_are_cut(text: str, where: list[int]) -> None:
    assert assemble(pieces(text.encode(), where), []) == (text, False)


@given(st.text(max_size=20), cuts)
def test_text_gives_no_half_characters(text: str, where: list[int]) -> None:
    assembler = TextAssembler()
    given_out = ""
    for piece in pieces(text.encode(), where):
        given_out += assembler.push(piece)
        assert text.startswith(given_out)


@given(st.binary(max_size=40), cuts)
def test_text_of_invalid_bytes_does_not_depend_on_cuts(data: bytes, where: list[int]) -> None:
    assert assemble(pieces(data, where), []) == assemble([data], [])


@given(small, st.lists(st.text(alphabet="ab é🐝", min_size=1, max_size=4), min_size=1, max_size=4), cuts)
@example("xabc", ["abc", "b"], [1, 2, 3])
def test_stop_strings_end_the_text_exactly(text: str, stops: list[str], where: list[int]) -> None:
    expected = first_stop(text, stops)
    assert assemble(pieces(text.encode(), where), stops) == ((text, False) if expected is None else (expected, True))
    assembler = TextAssembler(stops)
    for piece in pieces(text.encode(), where):
        assembler.push(piece)
    assert assembler.stopped_by == (None if expected is None else longest_stop(text[len(expected) :], stops))


@given(small, st.lists(st.text(alphabet="ab é🐝", min_size=1, max_size=4), min_size=1, max_size=4), cuts)
def test_no_part_of_a_stop_string_comes_out_early(text: str, stops: list[str], where: list[int]) -> None:
    """At any moment, what has come out is a prefix of what would come out if the text ended there and nothing more came."""
    assembler = TextAssembler(stops)
    final, _ = assemble([text.encode()], stops)
    given_out = ""
    for piece in pieces(text.encode(), where):
        given_out += assembler.push(piece)
        assert final.startswith(given_out)


def test_held_text_comes_with_flush() -> None:
    assembler = TextAssembler(["END!"])
    assert assembler.push(b"the E") == "the "
    assert assembler.push(b"ND") == ""
    assert assembler.flush() == "END"


def test_character_that_never_became_whole_is_left_out() -> None:
    assembler = TextAssembler()
    assert assembler.push("ab🐝".encode()[:-1]) == "ab"
    assert assembler.flush() == ""
