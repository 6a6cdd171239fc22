"""OpenAI's embeddings over a backend."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_serve.common.apis.openai_shapes import error_body
from rbee_serve.common.apis.streams import Backend
from rbee_serve.common.http import ErrorShape, JsonResponse, read_json
from rbee_serve.common.openapi import takes
from rbee_serve.contract.api import TolerantMessage, parse
from rbee_serve.contract.errors import InvalidRequest

ERROR_SHAPES: dict[str, ErrorShape] = {"/v1/embeddings": error_body}

#: Inputs of one request, as many as OpenAI takes.
INPUTS_MAX = 2048
_TEXT_MAX_CHARS = 1_048_576

_Text = Annotated[str, Field(min_length=1, max_length=_TEXT_MAX_CHARS)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=_TEXT_MAX_CHARS)]


def _one_problem(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Validate a union and report one problem instead of one for each of its members."""
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(f"a text, a list of token ids, or 1 to {INPUTS_MAX} of either expected, none of them empty") from None


Inputs = Annotated[
    _Text | _Ids | Annotated[list[_Text] | list[_Ids], Field(min_length=1, max_length=INPUTS_MAX)], WrapValidator(_one_problem)
]


def as_list(given: Any) -> list[str | Sequence[int]]:
    """Return validated ``Inputs`` as a list of single inputs."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class EmbeddingsRequest(TolerantMessage):
    """``POST /v1/embeddings``."""

    model: str = Field(min_length=1, max_length=200)
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="only the model's own number: vectors are not cut")


def check_dimensions(wanted: int | None, vectors: Sequence[Sequence[float]]) -> None:
    """Raise InvalidRequest where another length than the model's own is asked for: cutting would make other vectors."""
    if wanted is not None and vectors and wanted != len(vectors[0]):
        raise InvalidRequest(
            f"dimensions: this model's vectors have {len(vectors[0])}, and cutting them is not supported",
            field="dimensions",
            got=wanted,
            expected=len(vectors[0]),
        )


def routes(backend: Backend) -> list[Route]:
    """Return the route."""
    return [Route("/v1/embeddings", EmbeddingsApi(backend).embeddings, methods=["POST"])]


class EmbeddingsApi:
    """The endpoint."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @takes(EmbeddingsRequest)
    async def embeddings(self, request: Request) -> Response:
        """Turn texts, or lists of token ids, into vectors of length 1."""
        wanted = parse(EmbeddingsRequest, await read_json(request))
        found = await self._backend.embed(request, wanted.model, as_list(wanted.input), "openai")
        check_dimensions(wanted.dimensions, found.vectors)
        encode = _base64 if wanted.encoding_format == "base64" else _floats
        data = [{"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in enumerate(found.vectors)]
        usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
        return JsonResponse({"object": "list", "data": data, "model": found.model, "usage": usage}, headers=dict(found.headers))


def _floats(vector: list[float]) -> Any:
    return vector


def _base64(vector: list[float]) -> Any:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
