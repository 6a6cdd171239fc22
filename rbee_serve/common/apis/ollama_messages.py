"""Ollama's requests as we take them, and what they become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from rbee_serve.common.apis.embeddings import Inputs
from rbee_serve.common.apis.openai_messages import refuse
from rbee_serve.contract.api import PROMPT_MAX_CHARS, InferenceRequest, TolerantMessage, Tool, parse
from rbee_serve.contract.errors import InvalidRequest
from rbee_serve.contract.sampling import REPETITION_WINDOW

#: option -> our name for it
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
}
#: Ollama's defaults, which its clients count on.
_DEFAULTS: Mapping[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}
#: How a machine computes: of no influence on the answer, and the operator's to say.
_MACHINE = frozenset(
    [
        "numa",
        "num_batch",
        "num_gpu",
        "main_gpu",
        "low_vram",
        "f16_kv",
        "vocab_only",
        "use_mmap",
        "use_mlock",
        "num_thread",
        "num_keep",
        "logits_all",
        "embedding_only",
    ]
)
_UNSUPPORTED_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "mirostat_tau": (5.0, 5),
    "mirostat_eta": (0.1,),
    "tfs_z": (1.0, 1),
    "repeat_last_n": (REPETITION_WINDOW,),
    "penalize_newline": (True,),
}
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "think": (False,),
    "images": ([],),
    "template": ("",),
    "suffix": ("",),
    "context": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "width": (0,),
    "height": (0,),
    "steps": (0,),
}


class _OllamaRequest(TolerantMessage):
    model: str = Field(min_length=1, max_length=200)
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = Field(None, description="accepted; how long a model stays loaded is the operator's to say")


class _GeneratingRequest(_OllamaRequest):
    stream: bool | None = None
    format: str | dict[str, Any] | None = Field(None, description='"json", or a JSON schema')

    def constraint(self) -> dict[str, Any] | None:
        """Return the schema that the text must follow, None for any text."""
        if self.format is None or self.format == "":
            return None
        if isinstance(self.format, dict):
            return self.format
        if self.format != "json":
            raise InvalidRequest('format: "json" or a JSON schema expected', field="format")
        return {"type": "object"}


class OllamaMessage(TolerantMessage):
    """One turn."""

    role: str = Field(min_length=1, max_length=64)
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None


class OllamaChatRequest(_GeneratingRequest):
    """``POST /api/chat``."""

    messages: list[OllamaMessage] = Field(default_factory=list, max_length=1024)
    tools: list[Tool] | None = Field(None, max_length=128)


class OllamaGenerateRequest(_GeneratingRequest):
    """``POST /api/generate``."""

    prompt: str = Field("", max_length=PROMPT_MAX_CHARS)
    system: str | None = None
    raw: bool | None = None


class OllamaEmbedRequest(_OllamaRequest):
    """``POST /api/embed``."""

    input: Inputs
    truncate: bool | None = Field(None, description="texts that are too long are refused, never cut")
    dimensions: int | None = Field(None, ge=1)


class OllamaEmbeddingsRequest(_OllamaRequest):
    """``POST /api/embeddings``, the older one."""

    prompt: str = Field(min_length=1, max_length=1_048_576)


class OllamaShowRequest(TolerantMessage):
    """``POST /api/show``; ``name`` is the older word for ``model``."""

    model: str | None = Field(None, min_length=1, max_length=200)
    name: str | None = Field(None, min_length=1, max_length=200)


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for what would have to be ignored."""
    refuse(body, _UNSUPPORTED)


def sampling(options: Mapping[str, Any] | None, *, fits: int, context_tokens: int | None) -> dict[str, Any]:
    """Return the options as ours, with Ollama's defaults; raises InvalidRequest naming one that we do not have.

    ``fits``: tokens to ask for when no limit is named. ``context_tokens``: what the model's workers have for each stream.
    """
    given = {name: value for name, value in (options or {}).items() if value is not None}
    refuse({f"options.{k}": v for k, v in given.items()}, {f"options.{k}": v for k, v in _UNSUPPORTED_OPTIONS.items()})
    values: dict[str, Any] = dict(_DEFAULTS) | {"max_tokens": fits}
    for name, value in given.items():
        if name in _SAMPLING:
            values[_SAMPLING[name]] = value
        elif name == "num_predict":
            values["max_tokens"] = fits if value == -1 else value
        elif name == "num_ctx":
            if context_tokens is not None and (not isinstance(value, int) or value > context_tokens):
                raise InvalidRequest(
                    f"options.num_ctx: {value} is more than the {context_tokens} tokens that this model's workers have",
                    field="options.num_ctx",
                    expected=context_tokens,
                )
        elif name not in _MACHINE and name not in _UNSUPPORTED_OPTIONS:
            raise InvalidRequest(f"options.{name}: not supported", field=f"options.{name}"[:100])
    if values.get("seed") is not None and isinstance(values["seed"], int) and values["seed"] < 0:
        del values["seed"]  # "draw one"
    return values


def chat_inference(request: OllamaChatRequest, model: str, values: Mapping[str, Any]) -> InferenceRequest:
    """Return the native request of a chat."""
    messages = []
    for turn in request.messages:
        if turn.images:
            raise InvalidRequest("messages.images: not supported", field="messages.images")
        message: dict[str, Any] = {"role": turn.role, "content": turn.content or ""}
        if turn.tool_calls:
            message["tool_calls"] = [_call(call) for call in turn.tool_calls]
        if turn.tool_name:
            message["name"] = turn.tool_name
        messages.append(message)
    body = dict(values) | {"model": model, "messages": messages, "json_schema": request.constraint(), "stream": _streams(request)}
    if request.tools:
        if body["json_schema"] is not None:
            raise InvalidRequest("format: not together with tools: a constrained text leaves no room for calls", field="format")
        body["tools"] = request.tools
    return parse(InferenceRequest, body)


def generate_inference(request: OllamaGenerateRequest, model: str, values: Mapping[str, Any]) -> InferenceRequest:
    """Return the native request of a prompt, which is a user's turn unless it is ``raw``."""
    body = dict(values) | {"model": model, "json_schema": request.constraint(), "stream": _streams(request)}
    if request.raw:
        if request.system:
            raise InvalidRequest("system: not together with raw", field="system")
        return parse(InferenceRequest, body | {"prompt": request.prompt})
    system = [{"role": "system", "content": request.system}] if request.system else []
    return parse(InferenceRequest, body | {"messages": [*system, {"role": "user", "content": request.prompt}]})


def _streams(request: _GeneratingRequest) -> bool:
    return request.stream is not False


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest("messages.tool_calls: each needs function.name and function.arguments", field="messages.tool_calls")
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", "function": {"name": function.get("name"), "arguments": text}}
