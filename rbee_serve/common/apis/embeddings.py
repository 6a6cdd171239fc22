"""OpenAI's embeddings over a backend."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
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
#: Bytes of vectors that are turned into JSON at once: 3 ms as decimal numbers.
_PIECE_BYTES = 1 << 16

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


def check_dimensions(wanted: int | None, vectors: Sequence[bytes]) -> None:
    """Raise InvalidRequest where another length than the model's own is asked for: cutting would make other vectors."""
    if wanted is not None and vectors and wanted != (own := len(vectors[0]) // 4):
        raise InvalidRequest(
            f"dimensions: this model's vectors have {own}, and cutting them is not supported",
            field="dimensions",
            got=wanted,
            expected=own,
        )


def as_floats(vector: bytes) -> list[float]:
    """Return the numbers of a vector."""
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


def as_base64(vector: bytes) -> str:
    """Return a vector as OpenAI packs it."""
    return base64.b64encode(vector).decode()


def answer_with(
    vectors: Sequence[bytes], one: Callable[[int, bytes], Any], frame: dict[str, Any], key: str, headers: Mapping[str, str]
) -> Response:
    """Return ``frame``, a JSON object, with a list under ``key`` besides: what ``one`` makes of each vector and its index.

    A large one is written as it is sent, in pieces of some milliseconds: 2048 vectors of 4096 numbers are 165 MB of JSON.
    """
    if sum(map(len, vectors)) <= _PIECE_BYTES:
        return JsonResponse(frame | {key: [one(i, vector) for i, vector in enumerate(vectors)]}, headers=dict(headers))
    return StreamingResponse(_pieces(vectors, one, frame, key), media_type="application/json", headers=dict(headers))


async def _pieces(
    vectors: Sequence[bytes], one: Callable[[int, bytes], Any], frame: dict[str, Any], key: str
) -> AsyncGenerator[bytes, None]:
    together = max(1, _PIECE_BYTES // len(vectors[0]))
    before = orjson.dumps(frame)[:-1] + b"," + orjson.dumps(key) + b":["
    for first in range(0, len(vectors), together):
        some = orjson.dumps([one(first + n, vector) for n, vector in enumerate(vectors[first : first + together])])
        yield before + some[1:-1]
        before = b","
        await asyncio.sleep(0)  # a client that reads as quickly as we write would let nobody else have a turn
    yield b"]}"


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
        encode: Callable[[bytes], Any] = as_base64 if wanted.encoding_format == "base64" else as_floats

        def one(index: int, vector: bytes) -> dict[str, Any]:
            return {"object": "embedding", "index": index, "embedding": encode(vector)}

        usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
        return answer_with(found.vectors, one, {"object": "list", "model": found.model, "usage": usage}, "data", found.headers)
