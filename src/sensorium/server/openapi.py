"""Bodies and errors in ``/openapi.json``: routes read their bodies without FastAPI's help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from sensorium.errors import RequestError, SensoriumError, UnavailableError
from sensorium.server.openai.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    RerankBody,
    ScoreBody,
    TokenizeBody,
)

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
    **dict.fromkeys(("/v1/score", "/score"), ScoreBody),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), RerankBody),
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
_EITHER = {EmbeddingBody: ("input", "messages"), TokenizeBody: ("prompt", "messages")}
"""Bodies that need exactly one of two fields."""

_BODY_STATUSES = (400, 404, 413, 415, 503)
_PROMPT_STATUSES = (*_BODY_STATUSES, 422, 424)
_STATUSES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(BODIES, _PROMPT_STATUSES),
    "/detokenize": _BODY_STATUSES,
    "/v1/models/{name}": (404,),
    "/health": (503,),
    "/ping": (503,),
}
"""Errors of each route. Those that need an API key have 401, too."""

_ERROR = {
    "type": "object",
    "title": "Error",
    "description": "The body of every error, on every route, and of an error event in a stream.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {
                    "type": "string",
                    "description": "What is wrong with the value, and what to do.",
                },
                "type": {"type": "string"},
                "param": {
                    "type": ["string", "null"],
                    "description": "The place in the request, such as "
                    "messages[0].content[1].image_url.",
                },
                "code": {"type": "string"},
            },
        }
    },
}


def describe(app: FastAPI, *, keys: bool, open_paths: frozenset[str]) -> None:
    """Add the bodies and errors of the routes to ``app.openapi``.

    ``keys``: requests need an API key, on all paths but ``open_paths``.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)  # FastAPI's own form of errors, which is never sent
            schemas["Error"] = _ERROR
            for path, operations in schema["paths"].items():
                guarded = keys and path not in open_paths
                for operation in operations.values():
                    _add_errors(operation, _STATUSES.get(path, ()), guarded)
            for path, model in BODIES.items():
                _add_body(schema["paths"][path]["post"], model, schemas)
            if keys:
                schema["components"]["securitySchemes"] = {
                    "key": {"type": "http", "scheme": "bearer"}
                }
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_body(operation: dict[str, Any], model: type[BaseModel], schemas: dict[str, Any]) -> None:
    body = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= body.pop("$defs", {})
    if model in _EITHER:
        body["oneOf"] = [{"required": [name]} for name in _EITHER[model]]
    schemas[model.__name__] = body
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": reference}},
    }
    if "stream" in model.model_fields:
        event = {"schema": {"type": "string", "description": "data: lines of JSON, then [DONE]"}}
        operation["responses"]["200"]["content"]["text/event-stream"] = event


def _add_errors(operation: dict[str, Any], statuses: tuple[int, ...], guarded: bool) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if guarded:
        operation["security"] = [{"key": []}]
    for status in sorted({*statuses, *([401] if guarded else [])}):
        codes = ", ".join(f"`{code}`" for code in _codes(status))
        responses[str(status)] = {
            "description": f"Codes: {codes}.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }


def _codes(status: int) -> list[str]:
    """Return the codes of the errors that are answered with ``status``."""
    classes = [*_below(RequestError), *_below(UnavailableError)]
    return sorted({cls.code for cls in classes if cls.status == status})


def _below(cls: type[SensoriumError]) -> Iterator[type[SensoriumError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _below(child)
