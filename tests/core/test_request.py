from __future__ import annotations

from typing import Any

import pytest

from sensorium.core.plan import Span, StepPlan
from sensorium.core.request import EngineRequest, ItemSpan, Sequence
from sensorium.params import PoolingParams, SamplingParams
from tests.core.driver import item, request


def test_an_item_span_knows_its_extent() -> None:
    span = ItemSpan(b"d", "video", ((2, 3), (6, 1)))
    assert (span.start, span.end, span.num_embeds) == (2, 7, 4)


@pytest.mark.parametrize("runs", [(), ((0, 0),), ((3, 2), (4, 1)), ((-1, 2),), ((5, 1), (2, 1))])
def test_impossible_runs_are_refused(runs: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="run"):
        ItemSpan(b"d", "image", runs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": ()}, "at least one token"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"pooling": PoolingParams(normalize=True)}, "max_tokens 0"),
        ({"pooling": PoolingParams(), "max_tokens": 0}, "says whether to normalize"),
        ({"items": (item("cat", 2, 3),)}, "inside the prompt"),
        ({"items": (item("cat", 0, 3), item("dog", 2, 1))}, "disjoint"),
        ({"items": (item("cat", 2, 1), item("dog", 0, 1))}, "ascending"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, Any], message: str) -> None:
    good = {
        "request_id": "r",
        "token_ids": (1, 2, 3, 4),
        "params": SamplingParams(),
        "max_tokens": 1,
    }
    EngineRequest(**good)
    with pytest.raises(ValueError, match=message):
        EngineRequest(**(good | changes))


def test_a_sequence_counts_its_tokens() -> None:
    seq = Sequence(0, request("r", [1, 2, 3]), [1, 2, 3, 7], num_computed=3)
    assert (seq.num_prompt_tokens, seq.num_generated, seq.num_uncomputed) == (3, 1, 1)


def test_a_plan_is_empty_when_there_is_nothing_to_tell() -> None:
    assert StepPlan(0).empty
    assert not StepPlan(0, dropped=(1,)).empty
    assert StepPlan(0, spans=(Span(0, 0, 3, (), True), Span(1, 5, 1, (), True))).num_tokens == 4
