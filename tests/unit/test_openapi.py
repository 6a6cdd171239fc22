"""/openapi.json says what the code does: every route is in it and nothing else, every body that is parsed too."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from scripted_engine import ScriptedEngine
from starlette.applications import Starlette
from starlette.routing import Route
from test_queen_app import App, ask

from rbee_serve.contract.settings import QueenSettings, WorkerSettings
from rbee_serve.queen.app import create_app as create_queen
from rbee_serve.worker.app import create_app as create_worker


def queen() -> Starlette:
    return create_queen(QueenSettings())


def worker() -> Starlette:
    values = {"name": "cpu0", "hive": "lab1", "model_id": "m", "model_path": Path("/m.gguf")}
    return create_worker(WorkerSettings.from_values(values, {}, origin="test"), ScriptedEngine())


def operations(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}


@pytest.mark.parametrize("service", [queen, worker])
def test_every_route_is_in_it_and_nothing_else(service: Any) -> None:
    app = service()
    document = ask(app, "GET", "/openapi.json").json()

    routes = {
        (method, re.sub(r":\w+\}", "}", route.path))
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert operations(document) == routes
    assert len(routes) > 15


@pytest.mark.parametrize("service", [queen, worker])
def test_it_is_a_valid_document_with_words_for_everything(service: Any) -> None:
    document = ask(service(), "GET", "/openapi.json").json()

    names = []
    for methods in document["paths"].values():
        for operation in methods.values():
            names.append(operation["operationId"])
            assert operation["summary"].endswith(".")
    assert len(names) == len(set(names))
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("service", [queen, worker])
def test_every_body_that_is_parsed_is_described(service: Any) -> None:
    """Where an endpoint reads a body the document has its model, and an empty object is refused; nowhere else."""
    app = service()
    document = ask(app, "GET", "/openapi.json").json()
    checked = 0
    for route in app.routes:
        reads = "read_json(" in inspect.getsource(route.endpoint)
        path = re.sub(r":\w+\}", "}", route.path)
        for method in route.methods - {"HEAD"}:
            assert ("requestBody" in document["paths"][path][method.lower()]) is reads, path
        if reads:
            assert ask(app, "POST", path, json={}).status_code == 400, path
            checked += 1
    assert checked > 5


def test_it_asks_for_a_key_as_all_else_does() -> None:
    assert App().ask("GET", "/openapi.json", headers={}).status_code == 401
    assert App().ask("GET", "/openapi.json").status_code == 200
