"""Constraints that make a model call, in the form that it was trained to write where that is known.

Otherwise a demanded call is JSON: the arguments of the named tool, or a list of calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sensorium.text.tools.choice import ToolChoice
from sensorium.text.tools.forms import AnswerForms, CallWriting

MAX_CALLS = 16
"""Calls that a forced answer may hold: a weak model goes on for ever."""

_PARAMETERS = ".function.parameters"
_DATA = ("const", "enum", "default", "examples")
_MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")


@dataclass(frozen=True, slots=True)
class ForcedCall:
    """A constraint that calls must fulfil.

    Attributes:
        constraint: Fields of ``StructuredOutputs``.
        param: The field of the request that it comes from.
        indices: Places in the request of the tools in the constraint.
        as_json: The answer is JSON; otherwise it has the model's own form.
        demands: The answer is a call, and nothing else.
    """

    constraint: dict[str, Any]
    param: str
    indices: tuple[int, ...]
    as_json: bool = True
    demands: bool = True


def forced_call(
    choice: ToolChoice,
    tools: Sequence[Mapping[str, Any]],
    *,
    parallel: bool = True,
    forms: AnswerForms | None = None,
) -> ForcedCall | None:
    """Return the constraint for calls of ``tools``; None where the model writes what it likes.

    With ``named`` and ``required`` calls are demanded, at most ``MAX_CALLS``, one unless
    ``parallel``. With ``auto`` text is free, but calls of tools that are ``strict`` follow their
    schemas, where the form of calls has a tag to tell them by.
    """
    wanted = [
        (index, tool)
        for index, tool in enumerate(tools)
        if (choice.name is None or tool["function"]["name"] == choice.name)
        and (choice.allowed is None or tool["function"]["name"] in choice.allowed)
    ]
    indices = tuple(index for index, _ in wanted)
    chosen = [tool for _, tool in wanted]
    param = f"tools[{indices[0]}]{_PARAMETERS}" if len(indices) == 1 else "tools"
    writing = forms.writing if forms is not None else None
    if choice.mode == "none" or not chosen:
        return None
    if choice.mode == "auto":
        strict = any(tool["function"].get("strict") is True for tool in chosen)
        if forms is None or writing is None or not strict or not writing.tag:
            return None
        tag = {"format": _amid_text(writing, chosen, parallel)}
        constraint = {"structural_tag": tag}
        return ForcedCall(constraint, param, indices, as_json=False, demands=False)
    if forms is not None and writing is not None:
        most = MAX_CALLS if parallel and choice.mode == "required" else 1
        tag = {"format": _calls(writing, chosen, most)}
        return ForcedCall({"structural_tag": tag}, param, indices, as_json=False)
    if choice.mode == "named":
        return ForcedCall({"json": arguments_schema(chosen[0], "#")}, param, indices)
    return ForcedCall({"json": _list_schema(chosen, parallel)}, param, indices)


def _calls(writing: CallWriting, tools: Sequence[Mapping[str, Any]], most: int) -> dict[str, Any]:
    """Return the structural tag of calls and nothing else."""
    several = {
        "type": "tags_with_separator",
        "tags": [_tag(writing, tool, arguments_schema(tool, "#")) for tool in tools],
        "separator": writing.separator,
        "at_least_one": True,
        "at_most": most,
    }
    return {"type": "tag", "begin": writing.opening, "content": several, "end": writing.closing}


def _amid_text(
    writing: CallWriting, tools: Sequence[Mapping[str, Any]], parallel: bool
) -> dict[str, Any]:
    """Return the structural tag of text in which calls, where there are any, follow schemas."""
    tags = []
    for tool in tools:
        strict = tool["function"].get("strict") is True
        schema = arguments_schema(tool, "#") if strict else {"type": "object"}
        tags.append(_tag(writing, tool, schema))
    return {
        "type": "triggered_tags",
        "triggers": [writing.tag],
        "tags": tags,
        "stop_after_first": not parallel,
    }


def _tag(
    writing: CallWriting, tool: Mapping[str, Any], schema: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "type": "tag",
        "begin": writing.begin.replace("NAME", tool["function"]["name"]),
        "content": {"type": "json_schema", "json_schema": schema},
        "end": writing.end,
    }


def _list_schema(tools: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """Return the schema of a list of ``{"name", "parameters"}``."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "parameters": arguments_schema(
                    tool, f"#/items/anyOf/{index}/properties/parameters"
                ),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]
    most = MAX_CALLS if parallel else 1
    return {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": calls}}


def arguments_schema(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the schema of a tool's arguments, which are an object.

    For use at ``place`` of another schema, from whose root its references then count.
    """
    schema = tool["function"].get("parameters") or {}
    if not any(
        word in schema for word in ("type", "$ref", "enum", "const", "allOf", "anyOf", "oneOf")
    ):
        schema = {"type": "object", **schema}
    return dict(schema) if place == "#" else _rebased(schema, place)


def _rebased(schema: Any, place: str) -> Any:
    if isinstance(schema, list):
        return [_rebased(one, place) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {
        key: {name: _rebased(below, place) for name, below in value.items()}
        if key in _MAPS and isinstance(value, Mapping)
        else value
        if key in _DATA
        else _rebased(value, place)
        for key, value in schema.items()
    }
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
