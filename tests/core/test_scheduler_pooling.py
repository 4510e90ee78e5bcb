"""Sequences whose embedding is wanted: computed like prompts, over as soon as they are computed."""

from __future__ import annotations

import pytest

from sensorium.core.plan import StepResult
from sensorium.errors import PromptTooLongError
from tests.core.driver import Driver, media_prompt, pooling_request, request
from tests.fakes import expected_tokens, expected_vector


def test_a_vector_comes_with_the_last_chunk_and_ends_the_sequence() -> None:
    driver = Driver(max_num_batched_tokens=4)
    wanted = pooling_request("a", 10)
    driver.add(wanted)
    plans = [driver.step() for _ in range(3)]
    assert [(s.start, s.num_tokens, s.samples, s.pools) for p in plans for s in p.spans] == [
        (0, 4, False, False),
        (4, 4, False, False),
        (8, 2, False, True),
    ]
    [update] = driver.outcomes["a"].updates
    assert (update.embedding, update.finish_reason) == (expected_vector(wanted), "stop")
    assert update.sample is None
    assert driver.scheduler.stats().num_running == 0
    assert driver.step().dropped == (0,)
    driver.run()
    stats = driver.scheduler.stats()
    assert (stats.num_embeddings, stats.num_generated_tokens) == (1, 0)


def test_vectors_and_tokens_in_one_step() -> None:
    driver = Driver()
    generates, pools = request("a", 6, max_tokens=3), pooling_request("b", 7)
    driver.add(generates, pools)
    plan = driver.step()
    assert [(s.samples, s.pools) for s in plan.spans] == [(True, False), (False, True)]
    outcomes = driver.run()
    assert outcomes["a"].token_ids == expected_tokens(generates, vocab_size=64)
    assert outcomes["b"].last.embedding == expected_vector(pools)


def test_the_last_token_is_computed_though_the_whole_prompt_is_cached() -> None:
    driver = Driver()
    prompt = list(range(8))
    driver.add(pooling_request("a", prompt))
    driver.run()
    driver.add(pooling_request("b", prompt))
    plan = driver.step()
    assert [(s.start, s.num_tokens, s.pools) for s in plan.spans] == [(4, 4, True)]
    assert driver.outcomes["b"].last.num_cached_tokens == 4
    assert driver.outcomes["b"].last.embedding == driver.outcomes["a"].last.embedding
    driver.run()


def test_generating_and_pooling_share_the_prefix_cache() -> None:
    driver = Driver()
    prompt = list(range(10))
    driver.add(request("a", prompt, 2))
    driver.run()
    driver.add(pooling_request("b", prompt))
    driver.run()
    assert driver.outcomes["b"].last.num_cached_tokens == 8


def test_a_prompt_may_fill_the_context_and_no_more() -> None:
    driver = Driver(max_model_len=12)
    driver.add(pooling_request("a", 12))
    assert driver.run()["a"].finish_reason == "stop"
    with pytest.raises(
        PromptTooLongError,
        match=r"length is 12 tokens\. However, the prompt has 13 tokens; shorten",
    ):
        driver.add(pooling_request("b", 13))


def test_a_preempted_prompt_begins_anew_and_ends_the_same() -> None:
    driver = Driver(num_blocks=6, max_num_batched_tokens=2, enable_prefix_caching=False)
    grows, wanted = request("grows", 7, 12), pooling_request("wanted", 12)
    driver.add(grows)
    for _ in range(4):
        driver.step()
    driver.add(wanted)
    outcomes = driver.run()
    assert outcomes["wanted"].last.embedding == expected_vector(wanted)
    assert outcomes["grows"].token_ids == expected_tokens(grows, vocab_size=64)
    assert driver.scheduler.stats().num_preemptions > 0


def test_items_are_encoded_for_vectors_too() -> None:
    ids, items = media_prompt(1, ("cat", 5), 2)
    driver = Driver(max_num_batched_tokens=3)
    wanted = pooling_request("a", ids, items=items)
    driver.add(wanted)
    assert driver.run()["a"].last.embedding == expected_vector(wanted)
    assert driver.runner.num_encoded == {b"cat": 1}


def test_a_failure_and_a_missing_vector_are_errors_of_that_sequence() -> None:
    driver = Driver()
    driver.runner.fail_requests.add("bad")
    good = pooling_request("good", 5)
    driver.add(pooling_request("bad", 5), good)
    outcomes = driver.run()
    assert outcomes["bad"].finish_reason == "error"
    assert outcomes["good"].last.embedding == expected_vector(good)
    driver.add(pooling_request("lost", 5))
    plan = driver.schedule()
    driver.runner.execute(plan)
    [update] = driver.scheduler.commit(plan, StepResult(plan.step_id))
    assert (update.finish_reason, update.error) == (
        "error",
        "The step returned no embedding for this request.",
    )


def test_an_abort_while_the_step_runs() -> None:
    driver = Driver()
    driver.add(pooling_request("a", 5), pooling_request("b", 5))
    driver.step(abort_midway="a")
    assert not driver.outcomes["a"].updates
    assert driver.outcomes["b"].finish_reason == "stop"
    driver.run()
