"""OpenAI's request and response shapes, translated from and to ours. Pure; no HTTP here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import orjson

from rbee_serve.common.apis.openai_messages import CHOICES_MAX, ChatCompletionRequest, CompletionRequest
from rbee_serve.common.apis.streams import Answer, Reading
from rbee_serve.common.apis.tool_calls import Arguments, Call
from rbee_serve.contract.api import ChatMessage, InferenceRequest, StopReason, parse
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
_SEEDS = 2**32


def to_inferences(request: ChatCompletionRequest | CompletionRequest, *, fits: int) -> list[InferenceRequest]:
    """Return the native requests: one for each answer, those of one prompt together, their seeds counting up.

    ``fits``: tokens to ask for when a chat request names no limit. Parameters that are absent get OpenAI's defaults
    (temperature 1, top_p 1), not ours.
    """
    sampling = {
        name: value
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed", "stop"),
            "logit_bias",
        )
        if (value := getattr(request, name)) is not None
    }
    common: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "model": request.model, "stream": bool(request.stream)} | sampling
    if request.response_format is not None:
        common["json_schema"] = request.response_format.constraint()
    if isinstance(request, ChatCompletionRequest):
        bases = [common | _chat(request, fits)]
    else:
        limit = request.max_tokens if request.max_tokens is not None else COMPLETION_MAX_TOKENS
        common |= {"max_tokens": limit, "logprobs": request.logprobs}
        bases = [common | ({"prompt": p} if isinstance(p, str) else {"prompt_ids": p}) for p in request.prompts()]
    n = request.n or 1
    if n * len(bases) > CHOICES_MAX:
        raise InvalidRequest(
            f"n: {len(bases)} prompts with {n} answers each are more than {CHOICES_MAX}", field="n", limit=CHOICES_MAX
        )
    return [parse(InferenceRequest, base | _seed(request.seed, k)) for base in bases for k in range(n)]


def _seed(seed: int | None, k: int) -> dict[str, int]:
    return {} if seed is None else {"seed": (seed + k) % _SEEDS}


def _chat(request: ChatCompletionRequest, fits: int) -> dict[str, Any]:
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    if request.top_logprobs is not None and not request.logprobs and request.top_logprobs > 0:
        raise InvalidRequest("top_logprobs: asks for logprobs: true as well", field="top_logprobs")
    if request.tools and request.tool_choice != "none":
        if request.response_format is not None and request.response_format.type != "text":
            raise InvalidRequest(
                "response_format: not together with tools: a constrained text leaves no room for calls", field="response_format"
            )
        if request.logprobs:
            raise InvalidRequest("logprobs: not together with tools", field="logprobs")
    return {
        "messages": as_system(request.messages),
        "max_tokens": fits if limit is None else limit,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        "tools": request.tools or None,
        "tool_choice": request.tool_choice if request.tools or request.tool_choice not in (None, "none", "auto") else None,
    }


def as_system(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the messages with OpenAI's role ``developer`` under the name that chat templates know."""
    return [m.model_copy(update={"role": "system"}) if m.role == "developer" else m for m in messages]


def finish_reason(stop_reason: str, *, called: bool = False) -> str:
    """Translate our reason for the end into OpenAI's ``stop``, ``length`` or ``tool_calls``."""
    finish = _FINISH.get(StopReason(stop_reason), "stop")
    return "tool_calls" if called and finish == "stop" else finish


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """Return OpenAI's ``usage`` object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def usage_of(readings: Mapping[int, Reading], n: int) -> dict[str, Any]:
    """Return the usage of all answers together; a prompt counts once, however many (``n``) answers it has."""
    first = [reading for k, reading in readings.items() if k % n == 0]
    return usage(
        sum(r.prompt_tokens for r in first), sum(r.tokens_out for r in readings.values()), sum(r.cached_tokens for r in first)
    )


def error_body(error: RbeeError, correlation_id: str | None) -> dict[str, Any]:
    """Return OpenAI's error object; code, details and correlation id are as on all other routes."""
    body = error.envelope(correlation_id)["error"]
    if error.status == 401:
        kind = "authentication_error"
    elif error.status == 403:
        kind = "permission_error"
    elif error.status == 429:
        kind = "rate_limit_error"
    elif isinstance(error, RequestError):
        kind = "invalid_request_error"
    else:
        kind = "server_error"
    return {"error": body | {"type": kind, "param": error.details.get("field")}}


