"""Sums and exchanges between ranks, which are threads here with real sockets."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium.distributed.collectives import SMALL_BYTES, Collectives
from sensorium.distributed.shard import Shard

Work = Callable[[Collectives], Any]


def together(size: int, meeting: Path, work: Work) -> list[Any]:
    """Results of ranks that do the same at the same time."""

    def run(rank: int) -> Any:
        ranks = Collectives(Shard(rank, size))
        ranks.join(meeting, timedelta(seconds=60), b"secret")
        try:
            return work(ranks)
        finally:
            ranks.leave()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def numbers(rank: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((rows, 64), generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("size", [2, 3])
def test_sums_have_one_order_wherever_a_row_stands(size: int, tmp_path: Path) -> None:
    many = 2 * SMALL_BYTES // (64 * 4)

    def work(ranks: Collectives) -> list[torch.Tensor]:
        own = partial(numbers, ranks.shard.rank, many)
        whole = ranks.all_reduce(own())
        return [
            whole,
            ranks.all_reduce(own()[5:6]),
            ranks.all_reduce(own().t()).t(),
            ranks.all_reduce(own(torch.bfloat16)[:3]),
        ]

    results = together(size, tmp_path / "meeting", work)
    expected = numbers(0, many)
    for rank in range(1, size):
        expected = expected + numbers(rank, many)
    for whole, row, turned, _ in results:
        assert torch.equal(whole, expected)
        assert torch.equal(row, expected[5:6])
        assert torch.equal(turned, expected)
    assert torch.equal(results[0][3], results[1][3])


def test_the_first_rank_tells_and_gathers(tmp_path: Path) -> None:
    def work(ranks: Collectives) -> tuple[torch.Tensor, list[torch.Tensor]]:
        rank = ranks.shard.rank
        return ranks.broadcast(numbers(rank, 4)), ranks.gather(numbers(rank, 3))

    results = together(3, tmp_path / "meeting", work)
    assert all(torch.equal(told, numbers(0, 4)) for told, _ in results)
    assert all(torch.equal(part, numbers(rank, 3)) for rank, part in enumerate(results[0][1]))
    assert results[1][1] == results[2][1] == []


def test_a_process_that_does_not_know_the_secret_is_no_rank(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        secret = b"secret" if rank == 0 else b"another"
        Collectives(Shard(rank, 2)).join(tmp_path / "meeting", timedelta(seconds=60), secret)

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, rank) for rank in range(2)]
        for rank, found in enumerate(runs):
            with pytest.raises(RuntimeError, match=f"answers as rank {1 - rank} is another"):
                found.result(60)
