"""What one plan holds: order, budgets, chunks, prefix hits, preemption."""

from __future__ import annotations

import pytest

from sensorium.core.blocks import IntegrityError
from sensorium.core.plan import StepResult
from sensorium.errors import InvalidRequestError, OverloadedError, PromptTooLongError
from tests.core.driver import Driver, request
from tests.fakes import expected_tokens


def spans_of(driver: Driver) -> list[tuple[int, int, int]]:
    return [(span.seq_id, span.start, span.num_tokens) for span in driver.step().spans]


def test_a_prompt_and_then_one_token_a_step() -> None:
    driver = Driver()
    driver.add(request("a", 6, max_tokens=3))
    assert spans_of(driver) == [(0, 0, 6)]
    assert spans_of(driver) == [(0, 6, 1)]
    assert spans_of(driver) == [(0, 7, 1)]
    outcome = driver.outcomes["a"]
    assert outcome.token_ids == expected_tokens(request("a", 6, max_tokens=3), vocab_size=64)
    assert outcome.finish_reason == "length"
    driver.run()


def test_a_long_prompt_goes_in_chunks_and_samples_at_its_end_only() -> None:
    driver = Driver(max_num_batched_tokens=4)
    driver.add(request("a", 10, max_tokens=1))
    plans = [driver.step() for _ in range(3)]
    assert [(s.start, s.num_tokens, s.samples) for p in plans for s in p.spans] == [
        (0, 4, False),
        (4, 4, False),
        (8, 2, True),
    ]
    assert len(driver.outcomes["a"].updates) == 1
    assert [len(plan.new) for plan in plans] == [1, 0, 0]


def test_running_sequences_come_before_waiting_ones() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.add(request("a", 6))
    driver.step()
    driver.add(request("b", 20))
    assert spans_of(driver) == [(0, 6, 1), (1, 0, 7)]


def test_a_long_prompt_leaves_tokens_for_those_that_generate() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.add(*(request(name, 2, max_tokens=9) for name in "ab"))
    driver.step()
    driver.add(request("long", 30, priority=-1))
    assert spans_of(driver) == [(0, 2, 1), (1, 2, 1), (2, 0, 6)]
    assert spans_of(driver) == [(2, 6, 6), (0, 3, 1), (1, 3, 1)], "first in order, yet not alone"


def test_order_is_priority_and_then_arrival() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add(request("a", 3, 1), request("b", 3, 1, priority=1), request("c", 3, 1, priority=-1))
    driver.add(request("d", 3, 1))
    order = [driver.step().spans[0].seq_id for _ in range(4)]
    assert order == [2, 0, 3, 1]


def test_no_more_sequences_than_allowed() -> None:
    driver = Driver(max_num_seqs=2)
    driver.add(*(request(name) for name in "abc"))
    driver.step()
    stats = driver.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    driver.run()


def test_without_chunks_a_prompt_goes_whole_or_waits_and_lets_nobody_pass() -> None:
    driver = Driver(enable_chunked_prefill=False, max_num_batched_tokens=10)
    driver.add(request("a", 6, 2), request("b", 6, 2), request("c", 2, 2))
    assert spans_of(driver) == [(0, 0, 6)]
    assert spans_of(driver) == [(0, 6, 1), (1, 0, 6), (2, 0, 2)]
    driver.run()


def test_without_chunks_what_has_grown_beyond_a_step_comes_back_in_pieces() -> None:
    driver = Driver(
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        max_num_batched_tokens=8,
        num_blocks=6,
        max_num_seqs=2,
    )
    driver.add(request("a", 4, 20), request("b", 4, 20))
    outcomes = driver.run(max_steps=200)
    assert driver.scheduler.stats().num_preemptions > 0
    for name in "ab":
        assert outcomes[name].token_ids == expected_tokens(request(name, 4, 20), vocab_size=64)


def test_a_repeated_prompt_is_taken_from_the_cache() -> None:
    driver = Driver()
    prompt = list(range(10))
    driver.add(request("a", prompt))
    driver.run()
    driver.add(request("b", prompt))
    assert spans_of(driver) == [(1, 8, 2)]
    assert driver.outcomes["b"].last.num_cached_tokens == 8
    assert driver.outcomes["a"].last.num_cached_tokens == 0
    stats = driver.scheduler.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (20, 8)
    driver.run()
    assert driver.outcomes["b"].token_ids == driver.outcomes["a"].token_ids


def test_with_prefix_caching_off_everything_is_computed() -> None:
    driver = Driver(enable_prefix_caching=False)
    prompt = list(range(10))
    driver.add(request("a", prompt, 1), request("b", prompt, 1))
    assert spans_of(driver) == [(0, 0, 10), (1, 0, 10)]
    assert driver.outcomes["b"].last.num_cached_tokens == 0


