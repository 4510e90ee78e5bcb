"""JSON in and out: strict when reading, quick when writing."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec
from pydantic_core import from_json
from starlette.responses import Response

from sensorium.errors import InvalidRequestError

encode = msgspec.json.encode

_LONGEST_EXPLAINED = 1 << 20


class JsonResponse(Response):
    """A JSON body; everything in it must be finite."""

    media_type = "application/json"

    def __init__(
        self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(encode(content), status_code, headers)


def decode_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``.

    Raises InvalidRequestError for malformed JSON (NaN and infinities are none), for nesting that
    is too deep and for anything that is not an object.
    """
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        _explain(body, error)
    if not isinstance(value, dict):
        raise InvalidRequestError(f"The body must be a JSON object, got {_json_type(value)}.")
    _refuse_non_finite(value)  # 1e999 is read as infinity
    return value


def _explain(body: bytes, error: Exception) -> NoReturn:
    """Say what is wrong with a body, at its place where that can be found."""
    if not body.strip():
        raise InvalidRequestError("The body is empty; a JSON object is needed.") from error
    if len(body) <= _LONGEST_EXPLAINED:
        lenient: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            lenient = json.loads(body)
        _refuse_non_finite(lenient)
    raise InvalidRequestError(f"The JSON body is not valid: {error}.") from error


def _refuse_non_finite(value: Any) -> None:
    place = _non_finite(value)
    if place is not None:
        place = place.removeprefix(".")
        raise InvalidRequestError(
            f"{place or 'The body'} must be a finite number; JSON has no others.",
            param=place or None,
        )


def _non_finite(value: Any) -> str | None:
    """Where below ``value`` the first number stands that is not finite; None without one."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    if isinstance(value, dict):
        for key, child in value.items():
            if (found := _non_finite(child)) is not None:
                return f".{key}{found}"
    elif isinstance(value, list):
        for index, child in enumerate(value):
            if (found := _non_finite(child)) is not None:
                return f"[{index}]{found}"
    return None


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
