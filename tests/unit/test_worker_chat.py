"""Chat templates: rendered as their model expects, sandboxed, and refusals that say why."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from rbee_serve.contract.api import ChatMessage
from rbee_serve.contract.errors import InvalidRequest
from rbee_serve.worker.chat import ChatTemplate, Clock

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def template(source: str | None) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def said(content: object = "Hi", role: str = "user", **more: object) -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": content} | more)


def test_prompt_ends_where_the_answer_begins() -> None:
    prompt = template(CHATML).render([said("Be kind.", "system"), said("Hi")])

    assert prompt == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]

    assert template("{{ messages[0].content }}").render([said(parts)]) == "one two"


def test_tokens_and_helpers_are_there_and_blocks_are_trimmed() -> None:
    source = "{{ bos_token }}{{ eos_token }}\n{% if true %}\n  x{% endif %}{{ {'a': '<ä>'} | tojson }}{{ strftime_now('%%') }}"

    assert template(source).render([said()]) == '<s></s>\n  x{"a": "<ä>"}%'


def test_the_time_that_a_template_sees_can_be_told_and_is_noted() -> None:
    source = "{% macro day() %}{{ strftime_now('%d %b %Y, %H:%M %z') }}{% endmacro %}{{ day() }}"
    clock = Clock(datetime.fromisoformat("2026-12-31T23:59:59.5+13:45"))

    assert template(source).render([said()], clock=clock) == "31 Dec 2026, 23:59 +1345"
    assert clock.was_read
    assert clock.at.isoformat() == "2026-12-31T23:59:59.500000+13:45"


def test_a_template_that_does_not_ask_for_the_time_is_not_said_to() -> None:
    clock = Clock()
    template(CHATML).render([said()], clock=clock)

    assert not clock.was_read


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Chatham", "America/St_Johns"])
def test_now_comes_out_the_same_where_it_is_told_on(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        here = Clock()
    finally:
        monkeypatch.undo()
        time.tzset()

    assert Clock(datetime.fromisoformat(here.at.isoformat())).strftime("%c %f %z %Z") == here.strftime("%c %f %z %Z")


def test_loop_controls_work() -> None:
    assert template("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}").render([said("a"), said("b")]) == "a"


def test_rendered_text_says_whether_it_begins_with_bos() -> None:
    assert template("{{ bos_token }}x").begins_with_bos("<s>x")
    assert not template("x").begins_with_bos("x<s>")
    assert not ChatTemplate("x", bos_token="", eos_token="").begins_with_bos("x")


def test_refusal_of_the_template_is_passed_on() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as e:
        template("{{ raise_exception('roles must alternate') }}").render([said()])
    assert e.value.details["field"] == "messages"


@pytest.mark.parametrize(
    "source",
    [
        None,
        "",
        "{% if %}",
        "{{ undefined.attribute }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content | nonsense }}",
    ],
)
def test_template_that_is_missing_broken_or_up_to_something_is_a_400(source: str | None) -> None:
    with pytest.raises(InvalidRequest) as e:
        template(source).render([said()])
    assert e.value.details["field"] == "messages"


@pytest.mark.parametrize(
    "content", [[{"type": "image_url", "image_url": {}}], [{"type": "text"}], [{"type": "text", "text": "\ud800"}]]
)
def test_content_that_is_no_text_is_a_400(content: list[dict[str, object]]) -> None:
    with pytest.raises(InvalidRequest):
        template(CHATML).render([said(content)])
