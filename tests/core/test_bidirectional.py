"""Parts of a prompt that attend to themselves both ways are computed in one step."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.core.request import EngineRequest
from sensorium.errors import PromptTooLongError
from tests.core.driver import Driver, request
from tests.fakes import expected_tokens


def bidirectional(
    name: str, length: int, *spans: tuple[int, int], max_tokens: int = 3
) -> EngineRequest:
    return dataclasses.replace(request(name, length, max_tokens), bidirectional_spans=spans)


def test_a_step_ends_before_a_span_that_does_not_fit() -> None:
    driver = Driver(max_num_batched_tokens=8, max_num_seqs=1)
    driver.add(bidirectional("a", 20, (5, 12), (12, 19)))
    plans = [driver.step().spans[0] for _ in range(4)]
    assert [(span.start, span.num_tokens) for span in plans] == [(0, 5), (5, 7), (12, 8), (20, 1)]
    assert [span.samples for span in plans] == [False, False, True, True]


def test_it_waits_for_a_step_with_room() -> None:
    driver = Driver(max_num_batched_tokens=10, max_num_seqs=2)
    driver.add(request("first", 7, 2), bidirectional("a", 9, (0, 9)))
    assert [span.seq_id for span in driver.step().spans] == [0]
    assert [(s.seq_id, s.num_tokens) for s in driver.step().spans] == [(0, 1), (1, 9)]


def test_what_is_found_in_the_cache_may_end_inside() -> None:
    driver = Driver(max_num_batched_tokens=16, max_num_seqs=1)
    driver.add(bidirectional("a", 14, (0, 14), max_tokens=1))
    driver.run()
    again = dataclasses.replace(bidirectional("a", 14, (0, 14), max_tokens=1), request_id="b")
    driver.add(again)
    (span,) = driver.step().spans
    assert (span.start, span.num_tokens) == (12, 2)


def test_a_span_that_no_step_has_room_for_is_refused() -> None:
    driver = Driver(max_num_batched_tokens=10, max_num_seqs=3)
    driver.add(bidirectional("fits", 20, (2, 10)))
    with pytest.raises(
        PromptTooLongError, match=r"9 tokens .* room for 8 .*raise max_num_batched_tokens"
    ):
        driver.add(bidirectional("not", 20, (2, 11)))
    driver.run()


@pytest.mark.parametrize("spans", [((3, 3),), ((5, 7), (6, 9)), ((4, 11),), ((-1, 2),)])
def test_impossible_spans(spans: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="bidirectional_spans must be"):
        bidirectional("a", 10, *spans)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_span_ends_inside_whatever_else_runs(data: st.DataObject) -> None:
    seqs = data.draw(st.integers(1, 4))
    driver = Driver(
        max_num_seqs=seqs,
        max_num_batched_tokens=data.draw(st.integers(seqs + 7, 24)),
        num_blocks=data.draw(st.integers(12, 40)),
        enable_prefix_caching=data.draw(st.booleans()),
    )
    requests = []
    for index in range(data.draw(st.integers(1, 6))):
        cuts = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=5))
        edges = [sum(cuts[:n]) for n in range(len(cuts) + 1)]
        spans = tuple(pair for pair in pairwise(edges) if data.draw(st.booleans()))
        requests.append(bidirectional(f"r{index}", edges[-1], *spans))
    driver.add(*requests)
    while driver.scheduler.has_work:
        for span in driver.step().spans:
            end = span.start + span.num_tokens
            assert all(not a < end < b for a, b in requests[span.seq_id].bidirectional_spans)
        assert driver.num_steps < 1000
    for one in requests:
        assert driver.outcomes[one.request_id].token_ids == expected_tokens(one, vocab_size=64)
