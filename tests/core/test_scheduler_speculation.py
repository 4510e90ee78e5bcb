"""Tokens that are tried beside the next one: what a plan holds, and what is left of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sensorium.core.request import EngineRequest
from sensorium.core.speculation.speculator import SpeculationLimits
from tests.core.driver import Driver, request
from tests.fakes import expected_tokens

PERIODIC = [1, 2, 3, 1, 2, 3]


def speculating(num_tokens: int = 4, **limits: object) -> Driver:
    speculation = SpeculationLimits(num_tokens=num_tokens, shortest=2, longest=8)
    return Driver(speculation=speculation, **limits)


def periodic(made: EngineRequest, token_ids: Sequence[int]) -> int:
    return token_ids[-3]


def other(made: EngineRequest, token_ids: Sequence[int]) -> int:
    return 100 + len(token_ids)


def tried(driver: Driver) -> list[tuple[int, ...]]:
    return [span.draft_ids for span in driver.step().spans]


def test_right_tokens_come_several_in_a_step_with_an_update_each() -> None:
    driver = speculating()
    driver.runner.next_token = periodic
    driver.add(request("a", PERIODIC, max_tokens=11))
    assert tried(driver) == [()], "a prompt tries nothing"
    assert tried(driver) == [(2, 3, 1, 2)]
    outcome = driver.outcomes["a"]
    assert outcome.token_ids == [1, 2, 3, 1, 2, 3]
    assert len(outcome.updates) == 6
    assert tried(driver) == [(1, 2, 3, 1)]
    driver.run()
    assert outcome.token_ids == [1, 2, 3] * 3 + [1, 2]
    assert [update.finish_reason for update in outcome.updates] == [None] * 10 + ["length"]
    stats = driver.scheduler.stats()
    assert stats.num_generated_tokens == 11
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (2, 8, 8)
    assert stats.num_accepted_at == [2, 2, 2, 2]


def test_wrong_tokens_leave_nothing_behind() -> None:
    driver = speculating(block_size=2)
    driver.runner.next_token = other
    driver.add(request("a", PERIODIC, max_tokens=8))
    driver.step()
    driver.outcomes["a"].token_ids.clear()
    # A repetition that the text does not follow: made by an answer that begins like the prompt.
    driver.runner.next_token = lambda made, ids: {7: 1, 8: 2}.get(len(ids), 100 + len(ids))
    spans = []
    while driver.scheduler.has_work:
        spans += driver.step().spans
        num_known = len(PERIODIC) + 1 + len(driver.outcomes["a"].token_ids)
        assert driver.scheduler.stats().num_used_blocks <= -(-num_known // 2)
    failed = [span for span in spans if span.draft_ids]
    assert failed
    assert failed[0].draft_ids[:1] == (3,)
    stats = driver.scheduler.stats()
    assert stats.num_accepted_tokens == 0
    driver.runner.next_token = other
    again = [*PERIODIC, 106, 1, 2, 3, 1, 2, 3, 1]
    driver.add(request("b", again, max_tokens=1))
    assert driver.step().spans[0].start == 8, "what was tried is not in the prefix cache"


def test_no_more_is_tried_than_may_come() -> None:
    for max_tokens in (2, 3, 5):
        driver = speculating()
        driver.runner.next_token = periodic
        driver.add(request("a", PERIODIC, max_tokens=max_tokens))
        driver.step()
        assert len(tried(driver)[0]) == max_tokens - 2
        assert len(driver.run()["a"].token_ids) == max_tokens
    driver = speculating(max_model_len=9)
    driver.runner.next_token = periodic
    driver.add(request("a", PERIODIC, max_tokens=30))
    driver.step()
    assert len(tried(driver)[0]) == 1
    assert driver.run()["a"].token_ids == [1, 2, 3]


def test_no_sequence_is_preempted_for_tokens_that_are_tried() -> None:
    driver = speculating(num_blocks=5, block_size=4)
    driver.runner.next_token = periodic
    driver.add(request("a", PERIODIC, max_tokens=4), request("b", PERIODIC, max_tokens=4))
    driver.run()
    assert driver.scheduler.stats().num_preemptions == 0
    assert driver.scheduler.stats().num_drafts > 0


def test_the_token_budget_of_a_step_bounds_what_is_tried() -> None:
    driver = speculating(max_num_batched_tokens=6)
    driver.runner.next_token = periodic
    driver.add(request("a", PERIODIC, max_tokens=12))
    driver.step()
    driver.add(request("b", PERIODIC[::-1], max_tokens=12))
    driver.step()
    while driver.scheduler.has_work:
        plan = driver.step()
        assert plan.num_tokens <= 6


def test_tokens_are_not_tried_across_a_change_of_rotary_factors() -> None:
    driver = speculating()
    driver.runner.next_token = periodic
    driver.add(request("a", PERIODIC, max_tokens=12, rope=(9, 64)))
    driver.step()
    assert tried(driver) == [(2, 3)]
    driver.run()
    assert driver.outcomes["a"].token_ids == [1, 2, 3] * 4


@pytest.mark.parametrize("window", [None, 5])
def test_windows_free_blocks_that_no_row_reads(window: int | None) -> None:
    driver = speculating(block_size=2, window=window)
    driver.runner.next_token = periodic
    driver.add(request("a", PERIODIC, max_tokens=30))
    assert driver.run()["a"].token_ids == [1, 2, 3] * 10
    assert driver.scheduler.stats().num_accepted_tokens > 10


def test_a_sequence_that_is_aborted_while_tokens_are_tried_leaves_nothing() -> None:
    driver = speculating()
    driver.runner.next_token = periodic
    driver.add(request("a", PERIODIC, max_tokens=12))
    driver.step()
    plan = driver.step(abort_midway="a")
    assert plan.spans[0].draft_ids
    driver.run()


def test_times_of_steps_are_measured_by_the_clock() -> None:
    """Rows that cost more than they can bring are not tried for long."""
    driver = speculating()
    driver.runner.next_token = periodic
    driver.add(request("a", PERIODIC, max_tokens=210))
    numbers = []
    while driver.scheduler.has_work:
        plan = driver.schedule()
        driver.clock.advance(plan.num_tokens * 0.06 - 0.04)
        driver.commit(plan, driver.runner.execute(plan))
        numbers.append(len(plan.spans[0].draft_ids) if plan.spans else 0)
    assert sum(numbers[-40:]) <= 12
    assert driver.outcomes["a"].token_ids == [1, 2, 3] * 70


def test_without_speculation_nothing_is_tried() -> None:
    driver = Driver()
    wanted = request("a", PERIODIC, max_tokens=9)
    driver.add(wanted)
    assert driver.run()["a"].token_ids == expected_tokens(wanted, vocab_size=64)
    assert driver.scheduler.stats().num_drafts == 0


@pytest.mark.parametrize("most", [0, 1])
def test_only_tokens_that_the_runner_tried_are_counted(most: int) -> None:
    """It leaves out those that a grammar forbids, though the next token is the one left out."""
    driver = speculating(block_size=2)
    driver.runner.next_token = periodic
    driver.runner.most_drafts = most
    driver.add(request("a", PERIODIC, max_tokens=12))
    driver.step()
    num_planned = sum(len(drafts) for _ in range(3) for drafts in tried(driver))
    assert num_planned > 3
    stats = driver.scheduler.stats()
    assert (stats.num_drafts, stats.num_draft_tokens) == (3 * most, 3 * most)
    assert stats.num_accepted_tokens == 3 * most
    assert stats.num_accepted_at == [3] * most
    driver.run()
    assert driver.outcomes["a"].token_ids == [1, 2, 3] * 4


def test_tokens_of_an_expected_answer_are_tried_and_counted() -> None:
    driver = speculating(num_tokens=3)
    expected = [31, 32, 33, 34, 50, 36, 37, 38, 39]
    answer = [31, 32, 33, 34, 35, 36, 37, 38, 39, 40]
    driver.runner.next_token = lambda made, ids: answer[len(ids) - len(made.token_ids)]
    driver.add(request("a", [1, 2, 3], len(answer), predicted=expected))
    driver.add(request("b", [4, 5, 6], len(answer)))
    driver.step()
    assert [span.draft_ids for span in driver.step().spans] == [(32, 33, 34), ()]
    assert [span.draft_ids for span in driver.step().spans] == [(36, 37, 38), ()], (
        "one instead of one"
    )
    driver.run()
    assert driver.outcomes["a"].token_ids == answer
    right, wrong = driver.outcomes["a"].last.num_predicted
    assert right >= 6
    assert driver.outcomes["b"].last.num_predicted == (0, 0)
    stats = driver.scheduler.stats()
    assert (right, right + wrong) == (stats.num_accepted_tokens, stats.num_draft_tokens)


def test_each_token_counts_what_was_right_up_to_it() -> None:
    """A stop string may end the text at any of them."""
    driver = speculating(num_tokens=3)
    answer = list(range(31, 41))
    driver.runner.next_token = lambda made, ids: answer[len(ids) - len(made.token_ids)]
    driver.add(request("a", [1, 2, 3], len(answer), predicted=[*answer[:5], 50, *answer[6:]]))
    driver.step()
    assert [span.draft_ids for span in driver.step().spans] == [(32, 33, 34)]
    updates = driver.outcomes["a"].updates
    assert [update.num_predicted for update in updates] == [(0, 0), (1, 0), (2, 0), (3, 0), (3, 0)]
    driver.run()
    counts = [update.num_predicted for update in updates]
    assert counts == sorted(counts)
    assert all(right < index for index, (right, _) in enumerate(counts, 1))


def test_a_preempted_sequence_goes_on_in_its_expected_answer() -> None:
    driver = speculating(num_blocks=8, block_size=2)
    for name in "ab":
        driver.add(request(name, 3, 10, predicted=list(range(1, 60))))
    driver.runner.next_token = lambda made, ids: len(ids) - len(made.token_ids) + 1
    driver.run()
    assert driver.scheduler.stats().num_preemptions > 0
    for name in "ab":
        assert driver.outcomes[name].token_ids == list(range(1, 11))
