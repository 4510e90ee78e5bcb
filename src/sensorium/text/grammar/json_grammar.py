"""Grammars of JSON schemas.

Compact JSON by default, and as much of a schema as a grammar can express.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sensorium.params import StructuredOutputs
from sensorium.text.grammar.json_schema import Adapted, SchemaError, adapt
from sensorium.text.grammar.library import Grammar, check_chars, constraint_error, problem_of

MAX_SCHEMA_CHARS = 1 << 18

_SPACING: dict[str, dict[str, Any]] = {
    "none": {"whitespace_flexible": False},
    "compact": {
        "whitespace_flexible": False,
        "item_separator": ", ?",
        "key_separator": ": ?",
    },
    "flexible": {"whitespace_pattern": r"[ \n\r\t]{1,40}"},
}
"""Weak models like to write blanks without end where JSON allows any number of them."""

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_UNKNOWN_WORDS = re.compile(r"Unimplemented keys: (\[.*?\])")
_CULPRITS: dict[str, tuple[str, ...]] = {
    "min/maxProperties only supported": ("minProperties", "maxProperties"),
    "patternProperty regexes": ("patternProperties",),
    "'multipleOf' has too many digits": ("multipleOf",),
    "Failed to generate regex for integer range": _BOUNDS,
    "Failed to generate regex for float range": _BOUNDS,
}
"""Messages of the library about valid schemas, and the keywords without which it takes them."""


def json_grammar(outputs: StructuredOutputs) -> Grammar:
    """The grammar of a constraint to JSON.

    Raises InvalidRequestError, with the field as ``param``, for what is no schema, too large or,
    when the caller wants that, cannot be expressed.
    """
    schema = _parsed(outputs)
    _check_pattern(outputs)
    try:
        return _expressed(schema, outputs)
    except SchemaError as error:
        raise constraint_error(f"json{_alternative(schema, outputs)}", str(error)) from error


def _check_pattern(outputs: StructuredOutputs) -> None:
    """Refuse a pattern of gaps that the library cannot use, which it would blame on the schema."""
    if outputs.whitespace_pattern is None:
        return
    problem = problem_of(_spelled(Adapted({}, ()), outputs))
    if problem is not None:
        raise constraint_error("whitespace_pattern", f"cannot be used: {problem}")


def expressed_schema(
    schema: Mapping[str, Any], outputs: StructuredOutputs
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return as much of a schema as can be expressed, for use in another grammar, and the rest.

    The rest are the keywords that are not enforced. Raises SchemaError for what cannot be used.
    """
    grammar = _expressed(schema, outputs)
    [only] = json.loads(grammar.text)["grammars"]
    return only["json_schema"], grammar.relaxed


def _expressed(schema: Mapping[str, Any], outputs: StructuredOutputs) -> Grammar:
    """The grammar of as much of a schema as can be expressed.

    Raises SchemaError for what cannot be used.
    """
    without: set[str] = set()
    while True:
        adapted = adapt(schema, without=frozenset(without))
        text = _spelled(adapted, outputs)
        problem = problem_of(text)
        if problem is None:
            break
        found = _culprits(problem) - without
        if not found:
            raise SchemaError(f"cannot be used: {problem}")
        without |= found
    if adapted.relaxed and outputs.unsupported == "refuse":
        raise SchemaError(
            f"has keywords that cannot be enforced: {', '.join(adapted.relaxed)}; leave them out, "
            "or structured_outputs.unsupported"
        )
    return Grammar(text, adapted.relaxed)


def _spelled(adapted: Adapted, outputs: StructuredOutputs) -> str:
    from llguidance import LLMatcher

    options: Any = {**_SPACING[outputs.whitespace], "coerce_one_of": True}
    if outputs.whitespace_pattern is not None:
        options["whitespace_pattern"] = outputs.whitespace_pattern
    try:
        text = json.dumps(adapted.schema, ensure_ascii=False)
        return str(LLMatcher.grammar_from_json_schema(text, defaults=options))
    except (ValueError, RecursionError) as error:  # nested too deeply for the library
        raise SchemaError(f"cannot be used: {error}") from error


def _parsed(outputs: StructuredOutputs) -> Mapping[str, Any]:
    schema: Any = {"type": "object"} if outputs.json_object else outputs.json
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()  # halves of surrogate pairs are no text
    except (ValueError, TypeError, RecursionError) as error:
        raise constraint_error("json", f"is not valid JSON: {error}") from error
    check_chars("json", len(text), MAX_SCHEMA_CHARS)
    if not isinstance(schema, dict):
        raise constraint_error("json", "must be a JSON schema (an object)")
    return schema


def _culprits(problem: str) -> set[str]:
    """The keywords of a right schema that the library has a problem with."""
    found = {word for said, words in _CULPRITS.items() if said in problem for word in words}
    unknown = _UNKNOWN_WORDS.search(problem)
    if unknown is not None:
        found.update(json.loads(unknown[1]))
    return found


def _alternative(schema: Mapping[str, Any], outputs: StructuredOutputs) -> str:
    """Return the place of the faulty schema of arguments in a list of calls.

    Nothing when that cannot be said.
    """
    items = schema.get("items")
    calls = items.get("anyOf") if isinstance(items, dict) else None
    for index, call in enumerate(calls if isinstance(calls, list) else ()):
        try:
            arguments = call["properties"]["parameters"]
            _expressed({**arguments, "items": items} if _refers(arguments) else arguments, outputs)
        except SchemaError:
            return f".items.anyOf[{index}]"
        except (TypeError, KeyError):
            return ""
    return ""


def _refers(arguments: Any) -> bool:
    return '"$ref"' in json.dumps(arguments)
