"""Strict reading and fast writing of JSON."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import msgspec
from pydantic_core import from_json
from starlette.responses import Response

from sensorium.errors import BodyTooLargeError, InvalidRequestError

encode = msgspec.json.encode

MANY_VALUES = 2048
"""JSON values from which on reading or writing takes a good part of a millisecond."""

_LONGEST_EXPLAINED = 1 << 20
_LONGEST_SHOWN = 80
_VALUE_MARKS = (b",", b"[", b"{")


class JsonResponse(Response):
    """Response with a JSON body, whose numbers must be finite."""

    media_type = "application/json"

    def __init__(
        self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(encode(content), status_code, headers)


async def json_response(
    make: Callable[[], Any], num_values: int, headers: Mapping[str, str] | None = None
) -> JsonResponse:
    """Return the result of ``make`` as JSON; made in another thread if it has ``MANY_VALUES``."""
    if num_values < MANY_VALUES:
        return JsonResponse(make(), headers=headers)
    return await asyncio.to_thread(lambda: JsonResponse(make(), headers=headers))


def has_many_values(body: bytes) -> bool:
    """Return true when ``body`` has ``MANY_VALUES`` commas, be they between values or in strings.

    Base64 has none, so large images are searched at the speed of memory.
    """
    end = 0
    for _ in range(MANY_VALUES):
        end = body.find(b",", end) + 1
        if not end:
            return False
    return True


def check_num_values(body: bytes, most: int) -> None:
    """Raise BodyTooLargeError when the JSON in ``body`` may hold more than ``most`` values.

    Decoded, a value takes many times its own bytes.
    """
    if len(body) <= 2 * most:  # each takes a byte besides its mark; counting takes time
        return
    num_values = sum(map(body.count, _VALUE_MARKS))
    if num_values > most:
        raise BodyTooLargeError(
            f"The body has about {num_values} values (commas and opening brackets are counted); at "
            f"most {most} are allowed (--max-body-values). Send fewer values, or several requests."
        )


def decode_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``.

    Raises InvalidRequestError for malformed JSON, NaN and infinities, for nesting that is too deep
    and for anything that is not an object.
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
    """Raise InvalidRequestError for a malformed body, with the place where that can be found."""
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
            f"{place or 'The body'} must be a finite number; JSON has no NaN and no infinity.",
            param=place or None,
        )


def _non_finite(value: Any) -> str | None:
    """Return the path to the first number that is not finite; None without one."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    if isinstance(value, dict):
        if not _are_finite(value.values()):
            for key, child in value.items():
                if (found := _non_finite(child)) is not None:
                    return f".{key}{found}"
    elif isinstance(value, list) and not _are_finite(value):
        for index, child in enumerate(value):
            if (found := _non_finite(child)) is not None:
                return f"[{index}]{found}"
    return None


def _are_finite(values: Iterable[Any]) -> bool:
    """Return true for finite numbers and other plain values, found without a loop in Python."""
    kinds = set(map(type, values))
    if kinds.isdisjoint((float, dict, list)):
        return True
    return kinds == {float} and all(map(math.isfinite, values))


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


class _Brief(reprlib.Repr):
    """``repr`` of the beginning of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxdict = _LONGEST_SHOWN // 2
        self.maxstring = self.maxlong = self.maxother = 2 * _LONGEST_SHOWN

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Keep the order of the members; the base class sorts all keys."""
        if not x or level <= 0:
            return "{...}" if x else "{}"
        members = [
            f"{self.repr1(key, level - 1)}: {self.repr1(member, level - 1)}"
            for key, member in itertools.islice(x.items(), self.maxdict)
        ]
        return "{" + ", ".join(members) + "}"


_brief = _Brief()


def abbreviate(value: Any) -> str:
    """Return a short text of a value for messages, at little cost however large the value is."""
    text = _brief.repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
