"""Messages to prompt text, by the chat template that the GGUF file brings.

Templates come from strangers together with the weights, so they run in Jinja's sandbox, with the environment that
Hugging Face's ``apply_chat_template`` gives them: trimmed blocks, loop controls, ``raise_exception``, ``strftime_now``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rbee_serve.contract.api import ChatMessage, Function, NamedTool, Tool
from rbee_serve.contract.errors import InvalidRequest
from rbee_serve.contract.tools import HERMES, LLAMA3, MISTRAL

#: What a model is told whose template knows no tools (the form of NousResearch's Hermes models).
_OFFER = """You may call functions to help with the user's request. These are their signatures:
<tools>
{tools}
</tools>
To call one, write its name and arguments as a JSON object within tags and nothing else:
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>"""


class TemplateRefusedError(TemplateError):
    """The template itself called ``raise_exception``: it says what is wrong with the messages."""


def _refuse(message: str) -> NoReturn:
    raise TemplateRefusedError(message)


class Clock:
    """The time that a template sees, stopped: another worker that is told it renders the same prompt."""

    def __init__(self, at: datetime | None = None) -> None:
        """``at`` None: now, in this machine's zone."""
        at = at or datetime.now().astimezone()
        # A zone without a name: a name does not travel.
        self.at = at.replace(tzinfo=timezone(at.utcoffset() or timedelta()))
        self.was_read = False

    def strftime(self, fmt: str) -> str:
        """Return the time in the form that the template wants."""
        self.was_read = True
        return self.at.strftime(fmt)


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
            "bos_token": bos_token,
            "eos_token": eos_token,
        }
        self._broken: str | None = None
        self._knows_tools = False
        try:
            self._template = environment.from_string(source) if source else None
            self._knows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source or ""))
        except TemplateSyntaxError as e:
            self._template, self._broken = None, f"line {e.lineno}: {e.message}"

    @property
    def knows_tools(self) -> bool:
        """Whether the template renders tools itself."""
        return self._knows_tools

    @property
    def tool_format(self) -> str:
        """How the model is expected to write tool calls (contract.tools)."""
        source = self._source or ""
        if not self._knows_tools or "<tool_call>" in source:
            return HERMES
        if "[TOOL_CALLS]" in source:
            return MISTRAL
        return LLAMA3 if "python_tag" in source or '"parameters"' in source else HERMES

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] | None = None, clock: Clock | None = None) -> str:
        """Return the prompt, ending where the assistant's answer begins.

        ``tools``: rendered by the template where it knows tools, else told in a system message in hermes' form.
        ``clock``: what the template's ``strftime_now`` reads, none: one that is made here.
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
            offered = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools or ()]
            if not self._knows_tools:
                turns = in_words(turns, offered)
            given = {
                "tools": offered if offered and self._knows_tools else None,
                "strftime_now": (clock or Clock()).strftime,
            }
            text = self._template.render(messages=turns, add_generation_prompt=True, **given)
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
    turn = message.model_dump(exclude_none=True, include={"role", "name", "tool_calls", "tool_call_id"}) | {"content": text}
    if message.tool_calls:
        turn["tool_calls"] = [_past_call(call) for call in message.tool_calls]
    return turn


def _past_call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call of the history as templates expect it: its arguments are an object, no text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest("messages.tool_calls: each needs function.name and function.arguments", field="messages.tool_calls")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments or "{}")
    return {"type": "function"} | call | {"function": function | {"arguments": arguments if arguments is not None else {}}}


def in_words(turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the turns for a template that knows no tools: offers, calls and results written into their texts."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        calls, role, content = turn.get("tool_calls"), turn["role"], turn["content"]
        if calls:
            said = [
                "<tool_call>\n"
                + _tojson({"name": c["function"]["name"], "arguments": c["function"]["arguments"]})
                + "\n</tool_call>"
                for c in calls
            ]
            content = "\n".join([content, *said] if content else said)
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            if found and found[-1].get("_result"):
                found[-1]["content"] += "\n" + content
                continue
            found.append({"role": role, "content": content, "_result": True})
            continue
        found.append({k: v for k, v in turn.items() if k not in ("tool_calls", "tool_call_id")} | {"content": content})
    if tools:
        offer = _OFFER.format(tools="\n".join(_tojson(tool) for tool in tools))
        if found and found[0]["role"] == "system":
            found[0]["content"] += "\n\n" + offer
        else:
            found.insert(0, {"role": "system", "content": offer})
    for turn in found:
        turn.pop("_result", None)
    return found


def forced_call(tools: Sequence[Tool], choice: str | NamedTool | None) -> dict[str, Any] | None:
    """Return the JSON schema of the one call that the answer must be; None where the model may choose.

    Raises InvalidRequest for a choice that was not offered.
    """
    if choice is None or choice in ("auto", "none"):
        return None
    wanted = [tool.function for tool in tools]
    if isinstance(choice, NamedTool):
        wanted = [function for function in wanted if function.name == choice.function.name]
        if not wanted:
            raise InvalidRequest(f"tool_choice: no tool {choice.function.name!r} among tools", field="tool_choice")
    shared: dict[str, Any] = {}
    calls = [_call_schema(function, shared) for function in wanted]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return schema | shared


def _call_schema(function: Function, shared: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(function.parameters or {"type": "object", "properties": {}})
    arguments.setdefault("type", "object")
    for key in ("$defs", "definitions"):  # references count from the root
        for name, definition in arguments.pop(key, {}).items():
            if shared.setdefault(key, {}).setdefault(name, definition) != definition:
                raise InvalidRequest(f"tools: two of them define {key}/{name} differently", field="tools")
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
