"""SSE encoder and parser: whatever the text holds, it comes back whole (SPEC 3.5 "sentinel safety")."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from rbee_serve.contract import events

texts = st.text() | st.sampled_from(["[DONE]", "data: [DONE]\n\n", "failed:", "\r\n", "\x1b[31m", "🐝", "\u2028"])


@given(st.lists(texts, max_size=8), st.data())
def test_events_survive_any_text_and_any_cut_of_the_byte_stream(parts: list[str], data: st.DataObject) -> None:
    stream = events.PING + b"".join(events.encode(events.token(t, i, i)) for i, t in enumerate(parts)) + events.DONE
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    parser = events.SseParser()

    got = [p for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) for p in parser.feed(stream[a:b])]

    assert got[-1] == "[DONE]"
    assert [json.loads(p)["t"] for p in got[:-1]] == parts
    assert got.count("[DONE]") == 1


def test_an_event_is_one_event_line_and_one_data_line() -> None:
    assert events.encode(events.token("Once", 0, 5)) == b'event: token\ndata: {"type":"token","t":"Once","i":0,"id":5}\n\n'
