"""Parts of a model that one rank of several holds; plain arithmetic, no torch.

A linear layer is split by its outputs (rows of its weight) or by its inputs (columns). Two layers
one behind the other, the first split by outputs and the second by inputs, need one sum over all
ranks (Shoeybi et al., 2019, "Megatron-LM").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Range = tuple[int, int]
"""First index, and the first behind the last."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Part of a tensor (N, ...) that one rank holds.

    rows: ranges of the first axis, in order; none for all of it. columns: range of the last axis;
    None for all of it. is_absent: zeros of the tensor's shape, as another rank adds it.
    """

    rows: tuple[Range, ...] = ()
    columns: Range | None = None
    is_absent: bool = False

    @property
    def of_bias(self) -> Cut:
        """Cut of the bias beside a weight: that of its rows; split by columns, one rank has it."""
        if self.columns is None:
            return self
        return Cut(is_absent=self.columns[0] > 0)

    def shape_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the part of a tensor of some shape."""
        own = list(shape)
        if self.rows:
            own[0] = sum(end - first for first, end in self.rows)
        if self.columns is not None:
            own[-1] = self.columns[1] - self.columns[0]
        return tuple(own)

    def with_rows(self, *rows: Range) -> Cut:
        """Return this cut with other rows."""
        return replace(self, rows=rows)


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank ``rank`` of ``size`` ranks that share one model."""

    rank: int
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}")

    def equal_part(self, total: int) -> Range:
        """Return this rank's part of ``total`` things. Raises ValueError unless all are equal."""
        length, rest = divmod(total, self.size)
        if rest or not length:
            raise ValueError(f"{total} cannot be divided by {self.size}")
        return self.rank * length, (self.rank + 1) * length

    def part(self, total: int) -> Range:
        """Return this rank's part of ``total`` things; parts differ by one at most."""
        return total * self.rank // self.size, total * (self.rank + 1) // self.size

    def longest_part(self, total: int) -> int:
        """Return the number of things of the rank that has most."""
        return -(-total // self.size)

    def shared_part(self, total: int) -> Range:
        """Return this rank's part of KV heads, which several ranks share where there are fewer.

        Raises ValueError where parts of the others cannot be equal.
        """
        if total >= self.size or self.size % total:
            return self.equal_part(total)
        own = self.rank * total // self.size
        return own, own + 1


def sizes_that_fit(num_heads: int, num_kv_heads: int, inner_size: int) -> list[int]:
    """Return the numbers of ranks, above one, that a decoder of these sizes can be split into."""
    most = math.gcd(num_heads, inner_size)
    return [
        size
        for size in range(2, most + 1)
        if most % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    ]