def _bytes_of(lp: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": lp["piece"], "logprob": lp["logprob"], "bytes": lp["bytes"]}


def chat_logprobs(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return chat's ``logprobs`` object."""
    content = [_bytes_of(lp) | {"top_logprobs": [_bytes_of(top) for top in lp["top"]]} for lp in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Mapping[str, Any]], offset: int = 0) -> dict[str, Any]:
    """Return the older completions' ``logprobs`` object; ``offset``: characters before the first of ``tokens``."""
    offsets = []
    for lp in tokens:
        offsets.append(offset)
        offset += len(lp["piece"])
    return {
        "tokens": [lp["piece"] for lp in tokens],
        "token_logprobs": [lp["logprob"] for lp in tokens],
        "top_logprobs": [{top["piece"]: top["logprob"] for top in lp["top"]} for lp in tokens],
        "text_offset": offsets,
    }


class Shape:
    """Answers of one request, whole or as chunks. Subclasses say what differs between chat and completions."""

    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, request_id: str, model: str, created: int, *, include_usage: bool = False, index: int = 0) -> None:
        """``index``: which of the request's answers the chunks are of."""
        self._head = {"id": f"{self.prefix}-{request_id}", "created": created, "model": model, "system_fingerprint": None}
        self._include_usage = include_usage
        self._index = index
        self._offset = 0
        # The hot path only encodes the text: what stands around it is the same in every chunk.
        self._before, _, self._after = self._chunk([self._delta("\0", None)]).rpartition(orjson.dumps("\0"))

    def _delta(self, text: str | None, finish: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        raise NotImplementedError

    def _choice(self, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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

    def scored(self, text: str, lp: Mapping[str, Any]) -> bytes:
        """Return the chunk of one token with its log probabilities; the text may be empty."""
        return self._chunk([self._delta(text, None, self._logprobs([lp]))])

    def call(self, call: Call) -> bytes:
        """Return the chunk that begins a tool call."""
        raise NotImplementedError

    def arguments(self, piece: Arguments) -> bytes:
        """Return the chunk of a piece of a call's arguments."""
        raise NotImplementedError

    def closing(self, stop_reason: str, *, called: bool = False) -> bytes:
        """Return the chunk with the finish reason."""
        return self._chunk([self._delta(None, finish_reason(stop_reason, called=called))])

    def final(self, used: Mapping[str, Any]) -> bytes:
        """Return the chunk with the usage if it was asked for."""
        return self._chunk([], usage=used) if self._include_usage else b""

    def whole(self, answers: Sequence[Answer], used: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer of a request that was not streamed."""
        choices = [self._choice(answer) | {"index": k} for k, answer in enumerate(answers)]
        return self._head | {"object": self.object, "choices": choices, "usage": used}


class ChatShape(Shape):
    """``/v1/chat/completions``."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _delta(self, text: str | None, finish: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return chat_logprobs(tokens)

    def opening(self) -> bytes:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk([{"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _calls(self, call: dict[str, Any]) -> bytes:
        delta = {"tool_calls": [call]}
        return self._chunk([{"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def call(self, call: Call) -> bytes:
        function = {"name": call.name, "arguments": ""}
        return self._calls({"index": call.index, "id": call.id, "type": "function", "function": function})

    def arguments(self, piece: Arguments) -> bytes:
        return self._calls({"index": piece.index, "function": {"arguments": piece.text}})

    def _choice(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [
                {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
                for c in answer.calls
            ]
        finish = finish_reason(answer.stop_reason, called=bool(answer.calls))
        logprobs = chat_logprobs(answer.tokens) if answer.tokens else None
        return {"message": message, "logprobs": logprobs, "finish_reason": finish}


class CompletionShape(Shape):
    """``/v1/completions``."""

    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def _delta(self, text: str | None, finish: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": self._index, "text": text or "", "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found = completion_logprobs(tokens, self._offset)
        self._offset += sum(len(lp["piece"]) for lp in tokens)
        return found

    def _choice(self, answer: Answer) -> dict[str, Any]:
        logprobs = completion_logprobs(answer.tokens) if answer.tokens else None
        return {"text": answer.text, "logprobs": logprobs, "finish_reason": finish_reason(answer.stop_reason)}
