"""Bodies and errors in ``/openapi.json``: routes read their bodies without FastAPI's help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from sensorium.errors import RequestError, SensoriumError, UnavailableError
from sensorium.metrics.prometheus import CONTENT_TYPE
from sensorium.server.anthropic.protocol import CountBody, MessagesBody
from sensorium.server.files.store import PURPOSES
from sensorium.server.openai.protocol import (
    BatchBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    LoadAdapterBody,
    RerankBody,
    ScoreBody,
    TokenizeBody,
    TranscriptionBody,
    UnloadAdapterBody,
)
from sensorium.server.responses.listing import MOST_ITEMS
from sensorium.server.responses.protocol import InputTokensBody, ResponsesBody

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
    **dict.fromkeys(("/v1/score", "/score"), ScoreBody),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), RerankBody),
    "/v1/responses": ResponsesBody,
    "/v1/responses/input_tokens": InputTokensBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/batches": BatchBody,
    "/v1/load_lora_adapter": LoadAdapterBody,
    "/v1/unload_lora_adapter": UnloadAdapterBody,
}
_EITHER = {EmbeddingBody: ("input", "messages"), TokenizeBody: ("prompt", "messages")}
"""Bodies that need exactly one of two fields."""

_ADAPTERS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_SOUNDS = ("/v1/audio/transcriptions", "/v1/audio/translations")
_BODY_STATUSES = (400, 404, 413, 415, 503)
_PROMPT_STATUSES = (*_BODY_STATUSES, 422, 424)
_STATUSES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(BODIES, _PROMPT_STATUSES),
    "/detokenize": _BODY_STATUSES,
    **dict.fromkeys(_SOUNDS, _PROMPT_STATUSES),
    "/v1/batches": _BODY_STATUSES,
    **dict.fromkeys(_ADAPTERS, _BODY_STATUSES),
    "/v1/batches/{batch_id}": (404,),
    "/v1/batches/{batch_id}/cancel": (400, 404),
    "/v1/files": (400, 413, 503),
    "/v1/files/{file_id}": (404,),
    "/v1/files/{file_id}/content": (404,),
    "/v1/models/{name}": (404,),
    "/v1/responses/{response_id}": (400, 404),
    "/v1/responses/{response_id}/cancel": (400, 404),
    "/v1/responses/{response_id}/input_items": (400, 404),
    "/health": (503,),
    "/ping": (503,),
}
"""Errors of each route. Those that need an API key have 401, too."""

_PAGE: dict[str, dict[str, Any]] = {
    "after": {"type": "string", "description": "The id of an entry: list those after it."},
    "limit": {"type": "integer", "minimum": 1},
    "order": {"type": "string", "enum": ["asc", "desc"], "default": "desc"},
}
_MEDIA_TYPES = {"/metrics": CONTENT_TYPE, **dict.fromkeys(_ADAPTERS, "text/plain")}
"""Media types of answers that are not JSON."""

_QUERY: dict[str, dict[str, Any]] = {
    "/v1/files": {**_PAGE, "purpose": {"type": "string"}},
    "/v1/batches": _PAGE,
    "/v1/responses/{response_id}": {"stream": {"type": "boolean", "enum": [False]}},
    "/v1/responses/{response_id}/input_items": {
        "limit": {"type": "integer", "minimum": 1, "maximum": MOST_ITEMS, "default": 20},
        "order": {"type": "string", "enum": ["asc", "desc"], "default": "desc"},
        "after": {"type": "string", "description": "The id of an item: list those after it."},
    },
}
"""Parameters in the URL of GET routes, with their schemas."""

_UPLOAD = {
    "type": "object",
    "title": "Upload",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}

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


_ANTHROPIC_ERROR = {
    "type": "object",
    "title": "AnthropicError",
    "description": "The body of every error on the routes of Anthropic's API.",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": _ERROR["properties"]["error"],  # type: ignore[index]
        "request_id": {"type": "string"},
    },
}
_ANTHROPIC = "/v1/messages"


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
            schemas |= {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}
            for path, operations in schema["paths"].items():
                guarded = keys and path not in open_paths
                for operation in operations.values():
                    _add_errors(operation, path, guarded)
                _add_query(operations, _QUERY.get(path, {}))
            for path, media_type in _MEDIA_TYPES.items():
                content = {media_type: {"schema": {"type": "string"}}}
                for operation in schema["paths"][path].values():
                    operation["responses"]["200"]["content"] = content
            for path, model in BODIES.items():
                _add_body(schema["paths"][path]["post"], model, schemas)
            _add_files(schema["paths"])
            if keys:
                schema["components"]["securitySchemes"] = {
                    "key": {"type": "http", "scheme": "bearer"},
                    "x-api-key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
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
        event = {"schema": {"type": "string", "description": "events as JSON in data: lines"}}
        operation["responses"]["200"]["content"]["text/event-stream"] = event


def _add_files(paths: dict[str, Any]) -> None:
    """Describe the forms of uploads and of sounds, and the content of files."""
    sound = TranscriptionBody.model_json_schema()
    sound["properties"]["file"] = {"type": "string", "format": "binary"}
    sound["required"] = ["file"]
    for path in _SOUNDS:
        operation = paths[path]["post"]
        form = {"multipart/form-data": {"schema": sound}}
        operation["requestBody"] = {"required": True, "content": form}
        text: dict[str, Any] = {"schema": {"type": "string"}}
        operation["responses"]["200"]["content"] |= {"text/plain": text, "text/event-stream": text}
    paths["/v1/files"]["post"]["requestBody"] = {
        "required": True,
        "content": {"multipart/form-data": {"schema": _UPLOAD}},
    }
    content = paths["/v1/files/{file_id}/content"]["get"]["responses"]["200"]
    content["content"] = {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
    }


def _add_query(operations: dict[str, Any], query: dict[str, Any]) -> None:
    parameters = [{"name": name, "in": "query", "schema": schema} for name, schema in query.items()]
    if parameters:
        operations["get"].setdefault("parameters", []).extend(parameters)


def _add_errors(operation: dict[str, Any], path: str, guarded: bool) -> None:
    responses, statuses = operation["responses"], _STATUSES.get(path, ())
    is_anthropic = path.startswith(_ANTHROPIC)
    name = "AnthropicError" if is_anthropic else "Error"
    responses.pop("422", None)
    if guarded:
        operation["security"] = [{"key": []}, *([{"x-api-key": []}] if is_anthropic else [])]
    for status in sorted({*statuses, *([401] if guarded else [])}):
        codes = ", ".join(f"`{code}`" for code in _codes(status))
        responses[str(status)] = {
            "description": f"Codes: {codes}.",
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}},
        }


def _codes(status: int) -> list[str]:
    """Return the codes of the errors that are answered with ``status``."""
    classes = [*_below(RequestError), *_below(UnavailableError)]
    return sorted({cls.code for cls in classes if cls.status == status})


def _below(cls: type[SensoriumError]) -> Iterator[type[SensoriumError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _below(child)