def test_samples_of_one_prompt_compute_it_once() -> None:
    driver = Driver(max_num_seqs=16)
    prompt = list(range(17))
    driver.add(*(request(f"sample-{i}", prompt, 2) for i in range(16)))
    assert spans_of(driver) == [(0, 0, 17)]
    assert spans_of(driver) == [(0, 17, 1), *((i, 16, 1) for i in range(1, 16))]
    driver.run()
    assert driver.outcomes["sample-9"].last.num_cached_tokens == 16


def test_others_pass_one_that_waits_for_a_block() -> None:
    driver = Driver(max_num_batched_tokens=16)
    prompt = list(range(12))
    driver.add(request("a", prompt), request("same", prompt), request("other", 3))
    assert spans_of(driver) == [(0, 0, 12), (2, 0, 3)]
    assert (1, 8, 4) in spans_of(driver), "its last block is computed: the last token must be"


def test_one_that_waits_starts_as_soon_as_the_other_has_gone() -> None:
    driver = Driver(max_num_batched_tokens=4)
    prompt = list(range(12))
    driver.add(request("a", prompt), request("same", prompt))
    assert spans_of(driver) == [(0, 0, 4)]
    driver.abort("a")
    assert spans_of(driver) == [(1, 4, 4)], "the first block is there, the second is not awaited"


def test_blocks_with_numbers_that_are_not_finite_are_neither_shared_nor_awaited() -> None:
    driver = Driver(max_num_batched_tokens=8)
    prompt = list(range(20))
    driver.add(request("bad", prompt, 1), request("same", prompt, 1))
    plan = driver.schedule()
    assert [(span.seq_id, span.num_tokens) for span in plan.spans] == [(0, 8)]
    result = driver.runner.execute(plan)
    result.unsound.add(0)
    driver.commit(plan, result)
    assert spans_of(driver) == [(0, 8, 8)], "the step is full"
    assert spans_of(driver) == [(0, 16, 4), (1, 0, 4)], "from its first token on"
    driver.run()
    assert driver.outcomes["same"].last.num_cached_tokens == 0


def test_an_unsound_sequence_frees_blocks_behind_its_window() -> None:
    driver = Driver(max_num_batched_tokens=8, window=4)
    driver.add(request("a", list(range(20))))
    plan = driver.schedule()
    result = driver.runner.execute(plan)
    result.unsound.add(0)
    driver.commit(plan, result)
    assert driver.scheduler.stats().num_used_blocks == 4, "of five"
    driver.step()
    assert driver.scheduler.stats().num_used_blocks == 2
    driver.run()


def test_only_the_shared_part_of_a_prompt_is_awaited() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.add(request("a", list(range(40))), request("b", [*range(4), 90, 91, 92]))
    assert spans_of(driver) == [(0, 0, 8)]
    assert spans_of(driver) == [(0, 8, 8)], "the step is full"
    driver.abort("a")
    assert spans_of(driver) == [(1, 4, 3)]


def test_prompt_logprobs_come_once_and_whole_and_use_no_cache() -> None:
    driver = Driver(max_num_batched_tokens=4)
    prompt = list(range(10))
    driver.add(request("a", prompt, 2))
    driver.run()
    driver.add(request("b", prompt, 3, prompt_logprobs=0))
    driver.run()
    outcome = driver.outcomes["b"]
    assert outcome.last.num_cached_tokens == 0
    first, *rest = outcome.updates
    assert first.prompt_logprobs is not None
    assert [entry[0][0] for entry in first.prompt_logprobs] == prompt[1:]
    assert all(update.prompt_logprobs is None for update in rest)


def test_a_prompt_of_one_token_has_empty_prompt_logprobs() -> None:
    driver = Driver()
    driver.add(request("a", 1, 1, prompt_logprobs=0))
    assert driver.run()["a"].last.prompt_logprobs == ()


def test_the_last_to_come_is_preempted_and_goes_on_later_unchanged() -> None:
    driver = Driver(num_blocks=6, enable_prefix_caching=False)
    requests = [request("a", 8, 8), request("b", 8, 8)]
    driver.add(*requests)
    while driver.scheduler.stats().num_preemptions == 0:
        plan = driver.step()
    assert [span.seq_id for span in plan.spans] == [0]
    assert plan.dropped == (1,)
    assert driver.scheduler.stats().num_waiting == 1
    outcomes = driver.run()
    for wanted in requests:
        outcome = outcomes[wanted.request_id]
        assert outcome.token_ids == expected_tokens(wanted, vocab_size=64)
    again = next(
        p.new[0] for p in driver.runner.plans if p.new and p.new[0].seq_id == 1 and p.step_id
    )
    assert len(again.token_ids) > 8, "what was generated comes back with it"


