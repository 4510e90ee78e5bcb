from __future__ import annotations

import itertools

import pytest

from sensorium.core.blocks import IntegrityError
from sensorium.core.kv_cache import NO_MATCH, KVCacheManager
from sensorium.core.request import Sequence
from tests.core.driver import request

seq_ids = itertools.count()


def open_seq(manager: KVCacheManager, prompt: list[int], salt: bytes = b"") -> Sequence:
    seq = Sequence(next(seq_ids), request("r", prompt, salt=salt), list(prompt))
    manager.open(seq)
    return seq


def start(manager: KVCacheManager, prompt: list[int], salt: bytes = b"") -> Sequence:
    seq = open_seq(manager, prompt, salt)
    match = manager.match(seq)
    assert manager.reserve(seq, match)
    seq.num_computed = match.num_tokens
    return seq


def compute(manager: KVCacheManager, seq: Sequence, num_computed: int | None = None) -> None:
    seq.num_computed = len(seq.token_ids) if num_computed is None else num_computed
    manager.commit(seq)


def test_a_prompt_is_found_again_after_its_sequence_has_gone() -> None:
    manager = KVCacheManager(8, 4)
    first = start(manager, list(range(10)))
    blocks = list(first.block_ids)
    compute(manager, first)
    manager.release(first)
    assert manager.num_used_blocks == 0
    second = open_seq(manager, list(range(10)))
    match = manager.match(second)
    assert match.block_ids == tuple(blocks[:2])
    assert match.num_tokens == 8


def test_the_last_token_is_always_left_to_compute() -> None:
    manager = KVCacheManager(8, 4)
    compute(manager, start(manager, list(range(8))))
    assert manager.match(open_seq(manager, list(range(8)))).num_tokens == 4
    assert manager.match(open_seq(manager, list(range(9)))).num_tokens == 8


def test_only_computed_blocks_are_found() -> None:
    manager = KVCacheManager(8, 4)
    seq = start(manager, list(range(12)))
    compute(manager, seq, 7)
    match = manager.match(open_seq(manager, list(range(12))))
    assert match.num_tokens == 4
    assert match.waits_for == seq.block_digests[1], "the rest is on its way"


def test_a_promise_ends_when_the_block_is_there() -> None:
    manager = KVCacheManager(8, 4)
    seq = start(manager, list(range(6)))
    (digest,) = seq.block_digests
    assert manager.is_promised(digest)
    compute(manager, seq)
    assert not manager.is_promised(digest)
    assert manager.match(open_seq(manager, list(range(6)))).waits_for is None


def test_a_promise_ends_when_its_sequence_goes() -> None:
    manager = KVCacheManager(8, 4)
    seq = start(manager, list(range(6)))
    manager.release(seq)
    assert not manager.is_promised(seq.block_digests[0])
    assert manager.match(open_seq(manager, list(range(6)))) == NO_MATCH


def test_another_sequences_promise_survives() -> None:
    manager = KVCacheManager(8, 4)
    seq = start(manager, list(range(6)))
    other = open_seq(manager, list(range(6)))
    assert manager.reserve(other, NO_MATCH)
    manager.release(other)
    assert manager.is_promised(seq.block_digests[0])
    manager.check_integrity([seq, other])


def test_generated_tokens_are_found_too() -> None:
    manager = KVCacheManager(8, 4)
    seq = start(manager, [1, 2, 3])
    compute(manager, seq)
    seq.token_ids += [4, 5, 6]
    assert manager.extend(seq) is not None
    compute(manager, seq, 5)
    assert manager.match(open_seq(manager, [1, 2, 3, 4, 7])).num_tokens == 4


def test_shared_blocks_are_counted_once_and_outlive_the_first() -> None:
    manager = KVCacheManager(8, 4)
    first = start(manager, list(range(10)))
    compute(manager, first)
    second = start(manager, [*range(8), 50, 51])
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    assert manager.num_used_blocks == 4
    manager.release(first)
    assert manager.num_used_blocks == 3
    manager.check_integrity([second])


def test_another_salt_finds_nothing() -> None:
    manager = KVCacheManager(8, 4)
    compute(manager, start(manager, list(range(10)), b"tenant"))
    assert manager.match(open_seq(manager, list(range(10)))) == NO_MATCH
    assert manager.match(open_seq(manager, list(range(10)), b"tenant")).num_tokens == 8


def test_without_prefix_caching_nothing_is_found_or_hashed() -> None:
    manager = KVCacheManager(8, 4, prefix_caching=False)
    seq = start(manager, list(range(10)))
    compute(manager, seq)
    assert seq.block_digests == []
    assert manager.match(open_seq(manager, list(range(10)))) == NO_MATCH


