"""Reading, decoding and validation of bodies; errors name the place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from sensorium.compat.fields import adopt_fields
from sensorium.config import suggestion
from sensorium.errors import InvalidRequestError
from sensorium.server.context import ModelContext, context_of
from sensorium.server.errors import CLIENT_NAMES
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.http.encoding import plain_body
from sensorium.server.http.middleware import HELD_MODEL
from sensorium.server.payload import abbreviate, check_num_values, decode_object, has_many_values
from sensorium.tracing import asked_model

ModelT = TypeVar("ModelT", bound=BaseModel)
T = TypeVar("T")

LARGE_BODY = 16 * 1024
"""Bytes from which on bodies are read in turns with other requests."""

# Expected values by pydantic's error type.
_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "none_required": "left out (it is not supported)",
    "finite_number": "a finite number",
}


async def read_body(
    request: Request, model: type[ModelT], begin: Callable[[ModelT], T]
) -> tuple[ModelT, T]:
    """Read, decode and validate a body that names no model; return it with the result of ``begin``.

    Raises InvalidRequestError (with ``param``), BodyTooLargeError, EngineDeadError when the server
    begins to shut down before all is read, and what ``begin`` raises.
    """
    found = await _read(request, model)
    return found.body, begin(found.body)


async def read_model_body(
    request: Request,
    model: type[ModelT],
    begin: Callable[[ModelContext, ModelT], T],
    *,
    is_large: Callable[[ModelT, int], bool] | None = None,
) -> tuple[ModelT, T]:
    """Do the same for a body that names a model, which the request holds from then on.

    ``begin`` gets the model's context, too; the model is loaded first if need be. A body of many
    values is handled in another thread, and so is ``begin`` for a body that ``is_large``, given its
    bytes, too, says yes to. Raises ModelNotFoundError and UnavailableError, too.
    """
    found = await _read(request, model)
    body = found.body
    context = await model_of(request, getattr(body, "model", None))
    if found.is_slow or (is_large is not None and is_large(body, found.num_bytes)):
        return body, await asyncio.to_thread(begin, context, body)
    return body, begin(context, body)


async def model_of(request: Request, name: str | None) -> ModelContext:
    """Return the context of the model that a request names, and let the request hold the model.

    The middleware releases it when the answer is complete. The body must have been read. Raises
    ModelNotFoundError; UnavailableError when the model is not loaded and cannot be now.
    """
    server = context_of(request)
    model = server.models.find(name)
    model.hold()
    request.scope["state"][HELD_MODEL] = model
    asked_model.set(name or model.names[0])
    if model.context is not None:
        return model.context
    with server.arrivals.arriving():
        return await unless_disconnected(request.receive, model.loaded())


@dataclass(frozen=True, slots=True)
class _Read(Generic[ModelT]):
    """A validated body and its bytes. ``is_slow``: it has so many values that all work is slow."""

    body: ModelT
    num_bytes: int
    is_slow: bool


async def _read(request: Request, model: type[ModelT]) -> _Read[ModelT]:
    """Read, decode and validate a body."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise InvalidRequestError(
            f"Content-Type must be application/json, got {content_type[:100]!r}. "
            "With curl, add -H 'Content-Type: application/json'."
        )
    context = context_of(request)
    with context.arrivals.arriving():
        raw = await _whole(request)
    config = context.config
    async with plain_body(request, raw, config.max_body_bytes, context.unpacking) as body:

        def parse() -> ModelT:
            adopted = adopt_fields(decode_object(body), model.model_fields.keys())
            request.scope["state"][CLIENT_NAMES] = adopted.client_names
            return validate(model, adopted.body)

        is_slow = has_many_values(body)
        if is_slow:
            await asyncio.to_thread(check_num_values, body, config.max_body_values)
            return _Read(await asyncio.to_thread(parse), len(body), is_slow)
        if body is not raw and len(body) >= LARGE_BODY:
            await context.turns.next()
        return _Read(parse(), len(body), is_slow)


async def _whole(request: Request) -> bytes:
    """Return the bytes of the body.

    Pieces of large bodies are read in turns with other requests: copying and decoding megabytes for
    many requests in one iteration would block the event loop. The turn of the last piece includes
    the decoding that follows.
    """
    turns = context_of(request).turns
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        more = message.get("more_body", False)
        if size >= LARGE_BODY:
            await turns.next()
    return b"".join(pieces)


def validate(model: type[ModelT], value: Mapping[str, Any]) -> ModelT:
    """Return an instance of ``model``. Raises InvalidRequestError for the first wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _request_error(model, value, error) from error


def _request_error(
    model: type[BaseModel], body: Mapping[str, Any], error: ValidationError
) -> InvalidRequestError:
    details = error.errors(include_url=False, include_context=True)
    unknown = [d for d in details if d["type"] == "extra_forbidden"]
    field = [d for d in details if d["loc"][:1] == details[0]["loc"][:1]]
    # Of a union, the branch that got furthest fits the value best.
    first = unknown[0] if unknown else max(field, key=lambda d: len(_steps(d["loc"], body)))
    place = "".join(_steps(first["loc"], body)).removeprefix(".")
    if unknown:
        name = str(first["loc"][-1])
        known = _fields_at(model, first["loc"][:-1])
        return InvalidRequestError(
            f"Unknown field {place!r}.{suggestion(name, known)}", param=place
        )
    if first["type"] == "missing":
        return InvalidRequestError(f"{place} is required.", param=place)
    same = [d for d in field if _steps(d["loc"], body) == _steps(first["loc"], body)]
    expected = list(dict.fromkeys(_EXPECTED[d["type"]] for d in same if d["type"] in _EXPECTED))
    if expected:
        what = f"must be {' or '.join(expected)}, got {abbreviate(first['input'])}"
    elif first["type"] == "literal_error":
        what = f"must be {first['ctx']['expected']}, got {abbreviate(first['input'])}"
    else:
        what = f"is wrong: {first['msg'].removeprefix('Value error, ')}"
    return InvalidRequestError(f"{place} {what}.", param=place)


def _steps(loc: Iterable[int | str], body: Any) -> list[str]:
    """Return ``.messages``, ``[0]``, ``.content`` of pydantic's location, no union branches."""
    steps: list[str] = []
    node = body
    parts = list(loc)
    for position, part in enumerate(parts):
        if isinstance(part, int):
            if isinstance(node, list) and part < len(node):
                steps.append(f"[{part}]")
                node = node[part]
        elif isinstance(node, Mapping) and (part in node or position == len(parts) - 1):
            steps.append(f".{part}")
            node = node.get(part)
    return steps


def _fields_at(model: type[BaseModel], loc: Iterable[int | str]) -> list[str]:
    """Return the names of the fields of the model at ``loc`` below ``model``."""
    current = model
    for part in loc:
        field = current.model_fields.get(str(part))
        nested = _classes(field.annotation) if field is not None else []
        if nested:
            current = nested[0]
    return list(current.model_fields)


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """Return the model classes in an annotation such as ``StreamOptions | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [cls for a in getattr(annotation, "__args__", ()) for cls in _classes(a)]
