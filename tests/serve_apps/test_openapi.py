"""The OpenAPI document: whole, and its examples are what the server takes."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from serve_apps import af2  # noqa: F401  (it gives the application its handlers)
from serve_apps.ingress import api
from serve_apps.schemas import ChatRequest, EmbeddingRequest, LabelRequest

MODELS = {
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/audio/labels": LabelRequest,
}


@pytest.fixture
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(api.openapi()))
    return found


def references(part: Any) -> list[str]:
    if isinstance(part, dict):
        own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        return own + [ref for value in part.values() for ref in references(value)]
    return [ref for value in part for ref in references(value)] if isinstance(part, list) else []


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = references(document)
    assert found
    for reference in found:
        part: Any = document
        for key in reference.removeprefix("#/").split("/"):
            part = part[key]


@pytest.mark.parametrize("path", MODELS)
def test_examples_and_strings_are_taken_by_the_document_and_the_server(document: dict[str, Any], path: str) -> None:
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = {"components": document["components"], **body["schema"]}
    bodies = [body["example"]]
    if path == "/v1/chat/completions":
        bodies.append({"model": "af2", "messages": [{"role": "user", "content": "hello"}]})
    if path == "/v1/embeddings":
        bodies.append({"model": "af2-clap", "input": "hello"})
    for each in bodies:
        jsonschema.validate(each, schema)
        MODELS[path].model_validate(each)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": 3}, schema)


def test_every_operation_tells_its_errors(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}, path
