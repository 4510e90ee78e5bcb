from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.core.blocks import BlockPool, IntegrityError


def test_allocates_each_block_once() -> None:
    pool = BlockPool(4, 16)
    assert sorted(pool.allocate(3) + pool.allocate(1)) == [0, 1, 2, 3]
    assert (pool.num_free, pool.num_used) == (0, 4)


def test_refuses_more_than_it_has_and_changes_nothing() -> None:
    pool = BlockPool(3, 16)
    pool.allocate(2)
    with pytest.raises(ValueError, match="2 blocks wanted, 1 are free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_a_shared_block_is_free_after_the_last_release() -> None:
    pool = BlockPool(2, 16)
    (block_id,) = pool.allocate(1)
    pool.share(block_id)
    pool.release(block_id)
    assert not pool.is_free(block_id)
    pool.release(block_id)
    assert pool.is_free(block_id)


def test_a_free_block_can_be_shared_again_and_is_not_handed_out() -> None:
    pool = BlockPool(2, 16)
    (block_id,) = pool.allocate(1)
    pool.release(block_id, keep=True)
    pool.share(block_id)
    assert pool.allocate(1) != [block_id]
    assert pool.num_free == 0


def test_blank_blocks_go_first_then_the_least_recently_used() -> None:
    pool = BlockPool(4, 16)
    first, second, third, fourth = pool.allocate(4)
    pool.release(second, keep=True)
    pool.release(first, keep=True)
    pool.release(fourth)
    pool.release(third, keep=True)
    assert pool.allocate(4) == [fourth, second, first, third]


def test_releasing_a_free_block_is_an_error() -> None:
    pool = BlockPool(1, 16)
    with pytest.raises(ValueError, match="block 0 is released, but nobody uses it"):
        pool.release(0)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_an_empty_pool_cannot_be_built(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="a pool needs blocks"):
        BlockPool(num_blocks, block_size)


def test_integrity_notices_a_lost_and_a_foreign_reference() -> None:
    pool = BlockPool(3, 16)
    held = pool.allocate(2)
    pool.check_integrity(held)
    with pytest.raises(IntegrityError):
        pool.check_integrity(held[:1])
    with pytest.raises(IntegrityError):
        pool.check_integrity([*held, held[0]])


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 9))))
def test_counts_stay_right_whatever_happens(operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(5, 16)
    held: list[int] = []
    for verb, number in operations:
        if verb == "allocate" and number <= pool.num_free:
            new = pool.allocate(number)
            assert not set(new) & set(held)
            held += new
        elif verb == "share":
            pool.share(number % 5)
            held.append(number % 5)
        elif verb == "release" and held:
            pool.release(held.pop(number % len(held)), keep=bool(number % 2))
        pool.check_integrity(held)
        assert pool.num_used == len(set(held))