def test_reserve_refuses_and_changes_nothing() -> None:
    manager = KVCacheManager(4, 4)
    first = start(manager, list(range(8)))
    compute(manager, first)
    manager.release(first)
    second = open_seq(manager, list(range(17)))
    match = manager.match(second)
    assert match.num_tokens == 8
    assert not manager.reserve(second, match), "two matched blocks and three new ones, of four"
    assert second.block_ids == []
    assert manager.num_used_blocks == 0
    third = open_seq(manager, list(range(12)))
    assert not manager.reserve(third, manager.match(third), num_spare=2)
    assert manager.reserve(third, manager.match(third), num_spare=1)
    manager.check_integrity([third])


def test_matched_blocks_are_not_handed_out_as_new_ones() -> None:
    manager = KVCacheManager(3, 4)
    first = start(manager, list(range(12)))
    compute(manager, first)
    manager.release(first)
    second = start(manager, list(range(12)))
    assert len(set(second.block_ids)) == 3
    manager.check_integrity([second])


def test_a_block_that_gets_other_contents_is_not_found_any_more() -> None:
    manager = KVCacheManager(3, 4)
    first = start(manager, list(range(12)))
    compute(manager, first)
    manager.release(first)
    start(manager, [70, 71, 72])
    match = manager.match(open_seq(manager, [*range(12), 99]))
    assert match.num_tokens == 8, "the tail goes first, so a prefix is left"


def test_extend_covers_the_known_tokens_or_says_no() -> None:
    manager = KVCacheManager(2, 4)
    seq = start(manager, [1, 2, 3, 4])
    assert manager.extend(seq) == ()
    seq.token_ids.append(5)
    new_block_ids = manager.extend(seq)
    assert new_block_ids is not None
    assert seq.block_ids[1:] == list(new_block_ids)
    seq.token_ids += [6, 7, 8, 9]
    assert manager.extend(seq) is None
    assert len(seq.block_ids) == 2


def test_a_block_computed_twice_is_kept_once() -> None:
    manager = KVCacheManager(8, 4)
    first = start(manager, list(range(5)))
    second = open_seq(manager, list(range(5)))
    assert manager.reserve(second, NO_MATCH)
    compute(manager, second)
    compute(manager, first)
    assert manager.match(open_seq(manager, list(range(5)))).block_ids == (second.block_ids[0],)
    manager.check_integrity([first, second])


def test_integrity_notices_blocks_that_nobody_accounts_for() -> None:
    manager = KVCacheManager(8, 4)
    seq = start(manager, list(range(5)))
    manager.check_integrity([seq])
    with pytest.raises(IntegrityError):
        manager.check_integrity([])
    seq.num_computed = 9
    with pytest.raises(IntegrityError, match="do not cover"):
        manager.check_integrity([seq])


def test_blocks_behind_a_window_are_freed_and_can_still_be_found() -> None:
    manager = KVCacheManager(8, 4, window=6)
    seq = start(manager, list(range(18)))
    first = list(seq.block_ids)
    compute(manager, seq, 9)
    assert manager.num_used_blocks == 5, "the first block has one token that is read"
    compute(manager, seq, 10)
    assert manager.num_used_blocks == 4
    compute(manager, seq)
    assert manager.num_used_blocks == 2
    assert seq.block_ids[3:] == first[3:]
    manager.check_integrity([seq])
    match = manager.match(open_seq(manager, list(range(18))))
    assert match.block_ids == tuple(first[:4])
    other = start(manager, list(range(18)))
    manager.check_integrity([seq, other])
    manager.release(seq)
    manager.release(other)
    assert manager.num_used_blocks == 0
    manager.check_integrity([])


def test_of_blocks_behind_a_window_the_last_are_handed_out_first() -> None:
    manager = KVCacheManager(8, 4, window=4)
    seq = start(manager, list(range(18)))
    compute(manager, seq)
    assert manager.num_used_blocks == 2
    other = start(manager, list(range(50, 66)))  # three blank blocks, and one that was freed
    assert manager.match(open_seq(manager, list(range(18)))).num_tokens == 8
    manager.check_integrity([seq, other])


def test_blocks_behind_the_window_of_an_unsound_sequence_are_freed_and_never_found() -> None:
    manager = KVCacheManager(8, 4, window=4)
    seq = start(manager, list(range(18)))
    compute(manager, seq, 4)
    seq.is_sound = False
    manager.withdraw(seq)
    compute(manager, seq)
    assert manager.num_used_blocks == 2
    manager.check_integrity([seq])
    match = manager.match(open_seq(manager, list(range(18))))
    assert (match.num_tokens, match.waits_for) == (4, None), "the block from before"
    manager.release(seq)
    assert manager.num_used_blocks == 0
    manager.check_integrity([])


def test_a_window_needs_no_prefix_cache() -> None:
    manager = KVCacheManager(4, 4, prefix_caching=False, window=4)
    seq = start(manager, list(range(14)))
    compute(manager, seq)
    assert manager.num_used_blocks == 2
    seq.token_ids += range(14, 21)
    assert manager.extend(seq)
    assert len(seq.block_ids) == 6
    manager.check_integrity([seq])
