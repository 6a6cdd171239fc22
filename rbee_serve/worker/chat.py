"""Messages to prompt text, by the chat template that the GGUF file brings.

Templates come from strangers together with the weights, so they run in Jinja's sandbox, with the environment that
Hugging Face's ``apply_chat_template`` gives them: trimmed blocks, loop controls, ``raise_exception``, ``strftime_now``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rbee_serve.contract.api import ChatMessage
from rbee_serve.contract.errors import InvalidRequest


class TemplateRefusedError(TemplateError):
    """The template itself called ``raise_exception``: it says what is wrong with the messages."""


def _refuse(message: str) -> NoReturn:
    raise TemplateRefusedError(message)


def _now(fmt: str) -> str:
    return datetime.now().astimezone().strftime(fmt)


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which would change what the model reads.
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """The chat template of one model, compiled once."""

    def __init__(self, source: str | None, *, bos_token: str, eos_token: str) -> None:
        """``source`` None: the model has no template, every call of ``render`` is refused."""
        self._source, self._bos = source, bos_token
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": _now,
            "bos_token": bos_token,
            "eos_token": eos_token,
        }
        self._broken: str | None = None
        try:
            self._template = environment.from_string(source) if source else None
        except TemplateSyntaxError as e:
            self._template, self._broken = None, f"line {e.lineno}: {e.message}"

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Return the prompt, ending where the assistant's answer begins.

        Raises InvalidRequest when there is no usable template or the template refuses the messages.
        """
        if self._broken is not None:
            raise InvalidRequest(
                f"messages: the model's chat template can not be used ({self._broken}); send a prompt", field="messages"
            )
        if self._template is None:
            raise InvalidRequest("messages: the model has no chat template; send a prompt instead", field="messages")
        texts = [m.text() for m in messages]
        try:
            turns = [_turn(m, text) for m, text in zip(messages, texts, strict=True)]
            text = self._template.render(messages=turns, add_generation_prompt=True)
            text.encode()  # a lone surrogate in a content part gets this far
            return text
        except TemplateRefusedError as e:
            raise InvalidRequest(f"messages: the model's chat template refuses them: {e.message}", field="messages") from e
        except Exception as e:
            # A template is a program: whatever it trips over are messages that it was not written for.
            raise InvalidRequest(
                f"messages: the model's chat template can not render them ({type(e).__name__})", field="messages"
            ) from e

    def begins_with_bos(self, text: str) -> bool:
        """Say whether ``text`` already has the token that the tokenizer would put first."""
        return bool(self._bos) and text.startswith(self._bos)


def _turn(message: ChatMessage, text: str) -> dict[str, Any]:
    turn = message.model_dump(exclude_none=True, include={"role", "name", "tool_calls", "tool_call_id"})
    return turn | {"content": text}
