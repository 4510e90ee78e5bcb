"""The fake runner must notice plans that contradict themselves, else it proves nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sensorium.core.plan import EncodeJob, NewSequence, Span, StepPlan
from sensorium.core.request import EngineRequest, ItemSpan
from sensorium.params import SamplingParams
from tests.fakes import FakeRunner, ManualClock, PlanError, expected_tokens

CAT = ItemSpan(b"cat", "image", ((1, 3),))
REQUEST = EngineRequest("r", (5, 9, 9, 9, 6), SamplingParams(max_tokens=4), 4, items=(CAT,))
JOB = EncodeJob(b"cat", 0, 0, 3)
FIRST = StepPlan(
    0,
    new=(NewSequence(0, REQUEST, REQUEST.token_ids),),
    encode=(JOB,),
    spans=(Span(0, 0, 5, (7, 3), True),),
)


def runner(**options: Any) -> FakeRunner:
    return FakeRunner(block_size=4, num_blocks=8, **options)


def follow(start: int, num_tokens: int = 1, new_block_ids: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(1, spans=(Span(0, start, num_tokens, new_block_ids, True),))


def test_tokens_are_a_function_of_prefix_and_items() -> None:
    fake = runner()
    tokens = [fake.execute(FIRST).samples[0][0].token_id]
    tokens += [fake.execute(follow(start)).samples[0][0].token_id for start in (5, 6, 7)]
    assert tokens == expected_tokens(REQUEST)
    dog = dataclasses.replace(REQUEST, items=(dataclasses.replace(CAT, digest=b"dog"),))
    assert expected_tokens(dog) != tokens
    assert expected_tokens(dataclasses.replace(REQUEST, cache_salt=b"x")) != tokens
    assert fake.num_computed_tokens == 8


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (follow(4, 2), "follows 5 computed"),
        (follow(5, 2), "has 6 tokens"),
        (StepPlan(1, spans=(Span(0, 5, 1, (), False),)), r"has samples, pools=\(False, False\)"),
        (StepPlan(1, spans=(Span(2, 0, 1, (), True),)), "not held"),
        (StepPlan(1, dropped=(3,)), "drops sequence 3"),
        (StepPlan(1, evict=(b"dog",)), "not resident"),
        (StepPlan(1, encode=(JOB,)), "again"),
        (StepPlan(1, encode=(dataclasses.replace(JOB, digest=b"dog"),)), "another digest"),
        (StepPlan(1, encode=(dataclasses.replace(JOB, num_embeds=4),)), "another length"),
        (dataclasses.replace(FIRST, encode=()), "twice"),
        (follow(5, 1, (8,)), "block 8 does not exist"),
    ],
)
def test_impossible_plans_are_noticed(plan: StepPlan, message: str) -> None:
    fake = runner()
    fake.execute(FIRST)
    with pytest.raises(PlanError, match=message):
        fake.execute(plan)


def test_a_span_needs_blocks_and_items() -> None:
    with pytest.raises(PlanError, match="read, not resident"):
        runner().execute(dataclasses.replace(FIRST, encode=()))
    with pytest.raises(PlanError, match="not covered by blocks"):
        runner().execute(dataclasses.replace(FIRST, spans=(Span(0, 0, 5, (7,), True),)))


def sharing(start: int, block_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> StepPlan:
    request = dataclasses.replace(REQUEST, request_id="other", token_ids=token_ids)
    num_tokens = len(token_ids) - start
    span = Span(1, start, num_tokens, block_ids, True)
    return StepPlan(1, new=(NewSequence(1, request, token_ids),), spans=(span,))


def test_a_shared_block_must_contain_what_is_taken_from_it() -> None:
    fake = runner()
    fake.execute(FIRST)
    fake.execute(sharing(4, (7, 2), (5, 9, 9, 9, 1, 2)))
    for block_ids, token_ids in [((3, 2), (5, 9, 9, 9, 1)), ((7, 2), (4, 9, 9, 9, 1))]:
        fake = runner()
        fake.execute(FIRST)
        with pytest.raises(PlanError, match="block 0 has other contents"):
            fake.execute(sharing(4, block_ids, token_ids))


def test_a_shared_block_must_not_be_written() -> None:
    fake = runner()
    fake.execute(FIRST)
    with pytest.raises(PlanError, match="writes block 3, which is shared"):
        fake.execute(sharing(4, (7, 3), (5, 9, 9, 9, 1)))


def test_budgets_are_checked() -> None:
    with pytest.raises(PlanError, match="encodes 3 embeddings"):
        runner(encode_budget=2).execute(FIRST)
    with pytest.raises(PlanError, match="3 embeddings resident"):
        runner(encoder_cache_size=2).execute(FIRST)


def test_failures_are_reported_as_a_runner_would() -> None:
    fake = runner()
    fake.fail_items.add(b"cat")
    result = fake.execute(FIRST)
    assert (result.failed_items, result.samples, result.failed) == ((b"cat",), {}, {})
    fake = runner()
    fake.fail_requests.add("r")
    result = fake.execute(FIRST)
    assert (set(result.failed), result.samples) == ({0}, {})


def test_a_script_and_logprobs() -> None:
    params = SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=0)
    request = dataclasses.replace(REQUEST, params=params)
    fake = runner(next_token=lambda request, known: len(known) * 10)
    plan = dataclasses.replace(FIRST, new=(NewSequence(0, request, request.token_ids),))
    result = fake.execute(plan)
    [sample] = result.samples[0]
    assert sample.token_id == 50
    assert sample.logprobs is not None
    assert [entry[0] for entry in sample.logprobs] == [50, 51, 52]
    assert [entry[0][0] for entry in result.prompt_logprobs[0]] == [9, 9, 9, 6]


def test_the_clock_moves_when_told() -> None:
    clock = ManualClock(3.0)
    clock.advance(0.5)
    assert clock() == 3.5
