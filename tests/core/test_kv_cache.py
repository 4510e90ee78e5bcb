from __future__ import annotations

import itertools

import pytest

from sensorium.core.blocks import IntegrityError
from sensorium.core.kv_cache import NO_MATCH, KVCacheManager
from sensorium.core.request import Sequence
from tests.core.driver import request

seq_ids = itertools.count()


def open_seq(ledger: KVCacheManager, prompt: list[int], salt: bytes = b"") -> Sequence:
    seq = Sequence(next(seq_ids), request("r", prompt, salt=salt), list(prompt))
    ledger.open(seq)
    return seq


def start(ledger: KVCacheManager, prompt: list[int], salt: bytes = b"") -> Sequence:
    seq = open_seq(ledger, prompt, salt)
    match = ledger.match(seq)
    assert ledger.reserve(seq, match)
    seq.num_computed = match.num_tokens
    return seq


def compute(ledger: KVCacheManager, seq: Sequence, num_computed: int | None = None) -> None:
    seq.num_computed = len(seq.token_ids) if num_computed is None else num_computed
    ledger.commit(seq)


def test_a_prompt_is_found_again_after_its_sequence_has_gone() -> None:
    ledger = KVCacheManager(8, 4)
    first = start(ledger, list(range(10)))
    blocks = list(first.block_ids)
    compute(ledger, first)
    ledger.release(first)
    assert ledger.num_used_blocks == 0
    second = open_seq(ledger, list(range(10)))
    match = ledger.match(second)
    assert match.block_ids == tuple(blocks[:2])
    assert match.num_tokens == 8


def test_the_last_token_is_always_left_to_compute() -> None:
    ledger = KVCacheManager(8, 4)
    compute(ledger, start(ledger, list(range(8))))
    assert ledger.match(open_seq(ledger, list(range(8)))).num_tokens == 4
    assert ledger.match(open_seq(ledger, list(range(9)))).num_tokens == 8


def test_only_computed_blocks_are_found() -> None:
    ledger = KVCacheManager(8, 4)
    seq = start(ledger, list(range(12)))
    compute(ledger, seq, 7)
    match = ledger.match(open_seq(ledger, list(range(12))))
    assert match.num_tokens == 4
    assert match.waits_for == seq.block_digests[1], "the rest is on its way"


def test_a_promise_ends_when_the_block_is_there() -> None:
    ledger = KVCacheManager(8, 4)
    seq = start(ledger, list(range(6)))
    (digest,) = seq.block_digests
    assert ledger.is_promised(digest)
    compute(ledger, seq)
    assert not ledger.is_promised(digest)
    assert ledger.match(open_seq(ledger, list(range(6)))).waits_for is None


def test_a_promise_ends_when_its_sequence_goes() -> None:
    ledger = KVCacheManager(8, 4)
    seq = start(ledger, list(range(6)))
    ledger.release(seq)
    assert not ledger.is_promised(seq.block_digests[0])
    assert ledger.match(open_seq(ledger, list(range(6)))) == NO_MATCH


def test_another_sequences_promise_survives() -> None:
    ledger = KVCacheManager(8, 4)
    seq = start(ledger, list(range(6)))
    other = open_seq(ledger, list(range(6)))
    assert ledger.reserve(other, NO_MATCH)
    ledger.release(other)
    assert ledger.is_promised(seq.block_digests[0])
    ledger.check_integrity([seq, other])


def test_generated_tokens_are_found_too() -> None:
    ledger = KVCacheManager(8, 4)
    seq = start(ledger, [1, 2, 3])
    compute(ledger, seq)
    seq.token_ids += [4, 5, 6]
    assert ledger.extend(seq) is not None
    compute(ledger, seq, 5)
    assert ledger.match(open_seq(ledger, [1, 2, 3, 4, 7])).num_tokens == 4


