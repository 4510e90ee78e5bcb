"""Parts of a model by rank."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.distributed.shard import Cut, Shard, sizes_that_fit


@given(st.integers(1, 8), st.integers(1, 400))
def test_parts_follow_each_other_and_differ_by_one_at_most(size: int, total: int) -> None:
    parts = [Shard(rank, size).part(total) for rank in range(size)]
    assert parts[0][0] == 0
    assert parts[-1][1] == total
    assert all(end == first for (_, end), (first, _) in itertools.pairwise(parts))
    lengths = [end - first for first, end in parts]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) == Shard(0, size).longest_part(total)


def test_heads_of_keys_and_values_are_shared_where_there_are_fewer_than_ranks() -> None:
    assert [Shard(rank, 4).shared_part(2) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [Shard(rank, 2).shared_part(4) for rank in range(2)] == [(0, 2), (2, 4)]
    for total in (3, 6):
        with pytest.raises(ValueError, match=f"{total} cannot be divided by 4"):
            Shard(0, 4).shared_part(total)
    with pytest.raises(ValueError, match="14 cannot be divided by 4"):
        Shard(0, 4).equal_part(14)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Shard(2, 2)


def test_sizes_that_fit() -> None:
    assert sizes_that_fit(14, 2, 4864) == [2]
    assert sizes_that_fit(32, 8, 14336) == [2, 4, 8, 16, 32]
    assert sizes_that_fit(7, 1, 96) == []


def test_cuts() -> None:
    rows, columns = Cut(rows=((0, 2), (4, 7))), Cut(columns=(3, 6))
    assert rows.shape_of((10, 8)) == (5, 8)
    assert rows.of_bias.shape_of((10,)) == (5,)
    assert columns.shape_of((10, 8)) == (10, 3)
    assert columns.of_bias.is_absent
    assert not Cut(columns=(0, 3)).of_bias.is_absent
