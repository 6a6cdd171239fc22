"""OpenAI's Responses: requests as we take them, and what they become. Nothing is stored, so nothing can be referred to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from rbee_serve.contract.api import PROMPT_MAX_CHARS, InferenceRequest, TolerantMessage, parse
from rbee_serve.contract.errors import InvalidRequest

#: What we would have to ignore, and the values with which ignoring it changes nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "store": (False,),
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "include": ([],),
    "reasoning": ({},),
    "truncation": ("disabled",),
    "prompt": (),
    "max_tool_calls": (),
    "top_logprobs": (0,),
    "context_management": ([],),
}


class ResponsesTool(TolerantMessage):
    """A function of the client's own; OpenAI's built-in tools are not here."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(TolerantMessage):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(TolerantMessage):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(TolerantMessage):
    """OpenAI's ``text``."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(TolerantMessage):
    """``POST /v1/responses``."""

    model: str = Field(min_length=1, max_length=200)
    input: (
        Annotated[str, Field(min_length=1, max_length=PROMPT_MAX_CHARS)]
        | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1024)]
    )
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    tools: list[ResponsesTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None


def to_inference(request: ResponsesRequest, *, fits: int) -> InferenceRequest:
    """Return the native request; ``fits``: tokens to ask for when no limit is named."""
    limit = request.max_output_tokens
    values: dict[str, Any] = {
        "model": request.model,
        "messages": _messages(request),
        "max_tokens": fits if limit is None else limit,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "json_schema": _constraint(request.text),
        "stream": bool(request.stream),
    }
    if request.tools and request.tool_choice != "none":
        if values["json_schema"] is not None:
            raise InvalidRequest("text.format: not together with tools, whose calls have another form", field="text")
        values["tools"] = [{"type": "function", "function": t.model_dump(exclude={"type"})} for t in request.tools]
    if isinstance(request.tool_choice, NamedFunction):
        values["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice.name}}
    elif request.tools or request.tool_choice == "required":
        values["tool_choice"] = request.tool_choice
    return parse(InferenceRequest, values)


def _constraint(text: TextConfig | None) -> dict[str, Any] | None:
    if text is None or text.format is None or text.format.type == "text":
        return None
    if text.format.type == "json_object":
        return {"type": "object"}
    if text.format.schema_ is None:
        raise InvalidRequest("text.format.schema: required with the type json_schema", field="text.format.schema")
    return text.format.schema_


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the input as chat messages: instructions first, calls with the assistant's turn that they belong to."""
    found: list[dict[str, Any]] = []
    if request.instructions:
        found.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*found, {"role": "user", "content": request.input}]
    for number, item in enumerate(request.input):
        field = f"input.{number}"
        kind = item.get("type", "message")
        if kind == "message":
            role = item.get("role")
            if role not in ("user", "assistant", "system", "developer"):
                raise InvalidRequest(f"{field}.role: user, assistant, system or developer expected", field=f"{field}.role")
            message = {"role": "system" if role == "developer" else role, "content": _text(item.get("content"), field)}
            if message["role"] == "system" and len(found) == 1 and found[0]["role"] == "system":
                found[0]["content"] += "\n\n" + message["content"]  # templates know one at most
            else:
                found.append(message)
        elif kind == "function_call":
            if not isinstance(item.get("name"), str):
                raise InvalidRequest(f"{field}.name: the name of the function expected", field=f"{field}.name")
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            function = {"name": item["name"], "arguments": str(item.get("arguments", "{}"))}
            call = {"id": str(item.get("call_id")), "type": "function", "function": function}
            found[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = _text(item.get("output"), field)
            found.append({"role": "tool", "content": content, "tool_call_id": str(item.get("call_id"))})
        else:
            raise InvalidRequest(f"{field}.type: {str(kind)[:64]!r} is not supported here", field=f"{field}.type")
    return found


def _text(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{field}.content: a text or a list of text parts expected", field=f"{field}.content")
    for part in content:
        known = isinstance(part, dict) and part.get("type") in ("input_text", "output_text", "text")
        if not known or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{field}.content: only text parts are supported", field=f"{field}.content")
    return "".join(part["text"] for part in content)
