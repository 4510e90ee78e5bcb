"""Sampling parameters of a body: the request's values, else those of the model's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sensorium.errors import InvalidRequestError, located
from sensorium.params import CONSTRAINTS, SamplingParams
from sensorium.server.openai.protocol import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    ResponseFormat,
)
from sensorium.text.tools.forced import ForcedCall

_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingParams))
_COMPLETION_TOKENS = 16


def chat_params(
    body: ChatBody, defaults: Mapping[str, Any], forced: ForcedCall | None = None
) -> SamplingParams:
    """Return the sampling parameters of a chat. Without a limit the answer may fill the context.

    ``forced``: a tool call that the body demands. Raises InvalidRequestError that names the field.
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
    if body.prediction is not None:
        values["prediction"] = body.prediction.text
    with located(rename=lambda param: renamed.get(param, param)):
        return SamplingParams(**{**values, "max_tokens": max_tokens, "logprobs": logprobs})


def completion_params(body: CompletionBody, defaults: Mapping[str, Any]) -> SamplingParams:
    """Return the sampling parameters of a completion, of 16 tokens unless the request says more.

    ``max_tokens=0`` goes with ``echo`` only, to score a prompt: one token is generated and hidden.
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
    return SamplingParams(**values)


def _values(
    body: GenerationBody, defaults: Mapping[str, Any], forced: ForcedCall | None
) -> dict[str, Any]:
    """Return the fields that the model's configuration or the request sets; the request wins."""
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
    # structured_outputs without a constraint holds options for the other constraint.
    constraint = wanted or (forced.constraint if forced is not None else {})
    if given or constraint:
        values["structured_outputs"] = {**given, **constraint}
    return values


def _format_constraint(form: ResponseFormat | None) -> dict[str, Any] | None:
    """Return the field of ``StructuredOutputs`` that a format means."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"json_object": True}
    if form.type == "structural_tag":
        tag = form.model_dump(exclude={"json_schema"}, exclude_none=True)
        return {"structural_tag": tag}
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise InvalidRequestError(
            "response_format.json_schema.schema is required with type 'json_schema'.",
            param="response_format.json_schema",
        )
    return {"json": form.json_schema.schema_}


def constraint_param(body: GenerationBody, forced: ForcedCall | None = None) -> str:
    """Return the field of the body that the constraint on the answer comes from."""
    if forced is not None:
        return forced.param
    if _format_constraint(body.response_format) is None:
        return "structured_outputs"
    assert body.response_format is not None
    has_schema = body.response_format.type == "json_schema"
    return "response_format.json_schema.schema" if has_schema else "response_format"
