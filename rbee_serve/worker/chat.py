"""Chat messages to prompt text, by the model's own Jinja template from its GGUF file."""

from __future__ import annotations

import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rbee_serve.contract.api import ChatMessage
from rbee_serve.contract.errors import InvalidRequest


class _TemplateRefused(Exception):
    """The template itself refused the messages."""


def _refuse(message: str) -> NoReturn:
    raise _TemplateRefused(message)


def _strftime_now(fmt: str) -> str:
    return datetime.datetime.now(datetime.UTC).strftime(fmt)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    # Templates come with models from anywhere: sandboxed, and nothing of ours is within reach.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    return environment.from_string(template)


def render(messages: list[ChatMessage], *, template: str | None, bos_token: str, eos_token: str) -> str:
    """Return the prompt with the header of the assistant's turn at its end.

    Raises InvalidRequest when the model has no template or its template refuses the messages.
    """
    if not template:
        raise InvalidRequest(
            "messages: this model has no chat template", hint="use `prompt` (POST /v1/completions) instead", field="messages"
        )
    turns: list[dict[str, Any]] = [m.model_dump(exclude_none=True) | {"content": m.text()} for m in messages]
    try:
        return _compile(template).render(messages=turns, add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token)
    except (_TemplateRefused, jinja2.TemplateError) as e:
        raise InvalidRequest(f"messages: the model's chat template refused them: {e}", field="messages") from e
