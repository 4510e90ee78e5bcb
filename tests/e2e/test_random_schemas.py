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
from hypothesis import strategies as st

from sensorium import LLM, SamplingParams
from sensorium.errors import InvalidRequestError

NUM_SCHEMAS = int(os.environ.get("SENSORIUM_RANDOM_SCHEMAS", "20"))
MAX_TOKENS = 400

_NAMES = st.sampled_from(["a", "b", "name", "size", "x y", "é"])
_SMALL = st.integers(0, 4)
_TEXT = st.fixed_dictionaries(
    {"type": st.just("string"), "maxLength": st.integers(4, 12)},
    optional={"minLength": _SMALL},
)
_FORMATS = st.sampled_from(["date", "time", "uuid", "ipv4", "email", "made-up"])
_FORMATTED = st.fixed_dictionaries({"type": st.just("string"), "format": _FORMATS})
_NUMBER = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number"])},
    optional={"minimum": st.integers(-20, 20), "maximum": st.integers(21, 900)},
)
_VALUES = ["red", "blue", 3, None, True, "}", '"', "a\\b\n"]
_ENUM = st.lists(st.sampled_from(_VALUES), min_size=1, max_size=4, unique_by=repr)
_LEAVES = (
    _TEXT
    | _FORMATTED
    | _NUMBER
    | st.fixed_dictionaries({"type": st.sampled_from(["boolean", "null"])})
    | st.fixed_dictionaries({"enum": _ENUM})
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    an_object = st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(_NAMES, inner, max_size=3)},
        optional={
            "required": st.lists(_NAMES, unique=True, max_size=2),
            "additionalProperties": st.just(False),
        },
    )
    a_list = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner, "maxItems": st.integers(4, 6)},
        optional={"minItems": _SMALL},
    )
    either = st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)})
    return an_object | a_list | either


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(model="demo", num_kv_blocks=2000) as model:
        yield model


def drawn(count: int) -> list[Any]:
    """Random schemas, the same in each run."""
    found: list[Any] = []

    @seed(13)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.recursive(_LEAVES, _nested, max_leaves=8))
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
