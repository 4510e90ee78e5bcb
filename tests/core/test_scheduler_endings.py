"""How sequences end: stop tokens, failures, aborts; and items on their way through."""

from __future__ import annotations

import pytest

from sensorium.core.plan import StepResult
from sensorium.errors import MediaTooLargeError
from tests.core.driver import Driver, media_prompt, request
from tests.fakes import expected_tokens


def scripted(tokens: list[int], **limits: int) -> Driver:
    """A driver whose runner says ``tokens``, one after the other."""
    driver = Driver(**limits)
    driver.runner.next_token = lambda req, known: tokens[len(known) - len(req.token_ids)]
    return driver


def test_end_of_sequence_ends_without_a_stop_token() -> None:
    driver = scripted([5, 2, 7])
    driver.add(request("a", max_tokens=3, eos=(2,)))
    outcome = driver.run()["a"]
    assert outcome.token_ids == [5, 2]
    assert (outcome.finish_reason, outcome.last.stop_token_id) == ("stop", None)


def test_ignore_eos_goes_on() -> None:
    driver = scripted([5, 2, 7])
    driver.add(request("a", max_tokens=3, eos=(2,), ignore_eos=True))
    outcome = driver.run()["a"]
    assert outcome.token_ids == [5, 2, 7]
    assert outcome.finish_reason == "length"


def test_a_stop_token_is_reported() -> None:
    driver = scripted([5, 6, 7])
    driver.add(request("a", max_tokens=3, stop_token_ids=[6]))
    outcome = driver.run()["a"]
    assert outcome.token_ids == [5, 6]
    assert (outcome.finish_reason, outcome.last.stop_token_id) == ("stop", 6)


def test_nothing_stops_before_min_tokens() -> None:
    driver = scripted([2, 6, 2, 9])
    driver.add(request("a", max_tokens=4, eos=(2,), stop_token_ids=[6], min_tokens=3))
    outcome = driver.run()["a"]
    assert outcome.token_ids == [2, 6, 2]
    assert outcome.finish_reason == "stop"


def test_a_failed_sequence_ends_with_its_message_and_harms_nobody() -> None:
    driver = Driver()
    driver.runner.fail_requests.add("bad")
    driver.add(request("good"), request("bad"), request("fine"))
    outcomes = driver.run()
    assert outcomes["bad"].finish_reason == "error"
    assert outcomes["bad"].last.error == "request bad was told to fail"
    for name in ("good", "fine"):
        assert outcomes[name].token_ids == expected_tokens(request(name), vocab_size=64)


def test_a_step_that_returns_no_token_is_an_error_of_that_sequence() -> None:
    driver = Driver()
    driver.add(request("a"), request("b"))
    plan = driver.schedule()
    result = driver.runner.execute(plan)
    del result.samples[0]
    driver.commit(plan, result)
    assert driver.outcomes["a"].finish_reason == "error"
    assert driver.outcomes["b"].finish_reason is None
    driver.run()


def test_a_step_that_failed_as_a_whole_can_be_committed() -> None:
    driver = Driver()
    ids, items = media_prompt(("cat", 4), 1)
    driver.add(request("a", ids, items=items), request("b"))
    plan = driver.schedule()
    result = StepResult(
        plan.step_id,
        failed={span.seq_id: "out of memory" for span in plan.spans},
        failed_items=tuple(job.digest for job in plan.encode),
    )
    driver.commit(plan, result)
    assert [driver.outcomes[name].last.error for name in "ab"] == ["out of memory"] * 2
    assert driver.scheduler.stats().num_used_blocks == 0


def test_a_failed_item_fails_those_that_read_it_in_this_step() -> None:
    driver = Driver()
    driver.runner.fail_items.add(b"cat")
    cat, cat_items = media_prompt(1, ("cat", 4), 2)
    dog, dog_items = media_prompt(1, ("dog", 4), 2)
    driver.add(request("cat", cat, items=cat_items), request("dog", dog, items=dog_items))
    driver.add(request("cat too", cat, items=cat_items, salt=b"x"))
    driver.step()
    driver.runner.fail_items.clear()
    for name in ("cat", "cat too"):
        assert driver.outcomes[name].last.error == "Item 0 (image) could not be encoded."
    driver.add(request("cat again", cat, items=cat_items))
    outcomes = driver.run()
    assert outcomes["dog"].finish_reason == "length"
    again = outcomes["cat again"]
    assert len(again.token_ids) == 4, "it is encoded anew, and this time it works"


def test_abort_while_waiting_while_running_and_between_schedule_and_commit() -> None:
    driver = Driver(max_num_seqs=2)
    driver.add(*(request(name) for name in "abc"))
    driver.step()
    driver.abort("c")
    driver.abort("a")
    driver.step(abort_midway="b")
    assert driver.outcomes["b"].updates == driver.outcomes["b"].updates[:1]
    assert not driver.scheduler.abort("b"), "gone already"
    assert not driver.scheduler.abort("never there")
    assert driver.scheduler.has_work, "the runner has to be told"
    assert set(driver.step().dropped) == {1}
    driver.run()


def test_an_id_can_be_used_again_after_its_end_and_while_its_step_runs() -> None:
    driver = Driver()
    driver.add(request("a", 6))
    plan = driver.schedule()
    driver.abort("a")
    driver.add(request("a", 6))
    driver.commit(plan, driver.runner.execute(plan))
    assert driver.outcomes["a"].updates == [], "the first one's token is not the second one's"
    assert driver.run()["a"].token_ids == expected_tokens(request("a", 6), vocab_size=64)


