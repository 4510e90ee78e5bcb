"""From a body to ``SamplingParams``: what the request says, else what the model's configuration
says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sensorium.errors import InvalidRequestError
from sensorium.params import CONSTRAINTS, SamplingParams
from sensorium.server.openai.protocol import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    ResponseFormat,
)
from sensorium.text.tools import ForcedCall

_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingParams))
_COMPLETION_TOKENS = 16


def chat_params(
    body: ChatBody, defaults: Mapping[str, Any], forced: ForcedCall | None = None
) -> SamplingParams:
    """How a chat answer is sampled. Without a limit it may fill the context.

    ``forced``: a call that follows from the tools. Raises InvalidRequestError that names the field of the body.
    """
    renamed = {}
    max_tokens = body.max_completion_tokens
    if max_tokens is not None:
        renamed["max_tokens"] = "max_completion_tokens"
    elif body.max_tokens is not None:
        max_tokens = body.max_tokens
    else:
        max_tokens = defaults.get("max_tokens")
    logprobs = None
    if body.logprobs:
        renamed["logprobs"] = "top_logprobs"
        logprobs = body.top_logprobs or 0
    elif body.top_logprobs:
        raise InvalidRequestError(
            f"top_logprobs is {body.top_logprobs}, but logprobs is not true; set both.",
            param="top_logprobs",
        )
    values = _values(body, defaults, forced)
    return _build({**values, "max_tokens": max_tokens, "logprobs": logprobs}, renamed, body)


def completion_params(body: CompletionBody, defaults: Mapping[str, Any]) -> SamplingParams:
    """How a completion is sampled: 16 tokens where the request names no number.

    ``max_tokens=0`` goes with ``echo`` only, to score a prompt: one token is generated, and not
    shown.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequestError(
            f"best_of is {body.best_of}; only the value of n ({body.n or 1}) is possible.",
            param="best_of",
        )
    max_tokens = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    values = _values(body, defaults, None)
    if max_tokens == 0:
        if not body.echo:
            raise InvalidRequestError(
                "max_tokens is 0, which needs echo=true; else there is nothing to answer.",
                param="max_tokens",
            )
        max_tokens = 1
    values |= {"max_tokens": max_tokens, "logprobs": body.logprobs}
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        values["prompt_logprobs"] = body.logprobs
    return _build(values, {}, body)


def _values(
    body: GenerationBody, defaults: Mapping[str, Any], forced: ForcedCall | None
) -> dict[str, Any]:
    """Every sampling field that the model's configuration or the request sets; the request wins."""
    values = {name: defaults[name] for name in _FIELDS if name in defaults}
    for name in _FIELDS:
        given = getattr(body, name, None)
        if given is not None:
            values[name] = given
    given = {k: v for k, v in (body.structured_outputs or {}).items() if v is not None}
    wanted = _format_constraint(body.response_format)
    ways = [
        name
        for name, value in (
            ("response_format", wanted),
            (
                "structured_outputs",
                any(given.get(name, False) is not False for name in CONSTRAINTS),
            ),
            ("tool_choice", forced),
        )
        if value
    ]
    if len(ways) > 1:
        raise InvalidRequestError(
            f"{ways[0]} and {ways[1]} both constrain the answer; give one of them.", param=ways[0]
        )
    # Without a constraint of its own, structured_outputs says how the other one is applied.
    constraint = wanted or ({"json": forced.schema} if forced is not None else {})
    if given or constraint:
        values["structured_outputs"] = {**given, **constraint}
    return values


def _format_constraint(form: ResponseFormat | None) -> dict[str, Any] | None:
    """The field of ``StructuredOutputs`` that a format stands for."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"json_object": True}
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise InvalidRequestError(
            "response_format.json_schema.schema is required with type 'json_schema'.",
            param="response_format.json_schema",
        )
    return {"json": form.json_schema.schema_}


def _build(
    values: dict[str, Any], renamed: Mapping[str, str], body: GenerationBody
) -> SamplingParams:
    try:
        return SamplingParams(**values)
    except InvalidRequestError as error:
        raise _renamed(error, renamed, body) from error


def _renamed(
    error: InvalidRequestError, renamed: Mapping[str, str], body: GenerationBody
) -> InvalidRequestError:
    """``error`` in the words of the body, where its field has another name than the sampling
    parameter.
    """
    param = error.param or ""
    if param in renamed:
        name = renamed[param]
        return InvalidRequestError(error.message.replace(param, name, 1), param=name)
    return error


def constraint_param(body: GenerationBody, forced: ForcedCall | None = None) -> str:
    """The field that the constraint on the answer comes from."""
    if forced is not None:
        return forced.param
    if _format_constraint(body.response_format) is None:
        return "structured_outputs"
    assert body.response_format is not None
    has_schema = body.response_format.type == "json_schema"
    return "response_format.json_schema.schema" if has_schema else "response_format"
