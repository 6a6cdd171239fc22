"""OpenAI's request and response shapes, translated from and to ours. Pure; no HTTP here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import orjson

from rbee_serve.contract.api import ChatCompletionRequest, CompletionRequest, InferenceRequest, StopReason, parse
from rbee_serve.contract.errors import InvalidRequest, RbeeError, RequestError

_FINISH = {
    StopReason.EOS: "stop",
    StopReason.STOP_SEQUENCE: "stop",
    StopReason.MAX_TOKENS: "length",
    StopReason.CANCELLED: "stop",
    StopReason.ERROR: "stop",
}

#: OpenAI's own default for the older completions.
COMPLETION_MAX_TOKENS = 16

# What we would have to ignore, and the values with which ignoring it changes nothing. Silence would be a lie.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "audio": (),
    "modalities": (["text"],),
}


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for a parameter that would change the answer and that we do not have."""
    for name, harmless in _UNSUPPORTED.items():
        value = body.get(name)
        # `1 == True` in Python: a logprobs of 0 on completions asks for log probabilities all the same.
        if value is not None and not any(type(value) is type(h) and value == h for h in harmless):
            raise InvalidRequest(f"{name}: not supported", field=name, hint="leave the parameter out")


def to_inference(request: ChatCompletionRequest | CompletionRequest, *, fits: int) -> InferenceRequest:
    """Return the native request. ``fits``: tokens to ask for when a chat request names no limit.

    Parameters that are absent get OpenAI's defaults (temperature 1, top_p 1), not ours.
    """
    sampling = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed", "stop")
        if (value := getattr(request, name)) is not None
    }
    common: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "model": request.model, "stream": request.stream} | sampling
    if isinstance(request, ChatCompletionRequest):
        limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        return parse(InferenceRequest, common | {"messages": request.messages, "max_tokens": fits if limit is None else limit})
    limit = request.max_tokens if request.max_tokens is not None else COMPLETION_MAX_TOKENS
    return parse(InferenceRequest, common | {"prompt": request.prompt, "max_tokens": limit})


def finish_reason(stop_reason: str) -> str:
    """Translate our reason for the end into OpenAI's ``stop`` or ``length``."""
    return _FINISH.get(StopReason(stop_reason), "stop")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's ``usage`` object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(error: RbeeError, correlation_id: str | None) -> dict[str, Any]:
    """Return OpenAI's error object; code, details and correlation id are as on all other routes."""
    body = error.envelope(correlation_id)["error"]
    if error.status == 401:
        kind = "authentication_error"
    elif error.status == 403:
        kind = "permission_error"
    elif isinstance(error, RequestError):
        kind = "invalid_request_error"
    else:
        kind = "server_error"
    return {"error": body | {"type": kind, "param": error.details.get("field")}}


class Shape:
    """Answers of one request, whole or as chunks. Subclasses say what differs between chat and completions."""

    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, request_id: str, model: str, created: int, *, include_usage: bool = False) -> None:
        self._head = {"id": f"{self.prefix}-{request_id}", "created": created, "model": model, "system_fingerprint": None}
        self._include_usage = include_usage
        # The hot path only encodes the text: what stands around it is the same in every chunk.
        self._before, _, self._after = self._chunk([self._delta("\0", None)]).rpartition(orjson.dumps("\0"))

    def _delta(self, text: str | None, finish: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _choice(self, text: str, finish: str) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        body: dict[str, Any] = self._head | {"object": self.chunk_object, "choices": choices}
        if self._include_usage:
            body["usage"] = None
        return b"data: " + orjson.dumps(body | more) + b"\n\n"

    def opening(self) -> bytes:
        """Return what comes before the first token."""
        return b""

    def token(self, text: str) -> bytes:
        """Return the chunk of one piece of text; nothing for a token that has not completed a character yet."""
        return self._before + orjson.dumps(text) + self._after if text else b""

    def closing(self, stop_reason: str, prompt_tokens: int, completion_tokens: int) -> bytes:
        """Return the chunk with the finish reason and, if it was asked for, the one with the usage."""
        last = self._chunk([self._delta(None, finish_reason(stop_reason))])
        if self._include_usage:
            last += self._chunk([], usage=usage(prompt_tokens, completion_tokens))
        return last

    def whole(self, text: str, stop_reason: str, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """Return the answer of a request that was not streamed."""
        choice = self._choice(text, finish_reason(stop_reason))
        return self._head | {
            "object": self.object,
            "choices": [choice],
            "usage": usage(prompt_tokens, completion_tokens),
        }


class ChatShape(Shape):
    """``/v1/chat/completions``."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _delta(self, text: str | None, finish: str | None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}

    def opening(self) -> bytes:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, text: str, finish: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}


class CompletionShape(Shape):
    """``/v1/completions``."""

    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def _delta(self, text: str | None, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish}

    def _choice(self, text: str, finish: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
