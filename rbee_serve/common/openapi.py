"""``/openapi.json``, made from the route table and from the models that the endpoints parse: it can not say anything else."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from rbee_serve import __version__
from rbee_serve.common.http import PUBLIC_PATHS

PATH = "/openapi.json"
_REFERENCE = "#/components/schemas/{model}"
_PARAMETER_RE = re.compile(r"\{(\w+)(?::\w+)?\}")

_F = TypeVar("_F", bound=Callable[..., Any])


def takes(body: Any = None, *, query: Sequence[str] = (), streams: str | None = None) -> Callable[[_F], _F]:
    """Mark an endpoint with what it parses: the model (or type) of its JSON ``body``, the names of its ``query`` parameters,
    and the media type in which it ``streams``."""

    def mark(endpoint: _F) -> _F:
        endpoint.__dict__["openapi"] = (body, tuple(query), streams)
        return endpoint

    return mark


def with_document(routes: Sequence[BaseRoute], title: str) -> list[BaseRoute]:
    """Return the routes and, last, the one that describes them all, itself included."""
    made: list[bytes] = []

    async def openapi(_: Request) -> Response:
        """Describe all routes (OpenAPI 3.1)."""
        if not made:
            made.append(orjson.dumps(document(every, title)))
        return Response(made[0], media_type="application/json")

    every: list[BaseRoute] = [*routes, Route(PATH, openapi)]
    return every


def document(routes: Sequence[BaseRoute], title: str) -> dict[str, Any]:
    """Return the OpenAPI document of ``routes``."""
    found = [route for route in routes if isinstance(route, Route)]
    bodies = {id(b): TypeAdapter(b) for r in found if (b := _marks(r)[0]) is not None}
    schemas, rest = TypeAdapter.json_schemas(
        [(key, "validation", adapter) for key, adapter in bodies.items()], ref_template=_REFERENCE
    )
    components = dict(rest.get("$defs", {}))
    paths: dict[str, dict[str, Any]] = {}
    for route in found:
        body = _marks(route)[0]
        schema = schemas[(id(body), "validation")] if body is not None else None
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(_path(route), {})[method.lower()] = _operation(route, method, schema)
    components["Error"] = _ERROR
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__, "description": "docs/http_api.md tells the rest."},
        "security": [{"key": []}],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


#: The parts that all shapes of errors have in common: OpenAI's and ours are objects under ``error``, Ollama's is a text.
_ERROR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "object",
                    "properties": {"code": {"type": "string"}, "message": {"type": "string"}, "details": {"type": "object"}},
                    "required": ["code", "message"],
                },
            ]
        }
    },
    "required": ["error"],
}


def _marks(route: Route) -> tuple[Any, tuple[str, ...], str | None]:
    marks: tuple[Any, tuple[str, ...], str | None] = getattr(route.endpoint, "openapi", (None, (), None))
    return marks


def _path(route: Route) -> str:
    return _PARAMETER_RE.sub(r"{\1}", route.path)


def _operation(route: Route, method: str, schema: Any) -> dict[str, Any]:
    _, query, streams = _marks(route)
    text = (route.endpoint.__doc__ or "").strip()
    answers: dict[str, Any] = {"application/json": {}}
    if streams is not None:
        answers[streams] = {}
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{re.sub(r'[^A-Za-z0-9]+', '_', _path(route))}",
        "summary": text.partition("\n")[0],
        "responses": {
            "2XX": {"description": "the answer", "content": answers},
            "default": {
                "description": "an error; docs/errors.md lists the codes",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER_RE.findall(route.path)
    ]
    parameters += [{"name": name, "in": "query", "schema": {"type": "string"}} for name in query]
    if parameters:
        operation["parameters"] = parameters
    if schema is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if route.path in PUBLIC_PATHS:
        operation["security"] = []
    return operation