def test_shared_blocks_are_counted_once_and_outlive_the_first() -> None:
    ledger = KVCacheManager(8, 4)
    first = start(ledger, list(range(10)))
    compute(ledger, first)
    second = start(ledger, [*range(8), 50, 51])
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    assert ledger.num_used_blocks == 4
    ledger.release(first)
    assert ledger.num_used_blocks == 3
    ledger.check_integrity([second])


def test_another_salt_finds_nothing() -> None:
    ledger = KVCacheManager(8, 4)
    compute(ledger, start(ledger, list(range(10)), b"tenant"))
    assert ledger.match(open_seq(ledger, list(range(10)))) == NO_MATCH
    assert ledger.match(open_seq(ledger, list(range(10)), b"tenant")).num_tokens == 8


def test_without_prefix_caching_nothing_is_found_or_hashed() -> None:
    ledger = KVCacheManager(8, 4, prefix_caching=False)
    seq = start(ledger, list(range(10)))
    compute(ledger, seq)
    assert seq.block_digests == []
    assert ledger.match(open_seq(ledger, list(range(10)))) == NO_MATCH


def test_reserve_refuses_and_changes_nothing() -> None:
    ledger = KVCacheManager(4, 4)
    first = start(ledger, list(range(8)))
    compute(ledger, first)
    ledger.release(first)
    second = open_seq(ledger, list(range(17)))
    match = ledger.match(second)
    assert match.num_tokens == 8
    assert not ledger.reserve(second, match), "two matched blocks and three new ones, of four"
    assert second.block_ids == []
    assert ledger.num_free_blocks == 4
    third = open_seq(ledger, list(range(12)))
    assert not ledger.reserve(third, ledger.match(third), num_spare=2)
    assert ledger.reserve(third, ledger.match(third), num_spare=1)
    ledger.check_integrity([third])


def test_matched_blocks_are_not_handed_out_as_new_ones() -> None:
    ledger = KVCacheManager(3, 4)
    first = start(ledger, list(range(12)))
    compute(ledger, first)
    ledger.release(first)
    second = start(ledger, list(range(12)))
    assert len(set(second.block_ids)) == 3
    ledger.check_integrity([second])


def test_a_block_that_gets_other_contents_is_not_found_any_more() -> None:
    ledger = KVCacheManager(3, 4)
    first = start(ledger, list(range(12)))
    compute(ledger, first)
    ledger.release(first)
    start(ledger, [70, 71, 72])
    match = ledger.match(open_seq(ledger, [*range(12), 99]))
    assert match.num_tokens == 8, "the tail goes first, so a prefix is left"


def test_extend_covers_the_known_tokens_or_says_no() -> None:
    ledger = KVCacheManager(2, 4)
    seq = start(ledger, [1, 2, 3, 4])
    assert ledger.extend(seq) == ()
    seq.token_ids.append(5)
    new_block_ids = ledger.extend(seq)
    assert new_block_ids is not None
    assert seq.block_ids[1:] == list(new_block_ids)
    seq.token_ids += [6, 7, 8, 9]
    assert ledger.extend(seq) is None
    assert len(seq.block_ids) == 2


def test_a_block_computed_twice_is_kept_once() -> None:
    ledger = KVCacheManager(8, 4)
    first = start(ledger, list(range(5)))
    second = open_seq(ledger, list(range(5)))
    assert ledger.reserve(second, NO_MATCH)
    compute(ledger, second)
    compute(ledger, first)
    assert ledger.match(open_seq(ledger, list(range(5)))).block_ids == (second.block_ids[0],)
    ledger.check_integrity([first, second])


def test_integrity_notices_blocks_that_nobody_accounts_for() -> None:
    ledger = KVCacheManager(8, 4)
    seq = start(ledger, list(range(5)))
    ledger.check_integrity([seq])
    with pytest.raises(IntegrityError):
        ledger.check_integrity([])
    seq.num_computed = 9
    with pytest.raises(IntegrityError, match="do not cover"):
        ledger.check_integrity([seq])
