"""Answers to random JSON schemas are valid, at temperature 1, whatever a small model would write.

More of them: ``SENSORIUM_RANDOM_SCHEMAS=200``.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis_jsonschema import from_schema

from sensorium import LLM, SamplingParams
from sensorium.errors import InvalidRequestError

NUM_SCHEMAS = int(os.environ.get("SENSORIUM_RANDOM_SCHEMAS", "20"))
MAX_TOKENS = 400

_NAMES = ["a", "b", "name", "size", "x y", "é"]
_SMALL = {"type": "integer", "minimum": 0, "maximum": 4}
_TEXT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "string"},
        "minLength": _SMALL,
        "maxLength": {"type": "integer", "minimum": 4, "maximum": 12},
        "format": {"enum": ["date", "time", "uuid", "ipv4", "email", "made-up"]},
    },
    "required": ["type", "maxLength"],
    "additionalProperties": False,
}
_NUMBER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"enum": ["integer", "number"]},
        "minimum": {"type": "integer", "minimum": -20, "maximum": 20},
        "maximum": {"type": "integer", "minimum": 21, "maximum": 900},
    },
    "required": ["type"],
    "additionalProperties": False,
}
_OTHER: dict[str, Any] = {
    "anyOf": [
        {"type": "object", "properties": {"type": {"enum": ["boolean", "null"]}}, "required": ["type"], "additionalProperties": False},
        {
            "type": "object",
            "properties": {
                "enum": {"type": "array", "minItems": 1, "maxItems": 4, "uniqueItems": True, "items": {"enum": ["red", "blue", 3, None, True, "}", '"']}}
            },
            "required": ["enum"],
            "additionalProperties": False,
        },
    ]
}  # fmt: skip


def _schemas(depth: int) -> dict[str, Any]:
    """A schema of schemas, nested at most ``depth`` deep."""
    leaves = [_TEXT, _NUMBER, _OTHER]
    if depth == 0:
        return {"anyOf": leaves}
    inner = _schemas(depth - 1)
    properties = {"type": "object", "properties": dict.fromkeys(_NAMES, inner), "additionalProperties": False, "maxProperties": 3}  # fmt: skip
    an_object = {
        "type": "object",
        "properties": {
            "type": {"const": "object"},
            "properties": properties,
            "required": {"type": "array", "items": {"enum": _NAMES}, "uniqueItems": True, "maxItems": 2},
            "additionalProperties": {"const": False},
        },
        "required": ["type", "properties"],
        "additionalProperties": False,
    }  # fmt: skip
    a_list = {
        "type": "object",
        "properties": {
            "type": {"const": "array"},
            "items": inner,
            "minItems": _SMALL,
            "maxItems": {"type": "integer", "minimum": 4, "maximum": 6},
        },
        "required": ["type", "items", "maxItems"],
        "additionalProperties": False,
    }
    either = {
        "type": "object",
        "properties": {"anyOf": {"type": "array", "items": inner, "minItems": 1, "maxItems": 3}},
        "required": ["anyOf"],
        "additionalProperties": False,
    }
    return {"anyOf": [an_object, an_object, a_list, either, *leaves]}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(model="demo", num_kv_blocks=2000) as model:
        yield model


def drawn(count: int) -> list[Any]:
    """Random schemas, the same in each run."""
    found: list[Any] = []

    @seed(13)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(from_schema(_schemas(2)))
    def draw(schema: Any) -> None:
        found.append(schema)

    draw()
    return found


def test_answers_to_random_schemas_are_valid(llm: LLM) -> None:
    """Valid, cut off by ``max_tokens``, or refused, and nothing else; most of them are valid."""
    outcomes, rng = Counter[str](), random.Random(5)
    messages = [{"role": "user", "content": "What is in the picture?"}]
    for schema in drawn(NUM_SCHEMAS):
        params = SamplingParams(
            temperature=1.0,
            seed=rng.getrandbits(32),
            max_tokens=MAX_TOKENS,
            structured_outputs={"json": schema},
        )
        try:
            [output] = llm.chat(messages, params, use_tqdm=False)
        except InvalidRequestError:
            outcomes["refused"] += 1
            continue
        sample = output.outputs[0]
        if sample.finish_reason == "length":
            outcomes["cut off"] += 1
            continue
        value = json.loads(sample.text)
        if output.warnings:
            outcomes["relaxed"] += 1
            continue
        jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
        outcomes["valid"] += 1
    print(f"random schemas: {dict(outcomes)}")
    assert outcomes["valid"] >= 0.75 * outcomes.total(), outcomes
    assert outcomes["refused"] + outcomes["relaxed"] <= 0.25 * outcomes.total(), outcomes


@pytest.mark.parametrize(
    "schema", [{"type": "zzz"}, {"properties": 5}, {"$ref": "#/nowhere"}, {"enum": []}, [1]]
)
def test_bad_schemas_are_refused(llm: LLM, schema: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate("a", SamplingParams(structured_outputs={"json": schema}), use_tqdm=False)
    assert caught.value.param is not None
    assert caught.value.param.startswith("structured_outputs.json")
