from __future__ import annotations

import pytest

from sensorium.core.blocks import IntegrityError
from sensorium.core.encoder_cache import EncodePlanner, EncoderCacheBudget
from sensorium.core.request import ItemSpan, Sequence
from tests.core.driver import item, media_prompt, request


def seq_with(seq_id: int, *parts: int | tuple[str, int], num_computed: int = 0) -> Sequence:
    ids, items = media_prompt(*parts)
    return Sequence(seq_id, request("r", ids, items=items), ids, num_computed=num_computed)


CAT, DOG, OWL = item("cat", 0, 4), item("dog", 0, 3), item("owl", 4, 2)


def test_an_item_stays_for_the_next_one_who_wants_it() -> None:
    budget = EncoderCacheBudget(10)
    assert budget.admit(1, CAT) == []
    budget.unpin_all(1)
    assert CAT.digest in budget
    assert budget.is_idle(CAT.digest)
    budget.pin(2, CAT)
    assert not budget.is_idle(CAT.digest)
    assert budget.num_room == 6


def test_the_least_recently_used_idle_item_goes_first() -> None:
    budget = EncoderCacheBudget(9)
    for seq_id, new in enumerate([CAT, DOG, OWL]):
        budget.admit(seq_id, new)
    for seq_id in (1, 0, 2):
        budget.unpin_all(seq_id)
    assert budget.admit(5, item("elk", 0, 1)) == [DOG.digest]
    assert budget.admit(6, item("fox", 0, 7)) == [CAT.digest, OWL.digest]


def test_a_pinned_item_is_never_evicted() -> None:
    budget = EncoderCacheBudget(7)
    budget.admit(1, CAT)
    budget.admit(2, DOG)
    budget.unpin_all(2)
    with pytest.raises(ValueError, match="4 embeddings wanted, room for 3"):
        budget.admit(3, item("fox", 0, 4))
    assert budget.admit(3, item("elk", 0, 3)) == [DOG.digest]
    assert CAT.digest in budget


def test_an_item_is_pinned_until_each_of_its_readers_has_passed() -> None:
    budget = EncoderCacheBudget(10)
    budget.admit(1, CAT)
    budget.pin(2, CAT)
    budget.unpin_passed(1, 4)
    assert not budget.is_idle(CAT.digest)
    budget.unpin_passed(2, 3)
    assert not budget.is_idle(CAT.digest)
    budget.unpin_passed(2, 4)
    assert budget.is_idle(CAT.digest)


def test_the_same_image_twice_in_a_prompt_is_pinned_for_each_place() -> None:
    budget = EncoderCacheBudget(10)
    here, there = item("cat", 0, 4), item("cat", 8, 4)
    budget.admit(1, here)
    budget.pin(1, there)
    budget.unpin_passed(1, 6)
    assert budget.holds(1, there)
    assert not budget.holds(1, here)
    assert not budget.is_idle(b"cat")
    assert budget.holders(b"cat") == [1]


def test_a_failed_item_is_forgotten_once_nobody_needs_it() -> None:
    budget = EncoderCacheBudget(10)
    budget.admit(1, CAT)
    with pytest.raises(ValueError, match="cannot be forgotten"):
        budget.forget(CAT.digest)
    budget.unpin_all(1)
    budget.forget(CAT.digest)
    budget.forget(CAT.digest)
    assert CAT.digest not in budget
    assert budget.num_resident == 0
    budget.check_integrity([])


def test_integrity_notices_pins_of_the_gone_and_the_passed() -> None:
    budget = EncoderCacheBudget(10)
    seq = seq_with(1, ("cat", 4), 5)
    budget.admit(1, seq.request.items[0])
    budget.check_integrity([seq])
    with pytest.raises(IntegrityError, match="is gone"):
        budget.check_integrity([])
    seq.num_computed = 4
    with pytest.raises(IntegrityError, match="has passed"):
        budget.check_integrity([seq])
    seq.num_computed = 0
    budget.num_resident += 1
    with pytest.raises(IntegrityError, match="miscounted"):
        budget.check_integrity([seq])


def test_a_span_reaches_over_what_can_be_encoded_and_stops_before_what_cannot() -> None:
    budget = EncoderCacheBudget(100)
    planner = EncodePlanner(budget, encode_budget=6)
    seq = seq_with(1, 5, ("cat", 4), 5, ("dog", 3), 5)
    assert planner.reach(seq, 10) == 6, "the budget of the step has room for the cat only"
    planner.pin_items(seq, 6)
    (job,) = planner.jobs
    assert (job.digest, job.seq_id, job.item_index, job.num_embeds) == (b"cat", 1, 0, 4)
    assert budget.holders(b"dog") == []


