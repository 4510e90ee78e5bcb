"""Sampling values: what is refused, and that the refusal can be shown."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sensorium import PoolingParams, SamplingParams, StructuredOutputs
from sensorium.errors import InvalidRequestError

WRONG: list[tuple[str, Any]] = [
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 10**400),
    ("temperature", "1"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("n", 0),
    ("n", 10**9),
    ("n", 10**5000),
    ("seed", 1 << 64),
    ("max_tokens", 0),
    ("min_tokens", 17),
    ("logprobs", 21),
    ("prompt_logprobs", -1),
    ("presence_penalty", 2.1),
    ("repetition_penalty", 0),
    ("stop", [""]),
    ("stop", ["\ud800"]),
    ("stop", [1]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", 5),
    ("allowed_token_ids", []),
    ("bad_words", ["\ud800"]),
    ("prediction", 5),
    ("prediction", "\ud800"),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {1: math.nan}),
    ("ignore_eos", 1),
    ("structured_outputs", {}),
    ("structured_outputs", {"regex": "a", "choice": ["b"]}),
    ("structured_outputs", {"rexeg": "a"}),
    ("structured_outputs", {"choice": "red"}),
    ("structured_outputs", {"choice": 5}),
    ("structured_outputs", {"choice": ["\ud800"]}),
    ("structured_outputs", {"regex": "\ud800"}),
    ("structured_outputs", {"json_object": "yes"}),
    ("structured_outputs", 5),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[name for name, _ in WRONG])
def test_wrong_values_name_their_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert (caught.value.param or "").startswith(name)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dimensions", 0),
        ("dimensions", 1.0),
        ("dimensions", True),
        ("dimensions", 10**100),
        ("normalize", 1),
        ("normalize", "yes"),
    ],
)
def test_wrong_values_of_pooling_name_their_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        PoolingParams(**{name: value})
    assert caught.value.param == name
    assert len(caught.value.message) < 300
    assert PoolingParams(dimensions=3).replace(normalize=True) == PoolingParams(3, True)


def test_messages_do_not_grow_with_what_was_sent() -> None:
    for name in ("stop", "stop_token_ids", "temperature", "n", "ignore_eos"):
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**{name: {"x" * 100_000: "y" * 100_000}})  # type: ignore[arg-type]
        assert len(caught.value.message) < 300


def test_lists_become_tuples_and_texts_keys() -> None:
    params = SamplingParams(stop="a", bad_words=["b"], logit_bias={"5": 1})  # type: ignore[dict-item, arg-type]
    assert (params.stop, params.bad_words, params.logit_bias) == (("a",), ("b",), {5: 1})
    assert SamplingParams(structured_outputs={"json": {}}).structured_outputs == StructuredOutputs(  # type: ignore[arg-type]
        json={}
    )
