"""What `/openapi.json` says of the bodies: the handlers read those themselves, and refuse a large one unparsed."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve_apps.replies import ChatCompletion
from serve_apps.schemas import ChatRequest, EmbeddingRequest, LabelRequest

_AUDIO = {"type": "input_audio", "input_audio": {"data": "<base64 of a whole file>", "format": "wav"}}
_ASK = {"type": "text", "text": "Which sound comes first? (A) dog (B) drum"}
_BODIES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/chat/completions": (
        ChatRequest,
        {"model": "af2", "messages": [{"role": "user", "content": [_AUDIO, _ASK]}], "max_tokens": 32},
    ),
    "/v1/embeddings": (EmbeddingRequest, {"model": "af2-clap", "input": ["a dog barks", _AUDIO]}),
    "/v1/audio/labels": (
        LabelRequest,
        {"model": "af2-clap", "input": _AUDIO, "candidate_labels": ["dog", "drum"]},
    ),
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def describe(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with bodies, examples and errors."""
    if api.openapi_schema:
        return api.openapi_schema
    document = get_openapi(title=api.title, version="1", description=api.description, routes=api.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Error"] = _ERROR
    for path, (model, example) in _BODIES.items():
        body = {"schema": _named(model, schemas), "example": example}
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": {"application/json": body}}
    whole = {"schema": _named(ChatCompletion, schemas)}
    document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"] = {
        "application/json": whole,
        "text/event-stream": {"schema": {"description": "events whose data is a chat.completion.chunk, then [DONE]"}},
    }
    mistake = {"description": "what to mend", "content": {"application/json": {"schema": _ref("Error")}}}
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"] = {"200": operation["responses"]["200"], "4XX": mistake, "5XX": mistake}
    api.openapi_schema = document
    return document


def _named(model: type[BaseModel], schemas: dict[str, Any]) -> dict[str, str]:
    """A reference to a model's schema, which is put among the others with all that it uses."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema
    return _ref(model.__name__)


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