def test_blocks_of_an_aborted_step_are_not_found() -> None:
    driver = Driver()
    driver.add(request("a", list(range(10))))
    driver.step(abort_midway="a")
    driver.add(request("b", list(range(10))))
    driver.run()
    assert driver.outcomes["b"].last.num_cached_tokens == 0


def test_items_of_several_sequences_are_encoded_in_one_step_each_once() -> None:
    driver = Driver()
    for name, animals in {"a": "cat dog", "b": "dog", "c": "owl dog"}.items():
        ids, items = media_prompt(1, *((animal, 4) for animal in animals.split()), 2)
        driver.add(request(name, ids, items=items, salt=name.encode()))
    plan = driver.step()
    assert [job.digest for job in plan.encode] == [b"cat", b"dog", b"owl"]
    assert [(job.seq_id, job.item_index) for job in plan.encode] == [(0, 0), (0, 1), (2, 0)]
    stats = driver.scheduler.stats()
    assert (stats.num_encoder_queries, stats.num_encoder_hits) == (5, 2)
    driver.run()


def test_a_chunk_ends_before_an_item_that_cannot_be_encoded_yet() -> None:
    driver = Driver(encode_budget=5)
    ids, items = media_prompt(1, ("cat", 4), 2, ("dog", 3), 3)
    driver.add(request("a", ids, 1, items=items))
    plans = [driver.step() for _ in range(2)]
    assert [(p.spans[0].start, p.spans[0].num_tokens) for p in plans] == [(0, 6), (6, 4)]
    assert [[job.digest for job in p.encode] for p in plans] == [[b"cat"], [b"dog"]]


def test_sequences_share_the_encoder_budget_of_a_step() -> None:
    driver = Driver(encode_budget=7)
    for name, animal in [("a", "cat"), ("b", "dog"), ("c", "owl")]:
        ids, items = media_prompt(ord(name), (animal, 4), 2)
        driver.add(request(name, ids, 1, items=items))
    plans = [driver.step() for _ in range(3)]
    assert [[job.digest for job in p.encode] for p in plans] == [[b"cat"], [b"dog"], [b"owl"]]
    assert [span.num_tokens for span in plans[0].spans] == [6, 1, 1]


def test_a_chunk_may_end_inside_an_item() -> None:
    driver = Driver(max_num_batched_tokens=3)
    ids, items = media_prompt(1, ("cat", 6), 2)
    wanted = request("a", ids, 2, items=items)
    driver.add(wanted)
    assert driver.run()["a"].token_ids == expected_tokens(wanted, vocab_size=64)
    assert driver.runner.num_encoded == {b"cat": 1}


def test_an_item_is_reused_by_a_later_prompt_and_evicted_when_room_is_needed() -> None:
    driver = Driver(encoder_cache_size=6)
    for name, animal in [("a", "cat"), ("b", "cat"), ("c", "dog"), ("d", "cat")]:
        ids, items = media_prompt(ord(name), (animal, 4))
        driver.add(request(name, ids, items=items))
        driver.run()
    assert driver.runner.num_encoded == {b"cat": 2, b"dog": 1}
    assert driver.scheduler.stats().num_encoder_hits == 1
    assert [plan.evict for plan in driver.runner.plans if plan.evict] == [(b"cat",), (b"dog",)]


def test_an_item_covered_by_the_prefix_cache_is_not_encoded() -> None:
    driver = Driver(encoder_cache_size=4)
    ids, items = media_prompt(("cat", 4), 1, 2, 3, 4)
    driver.add(request("a", ids, items=items))
    driver.run()
    other, other_items = media_prompt(("dog", 4))
    driver.add(request("b", other, items=other_items))
    driver.run()
    assert b"cat" not in driver.runner.resident
    driver.add(request("c", ids, items=items))
    driver.run()
    assert driver.runner.num_encoded[b"cat"] == 1
    assert driver.outcomes["c"].token_ids == driver.outcomes["a"].token_ids


def test_two_different_images_do_not_share_a_prefix() -> None:
    driver = Driver()
    for name, animal in [("a", "cat"), ("b", "dog")]:
        ids, items = media_prompt((animal, 8), 1, 2)
        driver.add(request(name, ids, items=items))
        driver.run()
    assert driver.outcomes["b"].last.num_cached_tokens == 0
    assert driver.outcomes["a"].token_ids != driver.outcomes["b"].token_ids


def test_an_item_larger_than_the_budget_is_refused_by_number() -> None:
    driver = Driver(encode_budget=4)
    ids, items = media_prompt(("cat", 5))
    with pytest.raises(MediaTooLargeError, match="Item 0"):
        driver.scheduler.add(request("a", ids, items=items))


def test_a_stream_of_small_items_does_not_keep_a_large_one_out() -> None:
    driver = Driver(encoder_cache_size=8, encode_budget=8, max_num_batched_tokens=6, max_num_seqs=4)
    for number in range(6):
        ids, items = media_prompt(number, (f"small {number}", 5), 3)
        driver.add(request(f"s{number}", ids, 2, items=items))
    driver.step()
    ids, items = media_prompt(("large", 8), 1)
    driver.add(request("large", ids, 1, items=items, priority=-1))
    for number in range(6, 30):
        ids, items = media_prompt(number, (f"small {number}", 5), 3)
        driver.add(request(f"s{number}", ids, 2, items=items))
        driver.step()
        if driver.outcomes["large"].finish_reason:
            break
    assert driver.outcomes["large"].finish_reason == "length"
    assert driver.num_steps < 12
    driver.run()