def test_a_span_may_end_inside_an_item() -> None:
    budget = EncoderCacheBudget(100)
    planner = EncodePlanner(budget, encode_budget=6)
    seq = seq_with(1, 5, ("cat", 4), 5)
    assert planner.reach(seq, 3) == 3
    planner.pin_items(seq, 3)
    seq.num_computed = 3
    later = EncodePlanner(budget, encode_budget=0)
    assert later.reach(seq, 6) == 6, "it is there already"
    later.pin_items(seq, 6)
    assert (later.jobs, later.num_queries) == ([], 0)


def test_an_item_wanted_twice_is_encoded_once() -> None:
    planner = EncodePlanner(EncoderCacheBudget(100), encode_budget=4)
    one, two = seq_with(1, ("cat", 4), 5, ("cat", 4)), seq_with(2, ("cat", 4), 6)
    for seq, end in ((one, 9), (two, 5)):
        assert planner.reach(seq, end) == end
        planner.pin_items(seq, end)
    assert len(planner.jobs) == 1
    assert (planner.num_queries, planner.num_hits) == (3, 2)


def test_a_prefix_hit_behind_the_item_needs_no_encoder() -> None:
    planner = EncodePlanner(EncoderCacheBudget(100), encode_budget=4)
    seq = seq_with(1, ("cat", 4), 5, 6, num_computed=4)
    assert planner.reach(seq, 6) == 6
    planner.pin_items(seq, 6)
    assert planner.jobs == []


def test_a_prefix_hit_inside_the_item_needs_it() -> None:
    planner = EncodePlanner(EncoderCacheBudget(100), encode_budget=3)
    seq = seq_with(1, ("cat", 4), 5, 6, num_computed=2)
    assert planner.reach(seq, 6) == 2, "no step back before what is computed"
    assert EncodePlanner(EncoderCacheBudget(100), encode_budget=4).reach(seq, 6) == 6


def test_behind_one_that_lacks_room_nobody_starts_an_item() -> None:
    budget = EncoderCacheBudget(8)
    half = seq_with(1, ("cat", 4), 5)
    budget.admit(1, half.request.items[0])
    budget.admit(9, DOG)
    budget.unpin_all(9)
    planner = EncodePlanner(budget, encode_budget=100)
    assert planner.reach(seq_with(2, 5, ("elk", 5)), 6) == 1
    assert planner.reach(seq_with(3, ("dog", 3), 5), 4) == 0, "though it is there"
    assert planner.reach(seq_with(4, ("fox", 1), 5), 2) == 0
    assert planner.reach(half, 5) == 5, "what is begun goes on"


def test_behind_one_that_lacks_budget_residents_may_be_read() -> None:
    budget = EncoderCacheBudget(100)
    budget.admit(9, DOG)
    budget.unpin_all(9)
    planner = EncodePlanner(budget, encode_budget=4)
    assert planner.reach(seq_with(2, 5, ("elk", 5)), 6) == 1
    assert planner.reach(seq_with(3, ("fox", 1), 5), 2) == 0
    assert planner.reach(seq_with(4, ("dog", 3), 5), 4) == 4


def test_what_a_span_reads_is_not_evicted_for_what_it_lacks() -> None:
    budget = EncoderCacheBudget(8)
    for seq_id, new in ((8, DOG), (9, CAT)):
        budget.admit(seq_id, new)
        budget.unpin_all(seq_id)
    planner = EncodePlanner(budget, encode_budget=100)
    seq = seq_with(1, ("elk", 5), ("dog", 3))
    assert planner.reach(seq, 8) == 8
    planner.pin_items(seq, 8)
    assert planner.evicted == [b"cat"]
    seq_2 = seq_with(2, ("fox", 1))
    assert planner.reach(seq_2, 1) == 0


def test_runs_of_an_item_belong_together() -> None:
    clip = ItemSpan(b"clip", "video", ((1, 2), (4, 2)))
    seq = Sequence(1, request("r", [1] * 7, items=[clip]), [1] * 7)
    planner = EncodePlanner(EncoderCacheBudget(10), encode_budget=10)
    planner.pin_items(seq, 3)
    assert [job.num_embeds for job in planner.jobs] == [4]