def test_a_step_that_preempts_admits_nobody() -> None:
    driver = Driver(num_blocks=6, enable_prefix_caching=False)
    driver.add(request("a", 8, 8), request("b", 8, 8))
    while driver.scheduler.stats().num_used_blocks < 6:
        driver.step()
    driver.add(request("small", 1, 8, priority=-1))
    while driver.scheduler.stats().num_preemptions == 0:
        plan = driver.step()
    assert plan.new == ()
    driver.run()


def test_a_newcomer_leaves_a_spare_block_for_those_that_run() -> None:
    driver = Driver(num_blocks=4, enable_prefix_caching=False)
    driver.add(request("a", 7, 3), request("b", 7, 3))
    assert spans_of(driver) == [(0, 0, 7)], "two blocks are free, but only one to be had"
    driver.run()
    assert driver.scheduler.stats().num_preemptions == 0


def test_the_lowest_priority_is_preempted_first() -> None:
    driver = Driver(num_blocks=6, enable_prefix_caching=False)
    driver.add(request("unimportant", 8, 8, priority=1), request("b", 8, 8))
    while driver.scheduler.stats().num_preemptions == 0:
        plan = driver.step()
    assert plan.dropped == (0,)
    driver.run()


def test_a_preempted_sequence_reports_what_was_cached_at_first() -> None:
    driver = Driver(num_blocks=7)
    driver.add(request("a", 8, 12))
    driver.step()
    driver.add(request("b", 8, 12))
    outcomes = driver.run()
    assert driver.scheduler.stats().num_preemptions > 0
    assert {update.num_cached_tokens for update in outcomes["b"].updates} == {0}


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    computed = {}
    for caching in (True, False):
        driver = Driver(num_blocks=8, enable_prefix_caching=caching)
        driver.add(request("a", 12, 8), request("b", 12, 8))
        driver.run()
        assert driver.scheduler.stats().num_preemptions > 0
        computed[caching] = driver.scheduler.stats().num_computed_tokens
    assert computed[True] < computed[False]


def test_the_cache_limit_ends_a_sequence() -> None:
    driver = Driver(num_blocks=3, block_size=4)
    driver.add(request("a", 5, 100))
    outcome = driver.run()["a"]
    assert outcome.finish_reason == "length"
    assert 5 + len(outcome.token_ids) == 13, "twelve are computed, the last need not be"


def test_the_context_ends_a_sequence() -> None:
    driver = Driver(max_model_len=9)
    driver.add(request("a", 5, 100))
    outcome = driver.run()["a"]
    assert outcome.finish_reason == "length"
    assert len(outcome.token_ids) == 4


def test_refused_requests_leave_no_trace() -> None:
    driver = Driver(max_model_len=9, max_num_waiting=1)
    with pytest.raises(PromptTooLongError):
        driver.scheduler.add(request("long", 9))
    driver.add(request("a"))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        driver.scheduler.add(request("a"))
    with pytest.raises(OverloadedError, match="1 requests are waiting"):
        driver.scheduler.add(request("b"))
    driver.scheduler.check_integrity()
    driver.run()
    driver.add(request("a"))


def test_times_come_from_the_clock() -> None:
    driver = Driver(max_num_seqs=1)
    driver.clock.now = 5.0
    driver.add(request("a", 4, 2), request("b", 4, 1))
    driver.step()
    driver.clock.advance(2.0)
    outcomes = driver.run()
    assert {update.first_scheduled_time for update in outcomes["a"].updates} == {5.0}
    assert outcomes["b"].last.first_scheduled_time == 7.0


def test_plans_and_results_alternate() -> None:
    driver = Driver()
    driver.add(request("a"))
    plan = driver.schedule()
    with pytest.raises(RuntimeError, match="has not been committed"):
        driver.scheduler.schedule()
    with pytest.raises(RuntimeError, match="not the one"):
        driver.scheduler.commit(plan, StepResult(plan.step_id + 1))
    driver.commit(plan, driver.runner.execute(plan))
    with pytest.raises(RuntimeError, match="not the one"):
        driver.scheduler.commit(plan, StepResult(plan.step_id))


def test_integrity_notices_a_lost_sequence() -> None:
    driver = Driver()
    driver.add(request("a"))
    driver.scheduler._waiting.clear()
    with pytest.raises(IntegrityError, match="queues and records differ"):
        driver.scheduler.check_integrity()
