"""What the worker tells about texts without generating: token ids, their text, a rendered conversation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_serve.common.http import JsonResponse, read_json, while_connected
from rbee_serve.common.openapi import takes
from rbee_serve.contract.api import ChatMessage, InferenceRequest, Message, NamedTool, Tool, parse
from rbee_serve.worker.state import Worker

_TEXT_MAX_CHARS = 1_048_576


class TokenizeRequest(Message):
    """``POST /v1/tokenize``."""

    text: str = Field(max_length=_TEXT_MAX_CHARS)
    parse_special: bool = Field(False, description="let spelled control tokens be those tokens")
    add_bos: bool = True


class DetokenizeRequest(Message):
    """``POST /v1/detokenize``."""

    token_ids: list[Annotated[int, Field(ge=0)]] = Field(max_length=_TEXT_MAX_CHARS)
    special: bool = Field(False, description="spell control tokens instead of leaving them out")


class ApplyTemplateRequest(Message):
    """``POST /v1/apply-template``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None


def routes(worker: Worker) -> list[Route]:
    """Return the routes."""
    api = TextApi(worker)
    return [
        Route("/v1/tokenize", api.tokenize, methods=["POST"]),
        Route("/v1/detokenize", api.detokenize, methods=["POST"]),
        Route("/v1/apply-template", api.apply_template, methods=["POST"]),
    ]


class TextApi:
    """Endpoints."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    @takes(TokenizeRequest)
    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a text as a prompt would have them."""
        wanted = parse(TokenizeRequest, await read_json(request))
        self._worker.admit()
        work = self._worker.engine.tokenize(wanted.text, parse_special=wanted.parse_special, add_bos=wanted.add_bos)
        ids = await while_connected(request, work)
        return JsonResponse({"token_ids": ids, "count": len(ids)})

    @takes(DetokenizeRequest)
    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids."""
        wanted = parse(DetokenizeRequest, await read_json(request))
        self._worker.admit()
        text = await while_connected(request, self._worker.engine.detokenize(wanted.token_ids, special=wanted.special))
        return JsonResponse({"text": text})

    @takes(ApplyTemplateRequest)
    async def apply_template(self, request: Request) -> Response:
        """Return the prompt that a conversation becomes, and how many tokens it has."""
        wanted = parse(ApplyTemplateRequest, await read_json(request))
        prompt, count = await while_connected(request, rendered(self._worker, wanted))
        return JsonResponse({"prompt": prompt, "count": count})


async def rendered(worker: Worker, request: ApplyTemplateRequest | InferenceRequest) -> tuple[str, int]:
    """Return the prompt of a request and its number of tokens; raises RbeeError."""
    info = worker.admit()
    if request.messages is not None:
        template = worker.chat(info)
        text = template.render(request.messages, request.tools if request.tool_choice != "none" else None)
        bos = not template.begins_with_bos(text)
        return text, len(await worker.engine.tokenize(text, parse_special=True, add_bos=bos))
    if request.prompt_ids is not None:
        return "", len(request.prompt_ids)
    text = request.prompt or ""
    return text, len(await worker.engine.tokenize(text, parse_special=False, add_bos=True))
